"""Scrapes over a real socket, and the metrics printed once, with agents that answer and one that does not."""

from __future__ import annotations

import socket
import threading
import urllib.request

import pytest

from nfq_agent.cli import running, scrape
from nfq_agent.cli.flags import Flags
from nfq_agent.service import control
from nfq_agent.values import Endpoint
from unit.test_status import REPORT


@pytest.fixture(autouse=True)
def agents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "instances", lambda: ["default", "web"])
    monkeypatch.setattr(running, "status_if_any", lambda name: REPORT if name == "default" else None)


def test_a_scrape_asks_every_agent_and_the_server_ends_when_none_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    descriptor = listening.detach()
    monkeypatch.setattr(scrape, "passed", lambda: {"nfq-agent-metrics.socket": descriptor})
    monkeypatch.setattr(scrape, "_IDLE", 3.0)
    ended: list[int] = []
    thread = threading.Thread(target=lambda: ended.append(scrape.serve(Flags(), Endpoint("127.0.0.1", 1))))
    thread.start()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
        text = answer.read().decode()
    assert 'nfq_agent_up{agent="default"} 1.0' in text
    assert 'nfq_agent_up{agent="web"} 0.0' in text
    thread.join(20)
    assert ended == [0]


def test_an_address_that_is_in_use_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert scrape.serve(Flags(), Endpoint("127.0.0.1", port)) == 1
    assert capsys.readouterr().err == f"nfq-agent: 127.0.0.1:{port}: Address already in use\n"


def test_the_instance_that_is_named_is_the_only_one_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert scrape.show(Flags(instance="web")) == 0
    printed = capsys.readouterr().out
    assert 'nfq_agent_up{agent="web"} 0.0' in printed
    assert 'agent="default"' not in printed
