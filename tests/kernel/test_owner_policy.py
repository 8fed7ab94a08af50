"""A policy by control group that is compiled into the kernel decides each packet as the policy in Python does."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from judged_twice import Judged, TwoJudges, member_of
from namespace import Namespace
from raw_packets import receive
from resident import Resident

from nfq_agent.checksum import mend
from nfq_agent.config.models import Config
from nfq_agent.host.cgroups import mounted
from nfq_agent.testing import tcp, udp

pytestmark = pytest.mark.kernel

PEER, OWN = "10.9.0.2", "10.9.0.1"
PEER6, OWN6 = "fd00:9::2", "fd00:9::1"
# Listens on both; answers what comes to the first.
ANSWERS, SILENT = 7001, 7002
GROUPS = ["a", "below", "b", "c"]
PLACES = [("127.0.0.1", ANSWERS), ("127.0.0.1", SILENT), (PEER, 53)]
PLACES6 = [("::1", ANSWERS), ("::1", SILENT), (PEER6, 53)]
# By sockets of IPv6, which send packets of IPv4.
MAPPED = [(f"::ffff:{host}", port) for host, port in PLACES]
# The first port of the groups' own, by the network of the senders: no two of their sockets have one port.
SENDERS = {"127.0.0.1": 6100, "::1": 6110, "::ffff:": 6120}
# What a rule may ask for, and how often it does, of ten.
OWNERS: list[dict[str, Any]] = [
    {"unit": ["nfqtest-a*"]}, {"unit": ["machine-*", "nfqtest-a.service"]}, {"unit": ["*"]}, {"container": ["b"]},
    {"cgroup": ["*/nfqtest-c"]}, {"cgroup": ["*/nfqtest-a.service"]}, {"cgroup": ["*below"]}, {"cgroup": ["*.slice"]},
    {"unit": ["*"], "exe": ["/bin/none"]},
]  # fmt: skip
HEADERS: list[tuple[int, list[dict[str, Any]]]] = [
    (3, [{"dport": [ANSWERS]}, {"dport": [SILENT, 6001]}, {"sport": ["6000:6002"]}]),
    (1, [{"dst": ["127.0.0.0/8", "fd00:9::/64"]}, {"dst": ["10.9.0.0/16", "::1"]}, {"src": ["::/1"]}, {"src": ["127.0.0.0/8"]}]),
    (2, [{"protocol": ["tcp"]}, {"protocol": ["udp"]}, {"protocol": ["udp", "icmp"]}]),
    (1, [{"uid": [0]}, {"uid": [7]}, {"hook": ["output"]}, {"hook": ["input"]}]),
    (1, [{"interface": ["lo"]}, {"interface": ["her*"]}]),
]


def rule_of(draw: random.Random, by_owner: bool) -> dict[str, Any]:
    rule: dict[str, Any] = {"action": draw.choice(["accept", "accept", "drop", "drop", "reject"])}
    if by_owner:
        rule |= draw.choice(OWNERS)
    for odds, choices in HEADERS:
        if draw.random() * 10 < odds:
            rule |= draw.choice(choices)
    return rule


def settings_of(draw: random.Random) -> tuple[Any, ...]:
    """Rules, default, whether the kernel keeps flows, and keys of the queue."""
    rules = [rule_of(draw, by_owner=True), *(rule_of(draw, draw.random() < 0.7) for _ in range(draw.randrange(4)))]
    draw.shuffle(rules)
    queue = {"log_drops": draw.random() < 0.2, "mode": draw.choice(["enforce"] * 7 + ["monitor"])}
    return rules, draw.choice([None, "accept", "drop", "drop"]), draw.random() < 0.7, queue


def step_of(draw: random.Random, places: list[tuple[str, int]]) -> tuple[Any, ...]:
    group = draw.choice(GROUPS)
    kind = draw.choice(["udp"] * 6 + ["tcp"] * 8 + ["in"] * 2 + ["remake"] * 4 + ["learn"])
    if kind == "udp":
        return kind, group, draw.choice(places)
    if kind == "tcp":
        return kind, group, draw.choice([6001, 6002]), draw.choice(places), draw.choice(["fin", "rst", "server"])
    if kind == "in":
        return kind, draw.choice(["udp", "tcp"]), draw.randrange(4), draw.choice(places)[0]
    return (kind, draw.choice(["below", "b", "c"])) if kind == "remake" else (kind,)


@pytest.fixture(scope="module")
def resident() -> Iterator[Resident]:
    if mounted() is None:
        pytest.skip("no control groups of version 2 are mounted")
    with Namespace() as namespace:
        namespace.shell(
            "ip link add here address 02:00:00:00:00:01 type veth peer name there; ip link set here up; ip link set there up;"
            f"ip address add {OWN}/24 dev here; ip -6 address add {OWN6}/64 dev here nodad;"
            f"for peer in {PEER} {PEER6}; do ip neigh add $peer lladdr 02:00:00:00:00:02 dev here nud permanent; done;"
            "sysctl -qw net.ipv4.tcp_tw_reuse=1 net.ipv4.tcp_syn_retries=1 net.ipv6.conf.there.disable_ipv6=1"
        )
        made = Resident(namespace)
        try:
            made.call(begin)
            yield made
            made.call(end)
        finally:
            made.kill()


def folders() -> dict[str, Path]:
    root = mounted()
    assert root is not None
    top = f"nfqtest-{os.getpid()}.slice"
    return {
        "a": root / top / "nfqtest-a.service", "below": root / top / "nfqtest-a.service" / "below",
        "b": root / top / "machine-b.scope", "c": root / top / "nfqtest-c",
    }  # fmt: skip


def begin(state: dict[str, Any]) -> None:
    state["groups"] = folders()
    for folder in state["groups"].values():
        folder.mkdir(parents=True)
    state["judges"] = TwoJudges()
    state["servers"] = []
    for place in (*PLACES[:2], *PLACES6[:2]):
        state["servers"].append(socket.create_server(place, family=family_of(place[0])))
        sock = socket.socket(family_of(place[0]), socket.SOCK_DGRAM)
        sock.bind(place)
        state["servers"].append(sock)
    for each in state["servers"]:
        each.setblocking(False)
    state["senders"] = {}


def family_of(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def opened(group: Path, host: str, kind: socket.SocketKind, port: int) -> socket.socket:
    """A socket of a group to send to a host from a port, which may be in use by others that are closed."""
    family = family_of(host)
    with member_of(group):
        made = socket.socket(family, kind)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not host.startswith("::ffff:"))
    made.setblocking(False)
    with contextlib.suppress(OSError):
        made.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", port))
    return made


def end(state: dict[str, Any]) -> None:
    for name in ("below", "a", "b", "c"):
        state["groups"][name].rmdir()
    state["groups"]["a"].parent.rmdir()


def config_of(rules: list[dict[str, Any]], default: str | None, offload: bool, **queue: Any) -> Config:
    element: dict[str, Any] = {"type": "policy", "rule": rules} | ({} if default is None else {"default": default})
    return Config.model_validate({
        "agent": {"backend": "owned"},
        "queue": {"main": {"num": 100, "compile": "auto", "elements": ["allow", "offload"][: 1 + offload], **queue}},
        "element": {"allow": element, "offload": {"mark": "0x4e000000/0xff000000"}},
        "rules": {"app": {"queue": "main", "hooks": ["output", "input"], "tcp_ports": ["1:65535"], "udp_ports": ["1:65535"]}},
    })  # fmt: skip


def carried_out(state: dict[str, Any], chosen: tuple[Any, ...], steps: list[tuple[Any, ...]]) -> list[Judged]:
    """Every packet of these steps."""
    judges: TwoJudges = state["judges"]
    judges.judged = []
    judges.configure(config_of(*chosen[:-1], **chosen[-1]))
    for step in steps:
        DONE[step[0]](state, *step[1:])
        judges.pump()
    for name in GROUPS:
        close_senders(state, name)
    judges.pump()
    judges.forget()
    # Without rules of ours connections end, and what they left is not in the way of the next example.
    judges.pump()
    flush()
    return judges.judged


def flush() -> None:
    """Forget what connection tracking has."""
    for family in ("ipv4", "ipv6"):
        subprocess.run(["conntrack", "-F", "-f", family], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)


def sends(state: dict[str, Any], group: str, to: tuple[str, int]) -> None:
    """A datagram, from a port of the group's own, and its answer."""
    first = sending_port(to[0])
    sender = state["senders"].get((group, first))
    if sender is None:
        sender = opened(state["groups"][group], to[0], socket.SOCK_DGRAM, first + GROUPS.index(group))
        state["senders"][group, first] = sender
    with contextlib.suppress(OSError):
        sender.sendto(b"x", to)
    state["judges"].pump()
    for server in state["servers"]:
        with contextlib.suppress(BlockingIOError):
            if server.type == socket.SOCK_DGRAM and (received := server.recvfrom(100)) and server.getsockname()[1] == ANSWERS:
                server.sendto(b"y", received[1])


def sending_port(host: str) -> int:
    """The port of the first group's sender to a host."""
    return SENDERS["::ffff:" if host.startswith("::ffff:") else "::1" if ":" in host else "127.0.0.1"]


def connects(state: dict[str, Any], group: str, sport: int, to: tuple[str, int], how: str) -> None:
    """A connection from a port that others use as well, some bytes each way, and its end."""
    judges: TwoJudges = state["judges"]
    with opened(state["groups"][group], to[0], socket.SOCK_STREAM, sport) as client:
        with contextlib.suppress(OSError):
            client.connect_ex(to)
            judges.pump()
            client.send(b"x")
        judges.pump()
        for listener in state["servers"]:
            with contextlib.suppress(OSError):
                if listener.type == socket.SOCK_STREAM:
                    accepted = listener.accept()[0]
                    with accepted:
                        accepted.send(b"y")
                        judges.pump()
                        if how == "server":
                            accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                            accepted.close()
                            judges.pump()
        if how == "rst":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    judges.pump()


def comes_in(state: dict[str, Any], kind: str, place: int, host: str) -> None:
    """A packet from outside to the port of one of the groups: a flow that begins there, or an answer. host: what they send to."""
    peer, own = (f"[{PEER6}]", f"[{OWN6}]") if host in dict(PLACES6) else (PEER, OWN)
    port = sending_port(host) + place if kind == "udp" else 6001 + place % 2
    made = udp(f"{peer}:53", f"{own}:{port}", b"z") if kind == "udp" else tcp(f"{peer}:443", f"{own}:{port}", flags="S")
    receive(mend(made.payload))


def close_senders(state: dict[str, Any], group: str) -> None:
    for key in [key for key in state["senders"] if key[0] == group]:
        state["senders"].pop(key).close()


def remakes(state: dict[str, Any], group: str) -> None:
    """The group is removed and made again, as that of a service that starts again. The rules do not know it yet."""
    close_senders(state, group)
    state["groups"][group].rmdir()
    state["groups"][group].mkdir()


def learns(state: dict[str, Any]) -> None:
    state["judges"].learn()


DONE: dict[str, Callable[..., None]] = {"udp": sends, "tcp": connects, "in": comes_in, "remake": remakes, "learn": learns}


@pytest.mark.parametrize("places", [PLACES, [*PLACES6, *PLACES6, *PLACES, *MAPPED]], ids=["ipv4", "ipv6"])
@settings(max_examples=12, deadline=None, phases=(Phase.generate,), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 32))
def test_each_packet_gets_the_verdict_of_the_policy_in_python(
    resident: Resident, places: list[tuple[str, int]], seed: int
) -> None:
    draw = random.Random(seed)
    chosen, steps = settings_of(draw), [step_of(draw, places) for _ in range(25)]
    found = resident.call(carried_out, chosen, steps)
    wrong = [each for each in found if each.expected != each.passed]
    assert not wrong, f"{wrong[0]} with {chosen}\n" + "\n".join(map(str, [*steps, *found]))
