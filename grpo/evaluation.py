"""Generate, score, count: accuracy with its interval, pass@k, maj@k. Called by grpo.run and eval.py.

Problems are divided among the ranks, and every rank gets the whole result.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch

from grpo.distributed import World
from grpo.records import Group, Problem, Scores
from grpo.rewards import final_answer
from grpo.rollout import Sampler

CORRECTNESS = "correctness"  # the component that accuracy counts
Z_95 = 1.959964  # standard deviations: 95 % of a normal distribution lie within so many of its mean


@dataclass(frozen=True)
class Evaluation:
    """Results over N problems with `samples` completions each."""

    groups: list[Group]
    correct: torch.Tensor  # [N, samples] bool
    components: dict[str, float | None]  # mean of each reward component over what it judged; None: it judged nothing
    reward: float  # mean total reward
    completion_length: float  # tokens
    truncated: float  # share that ran into the length limit
    unscored: float  # share without a correctness score (error, timeout, abstained): they count as wrong

    @property
    def accuracy(self) -> float:
        """Share of completions that are correct; with several samples that is pass@1."""
        return self.correct.double().mean().item()

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the accuracy; the problems, not the samples, are the trials."""
        problems, samples = self.correct.shape
        return wilson_interval(self.correct.sum().item() / samples, problems)

    def __str__(self) -> str:
        low, high = self.interval
        unscored = f"; {self.unscored:.1%} could not be scored and count as wrong" if self.unscored else ""
        problems = f"{len(self.groups)} problems (95 % interval {low:.1%} to {high:.1%})"
        return f"accuracy {self.accuracy:.1%} of {problems}{unscored}"

    def summary(self) -> dict:
        """Plain numbers for tables and JSON; pass@k and maj@k for k = 1, 2, 4, ... up to the number of samples.

        maj@k is empty if no completion at all states a final answer (code, free text): there is nothing to vote on.
        `correct`: the number of correct completions of each problem, in the order of problems.
        """
        problems, samples = self.correct.shape
        ks = sorted({*(2**i for i in range(samples.bit_length())), samples})
        counts = self.correct.sum(1).tolist()
        low, high = self.interval
        texts = (completion.text for group in self.groups for completion in group.completions)
        has_votes = any(final_answer(text) is not None for text in texts)
        return {
            "accuracy": self.accuracy,
            "interval": [low, high],
            "problems": problems,
            "samples": samples,
            "pass_at_k": {str(k): sum(pass_at_k(samples, c, k) for c in counts) / problems for k in ks},
            "maj_at_k": {str(k): majority_accuracy(self.groups, self.correct, k) for k in ks if has_votes},
            "reward": self.reward,
            **{f"reward/{name}": value for name, value in self.components.items()},
            "completion_length": self.completion_length,
            "truncated": self.truncated,
            "unscored": self.unscored,
            "correct": counts,
        }


def evaluate(
    sampler: Sampler, problems: list[Problem], score: Callable[[list[Group]], Scores], *, world: World, step: int = 0
) -> Evaluation:
    """Sample and score completions of `problems`, which have prompts; the sampler decides how many and how."""
    groups = sampler.generate(world.local_share(problems), step)
    scores = score(groups)
    rows = list(zip(groups, scores.components.tolist(), scores.total.tolist(), strict=True))
    groups, components, totals = zip(*world.gather_interleaved(rows), strict=True)
    components = torch.tensor(components, dtype=torch.float64)  # [N, samples, K]
    means = components.nanmean((0, 1)).tolist()
    completions = [completion for group in groups for completion in group.completions]
    correctness = components[..., scores.names.index(CORRECTNESS)]
    return Evaluation(
        groups=list(groups),
        correct=correctness >= 1.0,
        components={name: None if math.isnan(mean) else mean for name, mean in zip(scores.names, means, strict=True)},
        reward=torch.tensor(totals, dtype=torch.float64).mean().item(),
        completion_length=sum(len(completion.ids) for completion in completions) / len(completions),
        truncated=sum(completion.finish == "length" for completion in completions) / len(completions),
        unscored=correctness.isnan().double().mean().item(),
    )


def wilson_interval(successes: float, trials: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927); 95 % for the default z. Trials 0 gives (0, 1)."""
    if trials == 0:
        return 0.0, 1.0
    p = successes / trials
    centre = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))  # despite rounding, p is inside


def paired_difference(result: dict, other: dict) -> tuple[float, tuple[float, float]]:
    """Accuracy of `result` minus that of `other` on the same problems, and its 95 % interval over problems.

    For matched proportions (Agresti and Min, Statistics in Medicine 24, 2005): half a problem is added to each outcome
    (solved by both, by either alone, by neither). Narrower than from two separate intervals, because both find the same
    problems hard.
    """
    shares = [[count / entry["samples"] for count in entry["correct"]] for entry in (result, other)]
    differences = [one - another for one, another in zip(*shares, strict=True)]
    trials, total = len(differences) + 2, sum(differences)
    centre, squares = total / trials, sum(d * d for d in differences) + 1
    half = Z_95 * math.sqrt((squares / trials - centre * centre) / trials)
    return total / len(differences), (max(-1.0, centre - half), min(1.0, centre + half))


def describe_difference(name: str, result: dict, other_name: str, other: dict) -> str:
    """A line that compares two named summaries on the same problems."""
    difference, (low, high) = paired_difference(result, other)
    interval = f"95 % interval {100 * low:+.1f} to {100 * high:+.1f}"
    problems = f"the same {len(result['correct'])} problems"
    return f"{name} minus {other_name}: {100 * difference:+.1f} points of accuracy on {problems} ({interval})"


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased chance that at least one of k samples is correct: 1 - C(n - c, k) / C(n, k) (arXiv:2107.03374 Eq. 1)."""
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority_accuracy(groups: list[Group], correct: torch.Tensor, k: int) -> float:
    """maj@k: share of problems whose most frequent answer among the first k samples is correct (arXiv:2203.11171).

    Completions without an answer do not vote; a tie goes to the answer seen first. A completion that was truncated or
    not scored does vote, but does not count as right: another one with the same answer has to be.
    """
    wins = 0
    for group, row in zip(groups, correct.tolist(), strict=True):
        answers = [final_answer(completion.text) for completion in group.completions[:k]]
        votes = Counter(answer for answer in answers if answer is not None)
        if votes:
            winner = votes.most_common(1)[0][0]
            wins += any(answer == winner and is_right for answer, is_right in zip(answers, row, strict=False))
    return wins / len(groups)


def result_table(results: dict[str, dict], width: float = math.inf) -> str:
    """An aligned table, one row per named summary: accuracy with its interval, the share unscored if there is any,
    pass@k and maj@k, rewards, length, share truncated. Columns beyond `width` characters are left out."""
    first = next(iter(results.values()))
    kinds = ("pass", "maj") if any(entry["maj_at_k"] for entry in results.values()) else ("pass",)
    ks = [(kind, k) for kind in kinds for k in first["pass_at_k"] if k != "1"]
    components = [key for key in first if key.startswith("reward/") and key != f"reward/{CORRECTNESS}"]
    names = [key.removeprefix("reward/") for key in components]
    unscored = ["unscored"] * any(entry["unscored"] for entry in results.values())
    at_k = [f"{kind}@{k}" for kind, k in ks]
    rows = [["", "accuracy", "95 % interval", *unscored, *at_k, *names, "reward", "length", "truncated"]]
    for name, entry in results.items():
        low, high = entry["interval"]
        shares = [entry[key] for key in unscored] + [entry[f"{kind}_at_k"].get(k, 0.0) for kind, k in ks]
        shares += [entry[key] for key in components]
        cells = ["" if share is None else f"{share:.1%}" for share in (entry["accuracy"], *shares)]
        cells.insert(1, f"{low:.1%} to {high:.1%}")
        rows.append([name, *cells, f"{entry['reward']:.3f}", f"{entry['completion_length']:.1f}"])
        rows[-1].append(f"{entry['truncated']:.1%}")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    ends = accumulate(column + 2 for column in widths)
    fitting = widths[: max(2, sum(end - 2 <= width for end in ends))]
    cells_of = lambda row: (cell.rjust(column) for cell, column in zip(row[1:], fitting[1:], strict=False))
    return "\n".join("  ".join([row[0].ljust(widths[0]), *cells_of(row)]) for row in rows)
