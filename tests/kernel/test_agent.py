"""The agent end to end: real packets, real rules, in a kernel of its own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from agent import COMMAND, Agent, ours, saved, suspend, until
from agent_flood import udp
from namespace import PATIENCE, Namespace
from traffic import CLIENT, PYTHON, echo, send

pytestmark = pytest.mark.kernel


def foreign(namespace: Namespace, count: int) -> None:
    """Load `count` foreign rules, spread over tables and families, and give some of them counters."""
    share = count // 4
    for command, tables in (("iptables-legacy", ("mangle", "filter", "nat")), ("ip6tables-legacy", ("mangle",))):
        lines = []
        for table in tables:
            address = "10.{}.{}.{}" if command == "iptables-legacy" else "fd00::{}:{}:{}"
            chain = "PREROUTING" if table == "nat" else "INPUT"
            target = "ACCEPT" if table == "nat" else "DROP"
            lines.append(f"*{table}\n:{chain} ACCEPT [{share}:{share * 40}]\n:theirs - [0:0]\n-A {chain} -j theirs")
            for number in range(share):
                place = address.format(number >> 16 & 255, number >> 8 & 255, number & 255)
                lines.append(f"[{number}:{number * 60}] -A theirs -s {place} -p tcp -m tcp --dport 7 -j {target}")
            lines.append("COMMIT")
        namespace.run(f"{command}-restore", "-c", input="\n".join(lines) + "\n")


def foreign_counters(namespace: Namespace) -> list[str]:
    """Another program's rules with their counters, those that nothing here can hit."""
    return [line for line in saved(namespace, counters=True).splitlines() if "-A theirs" in line]


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_100_megabytes_both_ways_and_one_verdict_for_each_packet(netns: Namespace, tmp_path: Path, address: str) -> None:
    agent = Agent(netns, tmp_path).ready()
    server = echo(netns, address, 11000)
    size = 100_000_000
    count, sent, got = netns.run(PYTHON, "-c", CLIENT, address, "11000", str(size)).stdout.split()
    assert (int(count), got) == (size, sent)
    assert server.wait(timeout=PATIENCE) == 0

    def hits() -> int:
        return sum(rule["packets"] for rule in agent.status()["rules"] if "NFQUEUE" in rule["rule"])

    # The last packets of the connection come behind what its ends wait for.
    until(lambda: hits() == agent.totals()["received"], "each packet that a rule took is judged")
    totals = agent.totals()
    assert hits() == totals["received"] == totals["accepted"] > 1000
    assert agent.queue()["uninspected"] == 0
    assert (totals["errors"], totals["dropped"], totals["waiting"]) == (0, 0, 0)
    assert agent.stop() == 0
    assert ours(netns) == []


def test_the_agents_own_traffic_is_not_queued(netns: Namespace, tmp_path: Path) -> None:
    agent = Agent(netns, tmp_path, udp()).ready()
    uid = netns.run("id", "-u", "proxyuser").stdout.strip()
    shout = "import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 11000))"
    netns.run("setpriv", f"--reuid={uid}", "--clear-groups", "/usr/bin/python3", "-c", shout)
    assert agent.totals()["received"] == 0
    netns.run("/usr/bin/python3", "-c", shout)
    until(lambda: agent.totals()["received"] == 1, "root's datagram is judged")


@pytest.mark.parametrize("count", [200, 20_000])
def test_every_other_rule_is_as_it_was(netns: Namespace, tmp_path: Path, count: int) -> None:
    foreign(netns, count)
    before, counters = saved(netns), foreign_counters(netns)
    agent = Agent(netns, tmp_path).ready()
    mine = ours(netns)
    assert len(mine) == 12, "two chains and four rules a family"
    assert [line for line in saved(netns).splitlines() if line not in set(mine)] == before.splitlines()
    agent.configure("[queue.main]\nnum = 100\n[rules.app]\nqueue = 'main'\ntcp_ports = [11000, 11001]\n")
    agent.process.send_signal(signal.SIGHUP)
    until(lambda: "reloaded" in agent.log, "it reloads")
    assert agent.stop() == 0
    assert (saved(netns), foreign_counters(netns)) == (before, counters)

    # kill -9, then `remove`, which needs no configuration.
    agent.start()
    agent.ready()
    agent.kill()
    assert ours(netns) != []
    agent.config.unlink()
    netns.run(*COMMAND, "remove")
    assert (saved(netns), foreign_counters(netns)) == (before, counters)
    assert "nothing to remove" in netns.run(*COMMAND, "remove").stdout


@pytest.mark.parametrize("count", [200, 20_000])
def test_a_reload_leaves_every_other_rule_as_it_was(netns: Namespace, tmp_path: Path, count: int) -> None:
    foreign(netns, count)
    before, counters = saved(netns), foreign_counters(netns)
    agent = Agent(netns, tmp_path, udp()).ready()
    one = ours(netns)
    agent.configure(udp(more="[rules.raw]\nqueue = 'main'\ntable = 'raw'\nhooks = ['prerouting']\ntcp_syn = true\n"))
    assert "reloaded" in agent.verb("reload").stdout
    assert set(one) < set(ours(netns))
    agent.configure(udp())
    agent.verb("reload")
    assert ours(netns) == one
    assert agent.stop() == 0
    # The reload made table raw present; that cannot be undone, and it is empty.
    left = [line for line in saved(netns).splitlines() if line not in ("*raw", "COMMIT") and not line.startswith(":")]
    assert left == [line for line in before.splitlines() if line != "COMMIT" and not line.startswith(":")]
    assert foreign_counters(netns) == counters


@pytest.mark.parametrize("count", [200, 20_000])
def test_a_stop_during_the_start_leaves_nothing(netns: Namespace, tmp_path: Path, count: int) -> None:
    foreign(netns, count)
    before, counters = saved(netns), foreign_counters(netns)
    for step in range(12):
        agent = Agent(netns, tmp_path)
        time.sleep(0.04 * step)
        agent.process.terminate()
        agent.process.wait(timeout=PATIENCE)
        assert (saved(netns), foreign_counters(netns)) == (before, counters), f"stopped after {0.04 * step:.2f} s:\n{agent.log}"
        until(lambda: netns.processes() == [], "no process is left")


def test_no_change_of_another_program_is_lost(netns: Namespace, tmp_path: Path) -> None:
    netns.run("iptables-legacy", "-w", "-t", "mangle", "-N", "theirs")
    # Each change is looked for after the next one, so that a revert between two of them is seen. It continues until told.
    script = """
    n=0
    while [ ! -e /run/enough ]; do
      n=$((n + 1))
      iptables-legacy -w -t mangle -A theirs -m comment --comment "added-$n" -j RETURN
      iptables-legacy -w -t mangle -R theirs 1 -m comment --comment "replaced-$n" -j RETURN
      iptables-legacy -w -t mangle -C theirs -m comment --comment "replaced-$n" -j RETURN || echo "lost: replaced-$n"
      if [ $((n % 2)) = 0 ]; then
        iptables-legacy -w -t mangle -D theirs 2 || echo "lost: added-$n"
      fi
    done
    echo $n
    """
    writer = netns.start("sh", "-c", script, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for _ in range(3):
        agent = Agent(netns, tmp_path).ready()
        assert agent.stop() == 0
    assert writer.poll() is None
    netns.run("touch", "/run/enough")
    assert writer.stdout is not None
    answer = writer.stdout.read().decode()
    assert re.fullmatch(r"\d+\n", answer), answer
    left = [line for line in saved(netns).splitlines() if "-A theirs" in line]
    expected: list[str] = []
    for number in range(1, int(answer) + 1):
        expected.append(f"added-{number}")
        expected[0] = f"replaced-{number}"
        if number % 2 == 0:
            del expected[1]
    assert [re.search(r'--comment "?([a-z0-9-]+)', line)[1] for line in left] == expected  # type: ignore[index]  # all have one
    assert ours(netns) == []


def test_two_instances_side_by_side_and_no_second_of_one(netns: Namespace, tmp_path: Path) -> None:
    first = Agent(netns, tmp_path, udp(), instance="a").ready()
    second = Agent(netns, tmp_path, udp().replace("100", "101").replace("11000", "11001"), instance="a-b").ready()
    both = ours(netns)
    refused = netns.run(*COMMAND, "run", "--config", str(first.config), check=False)
    assert refused.returncode == 1
    assert f"is already running (pid {first.process.pid})" in refused.stderr
    assert ours(netns) == both
    assert first.stop() == 0
    assert ours(netns) == [line for line in both if "a-b" in line]
    assert second.stop() == 0
    assert ours(netns) == []


def test_a_queue_of_another_process_is_named(netns: Namespace, tmp_path: Path) -> None:
    first = Agent(netns, tmp_path, udp(), instance="a").ready()
    second = Agent(netns, tmp_path, udp(), instance="b")
    assert second.process.wait(timeout=PATIENCE) == 1
    assert "queue 100: another process has already bound this queue" in second.log
    assert not [line for line in ours(netns) if ":b:" in line or "NFQA-b-" in line]
    assert first.process.poll() is None


def test_a_worker_has_one_capability_and_no_way_to_another(netns: Namespace, tmp_path: Path) -> None:
    agent = Agent(netns, tmp_path).ready()
    uid = netns.run("id", "-u", "proxyuser").stdout.strip()
    (worker,) = agent.workers()
    status = dict(line.split(":", 1) for line in Path(f"/proc/{worker}/status").read_text().splitlines() if ":" in line)
    assert status["Uid"].split() == [uid] * 4
    assert status["Groups"].split() == []
    net_admin = 1 << 12
    assert {name: int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {
        "CapInh": 0, "CapPrm": net_admin, "CapEff": net_admin, "CapBnd": net_admin, "CapAmb": 0,
    }  # fmt: skip
    assert status["NoNewPrivs"].strip() == "1"
    account = netns.run("getent", "passwd", "proxyuser").stdout.strip().split(":")
    assert account[5:] == ["/nonexistent", "/usr/sbin/nologin"]
    assert int(account[2]) < 1000
    held = {os.readlink(f"/proc/{worker}/fd/{name}") for name in os.listdir(f"/proc/{worker}/fd")}
    assert not [name for name in held if name.endswith((".lock", "xtables.lock"))]


def test_a_user_that_exists_is_used_as_it_is(netns: Namespace, tmp_path: Path) -> None:
    netns.run("useradd", "--shell", "/bin/sh", "--uid", "4242", "--create-home", "--home-dir", "/run/home", "proxyuser")
    before = netns.run("getent", "passwd", "proxyuser").stdout
    agent = Agent(netns, tmp_path).ready()
    assert any("--uid-owner 4242" in line for line in ours(netns))
    assert agent.stop() == 0
    netns.run(*COMMAND, "remove")
    assert netns.run("getent", "passwd", "proxyuser").stdout == before


def test_rules_that_another_program_removed_come_back(netns: Namespace, tmp_path: Path) -> None:
    agent = Agent(netns, tmp_path, '[agent]\ndrift_check = "200ms"\n' + udp()).ready()
    mine = ours(netns)
    netns.run("iptables-legacy", "-w", "-t", "mangle", "-D", "OUTPUT", "1")
    until(lambda: ours(netns) == mine, "the jump is back")
    until(lambda: agent.log.count("another program changed this agent's rules; repaired in 1 places") == 1, "one line says so")
    netns.run("ip6tables-legacy", "-w", "-t", "mangle", "-F", "NFQA-default-OUTPUT")
    until(lambda: ours(netns) == mine, "the chain is full again")
    assert agent.status()["drift"]["repairs"] == 2
    # A foreign rule among ours is removed; one beside ours stays.
    netns.run("iptables-legacy", "-w", "-t", "mangle", "-I", "NFQA-default-OUTPUT", "-j", "ACCEPT")
    netns.run("iptables-legacy", "-w", "-t", "mangle", "-I", "OUTPUT", "-p", "tcp", "--dport", "9")
    until(lambda: ours(netns) == mine, "the chain is ours alone")
    assert "-A OUTPUT -p tcp -m tcp --dport 9" in saved(netns)


def test_a_fight_over_the_rules_slows_down(netns: Namespace, tmp_path: Path) -> None:
    agent = Agent(netns, tmp_path, '[agent]\ndrift_check = "50ms"\n' + udp()).ready()
    netns.start("sh", "-c", "while :; do iptables-legacy -w -t mangle -D OUTPUT 1 2>/dev/null; sleep 0.01; done")
    # Each repair after a repair doubles the pause: 50 ms, 100 ms, 200 ms and so on (tests/unit/test_status.py).
    until(lambda: agent.status()["drift"]["pause"] >= 0.8, "the pause grows")


def test_packets_that_fail_open_are_counted(netns: Namespace, tmp_path: Path) -> None:
    agent = Agent(netns, tmp_path, udp(max_len=100)).ready()
    (worker,) = agent.workers()
    suspend(worker)
    # Quickly: a worker that is stopped for long is replaced.
    netns.call(send, 11000, 1000)
    os.kill(worker, signal.SIGCONT)
    until(lambda: agent.totals()["received"] == 100, "the hundred that waited are judged")
    queue = agent.queue()
    assert (queue["uninspected"], queue["kernel_dropped"], queue["user_dropped"]) == (900, 0, 0)


def test_packets_that_a_full_queue_drops_are_no_uninspected_ones(netns: Namespace, tmp_path: Path) -> None:
    agent = Agent(netns, tmp_path, udp(max_len=100, fail_open=False)).ready()
    (worker,) = agent.workers()
    suspend(worker)
    # Quickly: a worker that is stopped for long is replaced.
    netns.call(send, 11000, 1000)
    os.kill(worker, signal.SIGCONT)
    until(lambda: agent.totals()["received"] == 100, "the hundred that waited are judged")
    queue = agent.queue()
    assert (queue["uninspected"], queue["kernel_dropped"]) == (0, 900)


def test_a_long_held_xtables_lock_does_not_trigger_the_watchdog(netns: Namespace, tmp_path: Path) -> None:
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind(str(path))
        end.settimeout(PATIENCE)
        config = '[agent]\ndrift_check = "200ms"\n' + udp()
        agent = Agent(netns, tmp_path, config, NOTIFY_SOCKET=str(path), WATCHDOG_USEC="3000000").ready()
        mine = ours(netns)
        # The lock is held until the agent has spoken for longer than the watchdog waits; a repair is tried meanwhile, and made
        # as soon as it can be.
        holder = netns.start(
            "flock", "--close", "/run/xtables.lock", "sh", "-c",
            "XTABLES_LOCKFILE=/run/another iptables-legacy -w -t mangle -D OUTPUT 1; echo held; exec sleep 120",
            stdout=subprocess.PIPE,
        )  # fmt: skip
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        end.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while end.recv(4096):
                pass
        end.settimeout(PATIENCE)
        began = time.monotonic()
        while time.monotonic() - began < 4:
            while "WATCHDOG=1" not in end.recv(4096).decode():
                pass
        assert ours(netns) != mine
        holder.kill()
        until(lambda: ours(netns) == mine, "the jump is back")
        assert agent.process.poll() is None
        assert "xtables lock" in agent.log


def test_a_changed_file_is_reloaded_where_that_is_asked_for(netns: Namespace, tmp_path: Path) -> None:
    def text(ports: str) -> str:
        return f'[agent]\nreload_on_change = true\n[queue.main]\nnum = 100\n[rules.app]\nqueue = "main"\ntcp_ports = [{ports}]\n'

    agent = Agent(netns, tmp_path, text("11000")).ready()
    agent.configure(text("11000, 11001"))
    until(lambda: "11000,11001" in saved(netns), "the second port is in the rules")
    assert f"reloading: {agent.config} changed" in agent.log
    agent.configure(text('"many"'))
    until(lambda: "reload refused, the configuration in force stays" in agent.log, "a fault is refused")
    assert "11000,11001" in saved(netns)
    agent.configure(text("11002"))
    until(lambda: "--ports 11002" in saved(netns), "the next one is in force")
    assert agent.stop() == 0
    assert ours(netns) == []
