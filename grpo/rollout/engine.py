"""Problems -> groups: prefill each prompt once, decode all its completions together, hand back plain Python.

The model is the unmodified transformers causal LM with its attention replaced for the length of the call
(grpo.rollout.attention), so any family, and any wrapped linear layer, samples exactly as it trains. train.py and
eval.py call `Sampler.generate`. What a call leaves behind saves time only, but for the plan of the slab's size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import kernels
from grpo.records import Completion, Group, Problem
from grpo.rollout import graphs
from grpo.rollout.attention import refuse_unsupported, sampling_mode
from grpo.rollout.graphs import Graphs
from grpo.rollout.sampling import Sampling, refuse_large_words, uniforms
from grpo.rollout.schedule import SHRINK_BELOW, Rows, bucket, prefill_chunks, seat
from grpo.rollout.slab import (
    GIB,
    MEMORY_SHARE,
    Decode,
    KVSlab,
    Plan,
    Prefill,
    Probe,
    is_kept,
    make_plan,
    total_memory,
)
from grpo.rollout.step import DecodeStep, forward
from grpo.rollout.stops import Ending, eos_ids

STEPS_BETWEEN_LOOKS = {"cpu": 1, "cuda": 8}  # at which rows live: on CUDA to look is to wait for the device
STEPS_BETWEEN_STOPS = 8  # to look for stop strings is to decode text


class Sampler:
    """Samples `sampling.group_size` completions of each problem. `model` may change its weights between calls.

    model, tokenizer: the unwrapped causal LM and its tokenizer.  seed: of every random number.  max_sequences: rows
    decoded at a time; more take turns.  prefill_tokens: prompt tokens of one prefill pass, with padding.  kv_gib: most
    memory for keys and values; None: MEMORY_SHARE of the device's.  cuda_graph: replay decode steps where there is
    CUDA.  compile: torch.compile the model's decode forward.  impl: of the kernels.  progress: told how many
    sequences are done, and of how many.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        *,
        seed: int,
        max_sequences: int,
        prefill_tokens: int,
        kv_gib: float | None = None,
        cuda_graph: bool = True,
        compile: bool = False,
        impl: str = "auto",
        progress: Callable[[int, int], None] | None = None,
    ):
        if max_sequences < sampling.group_size:
            raise ValueError(
                f"max_sequences={max_sequences} is less than group_size={sampling.group_size}, but a group is "
                f"decoded together; use max_sequences={sampling.group_size} or more"
            )
        for op in ("decode_attention", "sample_token"):
            kernels.resolve(op, impl, model.device)
        refuse_unsupported(model)
        self.model, self.sampling, self.impl = model, sampling, impl
        self.seed, self.max_sequences, self.prefill_tokens, self.kv_gib = seed, max_sequences, prefill_tokens, kv_gib
        self.has_graphs = cuda_graph and graphs.are_usable(model.device)
        # A graph or a compiled forward is made for one shape: rows come in buckets, and bounds are those of the slab.
        self.is_static = self.has_graphs or compile
        self.decode_forward = torch.compile(forward, fullgraph=True, dynamic=False) if compile else forward
        self.ending = Ending(tokenizer, eos_ids(model, tokenizer), sampling.stop)
        self.progress = progress or (lambda done, total: None)
        self.plan: Plan | None = None
        self._probed = Probe()
        self._kept: tuple[DecodeStep, Callable] | None = None  # of the last call: the step and what runs it

    def generate(self, problems: list[Problem], step: int) -> list[Group]:
        """One Group per problem, in the order given; `prompt_ids` must be filled.

        A completion depends on the weights, its prompt, `seed`, `step` (the training step), the problem's index and
        its sample number: on nothing else in the call. ValueError before any work for a prompt that is empty or does
        not fit, and for a group that the memory for keys and values cannot hold; FloatingPointError for a log-prob
        that is not finite.
        """
        self._check(problems, step)
        if not problems:
            return []
        with sampling_mode(self.model):
            self._plan(problems)
            with self._prepared() as (decode, run):
                ids, logprobs = _Draw(self, decode, run, problems, step).run()
        texts = self.ending.texts(ids)
        completions = []
        for sequence, text in enumerate(texts):
            kept, text, finish = self.ending.finish(ids[sequence], text)
            sample = sequence % self.sampling.group_size
            completions.append(Completion(kept, logprobs[sequence][: len(kept)], text, finish, sample))
        size = self.sampling.group_size
        return [Group(problem, completions[i * size : (i + 1) * size], step) for i, problem in enumerate(problems)]

    def state_dict(self) -> dict:
        """The plan: what a resumed run must share for the last bits to be the same."""
        return {"plan": asdict(self.plan) if self.plan else None}

    def load_state_dict(self, state: dict) -> None:
        """Go on with the plan of another run."""
        self.plan = Plan(**state["plan"]) if state["plan"] else None

    def planned_bytes(self) -> int:
        """Of keys and values, by the plan of the calls so far."""
        return self.plan.num_bytes(self._token_bytes()) if self.plan else 0

    def release(self) -> None:
        """Give back what a call leaves behind on CUDA: slab, buffers and graphs. The next call makes them again."""
        self._kept = None
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    def _check(self, problems: list[Problem], step: int) -> None:
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        new = self.sampling.max_new_tokens
        for problem in problems:
            refuse_large_words(seed=self.seed, step=step, problem_index=problem.index)
            length = len(problem.prompt_ids)
            if length == 0:
                raise ValueError(f"problem {problem.id!r} has an empty prompt; a prompt needs at least one token")
            if limit is not None and length + new > limit:
                raise ValueError(
                    f"problem {problem.id!r}: {length} prompt tokens + max_new_tokens={new} exceed the model's context "
                    f"of {limit}; lower max_new_tokens or use fewer shots"
                )

    def _plan(self, problems: list[Problem]) -> None:
        """A plan that serves this call and all before it; the old one wherever it does."""
        if not self._probed.shapes:
            self._probe()
        longest_prefix = max(len(problem.prompt_ids) for problem in problems) - 1
        num_problems, suffix_size, old = len(problems), self.sampling.max_new_tokens + 1, self.plan
        if old and old.serves(num_problems, longest_prefix, suffix_size):
            return
        if old:
            num_problems, longest_prefix = max(num_problems, old.num_problems), max(longest_prefix, old.prefix_size)
        budget = MEMORY_SHARE * total_memory(self.model.device) if self.kv_gib is None else self.kv_gib * GIB
        self.plan = make_plan(
            self._token_bytes(),
            int(budget),
            num_problems=num_problems,
            group_size=self.sampling.group_size,
            max_rows=self.max_sequences,
            longest_prefix=longest_prefix,
            suffix_size=suffix_size,
            bucket=self.bucket,
        )

    def bucket(self, rows: int) -> int:
        """Rows of the step that decodes so many."""
        return bucket(rows) if self.is_static else rows

    def _token_bytes(self) -> int:
        return sum(shape.token_bytes for shape in self._probed.shapes.values())

    def _probe(self) -> None:
        """Learn from one token what the layers store. ValueError where not all do."""
        ids = torch.zeros(1, 1, dtype=torch.int64, device=self.model.device)
        forward(self.model, ids, ids, self._probed)
        found, layers = len(self._probed.shapes), self.model.config.get_text_config().num_hidden_layers
        if found != layers:
            raise ValueError(
                f"only {found} of {layers} layers of {type(self.model).__name__} use attention that rollout can "
                "replace; use a model whose layers all have attention"
            )

    @contextmanager
    def _prepared(self) -> Iterator[tuple[DecodeStep, Callable]]:
        """The decode step by the plan, and what runs it: those of the last call where they are kept and still right."""
        if self._kept and self._kept[0].slab.plan != self.plan:
            self.release()
        if not self._kept:
            slab = KVSlab(self.plan, self._probed.shapes, self.model.device, self.impl)
            step = DecodeStep(self.model, slab, self.sampling, sorted(self.ending.eos), self.decode_forward)
            self._kept = step, Graphs(step) if self.has_graphs else step
        step, run = self._kept
        if isinstance(run, Graphs):
            run.check()
        try:
            yield step, run
        finally:
            if not is_kept(self.planned_bytes(), self.model.device):
                self.release()


class _Draw:
    """One call of `generate`. Results are [N, max_new_tokens + 1], a row per sequence: i of problem p is p * G + i."""

    def __init__(
        self,
        sampler: Sampler,
        step: DecodeStep,
        run_step: Callable,
        problems: list[Problem],
        training_step: int,
    ):
        self.sampler, self.problems, self.training_step = sampler, problems, training_step
        self.step, self.run_step, self.sampling = step, run_step, sampler.sampling
        self.device, self.plan = sampler.model.device, step.slab.plan
        shape = (len(problems) * self.sampling.group_size, self.plan.suffix_size)
        self.ids = torch.zeros(shape, dtype=torch.int64)
        self.logprobs = torch.zeros(shape, dtype=torch.float32)
        self.lengths = torch.zeros(shape[0], dtype=torch.int64)
        self.waiting = deque(range(len(problems)))
        self.rows = Rows.none()

    def run(self) -> tuple[list[list[int]], list[list[float]]]:
        """Ids and log-probs of every sequence, through its end-of-sequence token or to the length limit."""
        look = STEPS_BETWEEN_LOOKS[self.device.type]
        steps, total = 0, len(self.lengths)
        self._exchange()
        while self.rows.size:
            self.run_step(self.layout)
            self.layout.longest_suffix = min(self.layout.longest_suffix + 1, self.plan.suffix_size)
            steps += 1
            if self.sampling.stop and steps % STEPS_BETWEEN_STOPS == 0:
                self._stop_rows()
            if steps % look == 0:
                live = int(self.step.alive[: self.rows.size].sum())
                self.sampler.progress(total - live - len(self.waiting) * self.sampling.group_size, total)
                if self._pays_to_exchange(live):
                    self._exchange()
        return self._results()

    def _pays_to_exchange(self, live: int) -> bool:
        if self.sampler.is_static and live and not self.waiting:
            return self.sampler.bucket(live) < self.rows.size
        return live < SHRINK_BELOW * self.rows.size

    def _exchange(self) -> None:
        """Finished rows out, waiting groups in, and the rows that stay close together."""
        old, group_size = self.rows, self.sampling.group_size
        alive = self.step.alive.cpu()[old.row]
        self._collect(old.row[~alive], old.sequence[~alive])
        kept = old.row[alive]
        groups, group = torch.unique_consecutive(old.group[alive], return_inverse=True)
        new = self._next(len(kept), len(groups))
        sequence = torch.tensor(new, dtype=torch.int64)[:, None] * group_size + torch.arange(group_size)
        number = torch.arange(len(groups), len(groups) + len(new)).repeat_interleave(group_size)
        self.rows = self._arrange(torch.cat([old.sequence[alive], sequence.flatten()]), torch.cat([group, number]))
        if self.rows.size:
            self._move(groups, kept, self.rows.row[: len(kept)])
            self._admit([self.problems[index] for index in new], len(groups), self.rows.row[len(kept) :])
            self.layout = self._layout()

    def _next(self, num_rows: int, num_groups: int) -> list[int]:
        """Waiting problems for which there is room beside the rows and groups that stay."""
        room = (min(self.sampler.max_sequences, self.plan.num_rows) - num_rows) // self.sampling.group_size
        room = min(room, self.plan.num_groups - num_groups, len(self.waiting))
        return [self.waiting.popleft() for _ in range(room)]

    def _arrange(self, sequence: Tensor, group: Tensor) -> Rows:
        """Rows and seats for these sequences of these groups."""
        if not len(group):
            return Rows.none()
        size = self.sampler.bucket(len(group))
        seats = self.sampling.group_size if self.sampler.is_static else int(torch.bincount(group).max())
        place, row = seat(group, seats, size)
        self.step.place[:size] = place.to(self.device)
        return Rows(size, seats, row, sequence, group)

    def _move(self, groups: Tensor, rows: Tensor, to: Tensor) -> None:
        groups, rows, to = (index.to(self.device) for index in (groups, rows, to))
        if len(rows):
            self.step.slab.move(groups, rows, to, int(self.step.length[rows].max()))
        self.step.move(rows, to)

    def _admit(self, problems: list[Problem], first_group: int, rows: Tensor) -> None:
        """Prompts of new groups, from first_group on, and their rows."""
        if not problems:
            return
        device, group_size, rows = self.device, self.sampling.group_size, rows.to(self.device)
        prompts = [problem.prompt_ids for problem in problems]
        by_row = lambda values: torch.tensor(values, device=device).repeat_interleave(group_size)  # noqa: E731
        keys = dict(seed=self.sampler.seed, step=self.training_step, stream=self.sampling.stream, device=device)
        numbers = uniforms([problem.index for problem in problems], group_size, self.plan.suffix_size, **keys)
        self.step.slab.clear(slice(first_group, first_group + len(problems)), rows)
        self._prefill([prompt[:-1] for prompt in prompts], first_group)
        token, prefix = by_row([prompt[-1] for prompt in prompts]), by_row([len(prompt) - 1 for prompt in prompts])
        self.step.admit(rows, token=token, prefix=prefix, uniforms=numbers)

    def _prefill(self, prefixes: list[tuple[int, ...]], first_group: int) -> None:
        slab = self.step.slab
        for chunk in prefill_chunks([len(prefix) for prefix in prefixes], self.sampler.prefill_tokens):
            ids = pad_sequence([torch.tensor(prefixes[index], dtype=torch.int64) for index in chunk], batch_first=True)
            if ids.shape[1] == 0:  # prompts of one token have no prefix
                continue
            ids = ids.to(self.device)
            slab.layout = Prefill(groups=torch.tensor(chunk, device=ids.device) + first_group)
            forward(self.sampler.model, ids, torch.arange(ids.shape[1], device=ids.device).expand_as(ids), slab)

    def _layout(self) -> Decode:
        """With the bounds of the rows as they are; in a step made ahead, with those that always hold."""
        rows, step, plan = self.rows, self.step, self.plan
        if self.sampler.is_static:
            bounds = (min(plan.num_groups, rows.size), plan.prefix_size, plan.suffix_size)
        else:
            bounds = (rows.num_groups(), int(step.prefix[: rows.size].max()), int(step.length[: rows.size].max()) + 1)
        num_groups, longest_prefix, longest_suffix = bounds
        return step.layout(
            rows.size,
            num_groups=num_groups,
            seats=rows.seats,
            longest_prefix=longest_prefix,
            longest_suffix=longest_suffix,
        )

    def _stop_rows(self) -> None:
        """End the live rows whose text has come to a stop string. Saves time only: `Ending.finish` finds it anyway."""
        ending, step, size = self.sampler.ending, self.step, self.rows.size
        ids, lengths, alive = (column[:size].tolist() for column in (step.ids, step.length, step.alive))
        # New tokens, and enough before them for a stop that began earlier, should each byte of it be a token.
        window = STEPS_BETWEEN_STOPS + 4 * max(map(len, self.sampling.stop))
        live = [row for row in range(size) if alive[row]]
        tails = ending.texts([ids[row][max(0, lengths[row] - window) : lengths[row]] for row in live])
        for row, tail in zip(live, tails, strict=True):
            if ending.stop_at(tail) is not None and ending.stops(ids[row][: lengths[row]]):
                step.alive[row] = False

    def _collect(self, rows: Tensor, sequences: Tensor) -> None:
        """Results of rows that have finished."""
        rows, step = rows.to(self.device), self.step
        self.ids[sequences], self.logprobs[sequences] = step.ids[rows].cpu(), step.logprobs[rows].cpu()
        self.lengths[sequences] = step.length[rows].cpu()

    def _results(self) -> tuple[list[list[int]], list[list[float]]]:
        lengths = self.lengths.tolist()
        sampled = torch.arange(self.ids.shape[1]) < self.lengths[:, None]
        broken = (sampled & ~self.logprobs.isfinite()).nonzero()
        if len(broken):
            sequence, token = broken[0].tolist()
            problem, sample = divmod(sequence, self.sampling.group_size)
            raise FloatingPointError(
                f"step {self.training_step}: log-prob {self.logprobs[sequence, token].item()} at token {token} of "
                f"sample {sample} of problem {self.problems[problem].id!r}; the weights or logits are not finite"
            )
        ids, logprobs = self.ids.tolist(), self.logprobs.tolist()
        return [row[:n] for row, n in zip(ids, lengths, strict=True)], [
            row[:n] for row, n in zip(logprobs, lengths, strict=True)
        ]
