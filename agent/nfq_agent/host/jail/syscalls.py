"""Numbers of system calls, by architecture. Sources: asm/unistd_64.h (x86_64) and asm-generic/unistd.h (aarch64) of Linux."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

# Calls that have an old and a new form on x86_64 have only the new one on aarch64.
_X86_64: Final = {
    "read": 0, "write": 1, "open": 2, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8, "mmap": 9,
    "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "ioctl": 16,
    "pread64": 17, "pwrite64": 18, "readv": 19, "writev": 20, "access": 21, "pipe2": 293, "select": 23, "sched_yield": 24,
    "mremap": 25, "madvise": 28, "nanosleep": 35, "getpid": 39, "socket": 41, "connect": 42, "accept": 43, "accept4": 288,
    "sendto": 44, "recvfrom": 45, "sendmsg": 46, "recvmsg": 47, "shutdown": 48, "bind": 49, "listen": 50, "getsockname": 51,
    "getpeername": 52, "socketpair": 53, "setsockopt": 54, "getsockopt": 55, "clone": 56, "clone3": 435, "fork": 57, "vfork":
    58, "execve": 59, "execveat": 322, "exit": 60, "exit_group": 231, "wait4": 61, "waitid": 247, "kill": 62, "tgkill": 234,
    "uname": 63, "fcntl": 72, "flock": 73, "fsync": 74, "fdatasync": 75, "ftruncate": 77, "getdents64": 217, "getcwd": 79,
    "rename": 82, "renameat": 264, "renameat2": 316, "mkdir": 83, "mkdirat": 258, "rmdir": 84, "unlink": 87, "unlinkat": 263,
    "readlink": 89, "readlinkat": 267, "umask": 95, "gettimeofday": 96, "getrlimit": 97, "getrusage": 98, "sysinfo": 99,
    "times": 100, "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108, "getppid": 110, "sigaltstack": 131, "prctl":
    157, "gettid": 186, "time": 201, "futex": 202, "sched_getaffinity": 204, "restart_syscall": 219, "timer_create": 222,
    "timer_settime": 223, "timer_gettime": 224, "timer_delete": 226, "clock_gettime": 228, "clock_getres": 229,
    "clock_nanosleep": 230, "epoll_create1": 291, "epoll_ctl": 233, "epoll_wait": 232, "epoll_pwait": 281, "epoll_pwait2":
    441, "openat": 257, "openat2": 437, "newfstatat": 262, "faccessat": 269, "faccessat2": 439, "pselect6": 270, "ppoll": 271,
    "set_robust_list": 273, "splice": 275, "fallocate": 285, "eventfd2": 290, "recvmmsg": 299, "sendmmsg": 307, "prlimit64":
    302, "getcpu": 309, "seccomp": 317, "getrandom": 318, "bpf": 321, "membarrier": 324, "statx": 332, "rseq": 334,
    "pidfd_send_signal": 424, "landlock_create_ruleset": 444, "landlock_add_rule": 445, "landlock_restrict_self": 446,
}  # fmt: skip
_AARCH64: Final = {
    "read": 63, "write": 64, "close": 57, "fstat": 80, "lseek": 62, "mmap": 222, "mprotect": 226, "munmap": 215, "brk": 214,
    "rt_sigaction": 134, "rt_sigprocmask": 135, "rt_sigreturn": 139, "ioctl": 29, "pread64": 67, "pwrite64": 68, "readv": 65,
    "writev": 66, "pipe2": 59, "sched_yield": 124, "mremap": 216, "madvise": 233, "nanosleep": 101, "getpid": 172, "socket":
    198, "connect": 203, "accept": 202, "accept4": 242, "sendto": 206, "recvfrom": 207, "sendmsg": 211, "recvmsg": 212,
    "shutdown": 210, "bind": 200, "listen": 201, "getsockname": 204, "getpeername": 205, "socketpair": 199, "setsockopt": 208,
    "getsockopt": 209, "clone": 220, "clone3": 435, "execve": 221, "execveat": 281, "exit": 93, "exit_group": 94, "wait4":
    260, "waitid": 95, "kill": 129, "tgkill": 131, "uname": 160, "fcntl": 25, "flock": 32, "fsync": 82, "fdatasync": 83,
    "ftruncate": 46, "getdents64": 61, "getcwd": 17, "renameat": 38, "renameat2": 276, "mkdirat": 34, "unlinkat": 35,
    "readlinkat": 78, "umask": 166, "gettimeofday": 169, "getrlimit": 163, "getrusage": 165, "sysinfo": 179, "times": 153,
    "getuid": 174, "getgid": 176, "geteuid": 175, "getegid": 177, "getppid": 173, "sigaltstack": 132, "prctl": 167, "gettid":
    178, "futex": 98, "sched_getaffinity": 123, "restart_syscall": 128, "timer_create": 107, "timer_settime": 110,
    "timer_gettime": 108, "timer_delete": 111, "clock_gettime": 113, "clock_getres": 114, "clock_nanosleep": 115,
    "epoll_create1": 20, "epoll_ctl": 21, "epoll_pwait": 22, "epoll_pwait2": 441, "openat": 56, "openat2": 437, "newfstatat":
    79, "faccessat": 48, "faccessat2": 439, "pselect6": 72, "ppoll": 73, "set_robust_list": 99, "splice": 76, "fallocate": 47,
    "eventfd2": 19, "recvmmsg": 243, "sendmmsg": 269, "prlimit64": 261, "getcpu": 168, "seccomp": 277, "getrandom": 278,
    "bpf": 280, "membarrier": 283, "statx": 291, "rseq": 293, "pidfd_send_signal": 424, "landlock_create_ruleset": 444,
    "landlock_add_rule": 445, "landlock_restrict_self": 446,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Architecture:
    """audit: its number in linux/audit.h. foreign_from: numbers from here on belong to another calling convention."""

    audit: int
    numbers: Mapping[str, int]
    foreign_from: int | None = None


ARCHITECTURES: Final = {
    # 0x40000000 marks the calls of x32 (asm/unistd.h).
    "x86_64": Architecture(0xC000003E, _X86_64, 0x40000000),
    "aarch64": Architecture(0xC00000B7, _AARCH64),
}


def this_architecture() -> Architecture | None:
    """The one of this kernel; None where it is not in the table."""
    return ARCHITECTURES.get(os.uname().machine)
