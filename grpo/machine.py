"""The CPUs and memory that a rank may use, given its CPU affinity and the limits of a container or a batch system.

Such limits are set on control groups (cgroups); neither torch nor the system's totals take them into account. Threads
beyond the CPU quota wait for each other, and memory beyond the limit ends the process. Standard library only.
"""

from __future__ import annotations

import math
import os
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
