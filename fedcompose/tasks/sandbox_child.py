"""The other side of `sandbox.py`: give up every right that a small function does not need, then run it.

A script of the standard library alone, started by path; never imported. Each kernel boundary is tried, and
the line `ready …` names those that hold.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import struct
import sys
import sysconfig
from typing import Any

CLONE_NEWUSER, CLONE_NEWNET, CLONE_THREAD = 0x10000000, 0x40000000, 0x00010000
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
EPERM, ENOSYS = 1, 38
# Numbers of the denied calls on x86_64 and arm64: programs, processes, signals, sockets, others' memory,
# resource limits, namespaces, keys, io_uring. Source: Linux syscall_64.tbl and asm-generic/unistd.h.
DENIED = {
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "socket": (41, 198),
    "socketpair": (53, 199),
    "bind": (49, 200),
    "connect": (42, 203),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "setrlimit": (160, 164),
    "prlimit64": (302, 261),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "bpf": (321, 280),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
}
CLONE, CLONE3 = (56, 220), (435, 435)
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH_*
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
LANDLOCK_READ = 1 << 0 | 1 << 2 | 1 << 3  # execute (shared libraries), read file, read folder
LANDLOCK_BITS = {1: 13, 2: 14}  # file rights known to each version of the interface; 15 from version 3 on
REFUSED_EVENTS = (
    "socket.", "subprocess.", "ctypes.", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system",
    "os.kill", "os.killpg", "os.chown", "os.chmod", "os.chflags", "os.setxattr", "os.truncate",
    "signal.pthread_kill", "resource.", "shutil.", "pty.", "webbrowser.", "ftplib.", "urllib.",
)  # fmt: skip
REFUSED_MODULES = frozenset({"_socket", "_ctypes", "ctypes", "_posixsubprocess", "resource", "_multiprocessing"})
WRITING_EVENTS = frozenset({"os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink"})


def limit(limits: dict[str, Any]) -> bool:
    """Hard resource limits: an unprivileged process cannot raise them again."""
    for what, value in (
        (resource.RLIMIT_CPU, limits["cpu_seconds"]), (resource.RLIMIT_FSIZE, limits["file_bytes"]),
        (resource.RLIMIT_NOFILE, limits["open_files"]), (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, limits["processes"]), (resource.RLIMIT_AS, limits["memory_bytes"]),
    ):  # fmt: skip
        hard = resource.getrlimit(what)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        with contextlib.suppress(ValueError):  # macOS refuses RLIMIT_AS
            resource.setrlimit(what, (value, value))
    return 0 < resource.getrlimit(resource.RLIMIT_AS)[1] <= int(limits["memory_bytes"])


def leave_network(libc: ctypes.CDLL) -> bool:
    return bool(libc.unshare(CLONE_NEWUSER | CLONE_NEWNET) == 0)


def promise_no_rights(libc: ctypes.CDLL) -> bool:
    """An ordinary process may restrict itself only after it gave up gaining rights by running programs."""
    return bool(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0)


def restrict_files(libc: ctypes.CDLL, folder: str) -> bool:
    """Landlock: Python's own files may be read, `folder` may be read and written, nothing else exists."""
    version = libc.syscall(LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    every_right = (1 << LANDLOCK_BITS.get(version, 15)) - 1
    rules = libc.syscall(LANDLOCK_CREATE, struct.pack("=Q", every_right), ctypes.c_size_t(8), 0)
    readable = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), "/lib", "/lib64", "/usr/lib"]
    for path, rights in [(folder, every_right & ~1), *((path, LANDLOCK_READ) for path in readable)]:
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
            libc.syscall(LANDLOCK_ADD, rules, 1, struct.pack("=Qi", rights, descriptor), 0)
            os.close(descriptor)
    return promise_no_rights(libc) and bool(libc.syscall(LANDLOCK_RESTRICT, rules, 0) == 0)


def filter_syscalls(libc: ctypes.CDLL) -> bool:
    """seccomp: denied calls fail; `clone` makes threads only; `clone3` seems unknown."""
    if os.uname().machine not in MACHINES:
        return False
    column, architecture = MACHINES[os.uname().machine]
    load, equal, any_bit, above, give = 0x20, 0x15, 0x45, 0x35, 0x06
    kill, allow, refuse = 0x80000000, 0x7FFF0000, 0x00050000
    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, kill), (load, 0, 0, 0)]
    program += [(above, 0, 1, 0x40000000), (give, 0, 0, kill)]  # the x32 interface has other numbers
    for number in filter(None, (numbers[column] for numbers in DENIED.values())):
        program += [(equal, 0, 1, number), (give, 0, 0, refuse | EPERM)]
    program += [
        (equal, 0, 1, CLONE3[column]),
        (give, 0, 0, refuse | ENOSYS),
        (equal, 0, 3, CLONE[column]),
    ]
    program += [
        (load, 0, 0, 16),
        (any_bit, 1, 0, CLONE_THREAD),
        (give, 0, 0, refuse | EPERM),
        (give, 0, 0, allow),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(code)))
    return promise_no_rights(libc) and bool(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header, 0, 0) == 0)


def watch(folder: str) -> None:
    """The audit hook: clean refusals from within Python. Not a boundary."""

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(REFUSED_EVENTS) or (event == "import" and arguments[0] in REFUSED_MODULES):
            raise PermissionError(f"{event} is not available here")
        if event in WRITING_EVENTS or (event == "open" and _writes(arguments)):
            paths = arguments[:1] if event == "open" else arguments[:2]
            if not all(_inside(path, folder) for path in paths if isinstance(path, str | bytes)):
                raise PermissionError("files outside the working folder cannot be changed here")

    sys.addaudithook(refuse)


def _inside(path: str | bytes, folder: str) -> bool:
    return os.path.realpath(os.fsdecode(path)).startswith(folder + os.sep)


def _writes(arguments: tuple[Any, ...]) -> bool:
    flags = arguments[2] if isinstance(arguments[2], int) else 0
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND))


def main() -> None:
    task = json.loads(sys.stdin.buffer.read())
    verdict = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    folder = os.path.realpath(".")
    drawn = []
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        drawn += ["netns"] * leave_network(libc)
        drawn += ["landlock"] * restrict_files(libc, folder)
        drawn += ["rlimits"] * limit(task["limits"])
        drawn += ["seccomp"] * filter_syscalls(libc)
        del libc
    else:
        drawn += ["rlimits"] * limit(task["limits"])
    for module in [name for name in sys.modules if name.split(".")[0] in REFUSED_MODULES]:
        del sys.modules[module]
    os.write(verdict, f"ready {' '.join(drawn)}\n".encode())
    watch(folder)
    space: dict[str, Any] = {"__name__": "solution"}
    # Running a program is what this process is for.
    exec(compile(task["code"], "solution", "exec"), space)  # noqa: S102
    exec(compile(task["tests"], "tests", "exec"), space)  # noqa: S102
    os.write(verdict, task["token"].encode() + b"\n")
    os._exit(0)


if __name__ == "__main__":
    main()
