"""Loads a user's own functions and classes by name, `path/to/file.py:name` or `module:name`.

For tasks, rewards and surrogates, in worker processes too. Imports nothing else of this package.
"""

from __future__ import annotations

import importlib
import os
import runpy
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace


def with_absolute_path(name: str) -> str:
    """`path/to/file.py:name` with an absolute path; any other name unchanged."""
    source, _, rest = name.rpartition(":")
    return f"{os.path.abspath(source)}:{rest}" if source.endswith(".py") else name


def load_object(path: str) -> Callable:
    """The function or class of `path/to/file.py:name` or `module:name`. ValueError if there is none."""
    source, _, name = path.rpartition(":")
    if not source.endswith(".py"):
        try:
            module = importlib.import_module(source)
        except (ModuleNotFoundError, ValueError) as error:  # ValueError: the module's name is empty
            raise ValueError(f"{path!r}: {error}; give path/to/file.py:name or module:name") from error
    elif not Path(source).is_file():
        raise ValueError(f"{path!r}: no file {source!r}; give path/to/file.py:name")
    else:
        module = _run_file(os.path.abspath(source))
    found = getattr(module, name, None)
    if not callable(found):
        raise ValueError(f"{path!r}: {source} defines no function or class {name!r}")
    return found


@lru_cache
def _run_file(file: str) -> SimpleNamespace:
    """Run a file once; returns what it defines. While it runs @dataclass finds it in sys.modules as file_STEM, but it
    does not stay there: its functions would be pickled by that name, which no worker process could import."""
    return SimpleNamespace(**runpy.run_path(file, run_name=f"file_{Path(file).stem}"))
