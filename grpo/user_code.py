"""Names of a user's own functions and classes, `path/to/file.py:name` or `module:name`, and what they stand for.

Imports nothing of ours: tasks, rewards and surrogates are all found here, in worker processes too.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path


def located(name: str) -> str:
    """`path/to/file.py:name` with the file's whole path, which holds in any folder; another name as it is."""
    source, _, rest = name.rpartition(":")
    return f"{os.path.abspath(source)}:{rest}" if source.endswith(".py") else name


@lru_cache
def load_object(path: str) -> Callable:
    """The function or class of `path/to/file.py:name` or `module:name`; a file is run once, under a name of its own.

    ValueError where there is no such file, module or name.
    """
    source, _, name = path.rpartition(":")
    if not source.endswith(".py"):
        try:
            module = importlib.import_module(source)
        except (ModuleNotFoundError, ValueError) as error:  # ValueError: no module is named
            raise ValueError(f"{path!r}: {error}; give path/to/file.py:name or module:name") from error
    elif not Path(source).is_file():
        raise ValueError(f"{path!r}: no file {source!r}; give path/to/file.py:name")
    else:
        spec = importlib.util.spec_from_file_location(f"file_{Path(source).stem}", source)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # @dataclass looks for it there
        try:
            spec.loader.exec_module(module)
        finally:
            del sys.modules[spec.name]  # else its functions would be pickled by a name that no worker can import
    found = getattr(module, name, None)
    if not callable(found):
        raise ValueError(f"{path!r}: {source} defines no function or class {name!r}")
    return found
