"""The stream elements without a proxy: what each does with the bytes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from streams import REQUEST, RESPONSE, Said, element, sent, stream

from nfq_agent.stream import (
    Close,
    Output,
    Send,
)


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
            b"GET /HTTP/1.1\r\nHost: bad.test\r\n\r\n", b"GET http://x.good.test/\r\nHost: bad.test\r\n\r\n",
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
        with pytest.raises(PermissionError, match="not a folder"):
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
