"""The findings of `doctor` about queues, workers and processors, and what sysfs shows of them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nfq_agent.cli.doctor_cores import core_findings, found
from nfq_agent.config.models import Config
from nfq_agent.host.cores import Card, cards, node_processors, processors

RULE = {"rules": {"app": {"queue": "main", "tcp_ports": [80]}}}


def told(queue: dict[str, Any], count: int, there: tuple[Card, ...] = (), lost: int | None = 0) -> list[str]:
    config = Config.model_validate({"queue": {"main": queue}, **RULE})
    full = SimpleNamespace(name="main", kernel_dropped=lost, user_dropped=0, uninspected="unknown")
    running: Any = SimpleNamespace(queues=[full])
    nodes = {0: frozenset(range(count)), 1: frozenset(range(count, 2 * count))}
    return [f"{each.level}: {each.text}" for each in found(config, running, nodes[0], there, lambda node: nodes[node])]


@pytest.mark.parametrize(
    ("queue", "count", "there", "lost", "expected"),
    [
        ({"num": 1}, 1, (), 9, ["good: the queues suit 1 processors"]),
        ({"num": 1}, 64, (), 0, ["good: the queues suit 64 processors"]),
        ({"num": 1}, 64, (), None, ["good: the queues suit 64 processors"]),
        (
            {"num": 1}, 16, (), 9,
            ["warning: [queue.main] had no room for 9 packets; one worker serves it, and there are 16 processors"],
        ),
        ({"balance": "1:3"}, 2, (), 9, ["warning: [queue.main] has 3 workers, and there are 2 processors: they take turns"]),
        ({"balance": "1:4"}, 8, (Card("eth0", 1, None),), 0, ["good: the queues suit 8 processors"]),
        (
            {"balance": "1:4", "cpu_fanout": True}, 8, (Card("eth0", 1, 0), Card("eth1", 4, 0)), 0,
            ["warning: packets of eth0 come in on 1 processors at most: 3 of the 4 workers of [queue.main] get none of them"],
        ),
        (
            {"num": 1}, 8, (Card("eth0", 8, 1),), 0,
            ["warning: eth0 is on NUMA node 1, and the agent may use no processor of it"],
        ),
    ],
)  # fmt: skip
def test_settings_that_give_less_than_the_host_could(
    queue: dict[str, Any], count: int, there: tuple[Card, ...], lost: int | None, expected: list[str]
) -> None:
    assert told(queue, count, there, lost) == expected


def test_this_host() -> None:
    assert processors()
    config = Config.model_validate({"queue": {"main": {"num": 1}}, **RULE})
    assert {each.subject for each in core_findings(config, None)} == {"processors"}
    assert list(core_findings(Config(), None)) == []


def test_what_sysfs_tells_of_a_card(tmp_path: Path) -> None:
    for name, masks, node in (("eth0", ["00", "00"], "1"), ("eth1", ["ff,0000000f"], "-1"), ("eth2", [], "0")):
        (tmp_path / name / "device").mkdir(parents=True)
        (tmp_path / name / "device" / "numa_node").write_text(node)
        for number, mask in enumerate(masks):
            (queue := tmp_path / name / "queues" / f"rx-{number}").mkdir(parents=True)
            (queue / "rps_cpus").write_text(f"{mask}\n")
    (tmp_path / "lo" / "queues" / "rx-0").mkdir(parents=True)
    (tmp_path / "eth3" / "device").mkdir(parents=True)
    (tmp_path / "eth3" / "queues" / "rx-0").mkdir(parents=True)
    assert cards(tmp_path) == [Card("eth0", 2, 1), Card("eth1", 12, None), Card("eth3", 1, None)]
    (tmp_path / "node1").mkdir()
    (tmp_path / "node1" / "cpulist").write_text("0-2,8\n")
    assert node_processors(1, tmp_path) == {0, 1, 2, 8}
    assert node_processors(2, tmp_path) == frozenset()
