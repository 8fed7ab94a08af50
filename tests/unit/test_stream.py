"""The stream without sockets, and the elements without a proxy: scripts of events and what comes of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

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
    Stream,
    StreamChain,
    StreamElement,
    Way,
)

REQUEST, RESPONSE = Way.REQUEST, Way.RESPONSE


class Said(list[tuple[str, dict[str, Any]]]):
    """An `emit` that remembers."""

    def __call__(self, message: str, level: str = "info", **fields: Any) -> None:
        self.append((message, {"level": level, **fields}))


def connection() -> Connection:
    return Connection("c-1", ("192.0.2.7", 40000), ("192.0.2.1", 80), ("192.0.2.1", 80), 100.0, 100.0)


def element(kind: str, **options: Any) -> StreamElement:
    """A built-in by its name and the keys of its table."""
    cls = stream_element(kind)
    return cls(kind, cls.Options.model_validate(options), Said())


def stream(*elements: StreamElement, **options: Any) -> Stream:
    return Stream(connection(), StreamChain(elements), **options)


def sent(outputs: list[Output], way: Way) -> bytes:
    """What goes on one way, joined."""
    return b"".join(output.data for output in outputs if isinstance(output, Send) and output.way is way)


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
        assert sent(it.woken(101), REQUEST) == b"12"
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
        with pytest.raises(ElementError, match="no stream element"):
            stream_element("nfq_agent.elements.log:FiveTupleLog")


class TestReplace:
    @given(
        st.lists(st.sampled_from([b"a", b"ab", b"abc", b"b", b"c", b"aab", b"xyz"]), max_size=20),
        st.sampled_from(["ab", "aab", "abab", "a", "abcabc"]),
    )
    def test_borders_do_not_matter(self, chunks: list[bytes], find: str) -> None:
        it = stream(element("replace", find=find, **{"with": "<>"}))
        out: list[Output] = []
        for chunk in chunks:
            out += it.received(REQUEST, chunk, 100)
        out += it.ended(REQUEST, 100)
        assert sent(out, REQUEST) == b"".join(chunks).replace(find.encode(), b"<>")

    @given(st.lists(st.binary(min_size=1, max_size=7), max_size=20))
    def test_borders_do_not_matter_to_a_regex(self, chunks: list[bytes]) -> None:
        it = stream(element("replace", regex="[\\x00-\\x7f]{2}", window=2, **{"with": "<>"}))
        out: list[Output] = []
        for chunk in chunks:
            out += it.received(RESPONSE, chunk, 100)
        out += it.ended(RESPONSE, 100)
        assert sent(out, RESPONSE) == re.sub(b"[\x00-\x7f]{2}", b"<>", b"".join(chunks))

    def test_groups(self) -> None:
        it = stream(element("replace", regex="user=(\\w+)", **{"with": "USER=\\1!"}))
        out = it.received(REQUEST, b"x user=bob y", 100) + it.ended(REQUEST, 100)
        assert sent(out, REQUEST) == b"x USER=bob! y"

    def test_hex(self) -> None:
        it = stream(element("replace", find="00ff", hex=True, **{"with": "FF00aa"}))
        out = it.received(REQUEST, b"\0", 100) + it.received(REQUEST, b"\xff", 100) + it.ended(REQUEST, 100)
        assert sent(out, REQUEST) == b"\xff\0\xaa"

    def test_the_last_letter_of_a_question_does_not_wait_for_ever(self) -> None:
        it = stream(element("replace", find="foo", **{"with": "bar"}))
        assert sent(it.received(REQUEST, b"is it f", 100), REQUEST) == b"is it "
        assert it.due is not None
        assert sent(it.woken(it.due), REQUEST) == b"f"

    def test_one_way(self) -> None:
        it = stream(element("replace", find="a", way="response", **{"with": "b"}))
        assert it.raw(REQUEST)
        assert it.received(RESPONSE, b"a", 100) == [Send(RESPONSE, b"b")]

    @pytest.mark.parametrize(
        "options",
        [
            {"with": "x"},
            {"find": "a", "regex": "a", "with": "x"},
            {"regex": "(", "with": "x"},
            {"regex": "a*", "with": "x"},
            {"regex": "a", "with": "\\1"},
            {"find": "0g", "with": "", "hex": True},
            {"find": "", "with": "x"},
        ],
    )
    def test_refused_options(self, options: dict[str, Any]) -> None:
        with pytest.raises(ValidationError):
            element("replace", **options)


class TestLimit:
    def test_bytes_a_second(self) -> None:
        it = stream(element("limit", bytes_per_second=100))
        times = []
        for _ in range(5):
            it.received(REQUEST, b"x" * 50, 100)
        while it.due is not None:
            times.append(it.due)
            it.woken(it.due)
        assert times == pytest.approx([100.5, 101, 101.5, 102, 102.5])

    def test_burst(self) -> None:
        it = stream(element("limit", bytes_per_second=100, burst=100))
        assert sent(it.received(REQUEST, b"x" * 100, 100), REQUEST)
        assert it.received(REQUEST, b"x" * 50, 100) == []
        assert it.due == pytest.approx(100.5)

    def test_one_share_for_all(self) -> None:
        limit = element("limit", bytes_per_second=100, per="proxy")
        first, second = stream(limit), stream(limit)
        first.received(REQUEST, b"x" * 100, 100)
        second.received(REQUEST, b"x" * 100, 100)
        assert [first.due, second.due] == pytest.approx([101, 102])


class TestDelay:
    def test_by(self) -> None:
        it = stream(element("delay", by="200ms", way="response"))
        assert it.received(REQUEST, b"now", 100) == [Send(REQUEST, b"now")]
        assert it.received(RESPONSE, b"then", 100) == []
        assert it.due == pytest.approx(100.2)

    def test_jitter(self) -> None:
        it = stream(element("delay", by="1s", jitter="1s"))
        for _ in range(50):
            it.received(REQUEST, b"x", 100)
            assert it.due is not None
            assert 101 <= it.due <= 102
        assert sent(it.woken(102), REQUEST) == b"x" * 50


# A ClientHello for name.example.org, as OpenSSL sends it, is made in the end-to-end test; here one by hand.
def client_hello(name: bytes) -> bytes:
    entry = b"\0" + len(name).to_bytes(2, "big") + name
    names = len(entry).to_bytes(2, "big") + entry
    extension = b"\0\0" + len(names).to_bytes(2, "big") + names
    body = b"\x03\x03" + bytes(32) + b"\0" + b"\0\x02\x13\x01" + b"\x01\0" + len(extension).to_bytes(2, "big") + extension
    message = b"\x01" + len(body).to_bytes(3, "big") + body
    return b"\x16\x03\x01" + len(message).to_bytes(2, "big") + message


class TestGates:
    @pytest.mark.parametrize(
        ("kind", "opening"),
        [
            ("http-host", b"GET / HTTP/1.1\r\nHost: name.Example.org:8080\r\nAccept: */*\r\n\r\n"),
            ("sni", client_hello(b"name.example.org")),
        ],
    )
    class TestBoth:
        def test_allowed_byte_by_byte_and_then_raw(self, kind: str, opening: bytes) -> None:
            it = stream(element(kind, allow=["*.example.org"]))
            out: list[Output] = []
            for byte in opening:
                out += it.received(REQUEST, bytes([byte]), 100)
            assert sent(out, REQUEST) == opening
            assert it.raw(REQUEST)
            assert it.raw(RESPONSE)

        def test_denied_before_a_byte_passed(self, kind: str, opening: bytes) -> None:
            it = stream(element(kind, deny=["name.example.org"]))
            assert it.received(REQUEST, opening[:20], 100) == []
            assert it.received(REQUEST, opening[20:], 100) == [Close(kind)]

        def test_what_is_not_listed(self, kind: str, opening: bytes) -> None:
            assert stream(element(kind, allow=["example.org"])).received(REQUEST, opening, 100) == [Close(kind)]
            assert stream(element(kind, deny=["example.org"])).received(REQUEST, opening, 100) == [Send(REQUEST, opening)]

        def test_no_name(self, kind: str, opening: bytes) -> None:
            text = b"\0SSH-2.0-x\r\n"
            assert stream(element(kind, allow=["*"])).received(REQUEST, text, 100) == [Close(kind)]
            assert stream(element(kind, allow=["a"], unknown="allow")).received(REQUEST, text, 100) == [Send(REQUEST, text)]

        def test_an_end_before_the_name(self, kind: str, opening: bytes) -> None:
            for unknown, passed in (("allow", opening[:9]), ("deny", b"")):
                it = stream(element(kind, unknown=unknown))
                assert it.received(REQUEST, opening[:9], 100) == []
                assert sent(it.ended(REQUEST, 100), REQUEST) == passed

    def test_an_endless_head_is_not_kept(self) -> None:
        it = stream(element("http-host", unknown="deny"))
        out = it.received(REQUEST, b"GET / HTTP/1.1\r\n", 100)
        for _ in range(40):
            out += it.received(REQUEST, b"X: " + b"x" * 1000 + b"\r\n", 100)
        assert out == [Close("http-host")]

    @pytest.mark.parametrize(
        "opening",
        [
            b"GET / HTTP/1.2\r\nHost: bad.test\r\n\r\n", b"GET  / HTTP/1.1\r\nHost: bad.test\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost:\r\n bad.test\r\n\r\n", b"GET / HTTP/1.1\r\nHost: bad.test:80a\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: bad.test:x.good.test\r\n\r\n", b"GET / HTTP/1.1\r\nHost: bad.test:80@x.good.test\r\n\r\n",
            b"GET / HTTP/1.1\r\n" + b"X: 1\r\n" * 6000, client_hello(b"bad.test:x.good.test"),
        ],
    )  # fmt: skip
    def test_a_name_that_is_not_known_is_denied_by_either_list(self, opening: bytes) -> None:
        kind = "sni" if opening[0] == 22 else "http-host"
        for lists in ({"deny": ["*.bad.test"]}, {"allow": ["*.good.test"]}):
            assert stream(element(kind, **lists)).received(REQUEST, opening, 100) == [Close(kind)]
        passed = stream(element(kind, deny=["*.bad.test"], conflict="allow")).received(REQUEST, opening, 100)
        assert sent(passed, REQUEST) == opening

    def test_a_gate_that_lets_all_through_is_refused(self) -> None:
        with pytest.raises(ValidationError, match="nothing would be denied"):
            element("sni")

    @pytest.mark.parametrize("pattern", ["", "a.*.org", "*x", "**"])
    def test_patterns(self, pattern: str) -> None:
        with pytest.raises(ValidationError):
            element("sni", allow=[pattern])


class TestTap:
    def test_copies(self, tmp_path: Path) -> None:
        tap = element("tap", folder=str(tmp_path), max_bytes=5)
        tap.start()
        it = stream(tap)
        assert it.received(REQUEST, b"abc", 100) == [Send(REQUEST, b"abc")]
        assert it.received(REQUEST, b"defg", 100) == [Send(REQUEST, b"defg")]
        assert it.received(RESPONSE, b"xyz", 100) == [Send(RESPONSE, b"xyz")]
        assert it.raw(REQUEST)
        assert not it.raw(RESPONSE)
        it.finished(101)
        assert (tmp_path / "c-1.request").read_bytes() == b"abcde"
        assert (tmp_path / "c-1.response").read_bytes() == b"xyz"
        assert (tmp_path / "c-1.request").stat().st_mode & 0o777 == 0o600

    def test_a_file_that_is_there_is_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "c-1.request").write_text("mine")
        it = stream(element("tap", folder=str(tmp_path)))
        assert it.received(REQUEST, b"abc", 100) == [Send(REQUEST, b"abc")]
        assert it.raw(REQUEST)
        assert (tmp_path / "c-1.request").read_text() == "mine"

    def test_no_folder_no_start(self, tmp_path: Path) -> None:
        with pytest.raises(PermissionError, match="no folder"):
            element("tap", folder=str(tmp_path / "none")).start()

    def test_so_many_files_and_no_more(self, tmp_path: Path) -> None:
        tap = element("tap", folder=str(tmp_path), max_files=1)
        it = stream(tap)
        it.received(REQUEST, b"a", 100)
        it.received(RESPONSE, b"b", 100)
        it.finished(101)
        assert [path.name for path in tmp_path.iterdir()] == ["c-1.request"]


class TestStreamLog:
    def test_its_lines(self) -> None:
        log = element("stream-log")
        it = stream(log)
        it.opened()
        it.connection.requested, it.connection.responded = 3, 70
        it.finished(101.5)
        assert isinstance(log.emit, Said)
        (opened, fields), (closed, _) = log.emit
        assert opened == "connection c-1: 192.0.2.7:40000 -> 192.0.2.1:80"
        assert fields["connection"] == "c-1"
        assert closed == "connection c-1: 192.0.2.7:40000 -> 192.0.2.1:80: ended after 1.500 s, 3 bytes sent, 70 received"

    def test_chunks(self) -> None:
        log = element("stream-log", chunks=True)
        it = stream(log)
        assert it.received(REQUEST, b"abc", 100) == [Send(REQUEST, b"abc")]
        assert it.received(RESPONSE, b"d", 100) == [Send(RESPONSE, b"d")]
        assert [message for message, _ in log.emit] == [  # type: ignore[attr-defined]  # a Said, here
            "connection c-1: request, 3 bytes",
            "connection c-1: response, 1 bytes",
        ]
