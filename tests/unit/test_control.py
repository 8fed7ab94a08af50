"""The control socket: a client can be slow, silent, wrong or hostile, and the agent continues."""

from __future__ import annotations

import json
import os
import selectors
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nfq_agent.config.models import Config
from nfq_agent.service import control
from nfq_agent.service.instance_lock import Lock
from nfq_agent.service.policy_generation import advance


class Agent:
    """The agent's end with a selector and a clock of its own."""

    def __init__(self) -> None:
        self.now = 0.0
        self.asked: list[dict[str, Any]] = []
        self.reply: dict[str, Any] = {"ok": True}
        self.selector = selectors.EpollSelector()
        self.server = control.Server("default", lambda: self.now)
        self.server.serve(self.selector, self._respond)

    def _respond(self, question: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(question)
        return self.reply

    def turn(self) -> None:
        """All that can be done at once."""
        for _ in range(50):
            events = self.selector.select(0)
            if not events:
                return
            for key, _ in events:
                key.data()

    def close(self) -> None:
        self.server.close()
        self.selector.close()


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Agent]:
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path / "state"))
    made = Agent()
    yield made
    made.close()


def client(tmp_path: Path) -> socket.socket:
    end = socket.socket(socket.AF_UNIX)
    end.connect(str(tmp_path / "default.sock"))
    end.settimeout(5)
    return end


def test_a_question_and_its_answer(agent: Agent, tmp_path: Path) -> None:
    with client(tmp_path) as end:
        end.sendall(b'{"verb": "status"}\n')
        agent.turn()
        assert end.recv(100) == b'{"ok": true}\n'
        assert end.recv(100) == b""
    assert agent.asked == [{"verb": "status"}]


@pytest.mark.parametrize(
    "text", [b"[" * 300_000, b"[" * 4000 + b"\n", b'{"a":' * 600 + b"\n", b"x" * 5000, b"\xff\xfe\n", b"7\n", b"\n", b"{\n"]
)
def test_what_is_no_question_is_refused_and_harms_nothing(agent: Agent, tmp_path: Path, text: bytes) -> None:
    with client(tmp_path) as end:
        end.setblocking(False)
        sent = 0
        while sent < len(text):
            try:
                sent += end.send(text[sent : sent + 65536])
            except BlockingIOError:
                agent.turn()
            except OSError:
                break
            agent.turn()
        agent.turn()
        end.settimeout(5)
        try:
            answer = end.recv(1000)
        except ConnectionResetError:
            answer = b""
        assert answer == b"" or not json.loads(answer)["ok"]
    assert agent.asked == []
    test_a_question_and_its_answer(agent, tmp_path)


def test_a_slow_client_delays_no_other_and_has_one_deadline(agent: Agent, tmp_path: Path) -> None:
    with client(tmp_path) as slow, client(tmp_path) as silent:
        for _ in range(4):
            slow.send(b"{")
            agent.turn()
            agent.now += 0.4
            test_a_question_and_its_answer(agent, tmp_path)
            agent.asked.clear()
        assert agent.server.expire() == control.DEADLINE
        # A byte does not begin a new time.
        agent.now = control.DEADLINE
        assert agent.server.expire() is None
        for end in (slow, silent):
            assert end.recv(10) == b""


def test_a_client_that_does_not_read_its_answer(agent: Agent, tmp_path: Path) -> None:
    agent.reply = {"text": "x" * 10_000_000}
    with client(tmp_path) as end:
        end.sendall(b'{"verb": "status"}\n')
        agent.turn()
        agent.now += control.DEADLINE
        assert agent.server.expire() is None
        # And one that does read has all of it.
    agent.asked.clear()
    done = threading.Event()
    answers: list[dict[str, Any]] = []

    def ask() -> None:
        answers.append(control.ask("default", {"verb": "status"}))
        done.set()

    thread = threading.Thread(target=ask)
    thread.start()
    while not done.is_set():
        agent.turn()
    thread.join()
    assert answers == [agent.reply]


def test_many_idle_clients_do_not_keep_the_next_one_out(agent: Agent, tmp_path: Path) -> None:
    idle = []
    for _ in range(50):
        idle.append(client(tmp_path))
        agent.turn()
    assert len(list(agent.server.descriptors)) < 20
    test_a_question_and_its_answer(agent, tmp_path)
    for end in idle:
        end.close()


def test_no_file_is_opened_through_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path / "state"))
    precious = tmp_path / "precious"
    precious.write_text("as it was")
    precious.chmod(0o644)
    for name in ("default.sock", "default.lock", "default.generations", "default.generations.new"):
        (tmp_path / name).symlink_to(precious)
    with pytest.raises(control.ControlError, match=r"default\.lock"):
        Lock("default")
    server = control.Server("default")
    assert (tmp_path / "default.sock").is_socket()
    server.close()
    config = Config.model_validate(
        {"queue": {"main": {"num": 1, "elements": ["offload"]}}, "element": {"offload": {"mark": "0x10000/0xff0000"}}}
    )
    advance(config, tmp_path / "default.generations")
    assert not (tmp_path / "default.generations").is_symlink()
    assert "offload" in json.loads((tmp_path / "default.generations").read_text())
    assert precious.read_text() == "as it was"
    assert precious.stat().st_mode & 0o777 == 0o644
    # A second name of another file is not a lock, either.
    (tmp_path / "default.lock").unlink()
    os.link(precious, tmp_path / "default.lock")
    with pytest.raises(control.ControlError, match="not a regular file of its own"):
        Lock("default")
    assert precious.read_text() == "as it was"


def test_what_was_asked_in_time_is_answered_by_an_agent_that_was_busy(agent: Agent, tmp_path: Path) -> None:
    with client(tmp_path) as end, client(tmp_path) as silent:
        for key, _ in agent.selector.select(0):
            key.data()
        agent.turn()
        end.sendall(b'{"verb": "status"}\n')
        silent.sendall(b'{"verb"')
        # Meanwhile it repaired the rules.
        agent.now = control.DEADLINE + 1
        agent.server.expire()
        assert json.loads(end.recv(4096)) == {"ok": True}
        # The other half of a question is not waited for.
        with pytest.raises(ConnectionError):
            silent.send(b"x")
