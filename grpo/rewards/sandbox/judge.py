"""Runs tests of a program that it shares no process with: the verdict cannot be forged from inside.

The tests are Python code, such as `assert add(1, 2) == 3`, and run here, in the reward worker. `add` is a stand-in that
sends its arguments to the guest and returns the answer as plain data of builtin types: no `__eq__` of the program's
own, no exception class of its own, no pickle. Arguments and answers must therefore be plain data (numbers, text,
bytes, lists, tuples, sets, dicts, None); a function that changes its arguments in place changes a copy.

Tests come with the data set and are trusted as a reward function is: only programs run behind the walls.
"""

from __future__ import annotations

import builtins
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from grpo.rewards.sandbox.box import Expired, Sandbox, deadline
from grpo.rewards.sandbox.guest import decode, encode, receive, send

MAX_ANSWER_BYTES = 1 << 20


@dataclass(frozen=True)
class Verdict:
    """passed of total tests; `ran`: it loaded, and no test ended in an exception, in death or out of time."""

    ran: bool
    passed: int
    total: int


class ProgramError(Exception):
    """The program raised an exception that is no builtin one, or answered what cannot be read."""


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
            with deadline(sandbox.wall_s):
                if "raised" in _exchange(process, program):
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
    """A function that is called in the guest."""

    def call(*arguments: Any, **keywords: Any) -> Any:
        message = {"function": name, "arguments": encode(list(arguments)), "keywords": encode(keywords)}
        answer = _exchange(process, message)
        if "value" not in answer:
            raise _builtin_exception(answer.get("raised"))
        try:
            return decode(answer["value"])
        except (ValueError, TypeError, RecursionError) as error:
            raise ProgramError(f"the answer of {name} cannot be read: {error}") from None

    call.__name__ = name
    return call


def _exchange(process: subprocess.Popen, message: Any) -> dict:
    try:
        send(process.stdin, message)
        answer = receive(process.stdout, MAX_ANSWER_BYTES)
    except (EOFError, OSError, ValueError, RecursionError):  # closed, too long, or no JSON
        raise _Dead from None
    return answer if isinstance(answer, dict) else {}


def _builtin_exception(name: Any) -> Exception:
    """A test may expect a ValueError; an AssertionError would pass for the test's own."""
    kind = getattr(builtins, name, None) if isinstance(name, str) else None
    if isinstance(kind, type) and issubclass(kind, Exception) and kind is not AssertionError:
        with suppress(TypeError):  # one that takes other arguments, such as UnicodeDecodeError
            return kind("raised by the program")
    return ProgramError(str(name)[:80])
