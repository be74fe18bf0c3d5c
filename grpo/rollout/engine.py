"""Problems -> groups: prefill each prompt once, decode all its completions together, hand back plain Python.

The model is the unmodified transformers causal LM with its attention replaced for the length of the call
(grpo.rollout.attention), so any family, and any wrapped linear layer, samples exactly as it trains. train.py and
eval.py call `Sampler.generate`; nothing is kept between calls.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import kernels
from grpo.records import Completion, Group, Problem
from grpo.rollout.attention import refuse_unsupported, sampling_mode
from grpo.rollout.sampling import Sampling, refuse_large_words, uniforms
from grpo.rollout.schedule import SHRINK_BELOW, Rows, prefill_chunks
from grpo.rollout.slab import KVSlab, Prefill
from grpo.rollout.stops import Ending, eos_ids

STEPS_BETWEEN_LOOKS = {"cpu": 1, "cuda": 8}  # at which rows live: on CUDA to look is to wait for the device
STEPS_BETWEEN_STOPS = 8  # to look for stop strings is to decode text


class Sampler:
    """Samples `sampling.group_size` completions of each problem. `model` may change its weights between calls.

    model, tokenizer: the unwrapped causal LM and its tokenizer.  seed: of every random number.  max_sequences: rows
    decoded at a time; more take turns.  prefill_tokens: prompt tokens of one prefill pass, with padding.  impl: of
    the kernels.  progress: told how many sequences are done, and of how many.
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
        self.seed, self.max_sequences, self.prefill_tokens = seed, max_sequences, prefill_tokens
        self.ending = Ending(tokenizer, eos_ids(model, tokenizer), sampling.stop)
        self.progress = progress or (lambda done, total: None)

    def generate(self, problems: list[Problem], step: int) -> list[Group]:
        """One Group per problem, in the order given; `prompt_ids` must be filled.

        A completion depends on the weights, its prompt, `seed`, `step` (the training step), the problem's index and
        its sample number: on nothing else in the call. ValueError before any work for a prompt that is empty or does
        not fit; FloatingPointError for a log-prob that is not finite.
        """
        self._check(problems, step)
        if not problems:
            return []
        with sampling_mode(self.model):
            ids, logprobs = _Draw(self, problems, step).run()
        texts = self.ending.texts(ids)
        completions = []
        for sequence, text in enumerate(texts):
            kept, text, finish = self.ending.finish(ids[sequence], text)
            sample = sequence % self.sampling.group_size
            completions.append(Completion(kept, logprobs[sequence][: len(kept)], text, finish, sample))
        size = self.sampling.group_size
        return [Group(problem, completions[i * size : (i + 1) * size], step) for i, problem in enumerate(problems)]

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


class _Draw:
    """One call of `generate`. Results are [N, max_new_tokens + 1], a row per sequence: i of problem p is p * G + i.

    The last column, of results and of the slab's suffix alike, is where a row of full length idles until it is moved
    away; nothing reads it.
    """

    def __init__(self, sampler: Sampler, problems: list[Problem], step: int):
        self.sampler, self.problems, self.step = sampler, problems, step
        self.model, self.sampling = sampler.model, sampler.sampling
        device, group_size = self.model.device, self.sampling.group_size
        shape = (len(problems) * group_size, self.sampling.max_new_tokens + 1)
        self.ids = torch.zeros(shape, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(shape, dtype=torch.float32, device=device)
        self.uniforms = torch.zeros(shape, dtype=torch.float64, device=device)
        self.lengths = torch.zeros(shape[0], dtype=torch.int64, device=device)
        self.eos = torch.tensor(sorted(sampler.ending.eos), device=device)
        self.waiting = deque(range(len(problems)))
        self.rows = Rows.empty(device)
        self.slab = KVSlab(
            # Twice the groups that fill the rows: as rows leave one by one, a group's last row keeps its prefix.
            num_groups=min(len(problems), 2 * (sampler.max_sequences // group_size)),
            num_rows=min(shape[0], sampler.max_sequences),
            prefix_size=max(len(problem.prompt_ids) for problem in problems) - 1,
            suffix_size=shape[1],
            impl=sampler.impl,
        )

    def run(self) -> tuple[list[list[int]], list[list[float]]]:
        """Ids and log-probs of every sequence, through its end-of-sequence token or to the length limit."""
        look = STEPS_BETWEEN_LOOKS[self.model.device.type]
        steps = 0
        self._exchange()
        while len(self.rows):
            self._decode()
            steps += 1
            if self.sampling.stop and steps % STEPS_BETWEEN_STOPS == 0:
                self._stop_rows()
            if steps % look == 0:
                live = int(self.rows.alive.sum())
                total = len(self.lengths)
                self.sampler.progress(total - live - len(self.waiting) * self.sampling.group_size, total)
                if live < SHRINK_BELOW * len(self.rows):
                    self._exchange()
        return self._results()

    def _exchange(self) -> None:
        """Finished rows out, waiting groups in."""
        self.lengths[self.rows.sequence] = self.rows.length
        self.rows, groups, kept = self.rows.keep_alive()
        if len(kept):
            self.slab.keep(groups, kept, int(self.rows.length.max()))
        self._admit(len(groups))
        if len(self.rows):
            self.slab.layout = self.rows.layout()

    def _admit(self, num_groups: int) -> None:
        """As many waiting groups as there is room for, behind the num_groups that stay."""
        group_size, device = self.sampling.group_size, self.model.device
        room = (self.sampler.max_sequences - len(self.rows)) // group_size
        room = min(room, self.slab.num_groups - num_groups, len(self.waiting))
        if room == 0:
            return
        indices = [self.waiting.popleft() for _ in range(room)]
        problems = [self.problems[index] for index in indices]
        prompts = [problem.prompt_ids for problem in problems]
        by_row = lambda values: torch.tensor(values, device=device).repeat_interleave(group_size)  # noqa: E731
        sequence = by_row(indices) * group_size + torch.arange(group_size, device=device).repeat(room)
        keys = dict(seed=self.sampler.seed, step=self.step, stream=self.sampling.stream)
        numbers = [problem.index for problem in problems]
        self.uniforms[sequence] = uniforms(numbers, group_size, self.uniforms.shape[1], **keys, device=device)
        self.slab.clear(slice(num_groups, num_groups + room), slice(len(self.rows), len(self.rows) + len(sequence)))
        self._prefill([prompt[:-1] for prompt in prompts], num_groups)
        self.rows = self.rows.append(
            sequence=sequence,
            group=by_row(range(num_groups, num_groups + room)),
            token=by_row([prompt[-1] for prompt in prompts]),
            prefix=by_row([len(prompt) - 1 for prompt in prompts]),
        )

    def _prefill(self, prefixes: list[tuple[int, ...]], first_group: int) -> None:
        for chunk in prefill_chunks([len(prefix) for prefix in prefixes], self.sampler.prefill_tokens):
            ids = pad_sequence([torch.tensor(prefixes[index], dtype=torch.int64) for index in chunk], batch_first=True)
            if ids.shape[1] == 0:  # prompts of one token have no prefix
                continue
            ids = ids.to(self.model.device)
            self.slab.layout = Prefill(groups=torch.tensor(chunk, device=ids.device) + first_group)
            self._forward(ids, torch.arange(ids.shape[1], device=ids.device).expand_as(ids))

    def _decode(self) -> None:
        """Every row reads a token and draws the next."""
        rows, sampling = self.rows, self.sampling
        logits = self._forward(rows.token[:, None], (rows.prefix + rows.length)[:, None])
        here = (rows.sequence, rows.length)
        token, logprob = kernels.sample_token(
            logits,
            self.uniforms[here],
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            impl=self.sampler.impl,
        )
        self.ids[here], self.logprobs[here], rows.token = token, logprob, token
        rows.length += rows.alive  # in place: the layout holds the same tensor
        rows.alive &= ~torch.isin(token, self.eos) & (rows.length < sampling.max_new_tokens)
        self.slab.layout.longest_suffix += 1

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Logits of the last position, [N, V]."""
        output = self.model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=1, slab=self.slab)
        layers = self.model.config.get_text_config().num_hidden_layers
        if len(self.slab.layers) != layers:
            raise ValueError(
                f"only {len(self.slab.layers)} of {layers} layers of {type(self.model).__name__} use attention that "
                "rollout can replace; use a model whose layers all have attention"
            )
        return output.logits[:, -1]

    def _stop_rows(self) -> None:
        """End the live rows whose text has come to a stop string. Saves time only: `Ending.finish` finds it anyway."""
        rows, ending = self.rows, self.sampler.ending
        ids, lengths, alive = self.ids[rows.sequence].tolist(), rows.length.tolist(), rows.alive.tolist()
        # New tokens, and enough before them for a stop that began earlier, should each byte of it be a token.
        window = STEPS_BETWEEN_STOPS + 4 * max(map(len, self.sampling.stop))
        live = [row for row in range(len(rows)) if alive[row]]
        tails = ending.texts([ids[row][max(0, lengths[row] - window) : lengths[row]] for row in live])
        for row, tail in zip(live, tails, strict=True):
            if ending.stop_at(tail) is not None and ending.stops(ids[row][: lengths[row]]):
                rows.alive[row] = False

    def _results(self) -> tuple[list[list[int]], list[list[float]]]:
        lengths = self.lengths.tolist()
        sampled = torch.arange(self.ids.shape[1], device=self.ids.device) < self.lengths[:, None]
        broken = (sampled & ~self.logprobs.isfinite()).nonzero()
        if len(broken):
            sequence, token = broken[0].tolist()
            problem, sample = divmod(sequence, self.sampling.group_size)
            raise FloatingPointError(
                f"step {self.step}: log-prob {self.logprobs[sequence, token].item()} at token {token} of sample "
                f"{sample} of problem {self.problems[problem].id!r}; the model's weights or logits are not finite"
            )
        ids, logprobs = self.ids.tolist(), self.logprobs.tolist()
        return [row[:n] for row, n in zip(ids, lengths, strict=True)], [
            row[:n] for row, n in zip(logprobs, lengths, strict=True)
        ]
