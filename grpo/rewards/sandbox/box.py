"""Starts and stops one guest process behind the walls that this machine offers. Used by the judge."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from grpo.rewards.sandbox import guest, launcher

ISOLATED = ("-I", "-S", "-B")  # no environment, no user site, no site-packages, no files written
START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 5.0
UNUSED_UID = 2_000_000_000  # + the judge's process id: far above what any distribution hands out, and one per judge
PREFIXES = ("/usr", "/usr/local", "")  # and Python's own
PARTS = ("bin", "sbin", "lib", "lib32", "lib64")  # of each; others may be a user's, as /usr/src/app in containers
FILES = ("/usr/share/zoneinfo", "/etc/ld.so.cache")


class SandboxError(Exception):
    """The walls could not be put up: no fault of the program, which gets no verdict."""


class Expired(BaseException):
    """The deadline has passed. Not an Exception: what runs under it must not catch it by accident."""


@dataclass(frozen=True)
class Sandbox:
    """Walls and limits; every program gets a fresh process behind them.

    backend: "namespaces", "unsafe_subprocess" or the path of bwrap.  wall_s: seconds for the whole program with all its
    tests; memory_mib: address space of one process; processes: threads included; quota_mib: all files together;
    file_mib: one file; tests_mib: memory that the tests may take in the judge's own process, None: unlimited.
    """

    backend: str
    wall_s: float = 3.0
    memory_mib: int = 256
    processes: int = 8
    quota_mib: int = 16
    file_mib: int = 4
    tests_mib: int | None = 256

    @contextmanager
    def start(self) -> Iterator[subprocess.Popen]:
        """A guest behind the walls that has said hello; SandboxError if none does. At the end nothing of it is left."""
        command = [sys.executable, *ISOLATED, launcher.__file__, json.dumps(self._settings())]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        # A session of its own: if killed with this process's group, the launcher could not kill what it started.
        process = subprocess.Popen(command, **pipes, env={}, cwd="/", start_new_session=True)
        try:
            _wait_for_hello(process)
            yield process
        finally:
            _stop(process)

    def _settings(self) -> dict:
        # Real paths of the base Python: uv and Homebrew use links as prefixes; a virtual environment may have a copy.
        python, base = (os.path.realpath(path) for path in (sys._base_executable, sys.base_prefix))
        command = [python, *ISOLATED, "-c", Path(guest.__file__).read_text()]
        folders: list[str] = []
        for folder in [*(f"{prefix}/{part}" for prefix in (*PREFIXES, base) for part in PARTS), *FILES]:
            is_inside = f"{folder}/".startswith(tuple(f"{known}/" for known in folders))
            if os.path.lexists(folder) and not is_inside:
                folders.append(folder)
        masked = {sysconfig.get_path(name, vars={"base": base}) for name in ("purelib", "platlib")}
        masked = sorted(path for path in masked if os.path.isdir(path) and path.startswith(tuple(folders)))
        is_bubblewrap = self.backend.startswith("/")
        return {
            "backend": self.backend,
            "command": self._bubblewrap(command, folders, masked) if is_bubblewrap else command,
            "folders": folders,
            "masked": masked,
            "quota_mib": self.quota_mib,
            "uid": UNUSED_UID + os.getpid(),
            "limits": {
                "RLIMIT_AS": self.memory_mib << 20,
                "RLIMIT_CPU": math.ceil(self.wall_s) + 1,
                "RLIMIT_NPROC": self.processes + 2 * is_bubblewrap,  # bwrap has a process outside and one inside
                "RLIMIT_FSIZE": self.file_mib << 20,
                "RLIMIT_NOFILE": 32,
                "RLIMIT_CORE": 0,
                "RLIMIT_MEMLOCK": 0,
                "RLIMIT_MSGQUEUE": 0,
            },
        }

    def _bubblewrap(self, command: list[str], folders: list[str], masked: list[str]) -> list[str]:
        mounts = []
        for folder in folders:
            is_link = os.path.islink(folder)
            mounts += ["--symlink", os.readlink(folder), folder] if is_link else ["--ro-bind", folder, folder]
        for folder in masked:
            mounts += ["--tmpfs", folder, "--remount-ro", folder]
        for device in launcher.DEVICES:
            mounts += ["--dev-bind", device, device]
        walls = ["--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--new-session"]
        files = ["--size", str(self.quota_mib << 20), "--tmpfs", "/tmp", "--remount-ro", "/", "--chdir", "/tmp"]
        return [self.backend, *walls, "--cap-drop", "ALL", *mounts, *files, "--", *command]


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raises Expired in the main thread after so many seconds, wherever it then is."""

    def expire(number: int, frame: object) -> None:
        raise Expired

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.1)  # repeated: one may be raised where it is swallowed
    try:
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:  # once more: it may have expired just before it was cancelled
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def memory_bound(mib: int | None) -> Iterator[None]:
    """MemoryError if this process takes `mib` more: a test may do `answer % 3`, and the answer be "%999999999d"."""
    if mib is None:
        yield
        return
    limits = soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    bound = pages * resource.getpagesize() + (mib << 20)
    resource.setrlimit(resource.RLIMIT_AS, (bound if soft == resource.RLIM_INFINITY else min(bound, soft), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def _wait_for_hello(process: subprocess.Popen) -> None:
    try:
        with deadline(START_TIMEOUT_S):
            if guest.receive(process.stdout, limit=100) != {"hello": 1}:
                raise SandboxError("unexpected first message from the sandbox process")
    except EOFError:
        said = process.stderr.read().decode(errors="replace").strip()[-500:]
        raise SandboxError(said or "the sandbox process exited at start-up") from None
    except Expired:
        raise SandboxError(f"the sandbox process did not start within {START_TIMEOUT_S} s") from None


def _stop(process: subprocess.Popen) -> None:
    """End the launcher, which kills everything behind the walls and waits for it: when it has ended, all has."""
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()  # everything inside dies with it
        process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        with suppress(BrokenPipeError):  # a message that nobody reads any more
            pipe.close()
