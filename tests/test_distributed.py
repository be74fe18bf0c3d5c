"""A rank that does not answer is named; a run that is asked to stop does so in time and says which signal it was."""

from __future__ import annotations

import math
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from grpo import distributed
from grpo.config import from_dict
from grpo.distributed import StopRequest, World
from grpo.run import resolve_config
from tests.ranks import CONTEXT, Ranks, run_ranks
from tests.tiny import save_tiny_model

ALONE = World(rank=0, size=1, device=torch.device("cpu"))


def message_for_a_silent_rank(world) -> tuple[str, float]:
    """And how long it took to come."""
    impatient = replace(world, timeout_s=1.0)
    if world.rank == 1:
        time.sleep(4)
    started = time.monotonic()
    try:
        impatient.gather("here")
    except TimeoutError as error:
        return str(error), time.monotonic() - started
    return "all answered", 0.0


def test_a_rank_that_stops_answering_is_named_within_the_stated_time():
    message, seconds = run_ranks(3, message_for_a_silent_rank)[0]
    assert "timed out after 1 s (distributed.timeout_s)" in message
    assert "Ranks 1 failed" in message
    assert seconds < 10


def message_where_gradients_meet(world) -> str:
    impatient = replace(world, timeout_s=20.0)
    torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=1), torch.distributed.group.WORLD)
    if world.rank == 2:
        time.sleep(5)
        return ""
    try:
        with impatient.naming_missing_ranks():
            torch.distributed.all_reduce(torch.ones(1))
    except TimeoutError as error:
        return str(error)
    return "all answered"


def test_a_rank_that_stops_in_a_backward_pass_is_named_too():
    message = run_ranks(3, message_where_gradients_meet)[0]
    assert "timed out after 20 s (distributed.timeout_s)" in message and "Ranks 2 failed" in message


def test_ranks_meet_nowhere_before_it_is_known_that_all_will_come(monkeypatch):
    """A collective that waits could not say for whom. One that fails says so itself, unless it is gloo's."""

    def barrier(*arguments, **options):
        raise RuntimeError("rank 1 did not come\nand more")

    world, failure = World(rank=0, size=2, device=torch.device("cpu")), RuntimeError("of gloo")
    monkeypatch.setattr(torch.distributed, "monitored_barrier", barrier)

    def fails_in_a_pass():
        with world.naming_missing_ranks():
            raise failure

    meetings = [lambda meet=meet: meet(torch.ones(1)) for meet in (world.sum, world.max, world.gather)]
    for meet in (*meetings, world.barrier, fails_in_a_pass):
        with pytest.raises(TimeoutError, match=r"another rank failed; see its message \(here: rank 1 did not come\)$"):
            meet()
    failure = RuntimeError("the shapes do not fit")
    with pytest.raises(RuntimeError, match="do not fit"):
        fails_in_a_pass()
    failure = RuntimeError("of gloo")
    monkeypatch.setattr(torch.distributed, "monitored_barrier", lambda *arguments, **options: None)
    with pytest.raises(RuntimeError, match="of gloo"):
        fails_in_a_pass()


def test_ranks_ask_whether_the_writer_is_done_before_they_meet_which_would_time_out(monkeypatch):
    asked, answers = [], iter([False, False, True])
    store = SimpleNamespace(
        check=lambda keys: asked.extend(keys) or next(answers), set=lambda key, _: asked.append(key)
    )
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(distributed, "POLL_S", 0.0)
    monkeypatch.setattr(World, "gather", lambda self, item: [(item, len(asked))])
    work = lambda: f"after {len(asked)}"
    assert [World(rank, 2, ALONE.device).run_on_writer("it", work) for rank in (1, 0)] == [(None, 3), ("after 3", 4)]
    assert len(set(asked)) == 1


@pytest.mark.parametrize(
    ("nodes", "networks", "gloo"), [(1, "", None), (2, "", None), (2, "several", "ours"), (2, "named", "theirs")]
)
@pytest.mark.parametrize("has_cuda", [False, True])
def test_a_rank_joins_as_torchrun_says_over_a_store_of_this_attempt_and_waits_as_long_as_is_asked(
    has_cuda, nodes, networks, gloo, monkeypatch
):
    told = {"WORLD_SIZE": 4, "RANK": 3, "LOCAL_RANK": 1, "GROUP_WORLD_SIZE": nodes, "TORCHELASTIC_RESTART_COUNT": 5}
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "theirs")
    if networks != "named":
        monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setattr(distributed, "network_for_peers", {"host of rank 0": networks and "ours"}.get)
    for name, value in (told | {"OMP_NUM_THREADS": 1, "MASTER_ADDR": "host of rank 0"}).items():
        monkeypatch.setenv(name, str(value))
    calls, dist = [], torch.distributed
    note = lambda name, result=None: lambda *given, **named: calls.append((name, *given, named)) or result
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    monkeypatch.setattr(torch.cuda, "set_device", note("device"))
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda on: None)
    monkeypatch.setattr(torch, "set_num_threads", note("threads"))
    monkeypatch.setattr(distributed, "cpu_share", lambda: 7)
    monkeypatch.setattr(dist, "rendezvous", lambda *given, **named: iter([("store", 3, 4)]))
    monkeypatch.setattr(distributed, "_store_of_attempt", lambda *given: given)
    monkeypatch.setattr(dist, "init_process_group", note("join"))
    monkeypatch.setattr(dist, "new_group", note("group", "gloo group"))
    device, timeout = torch.device("cuda:1" if has_cuda else "cpu"), timedelta(seconds=9)
    assert distributed.start(9.0) == World(3, 4, device, "gloo group", 9.0)
    assert os.environ.get("GLOO_SOCKET_IFNAME") == gloo
    store = ("store", 3, 4, timeout)
    assert calls == [
        ("device", device, {}) if has_cuda else ("threads", 7, {}),
        ("join", "nccl" if has_cuda else "gloo", {"store": store, "rank": 3, "world_size": 4, "timeout": timeout}),
        ("group", {"backend": "gloo", "timeout": timeout}),
    ]


def test_ranks_of_an_attempt_meet_in_a_part_of_the_store_that_earlier_ones_did_not_see():
    """Those of the second attempt find what the first has left, before their rank 0 comes."""
    store = torch.distributed.HashStore()

    def meet(order: list[int]) -> list[torch.distributed.Store]:
        join = lambda rank: distributed._store_of_attempt(store, rank, 3, timedelta(seconds=20))
        with ThreadPoolExecutor(3) as threads:
            joining = {}
            for rank in order:
                joining[rank] = threads.submit(join, rank)
                time.sleep(0.2)
            return [joining[rank].result() for rank in range(3)]

    first, second = meet([0, 1, 2]), meet([2, 1, 0])
    first[0].set("address", "of the dead")
    assert [part.get("address") for part in first] == [b"of the dead"] * 3
    assert not any(part.check(["address"]) for part in second)
    second[1].set("address", "here")
    assert [part.get("address") for part in second] == [b"here"] * 3
    with pytest.raises(RuntimeError, match="rank 0 did not answer within 0.3 s"):
        distributed._store_of_attempt(store, 1, 3, timedelta(seconds=0.3))


def test_ranks_that_cannot_connect_are_told_how_to_name_a_network(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)

    def refuse(*given, **named):
        raise RuntimeError("Connection refused\nframe #0: ...")

    monkeypatch.setattr(torch.distributed, "rendezvous", refuse)
    with pytest.raises(ConnectionError, match=r"rank 1 on .* to the others: Connection refused; .* GLOO_SOCKET_IFNAME"):
        distributed.start(9.0)


def test_a_deterministic_run_asks_torch_and_cublas_and_fills_no_memory_for_it(monkeypatch):
    asked = []
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    distributed.make_deterministic()
    assert asked == [True] and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.utils.deterministic.fill_uninitialized_memory


class Counted:
    """Counts how often it is made from what travelled."""

    made = []

    def __init__(self, name):
        self.name = name

    def __setstate__(self, state):
        self.made.append(state["name"])
        vars(self).update(state)


@pytest.mark.parametrize("places", [[0, 1, 2, 3, 4, 5], [1, 2], [5, 0], []])
def test_of_dealt_items_only_those_wanted_travel_and_a_rank_makes_only_its_own(places, monkeypatch):
    monkeypatch.setattr(Counted, "made", [])
    items, travelled, ranks = [Counted(i) for i in range(6)], [], Ranks(2)

    class Rank(World):
        def gather(self, item):
            travelled.extend(item)
            return ranks.gather(self.rank, item)

    def work(rank):
        world = Rank(rank, 2, torch.device("cpu"))
        return [item.name for item in world.redistribute(world.local_share(items), places)]

    assert ranks.run(work) == [places[0::2], places[1::2]]
    assert sorted(Counted.made) == sorted(places)
    assert sum(item is not None for item in travelled) == len(places)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_step_end_and_gives_its_own_exit_status(number, status):
    before = signal.getsignal(number)
    with StopRequest(ALONE, term_grace_s=0.2) as stop:
        assert stop.status() == 0
        os.kill(os.getpid(), number)
        assert stop.status() == status
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
            time.sleep(1)
    time.sleep(0.3)  # the grace is over, but so is the run
    assert signal.getsignal(number) is before


def asked_once(world) -> int:
    """Only rank 1 gets the signal."""
    with StopRequest(world, term_grace_s=60) as stop:
        if world.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return stop.status()


def test_every_rank_stops_where_one_is_asked():
    assert run_ranks(2, asked_once) == [143, 143]


def resolved_task(world, *starts) -> list[str]:
    """By a rank, of each start: what its ranks were started with besides."""
    found = []
    for settings in starts:
        try:
            config = from_dict({"rollout": {"prompts_per_step": 6}, **settings[world.rank]})
            found.append(resolve_config(config, world)[0].task)
        except ValueError as error:
            found.append(str(error))
    return found


def test_a_rank_that_was_started_with_other_settings_is_named_with_what_differs(tmp_path):
    paths = [str(tmp_path / str(rank)) for rank in range(3)]  # of one model, as on three machines
    for path in paths:
        save_tiny_model(Path(path), context=128)
    same, other = [{"model": {"path": path}} for path in paths], [{}, {}, {"seed": 5, "optim": {"lr": 1e-3}}]
    for path, settings in zip(paths, same, strict=True):
        (Path(path) / "mine.py").write_text("def short(completions, **columns):\n    return [0.0] * len(completions)\n")
        settings["rewards"] = {"functions": [f"{path}/mine.py:short"]}
    differing = "seed=5, where rank 0 has 0; optim.lr=0.001, where rank 0 has 0.0002"
    expected = ["word_problems", f"rank 2 has {differing}: start all ranks with the same"]
    impossible = "optim.lr=nan is outside (0, inf); choose a value inside"
    starts = (same, other, [same[0], {}, same[2]], [{"optim": {"lr": math.nan}}] * 3)
    for found in run_ranks(3, resolved_task, *starts):
        assert found[:2] == expected and found[3] == impossible
        assert found[2].startswith("rank 1 has model.path='', where rank 0 has 'a path'; rewards.functions=[], where")


def never_ends() -> None:
    with StopRequest(ALONE, term_grace_s=0.3):
        os.kill(os.getpid(), signal.SIGTERM)
        torch.randn(1000, 1000).matrix_power(2**30)  # no signal handler of Python's runs before it returns
        time.sleep(60)


def test_a_step_that_outlives_the_grace_is_left_with_status_143():
    process = CONTEXT.Process(target=never_ends)
    process.start()
    process.join(20)
    assert process.exitcode == 143
