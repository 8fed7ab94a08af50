"""Restarts, upgrades and kills under load on a booted host: what was lost, what was uninspected, how long packets waited.

By hand, as root: `python tests/booted/gaps.py bookworm --restarts 50 --upgrades 10 --kills 50 --rate 20000 --connections 200`.
Each kind of event has a flow of datagrams of its own; its longest time on the way and its 99th percentile are those of all its
datagrams. --seconds bounds the time for one kind.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TOP), str(TOP / "support")]

from numbered import Connections, Numbered  # noqa: E402  # the path is set above

from booted.container import Container, Layer  # noqa: E402
from booted.nspawn import until  # noqa: E402
from booted.packages import packages  # noqa: E402
from booted.peers import main_pid, restarted  # noqa: E402
from booted.roots import RELEASES, base_root  # noqa: E402
from booted.test_packages import higher  # noqa: E402
from booted.test_restart import PROXY, UDP, configured, queue, worker  # noqa: E402


def restart(host: Container) -> None:
    """One restart."""
    host.run("systemctl", "restart", "nfq-agent")


def upgrade(host: Container) -> None:
    """The other of two versions."""
    host.shell(
        "cd /root; ls nfq-agent_*.deb higher.deb | grep -vxF \"$(cat last 2>/dev/null)\" | head -n 1 >next; mv next last;"
        "dpkg --force-confdef --force-confold --force-downgrade --install \"$(cat last)\"", timeout=120,
    )  # fmt: skip


def kill(host: Container, workers: bool = False) -> None:
    """Kill the main process, and the queue's worker too if `workers`."""
    pid = main_pid(host)
    host.shell(f"kill -KILL {pid} {worker(host) if workers else ''}")
    restarted(host, pid)


def measure(host: Container, name: str, count: int, event: Callable[[], None], flags: argparse.Namespace) -> None:
    """Print a line for `count` events of a kind."""
    before = queue(host)
    traffic = Numbered(host, flags.rate, "python3")
    connections = Connections(host, 8080, flags.connections, "python3")
    began = time.monotonic()
    done = 0
    while done < count and time.monotonic() - began < flags.seconds:
        event()
        done += 1
    took = time.monotonic() - began
    talk, flow = connections.end(), traffic.end()
    after = queue(host)
    received = after["workers"][0]["received"] - before["workers"][0]["received"]
    print(
        f"{name}: {done} in {took:.0f} s; {flow.sent} sent ({flow.sent / took:.0f} a second), {flow.arrived} arrived, "
        f"{received} judged, {after['workers'][0]['lost'] - before['workers'][0]['lost']} queued again, "
        f"{after['uninspected']} uninspected; on the way {flow.most:.1f} ms (99th percentile), {flow.worst:.1f} ms (worst); "
        f"{talk.unbroken} of {flags.connections} connections kept, {talk.others} short ones, {talk.failed} failed",
        flush=True,
    )


def main() -> None:
    """Boot a host and do it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0] if __doc__ else "")
    parser.add_argument("release", choices=[release.name for release in RELEASES])
    for name, default in (
        ("restarts", 50),
        ("upgrades", 10),
        ("kills", 50),
        ("rate", 20000),
        ("connections", 200),
        ("seconds", 100),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    flags = parser.parse_args()
    release = next(each for each in RELEASES if each.name == flags.release)
    built = packages(release)
    with Layer(base_root(release)) as layer:
        shutil.copy(built.deb, layer.root / "root")
        with Container(layer) as host:
            host.run("sh", "-c", f"apt-get install -y /root/{built.deb.name} 2>&1", timeout=300)
            host.write("/etc/systemd/system/nfq-agent.service.d/limits.conf", "[Unit]\nStartLimitIntervalSec=0\n")
            higher(host, "0.2.0~test", Path())
            for backend in ("legacy", "owned"):
                configured(host, UDP.format(backend=backend) + PROXY)
                until(lambda: host.show("nfq-agent", "ActiveState") == "active", "it serves")
                print(f"{release.name}, {backend}", flush=True)
                measure(host, "restarts", flags.restarts, lambda: restart(host), flags)
                measure(host, "upgrades", flags.upgrades, lambda: upgrade(host), flags)
                measure(host, "kills of the main process", flags.kills // 2, lambda: kill(host), flags)
                measure(host, "kills of main process and worker", flags.kills // 2, lambda: kill(host, workers=True), flags)


if __name__ == "__main__":
    main()
