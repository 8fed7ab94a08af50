"""A flow in the log: the fields of an event, and a few words. Values only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from nfq_agent.packet import FiveTuple, address, protocol_name
from nfq_agent.protocols.known import HEADLINES

# The arguments of an event that are not fields.
_TAKEN: Final = frozenset(("self", "message", "level"))


def fields(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts by their names; a tuple as its values with spaces between them."""
    return {name: _text(value) for name, value in facts.items() if name not in _TAKEN}


def ends(five_tuple: FiveTuple) -> dict[str, Any]:
    """The fields of a five-tuple: proto, src, dst, and sport and dport where it has ports."""
    found: dict[str, Any] = {
        "proto": protocol_name(five_tuple.protocol), "src": address(five_tuple.src), "dst": address(five_tuple.dst),
    }  # fmt: skip
    return found if five_tuple.sport is None else {**found, "sport": five_tuple.sport, "dport": five_tuple.dport}


def words(facts: Mapping[str, Any]) -> str:
    """Protocol and name: `tls api.example.org`; the protocol alone if no name is known, an empty text without a protocol."""
    protocol = facts.get("protocol")
    if not protocol:
        return ""
    return f"{protocol} {headline(facts)}".rstrip()


def headline(facts: Mapping[str, Any]) -> str:
    """The fact that names a flow in one word, as text; an empty text where none is known."""
    return next((str(_text(facts[key])) for key in HEADLINES if facts.get(key)), "")


def who(facts: Mapping[str, Any]) -> str:
    """The owner: the container, else the unit; an empty text where neither is known."""
    for kind in ("container", "unit"):
        if name := facts.get(kind):
            return f"{kind} {name}"
    return ""


def _text(value: Any) -> Any:
    return " ".join(map(str, value)) if isinstance(value, tuple) else value
