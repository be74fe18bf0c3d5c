"""Checks of a config: numbers outside their interval, sizes that do not divide, contradictions, and values that a
resumed run cannot change."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, is_dataclass
from typing import Any, get_type_hints

from grpo.config import Config, PromptConfig, flat

LARGEST = 1e38  # of any number: fp32 ends at 3.4e38
FIXED = ("task", "seed", "model.path", "model.precision", "lora", "data.validation_fraction", "data.split_seed", "base")
"""Keys and sections that the state in a checkpoint depends on: a resumed run cannot change them."""
FREE = (
    "num_steps",
    "save_every",
    "keep_last",
    "log_groups",
    "eval",
    "track",
    "distributed",
    "rewards.workers",
    "rewards.timeout_s",
    "rewards.step_timeout_s",
)
"""Keys and sections that do not change what a step computes, except for the learning rate, scheduled over num_steps."""


def changes(before: Config, now: Config) -> tuple[list[str], list[str]]:
    """`key: old -> new` for each value that a resumed run changes: first those in FREE, then those that change what it
    learns from here on. ValueError if it changes one in FIXED: the checkpoint would not fit any more."""
    old, new = flat(asdict(before)), flat(asdict(now))
    text = {key: f"{key}: {old[key]!r} -> {new[key]!r}" for key in old if old[key] != new[key]}
    is_in = lambda key, table: any(f"{key}.".startswith(f"{entry}.") for entry in table)
    fixed = [line for key, line in text.items() if is_in(key, FIXED)]
    if fixed:
        raise ValueError(f"a resumed run cannot change {'; '.join(fixed)}; start another run with these values")
    free = [line for key, line in text.items() if is_in(key, FREE)]
    return free, [line for line in text.values() if line not in free]


def check(config: Config, world_size: int) -> None:
    """Refuse what cannot work, before any long work: one ValueError with a line per mistake, with value and remedy."""
    mistakes = [*outside_intervals(config), *_indivisible(config, world_size), *_contradictions(config)]
    if mistakes:
        raise ValueError("\n".join(mistakes))


def outside_intervals(section: Any, prefix: str = "") -> Iterator[str]:
    """Messages about numbers outside their interval, in a config or in one section, whose keys begin with `prefix`."""
    for name, kind in get_type_hints(type(section), include_extras=True).items():
        value = getattr(section, name)
        if is_dataclass(value):
            yield from outside_intervals(value, f"{name}.")
        numbers = value if isinstance(value, tuple) else () if value is None else (value,)
        for interval in getattr(kind, "__metadata__", ()):
            if not all(_lies_in(number, interval) for number in numbers):
                yield f"{prefix}{name}={value} is outside {interval}; choose a value inside"
            elif not all(number <= LARGEST for number in numbers):
                yield f"{prefix}{name}={value} is more than fp32 holds; use {LARGEST:g} at most"


def _lies_in(number: float, interval: str) -> bool:
    low, high = map(float, interval[1:-1].split(","))
    above = number >= low if interval[0] == "[" else number > low
    return above and (number <= high if interval[-1] == "]" else number < high)  # NaN fails both


def _indivisible(config: Config, world_size: int) -> Iterator[str]:
    """Messages about sizes that do not divide. A rank gets whole groups, and as many of every minibatch as any other.
    Heads are equally wide, and rotary embeddings rotate pairs of their elements."""
    width, heads = config.base.hidden_size, config.base.num_heads
    if heads >= 1 and width % (2 * heads):
        above = width - width % (2 * heads) + 2 * heads
        yield f"base.hidden_size={width} is not divisible by 2 * base.num_heads={2 * heads}; use {above}"
    prompts, minibatches = config.rollout.prompts_per_step, config.batch.minibatches
    divisors = {"world_size": world_size, "batch.minibatches": max(minibatches, 1)}
    both = math.prod(divisors.values())
    if prompts >= 1 and prompts % both:
        missed = " and ".join(f"{name}={divisor}" for name, divisor in divisors.items() if prompts % divisor)
        below = prompts - prompts % both
        remedy = f"{below} or {below + both}" if below else f"{both}"
        by = missed or f"batch.minibatches * world_size={both}"
        yield f"rollout.prompts_per_step={prompts} is not divisible by {by}; use {remedy}"


def prompt_mistakes(prompt: PromptConfig) -> Iterator[str]:
    """Messages about template options without a chat template. For eval.py, too."""
    if prompt.template_options and prompt.style != "chat":
        yield f"prompt.template_options={list(prompt.template_options)} with prompt.style={prompt.style}: use chat"


def _contradictions(config: Config) -> Iterator[str]:
    rollout, lora = config.rollout, config.lora
    yield from prompt_mistakes(config.prompt)
    if lora.rank and lora.dropout and config.batch.layout != "padded":
        yield (
            f"lora.dropout={lora.dropout} with batch.layout={config.batch.layout}: all completions would share the "
            "dropout mask of their packed prompt; use batch.layout=padded"
        )
    if config.model.compile and config.model.gradient_checkpointing:
        yield "model.compile with model.gradient_checkpointing: a compiled layer cannot be recomputed; choose one"
    if lora.quantize != "none" and not lora.rank:
        yield f"lora.quantize={lora.quantize} with lora.rank=0: weights of 4 bits cannot be trained; set lora.rank=16"
    if lora.rank and not (lora.target_modules or lora.modules_to_save):
        yield f"lora.rank={lora.rank} without lora.target_modules: nothing would be trained; name some, such as q_proj"
    if lora.rank and config.distributed.strategy == "fsdp":
        yield "distributed.strategy=fsdp with adapters: they are small, and their frozen base stays whole; use ddp"
    if lora.rank and config.model.reference_offload:
        yield "model.reference_offload with adapters: the reference shares the policy's frozen base; leave it off"
    if config.model.reference_offload and config.objective.ref_refresh_every:
        yield (
            f"model.reference_offload with objective.ref_refresh_every={config.objective.ref_refresh_every}: a "
            "reference that follows the policy stays on its device; choose one"
        )
    if rollout.group_size == 1:
        yield "rollout.group_size=1: an advantage is taken against the rest of its group; use 2 or more"
    if rollout.temperature == 0:
        yield "rollout.temperature=0: all completions of a prompt would be the most likely one; use a value above 0"
    if rollout.max_sequences < rollout.group_size:
        yield (
            f"rollout.max_sequences={rollout.max_sequences} is less than rollout.group_size={rollout.group_size}, but "
            f"a group is decoded together; use {rollout.group_size} or more"
        )
    for name, off in (("top_p", 1), ("top_k", 0), ("min_p", 0)):
        if (value := getattr(rollout, name)) != off:
            yield f"rollout.{name}={value}: the loss would not see the distribution that was sampled; train with {off}"
    scoring, waiting = config.rewards.step_timeout_s, config.distributed.timeout_s
    if scoring >= waiting:
        yield (
            f"rewards.step_timeout_s={scoring} must be less than distributed.timeout_s={waiting}: the other ranks wait "
            "while one scores"
        )
