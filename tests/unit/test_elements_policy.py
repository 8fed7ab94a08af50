"""The policy's rules, compared with a plain reading of them, and its states while names are awaited."""

from __future__ import annotations

import fnmatch
import ipaddress
import time
import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from nfq_agent.element import Needs, PacketElement
from nfq_agent.elements.policy import Policy
from nfq_agent.flow import Flow
from nfq_agent.packet import Hook, Packet, PacketError
from nfq_agent.patterns import Patterns
from nfq_agent.policy_options import PolicyOptions
from nfq_agent.testing import Bench, icmp, tcp, udp
from nfq_agent.verdict import ACCEPT, DROP

A, B = "192.0.2.1:40000", "198.51.100.7:443"
A6, B6 = "[2001:db8::1]:40000", "[fd00::7]:443"


def bench(*rules: dict[str, Any], **options: Any) -> Bench:
    return Bench("policy", rule=list(rules), **{"default": "accept", **options}) if rules else Bench("policy", **options)


def verdicts(rule: dict[str, Any], *packets: Packet) -> list[bool]:
    """Which of the packets a rule matches."""
    policy = bench({"action": "drop", **rule})
    return [policy.decide(packet) is DROP for packet in packets]


def test_first_match_wins() -> None:
    policy = bench({"action": "accept", "dst": "198.51.100.7"}, {"action": "drop", "dst": "198.51.100.0/24"}, default="accept")
    policy.assert_accepted(tcp(A, B))
    policy.assert_dropped(tcp(A, "198.51.100.8:443"))
    policy.assert_accepted(tcp(A, "198.51.101.8:443"))


def test_without_a_default_the_next_is_asked() -> None:
    first = ("policy", {"rule": [{"action": "drop", "dport": 23}]})
    second = Bench("policy", before=[first], rule=[{"action": "drop", "dport": 25}], default="accept")
    assert [second.decide(tcp(A, f"192.0.2.2:{port}")) for port in (23, 25, 80)] == [DROP, DROP, ACCEPT]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({"src": "192.0.2.0/24"}, [True, False, True]),
        ({"dst": ["fd00::/8", "198.51.100.7"]}, [True, True, False]),
        ({"sport": 40000}, [True, True, False]),
        ({"dport": ["400:450", 80]}, [True, True, False]),
        ({"dport": "0:65535"}, [True, True, False]),
        ({"protocol": "tcp"}, [True, True, False]),
        ({"protocol": ["icmp", 17]}, [False, False, True]),
        ({}, [True, True, True]),
    ],
)
def test_conditions_on_headers(rule: dict[str, Any], expected: list[bool]) -> None:
    assert verdicts(rule, tcp(A, B), tcp(A6, B6), icmp("192.0.2.1", "192.0.2.2")) == expected


def test_conditions_on_the_hook_and_the_process() -> None:
    inward, outward = tcp(A, B, hook=Hook.INPUT), tcp(A, B, hook=Hook.OUTPUT, uid=0, gid=0)
    assert verdicts({"direction": "in"}, inward, outward) == [True, False]
    assert verdicts({"direction": "out"}, inward, outward) == [False, True]
    assert verdicts({"hook": ["prerouting", "output"]}, inward, outward) == [False, True]
    assert verdicts({"uid": "root"}, inward, outward) == [False, True]
    assert verdicts({"gid": [0, 7]}, inward, outward) == [False, True]
    assert verdicts({"uid": 1}, inward, outward) == [False, False]


def test_conditions_on_the_interface() -> None:
    loopback = tcp(A, B, indev=1)
    assert verdicts({"interface": "lo"}, loopback, tcp(A, B, outdev=1), tcp(A, B)) == [True, True, False]
    assert verdicts({"interface": ["eth7", "l*"]}, loopback, tcp(A, B)) == [True, False]
    assert verdicts({"interface": "eth7"}, loopback, tcp(A, B)) == [False, False]


def test_a_later_fragment_meets_no_condition_on_ports() -> None:
    payload = bytearray(udp(A, B, bytes(64)).payload)
    payload[6:8] = b"\x00\x08"
    assert verdicts({"dport": "0:65535"}, Packet(bytes(payload))) == [False]
    assert verdicts({"protocol": "udp"}, Packet(bytes(payload))) == [True]


# The reference: each condition read one by one, as a person would.
NETWORKS = st.sampled_from(
    ["0.0.0.0/0", "10.0.0.0/8", "10.1.0.0/16", "10.1.2.0/24", "10.1.2.3/32", "::/0", "fd00::/8", "fd00:1::/32", "fd00:1::1/128"]
)
PORTS = st.tuples(st.integers(0, 20), st.integers(0, 10)).map(lambda pair: f"{pair[0]}:{pair[0] + pair[1]}")
RULES = st.lists(
    st.fixed_dictionaries(
        {"action": st.sampled_from(["accept", "drop"])},
        optional={
            "src": st.lists(NETWORKS, min_size=1, max_size=3),
            "dst": st.lists(NETWORKS, min_size=1, max_size=3),
            "sport": st.lists(PORTS, min_size=1, max_size=3),
            "dport": st.lists(PORTS, min_size=1, max_size=3),
            "protocol": st.lists(st.sampled_from(["tcp", "udp"]), min_size=1),
            "hook": st.lists(st.sampled_from(["input", "output"]), min_size=1),
            "uid": st.lists(st.integers(0, 2), min_size=1),
        },
    ),
    max_size=8,
)
V4 = st.sampled_from(["10.1.2.3", "10.1.2.4", "10.1.3.1", "10.2.0.1", "11.0.0.1"])
V6 = st.sampled_from(["fd00:1::1", "fd00:1::2", "fd00:2::1", "2001:db8::1"])


def plainly(rules: list[dict[str, Any]], values: dict[str, Any]) -> str | None:
    for rule in rules:
        good = True
        for key in ("src", "dst"):
            if key in rule:
                address = ipaddress.ip_address(values[key])
                networks = [ipaddress.ip_network(each) for each in rule[key]]
                good &= any(address in network for network in networks if network.version == address.version)
        for key in ("sport", "dport"):
            if key in rule:
                ends = [tuple(map(int, each.split(":"))) for each in rule[key]]
                good &= any(first <= values[key] <= last for first, last in ends)
        for key in ("protocol", "hook", "uid"):
            good &= key not in rule or values[key] in rule[key]
        if good:
            return str(rule["action"])
    return None


@given(
    RULES,
    st.one_of(st.tuples(V4, V4), st.tuples(V6, V6)),
    st.tuples(st.integers(0, 31), st.integers(0, 31)),
    st.sampled_from(["tcp", "udp"]),
    st.sampled_from(["input", "output"]),
    st.sampled_from([None, 0, 1, 2, 3]),
)
def test_as_read_plainly(rules: Any, ends: Any, ports: Any, protocol: str, hook: str, uid: Any) -> None:
    src, dst = (f"[{end}]:{port}" if ":" in end else f"{end}:{port}" for end, port in zip(ends, ports, strict=True))
    packet = {"tcp": tcp, "udp": udp}[protocol](src, dst, hook=Hook[hook.upper()], uid=uid)
    values = {
        "src": ends[0], "dst": ends[1], "sport": ports[0], "dport": ports[1], "protocol": protocol, "hook": hook, "uid": uid,
    }  # fmt: skip
    policy = Policy("policy", PolicyOptions(rule=rules), lambda *_, **__: None)
    expected = {"accept": ACCEPT, "drop": DROP, None: None}[plainly(rules, values)]
    assert policy.decide(packet, None) is expected


def test_thousands_of_networks_are_one_look_up_for_each_prefix_length() -> None:
    networks = [f"10.{high}.{low}.0/24" for high in range(16) for low in range(0, 256, 2)]
    policy = bench({"action": "drop", "dst": networks})
    packets = [tcp(A, f"10.{high}.{low}.9:443") for high in (0, 7, 15, 16) for low in (0, 1, 254)]
    dropped = [policy.decide(packet) is DROP for packet in packets]
    assert dropped == [high < 16 and low % 2 == 0 for high in (0, 7, 15, 16) for low in (0, 1, 254)]
    assert len(policy.element._match._dst._v4) == 1  # type: ignore[attr-defined]  # noqa: SLF001  # the shape that makes it quick


# What was found out about a flow.


class Facts:
    """Packets of one flow through a policy, with facts given to the flow as an element in front would."""

    def __init__(self, *rules: dict[str, Any], **options: Any) -> None:
        self.bench = Bench("policy", rule=list(rules), **options)

    def send(self, data: bytes = b"x", reply: bool = False, **facts: Any) -> bool:
        packet = tcp(B, A, data) if reply else tcp(A, B, data)
        flow = self.bench.flows.observe(packet.headers.five_tuple, 1000.0)
        flow.facts.update(facts)
        verdict = self.bench.chain.decide(packet, flow)
        self.undecided = flow.undecided
        return verdict.action == ACCEPT.action


STRIPE = {"action": "accept", "tls_sni": ["*.stripe.com", "api.example.org"]}
INSIDE = {"action": "accept", "dst": ["10.0.0.0/8", "fd00::/8"]}


def test_an_allowed_name() -> None:
    flow = Facts(STRIPE, INSIDE, default="drop")
    assert flow.send(b"")
    assert flow.undecided
    assert flow.send(dpi="decided", tls_sni="API.Stripe.com")
    assert not flow.undecided
    assert flow.send(reply=True)


@pytest.mark.parametrize("name", ["stripe.com.evil.test", "stripe.com", "example.org", "x.api.example.org", "api.example.org.x"])
def test_a_denied_name(name: str) -> None:
    flow = Facts(STRIPE, INSIDE, default="drop")
    assert flow.send(b"")
    assert not flow.send(dpi="decided", tls_sni=name)
    assert not flow.send(reply=True)


def test_a_name_that_never_comes() -> None:
    flow = Facts(STRIPE, default="drop", within=3)
    assert [flow.send(b"") for _ in range(5)] == [True] * 5
    assert [flow.send() for _ in range(5)] == [True, True, True, False, False]
    assert not flow.send(b"")


def test_dpi_that_gave_up_ends_the_wait() -> None:
    assert not Facts(STRIPE, default="drop").send(dpi="gave-up")


def test_undecided_may_be_a_drop() -> None:
    flow = Facts(STRIPE, default="accept", undecided="drop")
    assert flow.send(b"")
    assert not flow.undecided  # Whatever the name will be, the answer is the same.
    flow = Facts(STRIPE, default="drop", undecided="drop")
    assert not flow.send(b"")
    assert flow.undecided


def test_a_flow_that_headers_decide_does_not_wait() -> None:
    flow = Facts(
        {"action": "drop", "http_host": "*.blocked.test"}, {"action": "drop", "dst": "198.51.100.0/24"}, default="accept"
    )
    assert not flow.send(b"")
    assert not flow.undecided


def test_a_flow_is_judged_by_its_first_packet_also_on_the_way_back() -> None:
    flow = Facts({"action": "drop", "protocol": ["ssh"], "dport": [443]}, default="accept")
    assert flow.send(b"")
    assert not flow.send(b"SSH-2.0-x", reply=True, protocol="ssh", dpi="decided")
    assert not flow.send()


def test_any_of_several_names_and_a_new_one_later() -> None:
    flow = Facts({"action": "drop", "dns_name": ["*.blocked.test"]}, default="accept")
    assert flow.send(dpi="decided", dns_name=("fine.test",))
    assert not flow.send(dns_name=("fine.test", "www.blocked.test."))
    (said,) = flow.bench.said
    assert said.level == "warning"
    assert "accept by default before, drop by rule 1 from now on; seen: dns_name" in said.message


def test_facts_of_other_elements() -> None:
    flow = Facts({"action": "drop", "facts": {"country": ["x?"]}}, default="accept")
    assert flow.send(b"")
    assert not flow.send(country="xy")


def test_explain_says_which_rule_decided() -> None:
    policy = bench({"action": "drop", "dport": 443, "name": "no web"}, explain=True)
    policy.decide(tcp(A, B))
    policy.decide(tcp(A6, "[fd00::7]:80"))
    assert policy.lines == [
        "policy: tcp 192.0.2.1:40000 -> 198.51.100.7:443 INPUT drop by rule 1 (no web)",
        "policy: tcp [2001:db8::1]:40000 -> [fd00::7]:80 INPUT accept by default",
    ]
    assert policy.said[0].fields["rule"] == "rule 1 (no web)"
    assert policy.said[0].fields["dport"] == 443


def test_what_it_needs_follows_from_its_rules() -> None:
    assert bench({"action": "drop", "dport": 1}).chain.pure
    assert bench({"action": "drop", "dport": 1}).chain.needs is Needs.HEADERS
    by_user = bench({"action": "drop", "uid": 0}).chain
    assert not by_user.pure
    assert by_user.reads_process
    by_name = bench({"action": "drop", "alpn": "h2"}).chain
    assert not by_name.pure
    assert by_name.needs is Needs.FLOW


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"action": "drop", "dst": "10.0.0.0/33"}, "'10.0.0.0/33' is not a valid network; allowed: an address, or a network"),
        ({"action": "drop", "dst": "10.0.0.1/8"}, "did you mean '10.0.0.0/8'?"),
        ({"action": "drop", "dport": 70000}, "70000 is not a valid port; allowed: 0 to 65535"),
        ({"action": "drop", "dport": "9:8"}, "range 9:8 ends before it begins"),
        ({"action": "drop", "protocol": "tpc"}, "'tpc' is not a known protocol; allowed: 0 to 255, icmp"),
        ({"action": "drop", "protocol": ["tcp", "ssh"]}, "allowed: a rule for each kind"),
        ({"action": "drop", "uid": "nobody-such"}, "no user 'nobody-such' on this host"),
        ({"action": "drop", "direction": "in", "hook": "output"}, "no packet goes in in the hook named"),
        ({"action": "drop", "interface": "sixteen-letters-"}, "is not a valid interface name"),
        ({"action": "drop", "dprot": 1}, "dprot"),
        ({"action": "pass"}, "'accept', 'drop' or 'reject'"),
        ({"action": "drop", "tls_sni": []}, "tls_sni"),
    ],
)
def test_what_is_refused(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        bench(rule)
    assert message in str(caught.value)


APP_MAP = """
default = "accept"
rule = [
  { action = "drop", http_host = ["*.blocked.test"] },
  { action = "drop", dns_name = ["*.blocked.test"] },
  { action = "drop", protocol = ["ssh"], dport = [8080] },
]
"""
EGRESS = """
default = "drop"
undecided = "accept"
within = 8
rule = [
  { action = "accept", tls_sni = ["*.stripe.com", "api.example.org"] },
  { action = "accept", dst = ["10.0.0.0/8", "fd00::/8"] },
]
"""


@pytest.mark.parametrize("text", [APP_MAP, EGRESS], ids=["app-map", "egress"])
def test_tables_as_a_file_has_them(text: str) -> None:
    options = PolicyOptions.model_validate(tomllib.loads(text))
    assert Policy("policy", options, lambda *_, **__: None).needs is Needs.FLOW


def test_a_fact_that_is_true_is_written_as_in_toml() -> None:
    class Marks(PacketElement):
        needs = Needs.FLOW

        def decide(self, packet: Packet, flow: Flow | None) -> None:
            assert flow is not None
            flow.facts["ech"] = True

    policy = Bench("policy", before=[(Marks, {})], rule=[{"action": "drop", "facts": {"ech": "true"}}], default="accept")
    assert policy.decide(tcp(A, B)) is DROP


def test_headers_that_cannot_be_read_are_left_to_on_error() -> None:
    policy = bench({"action": "drop", "dport": 443}, default="accept")
    for data in (b"", b"\x45\0", tcp(A6, B6).payload[:42]):
        with pytest.raises(PacketError):
            policy.decide(Packet(data))


@given(
    st.lists(st.text("ab.*?", min_size=1, max_size=6), min_size=1, max_size=5),
    st.text("ab.", max_size=8),
)
def test_patterns_match_as_fnmatch_does(globs: list[str], text: str) -> None:
    assert Patterns(globs).match(text) == any(fnmatch.fnmatchcase(text, glob) for glob in globs)


def test_a_hundred_thousand_names_below_which_all_match_are_no_slower_than_one() -> None:
    many = Patterns(f"*.name-{number}.test" for number in range(100_000))
    began = time.process_time()
    for number in range(1000):
        assert many.match(f"www.name-{number}.test")
        assert not many.match(f"www.other-{number}.test")
    assert time.process_time() - began < 0.5


@pytest.mark.parametrize(("default", "label"), [("accept", "default"), (None, "no rule")])
def test_without_a_default_what_no_rule_matches_is_not_called_the_default(default: str | None, label: str) -> None:
    given: dict[str, Any] = {} if default is None else {"default": default}
    options = {"rule": [{"action": "drop", "dport": 1}], **given}
    assert label in Policy.rules_of(PolicyOptions.from_table(options))
    policy = Policy("p", PolicyOptions.from_table(options), print)
    assert policy.rule(udp("10.0.0.9:5", "10.0.0.1:6"), None) == label
    run = Bench("policy", before=[("dpi", {})], explain=True, rule=[{"action": "drop", "tls_sni": "a.test"}], **given)
    run.decide(tcp("10.0.0.9:5", "10.0.0.1:443", flags="S", seq=1))
    run.decide(tcp("10.0.0.9:5", "10.0.0.1:443", b"GET / HTTP/1.1\r\nHost: b.test\r\n\r\n", seq=2))
    assert run.lines[-1].endswith(f"by {label}")
