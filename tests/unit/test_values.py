"""Values of a configuration: what is read, the text of it, and what is refused with which words."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BeforeValidator, TypeAdapter, ValidationError

from nfq_agent.values import Endpoint, Ports, duration, duration_text, listed, network, one_or_more, size, size_text

PORT = st.integers(1, 65535)


def test_a_duration_of_zero_needs_no_unit() -> None:
    assert duration(0) == duration("0") == 0.0
    for wrong in (False, 5, "5"):
        with pytest.raises(ValueError, match="is not a valid duration"):
            duration(wrong)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0.0), ("5s", 5.0), ("100ms", 0.1), ("250us", 250e-6), ("1.5m", 90.0), ("2h", 7200.0)],
)
def test_durations(text: str, seconds: float) -> None:
    assert duration(text) == pytest.approx(seconds)
    assert duration_text(seconds) == text


@pytest.mark.parametrize(
    ("value", "count", "text"),
    [(512, 512, "512 B"), ("1kB", 1000, "1.0 kB"), ("64MB", 64_000_000, "64.0 MB"), ("2 GB", 2_000_000_000, "2.0 GB")],
)
def test_sizes(value: object, count: int, text: str) -> None:
    assert size(value) == count
    assert size_text(count) == text


@given(PORT, PORT)
def test_the_text_of_ports_is_read_back(one: int, two: int) -> None:
    ports = Ports(min(one, two), max(one, two))
    text = str(ports)
    assert Ports.parse(text if ":" in text else int(text)) == ports
    assert ports.first in ports
    assert ports.last in ports
    assert ports.last + 1 not in ports


@given(st.ip_addresses(), PORT)
def test_the_text_of_an_endpoint_is_read_back(address: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int) -> None:
    end = Endpoint(str(address), port)
    assert Endpoint.parse(str(end)) == end


@given(st.ip_addresses(), st.integers(0, 32))
def test_the_text_of_a_network_is_read_back(address: ipaddress.IPv4Address | ipaddress.IPv6Address, length: int) -> None:
    value = ipaddress.ip_network((address, length), strict=False)
    assert network(str(value)) == value


def test_port_0_is_for_what_packets_carry() -> None:
    assert Ports.parse(0, lowest=0) == Ports(0, 0)
    assert Endpoint.parse("192.0.2.1:0", lowest=0).port == 0


@pytest.mark.parametrize(
    ("parse", "value", "message"),
    [
        (duration, "5", "'5' is not a valid duration; allowed: \"0\", or a number with us, ms, s, m or h"),
        (duration, 5, "5 is not a valid duration"),
        (size, 0, "0 is not a valid size; allowed: a number of bytes"),
        (size, True, "True is not a valid size"),
        (size, "64mb", "'64mb' is not a valid size"),
        (Ports.parse, "http", "'http' is not a valid port; allowed: 1 to 65535, or a range as \"8000:8010\""),
        (Ports.parse, 0, "0 is not a valid port"),
        (Ports.parse, 65536, "65536 is not a valid port"),
        (Ports.parse, True, "True is not a valid port"),
        (Ports.parse, "9000:8000", "range 9000:8000 ends before it begins; allowed: 1 to 65535"),
        (Ports.parse, "1:65536", "'1:65536' is not a valid port"),
        (Endpoint.parse, "15002", "'15002' is not a valid endpoint; allowed: HOST:PORT"),
        (Endpoint.parse, "::1:80", "'::1:80' is not a valid endpoint"),
        (Endpoint.parse, "[::1]:0", "'[::1]:0': 0 is not a valid port; allowed: 1 to 65535"),
        (network, "ten", "'ten' is not a valid network; allowed: an address, or a network"),
        (network, 10, "10 is not a valid network"),
        (network, "10.0.0.1/8", "'10.0.0.1/8' has bits set after its prefix (did you mean '10.0.0.0/8'?); allowed: an address"),
    ],
)
def test_what_is_not_valid_is_refused(parse: Callable[[object], object], value: object, message: str) -> None:
    with pytest.raises(ValueError, match="allowed: ") as refused:
        parse(value)
    assert str(refused.value).startswith(message)


def test_one_value_is_a_list_of_one() -> None:
    assert one_or_more("a") == ("a",)
    assert one_or_more(["a", "b"]) == ["a", "b"]


class _Files:
    """The file of a configuration: one entry a line."""

    def __init__(self, *entries: str) -> None:
        self._entries = entries

    def lines(self, file: str) -> list[tuple[int, str]]:
        assert file == "ports.txt"
        return list(enumerate(self._entries, 1))


def _ports(value: object, *entries: str) -> Any:
    field: Any = Annotated[Any, BeforeValidator(listed(Ports.parse))]
    return TypeAdapter(field).validate_python(value, context=_Files(*entries))


def test_a_file_stands_for_its_entries() -> None:
    assert _ports(["7", "file:ports.txt"], "8:8", "9:10") == ["7", Ports.parse("8:8"), Ports.parse("9:10")]
    # An empty list of a condition would match nothing, or anything.
    with pytest.raises(ValidationError, match=r"file:ports\.txt has no entry; allowed: one or more"):
        _ports("file:ports.txt")


@pytest.mark.parametrize(("count", "end"), [(1, ""), (5, ""), (6, ", and 1 more"), (12, ", and 7 more")])
def test_bad_entries_of_a_file_are_named_up_to_five(count: int, end: str) -> None:
    with pytest.raises(ValidationError) as refused:
        _ports("file:ports.txt", *["x"] * count)
    said = refused.value.errors()[0]["msg"]
    assert said.count("file:ports.txt, line ") == min(count, 5)
    assert f"{end}; allowed: " in said
    assert ("more" in said) is bool(end)


@pytest.mark.parametrize("value", [0, -1, True, "0", "0kB"])
def test_a_size_is_more_than_nothing(value: object) -> None:
    with pytest.raises(ValueError, match="not a valid size"):
        size(value)


@pytest.mark.parametrize(("seconds", "text"), [(3600.0, "1h"), (60.0, "1m"), (1.0, "1s"), (1e-3, "1ms"), (0.0, "0")])
def test_one_of_a_unit_is_told_in_it(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text
