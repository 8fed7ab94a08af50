"""The stream elements that break a connection on purpose: toxiproxy's time-out, slow close, limit, reset and slicer."""

from __future__ import annotations

import socket

import pytest
from pydantic import ValidationError

from nfq_agent import Way
from nfq_agent.connection import Connection
from nfq_agent.elements.slicer import Slicer, SlicerOptions
from nfq_agent.proxy.relay import Pair
from nfq_agent.stream import Stream, StreamChain
from nfq_agent.testing import StreamBench


class TestTimeout:
    def test_no_byte_passes_and_it_ends_in_time(self) -> None:
        bench = StreamBench("timeout", after="2s")
        bench.assert_dropped(bench.request(b"x"))
        bench.assert_dropped(bench.wait(1.5))
        bench.assert_dropped(bench.response(b"y"))
        bench.assert_closed(bench.wait(0.5))

    def test_a_client_that_says_nothing_is_ended_too(self) -> None:
        bench = StreamBench("timeout", after="2s")
        bench.assert_dropped(bench.wait(1.9))
        bench.assert_closed(bench.wait(0.1))

    def test_the_end_of_a_half_waits_for_it(self) -> None:
        bench = StreamBench("timeout", after="2s", way="request")
        assert bench.end(Way.REQUEST).ended == set()
        assert bench.wait(2.0).ended == {Way.REQUEST}

    def test_for_ever(self) -> None:
        bench = StreamBench("timeout")
        bench.assert_dropped(bench.request(b"x"))
        bench.assert_dropped(bench.wait(1e6))

    def test_one_way_only(self) -> None:
        bench = StreamBench("timeout", way="response")
        bench.assert_passed(bench.request(b"x"), b"x")
        bench.assert_dropped(bench.response(b"y"))


class TestSlowClose:
    def test_bytes_are_not_held_and_the_end_is(self) -> None:
        bench = StreamBench("slow-close", by="3s")
        bench.assert_passed(bench.request(b"x"), b"x")
        assert bench.end(Way.REQUEST).ended == set()
        assert bench.wait(2.9).ended == set()
        assert bench.wait(0.1).ended == {Way.REQUEST}


class TestLimitBytes:
    def test_exactly_so_many_pass(self) -> None:
        bench = StreamBench("limit-bytes", bytes=5)
        bench.assert_passed(bench.request(b"abc"), b"abc")
        bench.assert_passed(bench.request(b"defg"), b"de")
        bench.assert_closed(bench.wait(0.05))

    def test_what_comes_after_is_not_carried(self) -> None:
        bench = StreamBench("limit-bytes", bytes=3, way="response")
        bench.assert_passed(bench.request(b"as much as it likes"), b"as much as it likes")
        bench.assert_passed(bench.response(b"abc"), b"abc", Way.RESPONSE)
        bench.assert_closed(bench.response(b"d"))

    def test_fewer_end_in_order(self) -> None:
        bench = StreamBench("limit-bytes", bytes=5)
        bench.request(b"abcd")
        assert bench.end(Way.REQUEST).ended == {Way.REQUEST}


class TestResetAfter:
    def test_bytes_pass_until_then(self) -> None:
        bench = StreamBench("reset-after", after="1s")
        bench.assert_passed(bench.request(b"x"), b"x")
        bench.wait(0.9)
        bench.assert_passed(bench.response(b"y"), b"y", Way.RESPONSE)
        bench.assert_closed(bench.wait(0.1))

    def test_a_silent_one_too(self) -> None:
        bench = StreamBench("reset-after", after="1s")
        bench.assert_closed(bench.wait(1.0))

    def test_at_once(self) -> None:
        bench = StreamBench("reset-after")
        bench.assert_closed(bench.opened)


class TestSlicer:
    def test_the_pieces_in_their_order_and_time(self) -> None:
        bench = StreamBench("slicer", size=3, delay="10ms")
        bench.assert_passed(bench.request(b"abcdefgh"), b"abc")
        bench.assert_passed(bench.wait(0.0101), b"def")
        bench.assert_passed(bench.wait(0.0101), b"gh")
        bench.assert_passed(bench.wait(1.0), b"")

    def test_nothing_is_lost_at_the_end(self) -> None:
        bench = StreamBench("slicer", size=1, delay="1s")
        first = bench.request(b"abc").request
        bench.end(Way.REQUEST)
        passed = bench.wait(5.0)
        assert first + passed.request == b"abc"
        assert passed.ended == {Way.REQUEST}

    def test_without_a_delay_the_pieces_would_be_joined(self) -> None:
        with pytest.raises(ValidationError):
            StreamBench("slicer", delay="0")

    def test_a_late_proxy_sends_each_piece_by_itself(self) -> None:
        """To a socket that keeps the boundaries of what is sent (unix(7), SOCK_SEQPACKET)."""
        element = Slicer("slicer", SlicerOptions.model_validate({"size": 3, "delay": "10ms"}), lambda *_, **__: None)
        connection = Connection("1", ("192.0.2.1", 1), None, ("192.0.2.2", 2), 0.0, 0.0)
        client, _client = socket.socketpair()
        upstream, server = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        server.setblocking(False)
        with client, _client, upstream, server:
            stream = Stream(connection, StreamChain([element]))
            pair = Pair(connection, client, upstream, stream, [0, 0], 1 << 16)
            pair.apply(stream.received(Way.REQUEST, b"abcdefgh", 0.0))
            pair.woken(memoryview(bytearray(1 << 16)), 5.0)
            assert [server.recv(100) for _ in range(3)] == [b"abc", b"def", b"gh"]
