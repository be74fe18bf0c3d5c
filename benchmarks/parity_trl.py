"""Our loss and gradient beside those of TRL's own code, on the same random numbers: python -m benchmarks.parity_trl

Log-probs, lengths, advantages, entropies and settings are drawn once, in fp64. TRL's side is GRPOTrainer._compute_loss
itself, on a trainer object that holds only the attributes that this method reads. Ours is pack, weigh, the masks and
weighted_loss, over several micro-batches. A row is *equal* where loss and gradient agree to 1e-6 (our weights are
fp32). Where they differ, the stated change is applied to one side, and must make them equal. Last line: JSON.

Needs benchmarks/requirements.txt. Exit status 0 only if nothing is left unexplained.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from importlib.util import find_spec
from types import SimpleNamespace

import torch
from torch import Tensor

from benchmarks.common import measured_on
from grpo.batch import correct_mismatch, counted_completions, keep_high_entropy, pack, weigh
from grpo.objectives import Objective, kl_k3, mean_by_sequence, resolve
from grpo.records import Completion, Group, MicroBatch, Problem
from grpo.update import weighted_loss

NUM_GROUPS, GROUP_SIZE, MAX_NEW_TOKENS, TOLERANCE = 4, 4, 12, 1e-6


@dataclass
class Draw:
    """Everything that a loss is made of: [N, longest] fp64, padded, and advantages [N]; `mask` is True for tokens."""

    groups: list[Group]
    mask: Tensor
    truncated: Tensor
    logprobs: Tensor
    old: Tensor
    ref: Tensor
    sampler: Tensor
    advantages: Tensor

    def entropy(self, logprobs: Tensor) -> Tensor:
        """Any differentiable function will do for both sides."""
        return 0.3 * logprobs.square()


def draw(seed: int = 0) -> Draw:
    """Ragged completions, off-policy enough for every clip and gate to act somewhere."""
    generator = torch.Generator().manual_seed(seed)
    size = (NUM_GROUPS * GROUP_SIZE, MAX_NEW_TOKENS)
    normal = lambda: torch.randn(size, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, MAX_NEW_TOKENS + 1, size[:1], generator=generator)
    lengths[0] = MAX_NEW_TOKENS
    truncated = lengths == MAX_NEW_TOKENS
    old = -normal().abs()
    groups = []
    for g in range(NUM_GROUPS):
        rows = range(g * GROUP_SIZE, (g + 1) * GROUP_SIZE)
        completions = [
            Completion([2] * int(lengths[i]), [0.0] * int(lengths[i]), "", "length" if truncated[i] else "eos", s)
            for s, i in enumerate(rows)
        ]
        groups.append(Group(Problem(str(g), "", "", index=g, prompt_ids=(3, 4)), completions, 0))
    mask = torch.arange(MAX_NEW_TOKENS) < lengths[:, None]
    columns = {"old": old, "logprobs": old + 0.4 * normal(), "ref": old + 0.3 * normal()}
    sampler = old + 0.5 * normal()
    advantages = torch.randn(size[:1], generator=generator)
    return Draw(groups, mask, truncated, **columns, sampler=sampler, advantages=advantages)


def ours(data: Draw, logprobs: Tensor, objective: Objective, *, keep_advantages: bool = True) -> Tensor:
    """The loss of one optimizer step, by the functions that training calls."""
    options = {"minibatches": 1, "passes": 1, "tokens_per_micro_batch": 40, "device": torch.device("cpu")}
    batch = pack(data.groups, **options, max_over_ranks=lambda values: values)
    for micro_batch in batch.micro_batches:
        tokens = micro_batch.tokens
        for name in ("old", "ref", "sampler"):
            setattr(tokens, name, of_micro_batch(getattr(data, name), micro_batch))
        tokens.entropy = of_micro_batch(data.entropy(data.logprobs), micro_batch)
    shape = (NUM_GROUPS, GROUP_SIZE)
    counted = counted_completions(
        data.groups, torch.ones(shape, dtype=torch.bool), mask_truncated=objective.mask_truncated
    )
    limits = {"aggregation": objective.aggregation, "max_new_tokens": MAX_NEW_TOKENS}
    advantages = data.advantages.reshape(shape) * keep_advantages
    weigh(batch, advantages, counted, **limits, sum_over_ranks=lambda values: values)
    if objective.entropy_share < 1:
        keep_high_entropy(batch, objective.entropy_share, lambda mine: [mine])
    if objective.mismatch != "none":
        correct_mismatch(batch, objective.mismatch, level=objective.mismatch_level, cap=objective.mismatch_cap)
    total = torch.zeros((), dtype=torch.float64)
    for micro_batch in batch.micro_batches:
        columns = [of_micro_batch(column, micro_batch) for column in (logprobs, data.entropy(logprobs))]
        total = total + weighted_loss(objective, micro_batch)(*columns, slice(0, len(columns[0]))).sum()
    return total


def of_micro_batch(column: Tensor, micro_batch: MicroBatch) -> Tensor:
    """[N, longest] -> [T] in the order of the micro-batch."""
    rows = torch.tensor([g * GROUP_SIZE + s for g, s in micro_batch.sequences])[micro_batch.tokens.sequence]
    positions = torch.cat([torch.arange(n) for n in micro_batch.tokens.sequence.bincount().tolist()])
    return column[rows, positions]


def theirs(data: Draw, logprobs: Tensor, settings: dict[str, object]) -> Tensor:
    """TRL's loss of one micro-batch that is the whole step."""
    from trl import GRPOConfig, GRPOTrainer

    options = {
        "beta": 0.0,
        "loss_type": "grpo",
        "use_bias_correction_kl": False,
        "max_completion_length": MAX_NEW_TOKENS,
    }
    fixed = {"use_cpu": True, "bf16": False, "report_to": "none", "num_generations": GROUP_SIZE}
    with tempfile.TemporaryDirectory() as folder:
        args = GRPOConfig(folder, per_device_train_batch_size=len(data.mask), **fixed, **(options | settings))
    trainer = bare_trainer(GRPOTrainer, args)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logprobs, data.entropy(logprobs), None)
    mask = data.mask.long()
    if args.mask_truncated_completions:  # as its _generate_and_score_completions does
        mask = mask * (~data.truncated).long()[:, None]
    prompt = torch.full((len(mask), 2), 3)
    inputs = {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": torch.full_like(mask, 2),
        "completion_mask": mask,
        "advantages": data.advantages.double(),
        "old_per_token_logps": data.old,
        "ref_per_token_logps": data.ref,
        "sampling_per_token_logps": data.sampler,
        "importance_sampling_ratio": ((data.old - data.sampler) * mask).exp().clamp(max=2.0),  # its token_truncate
        "num_items_in_batch": mask.sum(),
    }
    return GRPOTrainer._compute_loss(trainer, None, inputs)


def bare_trainer(kind: type, args: object) -> object:
    """A trainer without model, data or accelerator: only what _compute_loss reads, set as __init__ sets it."""
    trainer = kind.__new__(kind)
    for name in (
        "loss_type",
        "importance_sampling_level",
        "beta",
        "top_entropy_quantile",
        "off_policy_mask_threshold",
        "use_vllm",
        "vllm_importance_sampling_correction",
        "max_completion_length",
        "entropy_coef",
        "use_adaptive_entropy",
    ):
        setattr(trainer, name, getattr(args, name))
    trainer.args, trainer.model = args, SimpleNamespace(training=True)
    trainer.epsilon_low = args.epsilon
    trainer.epsilon_high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    trainer.current_gradient_accumulation_steps, trainer.aux_loss_enabled = 1, False
    trainer._entropy_bonus_enabled, trainer._metrics = args.entropy_coef != 0, {"train": defaultdict(list)}
    same = lambda value, *_, **__: value
    collectives = dict.fromkeys(("gather", "reduce", "pad_across_processes", "gather_for_metrics"), same)
    trainer.accelerator = SimpleNamespace(num_processes=1, sync_gradients=True, **collectives)
    return trainer


Loss = Callable[[Draw, Tensor], Tensor]


@dataclass
class Case:
    """One variant on both sides; where they differ, why, and the change to either side that undoes the difference."""

    name: str
    objective: Objective
    settings: dict[str, object] = field(default_factory=dict)
    why: str = ""
    our_change: Loss | None = None
    their_change: dict[str, object] = field(default_factory=dict)


def sum_of(policy: Objective, rest: Objective) -> Loss:
    """The policy term by one objective and, without advantages, the KL or entropy term by another."""
    return lambda data, logprobs: ours(data, logprobs, policy) + ours(data, logprobs, rest, keep_advantages=False)


def with_masked_sequences_counted(objective: Objective) -> Loss:
    return lambda data, logprobs: ours(data, logprobs, objective) * (~data.truncated).double().mean()


def with_sequence_ratio_on_kl(objective: Objective) -> Loss:
    """The KL times the ratio of its sequence instead of its token's, under sequence_mean."""

    def loss(data: Draw, logprobs: Tensor) -> Tensor:
        lengths = data.mask.sum(1)
        sequence = torch.arange(len(lengths)).repeat_interleave(lengths)
        now, old, ref = (column[data.mask] for column in (logprobs, data.old, data.ref))
        kl = kl_k3(now, ref) * mean_by_sequence(now - old, sequence).exp()
        weights = 1 / (len(lengths) * lengths[sequence])
        return ours(data, logprobs, replace(objective, beta=0.0)) + objective.beta * (weights * kl).sum()

    return loss


SHARE, BONUS = 0.2, 0.05
GRPO, DAPO, CISPO = resolve("grpo", beta=0.0), resolve("dapo"), resolve("cispo")
GSPO = resolve("gspo", clip_low=0.1, clip_high=0.15)  # wide enough for these random ratios
KL = replace(GRPO, beta=0.3)
HIGH = replace(DAPO, entropy_share=SHARE)
TRUNCATED = replace(GRPO, mask_truncated=True)
MISMATCH = {"mismatch": "token_truncate", "mismatch_cap": 2.0}

DAPO_TRL = {"loss_type": "dapo", "epsilon_high": 0.28}
GSPO_TRL = {"importance_sampling_level": "sequence", "epsilon": 0.1, "epsilon_high": 0.15}
KL_TRL, CORRECTED_TRL = {"beta": 0.3}, {"beta": 0.3, "use_bias_correction_kl": True}
HIGH_TRL = DAPO_TRL | {"top_entropy_quantile": SHARE}
TRUNCATED_TRL = {"mask_truncated_completions": True}
MISMATCH_TRL = {"use_vllm": True, "vllm_importance_sampling_mode": "token_truncate"}

CASES = [
    Case("grpo", GRPO),
    Case("grpo, k3", KL, KL_TRL),
    Case("grpo, k3 corrected", replace(KL, kl_corrected=True), CORRECTED_TRL),
    Case("dr_grpo", resolve("dr_grpo"), {"loss_type": "dr_grpo"}),
    Case("dapo", DAPO, DAPO_TRL),
    Case("gspo", GSPO, GSPO_TRL),
    Case("cispo, cap 5", CISPO, {"loss_type": "cispo", "epsilon_high": 5.0}),
    Case("sapo", resolve("sapo"), {"loss_type": "sapo"}),
    Case("dual clip", replace(GRPO, surrogate="dual_clip", ratio_cap=1.4), {"delta": 1.4}),
    Case("entropy mask", HIGH, HIGH_TRL),
    Case("entropy bonus, dapo", replace(DAPO, entropy_bonus=BONUS), DAPO_TRL | {"entropy_coef": BONUS}),
    Case("truncated masked, dapo", replace(DAPO, mask_truncated=True), DAPO_TRL | TRUNCATED_TRL),
    Case("mismatch, token_truncate", replace(GRPO, **MISMATCH), MISMATCH_TRL),
    Case(
        "cispo, both defaults",
        CISPO,
        {"loss_type": "cispo"},
        "TRL caps every weight at epsilon_high, by default 0.2; state 5",
        their_change={"epsilon_high": 5.0},
    ),
    Case(
        "entropy mask, k3",
        replace(HIGH, beta=0.3),
        HIGH_TRL | KL_TRL,
        "TRL's KL is not masked",
        sum_of(HIGH, replace(DAPO, beta=0.3)),
    ),
    Case(
        "truncated masked, grpo",
        TRUNCATED,
        TRUNCATED_TRL,
        "TRL still divides by all completions",
        with_masked_sequences_counted(TRUNCATED),
    ),
    Case(
        "entropy bonus, grpo",
        replace(GRPO, entropy_bonus=BONUS),
        {"entropy_coef": BONUS},
        "TRL's bonus is a token mean whatever the aggregation",
        sum_of(GRPO, replace(GRPO, entropy_bonus=BONUS, aggregation="token_mean")),
    ),
    Case(
        "mismatch, k3",
        replace(KL, **MISMATCH),
        MISMATCH_TRL | KL_TRL,
        "TRL's KL is not corrected for the sampler",
        sum_of(replace(GRPO, **MISMATCH), KL),
    ),
    Case(
        "gspo, k3 corrected",
        replace(GSPO, beta=0.3, kl_corrected=True),
        GSPO_TRL | CORRECTED_TRL,
        "TRL corrects each token's KL by the sequence's ratio",
        with_sequence_ratio_on_kl(replace(GSPO, beta=0.3)),
    ),
]


def loss_and_gradient(data: Draw, loss: Loss) -> tuple[float, Tensor]:
    logprobs = data.logprobs.clone().requires_grad_()
    value = loss(data, logprobs)
    return value.item(), torch.autograd.grad(value, logprobs)[0]


def difference(a: tuple[float, Tensor], b: tuple[float, Tensor]) -> float:
    """The larger of the relative differences of loss and gradient."""
    return max(abs(a[0] - b[0]) / abs(b[0]), ((a[1] - b[1]).norm() / b[1].norm()).item())


def compare(case: Case, data: Draw) -> dict[str, object]:
    """Both sides as they are and, where they differ, after the stated change."""
    by_trl = lambda settings: loss_and_gradient(data, lambda data, logprobs: theirs(data, logprobs, settings))
    mine = loss_and_gradient(data, lambda data, logprobs: ours(data, logprobs, case.objective))
    trl = by_trl(case.settings)
    row = {"case": case.name, "loss_ours": mine[0], "loss_trl": trl[0], "difference": difference(mine, trl)}
    row["gradient_norm_ours"], row["gradient_norm_trl"] = mine[1].norm().item(), trl[1].norm().item()
    row["is_equal"] = row["difference"] < TOLERANCE
    if case.why:
        mine = loss_and_gradient(data, case.our_change) if case.our_change else mine
        row["difference_after_change"] = difference(mine, by_trl(case.settings | case.their_change))
        row["is_explained"] = not row["is_equal"] and row["difference_after_change"] < TOLERANCE
        row["why"] = case.why
    return row


def verdict(row: dict[str, object]) -> str:
    if row["is_equal"]:
        return "equal"
    if not row.get("is_explained"):
        return "DIFFERENT, unexplained"
    return f"different: {row['why']} (then {row['difference_after_change']:.0e})"


def main() -> int:
    if find_spec("trl") is None:
        print("error: trl is not installed; pip install -r benchmarks/requirements.txt", file=sys.stderr)
        return 2
    data = draw()
    print(f"{'':26} {'loss, ours':>12} {'loss, TRL':>12} {'|grad|, ours':>13} {'|grad|, TRL':>13} {'difference':>11}")
    rows = []
    for case in CASES:
        row = compare(case, data)
        rows.append(row)
        losses = f"{row['loss_ours']:12.6f} {row['loss_trl']:12.6f}"
        norms = f"{row['gradient_norm_ours']:13.6f} {row['gradient_norm_trl']:13.6f}"
        print(f"{row['case']:26} {losses} {norms} {row['difference']:11.1e}  {verdict(row)}", flush=True)
    equal, explained = (sum(bool(row.get(key)) for row in rows) for key in ("is_equal", "is_explained"))
    counts = {"compared": len(rows), "equal": equal, "different_explained": explained}
    counts["different_unexplained"] = len(rows) - equal - explained
    print(json.dumps(counts | {"rows": rows, "trl": version("trl")} | measured_on()))
    return int(counts["different_unexplained"] > 0)


if __name__ == "__main__":
    sys.exit(main())
