"""MQTT: the CONNECT packet (MQTT 3.1.1, OASIS 2014, 3.1; MQTT 5.0, OASIS 2019, 3.1). Steps: a fixed number."""

from __future__ import annotations

from typing import Any, Final

from nfq_agent.protocols import MORE, NO, Found, Protocol, Result, text

_CONNECT: Final = 0x10
# Protocol name with its length, level, and its usual name.
_NAMES: Final = {b"\0\4MQTT\4": "3.1.1", b"\0\4MQTT\5": "5.0", b"\0\6MQIsdp\3": "3.1"}
_LONGEST: Final = 9


def parse(client: bytes, server: bytes) -> Result:
    """mqtt_version and mqtt_client_id (empty where the server is to choose one)."""
    if not client:
        return MORE
    if client[0] != _CONNECT:
        return NO
    got = _variable(client, 1)
    if got is None:
        return MORE if len(client) < 5 else NO
    size, at = got
    end = at + size
    head = client[at : min(end, at + _LONGEST)]
    name = next((each for each in _NAMES if head.startswith(each)), None)
    if name is None:
        return MORE if len(client) < end and any(each.startswith(head) for each in _NAMES) else NO
    version = _NAMES[name]
    facts: dict[str, Any] = {"protocol": "mqtt", "mqtt_version": version}
    at += len(name) + 3
    if version == "5.0":
        # Properties come before the client identifier (5.0, 3.1.2.11).
        got = _variable(client, at)
        if got is None:
            return Found(facts, decided=len(client) >= min(end, at + 4))
        at = got[0] + got[1]
    stop = at + 2 + int.from_bytes(client[at : at + 2], "big")
    if stop > end or at + 2 > end:
        return NO
    if len(client) < at + 2 or len(client) < stop:
        return Found(facts, decided=False)
    facts["mqtt_client_id"] = text(client[at + 2 : stop])
    return Found(facts)


def _variable(data: bytes, at: int) -> tuple[int, int] | None:
    """A variable byte integer (5.0, 1.5.5): its value and the place behind it; None if it does not end in four bytes."""
    value = 0
    for number, byte in enumerate(data[at : at + 4]):
        value |= (byte & 0x7F) << 7 * number
        if byte < 0x80:
            return value, at + number + 1
    return None


PROTOCOL: Final = Protocol("mqtt", facts=("mqtt_version", "mqtt_client_id"), headline="mqtt_client_id", parse=parse)
