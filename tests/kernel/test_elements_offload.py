"""Offload: the marks, the rules, and flows that leave the queue and are taken back, in a kernel with a real agent."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from agent import Agent, until
from hypothesis import given
from hypothesis import strategies as st
from namespace import Namespace
from pydantic import ValidationError

from nfq_agent.config.file import load
from nfq_agent.config.models import Config, ConfigError
from nfq_agent.element import ElementChain
from nfq_agent.flow import Flow
from nfq_agent.mark import Mark, kept
from nfq_agent.packet import Packet
from nfq_agent.rules.plan import plan
from nfq_agent.service.policy_generation import advance, foreseen
from nfq_agent.testing import Bench, tcp
from nfq_agent.verdict import ACCEPT, DROP, Action, Verdict

MARK = "0x4e000000/0xff000000"
A, B = "192.0.2.1:40000", "198.51.100.7:443"


@given(st.integers(1, 0xFFFFFFFF), st.integers(0, 0xFFFFFFFF), st.integers(0, 1000))
def test_all_marks_lie_under_the_mask_and_none_is_zero(mask: int, value: int, generation: int) -> None:
    if mask.bit_count() < 3 or not value & mask:
        return
    given_mark = Mark(value & mask, mask)
    now, then = kept(given_mark, generation), kept(given_mark, generation + 1)
    values = {mark.value for mark in (*now, *then)}
    assert len(values) == 4
    assert 0 not in values
    assert all(each & ~mask == 0 for each in values)
    assert kept(given_mark, 0).accept == given_mark
    rounds = ((1 << mask.bit_count()) - 1) // 2
    assert kept(given_mark, generation + rounds) == now


def test_other_bits_stay() -> None:
    assert Mark(0x4E000000, 0xFF000000).on(0x12345678) == 0x4E345678


def bench(before: Any = (), **options: Any) -> Bench:
    return Bench("offload", before=before, mark=MARK, **options)


POLICY = ("policy", {"default": "accept", "rule": [{"action": "drop", "dport": 9}]})


def test_a_lasting_verdict_becomes_a_mark() -> None:
    chain = bench([POLICY])
    assert chain.decide(tcp(A, B, mark=0x10)) == Verdict(Action.REPEAT, mark=0x4E000010, means=Action.ACCEPT)
    assert chain.decide(tcp(A, "192.0.2.2:9")) == Verdict(Action.REPEAT, mark=0x4F000000, means=Action.DROP)


def test_a_packet_that_comes_round_unsaved_is_answered_plainly_and_said_once() -> None:
    chain = bench([POLICY])
    for _ in range(2):
        assert chain.decide(tcp(A, B, mark=0x4E000010)) is ACCEPT
    assert chain.decide(tcp(A, "192.0.2.2:9", mark=0x4F000000)) is DROP
    (line,) = chain.lines
    assert "belongs to no tracked connection" in line


def test_what_judges_single_packets_is_not_made_to_last() -> None:
    limited = [("rate-limit", {"rate": "1/h"}), POLICY]
    chain = bench(limited)
    assert [chain.decide(tcp(A, B)) for _ in range(2)] == [ACCEPT, DROP]


def test_a_flow_that_is_undecided_stays() -> None:
    by_name = ("policy", {"default": "drop", "rule": [{"action": "accept", "tls_sni": "*.test"}]})
    chain = bench([by_name])
    packet = tcp(A, B)
    flow = chain.flow(packet)
    assert isinstance(flow, Flow)
    assert chain.chain.decide(packet, flow) is ACCEPT
    flow.facts.update(tls_sni="a.test", dpi="decided")
    assert chain.chain.decide(packet, flow).mark == 0x4E000000


def test_in_monitor_mode_a_drop_stays_a_drop_for_the_worker_to_see() -> None:
    elements = bench([POLICY]).elements
    chain = ElementChain(elements, ACCEPT, monitor=True)
    assert chain.decide(tcp(A, "192.0.2.2:9"), None) is DROP


def test_in_monitor_mode_no_verdict_on_a_packet_by_itself_hides_drops_of_the_other_direction() -> None:
    chain = ElementChain(bench([POLICY]).elements, ACCEPT, monitor=True)
    assert chain.decide(tcp("192.0.2.2:9", A), None) is ACCEPT


def test_in_monitor_mode_a_flow_that_would_have_been_dropped_is_not_offloaded_and_others_are() -> None:
    by_fact = ("policy", {"default": "accept", "rule": [{"action": "drop", "facts": {"country": "x?"}}]})
    front = bench([by_fact, POLICY])
    chain = ElementChain(front.elements, ACCEPT, monitor=True)

    def decide(packet: Packet) -> Verdict:
        flow = front.flow(packet)
        assert flow is not None
        flow.facts.update(dpi="decided")
        return chain.decide(packet, flow)

    assert decide(tcp(A, B)).mark == 0x4E000000
    # By packet, in a chain that has flows.
    chain = ElementChain(bench([("policy", {**by_fact[1], "default": None}), POLICY]).elements, ACCEPT, monitor=True)
    assert decide(tcp(A, "192.0.2.2:9")) is DROP
    assert decide(tcp("192.0.2.2:9", A)) is ACCEPT
    assert decide(tcp("192.0.2.3:80", A)).mark == 0x4E000000


def test_nothing_collides_by_default(tmp_path: Path) -> None:
    proxy = '[proxy.p]\nlisten = ["0.0.0.0:15002"]\ncapture = "tproxy"\n'
    rule = '[rules.p]\nproxy = "p"\nhooks = ["prerouting"]\ntcp_ports = [80]\n'
    assert not config(tmp_path, more=proxy + rule).proxy["p"].tproxy_mark.mask & 0xFF000000


@pytest.mark.parametrize("mark", ["0x0/0xff", "0x1/0x3", "0x100/0xff"])
def test_marks_without_room_are_refused(mark: str) -> None:
    with pytest.raises(ValidationError, match="allowed"):
        Bench("offload", mark=mark)


CONFIG = """
[queue.q]
num = 110
elements = ["allow", "offload"]
{queue}
[element.allow]
type = "policy"
default = "accept"
rule = [{{ action = "drop", dport = [{denied}] }}]
[element.offload]
mark = "0x4e000000/0xff000000"
[rules.r]
queue = "q"
tcp_ports = [8080, 8081]
{rule}
"""


def config(folder: Path, denied: str = "9", queue: str = "", rule: str = "", more: str = "") -> Config:
    path = folder / "c.toml"
    path.write_text(CONFIG.format(denied=denied, queue=queue, rule=rule) + more)
    return load(path)


def test_the_rules(tmp_path: Path) -> None:
    chain = plan(config(tmp_path), 999)["inet"]["mangle"].chains["NFQA-default-OUTPUT"]
    tag = '-m comment --comment "nfq-agent:default:'
    assert [rule.spec for rule in chain] == [
        f'-m mark ! --mark 0x0/0xff000000 {tag}offload-new" -j CONNMARK --save-mark --nfmask 0xff000000 --ctmask 0xff000000',
        f'-m connmark --mark 0x4e000000/0xff000000 {tag}offload-accepted" -j RETURN',
        f'-m connmark --mark 0x4f000000/0xff000000 {tag}offload-denied" -j DROP',
        f'-p tcp -m multiport --ports 8080,8081 -m owner ! --uid-owner 999 {tag}r" -j NFQUEUE --queue-num 110 --queue-bypass',
    ]


def test_another_queue_s_traffic_is_not_let_past_that_queue(tmp_path: Path) -> None:
    more = '[queue.other]\nnum = 111\n[rules.other]\nqueue = "other"\ntcp_ports = [9090]\n'
    chain = plan(config(tmp_path, more=more), 999)["inet6"]["mangle"].chains["NFQA-default-INPUT"]
    (passing,) = [rule for rule in chain if rule.tag.endswith("offload-accepted")]
    assert passing.spec.startswith("-p tcp -m multiport --ports 8080,8081 -m connmark --mark 0x4e000000/0xff000000")


def test_table_raw_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"rules\.r\.table: table raw comes before connection tracking.*allowed: mangle, filter"
    ):
        config(tmp_path, rule='table = "raw"\nhooks = ["output"]')


@pytest.mark.parametrize(
    ("more", "other"),
    [
        (
            '[queue.o]\nnum = 9\nelements = ["o"]\n[element.o]\ntype = "offload"\nmark = "0x1000000/0xf000000"\n'
            '[rules.o]\nqueue = "o"\ntcp_ports = [9]\n',
            "element.offload.mark = 0x4e000000/0xff000000",
        ),
        ('[proxy.p]\nlisten = ["127.0.0.1:15002"]\nmark = "0x1000000/0x1000000"\n', "proxy.p.mark = 0x1000000/0x1000000"),
    ],
)
def test_marks_that_share_bits_are_refused(tmp_path: Path, more: str, other: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"shares bits with {other}; allowed: bits of its own for each")):
        config(tmp_path, more=more)


def test_generations(tmp_path: Path) -> None:
    state = tmp_path / "default.generations"

    def generation(**changes: str) -> int:
        changed = config(tmp_path, **changes)
        expected = foreseen(changed, state)
        advanced = advance(changed, state)
        assert advanced == expected
        return int(advanced.element["offload"]["generation"])

    assert generation() == 0
    assert generation() == 0
    assert generation(denied="8080") == 1
    assert generation(queue='mode = "monitor"') == 2
    assert generation() == 3
    assert generation(rule='hooks = ["output"]') == 3
    state.write_text("{")
    assert generation() == 0


# In a kernel.

HOSTS = pytest.mark.parametrize("host", ["127.0.0.1", "::1"])


def connections(netns: Namespace, host: str, port: int) -> list[int]:
    """The connection marks of the established connections to a port."""
    family = "ipv6" if ":" in host else "ipv4"
    listing = netns.run("conntrack", "-L", "-f", family, "-p", "tcp", "--dport", str(port), check=False).stdout
    return [int(mark) for mark in re.findall(r"ESTABLISHED.* mark=(\d+)", listing)]


class Client:
    """A connection to an echo server, both in the namespace, driven line by line."""

    CODE = (
        "import socket, sys\n"
        "connection = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=20)\n"
        "print('connected', flush=True)\n"
        "for line in sys.stdin:\n"
        "    size, seconds = line.split()\n"
        "    connection.settimeout(float(seconds))\n"
        "    data = b'x' * int(size)\n"
        "    try:\n"
        "        connection.sendall(data)\n"
        "        got = 0\n"
        "        while got < len(data): got += len(connection.recv(1 << 20))\n"
        "        print('echoed', flush=True)\n"
        "    except TimeoutError:\n"
        "        print('silence', flush=True)\n"
        "        connection.settimeout(20)\n"
    )

    def __init__(self, netns: Namespace, host: str, port: int) -> None:
        pipe = subprocess.PIPE
        self.process = netns.start(sys.executable, "-c", self.CODE, host, str(port), stdin=pipe, stdout=pipe)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"connected\n"

    def echo(self, size: int, seconds: float = 20) -> bool:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(b"%d %f\n" % (size, seconds))
        self.process.stdin.flush()
        return bool(self.process.stdout.readline() == b"echoed\n")


SERVER = Path(__file__).parent.parent / "support" / "tcp_server.py"


def serve(netns: Namespace, host: str, port: int) -> None:
    server = netns.start(sys.executable, str(SERVER), "echo", host, str(port), stdout=subprocess.PIPE)
    assert server.stdout is not None
    assert server.stdout.readline()


@pytest.mark.kernel
@HOSTS
def test_a_flow_leaves_the_queue_and_marks_of_others_stay(netns: Namespace, tmp_path: Path, host: str) -> None:
    tables = "ip6tables-legacy" if ":" in host else "iptables-legacy"
    netns.shell(
        f"{tables} -t mangle -A PREROUTING -j CONNMARK --set-xmark 0x5/0xff\n"
        f"{tables} -t mangle -A OUTPUT -p tcp --dport 8080 -j MARK --set-xmark 0x700/0xff00\n"
        f"{tables} -t mangle -A POSTROUTING -p tcp --dport 8080 -m mark --mark 0x700/0xff00\n"
        f"{tables} -t mangle -A POSTROUTING -p tcp --dport 8080 -m mark ! --mark 0x700/0xff00"
    )
    serve(netns, host, 8080)
    agent = Agent(netns, tmp_path, CONFIG.format(denied="9", queue="", rule="")).ready()
    client = Client(netns, host, 8080)
    assert client.echo(5_000_000)
    (mark,) = connections(netns, host, 8080)
    assert mark == 0x4E000005
    seen = agent.totals("q")
    # The SYN alone: it decides for both directions.
    assert seen["received"] == seen["accepted"] == 1
    assert seen["marked"] == 1
    offloaded = agent.status()["offloaded"]
    # On loopback the SYN comes in with the mark that it went out with.
    assert offloaded["decided"] == 2
    assert offloaded["accepted"] > 10
    assert offloaded["denied"] == 0
    assert "2 packets with a verdict for their flow" in agent.verb("status").stdout
    listing = netns.run(tables, "-t", "mangle", "-nvxL", "POSTROUTING").stdout.splitlines()[2:]
    marked, unmarked = (int(line.split()[0]) for line in listing)
    assert marked > 10
    assert unmarked == 0
    assert agent.stop() == 0
    assert client.echo(1000)


@pytest.mark.kernel
@HOSTS
@pytest.mark.parametrize("hook", ["prerouting", "input"])
def test_a_flow_from_elsewhere(pair: tuple[Namespace, Namespace], tmp_path: Path, host: str, hook: str) -> None:
    server, client = pair
    there = "fd00:203::1" if ":" in host else "10.203.0.1"
    serve(server, there, 8080)
    serve(server, there, 8081)
    agent = Agent(server, tmp_path, CONFIG.format(denied="8081", queue="", rule=f'hooks = ["{hook}"]\nrole = "server"')).ready()
    assert Client(client, there, 8080).echo(2_000_000)
    assert connections(server, there, 8080) == [0x4E000000]
    assert agent.totals("q")["received"] == 1
    assert client.run("nc", "-z", "-w", "1", there, "8081", check=False).returncode != 0
    assert agent.status()["offloaded"]["denied"] >= 1
    assert agent.stop() == 0


@pytest.mark.kernel
@HOSTS
def test_a_policy_that_turns_takes_its_flows_back(netns: Namespace, tmp_path: Path, host: str) -> None:
    serve(netns, host, 8080)
    agent = Agent(netns, tmp_path, CONFIG.format(denied="9", queue="", rule="")).ready()
    client = Client(netns, host, 8080)
    assert client.echo(1000)
    agent.configure(CONFIG.format(denied="8080", queue="", rule=""))
    agent.verb("reload")
    assert not client.echo(1000, 1.5)
    assert connections(netns, host, 8080) == [kept(Mark(0x4E000000, 0xFF000000), 1).deny.value]
    assert agent.status()["offloaded"]["denied"] >= 1
    # Denied in the kernel: what is sent again does not come to the queue.
    assert agent.totals("q")["received"] - agent.totals("q")["dropped"] <= 1
    agent.configure(CONFIG.format(denied="9", queue="", rule=""))
    agent.verb("reload")
    # What was held up meanwhile is sent again by TCP, and comes back.
    assert client.echo(1000)
    assert connections(netns, host, 8080) == [kept(Mark(0x4E000000, 0xFF000000), 2).accept.value]
    assert agent.stop() == 0


@pytest.mark.kernel
@HOSTS
def test_denied_from_the_first_packet(netns: Namespace, tmp_path: Path, host: str) -> None:
    serve(netns, host, 8081)
    agent = Agent(netns, tmp_path, CONFIG.format(denied="8081", queue="", rule="")).ready()
    refused = netns.run("nc", "-z", "-w", "2", host, "8081", check=False)
    assert refused.returncode != 0
    seen = agent.totals("q")
    assert seen["dropped"] == seen["received"] >= 1
    assert connections(netns, host, 8081) == []
    assert agent.stop() == 0


@pytest.mark.kernel
@HOSTS
def test_monitor_mode_denies_nothing(netns: Namespace, tmp_path: Path, host: str) -> None:
    serve(netns, host, 8080)
    agent = Agent(netns, tmp_path, CONFIG.format(denied="8080", queue='mode = "monitor"', rule="")).ready()
    client = Client(netns, host, 8080)
    assert client.echo(1000)
    until(lambda: "would drop" in agent.log, "a would-be drop is said")
    # Replies go to the client's port, which the rule does not name: accepted, and still every packet to 8080 is counted.
    before = agent.totals("q")["would_drop"]
    assert before >= 4
    for _ in range(5):
        assert client.echo(1000)
    assert agent.totals("q")["would_drop"] >= before + 10
    assert agent.status()["offloaded"]["decided"] == 0
    assert agent.stop() == 0


@pytest.mark.kernel
@HOSTS
def test_packets_without_a_connection_are_judged_one_by_one(netns: Namespace, tmp_path: Path, host: str) -> None:
    tables = "ip6tables-legacy" if ":" in host else "iptables-legacy"
    for hook in ("PREROUTING", "OUTPUT"):
        netns.run(tables, "-t", "raw", "-A", hook, "-p", "tcp", "-j", "CT", "--notrack")
    serve(netns, host, 8080)
    agent = Agent(netns, tmp_path, CONFIG.format(denied="8081", queue="", rule="")).ready()
    assert Client(netns, host, 8080).echo(1000)
    until(lambda: "belongs to no tracked connection" in agent.log, "it says so")
    assert agent.totals("q")["received"] > 6
    assert netns.run("nc", "-z", "-w", "1", host, "8081", check=False).returncode != 0
    assert agent.stop() == 0


@pytest.mark.kernel
@HOSTS
def test_a_foreign_rule_that_clears_our_mark_makes_no_packet_loop(netns: Namespace, tmp_path: Path, host: str) -> None:
    tables = "ip6tables-legacy" if ":" in host else "iptables-legacy"
    serve(netns, host, 8080)
    agent = Agent(netns, tmp_path, CONFIG.format(denied="9", queue="", rule="")).ready()
    # As VPN tools have it: the connection's mark, which is still 0, takes the place of the packet's.
    for hook in ("PREROUTING", "OUTPUT"):
        netns.run(tables, "-w", "-t", "mangle", "-I", hook, "-j", "CONNMARK", "--restore-mark")
    client = Client(netns, host, 8080)
    assert client.echo(1000)
    assert agent.totals("q")["repeated"] == 0
    assert agent.totals("q")["received"] < 2000
    assert agent.log.count("restore-mark") == 1
    assert agent.stop() == 0


LOOPER = """
from nfq_agent import REPEAT, Needs, PacketElement


class Looper(PacketElement):
    needs = Needs.HEADERS

    def decide(self, packet, flow):
        return REPEAT
"""


@pytest.mark.kernel
def test_an_element_that_always_answers_repeat_gets_on_error(netns: Namespace, tmp_path: Path) -> None:
    elements = tmp_path / "elements"
    elements.mkdir()
    (elements / "looper.py").write_text(LOOPER)
    serve(netns, "127.0.0.1", 8080)
    config = '[queue.q]\nnum = 9\nelements = ["looper:Looper"]\n[rules.r]\nqueue = "q"\ntcp_ports = [8080]\n'
    agent = Agent(netns, tmp_path, config).ready()
    assert Client(netns, "127.0.0.1", 8080).echo(1000)
    assert "gets the verdict ACCEPT instead" in agent.log
    assert agent.stop() == 0
