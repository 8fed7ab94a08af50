"""Who may ask the running agent for what: by the user that the kernel names (SO_PEERCRED)."""

from __future__ import annotations

import grp
import json
import math
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from agent import Agent, until
from namespace import UNPRIVILEGED, Namespace

from nfq_agent.service import control, rights

pytestmark = pytest.mark.kernel


def as_user(namespace: Namespace, uid: int, groups: list[int], verb: str) -> str:
    """What the agent answers to this user, or how it could not be asked."""

    def inside() -> str:
        os.setgroups(groups)
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        try:
            return str(control.ask("default", {"verb": verb}))
        except control.ControlError as error:
            return f"refused: {error}"

    return namespace.call(inside)


def test_the_status_is_for_a_group_and_changes_are_for_root(netns: Namespace, tmp_path: Path) -> None:
    netns.run("groupadd", "--system", rights.READERS, check=False)
    reader = int(netns.run("getent", "group", rights.READERS).stdout.split(":")[2])
    agent = Agent(netns, tmp_path, "[queue.main]\nnum = 100\n").ready()
    state = netns.call(os.stat, "/run/nfq-agent/default.sock")
    assert (stat.S_IMODE(state.st_mode), state.st_gid) == (0o660, reader)
    assert "Permission denied" in as_user(netns, UNPRIVILEGED, [], "status")
    assert "'running': True" in as_user(netns, UNPRIVILEGED, [reader], "status")
    assert "'reload' is for root" in as_user(netns, UNPRIVILEGED, [reader], "reload")
    assert "reloaded" not in agent.log
    assert agent.verb("reload").returncode == 0
    assert agent.stop() == 0


def test_without_the_group_it_is_roots_alone(netns: Namespace, tmp_path: Path) -> None:
    try:
        grp.getgrnam(rights.READERS)
    except KeyError:
        pass
    else:
        netns.run("groupdel", rights.READERS)
    agent = Agent(netns, tmp_path, "[queue.main]\nnum = 100\n").ready()
    state = netns.call(os.stat, "/run/nfq-agent/default.sock")
    assert stat.S_IMODE(state.st_mode) == 0o600
    assert "Permission denied" in as_user(netns, UNPRIVILEGED, [], "status")
    assert agent.stop() == 0


def test_a_question_with_wrong_types_does_not_end_the_agent(netns: Namespace, tmp_path: Path) -> None:
    netns.run("groupadd", "--system", rights.READERS, check=False)
    reader = int(netns.run("getent", "group", rights.READERS).stdout.split(":")[2])
    agent = Agent(netns, tmp_path, "[queue.main]\nnum = 100\n").ready()

    def asked(question: dict[str, Any], groups: list[int], uid: int) -> dict[str, Any]:
        def inside() -> dict[str, Any]:
            os.setgroups(groups)
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            return control.ask("default", question)

        return netns.call(inside)

    verbs: tuple[Any, ...] = ([], {}, None, 1)
    for verb in verbs:
        answer = asked({"verb": verb}, [reader], UNPRIVILEGED)
        assert answer == {"ok": False, "message": f"not a question: verb = {json.dumps(verb)}; allowed: a text"}
    for question in (
        {"verb": "reload", "confirm": "abc"},
        {"verb": "chaos", "queue": "main", "odds": [1], "seconds": 1},
        {"verb": "chaos", "queue": "main", "odds": {}, "seconds": []},
        {"verb": "flows", "places": {"worker of queue 100": ["x", 0, 0]}},
    ):
        assert "allowed" in asked(question, [], 0)["message"]
    faults: tuple[Any, ...] = ({"drop": "x"}, {"drop": math.inf}, {"drop": {}}, {"drop": 7}, {"no such": 1}, {"delay": [1]})
    for odds in faults:
        answer = asked({"verb": "chaos", "queue": "main", "odds": odds, "seconds": 1}, [], 0)
        assert not answer["ok"], odds
    assert agent.status()["running"]
    assert agent.stop() == 0


def test_a_hostile_client_neither_ends_nor_slows_the_agent(netns: Namespace, tmp_path: Path) -> None:
    agent = Agent(netns, tmp_path, "[queue.main]\nnum = 100\n").ready()
    script = """
import socket, sys, time
ends = []
for text in (b"[" * 300000, b"{" * 4000 + b"\\n"):
    end = socket.socket(socket.AF_UNIX)
    end.connect("/run/nfq-agent/default.sock")
    try:
        end.sendall(text)
    except OSError:
        pass
    ends.append(end)
slow = socket.socket(socket.AF_UNIX)
slow.connect("/run/nfq-agent/default.sock")
try:
    while True:
        slow.send(b"{")
        time.sleep(0.1)
except OSError:
    print("cut")
"""
    slow = netns.start("python3", "-c", script, stdout=-1)
    until(lambda: agent.status()["running"], "it answers during that time")
    assert slow.stdout is not None
    assert slow.stdout.read() == b"cut\n"
    assert agent.process.poll() is None
    assert agent.stop() == 0
