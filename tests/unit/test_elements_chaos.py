"""The chaos element without a kernel: odds, seeds, copies, delays, and what is refused."""

from __future__ import annotations

import random
from typing import Any

import pytest
from pydantic import ValidationError

from nfq_agent.checksum import mend
from nfq_agent.element import Needs
from nfq_agent.elements.chaos import Chaos, ChaosOptions
from nfq_agent.testing import Bench, icmp, tcp, udp
from nfq_agent.verdict import ACCEPT, DROP, Action, Verdict

HERE, THERE = "192.0.2.1:40000", "192.0.2.2:80"


def verdicts(count: int = 2000, **options: Any) -> list[Verdict]:
    bench = Bench("chaos", **{"seed": 1, **options})
    made = []
    for number in range(count):
        bench.now += 0.001
        made.append(bench.decide(udp(HERE, THERE, number.to_bytes(4, "big"))))
    return made


def test_the_odds_are_kept_and_a_seed_repeats_them() -> None:
    first = verdicts(drop=0.1)
    assert 150 < first.count(DROP) < 250
    assert first.count(ACCEPT) == 2000 - first.count(DROP)
    assert verdicts(drop=0.1) == first
    assert verdicts(drop=0.1, seed=2) != first
    assert set(verdicts()) == {ACCEPT}
    assert set(verdicts(drop=1.0)) == {DROP}


@pytest.mark.parametrize("checksum", ["keep", "mend"])
def test_one_bit_of_the_data_is_turned(checksum: str) -> None:
    bench = Bench("chaos", corrupt=1.0, checksum=checksum, seed=3)
    for packet in (tcp(HERE, THERE, b"data" * 9), udp("[2001:db8::1]:1", "[2001:db8::2]:2", b"data")):
        verdict = bench.decide(packet)
        payload = verdict.payload
        assert payload is not None
        assert verdict.exact == (checksum == "keep")
        assert packet.headers.data is not None
        head, tail = packet.payload[: packet.headers.data], packet.payload[packet.headers.data :]
        assert payload[: len(head)] == head
        turned = int.from_bytes(payload[len(head) :], "big") ^ int.from_bytes(tail, "big")
        assert turned.bit_count() == 1
        assert mend(payload) != payload


def test_what_carries_no_data_is_not_corrupted() -> None:
    bench = Bench("chaos", corrupt=1.0)
    assert bench.decide(tcp(HERE, THERE)) is ACCEPT
    assert bench.decide(icmp("192.0.2.1", "192.0.2.2", b"ping")) is ACCEPT


def test_a_copy_is_not_copied_again() -> None:
    bench = Bench("chaos", duplicate=1.0)
    packet = udp(HERE, THERE, b"one")
    assert bench.decide(packet).inject == (packet.payload,)
    # The kernel gives an IPv4 packet from a raw socket another identification.
    seen = bytearray(packet.payload)
    seen[4:6] = b"\x12\x34"
    assert bench.decide(type(packet)(mend(bytes(seen)))) is ACCEPT
    assert bench.decide(udp(HERE, THERE, b"two")).inject


def test_delays_lie_about_the_middle_and_so_many_wait_at_most() -> None:
    made = verdicts(delay=1.0, delay_for="100ms", jitter="20ms", waiting=50)
    delays = [verdict.delay for verdict in made if verdict.delay]
    assert 0.08 <= min(delays) < 0.085
    assert 0.115 < max(delays) <= 0.12
    assert all(verdict.action is Action.ACCEPT for verdict in made)
    # 50 places, each taken for 0.1 s: half of the 1,000 packets a second.
    assert 900 < len(delays) < 1100
    assert len([v for v in verdicts(delay=1.0, delay_for="100ms", waiting=1000) if v.delay]) == 2000


def test_it_leaves_what_others_drop_and_keeps_flows_from_being_offloaded() -> None:
    drops = ("policy", {"default": "drop"})
    assert Bench("chaos", before=[drops], delay=1.0).decide(tcp(HERE, THERE)) is DROP
    accepts = ("policy", {"default": "accept"})
    chaos = ("chaos", {"drop": 0.0})
    assert Bench("offload", before=[accepts, chaos], mark="0x4e/0xff").decide(tcp(HERE, THERE)) is ACCEPT


def test_it_needs_what_it_does() -> None:
    assert Chaos.needs_of(ChaosOptions(drop=0.5, delay=0.5)) is Needs.METADATA
    assert Chaos.needs_of(ChaosOptions(corrupt=0.5)) is Needs.PAYLOAD
    assert not Chaos.rewrites_of(ChaosOptions(drop=0.5))
    assert Chaos.rewrites_of(ChaosOptions(corrupt=0.5))
    assert Chaos.injects_of(ChaosOptions(duplicate=0.5))


@pytest.mark.parametrize("options", [{"drop": 1.5}, {"delay_for": "5s"}, {"delay_for": "1s", "jitter": "2s"}, {"delay_for": 3}])
def test_what_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ChaosOptions(**options)


@pytest.mark.parametrize("odds", [0.1, 0.001])
def test_a_seed_makes_the_choices_of_one_throw_for_each_packet(odds: float) -> None:
    chance = random.Random(1).random
    assert verdicts(drop=odds) == [DROP if chance() < odds else ACCEPT for _ in range(2000)]


def test_what_a_delay_takes_of_the_dice_comes_before_the_next_throw() -> None:
    dice, expected = random.Random(1), []
    for _ in range(2000):
        dropped = dice.random() < 0.01
        late = not dropped and dice.random() < 0.01
        expected.append(DROP if dropped else Verdict(Action.ACCEPT, delay=0.1 + dice.uniform(-1, 1) * 0.02) if late else ACCEPT)
    assert verdicts(drop=0.01, delay=0.01, delay_for="100ms", jitter="20ms") == expected
