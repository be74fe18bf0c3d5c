"""A CUDA device that is not there, played by the CPU: programs run as on CUDA, under its rules, with true numbers.

A `Ghost` calls itself a CUDA tensor and keeps its values in CPU memory. Within `ghost_cuda` the device exists for
`torch.cuda`, Triton's kernels run in the interpreter, and what would fail on a device fails here: tensors of two
devices in one operation, matmuls whose dtypes cuBLAS does not take, flash attention in fp32, NumPy on a device tensor
and, while a graph is captured, whatever waits for the device or comes from the host. A captured graph is recorded and
replayed, not run. What none of this shows is speed, memory and the rounding of a real device.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from unittest import mock

import torch
import torch._dynamo  # before torch.cuda is patched, whose functions it lists
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

from tests.recorded_graph import INDEXING, Graph, not_permitted, waits

CUDA = torch.device("cuda", 0)
MEMORY = 8 * 2**30
MATMULS = {"mm", "bmm", "addmm", "baddbmm"}
FLASH_DTYPES = (torch.bfloat16, torch.float16)


class Ghost(Tensor):
    """`host`: the values, a CPU tensor of the same shape, strides and dtype."""

    @staticmethod
    def __new__(cls, real: Tensor) -> Ghost:
        looks = {"strides": real.stride(), "storage_offset": real.storage_offset(), "dtype": real.dtype}
        # In C++ a meta tensor: of torch built for a CPU no other device but its own knows how to run backward.
        return Tensor._make_wrapper_subclass(cls, real.size(), **looks, device="meta")

    def __init__(self, real: Tensor):
        self.host = real

    def __repr__(self) -> str:
        return f"Ghost({self.host!r})"

    is_away = False  # moved to the host by `.data =`, as weights that wait there are

    device = property(lambda self: torch.device("cpu") if self.is_away else CUDA)
    is_cuda = property(lambda self: not self.is_away)
    is_cpu = property(lambda self: self.is_away)
    is_meta = property(lambda self: False)

    def __deepcopy__(self, memo: dict) -> Tensor:
        if id(self) not in memo:
            duplicate = Ghost(self.host.clone())
            is_parameter = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = torch.nn.Parameter(duplicate, self.requires_grad) if is_parameter else duplicate
        return memo[id(self)]

    def get_device(self) -> int:
        return CUDA.index

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def tolist(self) -> list:
        return self.cpu().tolist()

    def numpy(self, **options: object) -> None:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    def cuda(self, *args: object, **options: object) -> Ghost:
        return self

    def to(self, *args: object, **options: object) -> Tensor:
        """Itself where nothing changes, as of any tensor; C++ would compare with its meta device."""
        where, dtype, non_blocking, memory_format = torch._C._nn._parse_to(
            *args, **{k: v for k, v in options.items() if k != "copy"}
        )
        stays = where is None or where.type == "cuda"
        if stays and not options.get("copy") and dtype in (None, self.dtype) and memory_format is None:
            return self
        options = {"copy": True, "memory_format": memory_format or torch.preserve_format}
        if stays or not non_blocking:
            return super().to(where or CUDA, dtype=dtype or self.dtype, **options)
        with torch._C.DisableTorchFunctionSubclass():
            return device.copy_later(self.host.to(dtype=dtype or self.dtype, **options))

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        """As `Tensor.data`: from here on another tensor's values, shape and dtype."""
        self.is_away = not isinstance(value, Ghost)
        if not self.is_away:
            with torch._C.DisableTorchFunctionSubclass():
                Tensor.data.__set__(self, value)
        self.host = real_of(value)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class Device:
    """What has happened on the ghost so far."""

    def __init__(self) -> None:
        self.graph: Graph | None = None  # the one that is being captured
        self.waits = Counter()  # of the host for the device, by operation
        self.launches = Counter()  # of Triton kernels, by name
        self.copies: list[tuple[Tensor, Tensor]] = []  # to the host, under way, and what they will hold

    def wait(self, name: str) -> None:
        """The host waits for what the device has to do, or hands it memory that may change."""
        if self.graph is not None:
            raise not_permitted(name)
        self.waits[name] += 1
        for copy, values in self.copies:
            copy.copy_(values)
        self.copies.clear()

    def copy_later(self, values: Tensor) -> Tensor:
        """What a copy that nobody waits for gives the host: until the next wait nothing that could be used."""
        copy = ~values if values.dtype == torch.bool else torch.full_like(values, torch.iinfo(values.dtype).max)
        self.copies.append((copy, values))
        return copy

    def do(self, work: Callable[[], object], inputs: list[Tensor]) -> object:
        """Now; or, as part of a graph, at each replay."""
        return work() if self.graph is None else self.graph.record(work, inputs)


device = Device()


def run(func, args: tuple, kwargs: dict) -> object:
    """An operation that has a ghost among its arguments, or makes one."""
    name, overload = func.overloadpacket.__name__, func._overloadname
    if func.namespace == "torch_attn":  # Python, down to the flash attention below
        module = importlib.import_module("torch.nn.attention.varlen")
        with _Mode():
            return getattr(module, name)._init_fn(*args, **kwargs)
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    to = kwargs.get("device")
    to_host = to is not None and to.type == "cpu"
    _check(func, name, args, tensors, to_host, bool(kwargs.get("non_blocking")))
    real_args, real_kwargs = real_of(args), real_of(kwargs)
    if to is not None:
        real_kwargs["device"] = torch.device("cpu")
    if name in REPLACED:
        work = lambda: REPLACED[name](*real_args, **real_kwargs)
    elif name in MATMULS and "dtype" in overload:
        work = lambda: matmul_to(func.overloadpacket, *real_args, **real_kwargs)
    else:
        work = lambda: func(*real_args, **real_kwargs)
    result = device.do(work, real_of(tensors))
    if to_host or name in ("_local_scalar_dense", "_fused_sdp_choice"):
        return result
    if name == "copy_" and not isinstance(args[0], Ghost):
        return args[0]
    return return_and_correct_aliasing(func, args, kwargs, ghost_of(result))


def _pin(tensor: Tensor) -> Tensor:
    pinned = tensor.clone()
    pinned.is_in_pinned_memory = True
    return pinned


def _is_pinned(tensor: Tensor) -> bool:
    return getattr(tensor, "is_in_pinned_memory", False)


def _check(func, name: str, args: tuple, tensors: list[Tensor], to_host: bool, non_blocking: bool) -> None:
    """RuntimeError for what CUDA refuses; counts what it waits for."""
    strangers = [tensor for tensor in tensors if not isinstance(tensor, Ghost) or tensor.is_away]
    if name == "_to_copy":
        if to_host or (strangers and not (non_blocking and all(map(_is_pinned, strangers)))):
            device.wait("a copy between devices")
    elif name == "copy_":
        if strangers and any(tensor.dim() for tensor in strangers):
            device.wait("a copy between devices")
    elif name in INDEXING:
        indices = [index for index in args[1] if index is not None]
        if any(not isinstance(index, Ghost) for index in indices):
            device.wait(f"{name} by an index on the host")
        strangers = [tensor for tensor in (args[0], *args[2:3]) if not isinstance(tensor, Ghost) and tensor.dim()]
    if any(stranger.dim() for stranger in strangers) and name not in ("_to_copy", "copy_"):
        found = [(type(tensor).__name__, tuple(tensor.shape), tensor.dtype) for tensor in tensors]
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found {found}")
    if waits(func, args):
        device.wait(name)
    if name in MATMULS and len({tensor.dtype for tensor in tensors}) > 1 and "dtype" not in func._overloadname:
        raise RuntimeError(f"{func}: expected one dtype, found {[tensor.dtype for tensor in tensors]}")


def matmul_to(op, *args: object, out: Tensor | None = None, **kwargs: object) -> Tensor:
    """A matmul of bf16 that leaves fp32 behind, which only cuBLAS has. args: its tensors, then the dtype to leave."""
    *total, left, right, dtype = args
    operands, sums = {left.dtype, right.dtype}, {tensor.dtype for tensor in (*total, *([] if out is None else [out]))}
    if len(operands) > 1 or not operands <= set(FLASH_DTYPES) or dtype != torch.float32 or sums > {dtype}:
        raise RuntimeError(f"{op}: operands {operands}, sums {sums}, out_dtype {dtype}")
    result = op(*total, left.float(), right.float(), **kwargs)
    return result if out is None else out.copy_(result)


# Flash attention over sequences of many lengths -----------------------------------------------------------------------


def _spans(starts: Tensor) -> list[slice]:
    starts = starts.tolist()
    return [slice(a, b) for a, b in zip(starts, starts[1:], strict=False)]


def _attention(query: Tensor, key: Tensor, scale: float, left: int, right: int) -> Tensor:
    """Scores of one sequence, -inf where a key is hidden, causal or windowed from the bottom right.  [H, Q, K] fp32."""
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    age = (torch.arange(len(query)) + len(key) - len(query))[:, None] - torch.arange(len(key))
    hidden = torch.zeros_like(age, dtype=torch.bool)
    if right >= 0:
        hidden |= age < -right
    if left >= 0:
        hidden |= age > left
    return scores.masked_fill(hidden, -math.inf)


def _flash_forward(
    query: Tensor, key: Tensor, value: Tensor, query_starts: Tensor, key_starts: Tensor, longest_query: int,
    longest_key: int, dropout: float, is_causal: bool, return_debug_mask: bool, *, scale: float,
    window_size_left: int, window_size_right: int, **others,
) -> tuple[Tensor, ...]:  # fmt: skip
    assert all(tensor.dtype in FLASH_DTYPES and tensor.stride(-1) == 1 for tensor in (query, key, value))
    assert query_starts.dtype == key_starts.dtype == torch.int32 and not any(others.values())
    assert query.shape[1] % key.shape[1] == 0 and query.shape[-1] <= 256
    window = (scale, window_size_left, 0 if is_causal else window_size_right)
    repeats = query.shape[1] // key.shape[1]
    output, lse = torch.empty_like(query), torch.empty(query.shape[1], len(query))
    for rows, keys in zip(_spans(query_starts), _spans(key_starts), strict=True):
        assert rows.stop - rows.start <= longest_query and keys.stop - keys.start <= longest_key
        many = [tensor[keys].repeat_interleave(repeats, 1).float() for tensor in (key, value)]
        scores = _attention(query[rows].float(), many[0], *window)
        output[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), many[1])
        lse[:, rows] = scores.logsumexp(-1)
    return output, lse, torch.zeros(2, dtype=torch.uint64), torch.empty(0), torch.empty(0)


def _flash_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, query_starts: Tensor,
    key_starts: Tensor, longest_query: int, longest_key: int, dropout: float, is_causal: bool, *random, scale: float,
    window_size_left: int, window_size_right: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    window = (scale, window_size_left, 0 if is_causal else window_size_right)
    repeats = query.shape[1] // key.shape[1]
    gradients = [torch.zeros_like(tensor, dtype=torch.float32) for tensor in (query, key, value)]
    for rows, keys in zip(_spans(query_starts), _spans(key_starts), strict=True):
        one, d_output = query[rows].float(), gradient[rows].float()
        keys_many, values_many = (tensor[keys].repeat_interleave(repeats, 1).float() for tensor in (key, value))
        probs = (_attention(one, keys_many, *window) - lse[:, rows, None]).exp()
        d_probs = torch.einsum("qhd,khd->hqk", d_output, values_many)
        d_scores = probs * (d_probs - (d_output * output[rows]).sum(-1).T[..., None]) * scale
        gradients[0][rows] += torch.einsum("hqk,khd->qhd", d_scores, keys_many)
        gradients[1][keys] += torch.einsum("hqk,qhd->khd", d_scores, one).unflatten(1, (-1, repeats)).sum(2)
        gradients[2][keys] += torch.einsum("hqk,qhd->khd", probs, d_output).unflatten(1, (-1, repeats)).sum(2)
    return tuple(found.to(query.dtype) for found in gradients)


REPLACED = {
    "_flash_attention_forward": _flash_forward,
    "_flash_attention_backward": _flash_backward,
    "_fused_sdp_choice": lambda *args, **kwargs: 0,  # by plain operations
}


# The device as torch.cuda and Triton know it --------------------------------------------------------------------------


def real_of(tree: object) -> object:
    """Ghosts replaced by their values."""
    return tree_map_only(Ghost, lambda ghost: ghost.host, tree)


def ghost_of(tree: object) -> object:
    """Tensors as ghosts."""
    return tree_map_only(Tensor, lambda tensor: tensor if isinstance(tensor, Ghost) else Ghost(tensor), tree)


class _Mode(TorchDispatchMode):
    """Catches what makes a tensor on the device out of nothing or of a CPU tensor."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        to = kwargs.get("device")
        has_ghost = any(isinstance(leaf, Ghost) for leaf in tree_leaves((args, kwargs)))
        # Of a meta device that Python has not asked for C++ speaks: it means the device of a ghost.
        is_meta = to is not None and to.type == "meta" and to != torch.utils._device.CURRENT_DEVICE
        if has_ghost or is_meta or (to is not None and to.type == "cuda"):
            return run(func, args, kwargs)
        return func(*args, **kwargs)


class _Calls(TorchFunctionMode):
    """What C++ would do before any operation: copy Python's numbers to the device, ask which device is the current."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        where = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and where is not None and torch.device(where).type == "cuda":
            return func(*args, **kwargs | {"device": "cpu"}).to(CUDA)
        if func is Tensor.cuda:
            func, args = Tensor.to, (args[0], CUDA)
        if func is Tensor.to:
            is_device = lambda x: x in ("cuda", torch.device("cuda")) if isinstance(x, (str, torch.device)) else False
            args = tuple(CUDA if is_device(x) else x for x in args)
            kwargs = {name: CUDA if is_device(x) else x for name, x in kwargs.items()}
        return func(*args, **kwargs)


def _launch(original: Callable) -> Callable:
    def launch(self, *args, **kwargs):
        device.launches[self.fn.__name__] += 1
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        if not all(isinstance(tensor, Ghost) for tensor in tensors):
            raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
        args, kwargs = real_of(args), real_of(kwargs)

        def work() -> None:
            original(self, *args, **kwargs)

        device.do(work, real_of(tensors))

    return launch


def _tied(original: Callable) -> Callable:
    """`nn.Module._apply`, here with new parameters, keeps those one that were one."""

    def apply(self, fn, recurse=True):
        places: dict[int, list] = {}
        for module in self.modules():
            for name, parameter in module._parameters.items():
                places.setdefault(id(parameter), []).append((module._parameters, name))
        original(self, fn, recurse)
        for (parameters, name), *others in places.values():
            for others_parameters, other in others:
                others_parameters[other] = parameters[name]
        return self

    return apply


class _Stream:
    def wait_stream(self, other: _Stream) -> None: ...

    def synchronize(self) -> None:
        device.wait("synchronize")


class _Event:
    def __init__(self, **options: object): ...

    def record(self, stream: _Stream | None = None) -> None: ...

    def synchronize(self) -> None:
        device.wait("synchronize")

    def elapsed_time(self, other: _Event) -> float:
        return 1.0


@contextlib.contextmanager
def _capture(graph: Graph, pool: object = None, **options: object) -> Iterator[None]:
    assert device.graph is None
    device.graph = graph
    try:
        yield
    finally:
        device.graph = None
        graph.stop()


@contextlib.contextmanager
def ghost_cuda() -> Iterator[Device]:
    """Within it torch finds one CUDA device. Triton must have been imported with TRITON_INTERPRET=1."""
    from triton.runtime.interpreter import InterpretedFunction

    device.__init__()
    properties = SimpleNamespace(total_memory=MEMORY, multi_processor_count=132, name="ghost", major=9, minor=0)
    nothing = lambda *args, **kwargs: None
    zero = lambda *args, **kwargs: 0
    random_state = lambda *args, **kwargs: torch.zeros(16, dtype=torch.uint8)
    names = {
        **dict.fromkeys(("_lazy_init", "set_device", "empty_cache", "reset_peak_memory_stats", "ipc_collect"), nothing),
        **dict.fromkeys(("manual_seed", "manual_seed_all", "set_rng_state"), nothing),
        **dict.fromkeys(("memory_allocated", "max_memory_allocated", "memory_reserved", "current_device"), zero),
        "max_memory_reserved": zero,
        "is_available": lambda: True,
        "is_bf16_supported": lambda *args, **kwargs: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "is_current_stream_capturing": lambda: device.graph is not None,
        "get_device_name": lambda *args: "ghost",
        "get_device_capability": lambda *args: (9, 0),
        "get_device_properties": lambda *args: properties,
        "get_rng_state": random_state,
        "mem_get_info": lambda *args: (MEMORY, MEMORY),
        "synchronize": lambda *args: device.wait("synchronize"),
        "Stream": _Stream,
        "current_stream": lambda *args: _Stream(),
        "stream": lambda *args: contextlib.nullcontext(),
        "Event": _Event,
        "CUDAGraph": Graph,
        "graph": _capture,
    }
    with contextlib.ExitStack() as stack:
        for name, value in names.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(Tensor, "pin_memory", _pin))
        stack.enter_context(mock.patch.object(torch.nn.Module, "_apply", _tied(torch.nn.Module._apply)))
        stack.enter_context(mock.patch.object(InterpretedFunction, "run", _launch(InterpretedFunction.run)))
        # Else .to() gives parameters a ghost's looks only.
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, False)
        stack.enter_context(_Calls())
        stack.enter_context(_Mode())
        yield device
