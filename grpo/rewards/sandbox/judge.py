"""Runs tests of a program that it shares no process with: the verdict cannot be forged from inside.

The tests are Python code, such as `assert add(1, 2) == 3`, and run here, in the reward worker. `add` is a stand-in that
sends its arguments to the guest and returns the answer as plain data of builtin types: no `__eq__` of the program's
own, no exception class of its own, no pickle. Arguments and answers must therefore be plain data (numbers, text,
bytes, lists, tuples, sets, dicts, None); a function that changes its arguments in place changes a copy.

Tests come with the data set and are trusted as a reward function is: only programs run behind the walls.

A self-test first tries whether the walls hold, by programs that attack them: they fork past the limit, fill memory and
disk, open the network, read a planted secret, make themselves root of a new namespace. None of these may succeed.
"""

from __future__ import annotations

import builtins
import logging
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from grpo.rewards.sandbox.box import START_TIMEOUT_S, Expired, Sandbox, SandboxError, deadline, memory_bound
from grpo.rewards.sandbox.guest import decode, encode, receive, send

logger = logging.getLogger(__name__)

MAX_ANSWER_BYTES = 1 << 16  # a set of more numbers with equal hashes takes minutes, which no deadline interrupts


@dataclass(frozen=True)
class Verdict:
    """passed of total tests; `ran`: it loaded, and no test raised (but AssertionError), killed it or took too long."""

    ran: bool
    passed: int
    total: int


class ProgramError(Exception):
    """The program raised an exception that is not a builtin one, or its arguments or answer are not plain data."""


class _Dead(BaseException):
    """The program is gone; no test may catch this."""


def judge_program(
    sandbox: Sandbox, program: str, setup: str, tests: Sequence[str], functions: Sequence[str]
) -> Verdict:
    """The verdict on a program; `functions` are the names that the tests call.

    setup: Python code before the tests (imports, helpers, a `check` function).  Raises SandboxError where the walls
    fail, and whatever setup raises: neither is a fault of the program.
    """
    with sandbox.start() as process:
        names: dict[str, Any] = {name: _stand_in(process, name) for name in functions}
        exec(setup, names)
        passed, crashed = 0, False
        try:
            with memory_bound(sandbox.tests_mib), deadline(sandbox.wall_s):
                if "raised" in _request(process, program):
                    return Verdict(False, 0, len(tests))
                for test in tests:
                    try:
                        exec(test, dict(names))
                        passed += 1
                    except AssertionError:
                        continue
                    except Exception:  # of the test or of the program: not passed either way
                        crashed = True
        except (_Dead, Expired):
            crashed = True
    return Verdict(not crashed, passed, len(tests))


def _stand_in(process: subprocess.Popen, name: str) -> Any:
    """A function whose calls are carried out in the guest."""

    def call(*arguments: Any, **keywords: Any) -> Any:
        try:
            message = {"function": name, "arguments": encode(list(arguments)), "keywords": encode(keywords)}
        except TypeError as error:  # not passed on: a test might expect a TypeError of the program
            raise ProgramError(f"an argument of {name} cannot be sent: {error}") from None
        answer = _request(process, message)
        if "value" not in answer:
            raise _builtin_exception(answer.get("raised"))
        try:
            return decode(answer["value"])
        except (ValueError, TypeError, RecursionError) as error:
            raise ProgramError(f"the answer of {name} cannot be read: {error}") from None

    call.__name__ = name
    return call


def _request(process: subprocess.Popen, message: Any) -> dict:
    try:
        send(process.stdin, message)
        answer = receive(process.stdout, MAX_ANSWER_BYTES)
    except (EOFError, OSError, ValueError, RecursionError):  # closed, too long, or no JSON
        raise _Dead from None
    return answer if isinstance(answer, dict) else {}


def _builtin_exception(name: Any) -> Exception:
    """What to raise in the test, which may expect, say, a ValueError. Never an AssertionError, which would pass for its
    own, nor a StopIteration, which would end its `map` early."""
    kind = getattr(builtins, name, None) if isinstance(name, str) else None
    if isinstance(kind, type) and issubclass(kind, Exception) and kind not in (AssertionError, StopIteration):
        with suppress(TypeError):  # one that takes other arguments, such as UnicodeDecodeError
            return kind("raised by the program")
    return ProgramError(str(name)[:80])


ATTACKS = """
def answer_honestly():
    return True

def fork_past(limit):
    import os, time
    for count in range(limit):
        if os.fork() == 0:
            time.sleep(2)
            os._exit(0)
    return True

def allocate(mib):
    return len(bytearray(mib << 20)) > 0

def write_past(mib):
    import os
    made, written = [], 0
    for folder in ("/tmp", "/dev", "/dev/shm", "/var/tmp", "/"):
        for i in range(mib):
            try:
                with open(f"{folder}/grpo_self_test_{i}", "xb", buffering=0) as file:
                    made.append(file.name)
                    written += file.write(bytes(1 << 20))
            except OSError:
                break
    for name in made:
        os.remove(name)
    return written > mib << 20

def connect(port):
    import socket
    socket.create_connection(("127.0.0.1", port), timeout=1)
    return True

def find(path, secret):
    import os, pathlib
    candidates = [path, *pathlib.Path("/proc").glob("*/environ")]
    seen = [str(dict(os.environ))]
    for candidate in candidates:
        try:
            seen.append(pathlib.Path(candidate).read_text(errors="replace"))
        except OSError:
            pass
    return any(secret in text for text in seen)

def become_root():
    import ctypes
    return ctypes.CDLL(None).unshare(0x10000000) == 0
"""


def self_test(sandbox: Sandbox) -> list[str]:
    """The attacks that the walls let through: none, if they are sound. SandboxError where they cannot be put up."""
    secret = secrets.token_hex(16)
    with (
        tempfile.NamedTemporaryFile("w", prefix="grpo_secret_") as file,
        socket.create_server(("127.0.0.1", 0)) as host,
    ):
        file.write(secret)
        file.flush()
        os.chmod(file.name, 0o644)
        attacks = {
            "more processes than its limit": f"fork_past({3 * sandbox.processes + 10})",
            "more memory than its limit": f"allocate({2 * sandbox.memory_mib})",
            "more on disk than its quota": f"write_past({2 * sandbox.quota_mib})",
            "the network": f"connect({host.getsockname()[1]})",
            "a file of the user": f"find({file.name!r}, {secret!r})",
            "root rights in a new namespace": "become_root()",
        }
        # Time enough: a slow attack is not a failed one. No bound on tests: it would bind the trainer's other threads.
        patient = replace(sandbox, wall_s=START_TIMEOUT_S, tests_mib=None)

        def succeeds(call: str) -> bool:
            name = call.partition("(")[0]
            return judge_program(patient, ATTACKS, "", [f"assert {call} is True"], [name]).passed == 1

        if not succeeds("answer_honestly()"):
            raise SandboxError("a harmless test program got no answer")
        return [name for name, call in attacks.items() if succeeds(call)]


@lru_cache
def find_sandbox(setting: str, wall_s: float) -> Sandbox:
    """The sandbox that config field rewards.sandbox asks for, tested once a process; ValueError where there is none."""
    if sys.platform != "linux":
        message = f"running the model's programs needs Linux, and this is {sys.platform}; use a Linux container"
        raise ValueError(f"{message} or virtual machine, or another task")
    if setting == "unsafe_subprocess":
        logger.warning("rewards.sandbox=unsafe_subprocess: the model's code can access your files and the network")
        return Sandbox(setting, wall_s)
    failures = []
    for name in ("bubblewrap", "namespaces") if setting == "auto" else (setting,):
        backend = shutil.which("bwrap") if name == "bubblewrap" else name
        try:
            if backend is None:
                raise SandboxError("bwrap is not installed")
            let_through = self_test(sandbox := Sandbox(backend, wall_s))
            if not let_through:
                return sandbox
            raise SandboxError(f"lets through {', '.join(let_through)}")
        except SandboxError as error:
            failures.append(f"{name}: {error}")
    raise ValueError(
        f"the model's code would run unprotected here ({'; '.join(failures)}); install bubblewrap, allow user "
        "namespaces or run as root; --rewards.sandbox unsafe_subprocess runs it unprotected: use that only on a "
        "disposable machine"
    )
