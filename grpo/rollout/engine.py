"""Problems -> groups: prefill each prompt once, decode all its completions together, hand back plain Python.

The model is the unmodified transformers causal LM with its attention replaced for the length of the call
(grpo.rollout.attention), so any family, and any wrapped linear layer, samples exactly as it trains. train.py and
eval.py call `Sampler.generate`. What a call leaves behind saves time only, but for the plan of the slab's size.
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
from grpo.rollout.draw import Draw
from grpo.rollout.graphs import Graphs
from grpo.rollout.philox import TRAINING, refuse_large_words
from grpo.rollout.schedule import bucket, ladder
from grpo.rollout.slab import KVSlab, LayerShape, Plan, Probe, is_kept, kv_budget, make_plan
from grpo.rollout.step import DecodeStep, forward
from grpo.rollout.stops import Ending, eos_ids


class Sampler:
    """Samples `rollout.group_size` completions of each problem. `model` may change its weights between calls.

    model, tokenizer: the unwrapped causal LM and its tokenizer.  rollout: how to draw, within which limits; temperature
    0 is greedy.  stop: a completion ends with the token that completes one of these.  stream, seed: of every random
    number.  compile: decode with compiled layers.  impl: of the kernels.  progress: told how many sequences are done,
    and of how many.
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
        self.is_static = self.has_graphs  # a graph is for one shape: rows come in buckets, bounds are those of the slab
        self.forwards = compiled_layers(model) if compile else {}  # while decoding
        self.ending = Ending(tokenizer, eos_ids(model, tokenizer), stop)
        self.progress = progress or (lambda done, total: None)
        self.plan: Plan | None = None
        self._shapes: dict[int, LayerShape] = {}
        self._kept: tuple[DecodeStep, Callable] | None = None  # of the last call: the step and what runs it

    def generate(self, problems: list[Problem], step: int) -> list[Group]:
        """One Group per problem, in the order given; `prompt_ids` must be filled.

        A completion depends on the weights, its prompt, `seed`, `step` (the training step), the problem's index and
        its sample number: on nothing else in the call. ValueError before any work for a prompt that is empty, does not
        fit or has a token that the model does not know, and for a group that the memory for keys and values cannot
        hold; FloatingPointError for a log-prob that is not finite.
        """
        self._check(problems, step)
        if not problems:
            return []
        with sampling_mode(self.model):
            self._plan(problems)
            try:
                completions = Draw(self, *self._prepare(), problems, step).run()
            finally:
                if not is_kept(self.planned_bytes(), self.model.device):
                    self.release()
        size = self.rollout.group_size
        return [Group(problem, completions[i * size : (i + 1) * size], step) for i, problem in enumerate(problems)]

    def state_dict(self) -> dict:
        """The plan: what a resumed run must share for the last bits to be the same."""
        return {"plan": asdict(self.plan) if self.plan else None, "limits": self._limits()}

    def load_state_dict(self, state: dict) -> None:
        """Go on with the plan of another run, if it was made under the same limits."""
        is_ours = state.get("limits", self._limits()) == self._limits()  # older checkpoints have none
        self.plan = Plan(**state["plan"]) if state["plan"] and is_ours else None

    def _limits(self) -> list[float | None]:
        """What a plan is made under, besides what `Plan.serves` asks."""
        return [self.rollout.group_size, self.rollout.max_sequences, self.rollout.kv_gib]

    def planned_bytes(self) -> int:
        """Of keys and values, by the plan of the calls so far."""
        return self.plan.num_bytes(self._token_bytes()) if self.plan else 0

    def release(self) -> None:
        """Give back what a call leaves behind on CUDA: slab, buffers and graphs. The next call makes them again."""
        self._kept = None
        torch.cuda.empty_cache()  # nothing where CUDA is not in use

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
                    f"problem {problem.id!r}: token {max(problem.prompt_ids)} of its prompt has no embedding: the "
                    f"model has {rows}; use the model's own tokenizer, or resize the model to this one"
                )
            if limit is not None and length + new > limit:
                raise ValueError(
                    f"problem {problem.id!r}: {length} prompt tokens + max_new_tokens={new} exceed the model's context "
                    f"of {limit}; lower max_new_tokens or use fewer shots"
                )

    def _plan(self, problems: list[Problem]) -> None:
        """A plan that serves this call and all before it; the old one wherever it does."""
        if not self._shapes:
            self._shapes = self._probe()
        longest_prefix = max(len(problem.prompt_ids) for problem in problems) - 1
        num_problems, suffix_size, old = len(problems), self.rollout.max_new_tokens + 1, self.plan
        round_up = bucket if self.is_static else lambda rows: rows
        has_rows_for_steps = old and round_up(old.num_rows) == old.num_rows  # not if it was made without buckets
        if has_rows_for_steps and old.serves(num_problems, longest_prefix, suffix_size):
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
        """Rows of the step that decodes so many."""
        return min(size for size in ladder(self.plan.num_rows) if size >= rows) if self.is_static else rows

    def _token_bytes(self) -> int:
        return sum(shape.token_bytes for shape in self._shapes.values())

    def _probe(self) -> dict[int, LayerShape]:
        """What the layers store, learnt from one token. ValueError where not all do."""
        ids, probe = torch.zeros(1, 1, dtype=torch.int64, device=self.model.device), Probe()
        forward(self.model, ids, ids, probe)
        found, layers = len(probe.shapes), self.model.config.get_text_config().num_hidden_layers
        if found != layers:
            raise ValueError(
                f"only {found} of {layers} layers of {type(self.model).__name__} use attention that rollout can "
                "replace; use a model whose layers all have attention"
            )
        return probe.shapes

    def _prepare(self) -> tuple[DecodeStep, Callable]:
        """The decode step by the plan, and what runs it: those of the last call where they are kept and still right."""
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
