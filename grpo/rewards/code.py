"""Rewards for code: does it parse, does it run, which share of the tests does it pass. Used by the task `code`.

A row has tests as MBPP (`test_list`, optional `test_imports` and `test_setup_code`) or as HumanEval (`test`, which
defines `check`, with `entry_point`; the program then begins with the question). Programs run in a sandbox.
"""

from __future__ import annotations

import ast
import builtins
import re
import warnings
from functools import lru_cache
from typing import Any, NamedTuple

from grpo.rewards.sandbox import Sandbox, Verdict, judge_program

_FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)


class Tests(NamedTuple):
    """What judges a program: code before the tests, the tests, and the names that the program must define."""

    setup: str
    tests: tuple[str, ...]
    functions: tuple[str, ...]
    head: str  # how the program begins: a completion goes on from here


def extract_code(completion: str) -> str:
    """The first fenced block, also where its end is missing; without a fence the whole text."""
    match = _FENCE.search(completion)
    return match[1] if match else completion


def read_tests(row: dict[str, Any]) -> Tests:
    """The tests in a row's columns; ValueError, SyntaxError, KeyError or TypeError where they cannot be run."""
    if name := row.get("entry_point"):
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"entry_point={name!r:.80} is not a function name")
        if "check" not in _names(row["test"], ast.Store):
            raise ValueError(f"test={row['test']!r:.80} does not define a function `check`")
        return Tests(row["test"], (f"check({name})",), (name,), row.get("question") or "")
    if not row.get("test_list"):
        raise ValueError("no tests: neither `test_list` (a list of asserts) nor `test` with `entry_point`")
    for name, lines in (("test_list", "asserts"), ("test_imports", "imports")):
        value = row.get(name) or []
        if not isinstance(value, list) or not all(isinstance(line, str) for line in value):
            raise ValueError(f"{name}={value!r:.80} is not a list of {lines}")
    setup = "\n".join([*(row.get("test_imports") or []), row.get("test_setup_code") or ""])
    tests = tuple(row["test_list"])
    names = lambda sources, context: frozenset().union(*(_names(source, context) for source in sources))
    called = names(tests, ast.Load) - names([setup, *tests], ast.Store)
    # A builtin means Python's own, unless tests call nothing else and the reference defines it, as MBPP's `sum(a, b)`.
    missing = called - set(dir(builtins)) or called & _names(row.get("answer") or "", ast.Store)
    if not missing:
        raise ValueError(
            f"test_list={row['test_list']!r:.80} calls no function that a program could define; give the "
            "reference in `code`, or drop the row"
        )
    return Tests(setup, tests, tuple(sorted(missing)), "")


@lru_cache(maxsize=1024)  # the tests of a row are read for each of its completions, and by each component
def _names(source: str, context: type) -> frozenset[str]:
    """Names that code reads (ast.Load), or that it defines in any way (ast.Store)."""
    found, defines = set(), context is ast.Store
    with warnings.catch_warnings(action="ignore"):  # warnings of the compiler would go to the terminal
        tree = ast.parse(source)
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=used) if isinstance(used, context):
                found.add(name)
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.arg(arg=name) if defines:
                found.add(name)
            case ast.alias(name=name, asname=other) if defines:
                found.add((other or name).split(".")[0])
    return frozenset(found)


def parses(completions: list[str], **columns: list) -> list[float]:
    """1 where the code is Python and defines what the tests call."""
    return [float(_defines(*pair)) for pair in _programs(completions, columns)]


def runs(completions: list[str], *, sandbox: Sandbox, **columns: list) -> list[float]:
    """1 where it loads and answers every test in time: wrong answers count as running, exceptions do not."""
    return [float(_verdict(sandbox, *pair).ran) for pair in _programs(completions, columns)]


def tests_passed(completions: list[str], *, sandbox: Sandbox, **columns: list) -> list[float]:
    """The share of the tests that pass."""
    verdicts = [_verdict(sandbox, *pair) for pair in _programs(completions, columns)]
    return [verdict.passed / verdict.total for verdict in verdicts]


def _programs(completions: list[str], columns: dict[str, list]) -> list[tuple[str, Tests]]:
    rows = [read_tests({name: column[i] for name, column in columns.items()}) for i in range(len(completions))]
    codes = map(extract_code, completions)
    # A head that nothing follows would be a function that returns None, and be paid for.
    return [(tests.head + code if code.strip() else "", tests) for code, tests in zip(codes, rows, strict=True)]


def _defines(program: str, tests: Tests) -> bool:
    try:
        return set(tests.functions) <= _names(program, ast.Store)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # a zero byte, or nesting without end
        return False


@lru_cache(maxsize=1024)  # `runs` and `tests_passed` ask for the same verdict, one after the other
def _verdict(sandbox: Sandbox, program: str, tests: Tests) -> Verdict:
    return judge_program(sandbox, program, tests.setup, tests.tests, tests.functions)
