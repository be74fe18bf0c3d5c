"""Problems -> groups: prefill each prompt once, decode all its completions together, hand back plain Python.

The model is the ordinary transformers causal LM; only its attention is replaced, for the duration of a call
(grpo.rollout.attention). So any family, and any wrapped linear layer, samples exactly as it trains. train.py,
grpo.evaluation and grpo.base call `Sampler.generate`. What a call leaves behind only saves time, except the Plan.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import kernels
from grpo.config import RolloutConfig
from grpo.layers import compiled_layers
from grpo.records import Group, Problem
from grpo.rollout import graphs
from grpo.rollout.attention import refuse_unservable, sampling_mode
from grpo.rollout.graphs import Graphs
from grpo.rollout.loop import RolloutLoop
from grpo.rollout.philox import TRAINING, refuse_large_words
from grpo.rollout.schedule import bucket, ladder
from grpo.rollout.slab import KVSlab, LayerShape, Plan, Probe, is_kept, kv_budget, make_plan
from grpo.rollout.step import DecodeStep, forward
from grpo.rollout.stops import Ending, eos_ids


class Sampler:
    """Samples `rollout.group_size` completions of each problem. The weights of `model` may change between calls.

    model, tokenizer: the unwrapped causal LM and its tokenizer.  rollout: sampling settings and limits; temperature 0
    is greedy.  stop: strings; a completion ends with the token that completes one of them.  stream, seed: key every
    random number (grpo.rollout.philox).  compile: decode with compiled layers.  impl: auto, torch or triton, as in
    kernels.  progress: called with the numbers of finished and of all sequences.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rollout: RolloutConfig,
        *,
        stop: tuple[str, ...],
        seed: int,
        stream: int = TRAINING,
        compile: bool = False,
        impl: str = "auto",
        progress: Callable[[int, int], None] | None = None,
    ):
        assert rollout.max_sequences >= rollout.group_size, "a group is decoded together"
        for op in ("decode_attention", "sample_token"):
            kernels.resolve(op, impl, model.device)
        refuse_unservable(model)
        self.model, self.rollout, self.impl, self.seed, self.stream = model, rollout, impl, seed, stream
        self.has_graphs = rollout.cuda_graph and graphs.are_usable(model.device)
        self.has_fixed_shapes = self.has_graphs  # as a graph's: rows are padded to a bucket, bounds are the slab's
        self.forwards = compiled_layers(model) if compile else {}  # used for decoding only
        self.ending = Ending(tokenizer, eos_ids(model, tokenizer), stop)
        self.progress = progress or (lambda done, total: None)
        self.plan: Plan | None = None
        self._shapes: dict[int, LayerShape] = {}
        self._kept: tuple[DecodeStep, Callable] | None = None  # from the last call: the step, and it or its graphs

    def generate(self, problems: list[Problem], step: int) -> list[Group]:
        """One Group per problem, in the order given; `prompt_ids` must be filled.

        Up to rounding, a completion depends only on the weights, the settings, its prompt, `seed`, `stream`, `step`
        (the training step), the problem's index and its sample number: not on what else the call contains. ValueError,
        before anything is sampled, for a prompt that is empty, too long or has a token without an embedding, and where
        the KV budget cannot hold one group; FloatingPointError for a log-prob that is not finite.
        """
        self._check(problems, step)
        if not problems:
            return []
        with sampling_mode(self.model):
            self._plan(problems)
            try:
                completions = RolloutLoop(self, *self._prepare(), problems, step).run()
            finally:
                if not is_kept(self.planned_bytes(), self.model.device):
                    self.release()
        size = self.rollout.group_size
        return [Group(problem, completions[i * size : (i + 1) * size], step) for i, problem in enumerate(problems)]

    def state_dict(self) -> dict:
        """The plan: a resumed run needs the same one to sample the same to the last bit."""
        return {"plan": asdict(self.plan) if self.plan else None, "limits": self._limits()}

    def load_state_dict(self, state: dict) -> None:
        """Adopt the plan of another run if it was made under the same limits; else the next call makes one."""
        is_ours = state.get("limits", self._limits()) == self._limits()  # older checkpoints have none
        self.plan = Plan(**state["plan"]) if state["plan"] and is_ours else None

    def _limits(self) -> list[float | None]:
        """The settings that a plan depends on, besides those that `Plan.fits` checks."""
        return [self.rollout.group_size, self.rollout.max_sequences, self.rollout.kv_gib]

    def planned_bytes(self) -> int:
        """Bytes of the KV slab by the current plan; 0 before the first call."""
        return self.plan.num_bytes(self._token_bytes()) if self.plan else 0

    def release(self) -> None:
        """Free what is kept between calls: slab, buffers and graphs. The next call makes them again."""
        self._kept = None
        torch.cuda.empty_cache()  # does nothing without CUDA

    def _check(self, problems: list[Problem], step: int) -> None:
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        new, rows = self.rollout.max_new_tokens, len(self.model.get_input_embeddings().weight)
        for problem in problems:
            refuse_large_words(seed=self.seed, step=step, problem_index=problem.index)
            length = len(problem.prompt_ids)
            if length == 0:
                raise ValueError(f"problem {problem.id!r} has an empty prompt; a prompt needs at least one token")
            if max(problem.prompt_ids) >= rows:
                raise ValueError(
                    f"problem {problem.id!r}: token id {max(problem.prompt_ids)} of its prompt has no embedding: the "
                    f"model has {rows}; use the model's own tokenizer, or resize the model's embeddings to this one"
                )
            if limit is not None and length + new > limit:
                raise ValueError(
                    f"problem {problem.id!r}: {length} prompt tokens + max_new_tokens={new} exceed the model's context "
                    f"of {limit}; lower max_new_tokens or use fewer shots"
                )

    def _plan(self, problems: list[Problem]) -> None:
        """Set self.plan: the old one if it is large enough for this call, else one for this and all earlier calls."""
        if not self._shapes:
            self._shapes = self._probe()
        longest_prefix = max(len(problem.prompt_ids) for problem in problems) - 1
        num_problems, suffix_size, old = len(problems), self.rollout.max_new_tokens + 1, self.plan
        round_up = bucket if self.has_fixed_shapes else lambda rows: rows
        has_rows_for_steps = old and round_up(old.num_rows) == old.num_rows  # not if made without buckets
        if has_rows_for_steps and old.fits(num_problems, longest_prefix, suffix_size):
            return
        if old:
            num_problems, longest_prefix = max(num_problems, old.num_problems), max(longest_prefix, old.prefix_size)
        self.plan = make_plan(
            self._token_bytes(),
            kv_budget(self.rollout.kv_gib, self.model.device),
            num_problems=num_problems,
            group_size=self.rollout.group_size,
            max_rows=self.rollout.max_sequences,
            longest_prefix=longest_prefix,
            suffix_size=suffix_size,
            bucket=round_up,
        )

    def bucket(self, rows: int) -> int:
        """Size of the step that decodes this many: the next rung of the `ladder`, or `rows` itself without graphs."""
        return min(size for size in ladder(self.plan.num_rows) if size >= rows) if self.has_fixed_shapes else rows

    def _token_bytes(self) -> int:
        return sum(shape.token_bytes for shape in self._shapes.values())

    def _probe(self) -> dict[int, LayerShape]:
        """What each layer stores per token, learnt from a one-token pass. ValueError if one lacks our attention."""
        ids, probe = torch.zeros(1, 1, dtype=torch.int64, device=self.model.device), Probe()
        forward(self.model, ids, ids, probe)
        found, layers = len(probe.shapes), self.model.config.get_text_config().num_hidden_layers
        if found != layers:
            raise ValueError(
                f"only {found} of {layers} layers of {type(self.model).__name__} use attention that rollout can "
                "replace (the others have none, or bypass transformers' AttentionInterface); use another model"
            )
        return probe.shapes

    def _prepare(self) -> tuple[DecodeStep, Callable]:
        """The decode step for the current plan, and what runs it; reused from the last call if kept and still valid."""
        if self._kept and self._kept[0].slab.plan != self.plan:
            self.release()
        if not self._kept:
            slab = KVSlab(self.plan, self._shapes, self.model.device, self.impl)
            step = DecodeStep(self.model, slab, self.rollout, sorted(self.ending.eos), self.forwards)
            self._kept = step, Graphs(step) if self.has_graphs else step
        step, run = self._kept
        if isinstance(run, Graphs):
            run.check()
        return step, run
