"""The service is restarted, killed and stopped under traffic: nothing is lost, and nothing passes without a verdict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from numbered import Connections, Numbered

from booted.container import Container
from booted.nspawn import until
from booted.peers import main_pid, ours, restarted, saved, status, without_start_limit
from booted.test_packages import higher

UDP = """
[agent]
backend = "{backend}"
[queue.main]
max_len = 16384
[rules.flood]
queue = "main"
hooks = ["output"]
family = "inet"
udp_ports = [11000]
"""
PROXY = """
[proxy.tcp]
listen = ["127.0.0.1:15002"]
[rules.proxied]
proxy = "tcp"
hooks = ["output"]
tcp_ports = [8080]
family = "inet"
"""
RATE = 1000


def configured(host: Container, text: str) -> None:
    """Serve a configuration from the start on."""
    host.run("systemctl", "stop", "nfq-agent")
    host.write("/etc/nfq-agent/conf.d/traffic.toml", text)
    host.write("/etc/systemd/system/nfq-agent.service.d/proxy.conf", "[Service]\nIPAddressDeny=\n")
    host.run("systemctl", "daemon-reload")
    host.run("systemctl", "start", "nfq-agent")


def queue(host: Container) -> dict[str, Any]:
    """The queue of the status."""
    (found,) = status(host)["queues"]
    return dict(found)


def worker(host: Container) -> int:
    """The process of the queue; 0 for none."""
    return int(queue(host)["workers"][0]["pid"] or 0)


def stored(host: Container) -> int:
    """How many descriptors the service manager keeps."""
    return int(host.show("nfq-agent", "NFileDescriptorStore"))


def all_inspected(host: Container, traffic: Numbered) -> None:
    """End the traffic: it has arrived whole, and had a verdict."""
    flow = traffic.end()
    print(flow)
    assert flow.arrived == flow.sent
    found = queue(host)
    (counters,) = found["workers"]
    assert found["uninspected"] == 0
    assert counters["received"] + counters["lost"] >= flow.sent


@pytest.mark.parametrize("backend", ["legacy", "owned"])
def test_restarts_lose_nothing_and_a_stop_is_a_stop(host: Container, backend: str) -> None:
    configured(host, UDP.format(backend=backend) + PROXY)
    before = stored(host)
    assert before >= 5
    traffic = Numbered(host, RATE, "python3")
    connections = Connections(host, 8080, 10, "python3")
    pid = main_pid(host)
    for _ in range(2):
        host.run("systemctl", "restart", "nfq-agent")
    assert main_pid(host) != pid
    assert stored(host) > before, "the process that has connections from before is kept"
    talk = connections.end()
    assert (talk.unbroken, talk.failed) == (10, 0)
    all_inspected(host, traffic)
    until(lambda: stored(host) == before, "a process without connections ends")
    host.run("systemctl", "stop", "nfq-agent")
    assert stored(host) == 0
    assert ours(host) == []
    assert host.shell("cat /proc/net/netfilter/nfnetlink_queue") == ""
    until(lambda: host.show("nfq-agent-rules", "ActiveState") == "inactive", "the unit beside it has swept")


@pytest.mark.parametrize("backend", ["legacy", "owned"])
def test_kills_lose_nothing(host: Container, backend: str) -> None:
    configured(host, UDP.format(backend=backend) + PROXY)
    with_agent = saved(host)
    traffic = Numbered(host, RATE, "python3")
    connections = Connections(host, 8080, 10, "python3")
    for kill_worker in (False, True):
        pid = main_pid(host)
        host.shell(f"kill -KILL {pid} {worker(host) if kill_worker else ''}")
        restarted(host, pid)
    assert saved(host) == with_agent
    talk = connections.end()
    assert (talk.unbroken, talk.failed) == (10, 0)
    all_inspected(host, traffic)


def test_a_supervisor_that_hangs_is_replaced_and_nothing_is_lost(host: Container) -> None:
    host.write("/etc/systemd/system/nfq-agent.service.d/test.conf", "[Service]\nWatchdogSec=3\n")
    configured(host, UDP.format(backend="legacy"))
    traffic = Numbered(host, RATE, "python3")
    pid = main_pid(host)
    host.shell(f"kill -STOP {pid}")
    restarted(host, pid)
    all_inspected(host, traffic)


def test_a_version_that_does_not_start_leaves_the_one_before_serving(host: Container) -> None:
    configured(host, UDP.format(backend="legacy"))
    without_start_limit(host)
    traffic = Numbered(host, RATE, "python3")
    host.write("/etc/systemd/system/nfq-agent.service.d/test.conf", "[Service]\nExecStart=\nExecStart=/bin/false\n")
    host.run("systemctl", "daemon-reload")
    before = worker(host)
    assert host.run("systemctl", "restart", "nfq-agent", check=False).returncode != 0
    until(lambda: int(host.show("nfq-agent", "NRestarts")) >= 2, "systemd tries again")
    host.run("rm", "/etc/systemd/system/nfq-agent.service.d/test.conf")
    host.run("systemctl", "daemon-reload")
    restarted(host, 0)
    assert worker(host) != before
    all_inspected(host, traffic)


def test_a_restart_with_a_bad_file_serves_what_was_served(host: Container) -> None:
    configured(host, UDP.format(backend="legacy"))
    with_agent = saved(host)
    traffic = Numbered(host, RATE, "python3")
    pid = main_pid(host)
    host.write("/etc/nfq-agent/conf.d/zz.toml", "[queue.main]\nmax_lem = 3\n")
    host.run("systemctl", "restart", "nfq-agent")
    assert main_pid(host) not in (0, pid)
    assert saved(host) == with_agent
    assert "from before the restart stays in force: /etc/nfq-agent/conf.d/zz.toml" in host.journal("--unit=nfq-agent")
    until(lambda: "not that of the files" in host.show("nfq-agent", "StatusText"), "the status says so")
    # So it does after a crash, and until a reload succeeds.
    pid = main_pid(host)
    host.shell(f"kill -KILL {pid}")
    restarted(host, pid)
    assert host.run("systemctl", "reload", "nfq-agent", check=False).returncode != 0
    host.run("rm", "/etc/nfq-agent/conf.d/zz.toml")
    host.run("systemctl", "reload", "nfq-agent")
    until(lambda: "not that of the files" not in host.show("nfq-agent", "StatusText"), "the status says that it is over")
    all_inspected(host, traffic)


def test_neither_a_crash_nor_a_restart_confirms_a_reload(host: Container) -> None:
    configured(host, UDP.format(backend="legacy"))
    before = saved(host)
    host.write("/etc/nfq-agent/conf.d/traffic.toml", UDP.format(backend="legacy").replace("11000", "11001"))
    host.run("nfq-agent", "reload", "--confirm", "600", "--no-wait")
    tried = saved(host)
    assert tried != before
    pid = main_pid(host)
    host.shell(f"kill -KILL {pid}")
    restarted(host, pid)
    host.run("systemctl", "restart", "nfq-agent")
    assert "still waits for its confirmation" in host.journal("--unit=nfq-agent")
    assert saved(host) == tried
    # That the time ends it as well is in tests/unit/test_trial.py.
    host.run("nfq-agent", "confirm", "--undo")
    assert saved(host) == before


def test_a_crash_for_good_is_swept(host: Container) -> None:
    host.write("/etc/systemd/system/nfq-agent.service.d/test.conf", "[Service]\nRestart=no\n")
    configured(host, UDP.format(backend="legacy") + PROXY)

    def found() -> list[str]:
        return host.shell("cat /sys/fs/cgroup/system.slice/nfq-agent.service/cgroup.procs").split()

    # Besides the agent, its worker and its proxy there may be a process that does one thing and ends.
    processes = until(lambda: len(found()) == 3 and found(), "the agent and its two processes run")
    host.shell(f"kill -KILL {main_pid(host)}")
    until(lambda: ours(host) == [], "the rules are gone")
    assert stored(host) == 0
    until(lambda: all(host.run("test", "-e", f"/proc/{pid}", check=False).returncode for pid in processes), "no process is left")
    assert host.shell("cat /proc/net/netfilter/nfnetlink_queue") == ""


def test_an_upgrade_loses_nothing(host: Container, tmp_path: Path) -> None:
    configured(host, UDP.format(backend="legacy") + PROXY)
    higher(host, "9.0.0~test", tmp_path)
    traffic = Numbered(host, RATE, "python3")
    connections = Connections(host, 8080, 10, "python3")
    pid = main_pid(host)
    host.run("dpkg", "--force-confdef", "--force-confold", "--install", "/root/higher.deb")
    assert main_pid(host) not in (0, pid)
    talk = connections.end()
    assert (talk.unbroken, talk.failed) == (10, 0)
    all_inspected(host, traffic)


def test_an_upgrade_to_code_that_does_not_start_says_so_and_a_reload_takes_code_that_does(
    host: Container, tmp_path: Path
) -> None:
    configured(host, UDP.format(backend="legacy"))
    traffic = Numbered(host, RATE, "python3")
    pid, before = main_pid(host), worker(host)
    code = "/usr/lib/nfq-agent/nfq_agent/service/supervisor.py"
    higher(host, "9.0.0~test", tmp_path)
    host.shell(
        f"cd /root; echo 'raise RuntimeError(\"broken\")' >>new{code}; "
        "dpkg-deb -Zgzip -z1 --build --root-owner-group new higher.deb"
    )
    done = host.run("sh", "-c", "dpkg --force-confdef --force-confold --install /root/higher.deb 2>&1")
    assert "keeps serving until it is restarted" in done.stdout
    assert (main_pid(host), worker(host)) == (pid, before)
    refused = host.run("systemctl", "reload", "nfq-agent", check=False)
    assert refused.returncode != 0
    assert (main_pid(host), worker(host)) == (pid, before)
    host.shell(f"sed -i '$d' {code}")
    host.run("systemctl", "reload", "nfq-agent")
    assert main_pid(host) == pid
    assert worker(host) != before
    all_inspected(host, traffic)
