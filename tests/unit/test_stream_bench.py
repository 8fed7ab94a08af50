"""The bench for stream elements: one connection without sockets, and docs/proxy.md's test as it is printed there."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
from forked import pytest_in
from pydantic import ValidationError

from nfq_agent import CLOSE, DROP, Connection, Later, StreamElement, Way
from nfq_agent.stream import Answer
from nfq_agent.testing import Bench, StreamBench, tcp

PAGE = Path(__file__).parent.parent.parent / "docs" / "proxy.md"


class Picky(StreamElement):
    """Drops, delays, closes or raises, by what the client says."""

    def request(self, data: bytes, connection: Connection) -> Answer:
        self.emit(f"{len(data)} bytes", level="warning", source=connection.client[0])
        answers: dict[bytes, Answer] = {b"drop": DROP, b"later": Later(2.0), b"close": CLOSE}
        if data == b"raise":
            raise RuntimeError("out of ideas")
        return answers.get(data)


def test_what_continues() -> None:
    bench = StreamBench(Picky)
    bench.assert_passed(bench.request(b"hello"), b"hello")
    bench.assert_passed(bench.response(b"back"), b"back", Way.RESPONSE)
    bench.assert_dropped(bench.request(b"drop"))
    assert bench.request(b"later").request == b""
    assert bench.wait(1.9).request == b""
    assert bench.wait(0.1).request == b"later"
    assert bench.end(Way.REQUEST).ended == {Way.REQUEST}
    assert bench.lines == ["5 bytes", "4 bytes", "5 bytes"]
    assert (bench.said[0].level, bench.said[0].fields) == ("warning", {"source": "192.0.2.1"})


def test_close_ends_it() -> None:
    bench = StreamBench(Picky)
    bench.assert_closed(bench.request(b"close"))
    assert bench.connection.reason == "closed by Picky"


def test_each_assertion_can_fail() -> None:
    bench = StreamBench(Picky)
    with pytest.raises(AssertionError, match="expected b'other' as request, got b'hello'"):
        bench.assert_passed(bench.request(b"hello"), b"other")
    with pytest.raises(AssertionError, match="expected no bytes to pass"):
        bench.assert_dropped(bench.request(b"hello"))
    with pytest.raises(AssertionError, match="expected the connection to be closed"):
        bench.assert_closed(bench.request(b"hello"))


def test_what_the_element_raises_is_raised() -> None:
    with pytest.raises(RuntimeError, match="out of ideas"):
        StreamBench(Picky).request(b"raise")


def test_a_built_in_with_its_options_and_one_behind_it() -> None:
    options: dict[str, Any] = {"find": "a", "with": "b"}
    bench = StreamBench("replace", behind=[("replace", {"find": "b", "with": "c"})], **options)
    bench.assert_passed(bench.request(b"a-b"), b"c-c")
    with pytest.raises(ValidationError):
        StreamBench("replace", fnd="a")


def test_what_is_kept_back_comes_when_the_element_has_waited() -> None:
    options: dict[str, Any] = {"find": "!!", "with": "?", "wait": "20ms"}
    bench = StreamBench("replace", **options)
    bench.assert_passed(bench.request(b"hey!"), b"hey")
    bench.assert_passed(bench.wait(0.02), b"!")


def test_the_page(tmp_path: Path) -> None:
    """The element and the test of docs/proxy.md, word for word, run by pytest."""
    element, test = (block.split("```")[0] for block in PAGE.read_text().split("```python\n")[1:3])
    package = tmp_path / "my_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "my_module.py").write_text(element)
    (tmp_path / "test_no_secrets.py").write_text(test)
    done = pytest_in(tmp_path, "test_no_secrets.py")
    assert "2 passed" in done.stdout, done.stdout + done.stderr


def test_a_bench_is_freed_as_soon_as_nobody_has_it() -> None:
    """Its flow table takes megabytes, which the garbage collector does not count."""
    bench = Bench("policy", before=[("dpi", {})], rule=[{"action": "drop", "tls_sni": "*.test"}])
    bench.decide(tcp("192.0.2.1:40000", "198.51.100.1:443", flags="S", seq=0))
    bench.decide(tcp("192.0.2.1:40000", "198.51.100.1:443", b"\x16\3\1"))
    stream = StreamBench("stream-log")
    freed = [weakref.ref(each) for each in (bench, bench.chain, stream)]
    gc.disable()
    try:
        del bench, stream
        assert [each() for each in freed] == [None, None, None]
    finally:
        gc.enable()
