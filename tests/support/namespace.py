"""Network namespaces for tests: a kernel of one's own, with a private /run and a private copy of /etc.

Rules are only ever written inside one. What a test leaves running in it ends with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from nfq_agent.elements.interface_names import name_lookup

T = TypeVar("T")
# How long a test waits for what has to come, in seconds. It only bounds a test that fails: on a loaded machine all takes long.
PATIENCE = 90.0
# The uid and gid of a user without rights.
UNPRIVILEGED = 65534
# The release of this machine's kernel: major and minor number.
KERNEL = tuple(map(int, os.uname().release.split(".")[:2]))
# The top of the checkout.
ROOT = Path(__file__).resolve().parent.parent.parent

# /etc is copied so that a test may create the system user, which the host may have already; /run so that locks and sockets
# are not the machine's.
_SETUP = """
mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs /run
cp -a /etc /run/.etc && mount --bind /run/.etc /etc
sed -i '/^proxyuser:/d' /etc/passwd /etc/shadow /etc/group /etc/gshadow
ip link set lo up
echo ready
exec sleep infinity
"""
_CLONE_NEWNET = 0x40000000
_CLONE_NEWNS = 0x00020000
_libc = ctypes.CDLL(None, use_errno=True)


class Namespace:
    """A network and mount namespace that lives until `close`."""

    def __init__(self) -> None:
        # Not unshare's --kill-child alone: what was started inside by nsenter is ended by close().
        self._holder = subprocess.Popen(
            ["unshare", "--net", "--mount", "sh", "-ec", _SETUP], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL
        )
        self._started: list[subprocess.Popen[Any]] = []
        self.contains: list[Namespace] = []
        """Namespaces that end with this one."""
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != b"ready\n":
            self._holder.wait()
            raise RuntimeError("the namespace could not be set up; see the error above")
        self.pid = self._holder.pid
        try:
            self._refuse_a_chroot()
        except BaseException:
            self.close()
            raise

    def _refuse_a_chroot(self) -> None:
        """Fail in a chroot: to enter a mount namespace leaves it, and what a test writes would be the host's."""
        if subprocess.run(self.command(["test", "-d", "/run/.etc"]), stdin=subprocess.DEVNULL).returncode != 0:
            raise RuntimeError(
                "this is a chroot, which entering a mount namespace leaves: run the kernel tests on the host itself or in a "
                "container that is booted (systemd-nspawn)"
            )

    def __enter__(self) -> Namespace:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End what was started inside, then the namespace."""
        for other in self.contains:
            other.close()
        for process in self._started:
            if process.poll() is None:
                process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
        self._holder.kill()
        self._holder.wait()
        if self._holder.stdout is not None:
            self._holder.stdout.close()

    def command(self, argv: Sequence[str]) -> list[str]:
        """The argv that runs `argv` inside."""
        return ["nsenter", f"--target={self.pid}", "--net", "--mount", "--", *argv]

    def run(self, *argv: str, check: bool = True, timeout: float = 120, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command inside to its end. Its output is captured; a failure shows it."""
        options = {
            "capture_output": True,
            "text": True,
            "stdin": None if "input" in options else subprocess.DEVNULL,
            **options,
        }
        if "input" in options:
            del options["stdin"]
        done = subprocess.run(self.command(argv), timeout=timeout, **options)
        if check and done.returncode != 0:
            raise AssertionError(f"{' '.join(argv)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def start(self, *argv: str, **options: Any) -> subprocess.Popen[Any]:
        """Start a command inside; `close` ends it if it still runs."""
        process = subprocess.Popen(self.command(argv), **{"stdin": subprocess.DEVNULL, **options})
        self._started.append(process)
        return process

    def shell(self, script: str, **options: Any) -> str:
        """The output of a shell script run inside."""
        return self.run("sh", "-ec", script, **options).stdout

    def running(self) -> list[int]:
        """The processes that `start` has started and that have not ended."""
        return [process.pid for process in self._started if process.poll() is None]

    def processes(self) -> list[int]:
        """Every process that lives inside, but the one that holds it open."""
        here = os.readlink(f"/proc/{self.pid}/ns/net")
        found = []
        for name in os.listdir("/proc"):
            if name.isdecimal() and int(name) != self.pid:
                with contextlib.suppress(OSError):
                    if os.readlink(f"/proc/{name}/ns/net") == here:
                        found.append(int(name))
        return found

    def enter(self) -> None:
        """Move the calling process inside; it stays there. It must have one thread."""
        for name, kind in (("net", _CLONE_NEWNET), ("mnt", _CLONE_NEWNS)):
            descriptor = os.open(f"/proc/{self.pid}/ns/{name}", os.O_RDONLY)
            try:
                if _libc.setns(descriptor, kind) != 0:
                    raise OSError(ctypes.get_errno(), f"setns {name}")
            finally:
                os.close(descriptor)
        # What asks for the names of interfaces keeps a socket, which belongs to the namespace that it was opened in.
        name_lookup.cache_clear()

    def call(self, function: Callable[..., T], *args: Any, timeout: float = 120) -> T:
        """What `function(*args)` returns or raises when it runs inside, in a process of its own."""
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                os.close(reader)
                signal.alarm(int(timeout) + 1)
                try:
                    self.enter()
                    answer: tuple[bool, Any] = (True, function(*args))
                except BaseException as error:
                    error.add_note(traceback.format_exc())
                    answer = (False, error)
                try:
                    data = pickle.dumps(answer)
                except Exception:
                    data = pickle.dumps((False, RuntimeError(repr(answer[1]))))
                with os.fdopen(writer, "wb") as pipe:
                    pipe.write(data)
            sys.stderr.flush()
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            data = pipe.read()
        os.waitpid(child, 0)
        if not data:
            raise RuntimeError(f"{function.__name__} ended without an answer (after {timeout} s at most)")
        good, value = pickle.loads(data)
        if good:
            return value  # type: ignore[no-any-return]  # what the function returned, by way of pickle
        raise value


def join(first: Namespace, second: Namespace, network: str = "10.203.0", prefix6: str = "fd00:203::") -> None:
    """Connect two namespaces with a veth pair: `eth0` in both, .1 and .2 of the networks."""
    first.run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", str(second.pid))
    for number, namespace in ((1, first), (2, second)):
        namespace.run("ip", "address", "add", f"{network}.{number}/24", "dev", "eth0")
        namespace.run("ip", "-6", "address", "add", f"{prefix6}{number}/64", "dev", "eth0", "nodad")
        namespace.run("ip", "link", "set", "eth0", "up")
