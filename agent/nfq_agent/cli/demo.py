"""`demo`: the whole job step by step, in a network namespace of its own, with private copies of /etc and /run.

Every step is checked; if one fails, the exit code is 1.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import itertools
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Final

from nfq_agent.cli.running import status
from nfq_agent.host.users import CAP_NET_RAW, has_capability
from nfq_agent.service import control

_CLONE_NEWNS: Final = 0x00020000
_CLONE_NEWNET: Final = 0x40000000
_PORT: Final = 11000
_SIZE: Final = 1_000_000
# Seconds that a process has to end before it is killed.
_ENDS_WITHIN: Final = 10.0
_MS_REC: Final = 0x4000
_MS_PRIVATE: Final = 1 << 18
# linux/sockios.h: SIOCSIFFLAGS; linux/if.h: IFF_UP
_SET_FLAGS: Final = 0x8914
_UP: Final = 1
_libc: Final = ctypes.CDLL(None, use_errno=True)
_RIGHTS: Final = "CAP_SYS_ADMIN, CAP_NET_ADMIN and CAP_NET_RAW"
_SAVES: Final = ("iptables-legacy-save", "ip6tables-legacy-save", "iptables-nft-save", "ip6tables-nft-save")
# Foreign rules: they must be the same afterwards.
_FOREIGN: Final = (
    "-t mangle -A INPUT -p tcp --dport 22 -m comment --comment foreign-rule -j MARK --set-mark 0x1",
    "-t filter -A INPUT -p tcp --dport 23 -m comment --comment host-firewall -j DROP",
)


class Broken(Exception):
    """A step of the demo that failed."""


def tell() -> int:
    """Run the demo. Returns 0 if every step passed, else 1."""
    if os.geteuid() != 0:
        print("nfq-agent: the demo makes a network namespace, which takes root; run it with sudo", file=sys.stderr)
        return 1
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="nfq-agent-demo-") as folder, contextlib.ExitStack() as stack:
        try:
            _story(Path(folder), stack)
        except (Broken, OSError, subprocess.SubprocessError, control.ControlError) as error:
            why: object = error
            if isinstance(error, OSError) and error.filename is None:
                why = f"standard output cannot be written: {error.strerror}"
            elif isinstance(error, FileNotFoundError) and "/" not in str(error.filename):
                why = f"the program {error.filename} is not installed, or not in PATH"
            print(f"\nThe demo ended early: {why}", file=sys.stderr)
            log = Path(folder) / "agent.log"
            if log.exists() and (lines := log.read_text(errors="replace")):
                print(f"The agent's last lines:\n{lines[-2000:]}", file=sys.stderr)
            return 1
    print(f"\nEvery step passed, in {time.monotonic() - began:.1f} s. Nothing outside of the namespace was touched.")
    return 0


def _story(folder: Path, stack: contextlib.ExitStack) -> None:
    _chapter("A private network namespace: its own kernel tables, private copies of /etc and /run")
    _seclude()
    tool = "iptables-legacy" if _has_legacy() else "iptables-nft"
    if tool == "iptables-legacy" and not has_capability(CAP_NET_RAW):
        raise Broken(f"{tool} takes CAP_NET_RAW; run it on the host, or in a container with {_RIGHTS}")
    for rule in _FOREIGN:
        _run([tool, *rule.split()])
    before = _rules()
    _chapter(f"The rules before: two foreign ones ({tool}-save)")
    _indent("\n".join(line for line in before if line.startswith("-A")))

    _chapter(f"nfq-agent starts with the baseline: queue 100, TCP port {_PORT}, INPUT and OUTPUT")
    log = folder / "agent.log"
    # No configuration file is there, so this is the baseline; the flag adds its five-tuple log.
    agent = stack.enter_context(_process([*_agent(), "run", "--log-5tuple"], log.open("wb"), {"LOG_FORMAT": "console"}))
    _until(lambda: _answers(agent), 60, "the agent did not become ready")
    _indent(log.read_text())

    _chapter(f"Real TCP through port {_PORT}: an HTTP server, and a client that fetches {_SIZE:,} bytes")
    content = os.urandom(_SIZE)
    (folder / "file").write_bytes(content)
    server = [sys.executable, "-m", "http.server", str(_PORT), "--bind", "127.0.0.1", "--directory", str(folder)]
    stack.enter_context(_process(server, subprocess.DEVNULL))
    fetched = _fetch(f"http://127.0.0.1:{_PORT}/file")
    same = hashlib.sha256(fetched).digest() == hashlib.sha256(content).digest()
    _hold(same, f"{len(fetched):,} bytes arrived, equal to the bytes that were sent")

    _chapter("What the agent saw: its five-tuple log, the first lines")
    time.sleep(0.2)
    lines = [line for line in log.read_text().splitlines() if f":{_PORT}" in line and "tcp " in line]
    _indent("\n".join(lines[:6]))
    _hold(any(f"-> 127.0.0.1:{_PORT}" in line for line in lines), "the requests are there")
    _hold(any(f"127.0.0.1:{_PORT} ->" in line for line in lines), "the responses are there")

    _chapter("Its rules, with their counters (nfq-agent rules)")
    _indent(_output([*_agent(), "rules"]))
    _chapter("Its status (nfq-agent status)")
    _indent(_output([*_agent(), "status"]))
    (queue,) = status("default").queues
    judged = sum(worker.counters["received"] for worker in queue.workers)
    accepted = sum(worker.counters["accepted"] for worker in queue.workers)
    _hold(judged > 0 and judged == accepted, f"{judged} packets were judged, each was accepted once")
    _hold(queue.uninspected == 0, "none passed uninspected")

    _chapter("nfq-agent stops: it removes its rules, answers what waits and ends")
    seen = len(log.read_text())
    agent.terminate()
    code = agent.wait(timeout=10)
    _indent(log.read_text()[seen:])
    _hold(code == 0, f"it ended with exit code {code}")

    _chapter("The rules after")
    after = _rules()
    _indent("\n".join(line for line in after if line.startswith("-A")))
    _hold(after == before, "they equal the rules before, in every table, IPv4 and IPv6")


def _agent() -> list[str]:
    """The command line that starts this program: from a package or from a working tree, as it was started itself."""
    words = [sys.executable, *sys.orig_argv[1:]]
    return words[: words.index("demo")] if "demo" in words else [sys.executable, "-m", "nfq_agent"]


def _seclude() -> None:
    """Move this process into private network and mount namespaces (unshare(2))."""
    if _libc.unshare(_CLONE_NEWNS | _CLONE_NEWNET) != 0:
        raise Broken(
            f"no private namespace can be made here ({os.strerror(ctypes.get_errno())}); run it on the host, or in a container "
            f"with {_RIGHTS} whose seccomp filter allows unshare(2) and mount(2)"
        )
    _make_mounts_private()
    for command in (
        "mount -t tmpfs -o mode=755 tmpfs /run",
        "cp -a /etc /run/.etc",
        "mount --bind /run/.etc /etc",
        "rm -rf /etc/nfq-agent",
    ):
        _run(command.split())
    _loopback_up()


def _make_mounts_private() -> None:
    """Keep later mounts inside this namespace (mount_namespaces(7))."""
    if _libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None) == 0:
        return
    # In a chroot, / is not a mount. Leave the chroot by entering the process's own mount namespace (setns(2)), and return to it
    # after that.
    root = os.open("/", os.O_PATH | os.O_DIRECTORY)
    try:
        try:
            namespace = os.open("/proc/self/ns/mnt", os.O_RDONLY)
        except OSError as error:
            raise Broken("/proc is not there; in a chroot, mount it first: mount -t proc proc /proc") from error
        entered = _libc.setns(namespace, _CLONE_NEWNS) == 0
        os.close(namespace)
        private = entered and _libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None) == 0
        reason = os.strerror(ctypes.get_errno())
        os.fchdir(root)
        os.chroot(".")
    finally:
        os.close(root)
    if not private:
        raise Broken(
            f"mounts cannot be made private here ({reason}), so the demo would change the host; run it outside of this chroot"
        )


def _loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        try:
            fcntl.ioctl(asking, _SET_FLAGS, struct.pack("16sh14x", b"lo", _UP))
        except OSError as error:
            raise Broken(
                f"lo of the private network cannot be set up ({error.strerror}); in a container the demo takes {_RIGHTS}"
            ) from error


def _has_legacy() -> bool:
    from nfq_agent.host.xtables import python_iptables

    return python_iptables.problem() is None and shutil.which("iptables-legacy") is not None


def _rules() -> list[str]:
    """Every rule and chain of every table and family, without counters. A table that exists but is empty counts as absent."""
    lines: list[str] = []
    for command in _SAVES:
        if shutil.which(command) is None:
            continue
        for line in _output([command]).splitlines():
            line = re.sub(r" \[\d+:\d+\]$", "", line)
            if line.startswith("*"):
                table = f"{command} {line}"
            elif line.startswith("-A") or re.match(r":\S+ -$", line):
                lines += [table, line] if table not in lines else [line]
    return lines


def _answers(agent: subprocess.Popen[bytes]) -> bool:
    if agent.poll() is not None:
        raise Broken(f"the agent ended with exit code {agent.returncode}")
    try:
        return bool(control.ask("default", {"verb": "ping"}, timeout=1))
    except control.ControlError:
        return False


def _fetch(url: str) -> bytes:
    """The body, fetched by a separate client process."""
    client = "import sys, urllib.request; sys.stdout.buffer.write(urllib.request.urlopen(sys.argv[1], timeout=10).read())"
    got = b""

    def served() -> bool:
        nonlocal got
        done = subprocess.run([sys.executable, "-c", client, url], capture_output=True, stdin=subprocess.DEVNULL, timeout=30)
        got = done.stdout
        return done.returncode == 0

    _until(served, 10, "the client could not fetch the file")
    return got


@contextlib.contextmanager
def _process(
    argv: list[str], output: int | IO[bytes], environment: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends with the block. Its standard error goes to `output`."""
    process = subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env={**os.environ, **(environment or {})}
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=_ENDS_WITHIN)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _until(condition: Callable[[], bool], seconds: float, complaint: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise Broken(f"{complaint} within {seconds:g} s")
        time.sleep(0.05)


def _run(argv: list[str]) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise Broken(f"{' '.join(argv)}: {done.stderr.strip() or f'exit code {done.returncode}'}")


def _output(argv: list[str]) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=30)
    if done.returncode != 0:
        raise Broken(f"{' '.join(argv)}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout


_numbers = itertools.count(1)


def _chapter(title: str) -> None:
    print(f"\n{next(_numbers)}. {title}", flush=True)


def _indent(text: str) -> None:
    for line in text.rstrip().splitlines():
        print(f"     {line}", flush=True)


def _hold(condition: bool, text: str) -> None:
    if not condition:
        raise Broken(f"failed: {text}")
    print(f"   ok: {text}", flush=True)
