"""Starts one untrusted program behind walls. A script of its own: `python -I -S -B launcher.py SETTINGS`, stdlib only.

SETTINGS is JSON: `backend` ("namespaces", "unsafe_subprocess" or the path of bwrap), `command`, `folders` (readable
inside, nothing else is), `masked` (empty inside), `uid` (an unused one, which root changes to: RLIMIT_NPROC does not
bind root), `limits`. Standard input and output pass through to the command. SIGTERM kills the command and all that it
started; this process ends after the last of them. Errors before the command runs go to standard error.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import struct
import sys
from io import TextIOBase

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 1, 32, 4096, 16384, 1 << 18
MNT_DETACH, AT_FDCWD, AT_RECURSIVE, SYS_MOUNT_SETATTR = 2, -100, 0x8000, 442
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38
PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ALLOW, REFUSE = 22, 2, 0x7FFF0000, 0x50001  # the latter with EPERM
LOAD, IS, IS_AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06  # of classic BPF
NUMBER, MACHINE, FIRST_ARGUMENT = 0, 4, 16  # their offsets in what a filter sees of a system call
AF_UNIX, AF_NETLINK, X32 = 1, 16, 0x40000000
ROOT = "/sys"  # a folder that exists everywhere and that nothing is read from: the new root is put together there
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
INSIDE_ID = 1000
# For each machine its code in a filter, the number of `socket`, and those of calls that no namespace or limit contains:
# shmget, semget, msgget and memfd_create (memory of no process), add_key, request_key and keyctl (the user's keys),
# io_uring_setup (sockets past the filter).
SYSTEM_CALLS = {
    "x86_64": (0xC000003E, 41, (29, 64, 68, 319, 248, 249, 250, 425)),
    "aarch64": (0xC00000B7, 198, (194, 190, 186, 279, 217, 218, 219, 425)),
}
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8"}

libc = ctypes.CDLL(None, use_errno=True)


def system(name: str, *arguments: object) -> None:
    """A system call of libc; OSError with its name where it fails."""
    if getattr(libc, name)(*(a.encode() if isinstance(a, str) else a for a in arguments)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}{arguments}: {os.strerror(number)}")


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    system("mount", source, target, kind, ctypes.c_ulong(flags), options)


def bind(source: str, *, read_only: bool = True) -> None:
    """Make a folder or file appear at the same place under ROOT, with everything mounted inside it."""
    target = ROOT + source
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        open(target, "w").close()
    mount(source, target, None, MS_BIND | MS_REC)
    if read_only:  # of all that is mounted inside too, which a remount would not reach
        attributes = (ctypes.c_uint64 * 4)(MS_RDONLY | MS_NOSUID | MS_NODEV, 0, 0, 0)
        number, size = ctypes.c_long(SYS_MOUNT_SETATTR), ctypes.c_size_t(ctypes.sizeof(attributes))
        system("syscall", number, AT_FDCWD, target, AT_RECURSIVE, ctypes.byref(attributes), size)


def build_root(folders: list[str], masked: list[str], quota_mib: int) -> None:
    """Change to a root that holds the folders, three devices and an empty /tmp of quota_mib. There is no /proc."""
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", ROOT, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for folder in folders:
        if os.path.islink(folder):  # /lib -> usr/lib
            os.makedirs(os.path.dirname(ROOT + folder), exist_ok=True)
            os.symlink(os.readlink(folder), ROOT + folder)
        else:
            bind(folder)
    for device in DEVICES:
        bind(device, read_only=False)
    for folder in masked:
        mount("tmpfs", ROOT + folder, "tmpfs", MS_NOSUID | MS_NODEV | MS_RDONLY, "size=4k,mode=755")
    os.mkdir(ROOT + "/tmp")
    mount("tmpfs", ROOT + "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"size={quota_mib}m,nr_inodes=1000,mode=1777")
    mount(None, ROOT, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)
    os.chdir(ROOT)
    system("pivot_root", ".", ".")
    system("umount2", ".", MNT_DETACH)
    os.chdir("/tmp")


def write(proc: int, name: str, text: str) -> None:
    """Write a file of the outer /proc, which stays reachable through its descriptor."""
    descriptor = os.open(name, os.O_WRONLY, dir_fd=proc)
    os.write(descriptor, text.encode())
    os.close(descriptor)


def map_user(proc: int, uid: int, gid: int) -> None:
    """In a new user namespace: be INSIDE_ID, and nobody else."""
    write(proc, "self/setgroups", "deny")
    write(proc, "self/uid_map", f"{INSIDE_ID} {uid} 1")
    write(proc, "self/gid_map", f"{INSIDE_ID} {gid} 1")


def become(uid: int) -> None:
    """Leave root for an unused user and group."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    system("prctl", PR_SET_DUMPABLE, 1, 0, 0, 0)  # else its /proc/self/uid_map would belong to root


def set_limits(limits: dict[str, int]) -> None:
    """Resource limits by name, such as {"RLIMIT_CPU": 5}, soft and hard; one that is lower already stays."""
    for name, value in limits.items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def filter_calls() -> None:
    """Refuse the SYSTEM_CALLS from now on, and all sockets but AF_UNIX and AF_NETLINK, which bubblewrap needs.

    The others belong to a network namespace, except AF_VSOCK, by which a virtual machine reaches its host.
    """
    machine = os.uname().machine
    if machine not in SYSTEM_CALLS:
        raise OSError(f"the system calls of {machine} are not known, only those of {', '.join(SYSTEM_CALLS)}")
    name, socket, numbers = SYSTEM_CALLS[machine]
    allow, refuse = (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, REFUSE)  # operation, steps to skip if true, if false, operand
    steps = [(LOAD, 0, 0, MACHINE), (IS, 1, 0, name), refuse]  # a 32-bit program's numbers mean something else
    steps += [(LOAD, 0, 0, NUMBER), (IS_AT_LEAST, 0, 1, X32), refuse]
    steps += [step for number in numbers for step in ((IS, 0, 1, number), refuse)]
    steps += [(IS, 1, 0, socket), allow, (LOAD, 0, 0, FIRST_ARGUMENT)]
    steps += [(IS, 1, 0, AF_UNIX), (IS, 0, 1, AF_NETLINK), allow, refuse]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = struct.pack("HP", len(steps), ctypes.addressof(code))
    system("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0)


def run(settings: dict) -> None:
    """In the child: put up the walls, drop privileges, and become the command."""
    os.setsid()
    backend, command, is_root = settings["backend"], settings["command"], os.geteuid() == 0
    if backend == "namespaces":
        proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY)
        build_root(settings["folders"], settings["masked"], settings["quota_mib"])
        if is_root:
            become(settings["uid"])
            set_limits(settings["limits"])
            system("unshare", CLONE_NEWUSER)
            map_user(proc, settings["uid"], settings["uid"])
        # No namespace inside: there the program would be root again, with file systems of any size to mount.
        write(proc, "sys/user/max_user_namespaces", "0")
    elif backend != "unsafe_subprocess" and is_root:
        become(settings["uid"])
    set_limits(settings["limits"])
    system("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    system("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if backend != "unsafe_subprocess":
        filter_calls()
    os.execve(command[0], command, ENVIRONMENT)


def unshare() -> None:
    """New namespaces for what is forked next; without root, inside a user namespace that allows them."""
    flags = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWNET | CLONE_NEWUTS | CLONE_NEWCGROUP
    if os.geteuid() == 0:
        system("unshare", flags)
        return
    uid, gid = os.getuid(), os.getgid()
    system("unshare", CLONE_NEWUSER | flags)
    proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY)
    map_user(proc, uid, gid)
    os.close(proc)


def end_all(children: TextIOBase) -> None:
    """Kill what is left and wait for it: orphans come to this process, whatever session they are in."""
    while True:
        children.seek(0)
        for child in children.read().split():
            os.kill(int(child), signal.SIGKILL)
        try:
            os.wait()
        except ChildProcessError:
            return


def main() -> None:
    """Start the box by the settings in the first argument; when it ends, end all that it started."""
    settings = json.loads(sys.argv[1])
    system("prctl", PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)  # if the judge is killed, all this ends too
    system("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    children = open(f"/proc/self/task/{os.getpid()}/children")  # noqa: SIM115 (now: the child's new root is this process's, too)
    if settings["backend"] == "namespaces":
        unshare()
    child = os.fork()
    if child == 0:
        try:
            run(settings)
        except OSError as error:
            print(error, file=sys.stderr, flush=True)
        finally:
            os._exit(1)
    signal.signal(signal.SIGTERM, lambda number, frame: os.kill(child, signal.SIGKILL))
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # not reaped yet, so its id is not reused
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_all(children)


if __name__ == "__main__":
    main()
