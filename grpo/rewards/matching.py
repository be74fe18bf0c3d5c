"""More verifiers, for `rewards.functions` or a task of your own: exact, numeric, multiple choice, boxed LaTeX, regex.

Pure functions of text, like grpo.rewards.verifiers. *_match look at the completion's final line if it has one, else at
all of it, as the others do.
"""

from __future__ import annotations

import logging
import re
from fractions import Fraction

from grpo.rewards.verifiers import FINAL_PREFIX

RELATIVE_TOLERANCE = Fraction(1, 10**6)
MAX_EXPONENT = 300  # 1e999999999 would fill the memory
_FRACTION = re.compile(r"(?P<sign>[+-]?)(?:(?P<whole>\d{1,40}) )?(?P<top>\d{1,40})/(?P<bottom>\d{1,40})", re.ASCII)
_DECIMAL = re.compile(
    r"(?P<number>[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d*)?)"
    r"(?:(?:[eE]| ?(?:x|\*|×) ?10\^)\{?(?P<exponent>[+-]?\d{1,4})\}?)?(?P<percent> ?%)?",
    re.ASCII,
)
_CHOICE = re.compile(r"(?:\b(?:answer|choice|option)\b(?: is)?:? *)?[(\[*]*([A-Z])[)\]*]*[.:]?", re.IGNORECASE)
_BRACE = re.compile(r"\\boxed\{|\\.|[{}]", re.DOTALL)  # or an escaped character: \{ opens nothing
_MATHEMATICS = re.compile(r"[^\w\s,]")


def final_text(completion: str) -> str:
    """What follows FINAL_PREFIX in the first line that opens with it, else the whole completion; stripped."""
    lines = (line for line in completion.split("\n") if line.startswith(FINAL_PREFIX))
    return next(lines, FINAL_PREFIX + completion)[len(FINAL_PREFIX) :].strip()


def parse_value(text: str) -> Fraction | None:
    """The exact value of a decimal, a fraction (3/4, 1 1/2), 75% (which is 3/4), 1.5e-3 or 1.5 x 10^-3; else None."""
    text = text.strip()
    if len(text) > 100:
        return None
    if match := _FRACTION.fullmatch(text):
        if int(match["bottom"]) == 0:
            return None
        value = int(match["whole"] or 0) + Fraction(int(match["top"]), int(match["bottom"]))
        return -value if match["sign"] == "-" else value
    match = _DECIMAL.fullmatch(text)
    exponent = int(match["exponent"] or 0) if match else 0
    if match is None or not any(map(str.isdigit, match["number"])) or abs(exponent) > MAX_EXPONENT:
        return None
    value = Fraction(match["number"].replace(",", "")) * Fraction(10) ** exponent
    return value / 100 if match["percent"] else value


def exact_match(completions: list[str], *, answer: list[str], **columns: list) -> list[float]:
    """1 where the final text is the answer, apart from case and the amount of space."""
    fold = lambda text: " ".join(text.casefold().split())
    return [float(fold(final_text(c)) == fold(a)) for c, a in zip(completions, answer, strict=True)]


def numeric_match(completions: list[str], *, answer: list[str], **columns: list) -> list[float | None]:
    """1 where the final text has the answer's value (see `parse_value`) to a RELATIVE_TOLERANCE.

    Abstains where the answer itself is no number.
    """
    return [_value_score(parse_value(final_text(c)), parse_value(a)) for c, a in zip(completions, answer, strict=True)]


def _value_score(value: Fraction | None, reference: Fraction | None) -> float | None:
    if reference is None:
        return None
    return float(value is not None and abs(value - reference) <= RELATIVE_TOLERANCE * abs(reference))


def choice_match(completions: list[str], *, answer: list[str], **columns: list) -> list[float]:
    """1 where the last line is one letter and the answer's: `B`, `(b)`, `**B**`, `Answer: B.`, `The answer is B`."""
    return [float(_choice(c) == a.strip().strip("()").upper()) for c, a in zip(completions, answer, strict=True)]


def _choice(completion: str) -> str | None:
    lines = final_text(completion).rsplit("\n", 1)
    last = re.sub(r"^(?:so|the|correct|final| |,)*(?=answer|choice|option)", "", lines[-1].strip(), flags=re.I)
    match = _CHOICE.fullmatch(last)
    return match[1].upper() if match else None


def boxed_math(completions: list[str], *, answer: list[str], **columns: list) -> list[float | None]:
    r"""1 where math-verify (extra `math`) finds the \boxed{...} equal to the answer, 0 without a box; abstains where it
    cannot read the answer. Of several boxes the last counts; those that "and", "or" or a comma joins are one set.

    Its own timeouts are off: the worker's deadline is the one that counts.
    """
    try:
        from math_verify import LatexExtractionConfig, parse, verify
    except ImportError as error:
        raise ValueError("reward boxed_math: math-verify is not installed; pip install -e '.[math]'") from error

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # each worker would warn that the timeouts are off
    boxes = {"extraction_config": [LatexExtractionConfig(boxed_match_priority=0)], "parsing_timeout": None}
    found = [parse(_boxes(text), **boxes) for text in completions]
    golds = [parse(f"${text}$", parsing_timeout=None) for text in answer]
    return [
        float(verify(gold, value, timeout_seconds=None)) if gold else None
        for value, gold in zip(found, golds, strict=True)
    ]


def _boxes(text: str) -> str:
    r"""Each closed box as $\boxed{...}$, after the words before it. Given the whole text, math-verify would read other
    mathematics where a box is empty or a sentence calls something else the final answer."""
    opened: list[re.Match] = []
    boxes: list[tuple[int, int]] = []
    for brace in _BRACE.finditer(text):
        if brace[0] in ("{", r"\boxed{"):
            opened.append(brace)
        elif brace[0] == "}" and opened:
            start = opened.pop()
            if start[0] != "{":
                while boxes and boxes[-1][0] > start.start():  # inside this one
                    boxes.pop()
                boxes.append((start.start(), brace.end()))
    ends = [0, *(end for _, end in boxes)]
    words = [_MATHEMATICS.sub(" ", text[end:start]) for end, (start, _) in zip(ends, boxes, strict=False)]
    return "".join(f"{before} ${text[start:end]}$ " for before, (start, end) in zip(words, boxes, strict=True))


def regex_format(completions: list[str], *, pattern: str, **columns: list) -> list[float]:
    """1 where the whole completion matches `pattern` (Python, with DOTALL); bind it with functools.partial."""
    compiled = re.compile(pattern, re.DOTALL)
    return [float(compiled.fullmatch(text) is not None) for text in completions]


def length_penalty(completions: list[str], *, soft: int = 200, hard: int = 400, **columns: list) -> list[float]:
    """0 up to `soft` words, falling evenly to -1 at `hard` and beyond."""
    if not 0 <= soft < hard:
        raise ValueError(f"soft={soft} must be below hard={hard}, in words")
    excess = [(len(text.split()) - soft) / (hard - soft) for text in completions]
    return [-min(1.0, max(0.0, share)) for share in excess]


def repetition_penalty(completions: list[str], *, size: int = 4, **columns: list) -> list[float]:
    """Minus the share of runs of `size` words that occurred before in the text: 0 for none, towards -1 for a loop."""
    return [-_repeated(text.casefold().split(), size) for text in completions]


def _repeated(words: list[str], size: int) -> float:
    runs = [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
