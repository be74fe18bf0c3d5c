"""The reward of vs_trl, in a file that a worker process imports without loading torch."""

from __future__ import annotations


def early_letters(completions: list[str], **columns: object) -> list[float]:
    """The reward of both: share of letters from a to m."""
    letters = [[letter for letter in text if letter.isalpha()] for text in completions]
    return [sum(letter <= "m" for letter in row) / max(len(row), 1) for row in letters]
