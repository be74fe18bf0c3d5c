"""A worker process: reward calls come in over a pipe, outcomes go out. Started by grpo.rewards.pool, without torch.

A job is a pickled list of calls (component name, packed function, completions, columns). Each is answered twice:
READY once its function is imported, then a JSON object, {"outcomes": [[value, status], ...]} or the failure,
{"kind": exception name, "details": traceback}. JSON: the parent never unpickles what came from here.
"""

from __future__ import annotations

import ctypes
import io
import json
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable
from functools import lru_cache
from multiprocessing.connection import Connection
from types import FunctionType
from typing import Any

from grpo.rewards.runner import call
from grpo.user_code import load_object

READY = b""
MAX_DETAILS = 4000  # characters of a traceback
PR_SET_PDEATHSIG = 1


class _Packer(pickle.Pickler):
    """Pickles functions by name; those of a file that cannot be imported, by file and name."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, FunctionType):
            module = sys.modules.get(value.__module__)
            is_found = getattr(module, value.__qualname__, None) is value and value.__module__ != "__main__"
            if "<" not in value.__qualname__ and not is_found:
                if "__file__" not in value.__globals__:  # typed into a notebook or at a prompt
                    raise pickle.PicklingError(f"{value.__qualname__} is not defined in a file")
                return load_object, (f"{os.path.abspath(value.__globals__['__file__'])}:{value.__qualname__}",)
        return NotImplemented


def pack_function(name: str, function: Callable) -> bytes:
    """What a worker unpacks to the same function; ValueError for one that exists in this process only."""
    buffer = io.BytesIO()
    try:
        _Packer(buffer).dump(function)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"reward {name!r} cannot be sent to a worker process ({error}); define it by `def` at the top of a file"
        ) from None
    return buffer.getvalue()


unpack_function = lru_cache(pickle.loads)


def main() -> None:
    """Serves the pipe whose file descriptor is the first argument, until the parent closes it."""
    if sys.platform == "linux":  # a hung call must not outlive a parent that was killed
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    connection, own_id = Connection(int(sys.argv[1])), os.getpid()
    while True:
        try:
            job = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        for name, packed, completions, columns in job:
            answer = _answer(connection, name, packed, completions, columns)
            if os.getpid() != own_id:
                os._exit(1)  # a child that the function forked and that returned from it, too: no second answer
            connection.send_bytes(answer)


def _answer(connection: Connection, name: str, packed: bytes, completions: list[str], columns: dict) -> bytes:
    try:
        function = unpack_function(packed)
        connection.send_bytes(READY)
        return json.dumps({"outcomes": call(name, function, completions, columns)}).encode()
    except BaseException as error:  # SystemExit too: whatever a user's function does, the parent gets an answer
        return json.dumps({"kind": type(error).__name__, "details": traceback.format_exc()[-MAX_DETAILS:]}).encode()
