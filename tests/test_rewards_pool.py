"""The worker processes: what fails costs only itself, nothing outlives its deadline, every value has its status."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from types import SimpleNamespace

import pytest

from grpo.records import ABSTAIN, ERROR, OK, TIMEOUT
from grpo.rewards import Reward, correctness_reward, runner, score_texts
from grpo.rewards.pool import Pool, Work, Worker
from grpo.rewards.worker import pack_function
from grpo.user_code import load_object
from tests import reward_functions as functions

ROOT = Path(__file__).parents[1]
IN_WORDS = {"words": Reward(functions.in_words, 1.0)}


@pytest.fixture(scope="module")
def pool():
    with Pool(workers=2, timeout_s=0.8, step_timeout_s=60) as pool:
        yield pool


@pytest.fixture(autouse=True)
def forget_logged_kinds(monkeypatch):
    monkeypatch.setattr(runner, "_logged_kinds", {})


def statuses(table, component=0):
    return [row[component].status for row in table]


def is_running(command: str) -> bool:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace").strip())
    return command in found


def test_a_pool_gives_the_table_that_one_process_gives(pool):
    texts = [f"#### The final answer is {i % 7}" for i in range(300)]
    columns = {"answer": [str(i % 5) for i in range(300)]}
    rewards = {"right": Reward(correctness_reward, 1.0), "later": Reward(functions.length_later, 0.0, batch_size=40)}
    assert pool(texts, columns, rewards) == score_texts(texts, columns, rewards)


def test_no_completions_or_no_components_are_no_work(pool):
    assert pool([], {}, IN_WORDS) == [] and pool(["a", "b"], {}, {}) == [[], []]


def test_jobs_are_even_shares_of_all_components_that_take_as_many_and_singles_of_one_that_was_late():
    length, alone = Reward(functions.length_of, 1.0), Reward(functions.length_of, 1.0, batch_size=1)
    work = Work(["a"] * 5, {}, {"length": length, "alone": alone, "again": length})
    work.divide(2)
    calls = lambda job: [(call.component, call.rows) for call in job]
    shares = [[(0, rows), (2, rows)] for rows in ((0, 1, 2), (3, 4))]
    assert list(map(calls, work.jobs)) == shares + [[(1, (i,))] for i in range(5)]
    assert calls(work.next_job()) == shares[0]
    work.late.add(2)
    assert calls(work.next_job()) == [(0, (3, 4)), (2, (3,)), (2, (4,))]


def test_workers_are_other_processes_no_more_than_asked_for_that_stay_and_never_load_torch(pool):
    one_by_one = Reward(functions.process_id, 1.0, batch_size=1)  # more jobs than workers
    rewards = {"id": one_by_one, "torch": Reward(functions.has_torch, 1.0)}
    first, second = (pool([""] * 8, {}, rewards) for _ in range(2))
    ids = {row[0].value for row in first + second}
    assert os.getpid() not in ids and len(ids) <= 2
    assert {row[1].value for row in first} == {0.0}


@pytest.mark.parametrize(
    ("word", "status"),
    [
        ("raise", ERROR),
        ("exit", ERROR),
        ("die", ERROR),
        ("killed", ERROR),
        ("miscount", ERROR),
        ("infinite", ERROR),
        ("text", ERROR),
        ("hang", TIMEOUT),
        ("abstain", ABSTAIN),
    ],
)
def test_what_fails_costs_only_its_own_completion_and_component(pool, word, status):
    rewards = {**IN_WORDS, "length": Reward(functions.length_of, 1.0)}
    texts = ["a", "ab", word, "abcd"]
    table = pool(texts, {}, rewards)
    assert statuses(table) == [OK, OK, status, OK]
    assert [row[0].value for row in table[:2]] == [1.0, 2.0]
    assert [row[1] for row in table] == [(float(len(text)), OK) for text in texts]


def test_all_kinds_of_failure_together_are_each_logged_once(pool, caplog):
    words = ["raise", "hang", "die", "exit", "fine"] * 3
    assert statuses(pool(words, {}, IN_WORDS)) == [ERROR, TIMEOUT, ERROR, ERROR, OK] * 3
    kinds = [record.args[1] for record in caplog.records]
    assert sorted(kinds) == ["RuntimeError", "SystemExit", "death", "timeout"]
    assert "RuntimeError: asked to" in next(r.message for r in caplog.records if "RuntimeError" in r.message)


def test_a_call_that_failed_on_several_is_made_again_in_fresh_workers(pool):
    assert pool(["a"] * 4, {}, {"spoilt": Reward(functions.spoilt, 1.0)}) == [[(0.0, OK)]] * 4


def test_what_a_function_needs_to_be_imported_counts_for_no_call(tmp_path):
    (tmp_path / "slow.py").write_text(
        "import time\n\ntime.sleep(0.6)\n\n\ndef one(completions, **_):\n    return [1.0]"
    )
    nap = partial(functions.nap, seconds=0.6)
    with Pool(workers=1, timeout_s=1, step_timeout_s=60) as pool:
        rewards = {"nap": Reward(nap, 1.0), "one": Reward(load_object(f"{tmp_path / 'slow.py'}:one"), 1.0)}
        assert pool(["a"], {}, rewards) == [[(0.0, OK), (1.0, OK)]]


def test_a_late_worker_is_killed_with_its_process_group(pool):
    nap = "86123.5"
    started = time.monotonic()
    assert statuses(pool(["stubborn", "a"], {"nap": [nap] * 2}, IN_WORDS)) == [TIMEOUT, OK]
    assert time.monotonic() - started < 10
    time.sleep(0.1)
    assert not is_running(f"sleep {nap}")


def test_a_worker_that_has_died_is_replaced_where_its_group_cannot_be_killed_any_more(monkeypatch):
    """macOS refuses to signal a process group of which nothing runs; Linux takes the signal."""

    def killpg(group: int, number: int) -> None:
        if "State:\tZ" in Path(f"/proc/{group}/status").read_text():
            raise PermissionError(1, "Operation not permitted")
        os.kill(group, number)

    if sys.platform == "linux":
        monkeypatch.setattr("grpo.rewards.pool.os.killpg", killpg)
    with Pool(workers=1, timeout_s=5, step_timeout_s=60) as pool:
        assert statuses(pool(["die", "a"], {}, IN_WORDS)) == [ERROR, OK]


def test_a_worker_that_was_killed_while_it_had_nothing_to_do_costs_no_score():
    with Pool(workers=1, timeout_s=10, step_timeout_s=60) as pool:
        assert pool(["a b"], {}, IN_WORDS)[0][0] == (3.0, OK)
        pool.workers[0].process.kill()
        pool.workers[0].process.wait()
        assert pool(["a b c"], {}, IN_WORDS)[0][0] == (5.0, OK)
        assert len(pool.workers) == 1


def test_a_child_of_a_reward_function_gives_no_answer_in_its_place(pool):
    rewards = {"forks": Reward(functions.forks, 1.0), "length": Reward(functions.length_of, 1.0)}
    for _ in range(3):
        assert pool(["a", "ab"], {}, rewards) == [[(0.0, OK), (1.0, OK)], [(0.0, OK), (2.0, OK)]]


def test_a_worker_that_has_stopped_since_its_last_answer_costs_its_deadline_and_no_more(monkeypatch):
    monkeypatch.setattr("grpo.rewards.pool.IMPORT_TIMEOUT_S", 3.0)
    rewards = {"stops": Reward(functions.stops_afterwards, 1.0)}
    with Pool(workers=1, timeout_s=1.0, step_timeout_s=60) as pool:
        assert statuses(pool(["a"], {}, rewards)) == [OK]
        time.sleep(0.5)
        assert statuses(pool(["a" * 10**6], {}, rewards)) == [TIMEOUT]  # more than a pipe holds
        assert statuses(pool(["a"], {}, rewards)) == [OK]


def test_a_worker_that_stalls_while_sending_its_answer_is_late(monkeypatch):
    with Pool(workers=1, timeout_s=100, step_timeout_s=100) as pool:
        with monkeypatch.context() as patch:
            patch.setattr("grpo.rewards.pool.IMPORT_TIMEOUT_S", 1.0)
            pool.workers.append(Worker())
        assert statuses(pool(["a"], {}, {"stops": Reward(functions.stops_midway, 1.0)})) == [TIMEOUT]
        assert not pool.workers


def test_a_worker_that_is_killed_before_it_reads_its_job_costs_that_job_alone(monkeypatch):
    with Pool(workers=1, timeout_s=10, step_timeout_s=60) as pool:
        pool.workers.append(worker := Worker())
        worker.process.send_signal(signal.SIGSTOP)

        def look(connections, timeout):
            worker.process.kill()  # what it has not read makes this a reset connection, not an ended one
            return wait(connections, timeout)

        monkeypatch.setattr("grpo.rewards.pool.wait", look)
        assert statuses(pool(["a"], {}, IN_WORDS)) == [ERROR]


def test_an_answer_that_is_there_counts_however_late_we_look(monkeypatch):
    clock, looks = [0.0], []

    def look(connections, timeout):
        """Every other time the answer comes while this process is stopped: behind the deadline it is still unseen."""
        assert all(connection.poll(30) for connection in connections)
        looks.append(1)
        if len(looks) % 2 == 0:
            return connections
        clock[0] += 1000
        return []

    monkeypatch.setattr("grpo.rewards.pool.time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr("grpo.rewards.pool.wait", look)
    with Pool(workers=1, timeout_s=10, step_timeout_s=10**6) as pool:
        assert pool(["a"], {}, IN_WORDS) == [[(1.0, OK)]]


def test_a_component_that_was_late_once_costs_one_deadline_for_each_hanging_completion(monkeypatch):
    late, lose = [], Pool._fail_worker

    def count(pool, worker, *arguments):
        late.append(len(worker.calls[0].rows))
        lose(pool, worker, *arguments)

    monkeypatch.setattr(Pool, "_fail_worker", count)
    texts = ["hang" if i % 100 == 0 else "a" for i in range(600)]
    with Pool(workers=2, timeout_s=0.8, step_timeout_s=60) as pool:
        table = pool(texts, {}, {"words": Reward(functions.in_words, 1.0, batch_size=50)})
    assert statuses(table) == [TIMEOUT if text == "hang" else OK for text in texts]
    assert late.count(1) == 6 and len(late) <= 6 + 2  # at most one batch on each of the two workers was late


def test_the_deadline_of_the_step_leaves_what_is_not_scored_as_timeout():
    with Pool(workers=1, timeout_s=100, step_timeout_s=1.5) as pool:
        pool([""], {}, IN_WORDS)  # a worker is there
        started = time.monotonic()
        table = pool(["a", "hang", "a"], {}, {"words": Reward(functions.in_words, 1.0, batch_size=1)})
        assert time.monotonic() - started < 3
        assert statuses(table) == [OK, TIMEOUT, TIMEOUT]
        assert statuses(pool(["a"], {}, IN_WORDS)) == [OK]  # and the next step goes on


def test_functions_of_a_users_file_and_partials_reach_the_workers(pool, tmp_path, monkeypatch):
    file = tmp_path / "my_rewards.py"
    file.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n\n"
        "@dataclass\nclass Case:\n    n: int\n\n\n"
        "def brevity(completions, *, scale=1, **columns):\n    return [scale / len(x) for x in completions]"
    )
    brevity = load_object(f"{file}:brevity")
    rewards = {"brevity": Reward(brevity, 1.0), "tenfold": Reward(partial(brevity, scale=10), 1.0)}
    assert [[o.value for o in row] for row in pool(["ab"], {}, rewards)] == [[0.5, 5.0]]
    packed = pack_function("brevity", brevity)
    monkeypatch.setattr(brevity, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "brevity", brevity, raising=False)
    assert pack_function("brevity", brevity) == packed, "of the script that runs, too: in a worker another one does"


def test_workers_find_the_modules_that_this_process_finds_and_get_nothing_of_what_is_typed(tmp_path, monkeypatch):
    (tmp_path / "only_here.py").write_text(
        "import sys\n\n\ndef read(completions, **columns):\n    return [len(sys.stdin.read()) for _ in completions]"
    )
    monkeypatch.syspath_prepend(tmp_path)
    before, (source, sink) = os.dup(0), os.pipe()
    os.write(sink, b"typed")
    os.close(sink)
    os.dup2(source, 0)
    try:
        with Pool(workers=1, timeout_s=10, step_timeout_s=60) as pool:
            assert pool(["a"], {}, {"read": Reward(load_object("only_here:read"), 1.0)}) == [[(0.0, OK)]]
    finally:
        os.dup2(before, 0)
        os.close(before)
        os.close(source)


def test_a_file_is_run_once_whatever_of_it_is_named(tmp_path, monkeypatch):
    file = tmp_path / "my_rewards.py"
    file.write_text("seen = []\n\n\ndef note(text):\n    seen.append(text)\n\n\ndef noted():\n    return seen")
    load_object(f"{file}:note")("once")
    monkeypatch.chdir(tmp_path)
    assert load_object("my_rewards.py:noted")() == ["once"]


def test_a_function_that_only_this_process_knows_is_refused_with_a_remedy(pool):
    with pytest.raises(ValueError, match="reward 'mine' cannot be sent .*define it by `def` at the top of a file"):
        pool(["a"], {}, {"mine": Reward(lambda completions, **_: [1.0], 1.0)})


def test_a_function_that_was_typed_and_one_that_holds_what_cannot_be_sent_are_refused_too():
    typed = {"__name__": "__main__"}  # no __file__: a notebook, a prompt
    exec("def one(completions, **columns):\n    return [1.0]", typed)
    for mine in (typed["one"], partial(functions.nap, seconds=threading.Lock())):
        with pytest.raises(ValueError, match="reward 'mine' cannot be sent .*define it by `def` at the top of a file"):
            pack_function("mine", mine)


def test_a_column_that_only_this_process_knows_is_refused_with_a_remedy(pool):
    with pytest.raises(ValueError, match=r"a column \(fine, mine\) cannot be sent .*use columns of plain data"):
        pool(["a"], {"fine": [1], "mine": [lambda: 1]}, {"length": Reward(functions.length_of, 1.0)})
    with pytest.raises(ValueError, match=r"a column \(deep\) cannot be sent .*recursion"):
        pool(["a"], {"deep": json.loads("[" * 900 + "]" * 900)}, {"length": Reward(functions.length_of, 1.0)})


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere.py:f", "no file 'nowhere.py'"),
        ("json:nothing", "defines no function or class 'nothing'"),
        ("f", "'f': Empty module name; give path/to/file.py:name or module:name"),
        ("nowhere.at_all:f", "No module named 'nowhere'; give path/to/file.py:name or module:name"),
    ],
)
def test_a_path_to_no_function_is_named(path, message):
    with pytest.raises(ValueError, match=message):
        load_object(path)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a worker ends with its parent only between two calls")
def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    code = (
        "from grpo.rewards.pool import Pool; from grpo.rewards import Reward; from tests.reward_functions import *\n"
        "pool = Pool(workers=1, timeout_s=100, step_timeout_s=100)\n"
        "print(int(pool([''], {}, {'id': Reward(process_id, 1.0)})[0][0].value), flush=True)\n"
        "pool(['hang'], {}, {'words': Reward(in_words, 1.0)})"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT, text=True)
    worker = int(parent.stdout.readline())
    time.sleep(0.2)
    parent.kill()
    parent.communicate()
    for _ in range(100):
        if not Path(f"/proc/{worker}").exists() or "State:\tZ" in Path(f"/proc/{worker}/status").read_text():
            break
        time.sleep(0.02)
    else:
        pytest.fail(f"worker {worker} outlived its parent")
