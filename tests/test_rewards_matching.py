"""Exact, numeric, choice and boxed answers, formats and penalties: values by hand, and no text that stops them."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest

from grpo.rewards import FINAL_PREFIX
from grpo.rewards.matching import (
    boxed_math,
    choice_match,
    exact_match,
    length_penalty,
    numeric_match,
    parse_value,
    regex_format,
    repetition_penalty,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3/4", "3/4"),
        ("-3/4", "-3/4"),
        ("1 1/2", "3/2"),
        ("-1 1/2", "-3/2"),
        ("75%", "3/4"),
        ("0.5 %", "1/200"),
        ("1.5e-3", "3/2000"),
        ("1.5 x 10^-3", "3/2000"),
        ("2*10^{3}", "2000"),
        ("1,234.5", "2469/2"),
        ("1,234,567", "1234567"),
        ("1e300", f"1{300 * '0'}"),
        (".5", "1/2"),
        ("7.", "7"),
    ],
)
def test_numbers_in_many_forms_have_their_exact_value(text, value):
    assert parse_value(text) == Fraction(value)


@pytest.mark.parametrize(
    "text",
    ["", ".", "-", "1/0", "1e301", "1e-301", "1e99999999", "nan", "12,34", "1 2", "٣", "1/2/3", "%", "e5"],
)
def test_anything_else_has_none(text):
    assert parse_value(text) is None


def test_numbers_match_by_value_and_an_answer_that_is_none_abstains():
    texts = ["0.75", "75%", f"so\n{FINAL_PREFIX}3/4", "0.7500001", "0.76", "three quarters"]
    assert numeric_match(texts, answer=["3/4"] * 6) == [1, 1, 1, 1, 0, 0]
    assert numeric_match(["2.000002", "1.9999979"], answer=["2"] * 2) == [1, 0]  # a millionth, of the answer
    assert numeric_match(["0", "1e-9"], answer=["0"] * 2) == [1, 0]
    assert numeric_match(["1"], answer=["one"]) == [None]


def test_an_exact_answer_may_differ_in_case_and_space_only():
    assert exact_match(["New  York\n", f"{FINAL_PREFIX}new york", "New York."], answer=["New York"] * 3) == [1, 1, 0]


@pytest.mark.parametrize(
    "text", ["B", "(b)", "**B**", "B.", "Answer: B", "The answer is (B).", "so\nThe correct option is B"]
)
def test_a_choice_is_one_letter_on_the_last_line(text):
    assert choice_match([text], answer=["B"]) == choice_match([text], answer=["(b)"]) == [1.0]
    assert choice_match([text], answer=["C"]) == [0.0]


@pytest.mark.parametrize(
    "text", ["A or B", "B C", "", "Because", "B\nI am not sure", "ABCD", f"{'so ' * 29}the answer: B or C"]
)
def test_anything_but_one_letter_is_no_choice(text):
    assert choice_match([text] * 3, answer=["B", "", "()"]) == [0.0] * 3


def test_boxed_answers_are_compared_as_mathematics(caplog):
    pytest.importorskip("math_verify")
    texts = [r"so \boxed{\frac{1}{2}}", r"\boxed{0.5}", r"\boxed{2}", "no box"]
    assert boxed_math(texts, answer=["1/2"] * 4) == [1, 1, 0, 0]
    unboxed = ["the answer is 5", "1 2 3 4 5", "$5$", r"\boxed{} so 5", r"5, \boxed{", r"no \boxed{7} but 5"]
    assert boxed_math(unboxed, answer=["5"] * 6) == [0] * 6
    assert boxed_math([r"\boxed{4} or \boxed{5}", r"\boxed{5}, so \boxed{5}"], answer=["5"] * 2) == [0, 1]
    assert not caplog.records


def test_mathematics_outside_the_box_is_not_read():
    pytest.importorskip("math_verify")
    hoped = "The final answer is $5$. I hope it is correct."
    beside = [
        r"\boxed{} $5$",
        r"\boxed{?} \(5\)",
        r"\boxed{?} \frac{5}{1}",
        r"\boxed{?} [5] ",
        r"\boxed{ $5$",
        r"\boxed{4} " + hoped,
    ]
    assert boxed_math(beside, answer=["5"] * 6) == [0] * 6
    boxed = [
        r"\boxed{5} " + hoped.replace("5", "4"),
        r"$x = \boxed{\frac{10}{2}}$",
        r"{ \boxed{5}",
        r"\boxed{4}. Wait: \boxed{5}",
        r"I shall use \boxed{ for it. So \boxed{5}",
        r"\boxed{\boxed{5}}",
    ]
    assert boxed_math(boxed, answer=["5"] * 6) == [1] * 6
    braces = [r"\boxed{\{1, 2\}}", r"\boxed{\left\{1, 2\right\}}", r"\boxed{1} and $\boxed{2}$"]
    assert boxed_math(braces, answer=[r"\{2, 1\}"] * 3) == [1] * 3
    assert boxed_math([r"\boxed{" * 20_000, "{" * 100_000, r"\boxed{}" * 1000], answer=["5"] * 3) == [0] * 3


def test_a_format_is_a_pattern_of_the_whole_text():
    pattern = r"<think>.*</think>\s*<answer>.*</answer>"
    texts = ["<think>a\nb</think> <answer>5</answer>", "x<think></think><answer></answer>"]
    assert regex_format(texts, pattern=pattern) == [1, 0]


def test_penalties_by_hand():
    assert length_penalty(["w " * n for n in (0, 10, 15, 20, 99)], soft=10, hard=20) == [0, 0, -0.5, -1, -1]
    assert repetition_penalty(["a b c d", "a b a b a b", "a", ""], size=2) == [0, pytest.approx(-3 / 5), 0, 0]
    with pytest.raises(ValueError, match="soft=5 must be below hard=5"):
        length_penalty(["a"], soft=5, hard=5)


@pytest.mark.parametrize(
    "text", ["1" * 10**6, "so the " * 10**5, "(" * 10**6, "1,111" * 10**5, "\ud800\0", " " * 10**6]
)
def test_no_text_stops_or_stalls_them(text):
    started = time.process_time()
    for reward in (exact_match, numeric_match, choice_match):
        assert reward([text], answer=["5"]) == [0.0]
    length_penalty([text])
    repetition_penalty([text])
    assert time.process_time() - started < 3
