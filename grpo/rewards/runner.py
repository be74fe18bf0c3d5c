"""Groups in, Scores out: runs the reward functions of a task and gives every value a status.

`score_texts` runs them in this process and trusts them to end; train.py and eval.py pass a Pool (grpo.rewards.pool),
which runs them in worker processes under a deadline. Either way a batch that fails is scored again one completion at
a time, so that one bad completion does not cost the others their reward. Importing this loads no torch.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import compress
from logging.handlers import MemoryHandler
from typing import Any, NamedTuple

from grpo.records import ABSTAIN, ERROR, OK, TIMEOUT, Group, Scores

STANDARD = ("answer", "question", "prompt")  # columns of every task
LARGEST = 1e18  # its square still fits fp32, in which advantages are computed from rewards

logger = logging.getLogger(__name__)
_logged_kinds: dict[tuple[str, str], str] = {}  # a failing reward fails thousands of times: one traceback is enough


@dataclass(frozen=True)
class Reward:
    """One component: `function(completions, **columns) -> list of float | None` and its weight in the total.

    The function may be async. It gets at most batch_size completions a call: 1 if scoring a single one takes long.
    """

    function: Callable[..., Any]
    weight: float
    batch_size: int = 256


class Outcome(NamedTuple):
    """What one component gave one completion; `value` is NaN where the status is not ok."""

    value: float
    status: str


Table = list[list[Outcome]]  # [N][K]: of N completions, every component in the order of the rewards
Scorer = Callable[[list[str], dict[str, list], dict[str, Reward]], Table]  # score_texts, or a Pool
FAILURES = {TIMEOUT, ERROR}
UNFINISHED = Outcome(0.0, OK)  # what require_finish pays a completion that ran into the length limit


def refuse_uncallable(rewards: Mapping[str, Reward], columns: Iterable[str] | None = None) -> None:
    """ValueError for a function that cannot be called with the completions and every column by its name.

    columns: those of the data besides STANDARD. None before the data is read: any name that a function wants will do.
    """
    for name, reward in rewards.items():
        try:
            signature = inspect.signature(reward.function)
        except ValueError:  # a builtin may have none
            continue
        others = [other for other in list(signature.parameters.values())[1:] if other.default is other.empty]
        wanted = [other.name for other in others if other.kind in (other.POSITIONAL_OR_KEYWORD, other.KEYWORD_ONLY)]
        names = {*STANDARD, *(wanted if columns is None else columns)} - {"completions"}
        try:
            signature.bind([], **dict.fromkeys(names))
        except TypeError as error:
            raise ValueError(
                f"reward {name!r} takes ({', '.join(signature.parameters)}), but is called as function(completions, "
                f"**columns) with the columns {', '.join(sorted(names))}: {error}; declare it as "
                "function(completions, **columns)"
            ) from None


def score_texts(completions: list[str], columns: dict[str, list], rewards: dict[str, Reward]) -> Table:
    """[N][K] outcomes of N texts, computed in this process. Each column is a list of N values."""
    table: Table = [[] for _ in completions]
    for name, reward in rewards.items():
        for start in range(0, len(completions), reward.batch_size):
            rows = range(len(completions))[start : start + reward.batch_size]
            for i, outcome in zip(rows, _score_rows(name, reward, completions, columns, rows), strict=True):
                table[i].append(outcome)
    return table


def score_groups(
    groups: list[Group], rewards: dict[str, Reward], *, require_finish: bool, score: Scorer = score_texts
) -> Scores:
    """Scores of this rank's groups, each of the same size G: components [P, G, K], all else [P, G].

    require_finish: a completion that ended by `length` is not shown to the functions. In every component it earns 0 or,
    where weights or values are negative, what the worst finished completion of its group earns: to run into the limit
    never pays. The functions get as columns `answer`, `question`, `prompt` and the problems' own columns (None where a
    problem lacks one), and never the finish reason.
    """
    pairs = [(group.problem, completion) for group in groups for completion in group.completions]
    texts = [completion.text for _, completion in pairs]
    rows = [{**p.columns, "answer": p.answer, "question": p.question, "prompt": p.prompt} for p, _ in pairs]
    is_finished = [not (require_finish and completion.finish == "length") for _, completion in pairs]
    return _as_scores(score_finished(texts, rows, is_finished, rewards, score), is_finished, rewards, groups)


def score_finished(
    texts: list[str], rows: list[dict[str, Any]], is_finished: list[bool], rewards: dict[str, Reward], score: Scorer
) -> Table:
    """[N][K] outcomes of N texts, each with a row of columns. Where is_finished is False: UNFINISHED, without a call.

    The functions see the union of the rows' columns, None where a row lacks one.
    """
    finished_rows = list(compress(rows, is_finished))
    names = dict.fromkeys(name for row in finished_rows for name in row)
    columns = {name: [row.get(name) for row in finished_rows] for name in names}
    outcomes = iter(score(list(compress(texts, is_finished)), columns, rewards))
    return [next(outcomes) if finished else [UNFINISHED] * len(rewards) for finished in is_finished]


def _worst_for_unfinished(group: Table, is_finished: list[bool], rewards: dict[str, Reward]) -> Table:
    """The outcomes; in each component an unfinished completion gets the worse of 0 and the worst finished value."""
    worst = []
    for k, reward in enumerate(rewards.values()):
        values = [row[k].value for row in compress(group, is_finished) if row[k].status == OK]
        worst.append(Outcome((max if reward.weight < 0 else min)([0.0, *values]), OK))
    return [row if finished else worst for row, finished in zip(group, is_finished, strict=True)]


def weighted_total(row: list[Outcome], rewards: dict[str, Reward]) -> float:
    """Weighted sum of the components that are ok; the others add 0."""
    pairs = zip(row, rewards.values(), strict=True)
    return sum(reward.weight * outcome.value for outcome, reward in pairs if outcome.status == OK)


def refuse_unscored(scores: Scores, limit: float) -> None:
    """ValueError where a weighted component failed on more than a share `limit` of the completions of a step."""
    rows = [_weighted_statuses(row, scores.weights) for group in scores.status for row in group]
    unscored = sum(not FAILURES.isdisjoint(row) for row in rows) / len(rows)
    if unscored > limit:
        failed = [status for group in scores.status for row in group for status in row]
        raise ValueError(
            f"{unscored:.0%} of the step's completions could not be scored ({failed.count(ERROR)} errors, "
            f"{failed.count(TIMEOUT)} timeouts), more than rewards.max_unscored={limit}; the first failure of each "
            "kind is logged above: fix the reward function, or raise rewards.timeout_s (per call) or "
            "rewards.step_timeout_s (per step)"
        )


def _score_rows(
    name: str, reward: Reward, completions: list[str], columns: dict[str, list], rows: Sequence[int]
) -> list[Outcome]:
    try:
        return call(name, reward.function, *take_rows(completions, columns, rows))
    except Exception as error:  # a user's function may raise anything, and none of it may end the run
        log_once(name, type(error).__name__, traceback.format_exc())
        if len(rows) == 1:
            return [Outcome(math.nan, ERROR)]
        return [outcome for i in rows for outcome in _score_rows(name, reward, completions, columns, [i])]


def take_rows(
    completions: list[str], columns: dict[str, list], rows: Sequence[int]
) -> tuple[list[str], dict[str, list]]:
    """Some of the completions, and the same rows of every column."""
    return [completions[i] for i in rows], {key: [column[i] for i in rows] for key, column in columns.items()}


def call(name: str, function: Callable, completions: list[str], columns: dict[str, list]) -> list[Outcome]:
    """One call of a reward function, awaited if async; ValueError unless it returns a float or None per completion."""
    values = function(completions, **columns)
    values = asyncio.run(values) if inspect.iscoroutine(values) else values
    if isinstance(values, str | Mapping) or not isinstance(values, Iterable):
        raise ValueError(
            f"reward {name!r} returned {type(values).__name__}; return a list, one float or None for each completion"
        )
    values = list(values)
    if len(values) != len(completions):
        raise ValueError(
            f"reward {name!r} returned {len(values)} values for {len(completions)} completions; "
            "return one float or None for each"
        )
    return [_outcome(name, value) for value in values]


def _outcome(name: str, value: float | None) -> Outcome:
    if value is None:
        return Outcome(math.nan, ABSTAIN)
    number = float(value)
    if not abs(number) <= LARGEST:  # NaN, too
        raise ValueError(f"reward {name!r} returned {number}; return a float within {LARGEST:g}, or None to abstain")
    return Outcome(number, OK)


def log_once(name: str, kind: str, details: str) -> None:
    """A warning for the first failure of a kind; details: its traceback."""
    if (name, kind) not in _logged_kinds:
        _logged_kinds[name, kind] = details
        logger.warning("reward %r failed; further failures of this kind are only counted: %s\n%s", name, kind, details)


@contextmanager
def held_log() -> Iterator[None]:
    """Hold back the log of failures until the block ends; drop it if the block raises, as that error says enough."""
    handler = MemoryHandler(10**6, logging.CRITICAL + 1, logging.lastResort, flushOnClose=False)
    logger.addHandler(handler)
    try:
        yield
        handler.flush()
    finally:
        logger.removeHandler(handler)


def refuse_failed(status: list[list[str]], rewards: Mapping[str, Reward]) -> None:
    """ValueError for a component that failed with an error on each of N completions. status: [N][K]."""
    for name, column in zip(rewards, zip(*status, strict=True), strict=False):
        if set(column) == {ERROR}:
            details = next(details for (component, _), details in _logged_kinds.items() if component == name)
            lines = details.strip().splitlines()
            location = next((f" ({line.strip()})" for line in reversed(lines) if line.startswith("  File ")), "")
            raise ValueError(f"reward {name!r} failed on every completion: {lines[-1]}{location}")


def _as_scores(table: Table, is_finished: list[bool], rewards: dict[str, Reward], groups: list[Group]) -> Scores:
    """[N][K] outcomes of equally large groups, and which of the N count as finished -> Scores [P, G, K]."""
    import torch

    num_groups, completions = len(groups), [completion for group in groups for completion in group.completions]
    group_size = len(table) // num_groups if num_groups else 0
    assert len(table) == num_groups * group_size, "groups differ in size"
    shape = (num_groups, group_size)
    for start in range(0, len(table), group_size or 1):
        group = slice(start, start + group_size)
        table[group] = _worst_for_unfinished(table[group], is_finished[group], rewards)
    values = [[outcome.value for outcome in row] for row in table]
    status = [[outcome.status for outcome in row] for row in table]
    totals = [weighted_total(row, rewards) for row in table]
    weights = tuple(reward.weight for reward in rewards.values())
    weighted = [_weighted_statuses(row, weights) for row in status]
    # Else the total would be a guess: it would lack what failed, or be 0 because all weighted components abstained.
    scored = [FAILURES.isdisjoint(found) and found != {ABSTAIN} for found in weighted]
    return Scores(
        names=tuple(rewards),
        weights=weights,
        components=torch.tensor(values, dtype=torch.float32).reshape(*shape, len(rewards)),
        status=[status[i * group_size : (i + 1) * group_size] for i in range(num_groups)],
        total=torch.tensor(totals, dtype=torch.float32).reshape(shape),
        scored=torch.tensor(scored, dtype=torch.bool).reshape(shape),
        lengths=torch.tensor([len(c.ids) for c in completions], dtype=torch.int64).reshape(shape),
        truncated=torch.tensor([c.finish == "length" for c in completions], dtype=torch.bool).reshape(shape),
    )


def _weighted_statuses(row: list[str], weights: Sequence[float]) -> set[str]:
    """The statuses of one completion's components that have a weight."""
    return {status for status, weight in zip(row, weights, strict=True) if weight}
