"""The CPUs and memory that a rank may use, given its CPU affinity and the limits of a container or a batch system, and
the network on which other machines reach it.

Such limits are set on control groups (cgroups); neither torch nor the system's totals take them into account. Threads
beyond the CPU quota wait for each other, and memory beyond the limit ends the process. Standard library only.
"""

from __future__ import annotations

import fcntl
import math
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

CGROUPS, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")  # on Linux; no limits elsewhere


def cpu_share() -> int:
    """CPUs of this rank, at least 1: an even share of those that its machine's ranks may use, quotas rounded up."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = _limits("cpu", ("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
    return max(1, min([cpus, *map(math.ceil, quotas)]) // _local_ranks())


def memory_share() -> int:
    """Bytes of memory of this rank: an even share of what the ranks of its machine may use."""
    limits = _limits("memory", ("memory.max",), ("memory.limit_in_bytes",))
    return int(min([_installed_memory(), *limits])) // _local_ranks()


def _installed_memory() -> int:
    if sys.platform == "darwin":  # not every Python there has SC_PHYS_PAGES
        return int(subprocess.check_output(("/usr/sbin/sysctl", "-n", "hw.memsize")))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _local_ranks() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _limits(controller: str, files: tuple[str, ...], files_of_v1: tuple[str, ...]) -> Iterator[float]:
    """The limits of this process's control groups and their parents, in version 2 or 1 of the cgroup file system.

    Two numbers, in one file or in two, are a quota of CPU time and its period; their quotient is a number of CPUs.
    """
    for line in MEMBERSHIP.read_text().splitlines() if MEMBERSHIP.is_file() else ():
        _, controllers, group = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top, names = (CGROUPS / controller, files_of_v1) if controllers else (CGROUPS, files)
        folder = top / group.lstrip("/")
        # Up to the root in any case: in a container the group may be named as on the host, but mounted as the root.
        for above in (folder, *folder.parents):
            with suppress(OSError):
                limit, period = (*" ".join((above / name).read_text() for name in names).split(), 1)[:2]
                if limit not in ("max", "-1"):
                    yield int(limit) / int(period)


def network_for_peers(master: str) -> str | None:
    """The network interface on which other machines can reach this one, if its own host name does not lead there:
    Debian's /etc/hosts maps it to 127.0.1.1, and in some containers it has no address. gloo would listen on loopback.

    master: host name or address of rank 0's machine.  None: the host name will do, or the interface is ambiguous.
    """
    with suppress(OSError):
        if not socket.gethostbyname(socket.gethostname()).startswith("127."):
            return None
    names = _interfaces()
    for address in (master, "192.0.2.1"):  # a documentation address: takes the default route, and nothing is sent
        if name := names.get(_address_towards(address)):
            return name
    return next(iter(names.values())) if len(names) == 1 else None


def _interfaces() -> dict[str, str]:
    """IPv4 address -> name, for every interface but loopback. On Linux only; elsewhere empty."""
    addresses = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex() if sys.platform == "linux" else ():
            with suppress(OSError):  # one without an address
                answer = fcntl.ioctl(probe, 0x8915, struct.pack("256s", name.encode()))  # SIOCGIFADDR
                addresses[socket.inet_ntoa(answer[20:24])] = name
    return {address: name for address, name in addresses.items() if not address.startswith("127.")}


def _address_towards(peer: str) -> str:
    """The address from which this machine would send packets to a peer; empty if it has no route."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        probe.connect((peer, 9))
        return probe.getsockname()[0]
    return ""
