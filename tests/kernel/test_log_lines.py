"""Each line that an agent writes with LOG_FORMAT=json fits the schema, wherever packets are taken, and whatever happens to them.

Which values each field of a record can have is in the schema; the test sees all of them come from running agents.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from agent import Agent, until
from log_lines import lines
from log_traffic import BROKEN, CONFIG, PEERS, send_all, serve
from namespace import Namespace


class Seen:
    """The lines of an agent: each is checked. values: of each field of the records and the drops, by event."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    @property
    def lines(self) -> list[dict[str, Any]]:
        return lines(self._agent.log)

    @property
    def values(self) -> dict[str, set[Any]]:
        found = defaultdict(set)
        for line in self.lines:
            if line.get("event") in ("begin", "change", "end", "drop"):
                for name, value in line.items():
                    found[name].add(value)
        return found

    def where(self, **fields: Any) -> list[dict[str, Any]]:
        return [line for line in self.lines if fields.items() <= line.items()]


def test_every_line_fits_the_schema(routed: tuple[Namespace, Namespace, Namespace], tmp_path: Path) -> None:
    client, router, server = routed
    serve(server)
    folder = tmp_path / "elements"
    folder.mkdir()
    (folder / "broken_element.py").write_text(BROKEN)
    agent = Agent(router, tmp_path, CONFIG, LOG_FORMAT="json").ready()
    seen = Seen(agent)
    send_all(client, router)
    places: list[dict[str, Any]] = [{"queue": 7}, {"tap": "web"}, {"inline": "web"}]
    for place in places:
        for address in PEERS.values():
            for end in ("closed", "reset"):
                until(lambda where={**place, "dst": address, "end": end}: seen.where(**where), f"{place}, {address}, {end}")  # type: ignore[misc]  # bound early
    until(lambda: seen.where(proxy="web", event="closed"), "the proxy has carried a connection")
    until(lambda: seen.where(queue=10, event="drop", would="drop", src="fd01::2"), "monitor mode")
    assert agent.stop() == 0
    values = seen.values
    assert values["event"] == {"begin", "change", "end", "drop"}
    assert values["verdict"] == {"accept", "drop", "reject"}
    assert values["hook"] == {"PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"}
    assert values["proto"] == {"tcp", "udp", "icmp", "icmpv6"}
    # `replaced` and `idle` are shown by tests/unit/test_elements_record.py, by its own clock.
    assert values["end"] == {"closed", "reset", "stopped"}
    assert values["element"] == {"allow", "ports"}
    assert values["rule"] == {"default", "undecided", "rule 1", "rule 2 (refuse)", "rule 3"}
    assert {each["verdict"] for each in seen.where(tap="web", would="drop")} == {"accept"}
    assert {each["verdict"] for each in seen.where(queue=7, event="begin", http_host="c.refused.test")} == {"reject"}
    # An element that fails, and one that writes a line for each packet.
    assert {each["proto"] for each in seen.where(queue=9, verdict="drop", outdev="eth2")} == {"udp"}
    assert {each["indev"] for each in seen.where(queue=11, hook="PREROUTING", length=60)} >= {"eth1"}
