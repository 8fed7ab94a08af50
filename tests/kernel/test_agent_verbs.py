"""The verbs beside a real agent, and what systemd is told."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import socket
import subprocess
from functools import partial
from pathlib import Path

import pytest
from agent import COMMAND, Agent, ours, until
from agent_flood import another_than, count_passed, flood, udp
from namespace import PATIENCE, Namespace
from recorded import capture

from nfq_agent import testing

pytestmark = pytest.mark.kernel


def test_what_systemd_is_told(netns: Namespace, tmp_path: Path) -> None:
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind(str(path))
        end.settimeout(PATIENCE)

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
        until(partial(another_than, agent, worker), "another worker serves")
        heard("WATCHDOG=1")
        agent.process.terminate()
        heard("STOPPING=1")
        assert agent.process.wait(timeout=PATIENCE) == 0


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
    assert any("system user proxyuser would be created" in line for line in lines)
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
    assert flood(netns, 10).wait(timeout=PATIENCE) == 0
    assert passed() == 10, "bypass keeps traffic flowing"
    config.write_text("this is not TOML")
    netns.run(*COMMAND, "remove", "--instance", "default")
    assert ours(netns) == []
    assert netns.run(*COMMAND, "remove", "--instance", "default").returncode == 0


@pytest.mark.parametrize(("typed", "kept"), [("yes\n", True), ("no\n", False), ("", False)])
def test_apply_confirm_undoes_an_unconfirmed_change(netns: Namespace, tmp_path: Path, typed: str, kept: bool) -> None:
    netns.run(*COMMAND, "apply", "--config", str(Path(__file__).parent.parent / "configs" / "five-tuple-log.toml"))
    before = ours(netns)
    process = netns.start(
        *COMMAND, "apply", "--confirm", "60" if kept else "2",
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    assert any(b"Type yes" in line for line in process.stdout), "the new rules are in"
    process.stdin.write(typed.encode())
    process.stdin.close()
    assert process.wait(timeout=PATIENCE) == (0 if kept else 1)
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


def test_doctor_names_the_problems(netns: Namespace, tmp_path: Path) -> None:
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


def test_the_demo_holds_and_two_of_them_side_by_side(tmp_path: Path) -> None:
    demos = [
        subprocess.Popen(
            [*COMMAND, "demo"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True
        )
        for _ in range(2)
    ]
    for demo in demos:
        text, _ = demo.communicate(timeout=PATIENCE)
        assert demo.returncode == 0, text
        assert "they equal the rules before" in text


POLICY = """
[queue.main]
num = 7
elements = ["allow"]
mode = "{mode}"
[rules.out]
queue = "main"
udp_ports = [{port}]
[element.allow]
type = "policy"
default = "drop"
"""


def test_plan_says_what_a_reload_changes_for_packets(netns: Namespace, tmp_path: Path) -> None:
    agent = Agent(netns, tmp_path, POLICY.format(mode="monitor", port=9000)).ready()
    assert "Nothing to do" in agent.verb("plan").stdout
    agent.configure(POLICY.format(mode="enforce", port=9000))
    done = agent.verb("plan", check=False)
    assert done.returncode == 3
    assert done.stdout.splitlines() == [
        "# Plan for instance default, legacy backend: 0 rules added, 0 removed, 2 changes of policy. Nothing is written.",
        "# queue main: mode monitor -> enforce",
        "# queue main: drops what no rule matches",
    ]
    told = json.loads(agent.verb("plan", "--json", check=False).stdout)
    assert told["policy"] == ["queue main: mode monitor -> enforce", "queue main: drops what no rule matches"]
    assert told["policy_changed"] is True
    # A capture is judged as the agent does now, and as it would.
    seen = capture(tmp_path / "seen.pcap", [testing.udp("192.0.2.1:5", "192.0.2.2:9000")])
    done = agent.verb("plan", "--pcap", str(seen), check=False)
    assert done.returncode == 4, done.stderr
    assert "compared with the verdicts by the running agent: 1 flow, 1 changed" in done.stdout.splitlines()
    assert "would drop -> drop: udp 192.0.2.1:5 -> 192.0.2.2:9000" in done.stdout
    agent.verb("reload")
    done = agent.verb("plan", "--pcap", str(seen))
    assert "compared with the verdicts by the running agent: 1 flow, 0 changed" in done.stdout.splitlines()
    agent.stop()
    assert (
        "beside a running agent its configuration is compared with" in agent.verb("plan", "--pcap", str(seen), check=False).stdout
    )
    # Without an agent, what the policies are.
    told = json.loads(agent.verb("plan", "--json", check=False).stdout)
    assert told["policy"] == ["queue main: mode enforce; allow: 0 rules, else drop; drops what no rule matches"]
    assert told["policy_changed"] is None


@pytest.mark.parametrize("end", ["yes", "no", "cut"])
def test_an_unconfirmed_reload_is_undone_by_the_agent(netns: Namespace, tmp_path: Path, end: str) -> None:
    agent = Agent(netns, tmp_path, POLICY.format(mode="monitor", port=9000)).ready()
    before = ours(netns)
    agent.configure(POLICY.format(mode="enforce", port=9001))
    process = netns.start(
        # Behind a no nothing can be typed any more, and the time runs to its end.
        *COMMAND, "reload", "--confirm", {"cut": "2", "no": "20", "yes": "60"}[end], "--config", str(agent.config),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    assert any(b"Type yes" in line for line in process.stdout)
    if end == "cut":
        # The terminal is gone, and no answer can come.
        process.kill()
        process.wait(timeout=PATIENCE)
        until(lambda: "not confirmed in time" in agent.log, "the agent takes it back")
        assert ours(netns) == before
    else:
        assert any("9001" in line for line in ours(netns))
        process.stdin.write(f"{end}\n".encode())
        process.stdin.close()
        assert process.wait(timeout=PATIENCE) == (0 if end == "yes" else 1)
        assert any("9001" in line for line in ours(netns)) == (end == "yes")
    assert agent.queue()["mode"] == ("enforce" if end == "yes" else "monitor")
    assert agent.stop() == 0


def test_a_reload_over_a_terminal_that_breaks_is_undone(netns: Namespace, tmp_path: Path) -> None:
    agent = Agent(netns, tmp_path, POLICY.format(mode="monitor", port=9000)).ready()
    before = ours(netns)
    agent.configure(POLICY.format(mode="enforce", port=9001))
    terminal, end = pty.openpty()
    # A session of its own, whose processes get SIGHUP when the other side of its terminal is closed.
    argv = ("setsid", "--ctty", *COMMAND, "reload", "--confirm", "5", "--config", str(agent.config))
    process = netns.start(*argv, stdin=end, stdout=end, stderr=end)
    os.close(end)
    said = b""
    while b"Type yes" not in said:
        said += os.read(terminal, 4096)
    os.close(terminal)
    assert process.wait(timeout=PATIENCE) != 0
    until(lambda: "not confirmed in time" in agent.log, "the agent takes it back")
    assert ours(netns) == before
    assert agent.queue()["mode"] == "monitor"
    assert agent.stop() == 0


def test_a_reload_is_confirmed_by_another_command(netns: Namespace, tmp_path: Path) -> None:
    agent = Agent(netns, tmp_path, POLICY.format(mode="monitor", port=9000)).ready()
    assert "no reload waits" in agent.verb("confirm", check=False).stderr
    agent.configure(POLICY.format(mode="enforce", port=9001))
    agent.verb("reload", "--confirm", "60", "--no-wait")
    agent.verb("confirm", "--undo")
    assert agent.queue()["mode"] == "monitor"
    agent.verb("reload", "--confirm", "60", "--no-wait")
    agent.verb("confirm")
    assert agent.queue()["mode"] == "enforce"
    agent.configure(POLICY.format(mode="monitor", port=9002))
    agent.verb("reload", "--confirm", "1", "--no-wait")
    until(lambda: "not confirmed in time" in agent.log, "the agent takes it back")
    assert agent.verb("confirm", check=False).returncode == 1
    assert any("9001" in line for line in ours(netns))
    assert agent.stop() == 0


def test_chaos_breaks_a_queue_for_a_time(netns: Namespace, tmp_path: Path) -> None:
    passed = count_passed(netns)
    agent = Agent(netns, tmp_path, udp()).ready()
    before = ours(netns)
    assert "has faults for 600 s" in agent.verb("chaos", "on", "main", "drop=1.0", "--for", "600s").stdout
    assert flood(netns, 10).wait(timeout=PATIENCE) == 0
    until(lambda: agent.totals()["dropped"] == 10, "all are dropped")
    assert passed() == 0
    assert "no faults any more" in agent.verb("chaos", "off").stdout
    assert flood(netns, 10).wait(timeout=PATIENCE) == 0
    until(lambda: passed() == 10, "all pass")
    # They end without a word, too.
    agent.verb("chaos", "on", "main", "drop=1.0", "--for", "1s")
    until(lambda: agent.log.count("no faults any more") == 2, "the faults are over")
    done = agent.verb("chaos", "on", "main", "drop=7", check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("drop: ")
    assert ours(netns) == before
    assert agent.stop() == 0


def test_chaos_ends_with_a_reload_and_a_kill_and_outlives_its_worker(netns: Namespace, tmp_path: Path) -> None:
    passed = count_passed(netns)
    agent = Agent(netns, tmp_path, udp()).ready()

    def all_pass(what: str) -> None:
        before = passed()
        assert flood(netns, 5).wait(timeout=PATIENCE) == 0
        until(lambda: passed() == before + 5, what)

    def all_drop() -> None:
        before, dropped = passed(), agent.totals()["dropped"]
        assert flood(netns, 5).wait(timeout=PATIENCE) == 0
        until(lambda: agent.totals()["dropped"] == dropped + 5, "faults drop")
        assert passed() == before

    def drops_one() -> bool:
        before = agent.totals()["dropped"]
        assert flood(netns, 1).wait(timeout=PATIENCE) == 0
        return agent.totals()["dropped"] > before

    def begin() -> None:
        assert agent.verb("chaos", "on", "main", "drop=1.0", "--for", "600s").returncode == 0
        all_drop()

    begin()
    agent.process.send_signal(signal.SIGHUP)
    until(lambda: "the faults have ended with the reload" in agent.log, "a reload ends them")
    all_pass("after a reload")
    # A restart would read the file: it is refused while there are faults.
    begin()
    refused = agent.verb("restart", check=False)
    assert (refused.returncode, "on trial" in refused.stderr) == (1, True)
    agent.process.send_signal(signal.SIGUSR2)
    until(lambda: agent.log.count("restart refused") == 2, "by the signal, too")
    # A worker that is killed meanwhile comes back with the faults, and loses them with the others.
    (worker,) = agent.workers()
    os.kill(worker, signal.SIGKILL)
    until(partial(another_than, agent, worker), "another worker serves")
    until(drops_one, "it has the faults")
    assert "no faults any more" in agent.verb("chaos", "off").stdout
    all_pass("after their end")
    begin()
    agent.kill()
    agent.start()
    agent.ready()
    all_pass("after a kill")
    assert agent.stop() == 0
