"""`python -m grpo.rewards check` and score_file: a file of completions in, the same lines with rewards out."""

import codecs
import json
import math
import subprocess
import sys

import pytest

from grpo.rewards import Reward, correctness_reward, format_reward
from grpo.rewards.__main__ import main, report, score_file

REWARDS = {"format": Reward(format_reward, 0.5), "correctness": Reward(correctness_reward, 1.0)}
LINE = "#### The final answer is "


@pytest.fixture
def check(tmp_path):
    """Writes lines, scores them, returns the report and the lines that were written."""

    def run(lines, rewards=REWARDS, require_finish=True):
        source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        source.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
        rows = score_file(rewards, source, output, require_finish=require_finish)
        assert rows == [json.loads(line) for line in output.read_text().splitlines()]
        return report(rows, "out.jsonl").splitlines(), rows

    return run


def test_each_line_gets_its_components_total_and_status_and_keeps_the_rest(check):
    said, rows = check(
        [
            {"completion": LINE + "1,234", "answer": "1,234", "id": 7},
            {"completion": LINE + "5", "answer": 4},
            {"completion": "4", "answer": 4.0, "finish_reason": "stop"},
            {"completion": LINE + "4", "answer": "4", "finish_reason": "length"},
        ]
    )
    assert [row["reward"] for row in rows] == [1.5, 0.5, 0.0, 0.0]
    assert rows[0] == {
        **{"completion": LINE + "1,234", "answer": "1,234", "id": 7},
        **{"rewards": {"format": 1.0, "correctness": 1.0}, "reward": 1.5, "status": "ok"},
    }
    assert said[0] == "4 completions (4 ok), mean of:" and said[-1] == "written to out.jsonl"
    assert [line.split() for line in said[1:-1]] == [
        ["reward", "0.5000"],
        ["format", "0.5000"],
        ["correctness", "0.2500"],
    ]


def test_length_pays_where_finishing_is_not_required(check):
    line = {"completion": LINE + "4", "answer": "4", "finish_reason": "length"}
    assert check([line], require_finish=False)[1][0]["reward"] == 1.5


def test_a_component_without_a_value_is_null_and_the_worst_status_names_the_line(check):
    def odd(completions, *, level, **columns):
        assert "finish_reason" not in columns and "completion" not in columns
        return [None if n == 0 else [1.0][n - 1] for n in level]

    lines = [{"completion": "", "answer": "1", "level": level} for level in (0, 1, 2)]
    said, rows = check(lines, {"odd": Reward(odd, 1.0), **REWARDS})
    assert [row["status"] for row in rows] == ["abstain", "ok", "error"]
    assert [row["rewards"]["odd"] for row in rows] == [None, 1.0, None]
    assert said[0] == "3 completions (1 abstain, 1 ok, 1 error), mean of:" and said[2].split() == ["odd", "1.0000"]
    assert said[1].split() == ["reward", "0.5000"], "the mean of 0 and 1: of the third it is not known"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 3 is not JSON"),
        ("[1]", "line 3 is not a JSON object"),
        ({"answer": "4"}, "line 3: completion=None"),
        ({"completion": 4, "answer": "4"}, "line 3: completion=4"),
        ({"completion": "4"}, "line 3: answer=None"),
        ({"completion": "4", "answer": True}, "line 3: answer=True"),
        ({"completion": "4", "answer": ["4"]}, "line 3: answer="),
        ({"completion": "4", "answer": math.nan}, "line 3: answer=nan"),
        ({"completion": "4", "answer": "4", "finish_reason": 1}, "line 3: finish_reason=1"),
    ],
)
def test_a_malformed_line_is_named(check, line, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        check([{"completion": "", "answer": "4"}, "", line])  # the blank second line is skipped and counted


def test_numbers_of_json_are_read_without_an_exponent(check):
    lines = [{"completion": LINE + "1" + "0" * 20, "answer": 1e20}, {"completion": LINE + "0", "answer": 1e-5}]
    said, rows = check(lines)
    assert [row["rewards"]["correctness"] for row in rows] == [1.0, 1.0]
    assert [row["answer"] for row in rows] == [1e20, 1e-5], "the file keeps what it had"


def test_a_byte_order_mark_is_no_part_of_a_line(tmp_path):
    source = tmp_path / "in.jsonl"
    line = json.dumps({"completion": LINE + "4", "answer": "4"}).encode()
    for content in (line, b"\r\n" + line):
        source.write_bytes(codecs.BOM_UTF8 + content)
        assert score_file(REWARDS, source, tmp_path / "out.jsonl", require_finish=True)[0]["reward"] == 1.5


def test_an_empty_file_is_refused(check):
    with pytest.raises(ValueError, match="contains no completions"):
        check([""])


def test_the_command_reports_bad_input_and_fails(tmp_path, capsys):
    source = tmp_path / "in.jsonl"
    source.write_text('{"completion": "x"}\n')
    assert main(["check", "gsm8k", "--completions", str(source), "--output", str(tmp_path / "out.jsonl")]) == 2
    assert main(["check", "gsmk", "--completions", str(source), "--output", "out.jsonl"]) == 2
    error = capsys.readouterr().err
    assert "line 1: answer=None" in error and "the nearest is gsm8k" in error
    assert not (tmp_path / "out.jsonl").exists()


def test_the_command_without_a_file_shows_what_references_and_wrong_answers_earn(capsys):
    weights = ["--rewards.weights", "format=0.25"]
    assert main(["check", "word_problems", *weights]) == 0
    rows = {" ".join(line.split()[:-4]): line.split()[-4:] for line in capsys.readouterr().out.splitlines()[2:]}
    assert rows["reference"] == ["1.000", "1.000", "1.250", "0"]
    assert rows["another's reference"][0] == "1.000" and float(rows["another's reference"][1]) < 0.5
    assert rows["empty"] == rows["first half"] == ["0.000", "0.000", "0.000", "0"]


def test_the_command_reads_the_columns_that_it_is_told(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f'{{"q": "{i}?", "a": {i}}}\n' for i in range(30)))
    assert main(["check", "jsonl", "--data.path", str(file), "--data.prompt-column", "q"]) == 2
    assert "no column 'answer' among ['a', 'q']" in capsys.readouterr().err
    assert main(["check", "jsonl", "--data.path", str(file), "--data.prompt-column=q", "--data.answer-column=a"]) == 0
    assert "mean over 3 problems" in capsys.readouterr().out


def test_a_component_that_fails_on_every_completion_is_one_line_with_its_place(tmp_path, capsys):
    source, output, own = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "own.py"
    source.write_text('{"completion": "x", "answer": "1"}\n{"completion": "y", "answer": "1"}\n')
    own.write_text("def broken(completions, **columns):\n    return [1 / len(columns['level'])]\n")
    options = ["--rewards.functions", f"{own}:broken"]
    message = (
        f"error: reward 'broken' failed on every completion: KeyError: 'level' (File \"{own}\", line 2, in broken)"
    )
    for more in (["--completions", str(source), "--output", str(output)], []):
        assert main(["check", "word_problems", *options, *more]) == 2
        assert capsys.readouterr().err.strip() == message
    assert not output.exists()


def test_a_component_that_fails_on_some_completions_is_logged_with_its_traceback(check, capsys):
    def picky(completions, **columns):
        return [1 / int(text) for text in completions]

    check([{"completion": text, "answer": "1"} for text in ("1", "0")], {"picky": Reward(picky, 1.0)})
    assert "Traceback" in capsys.readouterr().err


def test_the_command_scores_without_a_model_or_a_data_set(tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps({"completion": "\ud800 \u2028\n" + LINE + "$4.00", "answer": "4"}))
    code = (
        "import sys; from grpo.rewards.__main__ import main; status = main(sys.argv[1:]);"
        "print(sorted({'transformers', 'datasets', 'pyarrow', 'tyro'} & set(sys.modules))); sys.exit(status)"
    )
    arguments = ["check", "gsm8k", "--completions", str(source), "--output", str(output)]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]" and "1.5000" in done.stdout
    assert json.loads(output.read_text())["reward"] == 1.5
