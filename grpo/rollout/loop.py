"""The loop of one `Sampler.generate` call: admit groups, decode their rows, collect those that have ended.

It is Python on the host around a decode step (grpo.rollout.step) that the Sampler has prepared. Every few steps a
`Look` tells which rows are alive; once enough have ended, rows are rescheduled: others replace them, or the step
becomes smaller.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from grpo.records import Completion, Problem, common_length
from grpo.rollout.philox import uniforms
from grpo.rollout.schedule import SHRINK_BELOW, Rows, assign_seats, prefill_chunks
from grpo.rollout.slab import Decode, Prefill
from grpo.rollout.step import DecodeStep, forward

if TYPE_CHECKING:
    from grpo.rollout.engine import Sampler

STEPS_BETWEEN_LOOKS = {"cpu": 1, "cuda": 8}  # decode steps from one look to the next
LOOKS_IN_FLIGHT = {"cpu": 0, "cuda": 1}  # a look is applied one look later: meanwhile the GPU works on
STEPS_BETWEEN_STOPS = 8  # decode steps between searches for stop strings, which have to decode text


class Look(NamedTuple):
    """The rows after some step, on the host. From a CUDA device they are copies, complete once `ready` has fired."""

    alive: Tensor  # [rows] bool
    num_sampled: Tensor  # [rows] int64
    ids: Tensor  # [rows, longest] int64
    ready: torch.cuda.Event | None


class RolloutLoop:
    """The state of one call. Sample i of problem p is sequence p * G + i."""

    def __init__(
        self, sampler: Sampler, step: DecodeStep, run_step: Callable, problems: list[Problem], training_step: int
    ):
        self.sampler, self.problems, self.training_step = sampler, problems, training_step
        self.step, self.run_step, self.group_size = step, run_step, sampler.rollout.group_size
        self.device, self.plan = sampler.model.device, step.slab.plan
        self.completions: dict[int, Completion] = {}
        # Ended rows that are not yet completions: sequences [n], lengths [n], ids [n, width], log-probs [n, width].
        self.fetched: list[tuple[Tensor, ...]] = []
        self.waiting = deque(range(len(problems)))
        self.rows = Rows.none()

    def run(self) -> list[Completion]:
        """The completions of all sequences, in order."""
        steps, total = 0, len(self.problems) * self.group_size
        looks: deque[Look] = deque()
        self._reschedule()
        while self.rows.size:
            self.run_step(self.layout)
            self.layout.longest_suffix = min(self.layout.longest_suffix + 1, self.plan.suffix_size)
            steps += 1
            if steps % STEPS_BETWEEN_LOOKS[self.device.type]:
                continue
            looks.append(self._look(steps))
            self._complete()
            if len(looks) > LOOKS_IN_FLIGHT[self.device.type]:
                live = self._apply_look(looks.popleft())
                self.sampler.progress(total - live - len(self.waiting) * self.group_size, total)
                if self._should_reschedule(live):
                    while looks:
                        self._apply_look(looks.popleft())
                    self._reschedule()
        self._complete()
        return [self.completions[sequence] for sequence in range(total)]

    def _should_reschedule(self, live: int) -> bool:
        """Whether enough rows have ended, and there are groups to admit or the step would become smaller."""
        would_shrink = not live or self.sampler.bucket(live) < self.rows.size
        return live < SHRINK_BELOW * self.rows.size and (would_shrink or bool(self.waiting))

    def _reschedule(self) -> None:
        """Fetch finished rows, compact those that stay, admit waiting groups.

        Example: 3 samples per problem, at most 6 sequences at a time. Problems 0 and 1 fill rows 0 to 5. Once sequences
        0, 1, 2 (all of problem 0) and 4 have ended, 3 and 5 stay, in rows 3 and 5 of group 1, and problem 2 comes in:

            sequence    3  5  6  7  8    problem * 3 + sample: index of the result
            row         0  1  2  3  4    index in the buffers of the step and in the slab's suffixes
            group       0  0  1  1  1    index in the slab's prefixes
            seat_index  0  1  3  4  5    group * 3 seats + seat: group 0 leaves its third seat empty

        `_arrange` assigns rows and seats; `_move` copies prefix 1 to 0, and rows 3 and 5 to 0 and 1; `_admit` reads the
        prompt of problem 2 into prefix 1 and starts rows 2 to 4.
        """
        old, group_size = self.rows, self.group_size
        alive = self.step.alive.cpu()[old.row]
        self._fetch(old.row[~alive], old.sequence[~alive])
        kept = old.row[alive]
        groups, group = torch.unique_consecutive(old.group[alive], return_inverse=True)
        new = self._take_waiting(len(kept), len(groups))
        sequence = torch.tensor(new, dtype=torch.int64)[:, None] * group_size + torch.arange(group_size)
        number = torch.arange(len(groups), len(groups) + len(new)).repeat_interleave(group_size)
        self.rows = self._arrange(torch.cat([old.sequence[alive], sequence.flatten()]), torch.cat([group, number]))
        if self.rows.size:
            self._move(groups, kept, self.rows.row[: len(kept)])
            self._admit([self.problems[index] for index in new], len(groups), self.rows.row[len(kept) :])
            self.layout = self._layout()

    def _take_waiting(self, num_rows: int, num_groups: int) -> list[int]:
        """Take as many waiting problems as fit in addition to the rows and groups that stay."""
        count = (min(self.sampler.rollout.max_sequences, self.plan.num_rows) - num_rows) // self.group_size
        count = min(count, self.plan.num_groups - num_groups, len(self.waiting))
        return [self.waiting.popleft() for _ in range(count)]

    def _arrange(self, sequence: Tensor, group: Tensor) -> Rows:
        """Assign rows and seats to these sequences of these groups, and tell the step the seats."""
        if not len(group):
            return Rows.none()
        size = self.sampler.bucket(len(group))
        seats = self.group_size if self.sampler.has_fixed_shapes else int(torch.bincount(group).max())
        seat_index, row = assign_seats(group, seats, size)
        self.step.seat_index[:size] = seat_index.to(self.device)
        return Rows(size, seats, row, sequence, group)

    def _move(self, groups: Tensor, rows: Tensor, to: Tensor) -> None:
        rows, to = rows.to(self.device), to.to(self.device)
        if len(rows):
            self.step.slab.move(groups, rows, to, int(self.step.num_sampled[rows].max()))
        self.step.move(rows, to)

    def _admit(self, problems: list[Problem], first_group: int, rows: Tensor) -> None:
        """Prefill the prompts of new groups, first_group being the first, and give them these rows."""
        if not problems:
            return
        device, group_size = self.device, self.group_size
        prompts = [problem.prompt_ids for problem in problems]
        by_row = lambda values: torch.tensor(values, device=device).repeat_interleave(group_size)
        keys = dict(seed=self.sampler.seed, step=self.training_step, stream=self.sampler.stream, device=device)
        numbers = uniforms([problem.index for problem in problems], group_size, self.plan.suffix_size, **keys)
        # A slice will do: any other rows between the first and the last new one have no owner.
        rows_between = slice(int(rows[0]), int(rows[-1]) + 1)
        self.step.slab.clear(slice(first_group, first_group + len(problems)), rows_between)
        self._prefill(prompts, first_group)
        token, lengths = by_row([prompt[-1] for prompt in prompts]), by_row([len(prompt) - 1 for prompt in prompts])
        self.step.admit(rows.to(device), token=token, prefix_lengths=lengths, uniforms=numbers)

    def _prefill(self, prompts: list[tuple[int, ...]], first_group: int) -> None:
        """Fill the prefixes of new groups; a beginning that all their prompts share is read only once."""
        common = common_length(prompts)
        if common:
            self._read_prompts([prompts[0][:common]], [first_group], start=0)
            self.step.slab.share(first_group, slice(first_group, first_group + len(prompts)), common)
        ends = [prompt[common:-1] for prompt in prompts]
        for chunk in prefill_chunks([len(end) for end in ends], self.sampler.rollout.prefill_tokens):
            self._read_prompts([ends[i] for i in chunk], [first_group + i for i in chunk], start=common)

    def _read_prompts(self, texts: list[tuple[int, ...]], groups: list[int], *, start: int) -> None:
        """One forward pass over texts that begin at position `start`; stores them in the prefixes of these groups."""
        ids = pad_sequence([torch.tensor(text, dtype=torch.int64) for text in texts], batch_first=True).to(self.device)
        if ids.shape[1]:  # prompts of one token have no prefix
            slab, positions = self.step.slab, torch.arange(start, start + ids.shape[1], device=self.device)
            slab.layout = Prefill(torch.tensor(groups, device=self.device), start)
            forward(self.sampler.model, ids, positions.expand_as(ids), slab)

    def _layout(self) -> Decode:
        """For the next decode steps. Bounds are those of the current rows, or with CUDA graphs the slab's own."""
        rows, step, plan, here = self.rows, self.step, self.plan, slice(self.rows.size)
        if self.sampler.has_fixed_shapes:
            bounds = (min(plan.num_groups, rows.size), plan.prefix_size, plan.suffix_size)
        else:
            longest_prefix, longest_suffix = int(step.prefix_lengths[here].max()), int(step.num_sampled[here].max()) + 1
            bounds = (int(rows.group[-1]) + 1, longest_prefix, longest_suffix)
        return Decode(rows.seats, step.seat_index[here], step.prefix_lengths[here], step.suffix_lengths[here], *bounds)

    def _look(self, steps: int) -> Look:
        """The rows after this many steps; with ids only if a search for stop strings is due."""
        size, is_cuda = self.rows.size, self.device.type == "cuda"
        longest = steps if self.sampler.ending.stop and steps % STEPS_BETWEEN_STOPS == 0 else 0
        columns = (self.step.alive[:size], self.step.num_sampled[:size], self.step.ids[:size, :longest])
        copies = [column.to("cpu", non_blocking=True) for column in columns]
        look = Look(*copies, torch.cuda.Event() if is_cuda else None)
        if look.ready:
            look.ready.record()
        return look

    def _apply_look(self, look: Look) -> int:
        """End the rows that this look shows at a stop string; returns how many others it shows alive.

        Ending them only saves time: `Ending.finish` finds the stop string anyway.
        """
        if look.ready:
            look.ready.synchronize()
        stopped = self._stopped(look) if look.ids.numel() else look.num_sampled[:0]
        if len(stopped):
            look.alive[stopped] = False
            stopped = stopped.pin_memory() if look.ready else stopped
            self.step.alive.index_fill_(0, stopped.to(self.device, non_blocking=True), False)
        return int(look.alive.sum())

    def _stopped(self, look: Look) -> Tensor:
        """Indices of live rows whose text contains a stop string."""
        ending = self.sampler.ending
        # The new tokens, and enough older ones for a stop string that began earlier, even at one token per byte.
        window = STEPS_BETWEEN_STOPS + 4 * max(map(len, ending.stop))
        positions = look.num_sampled[:, None] + torch.arange(-window, 0)
        recent = look.ids.gather(1, positions.clamp_min(0))  # short rows repeat their first token
        newest = recent[:, -STEPS_BETWEEN_STOPS:]
        ends = torch.tensor([x for x in newest.unique().tolist() if ending.may_complete(x)], dtype=torch.int64)
        rows = (torch.isin(newest, ends).any(1) & look.alive).nonzero()[:, 0]
        rows = rows[list(map(ending.stops, ending.texts(recent[rows].tolist())))]
        sequences = zip(look.ids[rows].tolist(), look.num_sampled[rows].tolist(), strict=True)
        return rows[list(map(ending.stops, ending.texts([ids[:length] for ids, length in sequences])))]

    def _fetch(self, rows: Tensor, sequences: Tensor) -> None:
        """Fetch the results of finished rows from the device; `_complete` makes completions of them."""
        rows, columns = rows.to(self.device), (self.step.num_sampled, self.step.ids, self.step.logprobs)
        self.fetched.append((sequences, *(column[rows].cpu() for column in columns)))

    def _complete(self) -> None:
        """Make completions of what has been fetched: decode the text and cut it at a stop string."""
        fetched, self.fetched = self.fetched, []
        for sequences, lengths, ids, logprobs in fetched:
            self._refuse_broken(sequences, lengths, logprobs)
            sampled = [row[:length].tolist() for row, length in zip(ids, lengths.tolist(), strict=True)]
            rows = zip(sequences.tolist(), sampled, self.sampler.ending.texts(sampled), logprobs, strict=True)
            for sequence, drawn, text, row in rows:
                kept, text, finish = self.sampler.ending.finish(drawn, text)
                sample = sequence % self.group_size
                self.completions[sequence] = Completion(kept, row[: len(kept)].tolist(), text, finish, sample)

    def _refuse_broken(self, sequences: Tensor, lengths: Tensor, logprobs: Tensor) -> None:
        """FloatingPointError for the first log-prob that is not finite."""
        sampled = torch.arange(logprobs.shape[1]) < lengths[:, None]
        broken = (sampled & ~logprobs.isfinite()).nonzero()
        if len(broken):
            row, token = broken[0].tolist()
            problem, sample = divmod(int(sequences[row]), self.group_size)
            raise FloatingPointError(
                f"step {self.training_step}: log-prob {logprobs[row, token].item()} at token {token} of sample "
                f"{sample} of problem {self.problems[problem].id!r}; the weights or logits are not finite"
            )
