"""The code task: every embedded problem is solvable, each component pays for what it says, MBPP and HumanEval rows."""

from __future__ import annotations

import json

import pytest

import eval as eval_command
import train
from grpo.config import DataConfig, RewardsConfig
from grpo.rewards import score_texts
from grpo.rewards.code import extract_code, parses, read_tests
from grpo.rewards.runner import weighted_total
from grpo.rewards.sandbox import judge
from grpo.tasks.code import Code
from grpo.tasks.rows import read_file
from tests.tiny import save_tiny_model

ADD = {"prompt": "Write add(a, b).", "code": "def add(a, b): return a + b"}
MBPP = ADD | {"test_list": ["assert add(1, 2) == 3", "assert add(2, 2) == 4"], "test_imports": ["import math"]}
HUMAN_EVAL = {
    "prompt": 'def add(a, b):\n    """The sum."""\n',
    "canonical_solution": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(0, 0) == 0\n",
    "entry_point": "add",
}


@pytest.fixture(scope="module")
def task():
    try:
        return Code(rewards=RewardsConfig(timeout_s=6.0))
    except ValueError as error:
        pytest.skip(str(error))


def pay(task, completion, row):
    columns = {name: [value] for name, value in row.items()} | {"question": [row["prompt"]]}
    outcomes = score_texts([completion], columns, task.rewards)[0]
    return [outcome.value for outcome in outcomes], pytest.approx(weighted_total(outcomes, task.rewards))


@pytest.mark.parametrize(
    ("completion", "components"),
    [
        ("```python\ndef add(a, b):\n    return a + b\n```", [1, 1, 1]),
        ("Here it is:\n```\ndef add(a, b): return a + b", [1, 1, 1]),
        ("add = lambda a, b: 3", [1, 1, 0.5]),
        ("def add(a, b): return 0", [1, 1, 0]),
        ("def add(a, b): return a / 0", [1, 0, 0]),
        ("exit(0)", [0, 0, 0]),
        ("exit(0)\ndef add(a, b): return a + b", [1, 0, 0]),
        ("print('passed')", [0, 0, 0]),
        ("def add(a, b) return a + b", [0, 0, 0]),
        ("", [0, 0, 0]),
    ],
)
def test_each_component_pays_for_what_it_says(task, completion, components):
    expected = 0.1 * components[0] + 0.2 * components[1] + 0.7 * components[2]
    assert pay(task, completion, MBPP) == (components, expected)


def test_a_function_that_has_a_builtins_name_is_the_programs_and_not_pythons(task):
    row = {
        "prompt": "Write pow(a, b).",
        "answer": "def pow(a, b): return a ** b",
        "test_list": ["assert pow(2, 3) == 8"],
    }
    assert pay(task, row["answer"], row)[0] == [1, 1, 1]
    assert pay(task, "x = 1", row)[0] == [0, 0, 0]


def test_humaneval_rows_take_the_body_alone_or_the_whole_function(task):
    assert pay(task, "    return a + b", HUMAN_EVAL)[0] == [1, 1, 1]
    assert pay(task, "```python\ndef add(a, b):\n    return a + b\n```", HUMAN_EVAL)[0] == [1, 1, 1]
    assert pay(task, "    return 3", HUMAN_EVAL)[0] == [1, 1, 0]


def test_the_head_of_a_humaneval_row_alone_earns_nothing(task):
    assert pay(task, "", HUMAN_EVAL)[0] == [0, 0, 0]
    assert pay(task, "```python\n```", HUMAN_EVAL)[0] == [0, 0, 0]


def test_the_embedded_problems_are_many_differ_and_fall_into_disjoint_splits(task):
    splits = {name: task.split(name) for name in task.splits}
    questions = [problem.question for problems in splits.values() for problem in problems]
    assert len(questions) == len(set(questions)) >= 60
    assert {name: len(problems) for name, problems in splits.items()} == {"train": 34, "validation": 16, "test": 16}
    assert len(task.exemplars) == 8


def test_every_reference_solution_passes_all_its_tests_and_no_other_problems_does():
    rows = [row for _, _, row in read_file(Code.embedded)]
    for row, other in zip(rows, rows[1:] + rows[:1], strict=True):
        names = {}
        exec(row["code"], names)
        for test in row["test_list"]:
            exec(test, dict(names))
        tests = read_tests(row)
        assert len(tests.functions) == 1 and len(tests.tests) >= 3
        columns = {name: [value] for name, value in row.items()}
        assert parses([row["code"]], **columns) == [1.0]
        assert parses([other["code"]], **columns) == [0.0]


def test_reference_solutions_earn_everything_in_the_sandbox(task):
    for problem in task.split("test")[:4]:
        assert pay(task, problem.solution, problem.columns | {"prompt": problem.question}) == ([1, 1, 1], 1.0)


def test_eval_gives_pass_at_k_of_the_code_task(task, tmp_path):
    save_tiny_model(tmp_path / "model", context=1024)
    arguments = ["--model", str(tmp_path / "model"), "--task", "code", "--shots", "0", "--limit", "2", "--samples", "2"]
    output = tmp_path / "result.json"
    assert eval_command.main([*arguments, "--max-new-tokens", "4", "--output", str(output)]) == 0
    (by_shots,) = json.loads(output.read_text())["models"].values()
    assert by_shots["0"]["pass_at_k"] == {"1": 0.0, "2": 0.0}  # a random model
    assert {"reward/parses", "reward/runs", "reward/correctness"} <= set(by_shots["0"])


def test_the_names_that_tests_call_are_found_beside_helpers_imports_and_builtins():
    row = {
        "test_list": ["import math\nfor x in [1]:\n    assert math.isclose(area(x), helper(len([x])), rel_tol=2)"],
        "test_setup_code": "def helper(n):\n    return n",
    }
    assert read_tests(row).functions == ("area",)


@pytest.mark.parametrize(
    ("text", "code"),
    [("x = 1", "x = 1"), ("```py\nx = 1\n```\n```py\ny\n```", "x = 1\n"), ("a\n```\nb", "b"), ("```", "```")],
)
def test_code_is_the_first_block_or_all(text, code):
    assert extract_code(text) == code


@pytest.mark.parametrize("text", ["\0", "(" * 100_000, "x" * 1_000_000, "\ud800", "-" * 50_000 + "1"])
def test_no_text_stops_the_parser(text):
    assert parses([text], test_list=[["assert add(1) == 1"]]) == [0.0]


def test_what_the_compiler_warns_of_in_a_program_is_not_said(recwarn):
    assert parses(["def add(a, b): return 1or a"], test_list=[["assert add(1, 2) == 1"]]) == [1.0]
    assert not recwarn.list


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "code": "c"}, "no tests"),
        ({"code": "c", "test_list": ["assert f()"]}, "no column `prompt` or `text`"),
        ({"prompt": "p", "test_list": ["assert f("]}, "SyntaxError"),
        ({"prompt": "p", "test_list": "assert f()"}, "test_list='assert f.*' is not a list of asserts"),
        ({"prompt": "p", "test_list": [5]}, r"test_list=\[5\] is not a list of asserts"),
        ({"prompt": "p", "test_list": ["assert 1"]}, "test_list=.* calls no function that a program could define"),
        ({"prompt": "p", "test_list": ["f()"], "test_imports": "import re"}, ".*'import re' is not a list of imports"),
        ({"prompt": "p", "test_list": ["f()"], "test_imports": [5]}, r"test_imports=\[5\] is not a list of imports"),
        ({"prompt": "p", "test_list": ["assert f()"], "test_setup_code": 5}, "TypeError"),
        ({"prompt": "p", "entry_point": "f", "test": "def check("}, "SyntaxError"),
        ({"prompt": "p", "entry_point": "f", "test": "x = 1"}, "test=.* does not define a function `check`"),
        ({"prompt": "p", "entry_point": "a b", "test": "check = 1"}, "entry_point='a b' is not a function name"),
        ({"prompt": "p", "entry_point": 5, "test": "check = 1"}, "entry_point=5 is not a function name"),
        ({"prompt": 5, "test_list": ["assert f()"]}, "prompt=5 and code='' must be strings"),
    ],
)
def test_a_row_that_cannot_be_judged_is_named(task, tmp_path, row, message):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row))
    with pytest.raises(ValueError, match=f"line 1: {message}"):
        Code(DataConfig(path=str(file)), RewardsConfig(timeout_s=6.0)).split("train")


@pytest.mark.parametrize("sandbox", ["auto", "unsafe_subprocess"])
def test_without_linux_the_task_is_refused_in_words(sandbox, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(judge.sys, "platform", "darwin")
    command = ["--task", "code", "--model.path", str(tmp_path), "--rewards.sandbox", sandbox, "--dry-run"]
    assert train.main([*command, "--rewards.timeout-s", "7"]) == 2  # no other test's: a sandbox found is remembered
    assert "needs Linux, and this is darwin; use a Linux container" in capsys.readouterr().err
