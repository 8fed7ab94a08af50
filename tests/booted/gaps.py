"""Restarts, upgrades and kills under load on a booted host: what was lost, what was uninspected, how long packets waited.

By hand, as root: `python tests/booted/gaps.py bookworm`. `--rounds 5` does a tenth of it; `--kinds restarts,kills` these alone.
Each kind of event has a flow of datagrams of its own. Sent and judged are counted by rules of another program, behind the queue:
judged are the datagrams that came by with the mark of a verdict. What did not come that far is lost: in the queue, as the kernel
counts it (full: its length; unread: the buffer of its socket), or elsewhere. What came and found no room in the buffer of the
receiver is counted apart. Times: of all datagrams of the kind the 99th percentile, and the longest of each event.
Exit code 1 if a count is not as it has to be. --seconds bounds the time for one kind.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

TOP = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TOP), str(TOP / "support")]

from numbered import Connections, Flow, Numbered, Talk  # noqa: E402  # the path is set above

from booted.container import Container, Layer  # noqa: E402  # found by the path above
from booted.nspawn import until  # noqa: E402  # found by the path above
from booted.packages import packages  # noqa: E402  # found by the path above
from booted.peers import main_pid, restarted  # noqa: E402  # found by the path above
from booted.roots import RELEASES, Release, base_root  # noqa: E402  # found by the path above
from booted.test_restart import PROXY, UDP, configured, queue, worker  # noqa: E402  # found by the path above

# Packages of other commits, by the name of their file. The first hands over as this one does. The second is version 0.1.0, which
# cannot hand anything over: from it and to it the service is stopped and started.
_EARLIER: Final = {"earlier.deb": "f6328cb", "before.deb": "2320488"}
_ELEMENT: Final = """
from nfq_agent import Action, PacketElement, Verdict
class Seen(PacketElement):
    def decide(self, packet, flow):
        return Verdict(Action.ACCEPT, mark=0x100)
"""
# All that were sent, and those of them that have the mark of the verdict.
_COUNT: Final = """
iptables-legacy -A OUTPUT -p udp --dport 11000 -m comment --comment sent
iptables-legacy -A OUTPUT -p udp --dport 11000 -m mark --mark 0x100/0x100 -m comment --comment judged
"""


@dataclass(frozen=True, slots=True)
class Kind:
    """count: of events. event: returns when it began, as monotonic seconds. hands_over: whether nothing may pass without a
    verdict. cuts: whether it ends connections."""

    name: str
    count: int
    event: Callable[[Container], float]
    hands_over: bool = True
    cuts: bool = False


def restart(host: Container) -> float:
    """One restart."""
    began = time.monotonic()
    host.run("systemctl", "restart", "nfq-agent")
    return began


def install(host: Container, package: str) -> None:
    """Install a version, higher or lower."""
    host.run(
        "dpkg", "--force-confdef", "--force-confold", "--force-downgrade", "--install", f"/root/{package}", timeout=300
    )  # fmt: skip


def in_turn(*names: str) -> Callable[[Container], float]:
    """An event: the next of these packages is installed, and serves."""
    turns = itertools.cycle(names)

    def event(host: Container) -> float:
        name = next(turns)
        began = time.monotonic()
        install(host, name)
        try:
            until(lambda: host.show("nfq-agent", "ActiveState") == "active", f"{name} serves")
        except AssertionError:
            print(host.journal("--unit=nfq-agent", "--lines=30"))
            raise
        return began

    return event


def kill(host: Container, also: Callable[[Container], str] = lambda _: "") -> float:
    """Kill the main process and these."""
    pid, others = main_pid(host), also(host)
    began = time.monotonic()
    # One that has ended with another is not a fault.
    host.shell(f"kill -KILL {pid} {others} || true")
    # To ask again and again takes processor time from what is measured.
    time.sleep(1)
    restarted(host, pid)
    return began


def everything(host: Container) -> str:
    """Every process of the service."""
    return host.shell("cat /sys/fs/cgroup/system.slice/nfq-agent.service/cgroup.procs").replace("\n", " ")


def kinds(flags: argparse.Namespace, backend: str, this: str) -> list[Kind]:
    """What is done with a backend."""
    found = [
        Kind("restarts", flags.restarts, restart),
        Kind("upgrades from an earlier commit and back", flags.upgrades, in_turn("earlier.deb", this)),
        Kind("kills of the main process", flags.kills // 2, kill),
        Kind("kills of main process and worker", flags.kills // 2, lambda host: kill(host, lambda host: str(worker(host)))),
        Kind("kills of all processes", flags.kills // 10, lambda host: kill(host, everything), cuts=True),
    ]
    if backend == "legacy":
        found.append(
            Kind(
                "upgrades from 0.1.0 (before) and back", flags.upgrades, in_turn("before.deb", this), hands_over=False, cuts=True
            )
        )
    return [kind for kind in found if any(word in kind.name for word in flags.kinds.split(","))]


class Parts(NamedTuple):
    """Of an event, in milliseconds: until systemd started the program, until it served, and of that time how long the main
    process ran and how long it waited for a processor (schedstat of proc(5))."""

    started: float
    served: float
    ran: float
    waited: float


def parts(host: Container, began: float) -> Parts:
    """Of the event that began at a time of the monotonic clock."""
    names = ("ExecMainStartTimestampMonotonic", "ActiveEnterTimestampMonotonic")
    started, served = (int(host.show("nfq-agent", name)) / 1e3 for name in names)
    ran, waited, _ = map(int, host.shell(f"cat /proc/{main_pid(host)}/schedstat").split())
    return Parts(started - began * 1e3, served - started, ran / 1e6, waited / 1e6)


def counted(host: Container) -> Mapping[str, int]:
    """What the rules have counted."""
    text = host.shell("iptables-legacy -nvxL OUTPUT")
    return {word: int(number) for number, word in re.findall(r"^ *(\d+) .*/\* (sent|judged) \*/", text, re.MULTILINE)}


def dropped(host: Container) -> tuple[int, int]:
    """What the kernel dropped since the queue was opened: because it was full, and because its socket was."""
    lines = [line.split() for line in host.shell("cat /proc/net/netfilter/nfnetlink_queue").splitlines()]
    return sum(int(each[5]) for each in lines), sum(int(each[6]) for each in lines)


def measure(host: Container, kind: Kind, flags: argparse.Namespace) -> bool:
    """Print a line for a kind. Whether its counts are right."""
    host.shell("iptables-legacy -Z OUTPUT")
    before = queue(host)["uninspected"]
    # Should an event take long, the traffic is there to its end.
    bound = flags.seconds + 60
    traffic = Numbered(host, flags.rate, "python3", bound)
    connections = Connections(host, 8080, flags.connections, "python3", flags.pause, bound)
    began = time.monotonic()
    found: list[Parts] = []
    while (done := len(found)) < kind.count and time.monotonic() - began < flags.seconds:
        found.append(parts(host, kind.event(host)))
        traffic.divide()
    took = time.monotonic() - began
    talk, flow = connections.end(), traffic.end()
    by_rules, status = counted(host), queue(host)
    full, unread = dropped(host)
    uninspected = status["uninspected"] - before if kind.hands_over else status["uninspected"]
    medians = zip(Parts._fields, map(statistics.median, zip(*found, strict=True)), strict=True)
    right = done == kind.count and is_right(kind, flow, talk, by_rules["judged"], uninspected, flags.connections)
    worst = sorted(flow.divided[:done]) or [0.0]
    print(
        f"{'' if right else 'WRONG: '}{kind.name}: {done} in {took:.0f} s; {flow.sent} sent ({flow.sent / took:.0f}/s), "
        f"{flow.arrived} arrived, {by_rules['sent']} passed, {by_rules['judged']} judged, {uninspected} uninspected (status), "
        f"{flow.lost} lost (queue full {full}, unread {unread}), {flow.full} without room at the receiver; waits "
        f"{flow.most:.1f} ms (99th percentile of all), the longest of an event {worst[len(worst) // 2]:.1f} ms (median), "
        f"{worst[len(worst) * 99 // 100]:.1f} ms (99th percentile), {worst[-1]:.1f} ms (worst); {talk.unbroken} of "
        f"{flags.connections} connections kept, {talk.failed} of {talk.others} short ones failed; median of an event: "
        f"{', '.join(f'{name} {median:.0f} ms' for name, median in medians)}; "
        f"load {os.getloadavg()[0]:.0f}",
        flush=True,
    )
    return right


def is_right(kind: Kind, flow: Flow, talk: Talk, judged: int, uninspected: int, connections: int) -> bool:
    """Nothing lost; and, as the kind allows, all judged and no connection broken."""
    inspected = not kind.hands_over or (judged == flow.sent and uninspected == 0)
    return flow.lost == 0 and inspected and (kind.cuts or (talk.unbroken, talk.failed) == (connections, 0))


@contextmanager
def source_of(commit: str) -> Iterator[Path]:
    """A working tree of a commit."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "clone", "--quiet", "--shared", "--no-checkout", str(TOP.parent), folder], check=True)
        subprocess.run(["git", "-C", folder, "checkout", "--quiet", commit], check=True)
        yield Path(folder)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("release", choices=[release.name for release in RELEASES])
    for name, default in (("rounds", 50), ("rate", 20000), ("connections", 200), ("seconds", 110)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name in ("restarts", "upgrades", "kills"):
        parser.add_argument(f"--{name}", type=int, help="else --rounds, of upgrades a fifth")
    parser.add_argument("--pause", type=float, default=0.2, help="seconds between two exchanges of a connection (%(default)s)")
    parser.add_argument("--deb", type=Path, help="a package, else that of this tree is built")
    parser.add_argument("--backends", default="legacy,owned")
    parser.add_argument("--kinds", default="restarts,upgrades,kills", help="words of their names")
    flags = parser.parse_args()
    for name, default in (("restarts", flags.rounds), ("upgrades", flags.rounds // 5 // 2 * 2 or 2), ("kills", flags.rounds)):
        if getattr(flags, name) is None:
            setattr(flags, name, default)
    return flags


def install_all(host: Container, release: Release, folder: Path, wanted: list[str], given: Path | None) -> str:
    """Install this version, or the package that is given, and put the earlier ones that are wanted beside it in /root.

    Returns the name of its file.
    """
    deb = packages(release).deb if given is None else given
    shutil.copy(deb, folder)
    host.run("sh", "-c", f"apt-get install -y /root/{deb.name} 2>&1", timeout=300)
    host.write("/etc/systemd/system/nfq-agent.service.d/limits.conf", "[Unit]\nStartLimitIntervalSec=0\n")
    host.write("/etc/nfq-agent/elements/seen.py", _ELEMENT)
    for name, commit in _EARLIER.items():
        if name in wanted:
            with source_of(commit) as source:
                shutil.copy(packages(release, top=source).deb, folder / name)
    host.shell(_COUNT)
    return deb.name


def main() -> int:
    """Boot a host and do it."""
    flags = arguments()
    release = next(each for each in RELEASES if each.name == flags.release)
    right = True
    with Layer(base_root(release)) as layer, Container(layer) as host:
        words = flags.kinds.split(",")
        wanted = [name for name in _EARLIER if "upgrades" in words or name.removesuffix(".deb") in words]
        this = install_all(host, release, layer.root / "root", wanted, flags.deb)
        for backend in flags.backends.split(","):
            text = UDP.format(backend=backend).replace("max_len", 'elements = ["seen:Seen"]\nmax_len')
            configured(host, text + PROXY)
            until(lambda: host.show("nfq-agent", "ActiveState") == "active", "it serves")
            print(f"{release.name}, {backend}", flush=True)
            for kind in kinds(flags, backend, this):
                right &= measure(host, kind, flags)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
