"""The process group: rank and size, sums and maxima over ranks, gathers of plain Python. gloo on CPU, NCCL on CUDA.

Started by torchrun, or not at all: a single process is a world of size 1, in which every call here is the identity.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from grpo.machine import cpu_share, network_for_peers

POLL_S = 0.5


@dataclass(frozen=True)
class World:
    """This process among `size` processes. Scalars and objects use a gloo group on CPU, gradients the default group."""

    rank: int
    size: int
    device: torch.device
    cpu_group: dist.ProcessGroup | None = None
    timeout_s: float = 1800.0  # ranks wait for each other at most this long

    @property
    def is_writer(self) -> bool:
        """Rank 0 alone writes files and prints."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum of a small tensor over all ranks, on the CPU, in fp64: rank order changes the last bits only."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: Tensor) -> Tensor:
        """The element-wise maximum of a small tensor over all ranks, on the CPU, in fp64."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: Tensor, op: dist.ReduceOp) -> Tensor:
        values = values.detach().to("cpu", torch.float64)
        if self.size > 1:
            self.barrier()
            dist.all_reduce(values, op, group=self.cpu_group)
        return values

    def gather(self, item: object) -> list:
        """Every rank's item, in the order of ranks, on every rank."""
        if self.size == 1:
            return [item]
        self.barrier()
        items = [None] * self.size
        dist.all_gather_object(items, item, group=self.cpu_group)
        return items

    def require_same(self, values: dict[str, object]) -> None:
        """ValueError, on every rank, if one has other values than rank 0: no later error would say so."""
        first, *others = self.gather({name: repr(value) for name, value in values.items()})  # repr: NaN equals NaN
        for rank, other in enumerate(others, 1):
            pairs = ((name, other[name], value) for name, value in first.items() if other[name] != value)
            if differing := [f"{name}={found}, where rank 0 has {value}" for name, found, value in pairs]:
                raise ValueError(f"rank {rank} has {'; '.join(differing)}: start all ranks with the same")

    def barrier(self, share: float = 1.0) -> None:
        """Wait until every rank is here. Every collective call above begins with it, because a collective cannot say
        which rank is missing; here TimeoutError names them, on rank 0.  share: fraction of timeout_s to wait."""
        if self.size == 1:
            return
        began, wait_s = time.monotonic(), share * self.timeout_s
        try:
            dist.monitored_barrier(self.cpu_group, timedelta(seconds=wait_s), wait_all_ranks=True)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            if time.monotonic() - began < 0.9 * wait_s:
                raise TimeoutError(f"another rank failed; see its message (here: {reason})") from error
            raise TimeoutError(f"timed out after {self.timeout_s:g} s (distributed.timeout_s): {reason}") from error

    @contextmanager
    def naming_missing_ranks(self) -> Iterator[None]:
        """Within it, if a collective without a barrier (gradients, shards of weights) fails because a rank is missing,
        the others enter a barrier, which names it. With gloo only: NCCL ends the process itself."""
        try:
            yield
        except RuntimeError as error:
            if "gloo" in str(error):
                self.barrier(share=0.1)
            raise

    def local_share(self, items: Sequence | Tensor) -> Sequence | Tensor:
        """This rank's share: item i goes to rank i mod size."""
        return items[self.rank :: self.size]

    def gather_interleaved(self, share: list) -> list:
        """The whole list again, on every rank: the inverse of `local_share`."""
        shares = self.gather(share)
        whole = [None] * sum(len(share) for share in shares)
        for rank, items in enumerate(shares):
            whole[rank :: self.size] = items
        return whole

    def redistribute(self, share: list, chosen: Sequence[int]) -> list:
        """This rank's share of a selection: the items at indices `chosen` of the whole list, of which `share` is this
        rank's share. Only these are sent, and each rank unpickles only its own: all together may be gigabytes."""
        if self.size == 1:
            return [share[i] for i in chosen]
        indices, wanted = range(self.rank, self.size * len(share), self.size), set(chosen)
        pickled = [pickle.dumps(item) if i in wanted else None for i, item in zip(indices, share, strict=True)]
        whole = self.gather_interleaved(pickled)
        return [pickle.loads(whole[i]) for i in self.local_share(chosen)]

    def run_on_writer(self, name: str, work: Callable[[], object]) -> object:
        """Rank 0 calls `work()`, and all ranks get its result. The others wait by polling, so that no collective times
        out. If rank 0 fails, torchrun ends the waiting ranks."""
        if self.size == 1:
            return work()
        store = dist.distributed_c10d._get_default_store()
        if self.is_writer:
            result = work()
            store.set(f"grpo/{name}", b"done")
        else:
            while not store.check([f"grpo/{name}"]):
                time.sleep(POLL_S)
            result = None
        return self.gather(result)[0]


class StopRequest:
    """Within it, Ctrl-C or SIGTERM asks all ranks to stop after the current step; a second one stops immediately.

    A step that has not ended `term_grace_s` seconds after SIGTERM is abandoned: the process exits with status 143, and
    a resumed run starts from the last checkpoint.
    """

    def __init__(self, world: World, term_grace_s: float):
        self.world, self.signal = world, 0
        # A separate thread: Python runs a signal handler only after the current collective or kernel call returns.
        self._deadline = threading.Timer(term_grace_s, self._abandon_step)
        self._deadline.daemon = True

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *failure: object) -> None:
        self._deadline.cancel()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: object) -> None:
        self.signal = number
        signal.signal(number, signal.default_int_handler)
        if number == signal.SIGTERM:
            self._deadline.start()
        if self.world.is_writer:
            print("\nstopping after this step; a second signal stops immediately", file=sys.stderr, flush=True)

    def _abandon_step(self) -> None:
        print(
            f"rank {self.world.rank}: the step did not end within {self._deadline.interval:g} s of SIGTERM "
            "(distributed.term_grace_s); --resume continues from the last checkpoint, if there is one",
            file=sys.stderr,
            flush=True,
        )
        os._exit(128 + signal.SIGTERM)

    def status(self) -> int:
        """0 until a rank has been asked to stop, then the exit status of all: 130 (Ctrl-C) or 143 (SIGTERM)."""
        number = int(self.world.max(torch.tensor(float(self.signal))))
        return 128 + number if number else 0


def make_deterministic() -> None:
    """Allow only bit-reproducible operations; others raise RuntimeError. Call it before anything on CUDA: cuBLAS reads
    its workspace setting once."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # saves a kernel per empty tensor


def start(timeout_s: float = 1800.0) -> World:
    """Join the process group described by torchrun's environment variables, if any, and choose the device."""
    size, rank, local_rank = (
        int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0))
    )
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        # On Hopper SDPA would prefer cuDNN's attention, which spends tenths of a second planning for each new shape;
        # ours change with every batch.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if size > 1 and device.type == "cpu":
        torch.set_num_threads(cpu_share())  # torchrun sets 1
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), cpu_share()))  # torch's default ignores CPU quotas
    if size == 1:
        return World(0, 1, device)
    try:
        cpu_group = _join_process_group(device, timedelta(seconds=timeout_s))
        return World(rank, size, device, cpu_group, timeout_s)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ConnectionError(
            f"rank {rank} on {socket.gethostname()} could not connect to the others: {reason}; if machines have "
            "several networks, name the one that connects them: GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0"
        ) from error


def _join_process_group(device: torch.device, timeout: timedelta) -> dist.ProcessGroup:
    """Join the default process group; returns another for the CPU."""
    several_launchers = os.environ.get("GROUP_WORLD_SIZE", "1") != "1"
    if several_launchers and (interface := network_for_peers(os.environ["MASTER_ADDR"])):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    store = _store_of_attempt(store, rank, size, timeout)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    return dist.new_group(backend="gloo", timeout=timeout)  # separate: after a timeout a group can name no rank


def _store_of_attempt(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.Store:
    """A part of the store that is this attempt's alone. torchrun keeps the store over restarts: without this, a rank
    could read the address of a predecessor. Its restart count cannot tell attempts apart, as machines count their own.

    Rank 0 gives the attempt a new name. Every other rank answers with a name of its own, until rank 0 has listed it.
    """
    own, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    if rank == 0:
        store.set("attempt", own)
        answers = [store.get(f"{own}/{other}") for other in range(1, size)]
        store.set(f"{own}/answers", b" ".join(answers))
        return dist.PrefixStore(own, store)
    while time.monotonic() < deadline:
        attempt = store.get("attempt").decode()  # maybe that of the attempt before
        store.set(f"{attempt}/{rank}", own)
        if store.check([f"{attempt}/answers"]) and own in store.get(f"{attempt}/answers").decode().split():
            return dist.PrefixStore(attempt, store)
        time.sleep(0.05)
    raise RuntimeError(f"rank 0 did not answer within {timeout.total_seconds():g} s (distributed.timeout_s)")


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
