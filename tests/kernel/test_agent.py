"""The agent end to end: real packets, real rules, in a kernel of its own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from agent import COMMAND, Agent, ours, saved, until
from namespace import Namespace
from traffic import CLIENT, ECHO, FLOOD, PYTHON, Flood

from nfq_agent.host.nfqueue.statistics import statistics

pytestmark = pytest.mark.kernel

UDP = """
[queue.main]
num = 100
max_len = {max_len}
fail_open = {fail_open}
bypass = {bypass}
[rules.app]
queue = "main"
hooks = ["output"]
udp_ports = [11000]
"""


def udp(max_len: int = 4096, fail_open: bool = True, bypass: bool = True, more: str = "") -> str:
    """A configuration that takes UDP to port 11000 on its way out."""
    return UDP.format(max_len=max_len, fail_open=str(fail_open).lower(), bypass=str(bypass).lower()) + more


def foreign(namespace: Namespace, count: int) -> None:
    """Load `count` rules of somebody else, spread over tables and families, and give some of them counters."""
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
    """Somebody else's rules with their counters, those that nothing here can hit."""
    return [line for line in saved(namespace, counters=True).splitlines() if "-A theirs" in line]


def flood(namespace: Namespace, count: int, rate: int = 100_000, address: str = "127.0.0.1") -> subprocess.Popen[bytes]:
    """Start a flood."""
    return namespace.start(PYTHON, "-c", FLOOD, address, "11000", str(count), str(rate), stdout=subprocess.PIPE)


def count_passed(namespace: Namespace) -> Callable[[], int]:
    """A rule behind ours (filter OUTPUT comes after mangle OUTPUT) that counts what passes; the function reads it."""
    namespace.run("iptables-legacy", "-w", "-A", "OUTPUT", "-p", "udp", "--dport", "11000")

    def passed() -> int:
        (line,) = [
            each for each in saved(namespace, counters=True).splitlines() if "-A OUTPUT -p udp -m udp --dport 11000" in each
        ]
        return int(re.match(r"\[(\d+):", line)[1])  # type: ignore[index]  # every line of -c begins with its counters

    return passed


# 1. Bytes and verdicts.


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_100_megabytes_both_ways_and_one_verdict_for_each_packet(netns: Namespace, tmp_path: Path, address: str) -> None:
    agent = Agent(netns, tmp_path).ready()
    server = netns.start(PYTHON, "-c", ECHO, address, "11000", stdout=subprocess.PIPE)
    assert server.stdout is not None
    assert server.stdout.readline() == b"listening\n"
    size = 100_000_000
    count, sent, got = netns.run(PYTHON, "-c", CLIENT, address, "11000", str(size)).stdout.split()
    assert (int(count), got) == (size, sent)
    assert server.wait(timeout=10) == 0
    status = agent.status()
    totals = agent.totals()
    hits = sum(rule["packets"] for rule in status["rules"] if "NFQUEUE" in rule["rule"])
    assert hits == totals["received"] == totals["accepted"] > 1000
    assert status["queues"][0]["uninspected"] == 0
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


# 2. Nothing left behind.


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
    # The reload made table raw present; that can't be undone, and it is empty.
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
        agent.process.wait(timeout=20)
        assert (saved(netns), foreign_counters(netns)) == (before, counters), f"stopped after {0.04 * step:.2f} s:\n{agent.log}"
        assert netns.processes() == []


# 3. Beside others.


def test_not_one_change_of_somebody_else_is_lost(netns: Namespace, tmp_path: Path) -> None:
    netns.run("iptables-legacy", "-w", "-t", "mangle", "-N", "theirs")
    # Each change is looked for after the next one, so that a revert between two of them is seen.
    script = """
    for n in $(seq 1 170); do
      iptables-legacy -w -t mangle -A theirs -m comment --comment "added-$n" -j RETURN
      iptables-legacy -w -t mangle -R theirs 1 -m comment --comment "replaced-$n" -j RETURN
      iptables-legacy -w -t mangle -C theirs -m comment --comment "replaced-$n" -j RETURN || echo "lost: replaced-$n"
      if [ $((n % 2)) = 0 ]; then
        iptables-legacy -w -t mangle -D theirs 2 || echo "lost: added-$n"
      fi
    done
    """
    writer = netns.start("sh", "-c", script, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    rounds = 0
    while writer.poll() is None:
        agent = Agent(netns, tmp_path).ready()
        assert agent.stop() == 0
        rounds += 1
    assert writer.stdout is not None
    assert writer.stdout.read() == b""
    assert rounds >= 1
    left = [line for line in saved(netns).splitlines() if "-A theirs" in line]
    expected: list[str] = []
    for number in range(1, 171):
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
    assert f"runs already (pid {first.process.pid})" in refused.stderr
    assert ours(netns) == both
    assert first.stop() == 0
    assert ours(netns) == [line for line in both if "a-b" in line]
    assert second.stop() == 0
    assert ours(netns) == []


def test_a_queue_that_somebody_else_holds_is_named(netns: Namespace, tmp_path: Path) -> None:
    first = Agent(netns, tmp_path, udp(), instance="a").ready()
    second = Agent(netns, tmp_path, udp(), instance="b")
    assert second.process.wait(timeout=20) == 1
    assert "queue 100: another process has already bound this queue" in second.log
    assert not [line for line in ours(netns) if ":b:" in line or "NFQA-b-" in line]
    assert first.process.poll() is None


# 4. Under load.


@pytest.fixture
def flooded(netns: Namespace, tmp_path: Path) -> Iterator[tuple[Namespace, Agent, Callable[[], int]]]:
    passed = count_passed(netns)
    agent = Agent(netns, tmp_path, udp()).ready()
    yield netns, agent, passed
    if agent.process.poll() is None:
        agent.stop()
    assert ours(netns) == []


def all_pass(stream: Flood, passed: Callable[[], int]) -> None:
    """The flood, still under way, ends, and each of its packets came through."""
    count = stream.end()
    until(lambda: passed() == count, f"{count} packets pass", 15)


def reached(passed: Callable[[], int], floor: int) -> None:
    """So many packets have passed."""
    until(lambda: passed() > floor, f"more than {floor} packets pass", 60)


def test_a_stop_in_a_flood_loses_nothing(flooded: tuple[Namespace, Agent, Callable[[], int]]) -> None:
    namespace, agent, passed = flooded
    stream = Flood(namespace)
    reached(passed, 50_000)
    assert agent.stop() == 0
    all_pass(stream, passed)


def test_a_reload_in_a_flood_loses_nothing(flooded: tuple[Namespace, Agent, Callable[[], int]]) -> None:
    namespace, agent, passed = flooded
    stream = Flood(namespace, 40_000)
    reached(passed, 20_000)
    # A rule more; another worker with other settings; another queue number.
    agent.configure(udp(more="[rules.more]\nqueue = 'main'\nudp_ports = [11002]\n"))
    agent.verb("reload")
    agent.configure(udp(max_len=8192).replace("[rules.app]", 'elements = ["log"]\n[element.log]\nper_second = 1\n[rules.app]'))
    agent.verb("reload")
    agent.configure(udp().replace("num = 100", "num = 101"))
    agent.verb("reload")
    received = agent.totals()["received"]
    until(lambda: agent.totals()["received"] > received, "the last worker judges, too")
    all_pass(stream, passed)
    assert agent.queue()["workers"][0]["number"] == 101


def _another_than(agent: Agent, worker: int) -> bool:
    return agent.workers() not in ([worker], [None])


def test_a_workers_death_in_a_flood_loses_nothing(flooded: tuple[Namespace, Agent, Callable[[], int]]) -> None:
    namespace, agent, passed = flooded
    stream = Flood(namespace, 40_000)
    for floor in (20_000, 80_000):
        reached(passed, floor)
        (worker,) = agent.workers()
        os.kill(worker, signal.SIGKILL)
        until(partial(_another_than, agent, worker), "another worker serves")
    reached(passed, passed() + 1000)
    all_pass(stream, passed)
    assert agent.log.count("died: SIGKILL") == 2


# Failures.


def test_a_worker_that_keeps_dying_ends_the_agent_with_its_rules_removed(netns: Namespace, tmp_path: Path) -> None:
    agent = Agent(netns, tmp_path, udp()).ready()
    kill_workers(agent)
    assert agent.process.wait(timeout=20) == 1
    assert "died 5 times within 30 s" in agent.log
    assert ours(netns) == []


def kill_workers(agent: Agent) -> None:
    """Kill every worker that the agent starts, until it gives up."""
    while agent.process.poll() is None:
        children = Path(f"/proc/{agent.process.pid}/task/{agent.process.pid}/children")
        try:
            pids = [int(pid) for pid in children.read_text().split()]
        except OSError:
            return
        for pid in pids:
            # Those that write rules are root's; a worker is proxyuser's.
            with contextlib.suppress(OSError):
                if "Uid:\t0" not in Path(f"/proc/{pid}/status").read_text():
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def test_who_chose_to_fail_closed_stays_closed_until_told_otherwise(netns: Namespace, tmp_path: Path) -> None:
    passed = count_passed(netns)
    agent = Agent(netns, tmp_path, udp(bypass=False, fail_open=False)).ready()
    mine = ours(netns)
    kill_workers(agent)
    assert agent.process.wait(timeout=20) == 1
    assert ours(netns) == mine
    assert "rules stay, for queues with bypass = false" in agent.log
    assert flood(netns, 10).wait(timeout=10) == 0
    assert passed() == 0
    # A start opens it again, and a clean stop leaves nothing.
    agent.start()
    agent.ready()
    assert flood(netns, 10).wait(timeout=10) == 0
    until(lambda: passed() == 10, "it is open again")
    assert agent.stop() == 0
    assert ours(netns) == []


def test_the_rules_that_a_kill_left_are_taken_up_by_the_next_start(netns: Namespace, tmp_path: Path) -> None:
    passed = count_passed(netns)
    agent = Agent(
        netns, tmp_path, udp(more="[rules.raw]\nqueue = 'main'\ntable = 'raw'\nhooks = ['output']\nudp_ports = [11005]\n")
    ).ready()
    workers = agent.workers()
    agent.kill()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), "its workers end by themselves")
    assert ours(netns) != []
    assert flood(netns, 10).wait(timeout=10) == 0
    assert passed() == 10, "bypass lets traffic pass when nobody serves"
    agent.configure(udp().replace("11000", "11003").replace("num = 100", "num = 7"))
    agent.start()
    agent.ready()
    assert not [line for line in ours(netns) if "11000" in line or "11005" in line]
    assert [line for line in ours(netns) if "11003" in line]
    assert agent.stop() == 0
    assert ours(netns) == []


def test_a_worker_that_hangs_is_replaced(netns: Namespace, tmp_path: Path) -> None:
    agent = Agent(netns, tmp_path, udp()).ready()
    (worker,) = agent.workers()
    os.kill(worker, signal.SIGSTOP)
    until(lambda: "made no progress" in agent.log, "the hang is seen")
    until(lambda: agent.workers() not in ([worker], [None]), "another worker serves")
    passed = count_passed(netns)
    assert flood(netns, 10).wait(timeout=10) == 0
    until(lambda: passed() == 10, "packets pass again")


def test_what_a_worker_held_that_had_to_be_killed_gets_the_verdict_on_error(netns: Namespace, tmp_path: Path) -> None:
    (tmp_path / "hanging.py").write_text(
        "import time\nfrom nfq_agent import PacketElement\n"
        "class Hang(PacketElement):\n    def decide(self, packet, flow):\n        time.sleep(60)\n"
    )
    passed = count_passed(netns)
    hanging = udp().replace("[rules.app]", 'elements = ["hanging:Hang"]\n[rules.app]')
    agent = Agent(netns, tmp_path, hanging, PYTHONPATH=str(tmp_path)).ready()
    assert flood(netns, 1).wait(timeout=10) == 0
    until(lambda: statistics(netns.pid)[100].waiting == 1, "it holds the packet")
    agent.configure(udp().replace("[rules.app]", 'default = "drop"\non_error = "accept"\n[rules.app]'))
    agent.verb("reload")
    assert "did not stop within" in agent.log
    assert flood(netns, 5).wait(timeout=10) == 0
    until(lambda: agent.totals()["dropped"] == 5, "its successor judges")
    assert passed() == 1
    assert agent.totals()["lost"] == 1
    assert agent.stop() == 0


# Privileges.


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


# Drift.


def test_rules_that_somebody_removed_come_back(netns: Namespace, tmp_path: Path) -> None:
    agent = Agent(netns, tmp_path, '[agent]\ndrift_check = "200ms"\n' + udp()).ready()
    mine = ours(netns)
    netns.run("iptables-legacy", "-w", "-t", "mangle", "-D", "OUTPUT", "1")
    until(lambda: ours(netns) == mine, "the jump is back")
    until(lambda: agent.log.count("another program changed this agent's rules") == 1, "one line says so")
    assert "+ -A OUTPUT" in agent.log
    netns.run("ip6tables-legacy", "-w", "-t", "mangle", "-F", "NFQA-default-OUTPUT")
    until(lambda: ours(netns) == mine, "the chain is full again")
    assert agent.status()["drift"]["repairs"] == 2
    # A rule of somebody else among ours goes; one beside ours stays.
    netns.run("iptables-legacy", "-w", "-t", "mangle", "-I", "NFQA-default-OUTPUT", "-j", "ACCEPT")
    netns.run("iptables-legacy", "-w", "-t", "mangle", "-I", "OUTPUT", "-p", "tcp", "--dport", "9")
    until(lambda: ours(netns) == mine, "the chain is ours alone")
    time.sleep(0.5)
    assert "-A OUTPUT -p tcp -m tcp --dport 9" in saved(netns)


def test_a_fight_over_the_rules_slows_down(netns: Namespace, tmp_path: Path) -> None:
    agent = Agent(netns, tmp_path, '[agent]\ndrift_check = "50ms"\n' + udp()).ready()
    netns.shell(
        "end=$(($(date +%s) + 4)); while [ $(date +%s) -lt $end ]; do"
        " iptables-legacy -w -t mangle -D OUTPUT 1 2>/dev/null || true; sleep 0.01; done"
    )
    repairs = agent.status()["drift"]["repairs"]
    # 80 looks without a back-off; with doubled pauses 50 ms, 100 ms, ... it is about six.
    assert 3 <= repairs <= 12


# What passes unseen.


def test_packets_that_fail_open_are_counted(netns: Namespace, tmp_path: Path) -> None:
    agent = Agent(netns, tmp_path, udp(max_len=100)).ready()
    (worker,) = agent.workers()
    os.kill(worker, signal.SIGSTOP)
    assert flood(netns, 1000).wait(timeout=10) == 0
    os.kill(worker, signal.SIGCONT)
    until(lambda: agent.totals()["received"] == 100, "the hundred that waited are judged")
    queue = agent.queue()
    assert (queue["uninspected"], queue["kernel_dropped"], queue["user_dropped"]) == (900, 0, 0)


def test_packets_that_a_full_queue_drops_are_no_uninspected_ones(netns: Namespace, tmp_path: Path) -> None:
    agent = Agent(netns, tmp_path, udp(max_len=100, fail_open=False)).ready()
    (worker,) = agent.workers()
    os.kill(worker, signal.SIGSTOP)
    assert flood(netns, 1000).wait(timeout=10) == 0
    os.kill(worker, signal.SIGCONT)
    until(lambda: agent.totals()["received"] == 100, "the hundred that waited are judged")
    queue = agent.queue()
    assert (queue["uninspected"], queue["kernel_dropped"]) == (0, 900)


# Words to systemd.


def test_what_systemd_is_told(netns: Namespace, tmp_path: Path) -> None:
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind(str(path))
        end.settimeout(10)

        def heard(word: str) -> str:
            while True:
                said = end.recv(4096).decode()
                if word in said:
                    return said

        agent = Agent(netns, tmp_path, udp(), NOTIFY_SOCKET=str(path), WATCHDOG_USEC="2000000")
        heard("READY=1")
        assert [line for line in ours(netns) if "NFQUEUE" in line], "rules are in when it says READY"
        assert "Serving queue 100" in heard("STATUS=")
        heard("WATCHDOG=1")
        agent.process.send_signal(signal.SIGHUP)
        assert re.search(r"RELOADING=1\nMONOTONIC_USEC=\d+", heard("RELOADING=1"))
        heard("READY=1")
        # A worker that hangs is replaced alone; the service manager hears nothing of it.
        (worker,) = agent.workers()
        os.kill(worker, signal.SIGSTOP)
        until(partial(_another_than, agent, worker), "another worker serves")
        heard("WATCHDOG=1")
        agent.process.terminate()
        heard("STOPPING=1")
        assert agent.process.wait(timeout=20) == 0


# The verbs.


def test_reload_answers_what_happened(netns: Namespace, tmp_path: Path) -> None:
    agent = Agent(netns, tmp_path, udp()).ready()
    mine, (worker,) = ours(netns), agent.workers()
    agent.config.write_text(udp() + "[queue.x]\nnum = 70000\n")
    refused = agent.verb("reload", "--instance", "default", check=False)
    assert refused.returncode == 78
    assert "queue.x.num: 70000" in refused.stderr
    assert (ours(netns), agent.log.count("reload refused")) == (mine, 1)
    agent.configure(udp(more="[queue.x]\nnum = 5\n[rules.x]\nqueue = 'x'\nhooks = ['input']\nall = true\n"))
    blocker = Agent(netns, tmp_path, "[queue.x]\nnum = 5\n", instance="b").ready()
    failed = agent.verb("reload", check=False)
    assert failed.returncode == 1
    assert "queue 5: another process has already bound this queue" in failed.stderr
    agent.config.write_text(udp())
    assert (ours(netns), agent.workers()) == (mine, [worker])
    blocker.stop()
    agent.process.send_signal(signal.SIGHUP)
    until(lambda: "reloaded: rules changed in 0 places; workers: 0 new, 0 replaced, 0 ended" in agent.log, "SIGHUP reloads")
    assert agent.stop() == 0
    gone = agent.verb("reload", check=False)
    assert (gone.returncode, gone.stderr) == (1, "nfq-agent: no agent of instance default is running\n")


def test_plan_writes_nothing_and_says_all(netns: Namespace, tmp_path: Path) -> None:
    done = netns.run(*COMMAND, "plan", check=False)
    assert done.returncode == 3
    lines = done.stdout.splitlines()
    assert '+ -A INPUT -m comment --comment "nfq-agent:default:jump" -j NFQA-default-INPUT' in lines
    assert any("system user proxyuser would be made" in line for line in lines)
    assert any("inet table mangle would become present" in line for line in lines)
    assert netns.run("cat", "/proc/net/ip_tables_names").stdout == ""
    assert netns.run("id", "proxyuser", check=False).returncode != 0
    agent = Agent(netns, tmp_path).ready()
    rules = [line for line in ours(netns) if line.startswith("-A")]
    assert len(rules) == 8, "four rules a family"
    planned = {line.removeprefix("+ ").replace("proxyuser", netns.run("id", "-u", "proxyuser").stdout.strip()) for line in lines}
    assert set(rules) <= planned, "the plan is the text of iptables"
    done = netns.run(*COMMAND, "plan", "--json")
    assert json.loads(done.stdout)["changes"] == []
    agent.stop()


def test_apply_and_remove_and_each_of_them_twice(netns: Namespace, tmp_path: Path) -> None:
    passed = count_passed(netns)
    config = tmp_path / "a.toml"
    config.write_text(udp())
    netns.run(*COMMAND, "apply", "--config", str(config))
    mine = ours(netns)
    assert len(mine) == 8 - 2
    assert "Nothing to do" in netns.run(*COMMAND, "apply", "--config", str(config)).stdout
    assert ours(netns) == mine
    assert flood(netns, 10).wait(timeout=10) == 0
    assert passed() == 10, "bypass keeps traffic flowing"
    config.write_text("this is no TOML")
    netns.run(*COMMAND, "remove", "--instance", "default")
    assert ours(netns) == []
    assert netns.run(*COMMAND, "remove", "--instance", "default").returncode == 0


@pytest.mark.parametrize(("typed", "kept"), [("yes\n", True), ("no\n", False), ("", False)])
def test_apply_confirm_takes_back_what_nobody_confirmed(netns: Namespace, tmp_path: Path, typed: str, kept: bool) -> None:
    netns.run(*COMMAND, "apply", "--config", str(Path(__file__).parent.parent / "configs" / "five-tuple-log.toml"))
    before = ours(netns)
    process = netns.start(
        *COMMAND, "apply", "--confirm", "2", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdin is not None
    until(lambda: any("11000" in line for line in ours(netns)), "the new rules are in")
    process.stdin.write(typed.encode())
    process.stdin.close()
    assert process.wait(timeout=10) == (0 if kept else 1)
    assert any("11000" in line for line in ours(netns)) == kept
    assert kept or ours(netns) == before


def test_apply_confirm_takes_back_when_the_session_is_cut(netns: Namespace) -> None:
    process = netns.start(*COMMAND, "apply", "--confirm", "60", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    until(lambda: ours(netns), "the rules are in")
    process.kill()
    until(lambda: ours(netns) == [], "the rules are taken back")


def test_apply_and_remove_are_refused_beside_the_running_agent(netns: Namespace, tmp_path: Path) -> None:
    agent = Agent(netns, tmp_path).ready()
    mine = ours(netns)
    for verb in ("apply", "remove"):
        done = netns.run(*COMMAND, verb, check=False)
        assert done.returncode == 1
        assert "the agent of instance default" in done.stderr
    assert ours(netns) == mine
    agent.stop()


def test_status_and_rules_for_people_fit_eighty_columns(netns: Namespace, tmp_path: Path) -> None:
    agent = Agent(netns, tmp_path).ready()
    text = agent.verb("status").stdout
    assert max(map(len, text.splitlines())) <= 80
    assert re.search(r"100 +0 +0 +0 +0 +0 +0 +\d+ +\d+\.\d MB", text)
    rules = json.loads(agent.verb("rules", "--json").stdout)["rules"]
    assert {rule["rule"] for rule in rules} == {line for line in ours(netns) if line.startswith("-A")}
    agent.stop()
    down = netns.run(*COMMAND, "status", "--json", check=False)
    assert (down.returncode, json.loads(down.stdout)) == (1, {"instance": "default", "running": False})


def test_doctor_names_what_stands_in_the_way(netns: Namespace, tmp_path: Path) -> None:
    assert netns.run(*COMMAND, "doctor").returncode == 0
    other = Agent(netns, tmp_path, udp(), instance="other").ready()
    other.kill()
    holder = Agent(netns, tmp_path, udp(), instance="third").ready()
    done = netns.run(*COMMAND, "doctor", "--json", check=False)
    assert done.returncode == 1
    findings = json.loads(done.stdout)["findings"]
    faults = [finding for finding in findings if finding["level"] == "error"]
    assert [finding["subject"] for finding in faults] == ["queues"]
    assert f"pid {holder.process.pid}" in faults[0]["text"]
    left = [finding for finding in findings if finding["advice"] == "nfq-agent remove --instance other"]
    assert len(left) == 1
    subjects = {finding["subject"] for finding in findings}
    assert {
        "capabilities",
        "kernel",
        "rule engine",
        "xtables lock",
        "user",
        "legacy and nft",
        "conntrack",
        "rp_filter",
    } <= subjects


# Logs.


def test_the_five_tuple_log_as_json_and_on_a_console(netns: Namespace, tmp_path: Path) -> None:
    agent = Agent(netns, tmp_path, udp(), "--log-5tuple", LOG_FORMAT="json")
    until(lambda: "is serving" in agent.log, "it serves")
    assert flood(netns, 1).wait(timeout=10) == 0
    line = until(lambda: [each for each in agent.log.splitlines() if '"dport"' in each], "the packet is logged")[0]
    event = json.loads(line)
    assert (event["proto"], event["src"], event["dst"], event["dport"]) == ("udp", "127.0.0.1", "127.0.0.1", 11000)
    assert (event["hook"], event["verdict"], event["queue"], event["level"]) == ("OUTPUT", "accept", 100, "info")
    agent.stop()


def test_the_journal_gets_level_and_fields(netns: Namespace, tmp_path: Path) -> None:
    # The real journald is met in the booted containers; here its socket shows what it is sent.
    netns.run("mkdir", "-p", "/run/systemd/journal")
    script = (
        "import socket; s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); s.bind('/run/systemd/journal/socket')\n"
        "import os; os.chmod('/run/systemd/journal/socket', 0o666)\n"
        "print('bound', flush=True)\nwhile True: print(s.recv(65536), flush=True)"
    )
    reader = netns.start(PYTHON, "-c", script, stdout=subprocess.PIPE)
    assert reader.stdout is not None
    assert reader.stdout.readline() == b"bound\n"
    agent = Agent(netns, tmp_path, udp(), "--log-5tuple", LOG_FORMAT="journal")
    heard = (line.decode() for line in reader.stdout)
    assert any("is serving" in line for line in heard)
    assert flood(netns, 1).wait(timeout=10) == 0
    line = next(line for line in heard if "NFQ_DPORT=11000" in line)
    for field in (
        "NFQ_SRC=127.0.0.1",
        "NFQ_DST=127.0.0.1",
        "NFQ_PROTO=udp",
        "NFQ_QUEUE=100",
        "NFQ_VERDICT=accept",
        "NFQ_HOOK=OUTPUT",
        "PRIORITY=6",
    ):
        assert field in line
    agent.stop()


def test_the_demo_holds_and_two_of_them_side_by_side(tmp_path: Path) -> None:
    demos = [
        subprocess.Popen(
            [*COMMAND, "demo"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True
        )
        for _ in range(2)
    ]
    for demo in demos:
        text, _ = demo.communicate(timeout=60)
        assert demo.returncode == 0, text
        assert "they equal the rules before" in text


def test_who_sits_on_the_xtables_lock_does_not_make_the_watchdog_bite(netns: Namespace, tmp_path: Path) -> None:
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind(str(path))
        end.settimeout(10)
        config = '[agent]\ndrift_check = "200ms"\n' + udp()
        agent = Agent(netns, tmp_path, config, NOTIFY_SOCKET=str(path), WATCHDOG_USEC="3000000").ready()
        mine = ours(netns)
        # The lock is held for longer than the watchdog waits; a repair is tried meanwhile, and made as soon as it can be.
        holder = netns.start(
            "flock",
            "/run/xtables.lock",
            "sh",
            "-c",
            "XTABLES_LOCKFILE=/run/another iptables-legacy -w -t mangle -D OUTPUT 1; sleep 4",
        )
        last = time.monotonic()
        longest = 0.0
        while holder.poll() is None:
            if "WATCHDOG=1" in end.recv(4096).decode():
                now = time.monotonic()
                longest, last = max(longest, now - last), now
        assert longest < 2.9
        until(lambda: ours(netns) == mine, "the jump is back")
        assert agent.process.poll() is None
        assert "xtables lock" in agent.log


PROXY = """
[proxy.tcp]
listen = ["127.0.0.1:15002"]
{more}
[rules.redirect]
proxy = "tcp"
hooks = ["output"]
family = "inet"
tcp_ports = [8080]
"""


def test_a_reload_of_a_proxy_lets_its_connections_end_and_the_watchdog_sleep(netns: Namespace, tmp_path: Path) -> None:
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind(str(path))
        agent = Agent(netns, tmp_path, PROXY.format(more=""), NOTIFY_SOCKET=str(path), WATCHDOG_USEC="3000000").ready()
        server = netns.start(PYTHON, "-c", ECHO, "127.0.0.1", "8080", stdout=subprocess.PIPE)
        assert server.stdout is not None
        server.stdout.readline()
        client = netns.start("nc", "-N", "127.0.0.1", "8080", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert client.stdin is not None
        assert client.stdout is not None
        client.stdin.write(b"before\n")
        client.stdin.flush()
        assert client.stdout.readline() == b"before\n"
        (old,) = [proxy["pid"] for proxy in agent.status()["proxies"]]
        agent.configure(PROXY.format(more='elements = ["stream-log"]'))
        began = time.monotonic()
        agent.verb("reload")
        # It does not wait for the connection that is still open.
        assert time.monotonic() - began < 8
        (new,) = [proxy["pid"] for proxy in agent.status()["proxies"]]
        assert old != new
        client.stdin.write(b"after\n")
        client.stdin.flush()
        assert client.stdout.readline() == b"after\n"
        client.stdin.close()
        assert client.wait(timeout=20) == 0
        until(lambda: not Path(f"/proc/{old}").exists(), "the old process ends with its last connection")
        assert agent.process.poll() is None
        assert agent.stop() == 0
        assert ours(netns) == []


def test_a_log_that_nobody_reads_holds_up_no_verdict(netns: Namespace, tmp_path: Path) -> None:
    config = tmp_path / "a.toml"
    config.write_text(udp().replace("[rules.app]", 'elements = ["log"]\n[element.log]\nper_second = 0\n[rules.app]'))
    passed = count_passed(netns)
    process = netns.start(*COMMAND, "run", "--config", str(config), stderr=subprocess.PIPE)
    until(lambda: ours(netns), "the rules are in")
    # A pipe holds 64 KB: some 700 lines.
    assert flood(netns, 20_000, 20_000).wait(timeout=30) == 0
    until(lambda: passed() == 20_000, "every packet passes")
    status = json.loads(netns.run(*COMMAND, "status", "--json", "--config", str(config)).stdout)
    (worker,) = status["queues"][0]["workers"]
    assert (worker["received"], worker["accepted"], status["queues"][0]["uninspected"]) == (20_000, 20_000, 0)
    process.terminate()
    assert process.wait(timeout=20) == 0


def test_a_reload_changes_the_log_too(netns: Namespace, tmp_path: Path) -> None:
    text = udp().replace("[rules.app]", 'elements = ["log"]\n[rules.app]')
    agent = Agent(netns, tmp_path, text + '[log]\nlevel = "warning"\nformat = "json"\n', LOG_FORMAT="")
    until(lambda: ours(netns), "the rules are in")
    assert flood(netns, 1).wait(timeout=10) == 0
    until(lambda: agent.totals()["received"] == 1, "the packet is judged")
    assert agent.log == ""
    agent.configure(text + '[log]\nlevel = "info"\nformat = "json"\n')
    agent.verb("reload")
    assert flood(netns, 1).wait(timeout=10) == 0
    events = until(lambda: [json.loads(line) for line in agent.log.splitlines() if '"dport"' in line], "the packet is logged")
    assert events[0]["dport"] == 11000
    agent.stop()


def test_a_reload_that_takes_a_proxy_away_lets_its_connections_end(netns: Namespace, tmp_path: Path) -> None:
    agent = Agent(netns, tmp_path, PROXY.format(more='drain = "20s"') + udp()).ready()
    server = netns.start(PYTHON, "-c", ECHO, "127.0.0.1", "8080", stdout=subprocess.PIPE)
    assert server.stdout is not None
    server.stdout.readline()
    client = netns.start("nc", "-N", "127.0.0.1", "8080", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert client.stdin is not None
    assert client.stdout is not None
    client.stdin.write(b"before\n")
    client.stdin.flush()
    assert client.stdout.readline() == b"before\n"
    agent.configure(udp())
    reload = netns.start(*COMMAND, "reload", "--config", str(agent.config), stdout=subprocess.DEVNULL)
    until(lambda: not any("-A OUTPUT" in line and ":jump" in line for line in nat(netns)), "nothing new is led to the proxy")
    client.stdin.write(b"after\n")
    client.stdin.flush()
    assert client.stdout.readline() == b"after\n"
    client.stdin.close()
    assert client.wait(timeout=20) == 0
    assert reload.wait(timeout=20) == 0
    assert [line for line in nat(netns) if "NFQA-" in line] == []
    assert agent.status()["proxies"] == []
    assert agent.stop() == 0
    assert ours(netns) == []


def nat(namespace: Namespace) -> list[str]:
    """The rules of table nat, IPv4."""
    return namespace.run("iptables-legacy", "-w", "-t", "nat", "-S").stdout.splitlines()


def test_a_connection_that_runs_when_a_proxy_starts_goes_on(netns: Namespace, tmp_path: Path) -> None:
    # Nothing tracks connections here before the agent's rules do, so that the kernel meets this one in its middle.
    server = netns.start(PYTHON, "-c", ECHO, "127.0.0.1", "8080", stdout=subprocess.PIPE)
    assert server.stdout is not None
    server.stdout.readline()
    client = netns.start("nc", "-N", "127.0.0.1", "8080", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert client.stdin is not None
    assert client.stdout is not None

    def said(word: bytes) -> None:
        assert client.stdin is not None
        assert client.stdout is not None
        client.stdin.write(word)
        client.stdin.flush()
        assert client.stdout.readline() == word

    said(b"before\n")
    agent = Agent(netns, tmp_path, PROXY.format(more="")).ready()
    said(b"after\n")
    client.stdin.close()
    assert client.wait(timeout=20) == 0
    assert agent.stop() == 0
