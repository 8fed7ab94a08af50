"""The installed service on a booted Debian: its life, its ends, and that nothing is left."""

from __future__ import annotations

import json
import re
from pathlib import Path

from booted.container import Container
from booted.nspawn import until
from booted.packages import Installed
from booted.peers import exchange, foreign_rules, main_pid, nothing_left, ours, saved, status, steady
from booted.roots import Release


def test_installing_starts_it(installed: Installed) -> None:
    assert installed.state == "active", installed.output
    assert installed.enabled == "enabled"
    assert installed.rules.count("--queue-num 100") == 4


def test_it_comes_up_at_boot_and_serves(host: Container, release: Release) -> None:
    assert host.show("nfq-agent", "SubState") == "running"
    assert "Serving queue 100" in host.show("nfq-agent", "StatusText")
    exchange(host)
    report = status(host)
    (queue,) = report["queues"]
    (worker,) = queue["workers"]
    assert worker["received"] == worker["accepted"] > 20
    assert queue["uninspected"] == 0
    # Debian 13's iptables is one that python-iptables cannot read unaided; without mending, the nft backend would be used.
    assert report["backend"] == "legacy"
    version = host.run("iptables-legacy", "--version").stdout
    assert ("1.8.9" if release.name == "bookworm" else "1.8.11") in version
    # Both releases' `iptables` is the nft kind, which does not show legacy rules.
    assert "nf_tables" in host.run("iptables", "--version").stdout
    passwd = host.run("getent", "passwd", "proxyuser").stdout.strip().split(":")
    assert int(passwd[2]) < 1000
    assert passwd[5:] == ["/", "/usr/sbin/nologin"]


def test_it_starts_before_the_network_is_configured(host: Container) -> None:
    before = set(host.show("nfq-agent", "Before").split())
    assert {"network-pre.target", "shutdown.target"} <= before
    assert host.show("network-pre.target", "ActiveState") == "active"
    ready = int(host.show("nfq-agent", "ActiveEnterTimestampMonotonic"))
    assert 0 < ready <= int(host.show("network-pre.target", "ActiveEnterTimestampMonotonic"))


def test_the_log_is_in_the_journal_with_fields(host: Container) -> None:
    host.write("/etc/nfq-agent/conf.d/log.toml", '[queue.main]\nelements = ["log"]\n')
    host.run("systemctl", "reload", "nfq-agent")
    exchange(host)
    lines = until(
        lambda: host.journal("--unit=nfq-agent", "NFQ_DPORT=11000", "--output=json").splitlines(), "an entry for port 11000"
    )
    entry = json.loads(lines[0])
    assert entry["NFQ_DST"] in ("127.0.0.1", "::1")
    assert entry["NFQ_PROTO"].lower() == "tcp"
    assert entry["NFQ_VERDICT"].lower() == "accept"
    assert entry["NFQ_QUEUE"] == "100"
    assert int(entry["NFQ_SPORT"]) > 0
    assert entry["PRIORITY"] == "6"
    assert entry["_SYSTEMD_UNIT"] == "nfq-agent.service"


def test_reload_restart_stop(host: Container) -> None:
    host.run("systemctl", "stop", "nfq-agent")
    foreign_rules(host)
    before = saved(host)
    host.run("systemctl", "start", "nfq-agent")
    pid = main_pid(host)
    assert len([line for line in ours(host) if "--ports 11000" in line]) == 4

    host.write("/etc/nfq-agent/conf.d/ports.toml", "[rules.app]\ntcp_ports = [11000, 12000]\n")
    with steady(host) as connection:
        host.run("systemctl", "reload", "nfq-agent")
        assert len([line for line in ours(host) if "--ports 11000,12000" in line]) == 4
        assert main_pid(host) == pid
        host.run("systemctl", "restart", "nfq-agent")
    assert connection.rounds > 0
    assert main_pid(host) != pid
    assert len([line for line in ours(host) if "--ports 11000,12000" in line]) == 4
    exchange(host, 12000)

    nothing_left(host, before)


def test_a_person_s_restarts_do_not_run_into_the_start_limit(host: Container) -> None:
    for _ in range(8):
        host.run("systemctl", "restart", "nfq-agent")
    assert host.show("nfq-agent", "ActiveState") == "active"


def test_two_instances(host: Container) -> None:
    host.run("systemctl", "stop", "nfq-agent")
    foreign_rules(host)
    before = saved(host)
    host.run("systemctl", "start", "nfq-agent")
    alone = saved(host)
    host.write("/etc/nfq-agent/second.toml", "[queue.main]\nnum = 7\n[rules.app]\nqueue = 'main'\ntcp_ports = [14000]\n")
    host.run("systemctl", "start", "nfq-agent@second")
    assert len([line for line in ours(host) if "--queue-num 7 " in line and "second" in line]) == 4
    exchange(host)
    exchange(host, 14000)
    assert status(host, "--instance", "second")["queues"][0]["workers"][0]["received"] > 0
    host.run("systemctl", "reload", "nfq-agent@second")
    pid = main_pid(host, "nfq-agent@second")
    host.run("systemctl", "restart", "nfq-agent")
    assert main_pid(host, "nfq-agent@second") == pid
    assert status(host, "--instance", "second")["instance"] == "second"
    host.run("systemctl", "stop", "nfq-agent@second")
    assert saved(host) == alone
    # The first is still there for the verbs: the second took no shared folder with it.
    assert status(host)["instance"] == "default"
    nothing_left(host, before)


def test_the_owned_backend(host: Container) -> None:
    """Rules in a table that belongs to the agent: no other process can flush them, and a kill removes them."""
    host.run("systemctl", "stop", "nfq-agent")
    foreign_rules(host)
    before = saved(host)
    host.write("/etc/nfq-agent/conf.d/owned.toml", '[agent]\nbackend = "owned"\n')
    started = host.run("systemctl", "start", "nfq-agent", check=False)
    assert started.returncode == 0, host.journal("--unit=nfq-agent")
    assert saved(host) == before
    host.run("nft", "flush", "ruleset")
    assert "table ip nfq-agent-default" in host.run("nft", "list", "tables").stdout
    exchange(host)
    host.run("systemctl", "stop", "nfq-agent")
    assert ours(host) == []
    assert "nfq-agent" not in host.run("nft", "list", "ruleset").stdout


def test_metrics_are_served_on_request_by_a_unit_without_rights(host: Container) -> None:
    assert host.show("nfq-agent-metrics.socket", "ActiveState") == "inactive"
    assert host.show("nfq-agent-metrics.socket", "UnitFileState") == "disabled"
    host.run("systemctl", "start", "nfq-agent-metrics.socket")
    exchange(host)
    scrape = (
        "python3",
        "-c",
        "from urllib.request import urlopen; print(urlopen('http://127.0.0.1:9749/metrics', None, 30).read().decode())",
    )
    scraped = host.run(*scrape).stdout
    assert 'nfq_agent_up{agent="default"} 1.0' in scraped
    accepted = re.search(r'^nfq_agent_verdicts_total{.*verdict="accept".*} ([0-9.]+)$', scraped, re.MULTILINE)
    assert accepted is not None
    assert float(accepted[1]) > 20
    pid = host.show("nfq-agent-metrics.service", "MainPID")
    state = host.shell(f"cat /proc/{pid}/status")
    assert re.search(r"^CapEff:\t0+$", state, re.MULTILINE)
    assert re.search(r"^NoNewPrivs:\t1$", state, re.MULTILINE)
    host.run("systemctl", "stop", "nfq-agent")
    assert 'nfq_agent_up{agent="default"} 0.0' in host.run(*scrape).stdout


def test_the_sandbox(host: Container) -> None:
    done = host.run("systemd-analyze", "security", "--no-pager", "--threshold=15", "nfq-agent.service", check=False)
    assert done.returncode == 0, done.stdout
    assert host.run("systemd-analyze", "verify", "--man=no", "nfq-agent.service", "nfq-agent@x.service").stderr == ""
    processes = {"main": main_pid(host), "worker": status(host)["queues"][0]["workers"][0]["pid"]}
    uid = host.run("id", "-u", "proxyuser").stdout.strip()
    for name, pid in processes.items():
        found = dict(re.findall(r"^(\w+):\s+(.*)$", host.shell(f"cat /proc/{pid}/status"), re.MULTILINE))
        assert found["Uid"].split() == [uid] * 4
        assert found["NoNewPrivs"] == "1"
        assert found["Seccomp"] == "2"
        # CAP_NET_ADMIN is 12, CAP_NET_RAW 13 (capabilities(7)).
        assert int(found["CapEff"], 16) == (1 << 12 if name == "worker" else 3 << 12)
        assert int(found["CapPrm"], 16) == int(found["CapEff"], 16)
    pid = processes["worker"]
    assert host.run("ls", f"/proc/{pid}/root/home", check=False).returncode != 0


def test_what_root_runs_by_hand_is_not_in_the_service_s_way(host: Container) -> None:
    host.write("/etc/nfq-agent/second.toml", "[queue.main]\nnum = 7\n[rules.app]\nqueue = 'main'\ntcp_ports = [14000]\n")
    words = ("--config", "/etc/nfq-agent/second.toml", "--instance", "second")
    done = host.run("timeout", "--signal=TERM", "2", "nfq-agent", "run", *words, check=False)
    assert "is serving queue 7" in done.stdout + done.stderr
    host.run("systemctl", "start", "nfq-agent@second")
    assert status(host, "--instance", "second")["queues"][0]["workers"][0]["number"] == 7


def drop_in(host: Container, name: str) -> None:
    """Put one of the package's drop-ins into force."""
    host.run("mkdir", "-p", "/etc/systemd/system/nfq-agent.service.d")
    host.run("ln", "-sf", f"/usr/share/nfq-agent/drop-ins/{name}.conf", "/etc/systemd/system/nfq-agent.service.d/")
    host.run("systemctl", "daemon-reload")


REJECTS = """
[queue.main]
elements = ["rules"]
[element.rules]
type = "policy"
[[element.rules.rule]]
dport = 9
action = "reject"
"""


def test_each_drop_in_does_what_it_is_for(host: Container) -> None:
    host.run("systemctl", "stop", "nfq-agent")
    features = {
        "reject": (REJECTS, "queue 100"),
        "tap": ('[tap.all]\ninterfaces = ["lo"]\n', "tap all"),
        "inline": ('[inline.all]\ninterfaces = ["lo"]\n', "inline all"),
    }
    for name, (config, serves) in features.items():
        host.write("/etc/nfq-agent/conf.d/feature.toml", config)
        assert host.run("systemctl", "start", "nfq-agent", check=False).returncode != 0, name
        host.run("systemctl", "reset-failed", "nfq-agent", check=False)
        drop_in(host, name)
        started = host.run("systemctl", "start", "nfq-agent", check=False)
        assert started.returncode == 0, (name, host.journal("--unit=nfq-agent"))
        assert serves in host.show("nfq-agent", "StatusText")
        host.run("systemctl", "stop", "nfq-agent")
        host.run("rm", f"/etc/systemd/system/nfq-agent.service.d/{name}.conf", "/etc/nfq-agent/conf.d/feature.toml")
        host.run("systemctl", "daemon-reload")


_ATTACK = """
import socket
end = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
end.bind(("127.0.0.1", 11000)); end.settimeout(5)
out = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for data in (b"before", b"attack", b"after"):
    out.sendto(data, ("127.0.0.1", 11000))
    assert end.recv(100) == data
"""


def test_a_worker_that_is_taken_over(host: Container) -> None:
    host.run("systemctl", "stop", "nfq-agent")
    source = Path(__file__).parent.parent / "support" / "taken_over.py"
    host.write("/etc/nfq-agent/elements/taken_over.py", source.read_text())
    host.write(
        "/etc/nfq-agent/conf.d/attack.toml",
        '[agent]\nconfinement = "required"\n[queue.main]\nelements = ["evil"]\n'
        '[element.evil]\ntype = "taken_over:TakenOver"\n[rules.udp]\nqueue = "main"\nudp_ports = [11000]\n',
    )
    started = host.run("systemctl", "start", "nfq-agent", check=False)
    assert started.returncode == 0, host.journal("--unit=nfq-agent")
    before, nft = saved(host), host.run("nft", "list", "ruleset").stdout
    host.run("python3", "-c", _ATTACK)
    until(lambda: "attempts end" in host.journal("--unit=nfq-agent"), "all was tried")
    found = dict(re.findall(r"attempt (.+): (\w+)\s*$", host.journal("--unit=nfq-agent"), re.MULTILINE))
    assert len(found) > 70
    # ENOENT: not in the sandbox's file system at all.
    assert {name: how for name, how in found.items() if how not in ("EPERM", "EACCES", "ENOENT")} == {}
    assert (saved(host), host.run("nft", "list", "ruleset").stdout) == (before, nft)
    assert status(host)["queues"][0]["workers"][0]["restarts"] == 0


def test_a_proxy_needs_the_unit_to_allow_ip(host: Container) -> None:
    host.run("systemctl", "stop", "nfq-agent")
    before = saved(host)
    host.write(
        "/etc/nfq-agent/conf.d/proxy.toml",
        '[proxy.tcp]\nlisten = ["127.0.0.1:15002"]\n'
        '[rules.proxied]\nproxy = "tcp"\nhooks = ["output"]\ntcp_ports = [8080]\nfamily = "inet"\n',
    )
    assert host.run("systemctl", "start", "nfq-agent", check=False).returncode != 0
    assert host.show("nfq-agent", "ExecMainStatus") == "78"
    assert "IPAddressDeny" in host.journal("--unit=nfq-agent")
    assert saved(host) == before
    drop_in(host, "proxy")
    host.run("systemctl", "start", "nfq-agent")
    host.run("python3", "-c", _THROUGH_PROXY)
    (proxy,) = status(host)["proxies"]
    assert proxy["counters"]["connections"] >= 1


_THROUGH_PROXY = """
import socket
server = socket.create_server(("127.0.0.1", 8080))
client = socket.create_connection(("127.0.0.1", 8080), timeout=10)
server.settimeout(10)
connection, peer = server.accept()
assert peer != client.getsockname(), "the connection did not go through the proxy"
client.sendall(b"there")
assert connection.recv(5) == b"there"
connection.sendall(b"back")
assert client.recv(4) == b"back"
"""
