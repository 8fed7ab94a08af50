"""The offload element and the rules that it needs, without a kernel."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from offloading import config
from pydantic import ValidationError

from nfq_agent.config.models import ConfigError
from nfq_agent.element_chain import ElementChain
from nfq_agent.flow import Flow
from nfq_agent.mark import Mark, kept
from nfq_agent.packet import Packet
from nfq_agent.rules.plan import plan
from nfq_agent.service.policy_generation import advance, foreseen
from nfq_agent.testing import Bench, tcp
from nfq_agent.verdict import ACCEPT, DROP, Action, Verdict

A, B = "192.0.2.1:40000", "198.51.100.7:443"
MARK = "0x4e000000/0xff000000"


@given(st.integers(1, 0xFFFFFFFF), st.integers(0, 0xFFFFFFFF), st.integers(0, 1000))
def test_all_marks_are_under_the_mask_and_none_is_zero(mask: int, value: int, generation: int) -> None:
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


def test_the_rules(tmp_path: Path) -> None:
    chain = plan(config(tmp_path), 999)["inet"]["mangle"].chains["NFQA-default-OUTPUT"]
    tag = '-m comment --comment "nfq-agent:default:'
    assert [rule.spec for rule in chain] == [
        f'-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN -m connmark ! --mark 0x0/0xff000000 {tag}offload-begun" '
        "-j CONNMARK --set-xmark 0x0/0xff000000",
        f'-m mark ! --mark 0x0/0xff000000 {tag}offload-new" -j CONNMARK --save-mark --nfmask 0xff000000 --ctmask 0xff000000',
        f'-m connmark --mark 0x4e000000/0xff000000 {tag}offload-accepted" -j RETURN',
        f'-m connmark --mark 0x4f000000/0xff000000 {tag}offload-denied" -j DROP',
        f'-p tcp -m multiport --ports 8080,8081 -m owner ! --uid-owner 999 {tag}r" -j NFQUEUE --queue-num 110 --queue-bypass',
    ]


def test_a_connection_that_begins_has_no_mark_of_one_before(tmp_path: Path) -> None:
    def begun(hook: str, rule: str) -> list[str]:
        chain = plan(config(tmp_path, rule=rule), 999)["inet"]["mangle"].chains[f"NFQA-default-{hook}"]
        return [each.spec.partition(" -m ")[0] for each in chain if each.tag.endswith("offload-begun")]

    everywhere = 'hooks = ["output", "input", "forward"]'
    assert [begun(hook, everywhere) for hook in ("OUTPUT", "FORWARD")] == [["-p tcp"], ["-p tcp"]]
    # What comes in by the loopback has begun in OUTPUT, where it is taken there.
    assert begun("INPUT", everywhere) == ["! -i lo -p tcp"]
    assert begun("INPUT", 'hooks = ["input"]') == ["-p tcp"]


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
        (
            '[agent]\nowner_mask = "0x3000000"\n[queue.o]\nnum = 9\n'
            '[rules.o]\nqueue = "o"\nhooks = ["output"]\ntcp_ports = [9]\nowner = 0\n',
            "agent.owner_mask = 0x0/0x3000000",
        ),
    ],
)
def test_marks_that_share_bits_are_refused(tmp_path: Path, more: str, other: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"shares bits with {other} (line ")):
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
