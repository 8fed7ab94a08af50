"""The log of a real agent: JSON, console, journal, and a reader that does not read."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from agent import COMMAND, Agent, ours, until
from agent_flood import count_passed, flood, udp
from namespace import PATIENCE, Namespace
from traffic import PYTHON

pytestmark = pytest.mark.kernel


def test_the_five_tuple_log_as_json_and_on_a_console(netns: Namespace, tmp_path: Path) -> None:
    agent = Agent(netns, tmp_path, udp(), "--log-5tuple", LOG_FORMAT="json")
    until(lambda: "is serving" in agent.log, "it serves")
    assert flood(netns, 1).wait(timeout=PATIENCE) == 0
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
    assert flood(netns, 1).wait(timeout=PATIENCE) == 0
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


def test_lines_about_flows_are_chosen_by_a_filter(netns: Namespace, tmp_path: Path) -> None:
    text = udp().replace("[rules.app]", 'elements = ["log"]\n[rules.app]')
    agent = Agent(netns, tmp_path, text + '[log]\nwhen = "dport = 1"\n', LOG_FORMAT="json").ready()
    assert flood(netns, 1).wait(timeout=PATIENCE) == 0
    until(lambda: agent.totals()["accepted"] == 1, "the packet is judged")
    agent.configure(text + '[log]\nwhen = "dport = 11000 and verdict = accept"\n')
    assert agent.verb("reload").returncode == 0
    assert flood(netns, 1).wait(timeout=PATIENCE) == 0
    until(lambda: '"dport": 11000' in agent.log, "the line of the second packet")
    assert agent.log.count('"dport": 11000') == 1
    assert agent.stop() == 0


def test_an_unread_log_delays_no_verdict(netns: Namespace, tmp_path: Path) -> None:
    config = tmp_path / "a.toml"
    config.write_text(udp().replace("[rules.app]", 'elements = ["log"]\n[element.log]\nper_second = 0\n[rules.app]'))
    passed = count_passed(netns)
    process = netns.start(*COMMAND, "run", "--config", str(config), stderr=subprocess.PIPE)
    until(lambda: ours(netns), "the rules are in")
    # A pipe holds 64 KB: some 700 lines.
    assert flood(netns, 20_000, 20_000).wait(timeout=PATIENCE) == 0
    until(lambda: passed() == 20_000, "every packet passes")
    status = json.loads(netns.run(*COMMAND, "status", "--json", "--config", str(config)).stdout)
    (worker,) = status["queues"][0]["workers"]
    assert (worker["received"], worker["accepted"], status["queues"][0]["uninspected"]) == (20_000, 20_000, 0)
    process.terminate()
    assert process.wait(timeout=PATIENCE) == 0


def test_a_reload_changes_the_log_too(netns: Namespace, tmp_path: Path) -> None:
    text = udp().replace("[rules.app]", 'elements = ["log"]\n[rules.app]')
    agent = Agent(netns, tmp_path, text + '[log]\nlevel = "warning"\nformat = "json"\n', LOG_FORMAT="")
    until(lambda: ours(netns), "the rules are in")
    assert flood(netns, 1).wait(timeout=PATIENCE) == 0
    until(lambda: agent.totals()["received"] == 1, "the packet is judged")
    assert agent.log == ""
    agent.configure(text + '[log]\nlevel = "info"\nformat = "json"\n')
    agent.verb("reload")
    assert flood(netns, 1).wait(timeout=PATIENCE) == 0
    events = until(lambda: [json.loads(line) for line in agent.log.splitlines() if '"dport"' in line], "the packet is logged")
    assert events[0]["dport"] == 11000
    agent.stop()
