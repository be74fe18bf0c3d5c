"""decode_attention, definition, CPU path and Triton kernel, against a softmax in fp64 row by row.

Triton runs in its interpreter on CPU, where bf16 products are wrong, and compiled on CUDA.
"""

import math
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import kernels  # noqa: E402
from kernels.decode_attention import cpu, kernel, reference  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
ROUNDING = {torch.float32: 2e-6 if DEVICE == "cpu" else 3e-5, torch.float16: 5e-4, torch.bfloat16: 4e-3}
EXACT = {"cpu": 3e-6, "cuda": 3e-5}[DEVICE]  # fp32; a GPU's kernel multiplies it as three products of TF32
STALE = {"definition": 1e4, "torch": 1e4, "triton": math.nan}  # PyTorch wants finite numbers where nothing is stored


@dataclass
class Case:
    """What one step reads. `suffix` holds each row's newest token, last; row b is idle where suffix_lengths[b] is 0."""

    query: Tensor
    prefix: tuple[Tensor, Tensor]
    suffix: tuple[Tensor, Tensor]
    seats: int
    seat_index: list[int]
    prefix_lengths: list[int]  # of the groups
    suffix_lengths: list[int]  # with the newest token

    def rows(self) -> list[tuple[int, int, int, int]]:
        """row, its group, and how much of prefix and suffix it has."""
        groups = [index // self.seats for index in self.seat_index]
        return [(b, g, self.prefix_lengths[g], self.suffix_lengths[b]) for b, g in enumerate(groups)]


def make(
    heads, kv_heads, width, prefix_lengths, suffix_lengths, *, seats=3, seat_index=None, dtype=torch.float32, seed=0
):
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=generator).to(DEVICE, dtype)
    seat_index = list(range(len(suffix_lengths))) if seat_index is None else seat_index
    prefix = (len(prefix_lengths), kv_heads, max(prefix_lengths), width)
    suffix = (len(seat_index), kv_heads, max(suffix_lengths) + 1, width)
    query = normal(len(seat_index), heads, width) * 2
    slabs = (normal(*prefix), normal(*prefix)), (normal(*suffix), normal(*suffix))
    return Case(query, *slabs, seats, seat_index, prefix_lengths, suffix_lengths)


# Three groups with 3, 1 and 2 of their 3 seats taken; the second has no prefix.
SMALL = dict(width=16, prefix_lengths=[9, 0, 5], suffix_lengths=[1, 6, 3, 2, 4, 1], seat_index=[0, 1, 2, 3, 6, 7])


def attend(case, impl, *, stale=None, **terms):
    """Output, and the suffix slab afterwards. The call stores the newest tokens; before, there is stale stuff."""
    stale = STALE[impl] if stale is None else stale
    prefix = [stored.clone() for stored in case.prefix]
    suffix = [stored.clone() for stored in case.suffix]
    newest = [torch.zeros_like(stored[:, :, 0]) for stored in suffix]
    newest[1] = newest[1].repeat(1, 2, 1)[:, newest[1].shape[1] :]  # as a slice of one projection for keys and values
    for row, group, prefix_length, suffix_length in case.rows():
        for stored in prefix:
            stored[group, :, prefix_length:] = stale
        for stored, new in zip(suffix, newest, strict=True):
            new[row] = stored[row, :, suffix_length - 1]
            stored[row, :, max(0, suffix_length - 1) :] = stale
    call = reference.decode_attention if impl == "definition" else partial(kernels.decode_attention, impl=impl)
    output = call(
        case.query,
        *newest,
        tuple(prefix),
        tuple(suffix),
        seats=case.seats,
        seat_index=torch.tensor(case.seat_index, device=DEVICE),
        # A row without an owner, in a seat of anybody's, knows no prefix.
        prefix_lengths=torch.tensor([length if own else 0 for _, _, length, own in case.rows()], device=DEVICE),
        suffix_lengths=torch.tensor(case.suffix_lengths, device=DEVICE) - 1,
        scale=0.5,
        **terms,
    )
    return output, suffix


def truth(case, *, softcap=None, window=None):
    output = torch.zeros_like(case.query, dtype=torch.float64)
    repeats = case.query.shape[1] // case.suffix[0].shape[1]
    for row, group, prefix_length, suffix_length in case.rows():
        if suffix_length:
            keys, values = (
                torch.cat([shared[group, :, :prefix_length], own[row, :, :suffix_length]], 1)[:, -(window or 10**6) :]
                for shared, own in zip(case.prefix, case.suffix, strict=True)
            )
            keys, values = (x.double().repeat_interleave(repeats, 0) for x in (keys, values))
            scores = 0.5 * (keys @ case.query[row].double()[:, :, None])[:, :, 0]
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            output[row] = (torch.softmax(scores, -1)[:, None] @ values)[:, 0]
    return output


IMPLS = pytest.mark.parametrize("impl", list(STALE))


@IMPLS
@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (3, 3), (5, 1)])
@pytest.mark.parametrize("terms", [{}, {"window": 4}, {"window": 1}, {"softcap": 1.5}, {"softcap": 1.5, "window": 7}])
def test_it_is_one_softmax_over_prefix_and_suffix(impl, heads, kv_heads, terms):
    case = make(heads, kv_heads, **SMALL)
    output, _ = attend(case, impl, **terms)
    assert (output - truth(case, **terms)).abs().max() < EXACT


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "heads, kv_heads, width, prefix_lengths, suffix_lengths, terms",
    [
        (14, 2, 64, [129, 1, 0], [129, 17, 1, 64, 65], {}),
        (4, 1, 128, [300, 127], [1, 127, 128, 2, 40], {}),  # a prefix in chunks
        (2, 2, 64, [300, 17], [1, 127, 20, 2, 40], {"window": 130}),  # that sees some chunks in part, some not at all
        (7, 1, 64, [129, 127], [70, 1, 3, 2, 40], {"window": 65, "softcap": 3.0}),
    ],
)
def test_the_kernel_is_as_exact_as_the_reference(heads, kv_heads, width, prefix_lengths, suffix_lengths, terms, dtype):
    case = make(heads, kv_heads, width, prefix_lengths, suffix_lengths, seat_index=[0, 2, 3, 4, 5], dtype=dtype)
    case.query *= 0.2  # scores up to 10, so that rounding one, the same in all implementations, shifts little
    expected = truth(case, **terms)
    error = {impl: (attend(case, impl, **terms)[0] - expected).abs().max() for impl in STALE}
    assert max(error["triton"], error["torch"]) <= error["definition"] + ROUNDING[dtype]


@IMPLS
@pytest.mark.parametrize("seats", [1, 20])  # one query row to a tile of 16; several tiles to a group
def test_rows_may_sit_anywhere(impl, seats):
    seat_index = [0, 2] if seats == 1 else [3, 4, 19, 40, 50, 51, 59]  # a whole group of the three is empty
    case = make(6, 2, 16, [20, 31, 17], [1 + i for i in range(len(seat_index))], seats=seats, seat_index=seat_index)
    assert (attend(case, impl)[0] - truth(case)).abs().max() < EXACT


@IMPLS
def test_the_newest_key_and_value_are_stored_and_nothing_else_changes(impl):
    case = make(4, 2, **SMALL | {"suffix_lengths": [1, 6, 0, 2, 4, 0]})
    _, suffix = attend(case, impl, stale=7.0)
    for stored, expected in zip(suffix, case.suffix, strict=True):
        for row, _, _, length in case.rows():
            assert torch.equal(stored[row, :, :length], expected[row, :, :length])
            assert (stored[row, :, length:] == 7).all() or (length == 0 and impl != "triton")


@IMPLS
def test_an_idle_row_gives_zero_and_disturbs_nobody(impl):
    busy = make(4, 2, **SMALL)
    idle = replace(busy, suffix_lengths=[1, 6, 0, 0, 4, 1])  # one beside others, one alone in a group without prefix
    output, _ = attend(idle, impl)
    assert (output[[2, 3]] == 0).all()
    assert torch.equal(output[[0, 1, 4, 5]], attend(busy, impl)[0][[0, 1, 4, 5]])


@IMPLS
def test_no_rows_at_all_but_idle_ones(impl):
    assert (attend(make(4, 2, **SMALL | {"suffix_lengths": [0] * 6}), impl)[0] == 0).all()


def test_a_neighbours_length_does_not_change_a_bit_of_a_rows_output():
    lengths = [5, 90, 3]
    case = make(4, 2, 16, [150], lengths)
    other = replace(case, suffix_lengths=[5, 20, 90])
    for terms in ({}, {"window": 60}):
        assert torch.equal(attend(case, "triton", **terms)[0][0], attend(other, "triton", **terms)[0][0])


@pytest.mark.parametrize("terms", [{}, {"window": 1}, {"window": 40}, {"window": 170}, {"softcap": 3.0, "window": 65}])
def test_long_suffixes_of_a_few_rows_are_read_in_chunks_to_the_same_result(terms, monkeypatch):
    """Rows that end on a chunk's edge, one before and one behind it; a window's edge in each of the chunks."""
    case = make(7, 1, 16, [40, 9], [1, 64, 65, 66, 129, 0, 200], seats=4, seat_index=[0, 1, 2, 3, 4, 6, 7])
    whole, _ = attend(case, "triton", **terms)
    launched = []
    monkeypatch.setattr(kernel, "MIN_SUFFIX_CHUNK", 64)
    size_of = kernel.suffix_chunk_size
    monkeypatch.setattr(kernel, "suffix_chunk_size", lambda *shape: launched.append(size_of(*shape)) or launched[-1])
    output, suffix = attend(case, "triton", **terms)
    assert launched == [128]  # of 201 keys, in blocks of 64: 3 chunks would be of 67, and so of 128
    assert (output - truth(case, **terms)).abs().max() < EXACT and (output - whole).abs().max() < EXACT
    for row, _, _, length in case.rows():  # the newest is stored
        assert torch.equal(suffix[0][row, :, :length], case.suffix[0][row, :, :length])


@pytest.mark.parametrize(
    "suffix_size, programs, expected",
    [
        (401, 16, 0),  # short completions
        (16_385, 264, 0),  # as many programs as the device wants
        (16_385, 16, 576),  # 8 rows of 2 heads: 32 chunks
        (16_385, 256, 1856),  # 9 chunks
        (1_024, 1, 512),
        (1_023, 1, 0),
    ],
)
def test_a_suffix_comes_in_chunks_where_programs_are_few_and_it_is_long(suffix_size, programs, expected):
    assert kernel.suffix_chunk_size(suffix_size, programs, 64) == expected


@pytest.mark.parametrize("impl", ["definition", "torch"] + ["triton"] * (DEVICE == "cuda"))
def test_bf16_scores_are_not_rounded_before_the_softmax(impl):
    case = make(4, 2, **SMALL, dtype=torch.bfloat16, seed=4)
    case.query *= 4  # scores near 10, where bf16 numbers lie 0.06 apart
    output, _ = attend(case, impl)
    assert output.dtype == torch.bfloat16
    assert (output - truth(case)).abs().max() < 0.02


@pytest.mark.parametrize("impl", ["definition", "torch"])
def test_what_is_stored_is_read_and_nothing_beyond(impl):
    case = make(4, 2, **SMALL)
    assert torch.equal(attend(case, impl, stale=1e4)[0], attend(case, impl, stale=0.0)[0])


@pytest.mark.skipif(DEVICE == "cuda", reason="torch's flash attention for CPUs")
@pytest.mark.parametrize("terms", [{}, {"window": 17}])  # 9 keys in the longest prefix, 7 and one in the suffixes
def test_the_cpu_path_is_exact_in_fp64_also_with_a_window_that_hides_nothing(monkeypatch, terms):
    monkeypatch.setattr(reference, "attend", None)
    case = make(5, 1, **SMALL, dtype=torch.float64)
    assert (attend(case, "torch", **terms)[0] - truth(case, **terms)).abs().max() < 1e-14


@pytest.mark.parametrize("terms", [{"softcap": 1.5}, {"window": 15}])
def test_the_cpu_path_leaves_to_the_definition_what_it_cannot_do(terms):
    case = make(4, 2, **SMALL)
    assert not cpu.supports(case.query, case.prefix, case.suffix, **terms)
    assert not cpu.supports(case.query.bfloat16(), case.prefix, case.suffix)
    assert not cpu.supports(case.query.to("meta"), case.prefix, case.suffix), "of another device"
    assert cpu.supports(case.query, case.prefix, case.suffix) == (DEVICE == "cpu")
    narrow = case.prefix[0], case.prefix[1][..., :8]  # values of another width
    assert not cpu.supports(case.query, narrow, case.suffix)


def test_prefix_chunks_cover_every_key_once_and_fill_the_device():
    for size in (1, 17, 127, 129, 700, 4096):
        chunk = kernel.prefix_chunk_size(size, programs=64, block=64)
        assert chunk % 64 == 0 and (chunk >= kernel.MIN_PREFIX_CHUNK or chunk >= size)
        assert -(-size // chunk) * chunk >= size > (-(-size // chunk) - 1) * chunk
    assert kernel.prefix_chunk_size(700, programs=64, block=64) == 192  # 4 x 64 programs, close to PROGRAMS
    assert kernel.prefix_chunk_size(700, programs=10_000, block=64) >= 700


@pytest.mark.parametrize(
    "seats, repeats, element_size, shape",
    [(20, 7, 2, (8, 8)), (20, 7, 4, (2, 8)), (3, 7, 2, (4, 8)), (1, 1, 2, (16, 1)), (9, 70, 2, (1, 128))],
)
def test_a_prefix_tile_has_16_rows_or_more_but_no_more_than_the_registers_hold(seats, repeats, element_size, shape):
    assert kernel.tile_shape(seats, repeats, element_size) == shape


@pytest.mark.parametrize(
    "width, dtype, reason",
    [
        (24, torch.float32, "head width 24 is not one of"),
        (16, torch.float64, "float64"),
        (256, torch.float32, "exceeds 512 bytes"),
    ],
)
def test_the_kernel_refuses_what_it_cannot_do_and_names_the_remedy(width, dtype, reason):
    case = make(4, 2, width, [3], [1, 2], dtype=dtype)
    with pytest.raises(ValueError, match=f"impl=triton: decode_attention: .*{reason}.*; use impl=auto or impl=torch"):
        attend(case, "triton")


def test_the_reference_stores_and_then_attends():
    case = make(4, 2, **SMALL)
    rows = torch.tensor([length for _, _, length, _ in case.rows()], device=DEVICE)
    seat_index = torch.tensor(case.seat_index, device=DEVICE)
    layout = dict(seats=case.seats, seat_index=seat_index, prefix_lengths=rows, scale=0.5)
    lengths = torch.tensor(case.suffix_lengths, device=DEVICE)
    attended = reference.attend(case.query, case.prefix, case.suffix, suffix_lengths=lengths, **layout)
    assert torch.allclose(attended, attend(case, "definition")[0], atol=1e-6)
