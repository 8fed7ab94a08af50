"""Elements that play a worker, or a proxy's process, which an attacker has taken over: they try all that SECURITY.md names.

A packet or stream with the payload `attack` starts it. Each attempt is one line of the log: `attempt NAME: DONE`, or the refusal.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import gc
import mmap
import os
import select
import signal
import socket
import struct
from collections.abc import Callable
from functools import partial
from typing import Any

from nfq_agent import Packet, PacketElement, StreamElement, Verdict
from nfq_agent.connection import Connection
from nfq_agent.element import Emit
from nfq_agent.flow import Flow
from nfq_agent.host.jail.calls import ProcessNeeds, rules
from nfq_agent.host.jail.fixed import BOTTOM
from nfq_agent.host.jail.syscalls import this_architecture
from nfq_agent.host.sock_diag import KernelQuestions

LIBC = ctypes.CDLL(None, use_errno=True)
X86_64 = os.uname().machine == "x86_64"
# Numbers that are alike everywhere from 424 on; the others by architecture.
NUMBERS = {
    "ptrace": (101, 117), "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "chroot": (161, 51), "bpf": (321, 280),
    "io_uring_setup": (425, 425), "personality": (135, 92), "process_vm_readv": (310, 270), "memfd_create": (319, 279),
    "userfaultfd": (323, 282), "open_by_handle_at": (304, 265), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438),
    "mremap": (25, 216), "madvise": (28, 233), "munmap": (11, 215), "mprotect": (10, 226), "prctl": (157, 167),
    "capset": (126, 91), "keyctl": (250, 219), "perf_event_open": (298, 241), "init_module": (175, 105),
    "timer_delete": (226, 111), "dup3": (292, 24), "clone3": (435, 435), "execveat": (322, 281), "kill": (62, 129),
    "tgkill": (234, 131), "seccomp": (317, 277),
    "openat2": (437, 437), "sendmmsg": (307, 269), "writev": (20, 66), "pwritev": (296, 70), "vmsplice": (278, 75),
    "splice": (275, 76), "tee": (276, 77), "sendfile": (40, 71), "copy_file_range": (326, 285), "pwritev2": (328, 287),
    "sendmsg": (46, 211), "rt_sigqueueinfo": (129, 138), "tkill": (200, 130), "timer_create": (222, 107), "prlimit64": (302, 261),
    "name_to_handle_at": (303, 264), "mknodat": (259, 33), "symlinkat": (266, 36), "linkat": (265, 37), "fchownat": (260, 54),
}  # fmt: skip


def call(name: str, *arguments: Any) -> int:
    """A system call by its name. Raises OSError."""
    number = NUMBERS[name][0 if X86_64 else 1]
    wide = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]
    found = int(LIBC.syscall(ctypes.c_long(number), *wide))
    if found < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return found


def message(kind: int, flags: int, family: int, resource: int, attributes: bytes = b"") -> bytes:
    """A netfilter message (linux/netfilter/nfnetlink.h)."""
    body = struct.pack("=BB", family, 0) + struct.pack("!H", resource) + attributes
    return struct.pack("=IHHII", 16 + len(body), kind, flags, 1, 0) + body


TABLE = struct.pack("=HH", 9, 1) + b"evil\0" + bytes(3)
# The begin of a batch, a new table `evil`, the end.
NFT_BATCH = message(0x10, 1, 0, 10) + message(0x0A00, 0x401, 2, 0, TABLE) + message(0x11, 1, 0, 10)
CONNTRACK_FLUSH = message(0x0102, 1, 2, 0)
# A broadcast frame of a protocol for experiments.
FRAME = b"\xff" * 6 + b"\x02" + bytes(5) + b"\x88\xb5" + bytes(50)
# Commands of bpf(2) that make or change something.
BPF = {
    0: "map create", 5: "program load", 6: "pin", 7: "get pinned", 8: "attach", 9: "detach", 13: "program by id", 14: "map by id",
    28: "link create", 29: "link update", 30: "link by id", 34: "link detach",
}  # fmt: skip
UNBIND = message(0x0302, 1, 0, 100, struct.pack("=HHBBH", 8, 1, 2, 0, 0))


def sockets_of(family: socket.AddressFamily) -> list[int]:
    """The descriptors of this process that are sockets of a family."""
    found = []
    for descriptor in range(256):
        try:
            end = socket.socket(fileno=descriptor)
        except OSError:
            continue
        if end.family == family:
            found.append(descriptor)
        end.detach()
    return found


def on_socket(descriptor: int, data: bytes) -> dict[str, Callable[[], object]]:
    """Ways to send something on a socket that is there."""
    end = opened(descriptor)
    held = ctypes.create_string_buffer(data)
    part = struct.pack("@PN", ctypes.addressof(held), len(data))
    address = ctypes.create_string_buffer(part)
    header = ctypes.create_string_buffer(struct.pack("@PIPNPNi", 0, 0, ctypes.addressof(address), 1, 0, 0, 0) + bytes(12))
    return {
        "send": lambda: end.send(data),
        "sendto": lambda: end.sendto(data, ("lo", 0) if end.family == socket.AF_PACKET else (0, 0)),
        "sendmsg": lambda: end.sendmsg([data]),
        "write": lambda: os.write(descriptor, data),
        "writev": lambda: os.writev(descriptor, [data]),
        "sendmmsg": lambda: call("sendmmsg", descriptor, header, 1, 0),
        "pwritev": lambda: call("pwritev", descriptor, address, 1, 0, 0),
        "two parts": lambda: os.writev(descriptor, [data[:20], data[20:]]),
        "sendmsg of two parts": lambda: end.sendmsg([data[:20], data[20:]]),
        "pwritev2": lambda: call("pwritev2", descriptor, address, 1, -1, -1, 0),
        "splice": lambda: call("splice", descriptor, 0, descriptor, 0, len(data), 0),
        "vmsplice": lambda: call("vmsplice", descriptor, address, 1, 0),
        "tee": lambda: call("tee", descriptor, descriptor, len(data), 0),
        "sendfile": lambda: call("sendfile", descriptor, descriptor, 0, len(data)),
        "copy_file_range": lambda: call("copy_file_range", descriptor, 0, descriptor, 0, len(data), 0),
        "a header beside the fixed ones": lambda: call("sendmsg", descriptor, BOTTOM + 8, 0),
        "a header in front of the fixed ones": lambda: call("sendmsg", descriptor, BOTTOM - 64, 0),
        "dup": lambda: os.write(os.dup(descriptor), data),
        "fcntl dup": lambda: os.write(fcntl.fcntl(descriptor, fcntl.F_DUPFD, 100), data),
        "dup3": lambda: call("dup3", descriptor, 200, 0),
    }  # fmt: skip


def misdirected() -> dict[str, Callable[[], object]]:
    """Questions on a socket of another protocol: to rtnetlink(7) that about a socket is an order to add an address."""
    found: dict[str, Callable[[], object]] = {}
    for questions in (each for each in gc.get_objects() if isinstance(each, KernelQuestions)):
        for own, (start, _, _) in questions.sends:
            for descriptor in set(sockets_of(socket.AF_NETLINK)) - own:
                found[f"question of {min(own)} on {descriptor}"] = partial(call, "sendmsg", descriptor, start, 0)
    return found


def attempts(files: list[str]) -> dict[str, Callable[[], object]]:
    """All by their names."""
    parent = os.getppid()
    found: dict[str, Callable[[], object]] = {}
    for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK, socket.AF_PACKET):
        found[f"socket {family.name}"] = partial(socket.socket, family, socket.SOCK_DGRAM)
    found["socket raw"] = lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW).close()
    found["socket nfnetlink"] = lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12).send(NFT_BATCH)
    found["socketpair"] = socket.socketpair
    for descriptor in sockets_of(socket.AF_NETLINK):
        end = socket.socket(fileno=descriptor)
        protocol = end.getsockopt(socket.SOL_SOCKET, socket.SO_PROTOCOL)
        end.detach()
        kinds = (
            {"nft": NFT_BATCH, "conntrack": CONNTRACK_FLUSH, "unbind": UNBIND}
            if protocol == 12
            else {"change": change_of(protocol)}
        )
        for kind, data in kinds.items():
            for way, attempt in on_socket(descriptor, data).items():
                found[f"{kind} on {descriptor}/{protocol} by {way}"] = attempt
        found[f"connect {descriptor}"] = partial(opened(descriptor).connect, (0, 0))
        found[f"replace on {descriptor}"] = partial(opened(descriptor).setsockopt, 0, 64, bytes(84))
    found |= misdirected()
    if sockets_of(socket.AF_PACKET):
        # The next packet socket would get its number.
        found["close what is open"] = partial(os.close, 0)
    for descriptor in sockets_of(socket.AF_PACKET):
        for way, attempt in on_socket(descriptor, FRAME).items():
            found[f"frame on {descriptor} by {way}"] = attempt
        found[f"bind {descriptor} to lo"] = partial(opened(descriptor).bind, ("lo", 3))
        # PACKET_FANOUT, PACKET_ADD_MEMBERSHIP, PACKET_RX_RING of packet(7), and SO_ATTACH_FILTER, SO_DETACH_FILTER of socket(7).
        for level, option in ((263, 18), (263, 1), (263, 5), (1, 26), (1, 27)):
            found[f"option {level}/{option} of {descriptor}"] = partial(opened(descriptor).setsockopt, level, option, bytes(16))
    for descriptor in sockets_of(socket.AF_UNIX):
        found[f"hand a descriptor over by {descriptor}"] = partial(
            opened(descriptor).sendmsg, [b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("=i", 0))]
        )
    for descriptor in descriptors():
        # What the supervisor has mapped, too, would end it by SIGBUS.
        found[f"truncate {descriptor}"] = partial(os.ftruncate, descriptor, 0)
        found[f"punch a hole into {descriptor}"] = partial(os.posix_fallocate, descriptor, 0, 1)
    for command, words in BPF.items():
        found[f"bpf {words}"] = partial(call, "bpf", command, ctypes.create_string_buffer(128), 128)
    for path in files:
        found[f"read {path}"] = partial(os.open, path, os.O_RDONLY)
        found[f"write {path}"] = partial(os.open, path, os.O_WRONLY)
    found |= {
        "create a file": lambda: open("/tmp/taken-over", "w").close(),
        "append": lambda: os.open("/dev/null", os.O_WRONLY | os.O_APPEND),
        "temporary file": lambda: os.open("/tmp", os.O_TMPFILE | os.O_RDWR),
        "own memory by file": lambda: os.open("/proc/self/mem", os.O_RDWR),
        "list /proc": lambda: os.listdir("/proc"),
        "unlink": lambda: os.unlink("/tmp/nothing-here"),
        "mkdir": lambda: os.mkdir("/tmp/taken-over-folder"),
        "chmod": lambda: os.chmod("/tmp", 0o1777),
        "fork": os.fork,
        "clone3": lambda: call("clone3", 0, 0),
        "exec": lambda: os.execv("/bin/true", ["true"]),
        "execveat": lambda: call("execveat", -100, b"/bin/true", 0, 0, 0),
        "kill the supervisor": lambda: os.kill(parent, 0),
        "kill itself": lambda: os.kill(os.getpid(), 0),
        "tgkill": lambda: call("tgkill", parent, parent, 0),
        "ptrace": lambda: call("ptrace", 16, parent, 0, 0),
        "read the supervisor's memory": lambda: call("process_vm_readv", parent, 0, 0, 0, 0, 0),
        "pidfd_open": lambda: call("pidfd_open", parent, 0),
        "pidfd_getfd": lambda: call("pidfd_getfd", 0, 0, 0),
        "signal with a value": lambda: call("rt_sigqueueinfo", parent, 15, ctypes.create_string_buffer(128)),
        "tkill": lambda: call("tkill", parent, 0),
        "another timer": lambda: call("timer_create", 1, 0, 0),
        "limits of the supervisor": lambda: call("prlimit64", parent, 7, struct.pack("=QQ", 3, 3), 0),
        "a handle of a file": lambda: call("name_to_handle_at", -100, b"/tmp", 0, 0, 0),
        "mknod": lambda: call("mknodat", -100, b"/tmp/taken-over-node", 0o100600, 0),
        "symlink": lambda: call("symlinkat", b"/etc/shadow", -100, b"/tmp/taken-over-link"),
        "link": lambda: call("linkat", -100, b"/etc/passwd", -100, b"/tmp/taken-over-name", 0),
        "chown": lambda: call("fchownat", -100, b"/tmp", os.getuid(), -1, 0),
        "signal by pidfd": lambda: signal.pidfd_send_signal(0, 0),
        "new user namespace": lambda: call("unshare", 0x10000000),
        "setns": lambda: call("setns", 0, 0),
        "mount": lambda: call("mount", b"none", b"/mnt", b"tmpfs", 0, 0),
        "chroot": lambda: call("chroot", b"/"),
        "executable memory": lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC),
        "make memory executable": lambda: call("mprotect", page(), 4096, 4),
        "make fixed messages writable": lambda: call("mprotect", BOTTOM, 4096, 3),
        "unmap fixed messages": lambda: call("munmap", BOTTOM, 4096),
        "move over fixed messages": lambda: call("mremap", page(), 4096, 4096, 3, BOTTOM),
        "forget fixed messages": lambda: call("madvise", BOTTOM, 4096, 4),
        "map over fixed messages": lambda: mapped(BOTTOM, 0x10),
        "map over all from 0": lambda: mapped(0, 0x10),
        "io_uring": lambda: call("io_uring_setup", 1, ctypes.create_string_buffer(120)),
        "memfd": lambda: call("memfd_create", b"x", 0),
        "userfaultfd": lambda: call("userfaultfd", 1),
        "personality": lambda: call("personality", 0x0400000),
        "prctl": lambda: call("prctl", 15, b"x"),
        "capset": lambda: call("capset", struct.pack("Ii", 0x20080522, 0), struct.pack("6I", 0, 0, 0, 0, 0, 0)),
        "keyctl": lambda: call("keyctl", 0, 0, 0),
        "perf": lambda: call("perf_event_open", 0, 0, 0, 0, 0),
        "kernel module": lambda: call("init_module", 0, 0, 0),
        "end the deadline": lambda: call("timer_delete", 0),
        "seccomp again": lambda: call("seccomp", 0, 0, 0),
        "openat2": lambda: call("openat2", -100, b"/tmp", 0, 0),
        "handle": lambda: call("open_by_handle_at", 0, 0, 0),
        "interface down": lambda: fcntl.ioctl(0, 0x8914, bytes(40)),
        "type into a terminal": lambda: fcntl.ioctl(0, 0x5412, b"x"),
    }  # fmt: skip
    return found


def descriptors() -> list[int]:
    """What is open in this process, but the three standard streams."""
    found = []
    for descriptor in range(3, 256):
        try:
            os.fstat(descriptor)
        except OSError:
            continue
        found.append(descriptor)
    return found


def other_calls() -> None:
    """Make every system call that is not on the list, with zeroes as arguments. Raises OSError if all are refused."""
    architecture = this_architecture()
    assert architecture is not None
    # clone3(2) is answered with another error where threads are allowed.
    listed = {architecture.numbers[name] for name in {*rules(ProcessNeeds()), "clone3"} if name in architecture.numbers}
    for number in range(600):
        # uretprobe(2) and uprobe(2) pass seccomp in newer kernels; elsewhere than in a probe they end the process (SIGILL).
        if number in listed or (X86_64 and number in (335, 336)):
            continue
        if LIBC.syscall(ctypes.c_long(number), *[ctypes.c_long(0)] * 6) != -1 or ctypes.get_errno() != errno.EPERM:
            raise RuntimeError(number)
    raise PermissionError(errno.EPERM, "all")


def change_of(protocol: int) -> bytes:
    """Set `lo` down (RTM_NEWLINK of rtnetlink(7)), or end a TCP connection (SOCK_DESTROY of sock_diag(7))."""
    if protocol == 4:
        return struct.pack("=IHHIIBBBBI", 72, 21, 5, 1, 0, socket.AF_INET, socket.IPPROTO_TCP, 0, 0, 0xFFFFFFFF) + bytes(48)
    return struct.pack("=IHHIIBxHiII", 32, 16, 5, 1, 0, 0, 0, 1, 0, 1)


def page() -> int:
    """A page of our own."""
    made = mmap.mmap(-1, 4096)
    KEPT.append(made)
    return ctypes.addressof(ctypes.c_char.from_buffer(made))


KEPT: list[object] = []


def opened(descriptor: int) -> socket.socket:
    """A socket that is there, as an object that never closes it."""
    end = socket.socket(fileno=descriptor)
    KEPT.append(end)
    return end


def mapped(at: int, flags: int) -> None:
    """Map at an address. Raises OSError."""
    LIBC.mmap.restype = ctypes.c_void_p
    found = LIBC.mmap(ctypes.c_void_p(at), ctypes.c_size_t(1 << 38 if not at else 4096), 3, 0x22 | flags, -1, ctypes.c_long(0))
    if found == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def answer(descriptor: int) -> str | None:
    """What the kernel says to the latest message: the errno's name, None if nothing."""
    if not select.select([descriptor], [], [], 0)[0]:
        return None
    data = os.read(descriptor, 4096)
    if len(data) >= 20 and struct.unpack_from("=H", data, 4)[0] == 2 and (code := -struct.unpack_from("=i", data, 16)[0]):
        return errno.errorcode[code]
    return None


def run(emit: Emit, files: list[str], **more: Callable[[], object]) -> None:
    """Try all; what a message came to is seen by the kernel's answer, where it gives one, and by the test."""
    for name, attempt in (attempts(files) | more).items():
        try:
            attempt()
            found = "DONE"
        except OSError as error:
            found = errno.errorcode.get(error.errno or 0, "?")
        except BaseException as error:
            found = f"{type(error).__name__}"
        if found == "DONE" and name.startswith("change on "):
            found = answer(int(name.split(" on ")[1].split("/")[0])) or "DONE"
        emit(f"attempt {name}: {found}")
    emit("attempts end")


FILES = ["/etc/passwd", "/etc/shadow", "/proc/self/environ", "/proc/net/netfilter/nfnetlink_queue", "/run/xtables.lock"]


class TakenOver(PacketElement):
    """A packet element."""

    def decide(self, packet: Packet, flow: Flow | None) -> Verdict | None:
        if packet.payload.endswith(b"attack"):
            run(self.emit, FILES, any_call_that_is_not_on_the_list=other_calls)
        return None


class TakenOverStream(StreamElement):
    """A stream element."""

    def request(self, data: bytes, connection: Connection) -> None:
        if data == b"attack":
            run(self.emit, FILES)
