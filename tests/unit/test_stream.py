"""The stream without sockets: scripts of events and what comes of them."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from streams import REQUEST, RESPONSE, Said, element, sent, stream

import nfq_agent
from nfq_agent.elements import STREAM_ELEMENTS, ElementError, stream_element
from nfq_agent.stream import (
    CLOSE,
    DROP,
    Answer,
    Close,
    Connection,
    Done,
    End,
    Failed,
    Later,
    Output,
    Part,
    Send,
    StreamElement,
    Way,
)


class Scripted(StreamElement):
    """Answers what it was told to, in turn; notes what it saw."""

    def __init__(self, *answers: Answer | Exception, name: str = "scripted", kept: bytes = b"") -> None:
        super().__init__(name, self.Options(), Said())
        self.answers = list(answers)
        self.saw: list[tuple[Way, bytes]] = []
        self.kept = kept

    def request(self, data: bytes, connection: Connection) -> Answer:
        self.saw.append((REQUEST, data))
        answer = self.answers.pop(0) if self.answers else None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def response(self, data: bytes, connection: Connection) -> Answer:
        answer = self.request(data, connection)
        self.saw[-1] = (RESPONSE, data)
        return answer

    def rest(self, way: Way, connection: Connection) -> bytes:
        kept, self.kept = self.kept, b""
        return kept


class Appends(StreamElement):
    def __init__(self, letter: bytes) -> None:
        super().__init__(letter.decode(), self.Options(), Said())
        self.letter = letter

    def request(self, data: bytes, connection: Connection) -> Answer:
        return data + self.letter

    response = request


class TestOrder:
    def test_requests_go_forward_and_responses_in_reverse(self) -> None:
        it = stream(Appends(b"a"), Appends(b"b"))
        assert it.received(REQUEST, b"-", 100) == [Send(REQUEST, b"-ab")]
        assert it.received(RESPONSE, b"-", 100) == [Send(RESPONSE, b"-ba")]

    def test_an_element_sees_what_the_one_before_left(self) -> None:
        behind = Scripted()
        it = stream(Scripted(b"other"), behind)
        assert it.received(REQUEST, b"one", 100) == [Send(REQUEST, b"other")]
        assert behind.saw == [(REQUEST, b"other")]

    def test_larger_reads_are_shown_in_chunks(self) -> None:
        eyes = Scripted()
        it = stream(eyes, chunk=4)
        assert sent(it.received(REQUEST, b"0123456789", 100), REQUEST) == b"0123456789"
        assert [data for _, data in eyes.saw] == [b"0123", b"4567", b"89"]

    def test_an_element_may_want_smaller_pieces_than_the_chunk(self) -> None:
        eyes, small = Scripted(), Scripted()
        small.most = 3
        it = stream(eyes, small, chunk=4)
        assert sent(it.received(REQUEST, b"0123456789", 100), REQUEST) == b"0123456789"
        assert [data for _, data in small.saw] == [b"012", b"345", b"678", b"9"]


class TestAnswers:
    def test_none_passes_as_it_is(self) -> None:
        assert stream(Scripted(None)).received(REQUEST, b"x", 100) == [Send(REQUEST, b"x")]

    @pytest.mark.parametrize("answer", [DROP, b""])
    def test_dropped_bytes_go_no_further(self, answer: Answer) -> None:
        behind = Scripted()
        it = stream(Scripted(answer), behind)
        assert it.received(REQUEST, b"x", 100) == []
        assert it.received(REQUEST, b"y", 100) == [Send(REQUEST, b"y")]
        assert behind.saw == [(REQUEST, b"y")]

    def test_accept_passes_as_it_is(self) -> None:
        assert stream(Scripted(nfq_agent.ACCEPT)).received(REQUEST, b"x", 100) == [Send(REQUEST, b"x")]

    @pytest.mark.parametrize("on_error", ["pass", "drop"])
    def test_drop_is_the_one_of_the_package(self, on_error: Literal["pass", "drop"]) -> None:
        assert nfq_agent.DROP is DROP
        assert stream(Scripted(nfq_agent.DROP), on_error=on_error).received(REQUEST, b"x", 100) == []

    @pytest.mark.parametrize("answer", [nfq_agent.REPEAT, nfq_agent.Verdict(nfq_agent.Action.DROP, mark=1)])
    def test_another_verdict_is_an_error(self, answer: Answer) -> None:
        failed, passed = stream(Scripted(answer)).received(REQUEST, b"x", 100)
        assert isinstance(failed, Failed)
        assert "allowed: None, bytes, ACCEPT, DROP, CLOSE" in str(failed.error)
        assert passed == Send(REQUEST, b"x")

    def test_close_ends_everything(self) -> None:
        it = stream(Scripted(None, CLOSE, name="guard"))
        assert it.received(REQUEST, b"x", 100) == [Send(REQUEST, b"x")]
        assert it.received(REQUEST, b"y", 100) == [Close("guard")]
        assert it.received(RESPONSE, b"z", 100) == []
        assert it.connection.reason == "closed by guard"

    def test_done_is_not_asked_again_and_the_way_is_raw(self) -> None:
        eyes = Scripted(None, Done())
        it = stream(eyes)
        it.received(REQUEST, b"1", 100)
        assert not it.raw(REQUEST)
        assert it.received(REQUEST, b"2", 100) == [Send(REQUEST, b"2")]
        assert it.raw(REQUEST)
        assert not it.raw(RESPONSE)
        assert it.received(REQUEST, b"3", 100) == [Send(REQUEST, b"3")]
        assert len(eyes.saw) == 2

    def test_done_with_bytes_passes_those(self) -> None:
        assert stream(Scripted(Done(b"all"))).received(REQUEST, b"x", 100) == [Send(REQUEST, b"all")]

    def test_a_chain_that_overrides_nothing_is_raw_at_once(self) -> None:
        it = stream(element("stream-log"))
        assert it.raw(REQUEST)
        assert it.raw(RESPONSE)

    def test_bytearrays_are_bytes(self) -> None:
        assert stream(Scripted(bytearray(b"y"))).received(REQUEST, b"x", 100) == [Send(REQUEST, b"y")]  # type: ignore[arg-type]  # what authors do


class TestErrors:
    def test_passed_as_it_came(self) -> None:
        fault = KeyError("k")
        behind = Scripted()
        out = stream(Scripted(fault, name="bad"), behind).received(REQUEST, b"x", 100)
        assert out == [Failed("bad", fault), Send(REQUEST, b"x")]
        assert behind.saw == [(REQUEST, b"x")]

    def test_dropped(self) -> None:
        fault = KeyError("k")
        it = stream(Scripted(fault, name="bad"), on_error="drop")
        assert it.received(REQUEST, b"x", 100) == [Failed("bad", fault)]
        assert it.received(REQUEST, b"y", 100) == [Send(REQUEST, b"y")]

    def test_an_answer_of_another_kind_is_an_error(self) -> None:
        failed, send = stream(Scripted("text")).received(REQUEST, b"x", 100)  # type: ignore[arg-type]  # the point
        assert isinstance(failed, Failed)
        assert "str" in str(failed.error)
        assert send == Send(REQUEST, b"x")

    def test_in_closed_too(self) -> None:
        class Bad(StreamElement):
            def closed(self, connection: Connection) -> None:
                raise ValueError("late")

        (failed,) = stream(Bad("bad", None, Said())).finished(101)
        assert isinstance(failed, Failed)


class TestEnds:
    def test_each_way_ends_by_itself(self) -> None:
        it = stream(Scripted())
        assert it.ended(REQUEST, 100) == [End(REQUEST)]
        assert it.received(RESPONSE, b"still", 100) == [Send(RESPONSE, b"still")]
        assert it.ended(RESPONSE, 100) == [End(RESPONSE)]

    def test_what_was_kept_comes_before_the_end(self) -> None:
        it = stream(Scripted(b"", kept=b"kept"), Appends(b"!"))
        assert it.received(REQUEST, b"kept", 100) == []
        assert it.ended(REQUEST, 100) == [Send(REQUEST, b"kept!"), End(REQUEST)]

    def test_an_end_is_said_once(self) -> None:
        it = stream(Scripted())
        it.ended(REQUEST, 100)
        assert it.ended(REQUEST, 100) == []


class TestLater:
    def test_waits_for_its_time(self) -> None:
        it = stream(Scripted(Later(2)))
        assert it.received(REQUEST, b"x", 100) == []
        assert it.due == 102
        assert it.held_bytes == [1, 0]
        assert it.woken(101.9) == []
        assert it.woken(102) == [Send(REQUEST, b"x")]
        assert it.due is None
        assert it.held_bytes == [0, 0]

    def test_nothing_overtakes(self) -> None:
        it = stream(Scripted(Later(5), None, Later(1)))
        for data in (b"1", b"2", b"3"):
            assert it.received(REQUEST, data, 100) == []
        assert sent(it.woken(105), REQUEST) == b"123"

    def test_nothing_overtakes_further_on(self) -> None:
        it = stream(Scripted(None, Later(3)), Scripted(Later(5), None))
        it.received(REQUEST, b"1", 100)
        it.received(REQUEST, b"2", 100)
        # Woken late, the second is through the first stage and must still stay behind.
        assert sent(it.woken(110), REQUEST) == b"12"

    def test_the_end_waits_behind(self) -> None:
        it = stream(Scripted(Later(1)))
        it.received(REQUEST, b"x", 100)
        assert it.ended(REQUEST, 100) == []
        assert it.woken(101) == [Send(REQUEST, b"x"), End(REQUEST)]

    def test_not_raw_while_something_waits(self) -> None:
        it = stream(Scripted(Later(1), Done()))
        it.received(REQUEST, b"1", 100)
        it.received(REQUEST, b"2", 100)
        assert not it.raw(REQUEST)
        # No element is asked about it, and it must not overtake.
        assert it.received(REQUEST, b"3", 100) == []
        assert sent(it.woken(101), REQUEST) == b"123"
        assert it.raw(REQUEST)

    @given(
        st.lists(
            st.tuples(st.sampled_from([0.0, 0.5, 1.0, 7.0]), st.sampled_from([0.0, 0.25, 3.0]), st.floats(0, 2)), max_size=30
        )
    )
    def test_order_holds_for_any_delays(self, script: list[tuple[float, float, float]]) -> None:
        first = Scripted(*(Later(a) if a else None for a, _, _ in script))
        second = Scripted(*(Later(b) if b else None for _, b, _ in script))
        it = stream(first, second)
        now = 100.0
        out: list[Output] = []
        for number, (_, _, step) in enumerate(script):
            out += it.received(REQUEST, bytes([number]), now)
            now += step
        out += it.ended(REQUEST, now)
        while it.due is not None:
            now = max(now, it.due)
            out += it.woken(now)
        assert sent(out, REQUEST) == bytes(range(len(script)))
        assert out[-1] == End(REQUEST)


class TestPart:
    def test_the_rest_is_asked_for_in_time(self) -> None:
        it = stream(Scripted(Part(b"a", 1), kept=b"b"), Appends(b"!"))
        assert it.received(REQUEST, b"ab", 100) == [Send(REQUEST, b"a!")]
        assert it.due == 101
        assert it.woken(101) == [Send(REQUEST, b"b!")]
        assert it.due is None

    def test_not_if_more_comes(self) -> None:
        it = stream(Scripted(Part(b"", 1), None, kept=b"b"))
        it.received(REQUEST, b"b", 100)
        it.received(REQUEST, b"c", 100.5)
        assert it.due is None
        assert it.woken(102) == []


class TestOpened:
    def test_an_element_can_refuse(self) -> None:
        class Guard(StreamElement):
            def opened(self, connection: Connection) -> Any:
                return CLOSE

        it = stream(Guard("guard", None, Said()))
        assert it.opened() == [Close("guard")]
        assert it.closed


class TestTable:
    @pytest.mark.parametrize("kind", STREAM_ELEMENTS)
    def test_every_built_in_is_there(self, kind: str) -> None:
        assert issubclass(stream_element(kind), StreamElement)

    def test_a_packet_element_is_none(self) -> None:
        with pytest.raises(ElementError, match="not a stream element"):
            stream_element("nfq_agent.elements.log:FiveTupleLog")
