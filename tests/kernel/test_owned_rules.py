"""Rules in a table that belongs to a process: who can change it, when it goes, how it is handed over, what it reads like."""

from __future__ import annotations

import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from agent import Agent, until
from namespace import Namespace
from resident import Resident
from rule_texts import jump, rules
from tcp_client import ask, server

from nfq_agent.config.models import Config
from nfq_agent.host.nftables import sets
from nfq_agent.host.nftables.netlink import attributes
from nfq_agent.host.nftables.owned import OwnedHost
from nfq_agent.host.nftables.support import probe
from nfq_agent.host.xtables.backend import choose
from nfq_agent.rules.diff import diff
from nfq_agent.rules.leaving import fail_closed
from nfq_agent.rules.model import FAMILIES, RuleError, Ruleset
from nfq_agent.rules.plan import plan

pytestmark = pytest.mark.kernel
UID = 972
PYTHON = sys.executable


@pytest.fixture
def resident(netns: Namespace) -> Iterator[Resident]:
    made = Resident(netns)
    yield made
    made.kill()


def config_of(**tables: Any) -> Config:
    return Config.model_validate({"queue": {"main": {"num": 100}}, **tables})


def desired(config: Config) -> Ruleset:
    return plan(config, UID, lists=True)


BASELINE = config_of(rules={"app": {"queue": "main", "tcp_ports": [11000]}})
CLOSED = config_of(
    queue={"main": {"num": 100, "bypass": False}}, rules={"app": {"queue": "main", "udp_ports": [53], "hooks": ["output"]}}
)


def applied(state: dict[str, Any], ruleset: Ruleset, inherited: int | None = None) -> dict[str, str]:
    host = state.setdefault("host", OwnedHost("default", inherited=inherited))
    done = host.apply_all({family: ruleset.get(family, {}) for family in FAMILIES})
    return {family: str(applied.changes) for family, applied in done.items() if applied.changes}


def closed(state: dict[str, Any]) -> None:
    state.pop("host").close()


def listed(netns: Namespace) -> str:
    done = netns.run("nft", "list", "ruleset")
    # nft says so of any table that has an xtables target in it.
    remarks = [line for line in done.stderr.splitlines() if "is managed by iptables-nft, do not touch!" not in line]
    assert remarks == []
    return done.stdout


def state_of(netns: Namespace) -> dict[str, Any]:
    return {family: netns.call(OwnedHost("default").read, family) for family in FAMILIES}


def holds(netns: Namespace, ruleset: Ruleset) -> bool:
    found = state_of(netns)
    return not any(diff(ruleset.get(family, {}), found[family]) for family in FAMILIES)


def test_the_table_as_nft_lists_it(netns: Namespace, resident: Resident) -> None:
    resident.call(applied, desired(BASELINE))
    text = re.sub(r" # progname .*", "", listed(netns))
    assert (
        text[: text.index("table ip6")]
        == """table ip nfq-agent-default {
	flags owner

	set tcp-app {
		type inet_service
		flags interval
		elements = { 11000 }
	}

	chain mangle-NFQA-default-INPUT {
		tcp dport @tcp-app counter packets 0 bytes 0 queue num 100 bypass comment "nfq-agent:default:app"
		tcp sport @tcp-app counter packets 0 bytes 0 queue num 100 bypass comment "nfq-agent:default:app"
		counter packets 0 bytes 0 return comment "nfq-agent:default:end"
	}

	chain mangle-NFQA-default-OUTPUT {
		meta skuid 972 counter packets 0 bytes 0 return comment "nfq-agent:default:own-traffic"
		tcp dport @tcp-app counter packets 0 bytes 0 queue num 100 bypass comment "nfq-agent:default:app"
		tcp sport @tcp-app counter packets 0 bytes 0 queue num 100 bypass comment "nfq-agent:default:app"
		counter packets 0 bytes 0 return comment "nfq-agent:default:end"
	}

	chain mangle-INPUT {
		type filter hook input priority mangle; policy accept;
		counter packets 0 bytes 0 jump mangle-NFQA-default-INPUT comment "nfq-agent:default:jump"
	}

	chain mangle-OUTPUT {
		type route hook output priority mangle; policy accept;
		counter packets 0 bytes 0 jump mangle-NFQA-default-OUTPUT comment "nfq-agent:default:jump"
	}
}
"""
    )


def test_nobody_else_can_change_it_and_a_kill_takes_it_away(netns: Namespace, resident: Resident) -> None:
    resident.call(applied, desired(BASELINE))
    before = listed(netns)
    for refused in ("delete table ip nfq-agent-default", "flush table ip nfq-agent-default"):
        assert "Operation not permitted" in netns.run("nft", *refused.split(), check=False).stderr
    netns.run("nft", "flush", "ruleset")
    netns.run("iptables-nft", "-F")
    assert "table ip nfq-agent-default" in listed(netns)
    assert holds(netns, desired(BASELINE))
    assert before.count("NFQA") <= listed(netns).count("NFQA")
    with pytest.raises(RuleError, match=r"belongs to another running process \(netlink port \d+\); stop that process first"):
        netns.call(OwnedHost("default").apply_all, desired(CLOSED))
    assert holds(netns, desired(BASELINE))
    resident.kill()
    until(lambda: "nfq-agent" not in listed(netns), "the table goes with its owner", 2)


def fork_successor(state: dict[str, Any], ruleset: Ruleset) -> int:
    """A process that is given the descriptor, waits for its predecessor's death, changes the rules, and lives on."""
    (descriptor,) = state["host"].descriptors
    predecessor = os.getpid()
    child = os.fork()
    if child:
        return child
    try:
        successor: dict[str, Any] = {}
        while os.getppid() == predecessor:
            time.sleep(0.01)
        assert applied(successor, {**ruleset}, descriptor)
        time.sleep(60)
    finally:
        os._exit(1)


def test_who_is_handed_the_socket_has_the_rules(netns: Namespace, resident: Resident) -> None:
    resident.call(applied, desired(BASELINE))
    more = config_of(rules={"app": {"queue": "main", "tcp_ports": [11000, 12000]}})
    successor = resident.call(fork_successor, desired(more))
    resident.kill()
    until(lambda: holds(netns, desired(more)), "the successor changes the rules", 10)
    os.kill(successor, 9)
    until(lambda: "nfq-agent" not in listed(netns), "the table goes with its last holder", 5)


def test_what_fails_closed_outlives_its_owner_and_is_taken_up(netns: Namespace, resident: Resident) -> None:
    if not netns.call(probe).persist:
        pytest.skip("Linux 6.9 has tables that outlive their owner")
    resident.call(applied, desired(CLOSED))
    assert "flags owner,persist" in listed(netns) or "table ip nfq-agent-default.closed" in listed(netns)
    resident.kill()
    assert holds(netns, desired(CLOSED))
    # Nobody owns it now, so that everybody can change it; the next start mends that and owns it.
    netns.run(
        "nft", "insert", "rule", "ip", "nfq-agent-default.closed", "mangle-NFQA-default-OUTPUT", "udp", "dport", "53", "accept"
    )
    netns.run("nft", "delete", "element", "ip6", "nfq-agent-default.closed", "udp-app", "{ 53 }")
    assert not holds(netns, desired(CLOSED))
    second = Resident(netns)
    try:
        second.call(applied, desired(CLOSED))
        assert holds(netns, desired(CLOSED))
        assert "not permitted" in netns.run("nft", "delete", "table", "ip", "nfq-agent-default.closed", check=False).stderr
        # Taken up as it is, it is owned all the same.
        assert second.call(applied, desired(CLOSED)) == {}
        # A clean stop takes all of it away.
        second.call(applied, {})
        second.call(closed)
    finally:
        second.kill()
    assert "nfq-agent" not in listed(netns)


def test_an_orphan_with_the_right_rules_is_owned_again(netns: Namespace, resident: Resident) -> None:
    resident.call(applied, desired(CLOSED))
    resident.kill()
    second = Resident(netns)
    try:
        assert second.call(applied, desired(CLOSED)) == {}
        assert "not permitted" in netns.run("nft", "delete", "table", "ip", "nfq-agent-default.closed", check=False).stderr
    finally:
        second.kill()


def test_after_a_failure_only_what_fails_closed_stays(netns: Namespace, resident: Resident) -> None:
    both = config_of(
        queue={"main": {"num": 100, "bypass": False}, "open": {"num": 101}},
        rules={"shut": {"queue": "main", "udp_ports": [53]}, "open": {"queue": "open", "tcp_ports": [80]}},
    )
    resident.call(applied, desired(both))
    resident.kill()

    def remove_after_failure() -> None:
        host = OwnedHost("default")
        host.apply_all({family: fail_closed(host.read(family)) for family in FAMILIES}, undo=False)
        host.close()

    netns.call(remove_after_failure)
    text = listed(netns)
    assert "udp-shut" in text
    assert "tcp-open" not in text

    def remove() -> None:
        host = OwnedHost("default")
        host.apply_all({family: {} for family in FAMILIES})
        host.close()

    netns.call(remove)
    assert "nfq-agent" not in listed(netns)


def test_a_change_of_bypass_moves_the_rules(netns: Namespace, resident: Resident) -> None:
    resident.call(applied, desired(BASELINE))
    resident.call(applied, desired(CLOSED))
    assert holds(netns, desired(CLOSED))
    resident.call(applied, desired(BASELINE))
    assert holds(netns, desired(BASELINE))
    resident.call(applied, {})
    resident.call(closed)
    assert "nfq-agent" not in listed(netns)


def send(port: int, count: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for _ in range(count):
            sender.sendto(b"x", ("127.0.0.1", port))


def counted(netns: Namespace, rule: str) -> int:
    chains = state_of(netns)["inet"]["mangle"].chains
    return sum(each.packets for chain in chains.values() for each in chain if each.rule.tag.endswith(f":{rule}"))


def test_another_port_leaves_every_counter(netns: Namespace, resident: Resident) -> None:
    def ports(*numbers: int | str) -> Ruleset:
        rule = {"queue": "main", "udp_ports": list(numbers), "hooks": ["output"]}
        return desired(config_of(rules={"app": rule, "other": {**rule, "udp_ports": [7]}}))

    resident.call(applied, ports(9, "100:200"))
    netns.call(send, 9, 5)
    netns.call(send, 150, 2)
    netns.call(send, 7, 3)
    for change in (ports(9, "100:200", 5000), ports(9, "100:250"), ports(9, "90:300"), ports(9)):
        assert resident.call(applied, change)
        assert (counted(netns, "app"), counted(netns, "other")) == (7, 3)
    netns.call(send, 150, 1)
    netns.call(send, 9, 1)
    assert counted(netns, "app") == 8
    # A rule in front of them leaves them too.
    first = {"queue": "main", "tcp_ports": [1], "hooks": ["output"]}
    rule = {"queue": "main", "udp_ports": [9], "hooks": ["output"]}
    resident.call(applied, desired(config_of(rules={"first": first, "app": rule, "other": {**rule, "udp_ports": [7]}})))
    assert (counted(netns, "app"), counted(netns, "other")) == (8, 3)


def test_ten_thousand_ports(netns: Namespace, resident: Resident) -> None:
    """No two of them side by side, in both directions of both families."""
    config = config_of(rules={"app": {"queue": "main", "tcp_ports": list(range(1, 20001, 2))}})
    ruleset = desired(config)
    began = time.monotonic()
    resident.call(applied, ruleset)
    took = time.monotonic() - began
    assert holds(netns, ruleset)
    assert took < 3
    assert resident.call(applied, ruleset) == {}


@pytest.mark.parametrize(
    "intervals", [(), ((80, 80),), ((0, 65535),), ((1, 1), (2, 2), (3, 9)), ((7, 7), (65535, 65535)), ((0, 5),)]
)
def test_the_elements_of_a_set(intervals: tuple[sets.Interval, ...]) -> None:
    made = sets.NamedSet("x", "port", intervals)
    elements = [value for message in made.element_lists(intervals) for _, value in attributes(message[4:])]
    assert sets.intervals_of(reversed(elements), "port") == intervals


OTHERS = {
    "legacy": "iptables-legacy -t nat -I OUTPUT -p tcp --dport 8080 -j REDIRECT --to-ports 9",
    "iptables-nft": "iptables-nft -t nat -I OUTPUT -p tcp --dport 8080 -j REDIRECT --to-ports 9",
    "nft": "nft 'add table ip other; add chain ip other c { type nat hook output priority -100; };"
    " add rule ip other c tcp dport 8080 redirect to :9'",
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("first", [True, False], ids=["they come first", "we come first"])
def test_nat_of_ours_is_asked_first(netns: Namespace, resident: Resident, other: str, first: bool) -> None:
    ours = rules(
        f"nat {jump('default', 'OUTPUT')}",
        "nat -A NFQA-default-OUTPUT -p tcp -m multiport --dports 8080 "
        '-m comment --comment "nfq-agent:default:r" -j REDIRECT --to-ports 9000',
    )
    server(netns, "who", "127.0.0.1", 9000)
    for here in (first, not first):
        if here:
            netns.shell(OTHERS[other])
        else:
            resident.call(applied, {"inet": ours})
    assert netns.call(ask, "127.0.0.1", 8080, b"").startswith(b"127.0.0.1 ")


def test_auto_is_owned_beside_nat_in_nf_tables_and_says_so(netns: Namespace) -> None:
    assert netns.call(lambda: choose("auto", "a", captures=True).name) == "legacy"
    netns.shell(OTHERS["nft"])
    assert netns.call(lambda: choose("auto", "a").name) == "legacy"
    host = netns.call(lambda: choose("auto", "a", captures=True))
    assert host.name == "owned"
    assert "since nf_tables does NAT here (ip other c)" in host.notice


def test_it_needs_one_capability_alone(netns: Namespace) -> None:
    program = f"""
import sys; sys.path[:0] = {sys.path!r}
from nfq_agent.host.nftables.netlink import attributes
from nfq_agent.host.nftables.owned import OwnedHost
from nfq_agent.host.xtables.backend import choose
from rule_texts import baseline
host = choose("owned", "a")
both = {{family: baseline() for family in ("inet", "inet6")}}
assert all(applied.changes for applied in host.apply_all(both).values())
assert not any(applied.changes for applied in host.apply_all(both).values())
host.apply_all({{family: {{}} for family in both}})
host.close()
"""
    confined = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs"]
    rights = [f"--{kind}=-all,+net_admin" for kind in ("inh-caps", "ambient-caps", "bounding-set")]
    netns.run(*confined, *rights, PYTHON, "-c", program)
    refused = netns.run(
        *confined, "--inh-caps=-all", "--ambient-caps=-all", "--bounding-set=-all", PYTHON, "-c", program, check=False
    )
    assert "backend owned can't be used: CAP_NET_ADMIN is missing; start as root, or with that capability" in refused.stderr


AGENT = """
[agent]
backend = "owned"
[queue.main]
num = 7
[rules.app]
queue = "main"
hooks = ["output"]
udp_ports = [53]
"""


def test_a_whole_life(netns: Namespace, tmp_path: Path) -> None:
    agent = Agent(netns, tmp_path, AGENT).ready()
    netns.call(send, 53, 10)
    assert agent.totals()["received"] == 10
    assert agent.status()["backend"] == "owned"
    assert "Nothing to do" in agent.verb("plan").stdout
    agent.configure(AGENT.replace("53", "53, 54"))
    assert agent.verb("plan", check=False).returncode == 3
    agent.verb("reload")
    netns.call(send, 54, 5)
    assert agent.totals()["received"] == 15
    assert agent.queue()["uninspected"] == 0
    shown = agent.verb("rules").stdout
    assert re.search(r" 15 +\d+  -A NFQA-default-OUTPUT -p udp -m multiport --ports 53,54", shown)
    # A worker that comes back inherits nothing that would hold the table.
    os.kill(agent.workers()[0], 9)
    until(lambda: "serves again" in agent.log, "the worker comes back")
    agent.kill()
    until(lambda: "nfq-agent" not in listed(netns), "the table goes with the agent", 5)
    agent.start()
    agent.ready()
    assert agent.stop() == 0
    assert "nfq-agent" not in listed(netns)


def test_apply_without_serving_leaves_rules_that_remove_takes_away(netns: Namespace, tmp_path: Path) -> None:
    (tmp_path / "default.toml").write_text(AGENT)
    command = [PYTHON, "-m", "nfq_agent"]
    file = ["--config", str(tmp_path / "default.toml")]
    netns.run(*command, "apply", *file)
    assert "queue num 7 bypass" in listed(netns)
    assert "Nothing to do" in netns.run(*command, "plan", *file).stdout
    netns.run(*command, "remove", "--instance", "default")
    assert "nfq-agent" not in listed(netns)


@pytest.mark.parametrize("backend", ["legacy", "owned"])
def test_what_goes_to_one_address_but_not_to_one_port(netns: Namespace, tmp_path: Path, backend: str) -> None:
    netns.shell(
        "for name in eth0 eth1 wg7; do ip link add $name type veth peer name peer-$name; ip link set peer-$name up; done;"
        "for i in 0 1; do ip address add 10.9.$i.1/24 dev eth$i; ip link set eth$i up; done; ip link set wg7 up;"
        "ip route add 1.2.3.4/32 dev eth0; ip route add 1.2.3.5/32 dev eth0;"
        "ip -6 address add fd00::1/64 dev wg7 nodad; ip -6 route add 2001:db8::4/128 dev wg7"
    )
    text = (Path(__file__).parent.parent / "configs" / "destination.toml").read_text()
    agent = Agent(netns, tmp_path, f'[agent]\nbackend = "{backend}"\n{text}').ready()

    def judged(*sends: tuple[str, int, socket.SocketKind]) -> int:
        before = agent.totals()["received"]
        for each in sends:
            netns.call(send_to, *each)
        return agent.totals()["received"] - before

    udp, tcp = socket.SOCK_DGRAM, socket.SOCK_STREAM
    assert judged(("1.2.3.4", 53, udp), ("1.2.3.4", 22, udp), ("1.2.3.4", 443, tcp), ("2001:db8::4", 53, udp)) == 4
    assert judged(("1.2.3.4", 22, tcp), ("1.2.3.5", 53, udp), ("10.9.0.9", 53, udp)) == 0
    # By another interface.
    netns.shell("ip route replace 1.2.3.4/32 dev eth1")
    assert judged(("1.2.3.4", 53, udp)) == 0
    assert agent.stop() == 0


def send_to(host: str, port: int, kind: socket.SocketKind) -> None:
    """One packet: a datagram, or the SYN of a connection that nobody answers."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, kind) as sender:
        sender.setblocking(False)
        if kind == socket.SOCK_DGRAM:
            sender.sendto(b"x", (host, port))
        else:
            sender.connect_ex((host, port))


@pytest.mark.parametrize("backend", ["legacy", "owned"])
def test_one_control_group(netns: Namespace, tmp_path: Path, backend: str) -> None:
    roots = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines() if line.split()[2] == "cgroup2"]
    if not roots:
        pytest.skip("there are no control groups of version 2")
    group = Path(roots[0]) / f"nfq-test-{os.getpid()}"
    group.mkdir()
    try:
        text = f'[agent]\nbackend = "{backend}"\n[queue.main]\n[rules.app]\nqueue = "main"\nhooks = ["output"]\nall = true\n'
        agent = Agent(netns, tmp_path, f'{text}cgroup = "{group.name}"\n').ready()
        program = f"import sys; sys.path[:0] = {sys.path!r}\nfrom kernel.test_owned_rules import send\nsend(9, 3)"
        netns.run("sh", "-ec", f'echo $$ >{group}/cgroup.procs; exec {PYTHON} -c "$0"', program)
        netns.call(send, 9, 5)
        assert agent.totals()["received"] == 3
        assert "Nothing to do" in agent.verb("plan").stdout
        assert agent.stop() == 0
    finally:
        group.rmdir()
