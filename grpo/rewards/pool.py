"""The runner's worker processes: reward functions under a deadline, so that no reward can hurt the run.

A Pool is called like `score_texts` (grpo.rewards.runner) and returns the same table. Each of its threads has a worker,
sends it one call after the other and waits for the answer. Workers are spawned, never forked, each the leader of a
session of its own; one that is late is killed with its whole process group and replaced.

A call that fails (raises, is late, dies, returns the wrong length) on several completions is made again for each alone,
in a fresh worker; what fails alone gets its status. A component that was late once is called with single
completions for the rest of the step: a batch that will be late wastes a whole deadline.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import suppress
from threading import get_ident
from typing import NamedTuple

from grpo.config import RewardsConfig
from grpo.records import ERROR, TIMEOUT
from grpo.rewards.runner import Outcome, Reward, Table, log_once, take_rows
from grpo.rewards.worker import READY, pack_function

IMPORT_TIMEOUT_S = 60.0  # for a worker to start and import what defines a function; not part of a call's deadline
MAX_DEFAULT_WORKERS = 16


class Call(NamedTuple):
    """One component of some rows."""

    component: int
    rows: Sequence[int]

    def one_by_one(self) -> list[Call]:
        return [Call(self.component, [i]) for i in self.rows]


class Worker:
    """One process that makes one call at a time."""

    def __init__(self) -> None:
        self.connection, theirs = multiprocessing.Pipe()
        code = "from grpo.rewards.worker import main; main()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            start_new_session=True,
        )
        theirs.close()

    def ask(self, message: bytes, timeout_s: float) -> dict:
        """The answer of grpo.rewards.worker; with a `status`, where it is late or has died: it is of no use then."""
        try:
            self.connection.send_bytes(message)
            answer = self._receive(IMPORT_TIMEOUT_S)
            return json.loads(self._receive(timeout_s) if answer == READY else answer)
        except TimeoutError as error:
            return {"status": TIMEOUT, "kind": "timeout", "details": str(error)}
        except (EOFError, OSError):
            return {"status": ERROR, "kind": "death", "details": "its worker process died"}

    def _receive(self, timeout_s: float) -> bytes:
        if not self.connection.poll(timeout_s):
            raise TimeoutError(f"no answer within {timeout_s} s")
        return self.connection.recv_bytes()

    def kill(self) -> None:
        """End it and every process of its group. Once: the number may be another's afterwards."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Step:
    """One table as it fills, and what its calls need."""

    def __init__(self, completions: list[str], columns: dict[str, list], rewards: dict[str, Reward]):
        self.completions, self.columns, self.rewards = completions, columns, rewards
        self.functions = [(name, pack_function(name, reward.function)) for name, reward in rewards.items()]
        unscored = Outcome(math.nan, TIMEOUT)  # what the step's deadline leaves behind
        self.table = [[unscored] * len(rewards) for _ in completions]
        self.late: set[int] = set()  # components that are called with single completions
        self.is_over = False  # nothing more is asked or recorded

    def jobs(self, workers: int) -> Iterator[list[Call]]:
        """At most a worker's even share of rows, and the components that take as many: for one worker, in turn."""
        every = range(len(self.completions))
        even_share = max(1, -(-len(every) // workers))
        sizes = [min(reward.batch_size, even_share) for reward in self.rewards.values()]
        for size in dict.fromkeys(sizes):
            for start in every[::size]:
                yield [Call(k, every[start : start + size]) for k, own in enumerate(sizes) if own == size]

    def calls(self, job: list[Call]) -> Iterator[Call]:
        for call in job:
            yield from call.one_by_one() if call.component in self.late else [call]

    def message(self, call: Call) -> bytes:
        return pickle.dumps((*self.functions[call.component], *take_rows(self.completions, self.columns, call.rows)))

    def record(self, call: Call, outcomes: list) -> None:
        for row, outcome in zip(call.rows, outcomes, strict=True):
            self.table[row][call.component] = Outcome(*outcome)

    def fail(self, call: Call, answer: dict) -> list[Call]:
        """A status where the call was for one completion; else the calls that try each alone."""
        name, _ = self.functions[call.component]
        log_once(name, answer["kind"], answer["details"])
        if len(call.rows) > 1:
            return call.one_by_one()
        self.record(call, [(math.nan, answer.get("status", ERROR))])
        return []


class Pool:
    """`pool(completions, columns, rewards) -> [N][K] outcomes`, by `workers` processes (0: this rank's share of cores).

    timeout_s: of one call.  step_timeout_s: of the whole table; what has no outcome by then is `timeout`.
    Workers start when there is work for them and stay; `with Pool(...) as pool` ends them.
    """

    def __init__(self, *, workers: int, timeout_s: float, step_timeout_s: float):
        self.size = workers or default_workers()
        self.timeout_s, self.step_timeout_s = timeout_s, step_timeout_s
        self.workers: dict[int, Worker] = {}  # by thread
        self.threads = ThreadPoolExecutor(self.size)  # kept: a worker ends with the thread that started it

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exception: object) -> None:
        self._drop(*self.workers)
        self.threads.shutdown(cancel_futures=True)

    def __call__(self, completions: list[str], columns: dict[str, list], rewards: dict[str, Reward]) -> Table:
        step, end = Step(completions, columns, rewards), time.monotonic() + self.step_timeout_s
        pending = {self.threads.submit(self._work, job, step) for job in step.jobs(self.size)}
        try:
            while pending and time.monotonic() < end:
                done, pending = wait(pending, end - time.monotonic(), FIRST_COMPLETED)
                again = [single for future in done for failure in future.result() for single in step.fail(*failure)]
                pending |= {self.threads.submit(self._work, [single], step) for single in again}
        finally:
            step.is_over = True
            if pending:  # late, or interrupted: what still runs is of no use to the next step
                for future in pending:
                    future.cancel()
                self._drop(*self.workers)
        return [list(row) for row in step.table]

    def _work(self, job: list[Call], step: Step) -> list[tuple[Call, dict]]:
        """In a thread: makes the calls of a job, and returns those that failed, each with how."""
        thread, failed = get_ident(), []
        for call in step.calls(job):
            worker = self.workers.get(thread)
            if worker is None:
                worker = self.workers[thread] = Worker()
            if step.is_over:  # looked at once the worker is listed: else the end of the step might miss it
                break
            answer = worker.ask(step.message(call), self.timeout_s)
            if step.is_over:  # it was killed under this call
                break
            if "outcomes" in answer:
                step.record(call, answer["outcomes"])
                continue
            failed.append((call, answer))
            if answer.get("status") == TIMEOUT:
                step.late.add(call.component)
            if "status" in answer or len(call.rows) > 1:
                self._drop(thread)
        return failed

    def _drop(self, *threads: int) -> None:
        """End the workers of threads; each starts another when it needs one."""
        for thread in threads:
            worker = self.workers.pop(thread, None)  # by the thread itself, or at the end of a step: once
            if worker is not None:
                worker.kill()


def make_pool(rewards: RewardsConfig) -> Pool:
    """The pool that a config asks for."""
    return Pool(workers=rewards.workers, timeout_s=rewards.timeout_s, step_timeout_s=rewards.step_timeout_s)


def default_workers() -> int:
    """The cores that this process may use, shared with the other ranks of its machine."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(MAX_DEFAULT_WORKERS, len(os.sched_getaffinity(0)) // local_ranks))
