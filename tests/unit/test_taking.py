"""Which rules take a packet: `explain` says of random rules and packets what a walk over the planned rules says."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planned import UID
from pydantic import ValidationError
from rule_walk import taken

from nfq_agent.cli.question import Question
from nfq_agent.cli.taking import matching, misses, own_uid
from nfq_agent.config.models import Config
from nfq_agent.rules.model import RuleError
from nfq_agent.rules.plan import plan

HOOKS = ("prerouting", "input", "forward", "output", "postrouting")
PORTS: list[Any] = [22, 80, "80:90", "85:443", 443, 5000]
NETWORKS = ["10.0.0.0/8", "10.0.0.5", "192.0.2.0/24", "2001:db8::/32", "2001:db8::5"]


def some(values: list[Any], most: int = 2) -> st.SearchStrategy[list[Any]]:
    return st.lists(st.sampled_from(values), min_size=1, max_size=most, unique=True)


CONDITIONS: dict[str, st.SearchStrategy[Any]] = {
    "not_tcp_ports": some(PORTS),
    "not_udp_ports": some(PORTS),
    "src": some(NETWORKS),
    "dst": some(NETWORKS),
    "not_src": some(NETWORKS),
    "not_dst": some(NETWORKS),
    "set": some(["blocked", "known src"]),
    "not_set": some(["blocked", "known src"]),
    "interface": some(["eth0", "eth*", "veth1"]),
    "not_interface": some(["eth0", "veth*"]),
    "owner": st.sampled_from([7, 8]),
    "uid": some([7, "8-20"]),
    "not_uid": some([7, "8-20"]),
    "gid": some([7, "8-20"]),
    "not_gid": some([7, "8-20"]),
    "cgroup": some(["system.slice", "system.slice/shop.service"]),
    "not_cgroup": some(["system.slice/shop.service"]),
    "mark": st.sampled_from(["0x1/0xf", "0x0/0xf", "0x10"]),
    "role": st.sampled_from(["server", "client", "both"]),
    "family": st.sampled_from(["inet", "inet6"]),
    "bridge": st.just(True),
}
TRAFFIC: list[dict[str, st.SearchStrategy[Any]]] = [
    {"tcp_ports": some(PORTS)},
    {"udp_ports": some(PORTS)},
    {"tcp_ports": some(PORTS), "udp_ports": some(PORTS)},
    {"tcp_syn": st.just(True)},
    {"tcp_syn": st.just(True), "tcp_ports": some(PORTS)},
    {"all": st.just(True)},
    {"protocol": some(["icmp", "icmpv6", "tcp", "udp", "gre", "sctp"])},
]


@st.composite
def rules(draw: st.DrawFn) -> dict[str, Any]:
    keys = draw(st.lists(st.sampled_from(sorted(CONDITIONS)), max_size=3, unique=True))
    found = {"queue": "main", "hooks": draw(some(list(HOOKS), 5))}
    if "bridge" in keys:
        found["hooks"] = ["forward"]
    if draw(st.booleans()):
        found["table"] = draw(st.sampled_from(["raw", "filter"]))
    parts = {**draw(st.sampled_from(TRAFFIC)), **{key: CONDITIONS[key] for key in keys}}
    return {**found, **{key: draw(part) for key, part in parts.items()}}


@st.composite
def questions(draw: st.DrawFn) -> Question:
    protocol = draw(st.sampled_from(["tcp", "tcp", "tcp", "udp", "udp", "icmp", "gre", "sctp"]))
    ends = draw(st.sampled_from([("10.0.0.5", "192.0.2.9"), ("192.0.2.1", "10.0.0.5"), ("2001:db8::5", "2001:db8::1")]))
    ports = [draw(st.sampled_from([22, 80, 85, 90, 443, 40000])) for _ in ends]
    with_port = [f"[{end}]:{port}" if ":" in end else f"{end}:{port}" for end, port in zip(ends, ports, strict=True)]
    source, destination = ends if protocol in ("icmp", "gre") else with_port
    hook = draw(st.sampled_from(HOOKS))
    sent = hook in ("output", "postrouting")
    return Question(
        protocol, source, destination, hook=hook,
        interface=draw(st.sampled_from(["", "eth0", "eth1", "veth1", "lo"])),
        to_interface=draw(st.sampled_from(["", "eth0", "veth1"])) if hook == "forward" else "",
        uid=draw(st.sampled_from([None, 7, 9, UID])) if sent else None,
        gid=draw(st.sampled_from([None, 7, 9])) if sent else None,
        cgroup=draw(st.sampled_from(["", "system.slice/shop.service", "system.slice/shop.service/x", "user.slice"])),
        sets=draw(st.sampled_from([(), ("blocked",), ("known",)])),
        mark=draw(st.sampled_from([0, 1, 0x10])),
    )  # fmt: skip


@given(st.lists(rules(), min_size=1, max_size=3), questions(), st.booleans())
def test_the_rules_that_take_a_packet_are_those_that_the_kernel_asks(
    chosen: list[dict[str, Any]], asked: Question, lists: bool
) -> None:
    sound = {}
    for number, rule in enumerate(chosen):
        try:
            Config.model_validate({"queue": {"main": {}}, "rules": {f"r{number}": rule}})
        except ValidationError:
            continue
        sound[f"r{number}"] = rule
    config = Config.model_validate({"queue": {"main": {}}, "rules": sound})
    try:
        ruleset = plan(config, UID, lists)
    except RuleError:
        # One backend alone can do that.
        return
    walked = list(taken(ruleset, "default", asked))
    found = matching(config, asked)
    first = [] if own_uid(asked, UID) else [(each.table, each.name) for each in found if each.before is None]
    assert first == walked
    assert {each.name for each in found} == {name for name in sound if not list(misses(config, name, asked))}


PROXY = {"proxy": {"web": {"listen": ["0.0.0.0:15002"], "exclude": ["10.0.0.0/8"]}}}


@pytest.mark.parametrize(
    ("destination", "more", "said"),
    [
        ("192.0.2.9:80", {}, []),
        ("10.0.0.5:80", {}, ["dst is 10.0.0.5, which is in exclude of proxy web"]),
        ("192.0.2.9:80", {"mark": 0x1000}, ["mark is 0x1000, which is that of a proxy's own connections (0x1000/0x1000)"]),
        ("[2001:db8::9]:80", {}, ["proxy web has no listener for inet6"]),
    ],
)
def test_what_a_proxy_does_not_take(destination: str, more: dict[str, Any], said: list[str]) -> None:
    config = Config.model_validate({**PROXY, "rules": {"r": {"proxy": "web", "tcp_ports": [80], "hooks": ["output"]}}})
    source = "[2001:db8::1]:40000" if "[" in destination else "192.0.2.1:40000"
    asked = Question("tcp", source, destination, **more)
    assert list(misses(config, "r", asked)) == said
    walked = [name for table, name in taken(plan(config, UID), "default", asked) if table == "nat"]
    assert bool(walked) == (not said)
