"""Groups -> optimizer steps of micro-batches, and the weight of every token. The only file that packs, masks,
splits or weights tokens. Called by train.py; grpo.update halves micro-batches.

`pack` lays out the tokens: whole groups in one row, each prompt once (`packed`), or a row per sequence (`padded`) for
models that cannot share a prompt. `weigh` then writes advantages and final weights, after which `keep_high_entropy` and
`correct_mismatch` may silence or scale tokens. Denominators and thresholds are those of the whole optimizer step over
all ranks, so that micro-batch size, packing and number of ranks cannot change the gradient.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import math
from array import array
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from grpo.records import Batch, Completion, Group, MicroBatch, SharedPrefix, TokenColumns, common_length

Reduce = Callable[[Tensor], Tensor]  # element-wise over all ranks


def sequence_mean(lengths: Tensor, num_sequences: float, num_tokens: float, max_new_tokens: int) -> Tensor:
    """1 / (N_c * length), N_c counted sequences: mean over sequences of token means (GRPO, arXiv:2402.03300)."""
    return 1.0 / (num_sequences * lengths)


def token_mean(lengths: Tensor, num_sequences: float, num_tokens: float, max_new_tokens: int) -> Tensor:
    """1 / (counted tokens of the optimizer step): every token weighs the same (DAPO, arXiv:2503.14476)."""
    return torch.full_like(lengths, 1.0 / num_tokens)


def constant(lengths: Tensor, num_sequences: float, num_tokens: float, max_new_tokens: int) -> Tensor:
    """1 / (N_c * max_new_tokens): no dependence on length at all (Dr. GRPO, arXiv:2503.20783)."""
    return torch.full_like(lengths, 1.0 / (num_sequences * max_new_tokens))


AGGREGATIONS = {"sequence_mean": sequence_mean, "token_mean": token_mean, "constant": constant}


Members = list[tuple[int, int]]  # (group, sample) of each sequence of a micro-batch

SAME_ENTROPY = 1e-4  # nats; see keep_high_entropy

ROW_MULTIPLE = {"cuda": 128}  # packed rows are padded to whole blocks of keys: flex_attention's backward needs them


def pack(
    groups: list[Group],
    *,
    minibatches: int,
    passes: int,
    tokens_per_micro_batch: int,
    max_over_ranks: Reduce,
    device: torch.device,
    layout: str = "packed",
    skipped: Sequence[bool] | None = None,
) -> Batch:
    """Lay out this rank's groups: passes * minibatches optimizer steps, equally many micro-batches on all ranks.

    A minibatch is a contiguous block of prompts, whatever the number of ranks W: prompt i is on rank i mod W, so a
    rank's share of the block is a contiguous block of its own groups. tokens_per_micro_batch counts tokens as laid out,
    padding included; a single longer sequence gets a micro-batch to itself. skipped: groups that contribute no gradient
    and are left out.
    """
    if len(groups) % minibatches:
        raise ValueError(
            f"{len(groups)} groups on this rank are not divisible by batch.minibatches={minibatches}; use a divisor"
        )
    divide, build = LAYOUTS[layout]
    per_minibatch = len(groups) // minibatches
    minibatch_groups = [range(start, start + per_minibatch) for start in range(0, len(groups), per_minibatch)]
    steps = []
    for chosen in minibatch_groups:
        kept = [g for g in chosen if skipped is None or not skipped[g]]
        shares = divide(kept, groups, tokens_per_micro_batch, max_over_ranks)
        filler = functools.partial(dummy, build, groups[chosen.start], device)
        steps.append([build(groups, share, device) if share else filler() for share in shares])
    lengths = torch.tensor([[len(completion.ids) for completion in group.completions] for group in groups])
    return Batch(steps, passes, minibatch_groups, lengths, groups)


# Packed: every prompt once -------------------------------------------------------------------------------------------


def divide_groups(chosen: Sequence[int], groups: list[Group], budget: int, max_over_ranks: Reduce) -> list[Members]:
    """Assign whole groups to micro-batches within the budget, balanced by tokens. A group over the budget is split by
    completions, with its prompt in each part. A prefix common to all prompts counts once per micro-batch."""
    parts, sizes = [], []
    common = common_length([groups[g].prompt_ids for g in chosen])
    for g in chosen:
        prompt = len(groups[g].prompt_ids)
        lengths = [len(completion.ids) - 1 for completion in groups[g].completions]
        for part in balance(lengths, fewest_bins(lengths, budget - prompt)):
            parts.append([(g, s) for s in part])
            sizes.append(prompt - common + sum(lengths[s] for s in part))
    count = int(max_over_ranks(torch.tensor(fewest_bins(sizes, budget - common))))
    return [[member for i in share for member in parts[i]] for share in balance(sizes, max(count, 1))]


def fewest_bins(sizes: list[int], capacity: int) -> int:
    """The least number of bins for which `balance` puts at most the capacity, or one larger item, in each."""
    for count in range(max(1, math.ceil(sum(sizes) / max(1, capacity))), len(sizes)):
        if all(len(items) == 1 or sum(sizes[i] for i in items) <= capacity for items in balance(sizes, count)):
            return count
    return len(sizes)


def balance(sizes: list[int], count: int) -> list[list[int]]:
    """The items (by index) in each of `count` bins: greedy, the largest item first, always into the least full bin."""
    bins = [(0, 0, place) for place in range(count)]  # load, number of items (so that items of size 0 spread, too)
    contents: list[list[int]] = [[] for _ in bins]
    for item in sorted(range(len(sizes)), key=lambda item: (-sizes[item], item)):
        load, number, place = bins[0]
        contents[place].append(item)
        heapq.heapreplace(bins, (load + sizes[item], number + 1, place))
    return contents


def packed_row(groups: list[Group], members: Members, device: torch.device) -> MicroBatch:
    """One row: the prompts' common prefix, then for each group the rest of its prompt and its completions. A
    completion's last token is only a target, never an input."""
    members = sorted(members)
    prompts = {g: groups[g].prompt_ids for g, _ in members}
    shared = common_length(list(prompts.values()))
    ids = array("q")
    source: list[Tensor] = []
    spans: list[tuple[slice, list[slice]]] = []

    def append(tokens: Sequence[int]) -> slice:
        ids.extend(array("q", tokens))
        return slice(len(ids) - len(tokens), len(ids))

    common = append(prompts[members[0][0]][:shared])
    for g, in_group in itertools.groupby(members, key=lambda member: member[0]):
        prompt = append(prompts[g][shared:])
        completions = [append(groups[g].completions[s].ids[:-1]) for _, s in in_group]
        for span in completions:
            rows = torch.arange(span.start - 1, span.stop)
            rows[0] = prompt.stop - 1  # the prompt's last row predicts the first token of every completion
            source.append(rows)
        spans.append((prompt, completions))
    padding = -len(ids) % ROW_MULTIPLE.get(device.type, 1)
    if padding:
        spans.append((append([0] * padding), []))  # a prompt without completions: not seen, predicts nothing
    shared_prefix = lay_out(spans, common)
    return MicroBatch(
        input_ids=torch.frombuffer(ids, dtype=torch.int64)[None],
        position_ids=shared_prefix.position[None],
        source=torch.cat(source),
        tokens=token_columns([groups[g].completions[s] for g, s in members]),
        sequences=members,
        shared_prefix=shared_prefix,
    ).to(device)


def lay_out(spans: list[tuple[slice, list[slice]]], common: slice = slice(0, 0)) -> SharedPrefix:
    """The attention layout of a packed row, given the spans of its prompts, completions and common prefix."""
    table, key_index, lengths = [], [], []  # one entry per span, in row order

    def add(span: slice, seen: Tensor, group: int, completion: int) -> Tensor:
        """Add a span that sees itself and the row's tokens in `seen`; returns both together."""
        size = span.stop - span.start
        table.append((size, group, completion, len(seen) - span.start))
        if size:
            seen = torch.cat([seen, torch.arange(span.start, span.stop)])
            key_index.append(seen)
            lengths.append((size, len(seen)))
        return seen

    of_all = add(common, torch.arange(0), -1, 0)
    for index, (prompt, completions) in enumerate(spans):
        of_group = add(prompt, of_all, index, 0)
        for number, span in enumerate(completions, 1):
            add(span, of_group, index, number)
    sizes, *columns = torch.tensor(table).unbind(1)
    group, completion, offset = (column.repeat_interleave(sizes) for column in columns)
    starts = torch.tensor([(0, 0), *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    longest_query, longest_key = (max(column) for column in zip(*lengths, strict=True))
    return SharedPrefix(
        common=common,
        groups=spans,
        group=group,
        completion=completion,
        position=torch.arange(len(offset)) + offset,
        key_index=torch.cat(key_index),
        query_starts=starts[:, 0].contiguous(),
        key_starts=starts[:, 1].contiguous(),
        longest_query=longest_query,
        longest_key=longest_key,
    )


# Padded: a row per sequence, for models that cannot share a prompt ---------------------------------------------------


def divide_sequences(chosen: Sequence[int], groups: list[Group], budget: int, max_over_ranks: Reduce) -> list[Members]:
    """Sequences, longest first, cut into micro-batches within the budget (with padding); as many on every rank."""

    def length(member: tuple[int, int]) -> int:
        group = groups[member[0]]
        return len(group.prompt_ids) + len(group.completions[member[1]].ids) - 1

    members = [(g, s) for g in chosen for s in range(len(groups[g].completions))]
    runs: list[Members] = []
    width = 0
    for member in sorted(members, key=lambda member: (-length(member), member)):
        if not runs or (len(runs[-1]) + 1) * width > budget:
            runs.append([])
            width = length(member)
        runs[-1].append(member)
    count = max(int(max_over_ranks(torch.tensor(len(runs)))), 1)
    return runs + [[] for _ in range(count - len(runs))]


def padded_rows(groups: list[Group], members: Members, device: torch.device) -> MicroBatch:
    """One row per sequence, padded on the right. A completion's last token is only a target, never an input."""
    pairs = [(groups[g].prompt_ids, groups[g].completions[s]) for g, s in members]
    width = max(len(prompt) + len(completion.ids) - 1 for prompt, completion in pairs)
    input_ids = torch.zeros(len(pairs), width, dtype=torch.int64)
    sources = []
    for row, (prompt, completion) in enumerate(pairs):
        ids = [*prompt, *completion.ids[:-1]]
        input_ids[row, : len(ids)] = torch.tensor(ids)
        first = row * width + len(prompt) - 1  # the prompt's last row predicts the completion's first token
        sources.append(torch.arange(first, first + len(completion.ids)))
    return MicroBatch(
        input_ids=input_ids,
        position_ids=torch.arange(width).expand(len(pairs), width),
        source=torch.cat(sources),
        tokens=token_columns([completion for _, completion in pairs]),
        sequences=members,
    ).to(device)


# Either ---------------------------------------------------------------------------------------------------------------

LAYOUTS = {"packed": (divide_groups, packed_row), "padded": (divide_sequences, padded_rows)}


def token_columns(completions: list[Completion]) -> TokenColumns:
    """The columns that are known from sampling, flat over the completions."""
    lengths = torch.tensor([len(completion.ids) for completion in completions])
    return TokenColumns(
        target=torch.frombuffer(_joined("q", (c.ids for c in completions)), dtype=torch.int64),
        sequence=torch.arange(len(completions)).repeat_interleave(lengths),
        sampler=torch.frombuffer(_joined("f", (c.logprobs for c in completions)), dtype=torch.float32),
    )


def _joined(kind: str, lists: Iterable[Sequence[float]]) -> array:
    """All lists as one array. List by list is fastest: one chained iterator takes twice as long, torch.tensor ten
    times."""
    return functools.reduce(array.__iadd__, (array(kind, numbers) for numbers in lists), array(kind))


def dummy(build: Callable[..., MicroBatch], group: Group, device: torch.device) -> MicroBatch:
    """A micro-batch of one token, to be given weight 0: on a rank that has fewer, its backward pass still gives every
    parameter a gradient, which DDP and FSDP wait for."""
    first = group.completions[0]
    token = Completion(first.ids[:1], first.logprobs[:1], "", first.finish, 0)
    micro_batch = build([Group(group.problem, [token], group.step)], [(0, 0)], device)
    micro_batch.sequences = []
    return micro_batch


def halve(micro_batches: list[MicroBatch], groups: list[Group]) -> list[MicroBatch]:
    """Each micro-batch as two of about half its tokens, with the same weights: the same gradient in less memory.

    One with a single sequence, or none, is joined by a dummy, so that all ranks still have equally many.
    """
    halves = []
    for micro_batch in micro_batches:
        count = len(micro_batch.sequences)
        if count < 2:
            halves += [micro_batch, dummy_like(micro_batch, groups)]
            continue
        ends = torch.bincount(micro_batch.tokens.sequence).cpu().cumsum(0)
        cut = min(int((ends < ends[-1] / 2).sum()) + 1, count - 1)
        edge, end = int(ends[cut - 1]), int(ends[-1])
        for rows, tokens in ((slice(0, cut), slice(0, edge)), (slice(cut, count), slice(edge, end))):
            halves.append(_part(micro_batch, groups, micro_batch.sequences[rows], tokens))
    return halves


def _part(whole: MicroBatch, groups: list[Group], members: Members, span: slice) -> MicroBatch:
    """A micro-batch of some consecutive sequences of one that is weighed already; `span`: their tokens."""
    build = packed_row if whole.shared_prefix else padded_rows
    part = build(groups, members, whole.source.device)
    _copy_columns(whole, part, lambda column: column[span])
    rows = whole.tokens.head_rows
    if rows is not None:
        part.tokens.head_rows = rows[(rows >= span.start) & (rows < span.stop)] - span.start
    return part


def dummy_like(micro_batch: MicroBatch, groups: list[Group]) -> MicroBatch:
    """A dummy with the columns of this micro-batch, which is weighed already; all are 0."""
    made = dummy(packed_row if micro_batch.shared_prefix else padded_rows, groups[0], micro_batch.source.device)
    _copy_columns(micro_batch, made, lambda column: column.new_zeros(1))
    return made


def _copy_columns(source: MicroBatch, to: MicroBatch, take: Callable[[Tensor], Tensor]) -> None:
    """Write take(column) into `to` for every column that is filled in after `pack`; None stays None."""
    for name in ("old", "ref", "entropy", "advantage", "weight", "counted", "active"):
        column = getattr(source.tokens, name)
        setattr(to.tokens, name, None if column is None else take(column))


def counted_completions(groups: list[Group], scored: Tensor, *, mask_truncated: bool) -> Tensor:
    """Which completions of this rank are in the loss and its denominators: those scored and, with mask_truncated, not
    truncated. scored: [groups, G] bool; returns the same. A truncated one stays in its group's mean and std."""
    finished = [[completion.finish != "length" for completion in group.completions] for group in groups]
    return scored & torch.tensor(finished) if mask_truncated else scored


def kl_per_completion(batch: Batch) -> Tensor:
    """Sum over each completion's tokens of old - ref, the k1 estimate of KL(policy || ref), in nats.

    Returns [groups of this rank, G]. For the KL in the reward (kl_where=reward), before advantages are computed.
    """
    sums = torch.zeros(batch.lengths.shape)
    for micro_batch in batch.micro_batches:
        tokens = micro_batch.tokens
        kl = sum_by_sequence(tokens.old - tokens.ref, tokens.sequence).to("cpu", sums.dtype)
        if micro_batch.sequences:
            sums[tuple(zip(*micro_batch.sequences, strict=True))] = kl[: len(micro_batch.sequences)]
    return sums


def weigh(
    batch: Batch, advantages: Tensor, counted: Tensor, *, aggregation: str, max_new_tokens: int, sum_over_ranks: Reduce
) -> None:
    """Write advantage, counted, active and the final weight of every token, in place.

    advantages: [groups of this rank, G] fp32; counted: the same shape, bool. *Counted* tokens are in the denominators,
    *active* ones contribute a gradient. Here both are the same; `keep_high_entropy` and `correct_mismatch` may then
    silence counted tokens. A group without spread is counted: its KL still acts.
    """
    for micro_batches, chosen in zip(batch.optimizer_steps, batch.groups, strict=True):
        block = slice(chosen.start, chosen.stop)
        totals = torch.stack([counted[block].sum(), batch.lengths[block][counted[block]].sum()])
        num_sequences, num_tokens = sum_over_ranks(totals).clamp_min(1).tolist()
        for micro_batch in micro_batches:
            tokens, device = micro_batch.tokens, micro_batch.source.device
            length = torch.bincount(tokens.sequence).cpu()
            members = tuple(zip(*micro_batch.sequences, strict=True))
            mask = counted[members] if members else torch.tensor([False])  # a dummy has one sequence
            row_advantages = advantages[members] if members else torch.tensor([0.0])
            row_weights = AGGREGATIONS[aggregation](length.float(), num_sequences, num_tokens, max_new_tokens) * mask
            tokens.advantage = row_advantages.to(device)[tokens.sequence]
            tokens.weight = row_weights.to(device)[tokens.sequence]
            tokens.counted = mask.to(device)[tokens.sequence]
            tokens.active = tokens.counted.clone()
            if not mask.all():  # done here, where the mask is on the CPU: no wait for the GPU
                tokens.head_rows = mask.repeat_interleave(length).nonzero()[:, 0].to(device)


def keep_high_entropy(batch: Batch, share: float, gather: Callable[[Tensor], list[Tensor]]) -> None:
    """Keep active only the `share` of an optimizer step's counted tokens, over all ranks, with the highest entropy.

    arXiv:2506.01939. The denominators remain those of all counted tokens. Tokens within SAME_ENTROPY of the threshold
    stay: the same distribution computed in two micro-batches differs in its last bits.
    gather: [tokens of this rank] -> the list of every rank's.
    """
    for micro_batches in batch.optimizer_steps:
        columns = [micro_batch.tokens for micro_batch in micro_batches]
        local = torch.cat([tokens.entropy[tokens.counted] for tokens in columns]).cpu()
        entropy = torch.cat(gather(local)).sort(descending=True).values
        if len(entropy):
            threshold = entropy[math.floor(share * (len(entropy) - 1) + 1e-9)].item()
            for tokens in columns:
                _scale(tokens, tokens.entropy >= threshold - SAME_ENTROPY)


def correct_mismatch(batch: Batch, mode: str, *, level: str, cap: float) -> None:
    """Correct for the sampler's distribution by the importance ratio rho = exp(old - sampler): weight tokens or reject.

    token_truncate: weight *= min(rho_t, cap). sequence_truncate: weight *= min(rho_s, cap). sequence_mask: sequences
    with rho_s outside 1/cap to cap are not active. log rho_s is the sum or the mean of the log-ratios (`level`): the
    sum is the unbiased importance weight, but drifts away from 1 as completions get longer; the mean does not, but is
    biased. (Truncated importance sampling: fengyao.notion.site/off-policy-rl.)
    """
    for micro_batch in batch.micro_batches:
        tokens = micro_batch.tokens
        log_ratio = tokens.old - tokens.sampler
        if mode != "token_truncate":
            log_ratio = _of_sequence(log_ratio, tokens.sequence, level)
        if mode == "sequence_mask":
            _scale(tokens, log_ratio.abs() <= math.log(cap))
        else:
            _scale(tokens, log_ratio.exp().clamp(max=cap))


def sum_by_sequence(values: Tensor, sequence: Tensor) -> Tensor:
    """[T] -> [T]: entry i is the sum over sequence i, the rest 0 (T bounds their number, so no GPU is waited for)."""
    return torch.zeros_like(values).index_add(0, sequence, values)


def _of_sequence(values: Tensor, sequence: Tensor, level: str) -> Tensor:
    sums = sum_by_sequence(values, sequence)
    if level == "mean":
        sums = sums / sum_by_sequence(torch.ones_like(values), sequence).clamp_min(1)
    return sums[sequence]


def _scale(tokens: TokenColumns, factor: Tensor) -> None:
    tokens.weight = tokens.weight * factor
    tokens.active = tokens.active & (factor > 0)
