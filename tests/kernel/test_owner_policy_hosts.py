"""A policy by owner with `compile` where the kernel cannot apply it, and where the agent sees a part of the control groups."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from agent import COMMAND, Agent, Started, until
from control_groups import leave
from judged_twice import member_of
from namespace import KERNEL, Namespace
from resident import Resident

from nfq_agent.host.cgroups import mounted
from nfq_agent.host.nftables import support

pytestmark = pytest.mark.kernel

CONFIG = """
[agent]
backend = "owned"
[queue.main]
num = 7
compile = "auto"
elements = ["allow", "offload"]
log_drops = false
[element.allow]
type = "policy"
default = "drop"
rule = [
  {{ name = "names", action = "accept", dport = 8053 }},
  {{ name = "payments", action = "accept", unit = "payments-{tag}.service", dport = 8443 }},
]
[element.offload]
mark = "0x4e000000/0xff000000"
[rules.out]
queue = "main"
hooks = ["output"]
udp_ports = ["8000:9000"]
"""
NAMES, PAYMENTS, DEFAULT = "rule 1 (names)", "rule 2 (payments)", "default"
# The kernel refuses to ask below this level of all groups (nft_socket_init in net/netfilter/nft_socket.c).
DEEP = 249
# argv: a control group, and a command to run in it in mount and control group namespaces of its own.
INSIDE = ("unshare", "-m", "sh", "-ec", 'echo $$ > "$0/cgroup.procs"; exec unshare -C "$@"')
AGAIN = 'umount "$0"; test "$1" = none || mount -t cgroup2 none "$0"; shift; exec "$@"'


def sends(state: dict[str, Any], group: Path, port: int) -> None:
    """A datagram from a socket of the group, which stays open: a worker asks for its owner."""
    with member_of(group):
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with contextlib.suppress(PermissionError):
        sender.sendto(b"x", ("127.0.0.1", port))
    state.setdefault("senders", []).append(sender)


def decided(agent: Agent, rule: str) -> tuple[int, int]:
    """Packets that a rule decided in the worker, and in the kernel."""
    found = [each for each in agent.queue()["decisions"] if each["rule"] == rule]
    return sum(each["count"] for each in found), sum(each["in_kernel"] for each in found)


def judged(agent: Agent, resident: Resident, group: Path, port: int, rule: str) -> str:
    """Where a rule decides a datagram of a group: "worker" or "kernel"."""
    before = decided(agent, rule)
    resident.call(sends, group, port)
    after = until(lambda: (found := decided(agent, rule)) != before and found, f"{rule} decides what {group} sends to {port}")
    return {(1, 0): "worker", (0, 1): "kernel"}[after[0] - before[0], after[1] - before[1]]


@pytest.fixture
def deepest() -> Iterator[Path]:
    """A control group so deep that the kernel refuses to count levels from it."""
    if KERNEL < (6, 11):
        pytest.skip("this kernel counts levels from the root of all groups")
    root = mounted()
    assert root is not None
    made = [root / f"nfqtest-{os.getpid()}"]
    while len(made) < DEEP:
        made.append(made[-1] / "d")
    for each in made:
        each.mkdir()
    yield made[-1]
    for each in reversed(made):
        leave(each)


def test_a_kernel_that_cannot_ask_for_groups(
    netns: Namespace, tmp_path: Path, resident: Resident, groups: tuple[Path, str], deepest: Path
) -> None:
    root, tag = groups
    inside = (*INSIDE, str(deepest))
    agent = Started(netns, tmp_path, CONFIG.format(tag=tag), inside).ready()
    reason = "nf_tables of this kernel cannot ask for the control group of a socket"
    assert f"queue main: the rules by owner stay in the queue: {reason}" in agent.log
    assert reason in agent.queue()["not_compiled"]
    assert "not compiled: the rules by owner stay in the queue" in agent.verb("status").stdout
    service, other = root / f"payments-{tag}.service", root / f"other-{tag}.service"
    # Headers alone are still the kernel's.
    assert judged(agent, resident, other, 8053, NAMES) == "kernel"
    assert judged(agent, resident, service, 8443, PAYMENTS) == "worker"
    assert judged(agent, resident, other, 8443, DEFAULT) == "worker"
    # None of the verbs asks for it from here, where the kernel can.
    assert "Nothing to do" not in agent.verb("plan", check=False).stdout
    shown = {
        name: netns.run(*inside, *COMMAND, name, "--config", str(agent.config), check=False).stdout
        for name in ("check", "plan", "doctor")
    }
    assert "on this host, queue main is not compiled" in " ".join(shown["check"].split())
    assert "Nothing to do" in shown["plan"]
    assert "policies by unit, container and cgroup are not compiled" in " ".join(shown["doctor"].split())
    assert agent.stop() == 0


def test_a_kernel_that_can_is_asked_once(netns: Namespace) -> None:
    def asked() -> tuple[str | None, list[str | None]]:
        support.kept_groups.clear()
        return support.groups_problem(), support.kept_groups

    assert netns.call(asked) == (None, [None])


def test_who_may_not_ask_takes_it_for_possible(netns: Namespace) -> None:
    def asked() -> tuple[str | None, list[str | None]]:
        support.kept_groups.clear()
        os.setuid(65534)
        return support.groups_problem(), support.kept_groups

    assert netns.call(asked) == (None, [])


@pytest.fixture
def box(groups: tuple[Path, str]) -> Iterator[tuple[Path, Path, str]]:
    """A control group for a namespace, a service in it, and the tag of their names."""
    root, tag = groups
    made = root / f"box-{tag}.slice"
    service = made / f"payments-{tag}.service"
    service.mkdir(parents=True)
    yield made, service, tag
    for each in (service, made):
        leave(each)


def remounted(kind: str) -> tuple[str, ...]:
    """The words of a command that runs another with its own mount of control groups, or with none."""
    root = mounted()
    assert root is not None
    return ("sh", "-ec", AGAIN, str(root), kind)


def test_an_agent_in_a_namespace_knows_the_groups_below_its_own(
    netns: Namespace, tmp_path: Path, resident: Resident, box: tuple[Path, Path, str]
) -> None:
    group, service, tag = box
    agent = Started(netns, tmp_path, CONFIG.format(tag=tag), (*INSIDE, str(group), *remounted("cgroup2"))).ready()
    assert agent.queue()["not_compiled"] == ""
    # Since Linux 6.11 the kernel counts levels from the namespace on; before, the worker judges.
    where = judged(agent, resident, service, 8443, PAYMENTS)
    assert where == "kernel" or KERNEL < (6, 11)
    assert judged(agent, resident, service, 8444, DEFAULT) == where
    # Of a group outside neither knows anything, though it has the same name.
    assert judged(agent, resident, group.parent / service.name, 8443, DEFAULT) == "worker"
    assert agent.stop() == 0


def test_levels_that_are_counted_from_elsewhere_leave_all_to_the_worker(
    netns: Namespace, tmp_path: Path, resident: Resident, box: tuple[Path, Path, str]
) -> None:
    """The agent sees the groups of the whole host, and the kernel counts levels from the root of its namespace."""
    group, service, tag = box
    agent = Started(netns, tmp_path, CONFIG.format(tag=tag), (*INSIDE, str(group))).ready()
    for each in (service, group.parent / service.name):
        assert judged(agent, resident, each, 8443, PAYMENTS) == "worker"
        assert judged(agent, resident, each, 8444, DEFAULT) == "worker"
    assert judged(agent, resident, group.parent / f"other-{tag}.service", 8443, DEFAULT) == "worker"
    assert agent.stop() == 0


def test_without_control_groups_of_version_2_no_rule_by_owner_matches(
    netns: Namespace, tmp_path: Path, resident: Resident, box: tuple[Path, Path, str]
) -> None:
    group, service, tag = box
    agent = Started(netns, tmp_path, CONFIG.format(tag=tag), (*INSIDE, str(group), *remounted("none"))).ready()
    assert "no control groups of version 2 are mounted" in agent.log
    assert "no control groups of version 2 are mounted" in agent.queue()["not_compiled"]
    assert judged(agent, resident, service, 8443, DEFAULT) == "worker"
    assert judged(agent, resident, service, 8053, NAMES) == "kernel"
    assert agent.stop() == 0
