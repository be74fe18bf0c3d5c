"""Loading rows: every local format gives the same problems, splits are disjoint, and errors name the row."""

import json
import random

import pytest

from grpo.config import DataConfig, RewardsConfig
from grpo.records import Problem
from grpo.tasks import Task, make_task, rows
from grpo.tasks.rows import RowTask, hold_out

REASONING = "Half of 48 is <<48/2=24>>24.\nIn all 48 + 24 = <<48+24=72>>72 clips.\n#### 72"


def gsm8k_rows(count, start=0):
    return [
        {"question": f"What is {i} + 0?", "answer": f"It is <<{i}+0={i}>>{i}.\n#### {i:,}"}
        for i in range(start, start + count)
    ]


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        from pyarrow import Table, parquet

        parquet.write_table(Table.from_pylist(rows), path)


def task(name, path, **data):
    return make_task(name, DataConfig(path=str(path), **data), RewardsConfig())


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "train.jsonl", gsm8k_rows(40))
    write(tmp_path / "test.jsonl", gsm8k_rows(5, start=2000))
    return tmp_path


def test_constructing_a_task_loads_nothing():
    for name in ("gsm8k", "jsonl"):
        broken = task(name, "nowhere/train.jsonl")
        with pytest.raises(ValueError, match="data.path='nowhere/train.jsonl' does not exist"):
            broken.split("train")


def test_calculator_marks_are_removed_and_the_solution_ends_in_the_final_line(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / f"{split}.jsonl", [{"question": " How many clips? ", "answer": REASONING, "level": 2}])
    (problem,) = task("gsm8k", tmp_path, validation_fraction=0).split("train")
    solution = "Half of 48 is 24.\nIn all 48 + 24 = 72 clips.\n#### The final answer is 72"
    assert problem == Problem("train/0", "How many clips?", "72", solution, columns={"level": 2})


def test_a_task_of_ones_own_that_reads_no_pair_is_told(folder):
    class OneText(RowTask):
        question_column, answer_column = "question", "answer"

        def read_answer(self, text):
            return text[-2:]

    with pytest.raises(ValueError, match="train.jsonl line 1: read_answer returned ' 0'; return .reference answer, w"):
        OneText(DataConfig(path=str(folder))).split("train")


def test_the_exemplars_of_a_task_of_ones_own_are_its_first_eight_training_problems(folder):
    class Last(RowTask):
        question_column, answer_column = "question", "answer"

        def read_answer(self, text):
            return text[-2:], text

    own = Last(DataConfig(path=str(folder)))
    assert own.exemplars == tuple(own.split("train")[:8])


@pytest.mark.parametrize("suffix", [".json", ".parquet"])
def test_every_format_gives_the_same_problems(folder, tmp_path_factory, suffix):
    other = tmp_path_factory.mktemp("other")
    write(other / f"train{suffix}", gsm8k_rows(40))
    write(other / f"test{suffix}", gsm8k_rows(5, start=2000))
    for split in ("train", "validation", "test"):
        assert task("gsm8k", other).split(split) == task("gsm8k", folder).split(split)


def test_what_several_splits_are_held_out_of_is_read_once(folder, monkeypatch):
    """Reading is most of what a start with a million rows takes."""
    names, original = ("validation", "train", "test"), rows.read_file
    for source, files in ((folder / "train.jsonl", ["train.jsonl"]), (folder, ["train.jsonl", "test.jsonl"])):
        each_alone, read, together = [task("gsm8k", source).split(name) for name in names], [], task("gsm8k", source)
        with monkeypatch.context() as patch:
            patch.setattr(rows, "read_file", lambda path, read=read: read.append(path.name) or original(path))
            assert [together.split(name) for name in names] == each_alone
        assert read == files and together._unread == {}, "nothing is kept twice"


def test_shards_are_read_in_order(folder, tmp_path_factory):
    sharded = tmp_path_factory.mktemp("sharded")
    write(sharded / "train-00000-of-00002.parquet", gsm8k_rows(25))
    write(sharded / "train-00001-of-00002.parquet", gsm8k_rows(15, start=25))
    assert task("gsm8k", sharded).split("train") == task("gsm8k", folder).split("train")


def test_validation_is_a_seeded_tenth_of_the_training_file(folder):
    train, validation, test = (task("gsm8k", folder).split(split) for split in ("train", "validation", "test"))
    assert (len(train), len(validation), len(test)) == (36, 4, 5)
    assert sorted([p.id for p in [*train, *validation]], key=lambda id: int(id[6:])) == [
        f"train/{i}" for i in range(40)
    ]
    assert [p.id for p in test] == [f"test/{i}" for i in range(5)]
    again = task("gsm8k", folder)
    assert again.split("validation") == validation and again.split("train") is again.split("train")
    assert task("gsm8k", folder, split_seed=1).split("validation") != validation


def test_shares_are_disjoint_complete_and_in_file_order():
    rows = [(str(i), "", {"q": f"{i}?"}) for i in range(50)]
    shares = hold_out(rows, "q", 0.1, 3, parts=2)
    assert [len(share) for share in shares] == [40, 5, 5]
    assert sorted(rows, key=str) == sorted((row for share in shares for row in share), key=str)
    assert all(share == sorted(share, key=rows.index) for share in shares)
    assert shares[1] == [rows[i] for i in sorted(random.Random(3).sample(range(50), 50)[:5])]


def test_what_is_held_out_is_asked_nowhere_else():
    rows = [(str(i), "", {"q": f"{i % 21}?"}) for i in range(100)]
    shares = hold_out(rows, "q", 0.1, 0, parts=2)
    asked = [{columns["q"] for _, _, columns in share} for share in shares]
    assert [len(questions) for questions in asked] == [17, 2, 2] and len(set.union(*asked)) == 21
    assert sum(map(len, shares)) == 100
    alike = [(str(i), "", {"q": "?"}) for i in range(10)]
    assert [len(share) for share in hold_out(alike, "q", 0.1, 0, parts=2)] == [8, 1, 1]


@pytest.mark.parametrize(("number", "text"), [("1e-7", "0.0000001"), ("2.50", "2.5"), ("1e16", "1" + "0" * 16)])
def test_numbers_of_json_are_read_without_an_exponent(tmp_path, number, text):
    (tmp_path / "train.jsonl").write_text(f'{{"prompt": "?", "answer": {number}}}')
    assert task("jsonl", tmp_path, validation_fraction=0).split("train")[0].answer == text


def test_a_single_file_is_split_three_ways(tmp_path):
    write(tmp_path / "mine.jsonl", [{"prompt": f"{i}?", "answer": i, "topic": "sums"} for i in range(20)])
    mine = task("jsonl", tmp_path / "mine.jsonl")
    problems = [problem for split in mine.splits for problem in mine.split(split)]
    assert [len(mine.split(split)) for split in mine.splits] == [16, 2, 2]
    assert sorted(p.id for p in problems) == sorted(f"mine/{i}" for i in range(20))
    assert all(
        p.solution == f"#### The final answer is {p.answer}" and p.columns == {"topic": "sums"} for p in problems
    )


def test_column_names_are_configurable(tmp_path):
    write(tmp_path / "mine.json", [{"q": "1 + 1?", "a": "2", "prompt": "kept"}] * 10)
    mine = task("jsonl", tmp_path / "mine.json", prompt_column="q", answer_column="a")
    problem = mine.split("test")[0]
    assert (problem.question, problem.answer, problem.columns) == ("1 + 1?", "2", {"prompt": "kept"})


@pytest.mark.parametrize(
    ("name", "bad", "message"),
    [
        ("gsm8k", "{not json", r"train.jsonl line 3 is not JSON \(Expecting property name"),
        ("gsm8k", b"\xff\xfe{}", r"train.jsonl line 3 is not JSON"),
        ("gsm8k", "[1, 2]", r"train.jsonl line 3 is not a JSON object"),
        ("gsm8k", '{"question": "?"}', r"line 3: no column 'answer' among \['question'\]"),
        ("jsonl", '{"prompt": "?", "completions": []}', r"line 3: reward functions receive .* rename this column"),
        ("gsm8k", '{"question": "?", "answer": null}', r"line 3: answer=None is empty, or neither text nor a number"),
        ("jsonl", '{"prompt": NaN, "answer": "4"}', r"line 3: prompt=nan is empty, or neither"),
        ("gsm8k", '{"question": "", "answer": "#### 1"}', r"line 3: question='' is empty, or neither"),
        ("jsonl", '{"prompt": " ", "answer": "4"}', r"line 3: prompt=' ' is empty, or neither"),
        ("jsonl", r'{"prompt": "a \ud800", "answer": "4"}', r"line 3: prompt contains an unpaired UTF-16 surrogate"),
        ("gsm8k", '{"question": "?", "answer": "four"}', r"line 3: the answer does not end in '#### <number>': 'four'"),
        ("gsm8k", '{"question": "?", "answer": "#### 5k"}', r"line 3: the answer does not end"),
        ("jsonl", '{"question": "?", "answer": "4"}', r"line 3: no column 'prompt'.*--data.prompt_column"),
        ("jsonl", '{"prompt": "?", "answer": "Paris"}', r"line 3: answer 'Paris' is not a number.*task of your own"),
    ],
)
def test_a_bad_row_is_named_with_its_line(tmp_path, name, bad, message):
    good = {"question": "?", "prompt": "?", "answer": "#### 1" if name == "gsm8k" else "1"}
    line = bad if isinstance(bad, bytes) else bad.encode()
    (tmp_path / "train.jsonl").write_bytes(json.dumps(good).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(ValueError, match=message):
        task(name, tmp_path, validation_fraction=0).split("train")


@pytest.mark.parametrize(
    ("files", "split", "message"),
    [
        ({}, "train", r"no train file in .*expected train.jsonl, train.json"),
        ({"train.jsonl": b""}, "train", r"the train split of task .gsm8k. is empty"),
        ({"train.json": b"[]"}, "train", r"the train split of task .gsm8k. is empty"),
        ({"train.json": b"[1]"}, "train", r"train.json row 0 is not a JSON object"),
        ({"train.json": b"[{]"}, "train", r"train.json is not JSON"),
        ({"train.parquet": b"PAR0"}, "train", r"train.parquet is not a Parquet file"),
        ({"train.jsonl": b'{"question": "?", "answer": "#### 1"}'}, "validation", r"validation split .*fraction=0.1"),
        ({"train.jsonl": b""}, "tests", r"task 'gsm8k' has no split 'tests'; use one of train, validation, test"),
    ],
)
def test_missing_broken_and_empty_splits_are_clear_errors(tmp_path, files, split, message):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        task("gsm8k", tmp_path).split(split)


def test_a_file_of_another_kind_and_a_missing_path_are_clear_errors(tmp_path):
    (tmp_path / "rows.csv").write_text("question,answer\n")
    with pytest.raises(ValueError, match=r"unknown suffix '.csv'; use one of .jsonl, .json, .parquet"):
        task("gsm8k", tmp_path / "rows.csv").split("train")
    with pytest.raises(ValueError, match="task 'jsonl' needs --data.path"):
        task("jsonl", "").split("train")


@pytest.mark.parametrize(
    ("path", "subset", "asked"),
    [
        ("", "", ("openai/gsm8k", "main")),
        ("", "socratic", ("openai/gsm8k", "socratic")),
        ("someone/sums", "", ("someone/sums", None)),
    ],
)
def test_an_unreachable_hub_says_how_to_pass_a_local_folder(monkeypatch, path, subset, asked):
    import datasets

    def unreachable(repo, configuration, split):
        assert (repo, configuration, split) == (*asked, "train")
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ValueError, match=r"from the hub \(ConnectionError: no route\).*--data.path DIR"):
        task("gsm8k", path, subset=subset).split("train")


def test_hub_rows_become_the_same_problems_as_local_ones(monkeypatch, folder):
    import datasets

    def load_dataset(repo, configuration, split):
        return datasets.Dataset.from_list(gsm8k_rows(40) if split == "train" else gsm8k_rows(5, start=2000))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for split in ("train", "validation", "test"):
        assert task("gsm8k", "").split(split) == task("gsm8k", folder).split(split)


def test_of_one_split_of_a_hub_data_set_validation_and_test_are_held_out(monkeypatch, folder):
    import datasets

    def load_dataset(repo, configuration, split):
        assert (repo, configuration, split) == ("someone/sums", "easy", "train")
        return datasets.Dataset.from_list(gsm8k_rows(40))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    of_hub, of_file = task("gsm8k", "someone/sums:train", subset="easy"), task("gsm8k", folder / "train.jsonl")
    for split in ("train", "validation", "test"):
        assert of_hub.split(split) == of_file.split(split)
    assert [len(of_hub.split(split)) for split in of_hub.splits] == [32, 4, 4]


def test_an_unknown_task_names_the_nearest_and_the_list():
    names = "code, gsm8k, jsonl, keywords, word_problems"
    with pytest.raises(ValueError, match=f"unknown task 'gsm8'; the nearest is gsm8k; choose one of {names}, or"):
        make_task("gsm8", DataConfig(), RewardsConfig())
    with pytest.raises(ValueError, match=f"unknown task 'poetry'; choose one of {names}, or"):
        make_task("poetry", DataConfig(), RewardsConfig())


def test_a_users_own_file_is_a_task(tmp_path):
    own = tmp_path / "own.py"
    own.write_text(
        "from grpo.records import Problem\nfrom grpo.tasks import Task\n\n\n"
        "class Sums(Task):\n    name = 'sums'\n\n    def load(self, split):\n"
        "        return [Problem('0', '1 + 1?', '2')]\n"
    )
    sums = make_task(f"{own}:Sums", DataConfig(), RewardsConfig(format_weight=0.25))
    assert isinstance(sums, Task) and sums.split("test")[0].answer == "2"
    assert {name: reward.weight for name, reward in sums.rewards.items()} == {"format": 0.25, "correctness": 1.0}
    with pytest.raises(ValueError, match="defines no function or class 'Summs'"):
        make_task(f"{own}:Summs", DataConfig(), RewardsConfig())
    with pytest.raises(ValueError, match="own.py:Problem' is not a class that extends grpo.tasks.Task"):
        make_task(f"{own}:Problem", DataConfig(), RewardsConfig())
    with pytest.raises(ValueError, match="no file 'absent.py'"):
        make_task("absent.py:Sums", DataConfig(), RewardsConfig())
