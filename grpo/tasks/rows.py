"""Problems that are rows of local JSONL, JSON or Parquet files, or of a data set on the hub.

A path and a split go in, Problems come out; every error names the file and the row. Read by the tasks gsm8k
and jsonl.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from grpo.records import Problem
from grpo.tasks import Task

Row = tuple[str, str, dict[str, Any]]  # problem id, where it stands (for errors), columns
SUFFIXES = (".jsonl", ".json", ".parquet")


class RowTask(Task):
    """A task whose problems are rows with a question and an answer column.

    A folder (or hub data set) has a train and a test file; validation is a share `data.validation_fraction` of
    the train file, drawn with `data.split_seed`. Of a single file the same share is held out for validation
    and again for test. A problem's id is its file and row ("train/17"), whichever split it is in.
    """

    question_column: str
    answer_column: str
    column_remedy = ""  # how a user names another column, where that is possible
    hub: tuple[str, str | None] | None = None  # data set and configuration that an empty data.path stands for

    def read_answer(self, text: str) -> tuple[str, str]:
        """(reference answer, worked solution) of an answer column; ValueError where it has no number."""
        raise NotImplementedError(f"{type(self).__name__} does not define read_answer(text)")

    def load(self, split: str) -> list[Problem]:
        return [self._problem(*row) for row in self._rows(split)]

    def _rows(self, split: str) -> list[Row]:
        path, fraction, seed = Path(self.data.path), self.data.validation_fraction, self.data.split_seed
        if self.data.path and path.is_file():
            parts = hold_out(read_file(path), fraction, seed, parts=2)
        else:
            read = self._reader(path)
            if split == "test":
                return read("test")
            parts = hold_out(read("train"), fraction, seed, parts=1)
        return parts[self.splits.index(split)]

    def _reader(self, path: Path) -> Callable[[str], list[Row]]:
        """What reads the "train" and "test" rows of data.path: a folder, a hub id, or the task's own default."""
        if not self.data.path and self.hub is None:
            raise ValueError(f"task {self.name!r} needs --data.path: a folder with train and test files, or one file")
        if not self.data.path:
            return lambda name: read_hub(*self.hub, name)
        if path.is_dir():
            return lambda name: read_folder(path, name)
        if re.fullmatch(r"[\w.-]+/[\w.-]+", self.data.path) and path.suffix not in SUFFIXES:
            return lambda name: read_hub(self.data.path, None, name)
        raise ValueError(
            f"data.path={self.data.path!r} does not exist; give a folder, a {', '.join(SUFFIXES)} file or a hub id"
        )

    def _problem(self, id: str, where: str, row: dict[str, Any]) -> Problem:
        question, answer = (self._text(row, column, where) for column in (self.question_column, self.answer_column))
        try:
            reference, solution = self.read_answer(answer)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        rest = {name: value for name, value in row.items() if name not in (self.question_column, self.answer_column)}
        return Problem(id=id, question=question, answer=reference, solution=solution, columns=rest)

    def _text(self, row: dict[str, Any], column: str, where: str) -> str:
        if column not in row:
            raise ValueError(
                f"{where}: no column {column!r} among {sorted(row)}; task {self.name!r} needs it{self.column_remedy}"
            )
        value = row[column]
        if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "":
            raise ValueError(f"{where}: {column}={value!r} is neither text nor a number")
        return str(value).strip()


def hold_out(rows: list[Row], fraction: float, seed: int, *, parts: int) -> list[list[Row]]:
    """[rest, part, ...]: `parts` disjoint random shares of round(fraction * len(rows)) rows; all keep file order."""
    size = round(fraction * len(rows))
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    chosen = [set(order[i * size : (i + 1) * size]) for i in range(parts)]
    rest = set(order[parts * size :])
    return [[row for i, row in enumerate(rows) if i in part] for part in (rest, *chosen)]


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
    elif path.suffix == ".json" and path.read_bytes().lstrip()[:1] == b"[":
        rows = [(f"{path} row {i}", row) for i, row in enumerate(_json_rows(path))]
    else:
        rows = [(f"{path} line {number}", row) for number, row in read_jsonl(path)]
    return [(f"{path.stem}/{i}", where, row) for i, (where, row) in enumerate(rows)]


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of each line that is not blank; ValueError names the line that is no object."""
    if not path.is_file():
        raise ValueError(f"no file {str(path)!r}; give a JSONL file, one object a line")
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if line.strip():
            yield number, _object(line, f"{path} line {number}")


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, or not UTF-8
        raise ValueError(f"{where} is not JSON ({error}): {line[:60]!r}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where} is not a JSON object with columns: {line[:60]!r}")
    return row


def _json_rows(path: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{path} row {i} is not a JSON object with columns: {str(row)[:60]!r}")
    return rows


def _parquet_rows(path: Path) -> list[dict[str, Any]]:
    from pyarrow import ArrowInvalid, parquet

    try:
        return parquet.read_table(path).to_pylist()
    except ArrowInvalid as error:
        raise ValueError(f"{path} is not a Parquet file: {error}") from None


def read_hub(repo: str, configuration: str | None, split: str) -> list[Row]:
    """Rows of a data set on the hub, or of its local cache, through `datasets`."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        rows = load_dataset(repo, configuration, split=split)
    except (OSError, ValueError, DatasetsError) as error:
        raise ValueError(
            f"cannot load the {split} split of {repo!r} from the hub ({type(error).__name__}: {error}); without a "
            "connection, pass a folder that holds train.jsonl and test.jsonl (or .json, .parquet): --data.path DIR"
        ) from error
    return [(f"{split}/{i}", f"{repo} {split} row {i}", dict(row)) for i, row in enumerate(rows)]
