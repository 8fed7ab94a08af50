"""Judges of `dpi` and policies on names, and random conversations for them, for tests that compare two of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from conversations import packets

from nfq_agent.context import Context
from nfq_agent.counters import Counters
from nfq_agent.element import PacketElement
from nfq_agent.element_chain import ElementChain
from nfq_agent.elements import packet_element
from nfq_agent.flow_memory import FlowMemory
from nfq_agent.flow_table import FlowTable
from nfq_agent.packet import Packet
from nfq_agent.service.packet_judge import PacketJudge, WorkerSettings
from nfq_agent.verdict import ACCEPT, DROP

_NAMES = [
    {"action": "accept", "http_host": ["*.good.test", "good.test"]},
    {"action": "accept", "tls_sni": ["*.good.test"]},
    {"action": "accept", "dns_name": ["*.good.test"]},
]
_BLOCK = [{"action": "drop", key: ["*.bad.test", "bad.test"]} for key in ("http_host", "tls_sni", "dns_name")]
_MIXED = [
    {"action": "drop", "dport": [443], "http_host": ["*"]},
    {"action": "accept", "http_host": ["other.test"], "dport": [80]},
    {"action": "drop", "http_method": ["POST"]},
    {"action": "accept", "protocol": ["http", "tls"]},
    {"action": "reject", "protocol": ["dns"], "dns_name": ["bad.test"]},
    {"action": "accept", "protocol": ["udp"]},
]
POLICIES: dict[str, dict[str, Any]] = {
    "allow-list": {"default": "drop", "rule": _NAMES},
    "allow-list-careful": {"default": "drop", "undecided": "drop", "rule": _NAMES, "within": 3},
    "allow-list-short": {"default": "drop", "rule": _NAMES, "within": 3, "within_bytes": 500},
    "block-list": {"default": "accept", "rule": _BLOCK},
    "left-open": {"rule": _BLOCK},
    "fingerprints": {
        "default": "drop",
        "rule": [
            {"action": "drop", "ja4": ["t13i*"]},
            {"action": "accept", "tls_version": ["1.3"], "tls_sni": ["*.good.test", "bad.test"]},
            {"action": "drop", "alpn": ["h2"]},
            *_NAMES,
        ],
    },
    "impatient": {"default": "drop", "rule": _NAMES, "within": 2},
    "tls-alone": {"default": "drop", "rule": [{"action": "accept", "protocol": ["tls"]}, *_NAMES]},
    "mixed": {"default": "drop", "rule": _MIXED},
}


@cache
def conversations(seed: int, talks: int, tuples: int) -> list[tuple[float, Packet]]:
    return list(packets(seed, talks, tuples))


def judge(
    policies: list[str], monitor: bool = False, context: Context | None = None, behind: Sequence[tuple[str, dict[str, Any]]] = ()
) -> PacketJudge:
    """A worker's judge of `dpi`, these policies, and elements behind them. context: what the worker lends."""
    chain = ElementChain(elements(policies, behind), ACCEPT, monitor, context)
    return PacketJudge(chain, WorkerSettings(1, ACCEPT, DROP, monitor), Counters(), _emit, lambda *_: None)


def elements(policies: Sequence[str], behind: Sequence[tuple[str, dict[str, Any]]] = ()) -> list[PacketElement]:
    """The elements of such a judge."""
    made: list[PacketElement] = []
    for kind, options in [("dpi", {}), *(("policy", POLICIES[name]) for name in policies), *behind]:
        cls = packet_element(kind)
        made.append(cls(kind, cls.Options.from_table(options), _emit))
    return made


def _emit(*_: object, **__: object) -> None:
    pass


def quick(
    names: Sequence[str] = ("allow-list",), memory: FlowMemory | None = None, behind: Sequence[tuple[str, dict[str, Any]]] = ()
) -> tuple[PacketJudge, FlowTable]:
    """A judge, and its table."""
    judged = judge(list(names), context=Context(flows=memory), behind=behind)
    table = judged.settle_flows()
    assert isinstance(table, FlowTable)
    return judged, table
