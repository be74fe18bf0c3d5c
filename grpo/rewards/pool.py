"""The runner's worker processes: reward functions under a deadline, so that no reward can hurt the run.

A Pool is called like `score_texts` (grpo.rewards.runner) and returns the same table. Workers are spawned, never forked,
each the leader of a session of its own; one that is late is killed with its whole process group and replaced.

A call that fails (raises, is late, dies, returns the wrong length) on several completions is repeated with each alone,
in a fresh worker; one that fails alone gets the status. A component that was late once is called with single
completions for the rest of the step: a batch that will be late wastes a whole deadline.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait

from grpo.config import RewardsConfig
from grpo.machine import cpu_share
from grpo.records import ERROR, TIMEOUT
from grpo.rewards.runner import Outcome, Reward, Table, log_once, take_rows
from grpo.rewards.worker import READY, pack_function

IMPORT_TIMEOUT_S = 60.0  # for a worker to start and import what defines a function; not part of a call's deadline
RETRIES_PER_JOB = 8  # single completions in one job: few, so that those that hang spread over the workers
MAX_DEFAULT_WORKERS = 16


@dataclass(frozen=True)
class Call:
    """One component to be computed for some rows."""

    component: int
    rows: tuple[int, ...]

    def one_by_one(self) -> list[Call]:
        return [Call(self.component, (i,)) for i in self.rows]


class Worker:
    """One process, the calls that it has yet to answer, and the deadline of the first of them."""

    def __init__(self) -> None:
        self.connection, theirs = multiprocessing.Pipe()
        with socket.fromfd(self.connection.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as pipe:
            for way in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):  # else a worker that is suspended would block us
                pipe.setsockopt(socket.SOL_SOCKET, way, struct.pack("ll", int(IMPORT_TIMEOUT_S), 0))
        code = "from grpo.rewards.worker import main; main()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            start_new_session=True,
        )
        theirs.close()
        self.calls: deque[Call] = deque()
        self.deadline = math.inf

    def kill(self) -> None:
        """End it and every process of its group."""
        self.connection.close()
        with suppress(ProcessLookupError, PermissionError):  # the latter from macOS if nothing of the group runs
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@dataclass
class Work:
    """One step's table as it fills, and the jobs (lists of calls) that are still to do."""

    completions: list[str]
    columns: dict[str, list]
    rewards: dict[str, Reward]
    jobs: deque[list[Call]] = field(default_factory=deque)
    late: set[int] = field(default_factory=set)  # components that are called with single completions

    def __post_init__(self) -> None:
        self.names = list(self.rewards)
        self.packed = [pack_function(name, reward.function) for name, reward in self.rewards.items()]
        unscored = Outcome(math.nan, TIMEOUT)  # what is still missing at the step's deadline
        self.table = [[unscored] * len(self.names) for _ in self.completions]

    def divide(self, workers: int) -> None:
        """Make jobs of at most a worker's even share of rows; a job has all components with that many rows a call."""
        total, even_share = len(self.completions), max(1, -(-len(self.completions) // workers))
        sizes = [min(reward.batch_size, even_share) for reward in self.rewards.values()]
        for size in dict.fromkeys(sizes):
            for start in range(0, total, size):
                rows = tuple(range(start, min(start + size, total)))
                self.jobs.append([Call(k, rows) for k, own in enumerate(sizes) if own == size])

    def next_job(self) -> list[Call]:
        job = self.jobs.popleft()
        return [part for call in job for part in (call.one_by_one() if call.component in self.late else [call])]

    def message(self, job: list[Call]) -> bytes:
        """The calls, pickled; ValueError for a column that cannot be."""
        calls = [
            (self.names[call.component], self.packed[call.component])
            + take_rows(self.completions, self.columns, call.rows)
            for call in job
        ]
        try:
            return pickle.dumps(calls)
        except (pickle.PicklingError, AttributeError, TypeError, RecursionError) as error:
            columns = ", ".join(self.columns)
            message = f"a column ({columns}) cannot be sent to a worker process ({error}); use columns of plain data"
            raise ValueError(message) from None

    def succeed(self, call: Call, outcomes: list) -> None:
        for row, outcome in zip(call.rows, outcomes, strict=True):
            self.table[row][call.component] = Outcome(*outcome)

    def fail(self, call: Call, status: str, kind: str, details: str) -> None:
        """Record the status if the call was for one completion; else queue each of them alone."""
        log_once(self.names[call.component], kind, details)
        if status == TIMEOUT:
            self.late.add(call.component)
        if len(call.rows) == 1:
            self.table[call.rows[0]][call.component] = Outcome(math.nan, status)
        else:
            singles = call.one_by_one()
            self.jobs += [singles[i : i + RETRIES_PER_JOB] for i in range(0, len(singles), RETRIES_PER_JOB)]


class Pool:
    """`pool(completions, columns, rewards) -> [N][K] outcomes`, computed by worker processes.

    workers: how many; 0: this rank's share of cores, at most MAX_DEFAULT_WORKERS.  timeout_s: for one call.
    step_timeout_s: for the whole table; what has no outcome by then is `timeout`.  Workers start when there is work for
    them and stay; `with Pool(...) as pool` ends them.
    """

    def __init__(self, *, workers: int, timeout_s: float, step_timeout_s: float):
        self.size = workers or min(MAX_DEFAULT_WORKERS, cpu_share())
        self.timeout_s, self.step_timeout_s = timeout_s, step_timeout_s
        self.workers: list[Worker] = []

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exception: object) -> None:
        while self.workers:
            self._remove(self.workers[0])

    def __call__(self, completions: list[str], columns: dict[str, list], rewards: dict[str, Reward]) -> Table:
        work, end = Work(completions, columns, rewards), time.monotonic() + self.step_timeout_s
        work.divide(self.size)
        for worker in [worker for worker in self.workers if worker.process.poll() is not None]:
            self._remove(worker)  # died since the last call, killed for memory perhaps: not a completion's fault
        try:
            while time.monotonic() < end and (work.jobs or self._busy()):
                self._dispatch(work)
                self._collect(work, end)
        finally:  # late, or interrupted: what still runs is of no use to the next step
            for worker in self._busy():
                self._remove(worker)
        return work.table

    def _busy(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.calls]

    def _dispatch(self, work: Work) -> None:
        while work.jobs and len(self._busy()) < self.size:
            idle = next((worker for worker in self.workers if not worker.calls), None)
            if idle is None:
                self.workers.append(idle := Worker())
            job = work.next_job()
            idle.calls, idle.deadline = deque(job), time.monotonic() + IMPORT_TIMEOUT_S
            with suppress(OSError):  # dead: reading from it will tell; suspended: it will be late
                idle.connection.send_bytes(work.message(job))

    def _collect(self, work: Work, end: float) -> None:
        """Wait for an answer or a deadline, and take what there is."""
        busy = {worker.connection: worker for worker in self._busy()}
        first = min([end, *(worker.deadline for worker in busy.values())])
        for connection in wait(list(busy), max(0.0, first - time.monotonic())):
            self._receive(busy[connection], connection, work)
        for worker in self._busy():
            is_late = worker.deadline <= time.monotonic()
            if is_late and not worker.connection.poll():  # an answer that is there counts, however late we look
                self._fail_worker(worker, work, TIMEOUT, "timeout", f"no answer within {self.timeout_s} s")

    def _receive(self, worker: Worker, connection: Connection, work: Work) -> None:
        try:
            data = connection.recv_bytes()
        except BlockingIOError:
            self._fail_worker(worker, work, TIMEOUT, "timeout", "the worker process stalled while sending its answer")
            return
        except (EOFError, OSError):
            self._fail_worker(worker, work, ERROR, "death", "the worker process died")
            return
        if data == READY:
            worker.deadline = time.monotonic() + self.timeout_s
            return
        answer = json.loads(data)
        if "outcomes" in answer:
            work.succeed(worker.calls.popleft(), answer["outcomes"])
        elif len(worker.calls[0].rows) > 1:
            self._fail_worker(worker, work, ERROR, **answer)
        else:
            work.fail(worker.calls.popleft(), ERROR, **answer)
        worker.deadline = time.monotonic() + IMPORT_TIMEOUT_S

    def _fail_worker(self, worker: Worker, work: Work, status: str, kind: str, details: str) -> None:
        """Drop a worker whose first call failed; its other calls go to a fresh one."""
        work.fail(worker.calls.popleft(), status, kind, details)
        if worker.calls:
            work.jobs.appendleft(list(worker.calls))
        self._remove(worker)

    def _remove(self, worker: Worker) -> None:
        self.workers.remove(worker)
        worker.kill()


def make_pool(rewards: RewardsConfig) -> Pool:
    """The pool that a config asks for."""
    return Pool(workers=rewards.workers, timeout_s=rewards.timeout_s, step_timeout_s=rewards.step_timeout_s)
