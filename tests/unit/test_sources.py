"""Connections by source."""

from __future__ import annotations

from nfq_agent.proxy.sources import Sources


def test_no_more_than_the_limit_until_one_has_ended() -> None:
    it = Sources(2)
    for _ in range(2):
        assert it.refuses("192.0.2.1") == ""
        it.opened("192.0.2.1")
    assert it.refuses("192.0.2.1") == "its source has 2 connections already (max_per_source)"
    assert it.refuses("192.0.2.2") == ""
    it.closed("192.0.2.1")
    assert it.refuses("192.0.2.1") == ""


def test_a_network_of_ipv6_is_one_source() -> None:
    it = Sources(1)
    it.opened("2001:db8:0:1::1")
    assert it.refuses("2001:db8:0:1:ffff::2")
    assert not it.refuses("2001:db8:0:2::1")
    it.opened("fe80::1%eth0")
    assert it.refuses("fe80::2%eth1")


def test_what_has_ended_is_forgotten() -> None:
    it = Sources(5)
    for number in range(1000):
        it.opened(f"192.0.2.{number % 250}")
    for number in range(1000):
        it.closed(f"192.0.2.{number % 250}")
    assert len(it) == 0


def test_without_a_limit_nothing_is_counted() -> None:
    it = Sources(0)
    it.opened("192.0.2.1")
    assert (len(it), it.refuses("192.0.2.1")) == (0, "")
    it.closed("192.0.2.1")
