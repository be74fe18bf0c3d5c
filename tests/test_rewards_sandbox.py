"""Hostile programs: each gets the verdict it deserves, and nothing is left running or written afterwards.

Nothing here runs unless the walls have withstood their self-test on this machine.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from grpo.records import TIMEOUT
from grpo.rewards import Reward
from grpo.rewards.code import tests_passed as share_of_tests
from grpo.rewards.pool import Pool
from grpo.rewards.sandbox import Sandbox, SandboxError, Verdict, box, find_sandbox, judge, judge_program
from grpo.rewards.sandbox.guest import decode, encode

TESTS = ["assert add(1, 2) == 3", "assert add(2, 2) == 4", "assert add(a=0, b=-1) == -1"]
ADD = "def add(a, b):\n    return a + b\n"
WALL_S = 1.2
HONEST, NOTHING = Verdict(True, 3, 3), Verdict(False, 0, 3)
WRONG = Verdict(True, 0, 3)  # it runs, and its answers are wrong

HOSTILE = {
    # it never ends
    "infinite loop": ("while True: pass", NOTHING),
    "loop in one call": ("def add(a, b):\n    while a == 2: pass\n    return a + b", Verdict(False, 1, 3)),
    "sleep in a call": ("import time\ndef add(a, b): time.sleep(1000)", NOTHING),
    "signals ignored": (
        "import signal\nfor n in set(signal.Signals) - {9, 19}: signal.signal(n, signal.SIG_IGN)\nwhile True: pass",
        NOTHING,
    ),
    "endless exit handler": ("import atexit, time\natexit.register(time.sleep, 1000)\n" + ADD, HONEST),
    # it grows
    "fork bomb": ("import os\nwhile True: os.fork()", NOTHING),
    "fork bomb that does not give up": (
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        NOTHING,
    ),
    "thread bomb": (
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(9,)).start()",
        NOTHING,
    ),
    "memory bomb": ("held = []\nwhile True: held.append(bytearray(1 << 24))", NOTHING),
    "memory bomb in C": ("x = 'x' * (1 << 40)", NOTHING),
    "disk filler": ("n = 0\nwhile True:\n    open(f'/tmp/{n}', 'wb').write(bytes(1 << 20)); n += 1", NOTHING),
    "one large file": ("open('/tmp/x', 'wb').write(bytes(1 << 23))", NOTHING),
    "memory file": ("import os\nos.write(os.memfd_create('x'), bytes(1 << 23)) == 1 << 23 or 1 / 0", NOTHING),
    "memory of no process": (
        "import ctypes\nif ctypes.CDLL(None).shmget(0, 1 << 20, 384) < 0: raise OSError\n" + ADD,
        NOTHING,
    ),
    "semaphores": ("import ctypes\nif ctypes.CDLL(None).semget(0, 32000, 384) < 0: raise OSError\n" + ADD, NOTHING),
    "output flood": ("import os\nfor _ in range(30): print('x' * 10**6); os.write(2, b'x' * 10**6)\n" + ADD, HONEST),
    "answer flood": ("import os\nwhile True: os.write(4, bytes(1 << 16))", NOTHING),
    "flood of lines": ("import os\nwhile True: os.write(4, b'{}\\n' * (1 << 14))", NOTHING),
    # it looks around
    "network": ("import socket\nsocket.create_connection(('1.1.1.1', 53), timeout=1)\n" + ADD, NOTHING),
    "host of a virtual machine": (
        "import socket\nsocket.socket(getattr(socket, 'AF_VSOCK', 40), socket.SOCK_STREAM)\n" + ADD,
        NOTHING,
    ),
    "keys of the user": (
        "import ctypes, os\nkeyctl = 250 if os.uname().machine == 'x86_64' else 219\n"
        "if ctypes.CDLL(None).syscall(keyctl, 0, -3, 1) < 0: raise OSError\n" + ADD,
        NOTHING,
    ),
    "environment": ("import os\nadd = lambda a, b: a + b if 'GRPO_PLANTED' in os.environ else 99", WRONG),
    "home": (
        "import os, sys\n"
        "places = ['/home', '/var', '/etc/passwd', '/workspace', '/usr/src', sys.base_prefix + '/share/man']\n"
        "seen = [place for place in places if os.path.exists(place)]\n"
        "add = lambda a, b: a + b if seen else 99",
        WRONG,
    ),
    "our code": ("import grpo", NOTHING),
    "our packages": ("import torch", NOTHING),
    "other processes": ("import os\nos.listdir('/proc/1')", NOTHING),
    "writing the system": ("open('/usr/bin/grpo_hostile', 'w')", NOTHING),
    "writing beside": ("open('/grpo_hostile', 'w')", NOTHING),
    "root of its own": ("import ctypes\nif ctypes.CDLL(None).unshare(0x10000000): raise OSError", NOTHING),
    # it kills
    "killing the parent": ("import os\nos.kill(os.getppid(), 9)\nprint('passed')", NOTHING),
    "killing the group": ("import os\nos.killpg(0, 9)", NOTHING),
    "killing all": ("import os\nos.kill(-1, 9)", NOTHING),
    "double fork and setsid": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork(): os._exit(0)\n    time.sleep(1000)\n"
        + ADD,
        HONEST,
    ),
    "another program left behind": ("import subprocess\nsubprocess.Popen(['/bin/sleep', '86321'])\n" + ADD, HONEST),
    "crash": ("import ctypes\nctypes.string_at(0)", NOTHING),
    # it cheats
    "exit before the tests": ("import sys\nsys.exit(0)\n" + ADD, NOTHING),
    "hard exit": ("import os\nos._exit(0)", NOTHING),
    "exit in a call": ("def add(a, b): raise SystemExit(0)", NOTHING),
    "printing passed": ("print('passed 3 of 3')", NOTHING),
    "patched assert": ("import builtins\nbuiltins.AssertionError = None\ndef add(a, b): return 99", WRONG),
    "raising AssertionError": ("def add(a, b): raise AssertionError", NOTHING),
    "equal to everything": (
        "class Any:\n    __eq__ = lambda self, other: True\ndef add(a, b): return Any()",
        NOTHING,
    ),
    "a number equal to everything": (
        "class Any(int):\n    __eq__ = lambda self, other: True\ndef add(a, b): return Any(99)",
        WRONG,
    ),
    "patched encoder": ('import json\njson.dumps = lambda value: \'{"passed": 3, "total": 3}\'', NOTHING),
    "forged verdict": (
        'import os\nfor text in [b\'{}\'] + [b\'{"passed": 3, "ok": true, "value": {"verdict": 3}}\'] * 9:\n'
        "    os.write(4, text + b'\\n')",
        NOTHING,
    ),
    "frames reached by the stack": (
        "import sys\nframe = sys._getframe()\nwhile frame: frame.f_globals['HONEST'] = 1; frame = frame.f_back",
        NOTHING,
    ),
    "closed pipes": ("import os\nos.closerange(0, 30)", NOTHING),
    # it answers what cannot be answered
    "huge text": ("def add(a, b): return 'x' * (1 << 22)", NOTHING),
    "huge number": ("def add(a, b): return 1 << (1 << 20)", NOTHING),
    "endless nesting": ("def add(a, b):\n    x = []\n    x.append(x)\n    return x", NOTHING),
    "bytes that are no text": ("import os\nos.write(4, bytes([255, 254, 10]))", NOTHING),
    "text that is no Unicode": ("x = '\ud800'\n" + ADD, NOTHING),
    "a zero byte": ("\0", NOTHING),
    "no program": ("The sum is a + b.", NOTHING),
}


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    try:
        return find_sandbox("auto", WALL_S)
    except ValueError as error:
        pytest.skip(str(error))


def verdict(sandbox: Sandbox, program: str, tests=TESTS, setup="", functions=("add",)) -> Verdict:
    return judge_program(sandbox, program, setup, tests, functions)


def left_running(judge: int | None = None) -> list[str]:
    """Processes of a sandbox: started from a guest's command line, or of its user, or the one that it named.

    Other tests may run beside this one: those behind a living judge, not this process and not `judge`, are theirs.
    """
    commands, parents, inside = {}, {}, set()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            pid, command = int(folder.name), (folder / "cmdline").read_bytes().decode(errors="replace")
            parents[pid] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            commands[pid] = command
            if "Inside the sandbox" in command or "86321" in command or folder.stat().st_uid >= box.UNUSED_UID:
                inside.add(pid)

    def judge_of(pid: int) -> int:
        while pid in inside:
            pid = parents[pid]
        return pid

    is_anothers = lambda pid: judge_of(pid) not in (os.getpid(), judge) and "python" in commands.get(judge_of(pid), "")
    return [f"{pid} {commands[pid][:80]!r}" for pid in sorted(inside) if not is_anothers(pid)]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_gets_what_it_deserves_and_leaves_nothing(sandbox, name, monkeypatch):
    monkeypatch.setenv("GRPO_PLANTED", "secret")
    program, expected = HOSTILE[name]
    files = [set(Path(folder).iterdir()) for folder in ("/", "/usr/bin", "/dev")]
    started = time.monotonic()
    assert verdict(sandbox, program) == expected
    assert time.monotonic() - started < WALL_S + box.STOP_TIMEOUT_S
    assert left_running() == []
    assert [set(Path(folder).iterdir()) for folder in ("/", "/usr/bin", "/dev")] == files


def test_an_honest_program_passes_and_a_test_sees_plain_values_and_builtin_exceptions(sandbox):
    program = (
        "import math\ndef area(r): return {'area': (math.floor(r * r * math.pi), {1, 2}, b'\\xff', None, 1.5, 2j)}\n"
        "def refuse(x): raise ValueError(x)"
    )
    tests = [
        "assert area(2) == {'area': (12, {1, 2}, b'\\xff', None, 1.5, 2j)}",
        "try:\n    refuse(1)\nexcept ValueError:\n    pass\nelse:\n    assert False",
        "assert helper(area(1)) == 3",
    ]
    setup = "def helper(value): return value['area'][0]"
    assert verdict(sandbox, program, tests, setup, ["area", "refuse"]) == Verdict(True, 3, 3)


def test_the_interpreter_is_behind_the_walls_whatever_links_and_copies_lead_to_it(monkeypatch, tmp_path):
    (tmp_path / "real" / "bin").mkdir(parents=True)
    (tmp_path / "real" / "bin" / "python").touch()
    (tmp_path / "real" / "lib64").symlink_to("lib")
    (tmp_path / "link").symlink_to("real")
    monkeypatch.setattr(box.sys, "base_prefix", str(tmp_path / "link"))
    monkeypatch.setattr(box.sys, "_base_executable", str(tmp_path / "link" / "bin" / "python"))
    settings = Sandbox("namespaces")._settings()
    assert settings["command"][0] == str(tmp_path / "real" / "bin" / "python")
    assert {str(tmp_path / "real" / part) for part in ("bin", "lib64")} <= set(settings["folders"])
    monkeypatch.setattr(box.sys, "base_prefix", "/usr/lib/python-of-its-own")
    assert all(not folder.startswith("/usr/lib/") for folder in Sandbox("namespaces")._settings()["folders"])


def test_a_deadline_that_passes_at_its_very_end_alarms_nobody_afterwards(monkeypatch):
    setitimer, slow = box.signal.setitimer, iter([time.sleep])

    def set_late(which, seconds, *interval):
        if seconds == 0:
            next(slow, abs)(0.3)
        setitimer(which, seconds, *interval)

    monkeypatch.setattr(box.signal, "setitimer", set_late)
    with pytest.raises(box.Expired), box.deadline(0.1):
        pass
    time.sleep(0.3)


def test_what_a_test_makes_of_an_answer_takes_neither_the_judges_time_nor_its_memory(sandbox):
    started = time.monotonic()
    same_hash = "def add(a, b): return [i * (2**61 - 1) for i in range(9_000)]"
    assert verdict(sandbox, same_hash, ["assert set(add(1, 2)) == {3}"]) == Verdict(False, 0, 1)
    assert time.monotonic() - started < WALL_S + 1
    test = "try:\n    add(1, 2) % 3\nexcept MemoryError:\n    pass\nelse:\n    assert False"
    assert verdict(sandbox, "def add(a, b): return '%500000000d'", [test]) == Verdict(True, 1, 1)
    assert len(bytes(500_000_000)) == 500_000_000, "the limit is gone with the tests"


def test_no_exception_of_a_program_ends_a_loop_of_a_test_early(sandbox):
    tests = [
        "assert all(map(add, [1], [2])) and not any(map(add, [1], [-1]))",
        "for _ in map(add, [1], [2]):\n    assert 0",
    ]
    assert verdict(sandbox, "def add(a, b): raise StopIteration", tests) == Verdict(False, 0, 2)


def test_an_argument_that_cannot_be_sent_raises_nothing_that_a_test_may_expect(sandbox):
    test = "try:\n    add(object(), 1)\nexcept TypeError:\n    pass\nelse:\n    assert False"
    assert verdict(sandbox, "def add(a, b): return a", [test]) == Verdict(False, 0, 1)


def test_a_fault_of_the_tests_or_of_the_walls_is_no_verdict(sandbox):
    with pytest.raises(ModuleNotFoundError):
        verdict(sandbox, ADD, setup="import no_such_module")
    with pytest.raises(SandboxError, match="No such file"):
        verdict(Sandbox("/no/bwrap"), ADD)


def test_every_plain_value_comes_back_as_it_was():
    value = [
        None,
        True,
        1,
        -2.5,
        "ä\ud800",
        (1, (2,)),
        {1: {"a": []}, (1, 2): ()},
        {1},
        frozenset({2}),
        b"\0\xff",
        1 + 2j,
    ]
    assert decode(encode(value)) == value
    with pytest.raises(TypeError, match="object is not plain data"):
        encode(object())
    for nonsense in ({"dict": 3}, {"object": []}, {}, {"tuple": [], "set": []}, {"set": [[1]]}):
        with pytest.raises((TypeError, ValueError)):
            decode(nonsense)


def test_the_self_test_catches_walls_that_let_things_through():
    let_through = judge.self_test(Sandbox("unsafe_subprocess", WALL_S))
    assert {"a file of the user", "the network", "more on disk than its quota"} <= set(let_through)
    assert not list(Path("/tmp").glob("grpo_self_test_*")), "it cleans up after itself"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it is refused in any case")
def test_without_walls_code_is_refused_unless_the_user_says_unsafe(monkeypatch, caplog):
    judge.find_sandbox.cache_clear()
    monkeypatch.setattr(judge, "self_test", lambda sandbox: ["the network"])
    monkeypatch.setattr(judge.shutil, "which", lambda name: None)
    try:
        with pytest.raises(
            ValueError, match="bwrap is not installed; namespaces: lets through the network.*unsafe_sub"
        ):
            find_sandbox("auto", 1.0)
        assert find_sandbox("unsafe_subprocess", 1.0).backend == "unsafe_subprocess"
        assert "can access your files" in caplog.text
    finally:
        judge.find_sandbox.cache_clear()


def test_a_judge_that_is_killed_takes_the_program_with_it(sandbox):
    code = (
        "from grpo.rewards.sandbox import *\nsandbox = find_sandbox('auto', 100.0)\nprint(flush=True)\n"
        "judge_program(sandbox, 'while True: pass', '', [], [])"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[1], stdout=subprocess.PIPE)
    process.stdout.readline()  # past the self-test
    for _ in range(400):
        if any("Inside" in line for line in left_running(process.pid)):
            break
        time.sleep(0.05)
    else:
        pytest.fail("nothing has started")
    time.sleep(0.5)  # into the program
    assert left_running(process.pid)
    os.kill(process.pid, 9)
    process.communicate()
    expect_an_end()


def test_a_late_worker_takes_the_program_with_it_that_has_cleared_its_death_signal(sandbox):
    program = "import ctypes, time\nctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\ntime.sleep(1000)"
    rewards = {"tests": Reward(partial(share_of_tests, sandbox=replace(sandbox, wall_s=100.0)), 1.0)}
    with Pool(workers=1, timeout_s=3.0, step_timeout_s=60) as pool:
        assert pool([program], {"test_list": [TESTS]}, rewards)[0][0].status == TIMEOUT
    expect_an_end()


def expect_an_end():
    """Of all sandboxes of this process and of one that was killed, within five seconds."""
    for _ in range(100):
        if not left_running():
            return
        time.sleep(0.05)
    pytest.fail(f"left running: {left_running()}")
