"""A CUDA graph on CPU: records the operations of a function on the tensors themselves and replays them without Python.

As with the real one, a replay sees new values at the old addresses and nothing else: Python numbers are baked in, and
an operation that waits for the device cannot be captured.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = {
    *("_local_scalar_dense", "item", "equal", "nonzero", "masked_select", "isin", "bincount"),
    *("_unique2", "unique_consecutive", "unique_dim"),
}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


def waits(func, args: tuple) -> bool:
    """Whether an operation waits for the device: to know a value, or how large its result is."""
    name = func.overloadpacket.__name__
    by_mask = name in INDEXING and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    return name in WAITS or by_mask or (name == "repeat_interleave" and func._overloadname == "Tensor")


def not_permitted(name: str) -> RuntimeError:
    """What CUDA raises for a wait inside a capture."""
    return RuntimeError(f"operation not permitted when stream is capturing: {name}")


class Graph:
    """Stands in for torch.cuda.CUDAGraph: it replays the operations on the tensors that they had at the capture."""

    def __init__(self) -> None:
        self.calls: list[tuple[Callable[[], object], list[Tensor]]] = []
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}  # by address, and a copy
        self.own: dict[int, Tensor] = {}  # made in the capture

    def record(self, work: Callable[[], object], inputs: list[Tensor]) -> object:
        """Run for the shapes; `stop` takes back what was written to memory that was there before."""
        for storage in (tensor.untyped_storage() for tensor in inputs):
            if storage.data_ptr() not in self.own | self.before:
                self.before[storage.data_ptr()] = (storage, storage.clone())
        outputs = work()
        made = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
        self.calls.append((work, made))
        for tensor in made:
            address = tensor.untyped_storage().data_ptr()
            if address not in self.before:
                self.own.setdefault(address, tensor)
        return outputs

    def stop(self) -> None:
        """Nothing of it has happened: old memory is as before, new memory holds anything."""
        for storage, copy in self.before.values():
            storage.copy_(copy)
        self.before.clear()
        for tensor in self.own.values():
            if tensor.is_floating_point():
                tensor.fill_(math.nan)

    def replay(self) -> None:
        """Every operation again, its results where they lay at the capture."""
        for work, made in self.calls:
            again = [leaf for leaf in tree_leaves(work()) if isinstance(leaf, Tensor)]
            for old, new in zip(made, again, strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    def pool(self) -> tuple[int, int]:
        return (0, 1)


class Recording(TorchDispatchMode):
    """Records in a graph what runs inside the context."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if waits(func, args):
            raise not_permitted(func.overloadpacket.__name__)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        return self.graph.record(lambda: func(*args, **kwargs), inputs)


def capture(run: Callable[[], None], pool: object) -> tuple[Callable[[], None], object]:
    """Takes the place of grpo.rollout.graphs.capture."""
    graph = Graph()
    try:
        with Recording(graph):
            run()
    finally:
        graph.stop()
    return graph.replay, graph.pool()
