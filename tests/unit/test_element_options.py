"""Options of elements: every type has a form in TOML, and a misspelled option is a type error."""

from __future__ import annotations

import ipaddress
import subprocess
import sys
import tomllib
from datetime import timedelta
from enum import Enum
from pathlib import Path

import pytest
from pydantic import Field, ValidationError

import nfq_agent
from nfq_agent import DROP, Duration, Flow, Options, Packet, PacketElement, StreamElement, Verdict
from nfq_agent.config.file import load
from nfq_agent.testing import Bench, tcp


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Inner(Options):
    pause: timedelta = timedelta(0)


class Everything(Options):
    pair: tuple[int, str] = (0, "")
    ports: tuple[int, ...] = ()
    names: set[str] = Field(default_factory=set)
    fixed: frozenset[int] = frozenset()
    path: Path = Path("/")
    colour: Colour = Colour.RED
    network: ipaddress.IPv4Network | None = None
    address: ipaddress.IPv6Address | None = None
    wait: timedelta | None = None
    waits: tuple[timedelta, ...] = ()
    by_name: dict[str, timedelta] = Field(default_factory=dict)
    inner: tuple[Inner, ...] = ()
    seconds: Duration = 0.0
    count: int = 0
    ratio: float = 0.0


class Taker(PacketElement[Everything]):
    pass


TOML = """
pair = [1, "one"]
ports = [22, 80]
names = ["a", "b"]
fixed = [1, 2, 2]
path = "/var/lib/x"
colour = "blue"
network = "10.0.0.0/8"
address = "2001:db8::1"
wait = "1.5s"
waits = ["100ms", "2h"]
by_name = { slow = "1m" }
inner = [{ pause = "250us" }]
seconds = "5s"
count = 3
ratio = 2
"""
VALUES = Everything(
    pair=(1, "one"),
    ports=(22, 80),
    names={"a", "b"},
    fixed=frozenset({1, 2}),
    path=Path("/var/lib/x"),
    colour=Colour.BLUE,
    network=ipaddress.IPv4Network("10.0.0.0/8"),
    address=ipaddress.IPv6Address("2001:db8::1"),
    wait=timedelta(seconds=1.5),
    waits=(timedelta(milliseconds=100), timedelta(hours=2)),
    by_name={"slow": timedelta(minutes=1)},
    inner=(Inner(pause=timedelta(microseconds=250)),),
    seconds="5s",  # type: ignore[arg-type]  # as a file writes it
    count=3,
    ratio=2.0,
)


def test_every_type_has_a_form_in_toml() -> None:
    assert Everything.from_table(tomllib.loads(TOML)) == VALUES


def test_a_test_may_give_python_values() -> None:
    table = {**dict(VALUES), "seconds": "5s", "inner": [{"pause": timedelta(microseconds=250)}], "colour": "blue"}
    assert Everything.from_table(table) == VALUES


def test_a_configuration_file_takes_them(tmp_path: Path) -> None:
    file = tmp_path / "nfq-agent.toml"
    file.write_text(f'[queue.q]\nelements = ["taker"]\n[element.taker]\ntype = "{__name__}:Taker"\n{TOML}')
    config = load(file)
    assert config.packet_elements(config.queue["q"])[0].options == VALUES


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("count", "3"), ("count", 3.5), ("count", True), ("ratio", "2"), ("ports", 22), ("ports", ["22"]), ("path", 5),
        ("colour", "green"), ("network", "10.0.0.1/8"), ("wait", "5"), ("wait", "soon"), ("waits", ["1s", "x"]), ("pair", [1]),
    ],
)  # fmt: skip
def test_what_is_of_another_type_is_refused(key: str, value: object) -> None:
    with pytest.raises(ValidationError) as refused:
        Everything.from_table({key: value})
    assert {error["loc"][0] for error in refused.value.errors()} == {key}


def test_the_parameter_is_the_model_of_the_table() -> None:
    class Second(Taker):
        pass

    class Old(PacketElement):
        Options = Everything

    class Stream(StreamElement[Inner]):
        pass

    assert (Taker.Options, Second.Options, Old.Options) == (Everything, Everything, Everything)
    assert Stream.Options is Inner
    assert PacketElement.Options is Options
    bench = Bench(Taker, ports=[23])
    bench.assert_accepted(tcp("192.0.2.1:1", "192.0.2.2:23"))
    assert bench.element.options.ports == (23,)


class Limit(Options):
    limit: int = 3


class Limited(PacketElement[Limit]):
    def decide(self, packet: Packet, flow: Flow | None) -> Verdict | None:
        return DROP if len(packet.payload) > self.options.limit else None


class Misspelled(PacketElement[Limit]):
    def decide(self, packet: Packet, flow: Flow | None) -> Verdict | None:
        return DROP if len(packet.payload) > self.options.limti else None  # type: ignore[attr-defined]  # see below


class MisspelledStream(StreamElement[Limit]):
    def start(self) -> None:
        self.left = self.options.limti  # type: ignore[attr-defined]  # see below


def test_a_misspelled_option_is_a_type_error() -> None:
    """mypy --strict, which reads the tests too, refuses a `type: ignore` where there is no error: it holds the classes above."""
    Bench(Limited, limit=99).assert_accepted(tcp("192.0.2.1:1", "192.0.2.2:23"))
    with pytest.raises(AttributeError, match="limti"):
        Bench(Misspelled).decide(tcp("192.0.2.1:1", "192.0.2.2:23"))


def test_what_is_exported_is_there() -> None:
    for name in nfq_agent.__all__:
        assert getattr(nfq_agent, name) is not None
    assert {"Flow", "Options", "Duration", "mend", "open_socket", "address", "endpoint"} <= set(nfq_agent.__all__)


def test_a_program_with_a_queue_does_not_load_pydantic() -> None:
    code = "import sys, nfq_agent; nfq_agent.Queue, nfq_agent.Flow; print('pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
