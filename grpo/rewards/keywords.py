"""Rewards for domain text: which of the required terms does it use, in prose. Used by the task `keywords`.

A row has `groups`, a list of groups of terms that mean the same (any one of them is enough), and optionally
`sections`, a heading for each group or null: its term must stand under a line that opens with that heading and a
colon, apart from list marks and numbers; and `ordered`: the groups must come in their order.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import defaultdict

LIST_CREDIT = 0.5  # of a term outside a sentence
SENTENCE_WORDS = 5  # fewer are a list item or a heading
HEADING_CHARACTERS = 40  # at most, before the colon
_LIST_MARK = re.compile(r"[\s#*+-]*(?:\d{1,2}[.)]\s)?")
_WORD = re.compile(r"[^\W_]+")
_SENTENCE_END = re.compile(r"[.!?]\s|\n+")
_ENDINGS = (("ies", "y"), ("ing", ""), ("ed", ""), ("es", ""), ("s", ""), ("e", ""))

Pieces = list[tuple[int, str]]  # parts of a text: number of its words before the piece, the piece


def stem(word: str) -> str:
    """The word without case and the commonest English endings: treats, treated, treating -> treat."""
    word = word.casefold()
    for ending, replacement in _ENDINGS:
        if word.endswith(ending) and not word.endswith("ss") and len(word) - len(ending) >= 3:
            return word[: -len(ending)] + replacement
    return word


def keyword_reward(
    completions: list[str], *, groups: list, sections: list | None = None, ordered: list | None = None, **columns: list
) -> list[float]:
    """Mean over the groups: 1 if one of its terms is used in a sentence, LIST_CREDIT if only elsewhere, else 0.

    A sentence has at least SENTENCE_WORDS words, at most half of them required terms: a list of keywords earns half.
    With `ordered` the mean is scaled by the share of the groups found that come in order (the longest rising
    subsequence). Repeating a term adds nothing.
    """
    empty = [None] * len(completions)
    rows = zip(completions, groups, sections or empty, ordered or empty, strict=True)
    return [_score(text, own, headings or [None] * len(own), bool(order)) for text, own, headings, order in rows]


def _score(text: str, groups: list[list[str]], headings: list[str | None], ordered: bool) -> float:
    terms = [[stems(term) for term in group] for group in groups]
    parts = _sections(text)
    shown = [[(0, text)] if heading is None else parts[_heading(heading)] for heading in headings]
    matches = [_find(part, group, terms) for part, group in zip(shown, terms, strict=True)]
    found = [match for match in matches if match]
    credit = sum(credit for _, credit in found)
    if ordered and found:
        credit *= _longest_increasing([position for position, _ in found]) / len(found)
    return credit / len(groups)


def stems(text: str) -> list[str]:
    """The stems of its words."""
    return [stem(word) for word in _WORD.findall(text)]


def _sections(text: str) -> dict[str, Pieces]:
    """Heading -> the text under it: what follows a `Heading:` that opens a line, up to the next; before any, ""."""
    found, heading, position = defaultdict(list), "", 0
    for line in text.split("\n"):
        before, colon, after = line.partition(":")
        name, start = _heading(before), position
        position += len(_WORD.findall(line))
        if colon and 0 < len(name) <= HEADING_CHARACTERS:
            heading, line = name, after
            start = position - len(_WORD.findall(after))
        found[heading].append((start, line))
    return found


def _heading(text: str) -> str:
    """The heading without case, marks of Markdown and the number of a list: `2. **Therapy` is therapy."""
    return text[_LIST_MARK.match(text).end() :].strip(" \t#*").casefold()


def _find(pieces: Pieces, group: list[list[str]], terms: list[list[list[str]]]) -> tuple[int, float] | None:
    """(number of its first word, credit) where a term of the group first earns most; None if it is nowhere."""
    matches = []
    for start, text in pieces:
        for words in map(stems, _SENTENCE_END.split(text)):
            positions = [position for term in group for position in _positions(words, term)]
            if positions:
                matches.append((start + min(positions), 1.0 if _is_prose(words, terms) else LIST_CREDIT))
            start += len(words)
    return max(matches, key=lambda match: match[1], default=None)


def _positions(words: list[str], term: list[str]) -> list[int]:
    return [i for i in range(len(words) - len(term) + 1) if words[i : i + len(term)] == term]


def _is_prose(words: list[str], terms: list[list[list[str]]]) -> bool:
    required = {i + k for group in terms for term in group for i in _positions(words, term) for k in range(len(term))}
    return len(words) >= SENTENCE_WORDS and 2 * len(required) <= len(words)


def _longest_increasing(positions: list[int]) -> int:
    """Length of the longest strictly rising subsequence (patience sorting)."""
    tails: list[int] = []
    for position in positions:
        at = bisect_left(tails, position)
        tails[at : at + 1] = [position]
    return len(tails)
