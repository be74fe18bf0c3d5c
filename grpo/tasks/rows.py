"""Problems that are rows of local JSONL, JSON or Parquet files, or of a data set on the hub.

A path and a split go in, Problems come out; every error names the file and the row. All tasks but word_problems build
on it.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any

from grpo.config import DataConfig, RewardsConfig
from grpo.records import Problem
from grpo.tasks import Task

Row = tuple[str, str, dict[str, Any]]  # problem id, where it stands (for errors), columns
DATA = Path(__file__).parent / "data"  # what comes with the package
SUFFIXES = (".jsonl", ".json", ".parquet")
BOM = b"\xef\xbb\xbf"


class RowTask(Task):
    """A task whose problems are rows with a question and an answer column.

    A folder (or hub data set) has a train and a test file; validation is a share `data.validation_fraction` of
    the train file, drawn with `data.split_seed`. Of a single file, or one split of a hub data set (owner/name:train),
    the same share is held out for validation and again for test. A problem's id is its file and row ("train/17"),
    whichever split it is in.
    """

    question_column: str = "prompt"
    answer_column: str = "answer"
    hub: tuple[str, str] | None = None  # data set and subset that an empty data.path stands for
    embedded: Path | None = None  # or a file: a quarter for validation, another for test

    def __init__(self, data: DataConfig | None = None, rewards: RewardsConfig | None = None):
        super().__init__(data, rewards)
        if self.embedded and not self.data.path:
            self.data = replace(self.data, path=str(self.embedded), validation_fraction=0.25)
        self._unread: dict[str, list[Row]] = {}  # splits that were read along with another one

    @cached_property
    def exemplars(self) -> tuple[Problem, ...]:
        """The first eight training problems; the prompter leaves the problem itself out."""
        return tuple(self.split("train")[:8])

    def read_answer(self, text: str) -> tuple[str, str]:
        """(reference answer, worked solution) of an answer column; ValueError where it has no number."""
        raise NotImplementedError(f"{type(self).__name__} does not define read_answer(text)")

    def load(self, split: str) -> list[Problem]:
        if split not in self._unread:
            self._unread = self._rows(split)
        rows = self._unread.pop(split)
        for _, where, columns in rows:
            if "completions" in columns:
                raise ValueError(f"{where}: reward functions receive the texts as 'completions'; rename this column")
        return [self._problem(*row) for row in rows]

    def _rows(self, split: str) -> dict[str, list[Row]]:
        """Rows of a split, and of the splits that are held out of the same source: data.path (a file, a folder, a hub
        data set or one split of it), or the task's own default."""
        self.check_path()
        data, name = self.data, "test" if split == "test" else "train"
        if Path(data.path).is_file():
            rows, parts = read_file(Path(data.path)), 2
        elif data.path and Path(data.path).is_dir():
            rows, parts = read_folder(Path(data.path), name), 1
        else:
            repo, own_subset = (data.path, "") if data.path else self.hub
            repo, _, only_split = repo.partition(":")
            rows, parts = read_hub(repo, data.subset or own_subset, only_split or name), 2 if only_split else 1
        if split == "test" and parts == 1:
            return {split: rows}
        held_out = hold_out(rows, self.question_column, data.validation_fraction, data.split_seed, parts=parts)
        return dict(zip(self.splits, held_out, strict=False))

    def check_path(self) -> None:
        """ValueError where data.path is missing, or neither here nor spelled like a hub id: owner/name[:split]."""
        path = self.data.path
        if not path and self.hub is None:
            raise ValueError(f"task {self.name!r} needs --data.path: a folder with train and test files, or one file")
        is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", path) and Path(path).suffix not in SUFFIXES
        if path and not Path(path).exists() and not is_hub_id:
            known = f"a folder, a {', '.join(SUFFIXES)} file or a hub id"
            raise ValueError(f"data.path={path!r} does not exist; give {known}")

    def _problem(self, id: str, where: str, row: dict[str, Any]) -> Problem:
        question, answer = (self._text(row, column, where) for column in (self.question_column, self.answer_column))
        try:
            read = self.read_answer(answer)
            if not isinstance(read, tuple) or len(read) != 2:
                raise ValueError(f"read_answer returned {read!r:.80}; return (reference answer, worked solution)")
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        rest = {name: value for name, value in row.items() if name not in (self.question_column, self.answer_column)}
        return Problem(id=id, question=question, answer=read[0], solution=read[1], columns=rest)

    def _text(self, row: dict[str, Any], column: str, where: str) -> str:
        if column not in row:
            raise ValueError(
                f"{where}: no column {column!r} among {sorted(row)}; task jsonl takes other names, from "
                "--data.prompt_column and --data.answer_column"
            )
        text = (as_text(row[column]) or "").strip()
        if not text:
            raise ValueError(f"{where}: {column}={row[column]!r} is empty, or neither text nor a number")
        if text != text.encode(errors="ignore").decode():  # JSON can hold one, a tokenizer cannot take it
            raise ValueError(f"{where}: {column} contains an unpaired UTF-16 surrogate; fix or drop this row")
        return text


def as_text(value: Any) -> str | None:
    """Text as it is, a number in digits: 0.0000001, not 1e-07. None for anything else, NaN among it."""
    if isinstance(value, float):
        return format(Decimal(repr(value)), "f") if math.isfinite(value) else None
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else None


def hold_out(rows: list[Row], question: str, fraction: float, seed: int, *, parts: int) -> list[list[Row]]:
    """[rest, part, ...]: `parts` disjoint random parts, each with this fraction of the questions; all keep file order.

    question: its column. Rows with the same one stay together, so that a held-out question is asked nowhere else; if
    the distinct ones are too few to make a part, rows count as distinct.
    """
    asked = [str(columns.get(question, i)) for i, (_, _, columns) in enumerate(rows)]
    if not round(fraction * len(set(asked))):
        asked = list(map(str, range(len(rows))))
    unique = list(dict.fromkeys(asked))
    size = round(fraction * len(unique))
    order = random.Random(seed).sample(unique, len(unique))
    chosen = [set(order[i * size : (i + 1) * size]) for i in range(parts)]
    rest = set(order[parts * size :])
    return [[row for row, text in zip(rows, asked, strict=True) if text in part] for part in (rest, *chosen)]


def read_folder(folder: Path, split: str) -> list[Row]:
    """Rows of train.jsonl (or .json, .parquet, or shards train-*.parquet) in a folder."""
    whole = [folder / f"{split}{suffix}" for suffix in SUFFIXES if (folder / f"{split}{suffix}").is_file()]
    files = whole[:1] or sorted(folder.glob(f"{split}-*.parquet"))
    if not files:
        raise ValueError(
            f"no {split} file in {folder}; expected {split}.jsonl, {split}.json, {split}.parquet or {split}-*.parquet"
        )
    rows = [row for file in files for row in read_file(file)]
    return [(f"{split}/{i}", where, row) for i, (_, where, row) in enumerate(rows)]


def read_file(path: Path) -> list[Row]:
    """Rows of one file by its suffix, with ids "stem/0", "stem/1", ..."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: unknown suffix {path.suffix!r}; use one of {', '.join(SUFFIXES)}")
    if path.suffix == ".parquet":
        rows = [(f"{path} row {i}", row) for i, row in enumerate(_parquet_rows(path))]
    elif path.suffix == ".json" and path.read_bytes().removeprefix(BOM).lstrip()[:1] == b"[":
        rows = [_object(row, f"{path} row {i}") for i, row in enumerate(_parse(path.read_bytes(), str(path)))]
    else:
        rows = read_jsonl(path)
    stem = path.stem
    return [(f"{stem}/{i}", where, row) for i, (where, row) in enumerate(rows)]


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("FILE line 7", object) of each line that is not blank; ValueError names the line that is no object."""
    if not path.is_file():
        raise ValueError(f"no file {str(path)!r}; give a JSONL file, one object per line")
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if line.removeprefix(BOM).strip():
            where = f"{path} line {number}"
            yield _object(_parse(line, where), where)


def _parse(content: bytes, where: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, or not UTF-8
        raise ValueError(f"{where} is not JSON ({error}): {content[:60]!r}") from None


def _object(row: Any, where: str) -> tuple[str, dict[str, Any]]:
    if not isinstance(row, dict):
        raise ValueError(f"{where} is not a JSON object with columns: {str(row)[:60]!r}")
    return where, row


def _parquet_rows(path: Path) -> list[dict[str, Any]]:
    from pyarrow import ArrowInvalid, parquet

    try:
        return parquet.read_table(path).to_pylist()
    except ArrowInvalid as error:
        raise ValueError(f"{path} is not a Parquet file: {error}") from None


def read_hub(repo: str, subset: str, split: str) -> list[Row]:
    """Rows of a data set on the hub, or of its local cache, through `datasets`. subset: "" if it has only one."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        rows = load_dataset(repo, subset or None, split=split)
    except (OSError, ValueError, DatasetsError) as error:
        raise ValueError(
            f"cannot load the {split} split of {repo!r} from the hub ({type(error).__name__}: {error}); if it has only "
            f"one split, name it (--data.path {repo}:train): validation and test problems are then held out of it; "
            "without a connection, pass a folder with train.jsonl and test.jsonl (or .json, .parquet): --data.path DIR"
        ) from error
    return [(f"{split}/{i}", f"{repo} {split} row {i}", dict(row)) for i, row in enumerate(rows)]
