"""What looks like noise, and what does not."""

from __future__ import annotations

import hashlib
import zlib

import pytest
from openings import DATAGRAMS, OPENINGS

from nfq_agent.noise import looks_encrypted
from nfq_agent.testing import Bench, tcp, udp


def noise(size: int, seed: int = 0) -> bytes:
    """Bytes as a cipher gives them, the same on each run."""
    return b"".join(hashlib.sha256(b"%d %d" % (seed, number)).digest() for number in range(size // 32 + 1))[:size]


def test_nearly_all_noise_is_told() -> None:
    for size in (64, 200, 1400):
        assert sum(looks_encrypted(noise(size, seed)) for seed in range(500)) > 480


@pytest.mark.parametrize(
    "data",
    [b"", noise(63), bytes(200), b"hello world, " * 20, b"\x00\x01\x02\x03" * 50, noise(40) + bytes(100), b"HELLO!" + noise(90),
     zlib.compress(b"x" * 9000), "äöü".encode() * 40],
)  # fmt: skip
def test_what_is_no_noise(data: bytes) -> None:
    assert not looks_encrypted(data)


def test_no_opening_that_is_known_looks_like_noise() -> None:
    for name, (client, _, _) in OPENINGS.items():
        assert not looks_encrypted(client), name
    for name, (data, _) in DATAGRAMS.items():
        assert not looks_encrypted(data), name


def test_a_rule_on_it() -> None:
    bench = Bench("policy", before=[("dpi", {})], default="accept", rule=[{"action": "drop", "encrypted": True}])
    bench.decide(tcp("192.0.2.1:4000", "192.0.2.2:80", flags="S", seq=1))
    bench.assert_dropped(tcp("192.0.2.1:4000", "192.0.2.2:80", noise(200), seq=2))
    bench.assert_dropped(udp("192.0.2.1:4000", "192.0.2.2:80", noise(200)))
    bench.assert_accepted(udp("192.0.2.1:4001", "192.0.2.2:80", b"hello" * 20))
