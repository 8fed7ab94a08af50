"""Conditions on countries and autonomous systems, by real databases that the tests write."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path

import pytest
from mmdb import write_database
from pydantic import ValidationError

from nfq_agent.cli.explain import _place
from nfq_agent.config.file import load
from nfq_agent.config.lookups import HostLookups
from nfq_agent.config.models import ConfigError
from nfq_agent.flow import Flow
from nfq_agent.geography import NOWHERE, Whereabouts, asn, country, place
from nfq_agent.testing import Bench, udp
from nfq_agent.verdict import ACCEPT, DROP

COUNTRIES: Mapping[str, Mapping[str, object]] = {
    "192.0.2.0/24": {"country": {"iso_code": "DE"}}, "198.51.100.0/25": {"country": "FR", "asn": "AS64500"},
    "2001:db8::/32": {"country": {"iso_code": "DE"}}, "203.0.113.0/24": {"registered_country": {"iso_code": "DE"}},
}  # fmt: skip
SYSTEMS = {"192.0.2.0/24": {"autonomous_system_number": 64496}}
US = "10.0.0.1:4000"


def _packed(text: str) -> bytes:
    return ip_address(text).packed


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    return [
        str(write_database(tmp_path / "country.mmdb", COUNTRIES)), str(write_database(tmp_path / "asn.mmdb", SYSTEMS, version=4)),
    ]  # fmt: skip


def test_places_of_addresses(files: list[str]) -> None:
    found = HostLookups().geography(tuple(files))
    for address, expected in {
        "192.0.2.9": Whereabouts("DE", 64496), "198.51.100.1": Whereabouts("FR", 64500), "2001:db8::1": Whereabouts("DE"),
        "198.51.100.200": NOWHERE, "203.0.113.1": NOWHERE, "2001:db9::1": NOWHERE, "10.0.0.1": NOWHERE,
    }.items():  # fmt: skip
        assert found.whereabouts(_packed(address)) == expected, address


@pytest.mark.parametrize("record", [None, "DE", {}, {"country": {}}, {"country": "Germany"}, {"asn": "x"}, {"asn": True}])
def test_records_that_say_nothing(record: object) -> None:
    assert place(record) == NOWHERE


RULES = [
    ({"dst_country": "de"}, {"192.0.2.1": True, "2001:db8::1": True, "198.51.100.1": False, "10.0.0.9": False}),
    ({"dst_country": ["FR", "DE"], "dst_asn": "AS64496"}, {"192.0.2.1": True, "198.51.100.1": False, "10.0.0.9": False}),
    ({"dst_asn": [64500]}, {"198.51.100.1": True, "192.0.2.1": False}),
    ({"src_country": "DE"}, {"192.0.2.1": False}),
]


@pytest.mark.parametrize("by_flow", [False, True], ids=["packet", "flow"])
@pytest.mark.parametrize(("conditions", "met"), RULES)
def test_a_policy_by_place(files: list[str], conditions: dict[str, object], met: dict[str, bool], by_flow: bool) -> None:
    rules = [{"action": "drop", "dns_name": "*.evil.test"}] if by_flow else []
    bench = Bench(
        "policy",
        before=[("dpi", {})] if by_flow else [],
        geo=files,
        default="drop",
        rule=[{"action": "accept", **conditions}, *rules],
    )
    for address, accepted in met.items():
        end = f"[{address}]:5000" if ":" in address else f"{address}:5000"
        source = "[fd00::1]:4000" if ":" in address else US
        assert bench.decide(udp(source, end, b"hello")).action is (ACCEPT if accepted else DROP).action, address


def test_where_a_packet_comes_from(files: list[str]) -> None:
    bench = Bench("policy", geo=files[0], default="accept", rule=[{"action": "drop", "src_country": ["DE", "FR"]}])
    assert bench.decide(udp("192.0.2.1:1", US, b"x")).action is DROP.action
    assert bench.decide(udp("10.0.0.9:1", US, b"x")).action is ACCEPT.action


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"dst_country": "Germany"}, "not a code of a country"), ({"dst_asn": 0}, "not an autonomous system"),
        ({"src_asn": "ASx"}, "not an autonomous system"), ({"dst_country": 5}, "not a code of a country"),
    ],
)  # fmt: skip
def test_bad_values(files: list[str], rule: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Bench("policy", geo=files, rule=[{"action": "drop", **rule}])
    assert (country("de"), asn("as1"), asn("7")) == ("DE", 1, 7)


def config(folder: Path, geo: str) -> Path:
    path = folder / "a.toml"
    path.write_text(
        f'[queue.q]\nelements = ["p"]\n[rules.r]\nqueue = "q"\ntcp_ports = [1]\n[element.p]\ntype = "policy"\n{geo}\n'
        'rule = [{ action = "drop", dst_country = "DE" }]\n'
    )
    return path


def test_what_cannot_be_read_is_refused_by_its_name(tmp_path: Path) -> None:
    whole = write_database(tmp_path / "whole.mmdb", COUNTRIES)
    (tmp_path / "text.mmdb").write_text("hello")
    (tmp_path / "cut.mmdb").write_bytes(whole.read_bytes()[500:])
    write_database(tmp_path / "open.mmdb", COUNTRIES).chmod(0o666)
    for name, said in {
        "none.mmdb": "No such file", "text.mmdb": "not a usable database", "cut.mmdb": "not a usable database",
        "open.mmdb": "others may write",
    }.items():  # fmt: skip
        with pytest.raises(ConfigError) as refused:
            load(config(tmp_path, f'geo = "{name}"'))
        assert f"{tmp_path}/{name}: " in str(refused.value)
        assert said in str(refused.value)
    for geo, said in {"": "without a database", "geo = 5": "is not a database", "geo = []": "is not a database"}.items():
        with pytest.raises(ConfigError, match=said):
            load(config(tmp_path, geo))


def test_a_change_is_noticed_and_taken(tmp_path: Path) -> None:
    path = write_database(tmp_path / "a.mmdb", COUNTRIES)
    before = load(config(tmp_path, 'geo = "a.mmdb"'))
    (old,) = before.packet_elements(before.queue["q"])
    assert before.changed_files() == []
    path.unlink()
    write_database(path, {"192.0.2.0/24": {"country": {"iso_code": "FR"}}})
    assert [before.changed_files() for _ in range(2)] == [[], [path]]
    after = load(config(tmp_path, 'geo = "a.mmdb"'))
    (new,) = after.packet_elements(after.queue["q"])
    # By both, a reload and `offload` see another policy.
    assert new.options != old.options
    assert repr(new.options) != repr(old.options)
    assert new.options.geo.whereabouts(_packed("192.0.2.1")) == Whereabouts("FR")


def test_explain_says_the_place(files: list[str]) -> None:
    geography = HostLookups().geography(tuple(files))
    packet = udp(US, "192.0.2.1:1", b"x")
    flow = Flow(packet.headers.five_tuple, 0.0, 0.0)
    assert _place("dst_country", flow, geography) == "dst_country is DE"
    assert _place("src_asn", flow, geography) == "src_asn is not known"
