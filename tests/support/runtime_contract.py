"""What the agent rests on in the socket of a runtime: kept by the fake of the unit tests, by Docker and by Podman."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Mapping
from typing import Any

from nfq_agent.host.container_runtime import RuntimeSocket

_QUESTION = b"GET /containers/json HTTP/1.0\r\nHost: localhost\r\n\r\n"


def answer(path: str) -> list[dict[str, Any]]:
    """The containers that the runtime at a socket lists."""
    with socket.socket(socket.AF_UNIX) as asked:
        asked.settimeout(90)
        asked.connect(path)
        asked.sendall(_QUESTION)
        come = b"".join(iter(lambda: asked.recv(1 << 16), b""))
    head, _, body = come.partition(b"\r\n\r\n")
    assert re.match(rb"HTTP/1\.[01] 200 ", head), head
    if b"chunked" in head.lower():
        body = b"".join(re.split(rb"\r?\n?[0-9a-f]+\r\n", body))
    listed: list[dict[str, Any]] = json.loads(body)
    return listed


def keeps_the_contract(path: str, expected: Mapping[str, str]) -> None:
    """Each running container has an id, names and labels, and `RuntimeSocket` reads those names. expected: by id."""
    for each in answer(path):
        assert re.fullmatch("[0-9a-f]{64}", each["Id"])
        assert each["Names"]
        assert all(re.fullmatch("/?[^/]+", name) for name in each["Names"])
        labels = each.get("Labels") or {}
        assert all(isinstance(value, str) for value in labels.values())
    said: list[str] = []
    runtime = RuntimeSocket(path, said.append)
    # An answer that takes its time is read by later calls.
    until = time.monotonic() + 90
    while not (names := runtime.names()) and time.monotonic() < until:
        time.sleep(0.05)
    assert names == {number[:12]: name for number, name in expected.items()}
    assert said == []
