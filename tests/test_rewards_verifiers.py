"""The number grammar and the two verifiers: tables by hand, an exhaustive oracle, and fuzz."""

import itertools
import time
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.rewards import FINAL_PREFIX, correctness_reward, final_answer, format_reward, parse_number

NUMBERS = {
    "0": "0",
    "007": "7",
    "18": "18",
    "-5": "-5",
    "+5": "5",
    "$18": "18",
    "-$18.50": "-18.50",
    "$-18.50": "-18.50",
    "1,234": "1234",
    "12,345,678.9": "12345678.9",
    "50%": "50",
    "50 %": "50",
    "50 percent": "50",
    "5 dollars": "5",
    "5 square feet": "5",
    "5 points": "5",
    "5.": "5",
    "5.25.": "5.25",
    "5 apples.": "5",
    "$1,000.00.": "1000",
    "1" * 64: "1" * 64,
}
NOT_NUMBERS = [
    *["", " ", "five", "$", "-", ".", "%", "5 ", " 5", "5\n", "\t5"],
    *["1e309", "1E5", "nan", "NaN", "inf", "Infinity", "-inf", "0x10", "1_000"],
    *[
        "3/4",
        "1 1/2",
        "5k",
        "5 k",
        "5 million",
        "5 millions",
        "2 dozens",
        "5 bn",
        "5 or six",
        "5 and a half",
        "5 plus two",
        "5 point five",
    ],
    *[f"5 {scale}" for scale in ("half", "dozen", "hundred", "thousand", "billion", "trillion", "Hundreds")],
    *[f"5 {word} six" for word in ("and", "to", "minus")],
    *["1,23", "1,2345", ",123", "1,,234", "1234,567", "12,34,567", "1,234,", "1.234,5", "1.2.3", ".5", "5.."],
    *["--5", "+-5", "-$-5", "$$5", "5$", "$ 5", "- 5", "5  apples", "5 apples ", "5-6", "5 6", "5%%", "5% off"],
    *[
        "٥",
        "５",
        "५",
        "²",
        "5\u00a0apples",
        "€5",
        "£5",
        "\u22125",
        "5 mètres",
        "5\u200b",
        "(5)",
        "{5}",
        "**5**",
        "x = 5",
    ],
    *["1" * 65, "5 " + "a" * 63],
]


@pytest.mark.parametrize("text", NUMBERS)
def test_numbers_of_the_grammar_have_their_value(text):
    assert parse_number(text) == Decimal(NUMBERS[text])


@pytest.mark.parametrize("text", NOT_NUMBERS)
def test_anything_else_is_no_number(text):
    assert parse_number(text) is None
    if text == text.rstrip():  # whitespace at the end of the line is not part of the number
        assert final_answer(FINAL_PREFIX + text) is None
    if text == text.strip():
        assert correctness_reward([FINAL_PREFIX + "5"], answer=[text]) == [0.0]


def read_slowly(text: str) -> Decimal | None:
    """The grammar again, character by character, for the alphabet of the exhaustive test."""
    rest, sign = text, ""
    for prefix in ("-$", "$-", "-", "$", ""):  # longest first
        if rest.startswith(prefix):
            rest, sign = rest[len(prefix) :], "-" if "-" in prefix else ""
            break
    rest = rest.removesuffix(".")
    if rest.endswith("%"):
        rest = rest[:-1].removesuffix(" ")
    elif " " in rest:
        rest, *units = rest.split(" ")
        if not all(unit and set(unit) == {"a"} for unit in units):
            return None
    whole, *decimals = rest.split(".")
    if len(decimals) > 1 or any(not part or set(part) != {"1"} for part in decimals):
        return None
    first, *thousands = whole.split(",")
    if not first or set(first) != {"1"} or any(part != "111" for part in thousands) or (thousands and len(first) > 3):
        return None
    return Decimal(sign + first + "".join(thousands) + "." + (decimals or ["0"])[0])


def test_the_grammar_agrees_with_a_slow_reader_on_every_short_text():
    found = 0
    for length in range(7):
        for letters in itertools.product("1,.$-% a", repeat=length):
            text = "".join(letters)
            assert parse_number(text) == read_slowly(text), text
            found += parse_number(text) is not None
    assert found > 200


@given(st.integers(-(10**20), 10**20), st.integers(0, 4), st.booleans(), st.sampled_from(["", "%", " cm", "."]))
def test_a_number_written_by_python_is_read_back(value, places, commas, ending):
    text = f"{Decimal(value).scaleb(-places):{',' if commas else ''}f}" + ending
    assert parse_number(text) == Decimal(value).scaleb(-places)
    assert correctness_reward([f"so\n{FINAL_PREFIX}{text}\n"], answer=[text]) == [1.0]


@given(st.text(), st.text())
def test_no_text_raises_or_earns_without_the_line(completion, reference):
    for text in (completion, FINAL_PREFIX + completion, f"{completion}\n{FINAL_PREFIX}{reference}"):
        has_line = final_answer(text) is not None
        assert format_reward([text]) == [float(has_line)]
        assert correctness_reward([text], answer=[reference])[0] <= has_line
        assert final_answer(text.replace(FINAL_PREFIX, "")) is None


@pytest.mark.parametrize(
    ("completion", "number"),
    [
        ("2 + 2 = 4\n#### The final answer is 4", "4"),
        ("#### The final answer is 4\n", "4"),
        ("#### The final answer is 4 \t\r\nmore text", "4"),
        ("#### The final answer is 4\n#### The final answer is 5", "4"),
        ("#### The final answer is unknown\n#### The final answer is 5", "5"),
        ("####  The final answer is 4", None),
        ("#### The final answer is  4", None),
        ("#### The final answer is: 4", None),
        ("#### the final answer is 4", None),
        (" #### The final answer is 4", None),
        ("So #### The final answer is 4", None),
        ("#### The final answer is 4 because 2 + 2 = 4", None),
        ("#### The final answer is\n4", None),
        ("#### The final answer is ", None),
        ("text\x0b#### The final answer is 4", None),
        ("text\u2028#### The final answer is 4", None),
        ("#### 4", None),
        ("The answer is 4", None),
        ("", None),
    ],
)
def test_the_final_line_is_one_full_line_and_the_first_counts(completion, number):
    assert final_answer(completion) == (None if number is None else Decimal(number))
    assert format_reward([completion]) == [float(number is not None)]


def test_correctness_is_within_a_thousandth_inclusive():
    texts = [FINAL_PREFIX + number for number in ("5.001", "4.999", "5.0011", "4.9989", "-5", "$5.00", "500%")]
    assert correctness_reward(texts, answer=["5"] * 7) == [1, 1, 0, 0, 0, 1, 0]
    as_gsm8k_has_it = "He has 6/2=<<6/2=3>>3 and 2 more.\n#### 5"
    assert correctness_reward(texts, answer=[as_gsm8k_has_it] * 7) == [1, 1, 0, 0, 0, 1, 0]


def test_large_numbers_are_compared_exactly_where_floats_are_not():
    text, reference = f"{FINAL_PREFIX}9007199254740993", "9007199254740992"  # 2**53 + 1 and 2**53: one float
    assert correctness_reward([text], answer=[reference]) == [0.0]


@pytest.mark.parametrize(
    "text",
    [
        "1" * 1_000_000,
        FINAL_PREFIX + "1" * 1_000_000,
        FINAL_PREFIX + "1,111" * 200_000,
        FINAL_PREFIX + "5" + " a" * 500_000 + "!",
        FINAL_PREFIX + "5" + " " * 1_000_000 + "x",
        FINAL_PREFIX * 50_000,
        (FINAL_PREFIX + "1,1\n") * 30_000,
        "\n" * 1_000_000,
    ],
)
def test_a_million_characters_are_refused_quickly(text):
    start = time.process_time()
    assert correctness_reward([text], answer=["1"]) == format_reward([text]) == [0.0]
    assert time.process_time() - start < 1.0
