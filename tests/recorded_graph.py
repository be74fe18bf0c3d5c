"""A CUDA graph on CPU: records the operations of a function on the tensors themselves and replays them without Python.

As with the real one, a replay sees new values at the old addresses and nothing else: Python numbers are baked in, and
an operation that waits for the device cannot be captured.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

WAITS = {"_local_scalar_dense", "nonzero", "item", "isin", "masked_select", "_unique2", "unique_consecutive", "equal"}


class Recording(TorchDispatchMode):
    """What ran inside the context, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = args[1] if name.startswith(("index", "_index_put")) and len(args) > 1 else None
        by_mask = isinstance(indices, (list, tuple)) and any(i is not None and i.dtype == torch.bool for i in indices)
        if name in WAITS or by_mask:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        outputs = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, outputs))
        return outputs


def replay(calls: list[tuple]) -> None:
    """Run every call again and put what it makes where it lay the first time."""
    for func, args, kwargs, outputs in calls:
        inputs = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        storages = {x.untyped_storage().data_ptr() for x in inputs}
        again = tree_flatten(func(*args, **kwargs))[0]
        for old, new in zip(tree_flatten(outputs)[0], again, strict=True):
            # A view of an input, or an input written in place, is up to date already.
            if isinstance(old, torch.Tensor) and old.untyped_storage().data_ptr() not in storages:
                old.copy_(new)


def capture(run: Callable[[], None], pool: object) -> tuple[Callable[[], None], object]:
    """Takes the place of grpo.rollout.graphs.capture. Here to record is to run, so the first replay is done already."""
    with Recording() as recording:
        run()
    replays = itertools.count()
    return lambda: replay(recording.calls) if next(replays) else None, "pool"
