"""The installed service on a booted Debian: its life, its ends, and that nothing is left."""

from __future__ import annotations

import json
import re
from pathlib import Path

from booted.container import Container
from booted.nspawn import until
from booted.packages import Installed
from booted.peers import drop_in, exchange, foreign_rules, main_pid, nothing_left, ours, saved, settled, status, steady
from booted.roots import Release


def test_installing_starts_it(installed: Installed) -> None:
    assert installed.state == "active", installed.output
    assert installed.enabled == "enabled"
    assert installed.rules.count("--queue-num 100") == 4


def test_it_comes_up_at_boot_and_serves(host: Container, release: Release) -> None:
    assert host.show("nfq-agent", "SubState") == "running"
    until(lambda: "Serving queue 100" in host.show("nfq-agent", "StatusText"), "the status is told")
    exchange(host)
    report = settled(host)
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


def test_the_demo_runs_from_the_package_in_a_container(host: Container) -> None:
    before = saved(host)
    done = host.run("nfq-agent", "demo")
    assert "Every step passed" in done.stdout
    assert saved(host) == before


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
    # It takes away what this backend does not need.
    drop_in(host, "owned")
    assert "AF_INET" not in host.show("nfq-agent", "RestrictAddressFamilies").split()
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


def test_flows_are_exported_by_a_unit_without_rights(host: Container) -> None:
    assert host.show("nfq-agent-flows.service", "UnitFileState") == "disabled"
    target = "/var/lib/nfq-agent-flows/flows.json"
    line = f"/usr/bin/nfq-agent export json --idle 1s --to {target}"
    host.write("/etc/systemd/system/nfq-agent-flows.service.d/to.conf", f"[Service]\nExecStart=\nExecStart={line}\n")
    host.run("systemctl", "daemon-reload")
    host.run("systemctl", "start", "nfq-agent-flows")
    until(lambda: "go to" in host.run("journalctl", "-u", "nfq-agent-flows", "-o", "cat").stdout, "the exporter reads flows")
    exchange(host)
    until(lambda: '"event": "flow"' in host.run("cat", target, check=False).stdout, "the flow is written")
    pid = host.show("nfq-agent-flows.service", "MainPID")
    state = host.shell(f"cat /proc/{pid}/status")
    assert re.search(r"^CapEff:\t0+$", state, re.MULTILINE)
    assert re.search(r"^NoNewPrivs:\t1$", state, re.MULTILINE)
    assert not re.search(r"^Uid:\t0\t", state, re.MULTILINE)


def exposure(host: Container) -> float:
    """What systemd-analyze makes of the unit: 0 to 10."""
    shown = host.run("systemd-analyze", "security", "--no-pager", "nfq-agent.service").stdout
    found = re.search(r"Overall exposure level for nfq-agent.service: ([0-9.]+)", shown)
    assert found is not None, shown
    return float(found[1])


def test_the_exposure_of_the_unit_and_of_its_drop_ins(host: Container) -> None:
    found = {"": exposure(host)}
    for name in host.run("ls", "/usr/share/nfq-agent/drop-ins").stdout.split():
        drop_in(host, name.removesuffix(".conf"))
        found[name] = exposure(host)
        host.run("rm", f"/etc/systemd/system/nfq-agent.service.d/{name}")
        host.run("systemctl", "daemon-reload")
    most = {"": 1.3, "owned.conf": 1.1, "proxy.conf": 1.5, "reject.conf": 1.7, "tap.conf": 1.7, "inline.conf": 1.7,
            "containers.conf": 1.7, "exe.conf": 1.7, "docker.conf": 1.4, "podman.conf": 1.3}  # fmt: skip
    assert found.keys() == most.keys()
    assert {name: figure for name, figure in found.items() if figure > most[name]} == {}


def test_the_folder_in_run_belongs_to_root_and_its_socket_to_the_readers(host: Container) -> None:
    def socket() -> str:
        return host.run("stat", "--format=%i %U %G %a %F", "/run/nfq-agent/default.sock").stdout

    assert host.run("stat", "--format=%U %a", "/run/nfq-agent").stdout == "root 755\n"
    first = socket()
    assert first.endswith(" root nfq-agent 660 socket\n")
    host.run("systemctl", "restart", "nfq-agent")
    assert socket() == first
    host.run("nfq-agent", "restart")
    assert socket() == first
    as_agent = ("setpriv", "--reuid=proxyuser", "--regid=proxyuser", "--init-groups")
    host.run(*as_agent, "nfq-agent", "status")
    for attempt in ("touch /run/nfq-agent/x", "rm -f /run/nfq-agent/default.sock", "echo >/run/nfq-agent/default.lock"):
        assert host.run(*as_agent, "sh", "-c", attempt, check=False).returncode != 0, attempt
    # A second agent of the same instance is refused, also in another network namespace, which has queues of its own.
    for before in ((), ("unshare", "--net")):
        refused = host.run(*before, "nfq-agent", "run", check=False)
        # Its pid is known where it can be asked for: by the name of a socket in its network namespace.
        pid = "unknown" if before else main_pid(host)
        assert f"an agent of instance default is already running (pid {pid})" in refused.stdout + refused.stderr
    said = host.run("systemctl", "stop", "nfq-agent").stderr
    # systemctl waits for the service alone: the socket stops in the same transaction, a moment later at times.
    assert said == "" or re.fullmatch(r"(Warning: )?Stopping '?nfq-agent.service'?, but .*:\n *nfq-agent.socket\n", said)
    until(lambda: host.show("nfq-agent.socket", "ActiveState") == "inactive", "the socket goes with the agent")
    assert (
        "not running" in host.run("nfq-agent", "status", check=False).stderr
        or host.show("nfq-agent", "ActiveState") == "inactive"
    )
    assert host.show("nfq-agent", "ActiveState") == "inactive"


def test_a_stop_is_a_stop_while_clients_ask(host: Container) -> None:
    asking = host.start("sh", "-c", "for i in $(seq 60); do nfq-agent status; done >/dev/null 2>&1")
    for _ in range(5):
        host.run("systemctl", "start", "nfq-agent")
        host.run("systemctl", "stop", "nfq-agent")
        until(lambda: host.show("nfq-agent.socket", "ActiveState") == "inactive", "the socket goes with the agent")
        assert host.show("nfq-agent", "ActiveState") == "inactive"
    asking.kill()
    asking.wait()


def test_the_sandbox(host: Container) -> None:
    assert host.run("systemd-analyze", "verify", "--man=no", "nfq-agent.service", "nfq-agent@x.service").stderr == ""
    processes = {"main": main_pid(host), "worker": status(host)["queues"][0]["workers"][0]["pid"]}
    uid, gid = (host.run("id", word, "proxyuser").stdout.strip() for word in ("-u", "-g"))
    groups = set(map(int, host.run("id", "-G", "proxyuser").stdout.split()))
    assert 0 not in groups
    for name, pid in processes.items():
        found = dict(re.findall(r"^(\w+):\s+(.*)$", host.shell(f"cat /proc/{pid}/status"), re.MULTILINE))
        assert found["Uid"].split() == [uid] * 4
        assert found["NoNewPrivs"] == "1"
        assert found["Seccomp"] == "2"
        # CAP_NET_ADMIN is 12 (capabilities(7)).
        assert int(found["CapEff"], 16) == 1 << 12, name
        assert set(map(int, found["Groups"].split())) == groups
        assert found["Gid"].split() == [gid] * 4
        assert int(found["CapPrm"], 16) == int(found["CapEff"], 16)
    assert host.show("nfq-agent", "TasksMax") == "512"
    pid = processes["worker"]
    assert host.run("ls", f"/proc/{pid}/root/home", check=False).returncode != 0


def test_what_root_runs_by_hand_is_not_in_the_service_s_way(host: Container) -> None:
    host.write("/etc/nfq-agent/second.toml", "[queue.main]\nnum = 7\n[rules.app]\nqueue = 'main'\ntcp_ports = [14000]\n")
    words = "--config /etc/nfq-agent/second.toml --instance second"
    host.shell(
        f"""
        nfq-agent run {words} >/run/by-hand.log 2>&1 &
        until grep -q "is serving queue 7" /run/by-hand.log; do kill -0 $!; sleep 0.1; done
        kill -TERM $!
        wait $!
        """,
        timeout=120,
    )
    host.run("systemctl", "start", "nfq-agent@second")
    assert status(host, "--instance", "second")["queues"][0]["workers"][0]["number"] == 7


_ATTACK = """
import socket
end = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
end.bind(("127.0.0.1", 11000)); end.settimeout(60)
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
