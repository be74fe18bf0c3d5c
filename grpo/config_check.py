"""What a config must not ask for: numbers outside their interval, sizes that do not divide, contradictions, and what a
run that goes on cannot change."""

from __future__ import annotations

from collections.abc import Iterator

from grpo.config import Config, get, known_keys

INTERVALS = {
    "num_steps": "[1, inf)",
    "save_every": "[1, inf)",
    "keep_last": "[1, inf)",
    "lora.rank": "[0, inf)",
    "lora.alpha": "(0, inf)",
    "lora.dropout": "[0, 1)",
    "data.validation_fraction": "(0, 1)",
    "data.target_rate": "(0, 1)",
    "prompt.shots": "[0, 8]",
    "rewards.format_weight": "[0, inf)",
    "rewards.correctness_weight": "[0, inf)",
    "rewards.workers": "[0, inf)",
    "rewards.timeout_s": "(0, inf)",
    "rewards.step_timeout_s": "(0, inf)",
    "rewards.max_unscored": "[0, 1]",
    "rollout.prompts_per_step": "[1, inf)",
    "rollout.group_size": "[1, inf)",
    "rollout.max_new_tokens": "[1, inf)",
    "rollout.temperature": "(0, inf)",
    "rollout.max_sequences": "[1, inf)",
    "rollout.prefill_tokens": "[1, inf)",
    "rollout.kv_gib": "(0, inf)",
    "objective.clip_low": "(0, 1]",
    "objective.clip_high": "(0, inf)",
    "objective.ratio_cap": "(1, inf)",
    "objective.tau_positive": "(0, inf)",
    "objective.tau_negative": "(0, inf)",
    "objective.beta": "[0, inf)",
    "objective.ref_refresh_every": "[0, inf)",
    "objective.ref_mix": "(0, 1]",
    "objective.entropy_bonus": "[0, inf)",
    "objective.entropy_share": "(0, 1]",
    "objective.mismatch_cap": "(1, inf)",
    "objective.max_draws": "[1, inf)",
    "objective.overlong_share": "[0, 1]",
    "batch.tokens_per_micro_batch": "[1, inf)",
    "batch.minibatches": "[1, inf)",
    "batch.passes": "[1, inf)",
    "optim.lr": "(0, inf)",
    "optim.warmup": "[0, 1]",
    "optim.betas": "[0, 1)",
    "optim.eps": "(0, inf)",
    "optim.weight_decay": "[0, inf)",
    "optim.max_grad_norm": "(0, inf)",
    "optim.max_skipped_steps": "[0, inf)",
    "eval.every": "[0, inf)",
    "eval.validation_problems": "[1, inf)",
    "eval.test_problems": "[0, inf)",
    "distributed.timeout_s": "(0, inf)",
    "distributed.term_grace_s": "(0, inf)",
    "base.num_solutions": "[0, inf)",
}
"""Where each number must lie. A pair is checked item by item; None passes."""


FIXED = ("task", "seed", "model.path", "model.precision", "lora", "data.validation_fraction", "data.split_seed", "base")
"""Keys and sections that the state in a checkpoint depends on: a run that goes on keeps them."""
FREE = (
    "num_steps",
    "save_every",
    "keep_last",
    "eval",
    "track",
    "distributed",
    "rewards.workers",
    "rewards.timeout_s",
    "rewards.step_timeout_s",
)
"""Keys and sections that change no step, but for the learning rate, which is scheduled over num_steps."""


def changes(before: Config, now: Config) -> tuple[list[str], list[str]]:
    """`key: old -> new` of each value that a run that goes on has changed: harmless ones, and those that change what it
    learns from here on. ValueError where the checkpoint would not fit any more."""
    differing = [key for key in known_keys() if get(before, key) != get(now, key)]
    text = {key: f"{key}: {get(before, key)!r} -> {get(now, key)!r}" for key in differing}
    is_in = lambda key, table: any(f"{key}.".startswith(f"{entry}.") for entry in table)  # noqa: E731
    fixed = [text[key] for key in differing if is_in(key, FIXED)]
    if fixed:
        raise ValueError(f"a run that goes on cannot change {'; '.join(fixed)}; start another run with these values")
    free = [text[key] for key in differing if is_in(key, FREE)]
    return free, [line for line in text.values() if line not in free]


def check(config: Config, world_size: int) -> None:
    """Refuse what cannot work, before any long work: one ValueError with a line for each mistake, value and remedy."""
    mistakes = [*_outside_intervals(config), *_indivisible(config, world_size), *_contradictions(config)]
    if mistakes:
        raise ValueError("\n".join(mistakes))


def _outside_intervals(config: Config) -> Iterator[str]:
    for key, interval in INTERVALS.items():
        value = get(config, key)
        numbers = value if isinstance(value, tuple) else () if value is None else (value,)
        if not all(_lies_in(number, interval) for number in numbers):
            yield f"{key}={value} is outside {interval}; choose a value inside"


def _lies_in(number: float, interval: str) -> bool:
    low, high = map(float, interval[1:-1].split(","))
    above = number >= low if interval[0] == "[" else number > low
    return above and (number <= high if interval[-1] == "]" else number < high)  # NaN fails both


def _indivisible(config: Config, world_size: int) -> Iterator[str]:
    """Whole groups go to a rank, and a minibatch is a block of prompts of which every rank has as many."""
    prompts, minibatches = config.rollout.prompts_per_step, config.batch.minibatches
    divisors = {"world_size": world_size, "batch.minibatches": minibatches}
    if min(prompts, minibatches) >= 1 and not any(prompts % divisor for divisor in divisors.values()):
        divisors = {"batch.minibatches * world_size": minibatches * world_size}
    for name, divisor in divisors.items():
        if divisor >= 1 and prompts % divisor:
            below = prompts - prompts % divisor
            remedy = f"{below} or {below + divisor}" if below else f"{divisor}"
            yield f"rollout.prompts_per_step={prompts} is not divisible by {name}={divisor}; use {remedy}"


def _contradictions(config: Config) -> Iterator[str]:
    rollout, lora = config.rollout, config.lora
    if lora.dropout and config.batch.layout != "padded":
        yield (
            f"lora.dropout={lora.dropout} with batch.layout={config.batch.layout}: a packed prompt would lose the same "
            "for all its completions; use batch.layout=padded"
        )
    if config.model.compile and config.model.gradient_checkpointing:
        yield "model.compile with model.gradient_checkpointing: a compiled layer cannot be recomputed; choose one"
    if lora.quantize != "none" and not lora.rank:
        yield f"lora.quantize={lora.quantize} with lora.rank=0: weights of 4 bits cannot be trained; set lora.rank=16"
    if lora.rank and config.distributed.strategy == "fsdp":
        yield "distributed.strategy=fsdp with adapters: they are small, and their frozen base stays whole; use ddp"
    if lora.rank and config.model.reference_offload:
        yield "model.reference_offload with adapters: the reference shares the policy's frozen base; leave it"
    if config.model.reference_offload and config.objective.ref_refresh_every:
        yield (
            f"model.reference_offload with objective.ref_refresh_every={config.objective.ref_refresh_every}: a "
            "reference that follows the policy stays on its device; choose one"
        )
    if rollout.group_size == 1:
        yield "rollout.group_size=1: an advantage is taken against the rest of its group; use 2 or more"
    if rollout.top_p != 1:
        yield f"rollout.top_p={rollout.top_p}: the loss would not see the distribution that was sampled; train with 1"
    if rollout.top_k != 0:
        yield f"rollout.top_k={rollout.top_k}: the loss would not see the distribution that was sampled; train with 0"
    scoring, waiting = config.rewards.step_timeout_s, config.distributed.timeout_s
    if scoring >= waiting:
        yield f"rewards.step_timeout_s={scoring}: ranks wait {waiting} s (distributed.timeout_s); choose less than that"
    if config.rewards.format_weight == 0 and config.rewards.correctness_weight == 0:
        yield "rewards.format_weight=0 and rewards.correctness_weight=0: nothing is rewarded; raise one of them"
