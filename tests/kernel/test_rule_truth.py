"""What the agent says of its rules is what the kernel has: in status, doctor, rules and the log."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from agent import COMMAND, Agent, suspend, until
from namespace import Namespace
from reachable import python, reachable
from traffic import FLOOD

from nfq_agent.host.xtables import obstacles

pytestmark = pytest.mark.kernel

NO_CHECKS = '[agent]\nbackend = "legacy"\ndrift_check = "0"\n'
QUICK = '[agent]\nbackend = "legacy"\ndrift_check = "1h"\n'
UDP = '[queue.main]\n[rules.app]\nqueue = "main"\nudp_ports = [7000]\nhooks = ["output"]\n'
OUTPUT = ("iptables-legacy", "-w", "-t", "mangle")


def flood(netns: Namespace, count: int, rate: int = 20_000) -> None:
    assert netns.run(sys.executable, "-c", FLOOD, "127.0.0.1", "7000", str(count), str(rate)).stdout == f"{count}\n"


def findings(agent: Agent, code: int | None = None) -> list[dict[str, Any]]:
    done = agent.verb("doctor", "--json", check=False)
    assert code in (None, done.returncode), done.stdout + done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)["findings"]
    return found


def said(agent: Agent, subject: str) -> str:
    return "\n".join(f"{each['text']} -> {each['advice']}" for each in findings(agent) if each["subject"] == subject)


def drift(agent: Agent) -> dict[str, Any]:
    return dict(agent.answer()["drift"])


def queue(agent: Agent) -> dict[str, Any]:
    (found,) = agent.answer()["queues"]
    return dict(found)


def received(agent: Agent) -> int:
    return int(queue(agent)["workers"][0]["received"])


def bypasses(agent: Agent) -> dict[str, Any]:
    return {each["cause"]: each for each in agent.answer()["bypasses"]}


def test_rules_that_are_gone_are_named_with_what_to_do(netns: Namespace, tmp_path: Path) -> None:
    agent = Agent(netns, tmp_path, NO_CHECKS + UDP).ready()
    findings(agent, 0)
    assert drift(agent)["wrong"] == []
    netns.run(*OUTPUT, "-F")
    wrong = drift(agent)["wrong"]
    assert len(wrong) == 2
    assert all(line.startswith("inet mangle + -A ") for line in wrong)
    (finding,) = [each for each in findings(agent, 1) if each["subject"] == "rules"]
    assert finding["level"] == "error"
    assert finding["text"].startswith("2 rules or chains are not as configured")
    assert "nfq-agent reload" in finding["advice"]
    assert "Rules: 2 are not as configured" in agent.verb("status").stdout
    # What it advises helps.
    agent.verb("reload")
    assert drift(agent)["wrong"] == []
    findings(agent, 0)
    assert agent.stop() == 0


@pytest.mark.parametrize("backend", ["legacy", "owned"])
def test_rules_that_cannot_be_read_are_neither_there_nor_gone(netns: Namespace, tmp_path: Path, backend: str) -> None:
    """As the agent's own user without a capability, whom the kernel tells nothing."""
    rule = '[rules.web]\nproxy = "web"\nfamily = "inet"\nhooks = ["output"]\ntcp_ports = [80]\n'
    text = f'[agent]\nbackend = "{backend}"\n{UDP}[proxy.web]\nlisten = ["127.0.0.1:15002"]\n{rule}'
    agent = Agent(netns, tmp_path, text).ready()
    config = "/run/a.toml"
    netns.run("sh", "-c", f"cat >{config}", input=text)
    user = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--bounding-set=-all", "--inh-caps=-all")
    reachable(netns)
    command = (*user, *python("-m", "nfq_agent"))
    rules = netns.run(*command, "rules", "--config", config, check=False)
    assert rules.returncode == 1
    assert "No rule" not in rules.stdout
    assert "root" in rules.stderr
    doctor = netns.run(*command, "doctor", "--config", config, check=False)
    assert doctor.returncode == 1
    assert "shown to root only" in doctor.stdout
    # Nothing is said of what was not seen, and no library prints its own error.
    found = re.findall(r"^(ok|warning|error) +(.*?): ", doctor.stdout, re.MULTILINE)
    assert {"legacy and nft", "marks", "instances", "rule engine", "configuration"}.isdisjoint(each for _, each in found)
    assert doctor.stderr == ""
    # Whose listener it is cannot be asked, so it is not a fault.
    assert netns.run(*command, "check", "--config", config).stdout.startswith(f"{config}: valid")
    for verb in ("plan", "remove"):
        done = netns.run(*command, verb, "--config", config, check=False)
        assert done.returncode == 1, done.stdout
        assert "Traceback" not in done.stderr
        assert "Nothing to do" not in done.stdout
    assert agent.stop() == 0


def test_a_foreign_rule_in_front_is_named_and_what_it_took_is_counted(netns: Namespace, tmp_path: Path) -> None:
    agent = Agent(netns, tmp_path, QUICK + UDP).ready()
    flood(netns, 100)
    netns.run(*OUTPUT, "-N", "THEIRS")
    netns.run(*OUTPUT, "-A", "THEIRS", "-p", "udp", "-m", "multiport", "--dports", "53,6999:7001", "-j", "ACCEPT")
    netns.run(*OUTPUT, "-I", "OUTPUT", "-p", "udp", "-j", "THEIRS")
    # These take none of ours: other ports, another protocol, another interface, no end of the way.
    for words in ("-p udp --dport 53 -j ACCEPT", "-p tcp -j ACCEPT", "-o eth9 -j ACCEPT", "-p udp -j MARK --set-mark 0x1/0x1"):
        netns.run(*OUTPUT, "-I", "OUTPUT", *words.split())
    flood(netns, 900)
    found = bypasses(agent)
    # An interface that is not there could come, so a rule for it is named too.
    assert set(found) == {"in-front"}
    listed = [each for each in agent.answer()["bypasses"] if each["count"]]
    assert [(each["count"], each["unit"]) for each in listed] == [(900, "packets")]
    assert "rule 5 of OUTPUT in table mangle (inet, ACCEPT)" in listed[0]["text"]
    assert "iptables-legacy -t mangle -nvL OUTPUT 5" in listed[0]["advice"]
    assert received(agent) == 100
    assert "rule 5 of OUTPUT" in said(agent, "uninspected: in-front")
    assert agent.stop() == 0


def test_hits_of_rules_that_a_reload_replaces_are_not_lost(netns: Namespace, tmp_path: Path) -> None:
    text = NO_CHECKS + UDP.replace("[queue.main]", "[queue.main]\nmax_len = 100\nfail_open = true")
    agent = Agent(netns, tmp_path, text).ready()
    pid = queue(agent)["workers"][0]["pid"]
    suspend(pid)
    flood(netns, 1000)
    netns.run("kill", "-CONT", str(pid))
    until(lambda: received(agent) == 100, "what waited is judged")
    before = queue(agent)["uninspected"]
    assert before == 900
    # Again, and this time no status reads the counters between the traffic and the reload.
    suspend(pid)
    flood(netns, 1000)
    netns.run("kill", "-CONT", str(pid))
    agent.configure(text.replace("[7000]", "[7000, 7001]"))
    agent.verb("reload")
    assert queue(agent)["uninspected"] == 1800
    assert bypasses(agent)["queue"]["count"] == 1800
    flood(netns, 50)
    until(lambda: received(agent) == 250, "all are judged")
    assert queue(agent)["uninspected"] == 1800
    assert agent.stop() == 0


def test_a_flush_hides_nothing_that_passes_later(netns: Namespace, tmp_path: Path) -> None:
    """What was counted between the last reading and a flush is unknown; it is not subtracted from what comes after."""
    text = QUICK + UDP.replace("[queue.main]", "[queue.main]\nmax_len = 100\nfail_open = true")
    agent = Agent(netns, tmp_path, text).ready()
    # Fewer than the queue holds, so that none passes here.
    flood(netns, 90)
    netns.run(*OUTPUT, "-F")
    until(lambda: "repaired in 2 places" in agent.log, "the rules are back")
    pid = queue(agent)["workers"][0]["pid"]
    suspend(pid)
    flood(netns, 1000)
    netns.run("kill", "-CONT", str(pid))
    until(lambda: received(agent) == 190, "what waited is judged")
    found = bypasses(agent)
    assert found["queue"]["count"] == 900
    assert 0 < found["rules-away"]["count"] < 60
    assert "not in force" in agent.log
    assert agent.stop() == 0


def test_a_change_is_noticed_soon_though_the_checks_are_rare(netns: Namespace, tmp_path: Path) -> None:
    agent = Agent(netns, tmp_path, QUICK + UDP).ready()
    for _ in range(2):
        # Of other people's rules no check comes, and no repair.
        netns.run(*OUTPUT, "-I", "OUTPUT", "-p", "tcp", "--dport", "9")
        netns.run(*OUTPUT, "-F")
        began = time.monotonic()
        until(lambda: not drift(agent)["wrong"], "the rules are back")
        took = time.monotonic() - began
        time.sleep(1.5)
    now = drift(agent)
    assert now["repairs"] == 2
    assert took < 60
    assert now["away"] < 60
    assert now["pause"] == now["check"] == 3600
    assert agent.stop() == 0


@pytest.mark.parametrize("backend", ["legacy", "owned"])
def test_the_kernel_tells_of_rules_that_are_restored(netns: Namespace, tmp_path: Path, backend: str) -> None:
    agent = Agent(netns, tmp_path, QUICK.replace("legacy", backend) + UDP).ready()
    text = "*mangle\n:NFQA-default-OUTPUT - [0:0]\n-A OUTPUT -j NFQA-default-OUTPUT\nCOMMIT\n"
    netns.run("iptables-nft-restore", "--noflush", input=text.replace("-A OUTPUT", "-A NFQA-default-OUTPUT -j RETURN\n-A OUTPUT"))
    until(lambda: "from iptables-nft tables" in agent.log, "they are removed")
    assert agent.stop() == 0


def test_a_fight_is_said_with_the_pause_and_the_count(netns: Namespace, tmp_path: Path) -> None:
    agent = Agent(netns, tmp_path, '[agent]\nbackend = "legacy"\ndrift_check = "2s"\n' + UDP).ready()
    # Until it is killed, or its namespace is closed: under load a number of rounds is over too soon.
    script = "while :; do iptables-legacy -w -t mangle -F OUTPUT; sleep 0.1; done"
    enemy = netns.start("sh", "-c", script, stderr=subprocess.DEVNULL)
    until(lambda: "again and again; the next check is in 4s" in agent.log, "the fight is said")
    # The pause grows on; each one is said.
    until(lambda: f"the next check is in {drift(agent)['pause']:g}s" in agent.log, "the pause in force is said")
    assert drift(agent)["away"] > 0
    assert "another program changes the rules again and again" in " ".join(agent.verb("status").stdout.split())
    assert "again and again" in said(agent, "rules")
    enemy.kill()
    assert agent.stop() == 0


def test_comments_that_are_no_text_are_no_crash(netns: Namespace, tmp_path: Path) -> None:
    agent = Agent(netns, tmp_path, NO_CHECKS + UDP).ready()
    script = (
        "c=$(printf 'caf\\351'); for t in iptables-legacy iptables-nft; do"
        ' $t -w -t mangle -I OUTPUT -m comment --comment "$c" -j ACCEPT;'
        ' $t -w -t mangle -A INPUT -m comment --comment "nfq-agent:default:$c" -j ACCEPT; done'
    )
    netns.shell(script)
    for verb in ("doctor", "status", "rules"):
        done = agent.verb(verb, check=False)
        assert "Traceback" not in done.stderr, done.stderr
        assert done.stdout
    assert len(drift(agent)["wrong"]) == 1
    assert set(bypasses(agent)) == {"in-front"}
    assert agent.stop() == 0
    agent.verb("remove")
    assert "nfq-agent" not in netns.run("iptables-legacy-save", errors="replace").stdout


@pytest.mark.parametrize("backend", ["legacy", "owned"])
def test_a_comment_with_a_newline_makes_no_rule_ours(netns: Namespace, tmp_path: Path, backend: str) -> None:
    """In the text of iptables-save its second line looks like a rule of ours."""
    lines = "them\n-A OUTPUT -m comment --comment nfq-agent:default:app -j NFQA-default-OUTPUT"
    theirs = ("-t", "mangle", "-A", "OUTPUT", "-p", "udp", "-m", "comment", "--comment", lines, "-j", "RETURN")
    saves = "iptables-legacy-save -t mangle; iptables-nft-save -t mangle"

    def rest() -> list[str]:
        return [line for line in netns.shell(saves).splitlines() if not line.startswith((":", "#"))]

    for tool in ("iptables-legacy", "iptables-nft"):
        netns.run(tool, "-w", *theirs)
    before = rest()
    agent = Agent(netns, tmp_path, NO_CHECKS.replace("legacy", backend) + UDP).ready()
    assert drift(agent)["wrong"] == []
    assert "nfq-agent:default:app -j NFQA" not in agent.verb("rules").stdout
    assert agent.stop() == 0
    assert rest() == before
    agent.verb("remove")
    assert rest() == before


def test_the_holder_of_a_queue_is_named_by_its_namespace(netns: Namespace, tmp_path: Path) -> None:
    config = tmp_path / "a.toml"
    config.write_text('[queue.main]\nnum = 33\n[rules.app]\nqueue = "main"\ntcp_ports = [1]\n')
    program = "import nfq_agent, time; q = nfq_agent.Queue(33); q.open(); q.bind(); print('bound', flush=True); time.sleep(60)"
    # In a PID namespace of its own it is number 1, which names the machine's first process elsewhere.
    holder = netns.start("unshare", "--pid", "--fork", "--kill-child", sys.executable, "-c", program, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"bound\n"
    text = netns.run(*COMMAND, "doctor", "--config", str(config), check=False).stdout
    line = " ".join(text[text.index("number 33") :].split())
    assert line.startswith("number 33 of [queue.main] is used by python")
    assert "in another PID namespace" in line[:200]
    assert "(pid 1," not in line[:200]
    holder.kill()


REDIRECT = '[proxy.web]\nlisten = ["0.0.0.0:15002"]\ncapture = "redirect"\n[rules.web]\nproxy = "web"\ntcp_ports = [80]\n'


def test_marks_of_others_nat_of_others_and_firewalls_are_named(netns: Namespace, tmp_path: Path) -> None:
    netns.run("iptables-legacy", "-w", "-P", "INPUT", "DROP")
    netns.run("iptables-legacy", "-w", "-I", "INPUT", "-i", "lo", "-j", "ACCEPT")
    netns.shell(
        "nft add table ip theirs; nft 'add chain ip theirs in { type filter hook input priority 0; policy drop; }';"
        "nft add rule ip theirs in iif lo accept;"
        "nft 'add chain ip theirs out { type nat hook output priority -100; }'; nft add rule ip theirs in meta mark set 0x1000"
    )
    netns.run(*OUTPUT, "-A", "OUTPUT", "-p", "tcp", "-j", "MARK", "--set-mark", "0x7")
    netns.run("iptables-legacy", "-w", "-t", "raw", "-A", "PREROUTING", "-p", "tcp", "--dport", "80", "-j", "CT", "--notrack")
    agent = Agent(netns, tmp_path, NO_CHECKS + REDIRECT + 'hooks = ["prerouting", "output"]\n').ready()
    assert "NAT of nf_tables (ip theirs out)" in agent.log
    assert "iptables -I INPUT -p tcp -m multiport --dports 15002 -m conntrack --ctstate DNAT -j ACCEPT" in agent.log
    assert 'backend = "owned"' in said(agent, "NAT order")
    assert "the inet table filter (legacy) and nft chain ip theirs in drops" in said(agent, "firewall")
    marks = said(agent, "marks")
    assert "MARK --set-xmark 0x7/0xffffffff" in marks
    assert "nft chain ip theirs in sets a mark" in marks
    assert "NAT in nf_tables: ip theirs out" in said(agent, "legacy and nft")
    assert "raw" in said(agent, "NOTRACK")
    assert agent.stop() == 0


@pytest.mark.parametrize("backend", ["legacy", "owned"])
def test_nat_at_an_earlier_priority_is_named(netns: Namespace, tmp_path: Path, backend: str) -> None:
    netns.shell(
        "nft add table ip theirs; nft 'add chain ip theirs out { type nat hook output priority -150; }';"
        "nft 'add chain ip theirs in { type nat hook prerouting priority -150; }'"
    )
    text = f'[agent]\nbackend = "{backend}"\ndrift_check = "0"\n{REDIRECT}hooks = ["output"]\n'
    agent = Agent(netns, tmp_path, text).ready()
    line = "nft chain ip theirs out does NAT at priority -150 and is asked before this agent"
    assert line in agent.log
    found = said(agent, "NAT order")
    assert line in found
    assert "priority -100 (dstnat)" in found
    # We have no rule in the other's hook, and owned would not be asked before it either.
    assert "theirs in" not in found
    assert "are both in use" not in found
    assert agent.stop() == 0


NOTRACK = {
    "the inet table raw (legacy)": "iptables-legacy -w -t raw -A OUTPUT -p tcp --dport 80 -j CT --notrack",
    "nft chain ip raw OUTPUT": "iptables-nft -t raw -A OUTPUT -p tcp --dport 80 -j CT --notrack",
    "nft chain inet theirs out": "nft 'table inet theirs { chain out { type filter hook output priority -300;"
    " tcp dport 80 notrack; }; }'",
}


@pytest.mark.parametrize("place", NOTRACK)
def test_rules_against_connection_tracking_are_named(netns: Namespace, place: str) -> None:
    netns.shell(
        "iptables-nft -t raw -A OUTPUT -p tcp --dport 80 -j CT --zone 1; iptables-legacy -w -t raw -A OUTPUT -j CT --zone 1"
    )
    assert netns.call(obstacles.untracked) == []
    netns.shell(NOTRACK[place])
    assert netns.call(obstacles.untracked) == [place]


@pytest.mark.parametrize("backend", ["legacy", "owned"])
def test_connections_that_another_nat_takes_first_are_counted_as_missing(netns: Namespace, tmp_path: Path, backend: str) -> None:
    head = QUICK.replace("legacy", backend)
    agent = Agent(netns, tmp_path, head + REDIRECT + 'hooks = ["output"]\nfamily = "inet"\n').ready()
    connect = (
        "import socket\nfor _ in range(40):\n"
        "    try: socket.create_connection(('127.0.0.1', 80), 2).close()\n    except OSError: pass\n"
    )
    netns.run(sys.executable, "-c", connect)
    assert bypasses(agent) == {}
    # Registered last, it is asked first where both stand at -100.
    netns.shell(
        "nft add table ip theirs; nft 'add chain ip theirs out { type nat hook output priority -100; }';"
        "nft add rule ip theirs out tcp dport 80 redirect to :9"
    )
    netns.run(sys.executable, "-c", connect)
    found = bypasses(agent)
    if backend == "owned":
        assert found == {}
    else:
        assert found["proxy"]["count"] == 40
        assert found["proxy"]["text"] == (
            "proxy web: 80 connections should have been redirected to it, and 40 were: another NAT of this host took them first, "
            "or they are not tracked"
        )
        assert 'backend = "owned"' in said(agent, "uninspected: proxy")
    assert agent.stop() == 0


def test_each_dropped_flow_is_told_once(netns: Namespace, tmp_path: Path) -> None:
    text = NO_CHECKS + UDP.replace("[queue.main]", '[queue.main]\nelements = ["egress"]')
    policy = '[element.egress]\ntype = "policy"\ndefault = "drop"\n'
    agent = Agent(netns, tmp_path, text + policy).ready()
    for _ in range(2):
        flood(netns, 50)
    until(lambda: queue(agent)["workers"][0]["dropped"] == 100, "all are dropped")
    until(lambda: agent.log.count("dropped udp 127.0.0.1:") == 2, "each flow has its line")
    assert "OUTPUT, by egress: default" in agent.log
    agent.configure(text.replace("[queue.main]", "[queue.main]\nlog_drops = false") + policy)
    agent.verb("reload")
    flood(netns, 50)
    until(lambda: queue(agent)["workers"][0]["dropped"] >= 50, "dropped again")
    assert agent.stop() == 0
    assert agent.log.count("dropped udp") == 2
