"""Pure verifiers: text in, reward out. No model, no file, no finish reason; nothing here raises on any text.

A reward function takes a batch, `(completions, **columns) -> list of float | None`, where each column is a
list beside `completions`. The tasks choose functions and weights; grpo.rewards.runner calls them.
"""

from __future__ import annotations

import re
from decimal import Decimal

FINAL_PREFIX = "#### The final answer is "
TOLERANCE = Decimal("0.001")
MAX_NUMBER_CHARACTERS = 64

_NUMBER = re.compile(
    r"(?P<sign>[+-]?\$?|\$[+-])"
    r"(?P<digits>\d{1,3}(?:,\d{3})+|\d+)(?P<decimals>\.\d+)?"
    r"(?: ?%|(?P<units>(?: [A-Za-z]+)+))?\.?",
    re.ASCII,
)
# Words after a number that change its value, or introduce a second one, are not units.
_SCALES = {"k", "bn", "half", "dozen", "hundred", "thousand", "million", "billion", "trillion", "point"}
_SCALES |= {f"{scale}s" for scale in _SCALES - {"k", "bn", "half", "point"}}
_CONJUNCTIONS = {"and", "or", "to", "plus", "minus"}


def parse_number(text: str) -> Decimal | None:
    """The number that the whole of `text` writes, else None.

    [sign] [$] [sign] digits [.digits] [% | units] [.]   with at most one sign, all ASCII; digits are plain or
    with well-formed thousands commas; units are words of letters, each after one space, none of which changes
    the value ("5 million", "5 or six"). `%` and units do not scale: "50%" is 50, in completion and reference
    alike. At most MAX_NUMBER_CHARACTERS in all; no exponents, fractions, infinities or NaN.
    """
    match = _NUMBER.fullmatch(text) if len(text) <= MAX_NUMBER_CHARACTERS else None
    if match is None or (_SCALES | _CONJUNCTIONS) & set((match["units"] or "").lower().split()):
        return None
    sign = match["sign"].replace("$", "")
    return Decimal(sign + match["digits"].replace(",", "") + (match["decimals"] or ""))


def final_answer(completion: str) -> Decimal | None:
    """The number of the first full line `#### The final answer is <number>`, else None.

    Lines end at "\\n" only. Spaces, tabs and carriage returns at the end of the line are ignored (so CRLF text
    reads the same); anything before `####`, other spacing or other case is not the line. A line whose number
    `parse_number` refuses is not a final line either; of two contradicting final lines the first counts.
    """
    for line in completion.split("\n"):
        if line.startswith(FINAL_PREFIX):
            number = parse_number(line[len(FINAL_PREFIX) :].rstrip(" \t\r"))
            if number is not None:
                return number
    return None


def format_reward(completions: list[str], **columns: list) -> list[float | None]:
    """1 where the completion has a final line with a number (see `final_answer`), else 0."""
    return [float(final_answer(completion) is not None) for completion in completions]


def correctness_reward(completions: list[str], *, answer: list[str], **columns: list) -> list[float | None]:
    """1 where the final line's number is within TOLERANCE (inclusive) of the reference, else 0.

    The reference is read by the same grammar, without spaces around it; if it has a `####`, as in GSM8K's answer
    column, what follows the last one is read. One that is not a number is never matched.
    """
    return [
        float(_is_equal(final_answer(text), parse_number(ref.rpartition("####")[2].strip(" \t\r\n"))))
        for text, ref in zip(completions, answer, strict=True)
    ]


def _is_equal(number: Decimal | None, reference: Decimal | None) -> bool:
    return number is not None and reference is not None and abs(number - reference) <= TOLERANCE
