"""A policy that is compiled into the kernel decides each packet as the policy in Python does, by the same rule."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from namespace import Namespace
from raw_packets import receive, send
from resident import Resident

from nfq_agent.checksum import mend
from nfq_agent.config.models import Config
from nfq_agent.element_chain import ElementChain
from nfq_agent.elements import packet_element
from nfq_agent.host.nftables.owned import OwnedHost
from nfq_agent.packet import Hook, Packet
from nfq_agent.rules.kernel_policy import kernel_rules, names_of, reasons
from nfq_agent.rules.model import FAMILIES, tag_prefix
from nfq_agent.rules.plan import plan
from nfq_agent.testing import icmp, tcp, udp
from nfq_agent.verdict import ACCEPT, Action

pytestmark = pytest.mark.kernel

UID = 972
LO = 1
SOURCES = ["10.1.0.1", "10.1.0.200", "10.2.0.1"]
DESTINATIONS = ["10.1.0.2", "10.3.0.1", "10.3.255.255", "10.4.0.0"]
SOURCES6 = ["fd01::1", "fd02::1"]
DESTINATIONS6 = ["fd01::2", "fd03::1"]


def networks(*more: str) -> st.SearchStrategy[list[str]]:
    each = ["10.1.0.0/24", "10.1.0.0/16", "10.3.0.0/16", "10.3.255.255", "fd01::/16", "fd03::1", *more]
    return st.lists(st.sampled_from(each), min_size=1, max_size=3, unique=True)


PORTS = st.lists(st.sampled_from([53, 80, "80:443", "0:65535", 8080]), min_size=1, max_size=2)
CONDITIONS = st.fixed_dictionaries(
    {"action": st.sampled_from(["accept", "drop"])},
    optional={
        "src": networks(), "dst": networks("0.0.0.0/0"), "sport": PORTS, "dport": PORTS,
        "protocol": st.lists(st.sampled_from(["tcp", "udp", "icmp", "icmpv6", 17]), min_size=1, max_size=2, unique=True),
        "interface": st.sampled_from([["lo"], ["l*"], ["there*"], ["here", "lo"], ["?o"]]),
        "direction": st.sampled_from(["in", "out"]),
        "hook": st.lists(st.sampled_from(["input", "output"]), min_size=1, max_size=2, unique=True),
        "uid": st.sampled_from([[0], [0, 7], [7]]),
        "gid": st.sampled_from([[0], [7]]),
    },
).filter(lambda rule: not (rule.get("direction") == "in" and rule.get("hook") == ["output"])).filter(
    lambda rule: not (rule.get("direction") == "out" and rule.get("hook") == ["input"])
)  # fmt: skip
# Many of one shape, that the kernel has as a map.
MANY = st.builds(
    lambda base, keys, actions: [
        {
            "action": action,
            **({"dst": [f"10.{base + number}.0.0/16", f"fd0{number}::/16"]} if "dst" in keys else {}),
            **({"src": ["10.1.0.0/16", f"fd0{number % 3}::/16"]} if "src" in keys else {}),
            **({"dport": [f"{50 * number + 1}:{50 * number + 50}"]} if "dport" in keys else {}),
            **({"protocol": [["tcp", "udp"], ["icmp", "udp"], ["tcp"]][number % 3]} if "protocol" in keys else {}),
        }
        for number, action in enumerate(actions)
    ],
    st.sampled_from([0, 1]),
    st.sampled_from([("dst",), ("dst", "dport"), ("src", "dst", "protocol"), ("dport", "protocol"), ("src", "dport")]),
    st.lists(st.sampled_from(["accept", "drop"]), min_size=8, max_size=10),
)
PACKETS = st.one_of(
    st.builds(
        lambda kind, src, dst, sport, dport: kind(f"{src}:{sport}", f"{dst}:{dport}", b"x"),
        st.sampled_from([tcp, udp]), st.sampled_from(SOURCES), st.sampled_from(DESTINATIONS), st.sampled_from([53, 79, 40000]),
        st.sampled_from([53, 80, 443, 444, 8080]),
    ),
    st.builds(
        lambda kind, src, dst, sport, dport: kind(f"[{src}]:{sport}", f"[{dst}]:{dport}", b"x"),
        st.sampled_from([tcp, udp]), st.sampled_from(SOURCES6), st.sampled_from(DESTINATIONS6), st.sampled_from([53, 40000]),
        st.sampled_from([53, 80, 444]),
    ),
    # The answer to a new connection.
    st.builds(
        lambda src, dst, sport, dport: tcp(f"{src}:{sport}", f"{dst}:{dport}", flags="SA"),
        st.sampled_from(SOURCES), st.sampled_from(DESTINATIONS), st.sampled_from([80, 443]), st.sampled_from([40000, 8080]),
    ),
    st.builds(icmp, st.sampled_from(SOURCES), st.sampled_from(DESTINATIONS)),
    st.builds(icmp, st.sampled_from(SOURCES6), st.sampled_from(DESTINATIONS6)),
)  # fmt: skip
SELECTED: list[dict[str, Any]] = [
    {"all": True}, {"tcp_ports": [80, 443], "udp_ports": ["1:65535"]}, {"protocol": ["udp"]},
    {"all": True, "not_tcp_ports": [80]},
    {"all": True, "src": ["10.1.0.0/16", "fd01::/16"]}, {"all": True, "interface": ["lo"]},
]  # fmt: skip


@pytest.fixture(scope="module")
def resident() -> Iterator[Resident]:
    with Namespace() as namespace:
        namespace.shell(
            "ip link add here address 02:00:00:00:00:01 type veth peer name there; ip link set here up; ip link set there up"
        )
        namespace.shell(
            "sysctl -qw net.ipv4.conf.all.accept_local=1 net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.here.rp_filter=0"
        )
        # What is sent arrives nowhere, and nothing answers: the kernel sends nothing of its own.
        namespace.shell("nft add table inet apart; nft 'add chain inet apart in { type filter hook prerouting priority -500; }'")
        namespace.shell("nft 'add chain inet apart out { type filter hook output priority -500; }'")
        for rule in (
            "in iifname lo drop", "out tcp flags & rst == rst drop", "out icmp type != echo-request drop",
            "out icmpv6 type != echo-request drop",
        ):  # fmt: skip
            namespace.shell(f"nft 'add rule inet apart {rule}'")
        for family, nets in (("-4", ("10.0.0.0/8",)), ("-6", ("fd01::/16", "fd02::/16", "fd03::/16"))):
            for net in nets:
                namespace.run("ip", family, "route", "add", "local", net, "dev", "lo")
        made = Resident(namespace)
        yield made
        made.kill()


def counted(host: OwnedHost) -> dict[tuple[str, str], int]:
    """Packets by chain and tag; a rule of a map has the tag that it would have by itself."""
    found: dict[tuple[str, str], int] = {}
    for family in FAMILIES:
        for table in host.read(family).values():
            for each in table.installed:
                counts = dict(each.by_number)
                for tag, packets in zip(names_of(each.rule.tag, counts), counts.values() or (each.packets,), strict=True):
                    # The hooks share a map.
                    key = "" if each.by_number else each.rule.chain, tag
                    found[key] = found.get(key, 0) + packets
    return found


def prepare(state: dict[str, Any], config: Config) -> OwnedHost:
    """The rules of this configuration, in force."""
    host: OwnedHost = state.setdefault("host", OwnedHost("default"))
    ruleset = plan(config, UID, lists=True)
    host.apply_all({family: ruleset.get(family, {}) for family in FAMILIES})
    return host


def passed(state: dict[str, Any], config: Config, packets: list[bytes], inward: bool = False) -> list[list[str]]:
    """The tags of the rules in OUTPUT, or INPUT, that took each packet."""
    host = prepare(state, config)
    taken = []
    for data in packets:
        before = counted(host)
        (receive if inward else send)(data)
        after = counted(host)
        hook = "INPUT" if inward else "OUTPUT"
        taken.append(
            sorted(
                tag
                for (chain, tag), count in after.items()
                if (hook in chain or not chain) and count > before.get((chain, tag), 0)
            )
        )
    return taken


def config_of(rules: list[dict[str, Any]], default: str | None, selected: Mapping[str, Any], **queue: Any) -> Config:
    element: dict[str, Any] = {"type": "policy", "rule": rules} | ({} if default is None else {"default": default})
    return Config.model_validate({
        "agent": {"backend": "owned"},
        "queue": {"main": {"num": 100, "compile": "auto", "elements": ["allow"], "log_drops": False, **queue}},
        "element": {"allow": element},
        "rules": {"app": {"queue": "main", "hooks": ["output", "input"], **selected}},
    })  # fmt: skip


def decided_in_python(state: dict[str, Any], config: Config, data: bytes, inward: bool) -> tuple[Action, str]:
    """The verdict and the label of the rule that gives it. It is asked in the namespace, for the names of interfaces."""
    del state
    packet = (
        Packet(data, hook=Hook.INPUT, indev=socket.if_nametoindex("here"))
        if inward
        else Packet(data, hook=Hook.OUTPUT, outdev=LO, uid=0, gid=0)
    )
    (spec,) = config.packet_elements(config.queue["main"])
    element = packet_element("policy")("allow", spec.options, lambda *_, **__: None)
    chain = ElementChain([element], ACCEPT)
    verdict = chain.decide(packet, None)
    return verdict.action, chain.reason(packet, None)[1]


@settings(max_examples=30, deadline=None, phases=(Phase.generate,), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rules=st.tuples(st.lists(CONDITIONS, max_size=4), st.one_of(st.just([]), MANY), st.lists(CONDITIONS, max_size=2)),
    default=st.sampled_from([None, "accept", "drop"]), selected=st.sampled_from(SELECTED),
    packets=st.lists(PACKETS, min_size=1, max_size=5), monitor=st.booleans(), inward=st.booleans(), logged=st.booleans(),
)  # fmt: skip
def test_each_packet_is_decided_by_the_same_rule(  # one for each thing that differs
    resident: Resident, rules: tuple[list[dict[str, Any]], ...], default: str | None, selected: dict[str, Any],
    packets: list[Packet], monitor: bool, inward: bool, logged: bool,
) -> None:  # fmt: skip
    listed = [rule for part in rules for rule in part]
    config = config_of(listed, default, selected, mode="monitor" if monitor else "enforce", log_drops=logged)
    compiled = {each.label: each.action for each in kernel_rules(config, config.queue["main"])[1]}
    taken = resident.call(passed, config, [packet.payload for packet in packets], inward)
    prefix = tag_prefix("default")
    labels = {f"{prefix}{name}": label for name, (_, _, label) in reasons(config).items()}
    for packet, tags in zip(packets, taken, strict=True):
        action, label = resident.call(decided_in_python, config, packet.payload, inward)
        tags = [tag for tag in tags if not tag.endswith((":jump", ":end", ":own-traffic"))]
        where = f"{packet!r}: {tags} instead of {action.name} by {label} of {rules}, {default}, {selected}"
        if not tags:
            # It is not among what is selected: it would not be in Python.
            continue
        in_kernel = [labels[tag] for tag in tags if tag in labels]
        if in_kernel:
            assert in_kernel == [label], where
            assert Action[compiled[label].upper()] is action, where
        else:
            assert tags == [f"{prefix}app"], where
            # The only rules that the kernel leaves to the worker; and a hundred drops, for their lines.
            closed_icmp6 = label in ("default", "needed by the link") and packet.payload[0] >> 4 == 6
            left = closed_icmp6 or "?o" in str(rules) or selected.get("interface") or (logged and action is Action.DROP)
            users = any("uid" in rule or "gid" in rule for rule in listed)
            answers_first = users and packet.headers.tcp_flags is not None and packet.headers.tcp_flags & 0x12 == 0x12
            assert label not in compiled or left or answers_first or (users and inward), where


def test_a_reload_changes_the_rules_and_what_is_not_asked_for_stays_in_the_queue(resident: Resident) -> None:
    drop = {"action": "drop", "dst": ["10.3.0.0/16"], "dport": [80]}
    packet = tcp("10.1.0.1:40000", "10.3.0.1:80", b"x").payload
    other = udp("10.1.0.1:40000", "10.3.0.1:53", b"x").payload
    prefix = tag_prefix("default")

    def took(config: Config) -> list[str]:
        return [
            next(tag for tag in tags if not tag.endswith((":jump", ":end"))).removeprefix(prefix)
            for tags in resident.call(passed, config, [packet, other])
        ]

    assert took(config_of([drop], None, {"all": True})) == ["app.allow.1", "app"]
    assert took(config_of([drop], "accept", {"all": True})) == ["app.allow.1", "app.allow.default"]
    assert took(config_of([{"action": "accept"}, drop], "drop", {"all": True})) == ["app.allow.1", "app.allow.1"]
    # Monitor mode drops nothing; names, and others that listen, need the packets.
    assert took(config_of([drop], "accept", {"all": True}, mode="monitor")) == ["app", "app"]
    assert took(config_of([drop], "accept", {"all": True}, compile="off")) == ["app", "app"]
    named = {"action": "drop", "http_host": ["*.evil.test"]}
    assert took(config_of([drop, named], "accept", {"all": True})) == ["app", "app"]
    assert took(config_of([drop], "accept", {"all": True}, elements=["allow", "log"])) == ["app", "app"]


def test_a_map_changes_with_the_policy_and_what_stays_goes_on_counting(resident: Resident) -> None:
    rules = [{"action": "drop", "dst": [f"10.{number}.0.0/16"], "dport": [80]} for number in range(1, 31)]
    packet = tcp("10.1.0.1:40000", "10.3.0.1:80", b"x").payload

    def count(config: Config) -> int:
        resident.call(passed, config, [packet])
        return sum(value for (_, tag), value in resident.call(totals).items() if tag.endswith(":app.allow.3"))

    assert count(config_of(rules, "accept", {"all": True})) == 1
    assert count(config_of(rules[:-1], "accept", {"all": True})) == 1
    assert count(config_of(rules[:-1], "drop", {"all": True})) == 2
    changed = [*rules[:2], {**rules[2], "action": "accept"}, *rules[3:-1]]
    assert count(config_of(changed, "drop", {"all": True})) == 1


def totals(state: dict[str, Any]) -> dict[tuple[str, str], int]:
    return counted(state["host"])


def at_output(found: dict[tuple[str, str], int]) -> dict[str, int]:
    """By rule, what was counted of outgoing packets."""
    return {tag.rpartition(":")[2]: count for (chain, tag), count in found.items() if "OUTPUT" in chain and count}


def test_where_drops_are_logged_the_worker_gets_as_many_a_second_as_it_writes_lines(resident: Resident) -> None:
    config = config_of([{"action": "drop", "dport": [80]}], "accept", {"all": True}, log_drops=True)
    packet = tcp("10.1.0.1:40000", "10.3.0.1:80", b"x").payload
    taken = at_output(resident.call(flooded, config, packet, 1000))
    assert taken["app"] + taken["app.allow.1"] == 1000
    assert 100 <= taken["app"] < 900


@pytest.mark.parametrize("selected", [{"all": True}, {"tcp_ports": [80], "udp_ports": [80]}])
def test_what_passes_a_map_where_drops_are_logged_takes_the_default(resident: Resident, selected: dict[str, Any]) -> None:
    rules = [{"action": "drop", "dst": [f"10.{number}.0.0/16"], "dport": [80]} for number in range(3, 13)]
    config = config_of(rules, "accept", selected, log_drops=True)
    meant, other = (tcp("10.1.0.1:40000", f"10.{number}.0.1:80", b"x").payload for number in (3, 1))
    found = resident.call(flooded, config, meant, 1000)
    taken = at_output(found) | {"dropped": sum(count for (_, tag), count in found.items() if tag.endswith(":app.allow.1"))}
    assert taken.keys() == {"jump", "app", "dropped"}
    assert 100 <= taken["app"] == 1000 - taken["dropped"] < 900
    assert at_output(resident.call(flooded, config, other, 10)) == {"app.allow.default": 10}
    if "all" in selected:  # One that is too short for ports, for an address that has an entry.
        assert at_output(resident.call(flooded, config, meant[:22], 10)) == {"jump": 10, "app.allow.default": 10}


def flooded(state: dict[str, Any], config: Config, packet: bytes, count: int) -> dict[tuple[str, str], int]:
    """What the rules counted of the sent packets."""
    host = prepare(state, config)
    host.apply_all({family: {} for family in FAMILIES})
    prepare(state, config)
    for _ in range(count):
        send(packet)
    return counted(host)


def test_the_answer_to_a_connection_goes_to_the_queue_where_a_user_is_asked_for(resident: Resident) -> None:
    """nf_tables takes the listener's user for that of the answer, and the worker learns of none."""
    rules = [{"action": "accept", "uid": [0]}, {"action": "drop", "uid": [7]}]
    opening, answer = resident.call(connected, config_of(rules, None, {"tcp_ports": [8181]}))
    assert opening == ["app.allow.1"]
    assert answer == ["app"]


def connected(state: dict[str, Any], config: Config) -> tuple[list[str], list[str]]:
    """The rules that the first packet of a connection takes in OUTPUT, and its answer."""
    host = prepare(state, config)

    def taken(call: Callable[[], object]) -> list[str]:
        before = counted(host)
        call()
        grown = {tag for (chain, tag), count in counted(host).items() if "OUTPUT" in chain and count > before[chain, tag]}
        return sorted(tag.removeprefix(tag_prefix("default")) for tag in grown if not tag.endswith((":jump", ":end")))

    with socket.create_server(("10.1.0.9", 8181)), socket.socket() as client:
        client.setblocking(False)
        opening = taken(lambda: client.connect_ex(("10.1.0.9", 8181)))
        data = mend(tcp("10.1.0.8:40001", "10.1.0.9:8181", flags="S").payload)
        return opening, taken(lambda: receive(data))


def test_first_packets_go_to_the_queue_at_a_rate_and_those_beyond_it_are_counted(resident: Resident) -> None:
    config = config_of(
        [{"action": "drop", "dport": [80]}], "accept", {"all": True}, compile="first", elements=["allow", "record"]
    )
    packet = udp("10.1.0.1:40000", "10.3.0.1:80", b"x").payload
    taken = at_output(resident.call(flooded, config, packet, 1000))
    # Nothing serves the queue, so that what goes there passes.
    assert 100 <= taken["app"] < 900
    assert taken["app.allow.unrecorded"] == taken["app.allow.1"] == 1000 - taken["app"]


def test_only_the_first_packet_of_a_connection_goes_to_the_queue() -> None:
    config = config_of(
        [{"action": "accept", "protocol": ["tcp"]}], "drop", {"tcp_ports": [8182]}, compile="first", elements=["allow", "record"]
    )
    with Namespace() as namespace:
        resident = Resident(namespace)
        found = resident.call(talked, config)
        resident.kill()
    taken = at_output(found)
    assert taken["app"] == 1
    assert taken["app.allow.1"] >= 6
    assert "app.allow.unrecorded" not in taken


def talked(state: dict[str, Any], config: Config) -> dict[tuple[str, str], int]:
    """What the rules counted of a whole connection."""
    host = prepare(state, config)
    host.apply_all({family: {} for family in FAMILIES})
    prepare(state, config)
    with (
        socket.create_server(("127.0.0.1", 8182)) as listener,
        socket.create_connection(listener.getsockname()) as client,
        listener.accept()[0] as server,
    ):
        for _ in range(3):
            client.sendall(b"x")
            assert server.recv(1) == b"x"
            server.sendall(b"y")
            assert client.recv(1) == b"y"
    return counted(host)
