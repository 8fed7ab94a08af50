"""What another worker knows of a connection that a policy judged before: its names, or that a message of it has begun."""

from __future__ import annotations

import os
from typing import Any

import pytest
from talk import HELLO, Talk

from nfq_agent.context import Context
from nfq_agent.flow_memory import SIZE, FlowMemory
from nfq_agent.policy_memory import UNFINISHED
from nfq_agent.testing import Bench
from nfq_agent.verdict import ACCEPT, DROP, Verdict

ALLOW = {"default": "drop", "rule": [{"action": "accept", "tls_sni": ["a.server.test"]}]}
BLOCK = {"default": "accept", "rule": [{"action": "drop", "tls_sni": ["a.server.test"]}]}


def worker(memory: FlowMemory, options: dict[str, Any]) -> Talk:
    """A connection in front of a new worker with this memory."""
    bench = Bench("policy", before=[("dpi", {})], undecided="accept", **options)
    for each in bench.elements:
        each.context = Context(flows=memory)
    return Talk(bench)


def answer(talk: Talk, data: bytes, at: int) -> Verdict | None:
    return talk.bench.decide(talk.segment(data, at))


@pytest.mark.parametrize("options", [ALLOW, BLOCK], ids=["allow-list", "block-list"])
@pytest.mark.parametrize("cut", [1, 60, len(HELLO) - 1])
def test_a_message_that_another_worker_began_to_read(options: dict[str, Any], cut: int) -> None:
    memory = FlowMemory(memoryview(bytearray(SIZE)), os.urandom(16))
    first = worker(memory, options).open()
    assert answer(first, HELLO[:cut], 0) == ACCEPT
    assert answer(worker(memory, options), HELLO[cut:], cut) == DROP
    found = memory.recall(first.flow.origin)  # type: ignore[union-attr]  # it was made by the first packet
    assert found is not None
    assert found[1]["conflict"] == UNFINISHED


def test_a_message_that_the_same_worker_reads_to_its_end() -> None:
    memory = FlowMemory(memoryview(bytearray(SIZE)), os.urandom(16))
    first = worker(memory, ALLOW).open()
    assert answer(first, HELLO[:60], 0) == ACCEPT
    assert answer(first, HELLO[60:], 60) == ACCEPT
    assert answer(worker(memory, ALLOW), b"\x17\3\3\0\1\1", len(HELLO)) == ACCEPT


def test_what_the_server_says_first_is_no_message_of_the_client() -> None:
    memory = FlowMemory(memoryview(bytearray(SIZE)), os.urandom(16))
    first = worker(memory, BLOCK).open().answer(b"220 me.test\r\n")
    assert first.flow is not None
    assert memory.recall(first.flow.origin) is None
