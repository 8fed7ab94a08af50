"""A host to kill agents on: a namespace with foreign rules, traffic, and a record of all that an agent could leave behind."""

from __future__ import annotations

import fcntl
import mmap
import os
import re
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from namespace import Namespace

# What a killed or stopped agent may leave in /run: a lock that is free, a socket that the next start replaces (docs/restart.md).
FILES: Final = frozenset({"nfq-agent", "nfq-agent/default.lock", "nfq-agent/default.sock", "xtables.lock"})
# A table of each kind is there from the beginning, with a rule of another program.
_FOREIGN: Final = """
for command in iptables-legacy ip6tables-legacy; do
    for table in raw mangle nat filter; do
        $command -w -t $table -A OUTPUT -p sctp --dport 99 -m comment --comment foreign
    done
    $command -w -t mangle -A PREROUTING -p sctp --dport 98 -m comment --comment foreign
done
nft 'table inet foreign { chain out { type filter hook output priority 5; policy accept; tcp dport 99 accept; }; }'
ip link add veth0 type veth peer name veth1
# Without addresses, which would come and change by themselves.
ip link set veth0 addrgenmode none
ip link set veth1 addrgenmode none
ip link set veth0 up
ip link set veth1 up
ip rule add fwmark 0x7/0x7 lookup 77 priority 77
ip route add 198.51.100.0/24 dev lo table 77
"""
_SEEN: Final = """
for command in iptables-legacy-save ip6tables-legacy-save; do echo "== $command"; $command; done
echo "== nft"; nft -s list ruleset
echo "== rules"; ip rule; ip -6 rule
echo "== routes"; ip route show table all; ip -6 route show table all
echo "== links"; ip -o link
echo "== filters"
for name in veth0 veth1; do for side in ingress egress; do tc filter show dev $name $side 2>/dev/null || true; done; done
"""
_NOISE: Final = re.compile(r"^#.*$| \[\d+:\d+\]$| (expires|pref medium).*$", re.MULTILINE)
# Counts datagrams and exchanges in the file of argv[1] until its standard input ends, an hour at most.
_TRAFFIC: Final = """
import mmap, os, select, socket, struct, sys, time
counts = mmap.mmap(os.open(sys.argv[1], os.O_RDWR), 16)
values = [0, 0]
sink = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sink.bind(("127.0.0.1", 11000))
sink.setblocking(False)
server = socket.create_server(("0.0.0.0", 8080), backlog=64)
server.setblocking(False)
sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
begin = time.monotonic()
client = None
opened = 0.0
servers = []
number = 0
def close():
    global client
    if client is not None:
        client.close()
        client = None
while time.monotonic() - begin < 3600:
    if select.select([sys.stdin], [], [], 0.01)[0]:
        break
    number += 1
    now = time.monotonic()
    for _ in range(2):
        try:
            sender.sendto(b"x", ("127.0.0.1", 11000))
        except OSError:
            pass
    try:
        while sink.recv(10):
            values[0] += 1
    except OSError:
        pass
    if client is None and number % 5 == 0:
        client = socket.socket()
        client.setblocking(False)
        client.connect_ex(("127.0.0.1", 8080))
        opened = now
        asked = False
    try:
        while True:
            connection, _ = server.accept()
            connection.setblocking(False)
            servers.append((connection, now))
    except OSError:
        pass
    for each in list(servers):
        try:
            data = each[0].recv(100)
            if data:
                each[0].send(data)
            else:
                raise ConnectionError
        except BlockingIOError:
            if now - each[1] < 2:
                continue
            each[0].close()
            servers.remove(each)
        except OSError:
            each[0].close()
            servers.remove(each)
    if client is not None:
        try:
            if not asked:
                client.send(b"hello")
                asked = True
            if client.recv(100) == b"hello":
                values[1] += 1
            close()
        except BlockingIOError:
            if now - opened > 1:
                close()
        except OSError:
            if now - opened > 0.05:
                close()
    counts[:] = struct.pack("=QQ", *values)
"""


class World:
    """A namespace with traffic. `before` is how it was when no agent had run in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.namespace = Namespace()
        self._looked = 0.0
        self._found: list[int] = []
        try:
            # A user of its own, so that its making is not a step of each first start.
            self.namespace.shell("useradd --system --no-create-home --shell /usr/sbin/nologin proxyuser")
            self.namespace.shell(_FOREIGN)
            counts = folder / "traffic"
            counts.write_bytes(bytes(16))
            with counts.open("r+b") as file:
                self._counts = mmap.mmap(file.fileno(), 16)
            self._traffic = self.namespace.start(sys.executable, "-c", _TRAFFIC, str(counts), stdin=subprocess.PIPE)
            self.run = Path(f"/proc/{self.namespace.pid}/root/run")
            self._own = {self.namespace.pid, self._traffic.pid}
            # Once each command has been run: some leave a file.
            self.seen()
            self.before = self.seen()
            self.files_before = self.files()
        except BaseException:
            self.namespace.close()
            raise

    def close(self) -> None:
        """End it."""
        self._counts.close()
        self.namespace.close()

    def seen(self) -> str:
        """Tables, rules, routes and links."""
        text = self.namespace.shell(_SEEN)
        return "\n".join(line for line in _NOISE.sub("", text).splitlines() if line)

    def tables(self) -> str:
        """The part of `before` and `seen` that is tables."""
        return tables_of(self.seen())

    def files(self) -> set[str]:
        """The files below /run, without the copy of /etc."""
        found = set()
        for folder, folders, names in os.walk(self.run):
            if ".etc" in folders:
                folders.remove(".etc")
            found |= {str((Path(folder) / name).relative_to(self.run)) for name in (*names, *folders)}
        return found

    def stray_files(self) -> set[str]:
        """Those that should have been removed."""
        return self.files() - self.files_before - FILES

    def processes(self) -> list[int]:
        """Every process that lives inside, but the traffic's."""
        now = time.monotonic()
        # It reads all of /proc.
        if self._found and now - self._looked < 0.03:
            return self._found
        self._looked = now
        self._found = [pid for pid in self.namespace.processes() if pid not in self._own and not _ended(pid)]
        return self._found

    def passed(self) -> tuple[int, int]:
        """Datagrams that arrived, and exchanges over TCP, so far."""
        datagrams, exchanges = struct.unpack("=QQ", self._counts[:])
        return datagrams, exchanges

    def fill(self) -> None:
        """Leave no room in /run."""
        used = sum(path.stat().st_blocks * 512 for path in self.run.rglob("*") if path.is_file() and not path.is_symlink())
        self.namespace.shell(f"mount -o remount,size={used // 1024 + 64}k /run")
        with (self.run / "filler").open("wb", buffering=0) as filler:
            try:
                while True:
                    filler.write(bytes(4096))
            except OSError:
                pass

    def unfill(self) -> None:
        """Make room again."""
        (self.run / "filler").unlink(missing_ok=True)
        self.namespace.shell("mount -o remount,size=64m /run")


def tables_of(seen: str) -> str:
    """The tables alone."""
    return seen.partition("== rules")[0]


def _ended(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True
    return stat.rpartition(")")[2].split()[0] in "ZX"


def hold_lock(path: Path, seconds: float) -> int:
    """Hold the lock of xtables for so long, in a process of its own; its pid."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX)
            os.write(writer, b"x")
            time.sleep(seconds)
        finally:
            os._exit(0)
    os.close(writer)
    os.read(reader, 1)
    os.close(reader)
    return pid
