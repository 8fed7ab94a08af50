"""One contract for every rule backend: the fake, legacy xtables and owned tables, the last two against the real kernel."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from rule_texts import bare, baseline, foreign, jump, many, ours, rule, rules
from rule_worlds import REAL, FakeWorld, OwnedWorld, World

from nfq_agent.rules.diff import diff, render
from nfq_agent.rules.model import FAMILIES, Family, RuleError, TableState

KERNEL = [pytest.param(name, marks=pytest.mark.kernel) for name in REAL]


def _world(request: pytest.FixtureRequest) -> Iterator[World]:
    if request.param == "fake":
        yield FakeWorld()
        return
    made = REAL[request.param](request.getfixturevalue("netns"))
    yield made
    if isinstance(made, OwnedWorld):
        made.resident.kill()


@pytest.fixture(params=["fake", *KERNEL])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    yield from _world(request)


@pytest.fixture(params=["fake", KERNEL[0]])
def open_world(request: pytest.FixtureRequest) -> Iterator[World]:
    """One in which others can change our rules."""
    yield from _world(request)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Any:
    return request.param


REDIRECT = '-p tcp -m multiport --dports 8080 -m comment --comment "nfq-agent:a:n" -j REDIRECT --to-ports 15002'
FOREIGN = """*filter
:INPUT DROP [7:700]
:KEEP - [0:0]
[5:300] -A INPUT -p tcp -m tcp --dport 22 -j ACCEPT
[1:40] -A KEEP -i lo -j RETURN
[9:999] -A OUTPUT -m comment --comment "not nfq-agent:a:jump" -j KEEP
COMMIT
*mangle
:OUTPUT ACCEPT [3:180]
:OTHER - [0:0]
[2:120] -A INPUT -p udp -m multiport --dports 53 -j OTHER
[4:160] -A OTHER -p tcp -m tcp --dport 80 -j RETURN
[6:60] -A OUTPUT -p tcp -m tcp --dport 443 -j ACCEPT
COMMIT
"""


def test_apply_puts_the_rules_in_and_says_so(world: World, family: Family) -> None:
    world.restore(family, FOREIGN)
    before = world.save(family)
    applied = world.host("a").apply(family, baseline())
    assert applied.before.get("mangle", TableState()) == TableState()
    assert applied.after["mangle"].as_rules() == baseline()["mangle"]
    after = world.save(family)
    assert foreign(after) == before
    # Jumps stand at the head of their chains, before everybody else's rules.
    rules_only = [bare(line) for line in after[after.index("*mangle") :] if line[0] == "["]
    assert next(line for line in rules_only if line.startswith("-A INPUT")) == jump("a")
    assert next(line for line in rules_only if line.startswith("-A OUTPUT")) == jump("a", "OUTPUT")
    assert rule("a", 11000) in rules_only
    assert rule("a", 11000, "OUTPUT") in rules_only
    assert not diff(baseline(), world.host("a").read(family))


def test_again_changes_nothing(world: World, family: Family) -> None:
    world.host("a").apply(family, baseline())
    before = world.save(family)
    assert world.host("a").apply(family, baseline()).changes == {}
    assert world.save(family) == before


def test_remove_leaves_what_was_there(world: World, family: Family) -> None:
    world.restore(family, FOREIGN)
    before = world.save(family)
    host = world.host("a")
    host.apply(family, baseline())
    assert host.apply(family, {}).changes
    assert world.save(family) == before
    assert host.apply(family, {}).changes == {}
    assert world.save(family) == before


def test_a_family_is_left_alone_while_the_other_is_written(world: World) -> None:
    world.restore("inet6", FOREIGN)
    before = world.save("inet6")
    world.host("a").apply("inet", baseline())
    assert world.save("inet6") == before


def test_a_changed_rule_keeps_the_counters_of_the_others(open_world: World, family: Family) -> None:
    host = open_world.host("a")
    host.apply(family, baseline("a", 1, 3))
    for chain in ("INPUT", "OUTPUT"):
        first, second = rule("a", 1, chain), rule("a", 3, chain)
        delete = f"-D NFQA-a-{chain} 1\n"
        open_world.restore(family, f"*mangle\n{delete}{delete}[8:800] {first}\n[9:900] {second}\nCOMMIT\n")
    changed = host.apply(family, baseline("a", 1, 2)).changes
    assert list(render(changed)) == [
        "*mangle",
        f"- {rule('a', 3)}",
        f"+ {rule('a', 2)}",
        f"- {rule('a', 3, 'OUTPUT')}",
        f"+ {rule('a', 2, 'OUTPUT')}",
    ]
    state = host.read(family)["mangle"]
    assert [(found.number, found.packets, found.bytes) for found in state.chains["NFQA-a-INPUT"]] == [
        (1, 8, 800),
        (2, 0, 0),
    ]
    assert len(state.jumps) == 2


def test_a_foreign_rule_in_our_chain_is_removed(open_world: World, family: Family) -> None:
    host = open_world.host("a")
    host.apply(family, baseline())
    before = open_world.save(family)
    # One that could be ours by its kind, one that never is (a fragment of an address), one that only differs by -g.
    address = "10.0.0.0/8" if family == "inet" else "fd00::/8"
    open_world.restore(
        family,
        f"*mangle\n-A NFQA-a-INPUT -p tcp -j ACCEPT\n-I NFQA-a-INPUT 1 -s {address} -j DROP\n"
        "-A NFQA-a-OUTPUT -m limit --limit 5/min -j RETURN\nCOMMIT\n",
    )
    assert sum(len(chain) for chain in host.read(family)["mangle"].chains.values()) == 5
    host.apply(family, baseline())
    assert open_world.save(family) == before


def test_our_rule_that_was_altered_is_mended(open_world: World, family: Family) -> None:
    host = open_world.host("a")
    host.apply(family, baseline())
    before = open_world.save(family)
    address = "10.0.0.0/8" if family == "inet" else "fd00::/8"
    open_world.restore(
        family,
        f"*mangle\n-D NFQA-a-INPUT 1\n{rule('a', 11000).replace('INPUT ', f'INPUT -s {address} ', 1)}\nCOMMIT\n",
    )
    assert open_world.save(family) != before
    host.apply(family, baseline())
    assert open_world.save(family) == before


def test_what_is_missing_comes_back(open_world: World, family: Family) -> None:
    host = open_world.host("a")
    host.apply(family, baseline())
    open_world.restore(family, f"*mangle\n{jump('a').replace('-A', '-D', 1)}\n-D NFQA-a-OUTPUT 1\nCOMMIT\n")
    assert len(host.read(family)["mangle"].jumps) == 1
    host.apply(family, baseline())
    assert host.read(family)["mangle"].as_rules() == baseline()["mangle"]


def test_a_jump_is_not_fought_over_for_its_place(open_world: World, family: Family) -> None:
    host = open_world.host("a")
    host.apply(family, baseline())
    open_world.restore(family, "*mangle\n-I INPUT 1 -p udp -j ACCEPT\nCOMMIT\n")
    assert host.apply(family, baseline()).changes == {}
    # Twice the same jump is once too often.
    open_world.restore(family, f"*mangle\n{jump('a')}\nCOMMIT\n")
    host.apply(family, baseline())
    assert len(host.read(family)["mangle"].jumps) == 2


def test_a_chain_that_others_jump_to_is_emptied_and_kept(open_world: World, family: Family) -> None:
    host = open_world.host("a")
    host.apply(family, baseline())
    open_world.restore(family, "*mangle\n:MINE - [0:0]\n-A MINE -p tcp -j NFQA-a-INPUT\nCOMMIT\n")
    assert host.read(family)["mangle"].referenced == {"NFQA-a-INPUT"}
    applied = host.apply(family, {})
    assert applied.after["mangle"] == TableState({"NFQA-a-INPUT": ()}, (), frozenset({"NFQA-a-INPUT"}))
    assert host.apply(family, {}).changes == {}
    assert "[0:0] -A MINE -p tcp -j NFQA-a-INPUT" in open_world.save(family)
    open_world.restore(family, "*mangle\n-D MINE -p tcp -j NFQA-a-INPUT\nCOMMIT\n")
    host.apply(family, {})
    assert ours(open_world.save(family)) == []


def test_our_chains_that_jump_to_one_another_go_too(open_world: World, family: Family) -> None:
    host = open_world.host("a")
    host.apply(family, baseline())
    open_world.restore(family, "*mangle\n-A NFQA-a-OUTPUT -j NFQA-a-INPUT\nCOMMIT\n")
    assert host.read(family)["mangle"].referenced == frozenset()
    host.apply(family, {})
    assert ours(open_world.save(family)) == []


def test_instances_live_side_by_side(world: World, family: Family) -> None:
    first, second = world.host("a"), world.host("a-b")
    first.apply(family, baseline("a"))
    second.apply(family, baseline("a-b"))
    assert first.instances(family) == {"a", "a-b"}
    assert not diff(baseline("a"), first.read(family))
    assert not diff(baseline("a-b"), second.read(family))
    first.apply(family, {})
    assert ours(world.save(family), "a") == []
    assert second.read(family)["mangle"].as_rules() == baseline("a-b")["mangle"]
    first.apply(family, baseline("a"))
    second.apply(family, {})
    assert ours(world.save(family), "a-b") == []
    assert first.read(family)["mangle"].as_rules() == baseline("a")["mangle"]


def test_another_instances_jump_holds_our_chain(open_world: World, family: Family) -> None:
    host = open_world.host("a")
    host.apply(family, baseline("a"))
    open_world.host("b").apply(family, baseline("b"))
    open_world.restore(family, "*mangle\n-A NFQA-b-INPUT -j NFQA-a-INPUT\nCOMMIT\n")
    assert host.read(family)["mangle"].referenced == {"NFQA-a-INPUT"}


def test_stale_rules_in_other_tables_go(world: World, family: Family) -> None:
    stale = rules(
        f"raw {jump('a', 'OUTPUT')}",
        f"raw {rule('a', 1, 'OUTPUT')}",
        f"nat {jump('a', 'OUTPUT')}",
        f"nat -A NFQA-a-OUTPUT {REDIRECT}",
        f"filter {jump('a')}",
        f"filter {rule('a', 1)}",
    )
    host = world.host("a")
    host.apply(family, stale)
    assert {name for name, state in host.read(family).items() if state.jumps} == {"raw", "nat", "filter"}
    host.apply(family, baseline())
    assert {name for name, state in host.read(family).items() if state.chains or state.jumps} == {"mangle"}


def test_a_tagged_rule_anywhere_is_ours_and_goes(open_world: World, family: Family) -> None:
    open_world.restore(
        family,
        "*mangle\n:THEIRS - [0:0]\n"
        '-A THEIRS -p tcp -m comment --comment "nfq-agent:a:old" -j ACCEPT\n'
        '-A THEIRS -p udp -m comment --comment "nfq-agent:aa:old" -j ACCEPT\n'
        '-A THEIRS -p udp -m comment --comment "see nfq-agent:a:old" -j ACCEPT\nCOMMIT\n',
    )
    open_world.host("a").apply(family, {})
    assert [line for line in open_world.save(family) if line.startswith("[") and "THEIRS" in line] == [
        '[0:0] -A THEIRS -p udp -m comment --comment "nfq-agent:aa:old" -j ACCEPT',
        '[0:0] -A THEIRS -p udp -m comment --comment "see nfq-agent:a:old" -j ACCEPT',
    ]


def test_everything_a_configuration_can_say_is_written_and_read_alike(world: World, family: Family) -> None:
    comment = '-m comment --comment "nfq-agent:a:x"'
    flags = "-m tcp --tcp-flags FIN,SYN,RST,ACK SYN"
    desired = rules(
        f"mangle {jump('a', 'OUTPUT')}",
        f"mangle -A NFQA-a-OUTPUT -m owner --uid-owner 999 {comment} -j RETURN",
        f"mangle -A NFQA-a-OUTPUT {comment} -j NFQUEUE --queue-num 0",
        f"mangle -A NFQA-a-OUTPUT -o eth0 -p tcp {flags} {comment} -j NFQUEUE --queue-num 65535 --queue-bypass",
        f"mangle -A NFQA-a-OUTPUT -o abcdefghijklmno -p tcp {flags} -m multiport --sports 1 {comment} -j NFQUEUE --queue-num 1",
        f"mangle -A NFQA-a-OUTPUT -o tun+ -p udp -m multiport --ports 1,2,3,4,5,6,7,8,9,10,11,12,13,14:65535 {comment} "
        "-j NFQUEUE --queue-balance 100:103 --queue-bypass --queue-cpu-fanout",
        f"mangle -A NFQA-a-OUTPUT -m mark --mark 0x1/0xff -m owner ! --uid-owner 4294967294 {comment} -j RETURN",
        f"mangle -A NFQA-a-OUTPUT -m mark --mark 0x0 -m connmark --mark 0x4e000000/0xff000000 {comment} -j RETURN",
        f"mangle {jump('a', 'FORWARD')}",
        f"mangle -A NFQA-a-FORWARD -i eth0 -p tcp -m multiport --dports 80 {comment} -j NFQUEUE --queue-num 7",
        f"nat {jump('a', 'PREROUTING')}",
        f"nat -A NFQA-a-PREROUTING {REDIRECT}",
        f"raw {jump('a', 'PREROUTING')}",
        f"raw -A NFQA-a-PREROUTING -p tcp {flags} {comment} -j NFQUEUE --queue-num 1 --queue-bypass",
    )
    host = world.host("a")
    host.apply(family, desired)
    # The tools print what was asked for, letter by letter.
    written = {line for line in ours(world.save(family)) if line.startswith("-A")}
    assert written == {str(each) for table in desired.values() for each in table.rules}
    assert host.apply(family, desired).changes == {}
    host.apply(family, {})
    assert ours(world.save(family)) == []


def test_every_selection_is_written_and_read_alike(world: World, family: Family) -> None:
    comment, queue = '-m comment --comment "nfq-agent:a:x"', "-j NFQUEUE --queue-num 7"
    first, second = (
        ("10.0.0.0-10.0.0.255", "1.2.3.4-1.2.3.4") if family == "inet" else ("fd00::-fd00::ff", "2001:db8::4-2001:db8::4")
    )
    ports = "-m multiport ! --ports 22"
    desired = rules(
        f"mangle {jump('a', 'OUTPUT')}",
        f"mangle -A NFQA-a-OUTPUT -o wg+ -p tcp {ports} -m iprange --dst-range {second} {comment} {queue}",
        f"mangle -A NFQA-a-OUTPUT -o wg+ ! -p tcp -m iprange --src-range {first} "
        f"-m iprange ! --dst-range {second} {comment} {queue}",
        f"mangle -A NFQA-a-OUTPUT ! -o eth0 -p 47 {comment} {queue}",
        f"mangle -A NFQA-a-OUTPUT -p udp -m owner --uid-owner 1000-1999 -m owner ! --gid-owner 5 {comment} {queue}",
        f"mangle {jump('a', 'FORWARD')}",
        f"mangle -A NFQA-a-FORWARD ! -i veth+ ! -o veth+ -p tcp -m multiport ! --dports 80,443:450 {comment} {queue}",
    )
    host = world.host("a")
    host.apply(family, desired)
    written = {line for line in ours(world.save(family)) if line.startswith("-A")}
    said = {str(each) for table in desired.values() for each in table.rules}
    assert {re.sub("-p gre", "-p 47", line) for line in written} == said
    assert host.apply(family, desired).changes == {}
    host.apply(family, {})
    assert ours(world.save(family)) == []


def test_what_a_proxy_asks_for_is_written_and_read_alike(world: World, family: Family) -> None:
    comment = '-m comment --comment "nfq-agent:a:x"'
    hosts, anywhere = ("10.0.0.0-10.255.255.255", "0.0.0.0") if family == "inet" else ("fd00::-fdff::1", "::")
    mark = "0x4f000000/0xff000000"
    # `plan` asks for the one or the other (RuleHost.lists).
    saved = f"--set-xmark {mark}" if world.name == "owned" else "--save-mark --nfmask 0xff000000 --ctmask 0xff000000"
    desired = rules(
        f"mangle {jump('a', 'PREROUTING')}",
        f"mangle -A NFQA-a-PREROUTING -p tcp -m multiport --dports 15002 -m addrtype --dst-type LOCAL {comment} -j RETURN",
        f"mangle -A NFQA-a-PREROUTING -p tcp -m multiport --dports 80 -m iprange --dst-range {hosts} {comment} -j RETURN",
        f"mangle -A NFQA-a-PREROUTING -p tcp -m socket --transparent {comment} -j MARK --set-xmark {mark}",
        f"mangle -A NFQA-a-PREROUTING -p tcp -m multiport --dports 80 {comment} "
        f"-j TPROXY --on-port 15002 --on-ip {anywhere} --tproxy-mark {mark}",
        f"mangle -A NFQA-a-PREROUTING -m mark --mark {mark} {comment} -j CONNMARK {saved}",
        # One that counts, and leads nowhere.
        f"mangle -A NFQA-a-PREROUTING -p tcp -m multiport --dports 80 -m iprange ! --dst-range {hosts} {comment}",
    )
    host = world.host("a")
    host.apply(family, desired)
    written = {line for line in ours(world.save(family)) if line.startswith("-A")}
    assert written == {str(each) for table in desired.values() for each in table.rules}
    assert host.apply(family, desired).changes == {}


def test_when_a_later_table_is_refused_the_earlier_ones_are_put_back(open_world: World, family: Family) -> None:
    open_world.restore(family, FOREIGN)
    host = open_world.host("a")
    host.apply(family, baseline("a", 1, 2))
    open_world.restore(family, "*mangle\n[5:50] -A NFQA-a-INPUT -p tcp -m tcp --dport 99 -j ACCEPT\nCOMMIT\n")
    before = open_world.save(family)
    # The kernel takes REDIRECT in nat alone.
    refused = rules(
        f"raw {jump('a', 'OUTPUT')}",
        f"raw -A NFQA-a-OUTPUT {REDIRECT}",
    )
    with pytest.raises(RuleError, match=r"raw|REDIRECT"):
        host.apply(family, {**baseline("a", 2, 3), **refused})
    after = open_world.save(family)
    # The table that was refused may have become present by that; its chains are empty.
    assert set(foreign(before)) <= set(foreign(after))
    assert [line for line in foreign(after) if line[0] == "["] == [line for line in foreign(before) if line[0] == "["]
    assert ours(after) == ours(before)
    # It is put back with its counters.
    assert "[5:50] -A NFQA-a-INPUT -p tcp -m tcp --dport 99 -j ACCEPT" in after


def test_nothing_becomes_present_by_looking(world: World, family: Family) -> None:
    host = world.host("a")
    assert host.present(family) == frozenset()
    assert host.read(family) == {}
    assert host.instances(family) == frozenset()
    assert host.apply(family, {}).changes == {}
    assert world.save(family) == []
    host.apply(family, baseline())
    host.read(family)
    assert host.present(family) == frozenset({"mangle"})
    # An owned table is not a table of xtables.
    tables = [line for line in world.save(family) if line.startswith("*")]
    assert tables == ([] if world.name == "owned" else ["*mangle"])


def test_a_family_at_a_time_with_redirect(world: World) -> None:
    """Both families in the same process: python-iptables by itself fails at the second."""
    desired = rules(
        f"nat {jump('a', 'OUTPUT')}",
        f"nat -A NFQA-a-OUTPUT {REDIRECT}",
    )
    host = world.host("a")
    for each in (*FAMILIES, *FAMILIES):
        host.apply(each, desired)
        assert not diff(desired, host.read(each))


@pytest.mark.parametrize("count", [200, 20_000])
def test_many_foreign_rules_are_left_as_they_are(world: World, count: int) -> None:
    world.restore("inet", many(count))
    before = world.save("inet")
    host = world.host("a")
    host.apply("inet", baseline())
    assert foreign(world.save("inet")) == before
    host.apply("inet", baseline("a", 1, 2, 3))
    assert foreign(world.save("inet")) == before
    host.apply("inet", {})
    assert world.save("inet") == before
