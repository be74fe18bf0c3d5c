"""What a process may use of the machine: the CPUs and memory that a container leaves it; and the network it is on."""

import os
import socket
import sys

import pytest
import torch

from grpo import distributed, machine
from grpo.rewards.pool import MAX_DEFAULT_WORKERS, Pool

MIB = 2**20
INSTALLED = 1024 * MIB


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Writes files of the control groups of a machine with 8 CPUs and 1 GiB, where this process is in the groups
    `lines`."""
    monkeypatch.setattr(machine, "_installed_memory", lambda: INSTALLED)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)

    def write(lines: str, **texts: str) -> None:
        machine.MEMBERSHIP.write_text(lines)
        for name, text in texts.items():
            path = machine.CGROUPS / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n")

    return write


def test_without_control_groups_all_is_the_process_s(files):
    assert machine.cpu_share() == 8
    assert machine.memory_share() == INSTALLED


@pytest.mark.parametrize(
    ("quota", "cpus"), [("max 100000", 8), ("200000 100000", 2), ("150000 100000", 2), ("5000 100000", 1)]
)
def test_a_quota_of_cpu_time_counts_as_so_many_cpus_rounded_up(files, quota, cpus):
    files("0::/\n", **{"cpu.max": quota, "memory.max": "max"})
    assert machine.cpu_share() == cpus


def test_a_limit_of_a_group_above_binds_too(files):
    """Slurm limits the job, a process is in a task of it."""
    limits = {"job/cpu.max": "300000 100000", "job/memory.max": str(64 * MIB)}
    files("0::/job/step/task\n", **limits, **{"job/step/task/cpu.max": "max 100000", "job/step/memory.max": "max"})
    assert machine.cpu_share() == 3
    assert machine.memory_share() == 64 * MIB


@pytest.mark.parametrize("folder", ["pod/cri:1f", "."], ids=["on the host", "inside, where only the top is mounted"])
def test_control_groups_of_version_1_limit_as_well(files, folder):
    """The group that another controller has put the process in says nothing of this one."""
    quotas = {f"cpu/{folder}": "400000", "cpu/other": "100000"}
    limits = {f"{group}/cpu.cfs_quota_us": quota for group, quota in quotas.items()}
    limits |= {f"{group}/cpu.cfs_period_us": "100000" for group in quotas}
    lines = "9:memory:/pod/cri:1f\n4:cpu,cpuacct:/pod/cri:1f\n2:pids:/other\n1:name=systemd:/pod\n0::/pod\n"
    files(lines, **limits, **{f"memory/{folder}/memory.limit_in_bytes": str(96 * MIB)})
    assert machine.cpu_share() == 4
    assert machine.memory_share() == 96 * MIB


def test_version_1_without_a_limit_says_so_by_numbers(files):
    cpu = {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}
    files("2:memory:/\n1:cpu:/\n", **cpu, **{"memory/memory.limit_in_bytes": str(2**63 - 4096)})
    assert machine.cpu_share() == 8
    assert machine.memory_share() == INSTALLED


def test_where_the_system_knows_no_affinity_all_cpus_count(monkeypatch, files):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # macOS
    monkeypatch.setattr(os, "cpu_count", lambda: 10)
    assert machine.cpu_share() == 10


def test_the_installed_memory_is_asked_of_each_system_in_its_own_way(monkeypatch):
    assert machine._installed_memory() > INSTALLED
    answers = {("/usr/sbin/sysctl", "-n", "hw.memsize"): b"8589934592\n"}
    monkeypatch.setattr(machine.sys, "platform", "darwin")
    monkeypatch.setattr(machine.subprocess, "check_output", answers.get)
    assert machine._installed_memory() == 8 * 1024 * MIB


def test_ranks_of_one_machine_share_evenly_and_none_gets_nothing(monkeypatch, files):
    files("0::/\n", **{"cpu.max": "600000 100000", "memory.max": str(64 * MIB)})
    for ranks, cpus in (("2", 3), ("4", 1), ("16", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert machine.cpu_share() == cpus
        assert machine.memory_share() == 64 * MIB // int(ranks)


@pytest.mark.parametrize("has_cuda", [False, True])
@pytest.mark.parametrize(("own", "chosen"), [(16, 3), (2, 2)])
def test_torch_and_the_reward_workers_keep_to_the_quota(monkeypatch, files, has_cuda, own, chosen):
    """Torch's own number may be less than there are CPUs: it leaves out second threads of a core, and slow cores."""
    threads = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: own)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda on: None)
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    files("0::/\n", **{"cpu.max": "300000 100000"})
    distributed.start()
    assert threads == [chosen]
    assert Pool(workers=0, timeout_s=1, step_timeout_s=1).size == 3
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(200)), raising=False)
    files("0::/\n", **{"cpu.max": "max 100000"})
    assert Pool(workers=0, timeout_s=1, step_timeout_s=1).size == MAX_DEFAULT_WORKERS


DOCKER, CARD, SECOND = {"172.17.0.1": "docker0"}, {"10.9.0.2": "eth0"}, {"10.8.0.2": "eth1"}


@pytest.mark.parametrize(
    ("own", "interfaces", "routes", "chosen"),
    [
        ("10.9.0.2", CARD | SECOND, {"h1": "10.8.0.2"}, None),  # the host name will do
        ("127.0.1.1", CARD | SECOND, {"h1": "10.8.0.2", "192.0.2.1": "10.9.0.2"}, "eth1"),
        ("127.0.1.1", DOCKER | CARD, {"h1": "127.0.0.1", "192.0.2.1": "10.9.0.2"}, "eth0"),  # on h1 itself
        (None, DOCKER | CARD, {"192.0.2.1": "10.9.0.2"}, "eth0"),  # a container whose name has no address
        ("127.0.1.1", CARD, {}, "eth0"),
        ("127.0.1.1", DOCKER | CARD, {}, None),
        ("127.0.1.1", {}, {}, None),
    ],
)
def test_gloo_is_given_a_network_where_the_host_name_leads_to_none(own, interfaces, routes, chosen, monkeypatch):
    def address(name):
        if own is None:
            raise socket.gaierror("Name or service not known")
        return own

    monkeypatch.setattr(socket, "gethostbyname", address)
    monkeypatch.setattr(machine, "_interfaces", lambda: interfaces)
    monkeypatch.setattr(machine, "_address_towards", lambda peer: routes.get(peer, ""))
    assert machine.network_for_peers("h1") == chosen


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for its interfaces")
def test_interfaces_are_those_of_this_machine_without_loopback():
    names = {name for _, name in socket.if_nameindex()}
    found = machine._interfaces()
    assert set(found.values()) <= names - {"lo"}
    assert (
        machine._address_towards("127.0.0.1") == "127.0.0.1" and machine._address_towards("no.such.host.invalid") == ""
    )
    for address in found:  # one that this machine has can be bound to
        with socket.socket() as own:
            own.bind((address, 0))
