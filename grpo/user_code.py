"""Names of a user's own functions and classes, `path/to/file.py:name` or `module:name`, and what they stand for.

Imports nothing of ours: tasks, rewards and surrogates are all found here, in worker processes too.
"""

from __future__ import annotations

import importlib
import os
import runpy
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace


def located(name: str) -> str:
    """`path/to/file.py:name` with the file's whole path, which holds in any folder; another name as it is."""
    source, _, rest = name.rpartition(":")
    return f"{os.path.abspath(source)}:{rest}" if source.endswith(".py") else name


def load_object(path: str) -> Callable:
    """The function or class of `path/to/file.py:name` or `module:name`; ValueError where there is no such thing."""
    source, _, name = path.rpartition(":")
    if not source.endswith(".py"):
        try:
            module = importlib.import_module(source)
        except (ModuleNotFoundError, ValueError) as error:  # ValueError: no module is named
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
    """What a file defines, run once, as a module that only @dataclass finds, while it runs: by its name in sys.modules
    its functions would be pickled, and no worker could import it."""
    return SimpleNamespace(**runpy.run_path(file, run_name=f"file_{Path(file).stem}"))
