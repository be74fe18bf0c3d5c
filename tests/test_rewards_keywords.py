"""The keyword reward: partial credit by hand, inflection, sections, order, and that stuffing pays less than prose."""

from __future__ import annotations

import json
import time

import pytest

from grpo.config import DataConfig
from grpo.rewards.keywords import keyword_reward, stem
from grpo.tasks.keywords import Keywords

GROUPS = [["pneumonia"], ["antibiotic", "amoxicillin"], ["chest x-ray"], ["fluids"]]


def pay(text, groups=GROUPS, **columns):
    return keyword_reward([text], groups=[groups], **{name: [value] for name, value in columns.items()})[0]


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("It looks to me like a pneumonia.", 1 / 4),
        ("It looks like PNEUMONIA, and amoxicillin will help her soon.", 2 / 4),
        ("I would give antibiotics to treat this. We should then also order a Chest X-Ray today.", 2 / 4),
        ("Nothing that is asked for is in this sentence.", 0),
        ("", 0),
        ("Antibiotics, amoxicillin and again the antibiotic are what I would give here.", 1 / 4),
    ],
)
def test_every_group_counts_once_whichever_term_case_or_inflection_it_takes(text, reward):
    assert pay(text) == reward


@pytest.mark.parametrize(
    "words",
    [
        "treat treats treated treating",
        "therapy therapies",
        "diagnose diagnosed diagnoses",
        "cough coughs Coughing",
        "illness",
    ],
)
def test_inflected_words_share_a_stem(words):
    assert len({stem(word) for word in words.split()}) == 1


def test_a_list_of_keywords_earns_half_of_what_prose_does_however_often_it_is_repeated():
    prose = (
        "The fever and the cough suggest a pneumonia to me. An antibiotic should be started today without delay. "
        "We order a chest X-ray to see how far it goes. She should also take fluids in small sips."
    )
    listed = "pneumonia, antibiotic, chest x-ray, fluids"
    assert pay(prose) == 1.0
    for stuffed in (listed, f"{listed}. " * 50, listed.replace(", ", "\n"), f"The {listed}.", listed.replace(",", "")):
        assert pay(stuffed) == 0.5


def test_a_term_counts_only_under_its_heading():
    sections = ["Diagnosis", "Therapy", None, None]
    first, second = "I am sure that this is a pneumonia.", "She will be given an antibiotic for a week."
    assert pay(f"Diagnosis: {first}\nTherapy: {second}", sections=sections) == 2 / 4
    assert pay(f"**Diagnosis:** {first}\n\n## therapy:\n{second}", sections=sections) == 2 / 4
    assert pay(f"1. Diagnosis: {first}\n 2) **Therapy**: {second}", sections=sections) == 2 / 4
    assert pay(f"- **Diagnosis:** {first}\n* Therapy: {second}", sections=["1. diagnosis", *sections[1:]]) == 2 / 4
    assert pay(f"Therapy: {first}\nDiagnosis: {second}", sections=sections) == 0
    assert pay(f"{first} {second}", sections=sections) == 0


def test_a_heading_may_come_again_and_order_holds_over_all_headings():
    diagnosis, therapy = "Diagnosis: It is the flu that he has today.", "Therapy: He should take some rest this week."
    groups, sections = [["flu"], ["rest"]], ["Diagnosis", "Therapy"]
    assert pay(f"{diagnosis}\n{therapy}", groups, sections=sections, ordered=True) == 1.0
    assert pay(f"{therapy}\n{diagnosis}", groups, sections=sections, ordered=True) == 0.5
    assert pay(f"{therapy}\n{diagnosis}\nTherapy: And he needs much water.", groups, sections=sections) == 1.0


@pytest.mark.parametrize("text", [" " * 100_000, "*" * 100_000, "a:" * 50_000, "#\t" * 50_000, "!" * 20_000 + "x"])
def test_a_degenerate_completion_is_read_at_once(text):
    started = time.process_time()
    assert pay(text, sections=["Diagnosis", "Therapy", None, None]) == 0
    assert time.process_time() - started < 1


def test_terms_out_of_order_earn_the_share_that_rises():
    groups = [["alpha"], ["beta"], ["gamma"]]
    text = "Here we have the {} first, then comes the {} of it, and at last we see the {} as well."
    assert pay(text.format("alpha", "beta", "gamma"), groups, ordered=True) == 1.0
    assert pay(text.format("gamma", "alpha", "beta"), groups, ordered=True) == pytest.approx(2 / 3)
    assert pay(text.format("gamma", "beta", "alpha"), groups, ordered=True) == pytest.approx(1 / 3)
    assert pay(text.format("gamma", "beta", "alpha"), groups) == 1.0


def test_the_embedded_references_earn_full_marks_and_another_cases_do_not():
    task = Keywords()
    problems = [problem for split in task.splits for problem in task.split(split)]
    assert len(problems) == 12
    for problem, other in zip(problems, problems[1:] + problems[:1], strict=True):
        columns = {name: [value] for name, value in problem.columns.items()}
        assert keyword_reward([problem.solution], **columns) == [1.0]
        assert keyword_reward([other.solution], **columns)[0] < 0.7


def test_the_headings_are_asked_for_where_the_rows_are_the_embedded_ones(tmp_path):
    headings = "Answer in full sentences, with the headings `Diagnosis:` and `Therapy:`."
    assert Keywords().instruction == Keywords(DataConfig()).instruction == headings
    assert Keywords(DataConfig(path=str(tmp_path))).instruction == "Answer in full sentences."


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "groups": []}, r"line 1: groups=\[\] is not"),
        ({"prompt": "p", "groups": [["a"], [""]]}, "line 1: groups="),
        ({"prompt": "p", "groups": [["a"], ["+"]]}, "line 1: groups=.* each with a word"),
        ({"prompt": "p", "groups": [["a"]], "sections": []}, r"line 1: sections=\[\] for 1 groups"),
        ({"prompt": "p", "groups": [["a"]], "sections": "A"}, "line 1: sections='A' for 1 groups"),
        ({"prompt": "p", "groups": [["a"]], "sections": [1]}, r"line 1: sections=\[1\] for 1 groups"),
        ({"groups": [["a"]]}, "line 1: no column 'prompt'"),
    ],
)
def test_a_malformed_row_is_named(tmp_path, row, message):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row))
    with pytest.raises(ValueError, match=message):
        Keywords(DataConfig(path=str(file))).split("train")
