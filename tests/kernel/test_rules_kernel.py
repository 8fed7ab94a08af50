"""What only a real kernel shows of rules: other writers, the lock, traffic, packets that wait."""

from __future__ import annotations

import os
import random
import re
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from agent import until
from namespace import Namespace
from netfilterqueue import NetfilterQueue
from rule_texts import baseline, ours, rules
from saved_rules import other_table, saved
from traffic import Flood, send

from nfq_agent.host.nftables.owned import OwnedHost
from nfq_agent.host.xtables import kernel, legacy
from nfq_agent.host.xtables.backend import RuleHost
from nfq_agent.host.xtables.kernel import Tables
from nfq_agent.host.xtables.legacy import LegacyHost
from nfq_agent.rules.diff import diff
from nfq_agent.rules.model import RuleError

pytestmark = pytest.mark.kernel


def writer(tool: str, seed: int, changes: int) -> tuple[str, list[str], list[str]]:
    """A script that adds, replaces and deletes rules; what chain THEIRS and what OUTPUT hold after it."""
    chance = random.Random(seed)
    theirs: list[str] = []
    output: list[str] = []
    lines = []
    for number in range(changes):
        spec = f"-p tcp -m tcp --dport {number + 1} -j ACCEPT"
        match chance.choice("aarrrdAAD"):
            case "r" if theirs:
                place = chance.randrange(len(theirs))
                lines.append(f"-R THEIRS {place + 1} {spec}")
                theirs[place] = spec
            case "d" if theirs:
                place = chance.randrange(len(theirs))
                lines.append(f"-D THEIRS {place + 1}")
                del theirs[place]
            case "A":
                lines.append(f"-A OUTPUT {spec}")
                output.append(spec)
            case "D" if output:
                lines.append(f"-D OUTPUT {output.pop(chance.randrange(len(output)))}")
            case _:
                lines.append(f"-A THEIRS {spec}")
                theirs.append(spec)
    write = f"{tool} -w -t mangle"
    script = f"trap 'touch /run/done' EXIT\n{write} -N THEIRS\n" + "".join(f"{write} {line}\n" for line in lines)
    # It continues until the other writer has had its rounds, so that neither is over before the other has begun.
    script += f"while [ ! -e /run/enough ]; do {write} -A THEIRS -j RETURN; {write} -D THEIRS -j RETURN; done\n"
    return script, theirs, output


def apply_and_remove_until_done(host: RuleHost) -> int:
    rounds = 0
    while not os.path.exists("/run/done"):
        host.apply("inet", baseline("a", 1, 2))
        host.apply("inet", baseline("a", 2, 3))
        host.apply("inet", {})
        rounds += 1
        if rounds == 5:
            Path("/run/enough").touch()
    return rounds


@pytest.mark.parametrize("host", [LegacyHost("a"), OwnedHost("a")], ids=["legacy", "owned"])
@pytest.mark.parametrize("tool", ["iptables-legacy", "iptables-nft"])
def test_no_change_of_a_concurrent_writer_is_lost(netns: Namespace, host: RuleHost, tool: str) -> None:
    script, theirs, output = writer(tool, 7, 500 if tool == "iptables-legacy" else 200)
    process = netns.start("sh", "-ec", script, stderr=subprocess.PIPE)
    rounds = netns.call(apply_and_remove_until_done, host, timeout=240)
    assert process.wait(90) == 0, process.stderr.read() if process.stderr else ""
    assert rounds >= 5
    lines = saved(netns, tool)
    for chain, expected in (("THEIRS", theirs), ("OUTPUT", output)):
        found = [line.partition(f" -A {chain} ")[2] for line in lines if f" -A {chain} " in line]
        assert found == expected
    assert ours(lines) == []


def test_two_instances_write_at_once(netns: Namespace) -> None:
    """Both take the lock, so neither is refused nor overwritten."""

    def both() -> None:
        child = os.fork()
        instance = "a" if child else "b"
        try:
            host = LegacyHost(instance)
            for _ in range(20):
                host.apply("inet", baseline(instance))
                host.apply("inet", {})
            host.apply("inet", baseline(instance))
        finally:
            if child == 0:
                os._exit(0 if sys.exception() is None else 1)
        assert os.waitpid(child, 0)[1] == 0

    netns.call(both)
    for instance in ("a", "b"):
        assert not diff(baseline(instance), netns.call(LegacyHost(instance).read, "inet"))


def test_a_lock_that_is_held_is_waited_for_in_vain(netns: Namespace) -> None:
    holder = netns.start("flock", "/run/xtables.lock", "sh", "-c", "echo held; exec sleep 60", stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    began = time.monotonic()
    with pytest.raises(RuleError, match=rf"not free within 0\.3 s: held by flock \(pid {holder.pid}\)"):
        netns.call(LegacyHost("a", lock_seconds=0.3).apply, "inet", baseline())
    assert time.monotonic() - began >= 0.3
    assert saved(netns) == []
    # Looking needs no lock.
    assert netns.call(LegacyHost("a").read, "inet") == {}
    holder.kill()


def test_a_lock_that_comes_free_in_time_is_taken(netns: Namespace) -> None:
    holder = netns.start("flock", "/run/xtables.lock", "sh", "-c", "echo held; exec sleep 0.5", stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    netns.call(LegacyHost("a").apply, "inet", baseline())
    assert ours(saved(netns))


def test_the_lock_is_made_as_iptables_makes_it(netns: Namespace) -> None:
    def mode() -> int:
        LegacyHost("a").apply("inet", baseline())
        return os.stat("/run/xtables.lock").st_mode & 0o777

    assert netns.call(mode) == 0o600


def test_a_lock_taken_by_a_child_that_died_is_given_back(netns: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: Any) -> None:
        os._exit(3)

    def tried() -> str:
        lock = os.open("/run/xtables.lock", os.O_RDONLY | os.O_CREAT, 0o600)
        host = LegacyHost("a", lock)
        monkeypatch.setattr(legacy, "apply_and_verify", die)
        with pytest.raises(RuleError, match="ended without an answer: exit code 3"):
            host.apply("inet", baseline())
        return subprocess.run(["flock", "--nonblock", "/run/xtables.lock", "echo", "free"], capture_output=True, text=True).stdout

    assert netns.call(tried) == "free\n"


def test_a_writer_without_the_lock_makes_us_read_again(netns: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel refuses a table whose number of rules is no longer what was read (EAGAIN)."""
    read = Tables.read
    meddled: list[int] = []

    def read_and_be_overtaken(session: Tables) -> Any:
        state = read(session)
        if len(meddled) < 3:
            meddled.append(1)
            command = ["iptables-legacy", "-w", "-t", "mangle", "-I", "INPUT", "-p", "udp", "-j", "ACCEPT"]
            subprocess.run(command, check=True, env={**os.environ, "XTABLES_LOCKFILE": "/run/another.lock"})
        return state

    monkeypatch.setattr(Tables, "read", read_and_be_overtaken)
    applied = netns.call(LegacyHost("a").apply, "inet", baseline())
    assert not diff(baseline(), applied.after)
    assert len([line for line in saved(netns) if line.endswith("-A INPUT -p udp -j ACCEPT")]) == 3
    # With no end to it, it gives up and leaves nothing behind.
    monkeypatch.setattr(kernel, "_PATIENCE", 0.0)
    with pytest.raises(RuleError, match="Resource temporarily unavailable"):
        netns.call(LegacyHost("a").apply, "inet", {})


def test_a_rule_that_moved_unnoticed_is_not_mistaken_for_ours(netns: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Number and size of the rules stay the same when two of them change places: only the rule itself shows it."""
    netns.shell("iptables-legacy -w -t mangle -A INPUT -p udp -m udp --dport 9 -j ACCEPT")
    host = LegacyHost("a")
    netns.call(host.apply, "inet", baseline())
    read = Tables.read
    meddled: list[int] = []

    def read_and_be_overtaken(session: Tables) -> Any:
        state = read(session)
        if not meddled:
            meddled.append(1)
            rule = "-p udp -m udp --dport 9 -j ACCEPT"
            swap = f"iptables-legacy -w -t mangle -D INPUT 2; iptables-legacy -w -t mangle -I INPUT 1 {rule}"
            subprocess.run(["sh", "-ec", swap], check=True, env={**os.environ, "XTABLES_LOCKFILE": "/run/another.lock"})
        return state

    monkeypatch.setattr(Tables, "read", read_and_be_overtaken)
    netns.call(host.apply, "inet", {})
    lines = saved(netns)
    assert ours(lines) == []
    assert [line for line in lines if "--dport 9 -j ACCEPT" in line] == ["[0:0] -A INPUT -p udp -m udp --dport 9 -j ACCEPT"]


def counter(netns: Namespace, port: int) -> int:
    """The packets of the foreign rule that counts a port."""
    return next(int(match[1]) for line in saved(netns) if (match := re.match(rf"\[(\d+):.*--dport {port} ", line)))


def test_nothing_is_committed_when_nothing_differs(netns: Namespace) -> None:
    """A commit sets a foreign limit back to its full burst: so it shows whether there was one."""
    limited = "-p udp -m udp --dport 9 -m limit --limit 1/hour --limit-burst 2 -j ACCEPT"
    netns.shell(f"iptables-legacy -w -t mangle -A OUTPUT {limited}")
    host = LegacyHost("a")
    netns.call(host.apply, "inet", baseline())
    netns.call(send, 9, 5)
    assert counter(netns, 9) == 2
    for _ in range(3):
        netns.call(host.apply, "inet", baseline())
        netns.call(host.read, "inet")
    netns.call(send, 9, 5)
    assert counter(netns, 9) == 2
    # Where something differs there has to be one.
    netns.call(host.apply, "inet", baseline("a", 1))
    netns.call(send, 9, 5)
    assert counter(netns, 9) == 4


def test_foreign_counters_are_exact_under_traffic(netns: Namespace) -> None:
    netns.shell("iptables-legacy -w -t mangle -A OUTPUT -p udp -m udp --dport 11000 -j RETURN")
    flood = Flood(netns)

    def five_rounds() -> None:
        host = LegacyHost("a")
        for _ in range(5):
            before = counter(netns, 11000)
            host.apply("inet", baseline("a", 1, 2))
            host.apply("inet", baseline("a", 2, 3))
            host.apply("inet", {})
            # The traffic has gone on meanwhile.
            until(lambda before=before: counter(netns, 11000) > before, "packets are counted")  # type: ignore[misc]  # bound early

    netns.call(five_rounds)
    sent = flood.end()
    assert counter(netns, 11000) == sent


@pytest.mark.parametrize("host", [LegacyHost("a"), OwnedHost("a")], ids=["legacy", "owned"])
def test_packets_that_wait_outlive_every_change_of_rules(netns: Namespace, host: LegacyHost | OwnedHost) -> None:
    def change() -> int:
        receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        receiver.bind(("127.0.0.1", 53))
        receiver.settimeout(60)
        waiting = rules(
            'mangle -A OUTPUT -m comment --comment "nfq-agent:a:jump" -j NFQA-a-OUTPUT',
            'mangle -A NFQA-a-OUTPUT -p udp -m comment --comment "nfq-agent:a:u" -j NFQUEUE --queue-num 100',
        )
        host.apply("inet", waiting)
        queue = NetfilterQueue()
        queue.bind(100, lambda packet: packet.accept())
        send(53, 20)
        host.apply("inet", {"mangle": waiting["mangle"], **rules(*other_table())})
        other = type(host)("b")
        other.apply("inet", baseline("b"))
        other.apply("inet", {})
        host.apply("inet", {})
        assert Path("/proc/net/netfilter/nfnetlink_queue").read_text().split()[2] == "20"
        queue.run(block=False)
        queue.unbind()
        return sum(receiver.recv(9) == b"x" for _ in range(20))

    assert netns.call(change) == 20


def test_a_target_that_does_not_take_its_option_is_refused_before_anything_is_written(netns: Namespace) -> None:
    wrong = rules(
        'mangle -A OUTPUT -m comment --comment "nfq-agent:a:jump" -j NFQA-a-OUTPUT',
        'mangle -A NFQA-a-OUTPUT -m comment --comment "nfq-agent:a:x" -j NFQUEUE --queue-numb 7',
    )
    with pytest.raises(RuleError, match=r"cannot write the rule .*--queue-numb 7"):
        netns.call(LegacyHost("a").apply, "inet", wrong)
    # An octal number, which libxtables reads as another number.
    wrong = rules(
        'mangle -A OUTPUT -m comment --comment "nfq-agent:a:jump" -j NFQA-a-OUTPUT',
        'mangle -A NFQA-a-OUTPUT -m comment --comment "nfq-agent:a:x" -j NFQUEUE --queue-num 010',
    )
    with pytest.raises(RuleError, match="would write"):
        netns.call(LegacyHost("a").apply, "inet", wrong)
    assert saved(netns) == []


def test_rules_that_cannot_be_read_now_are_not_said_to_be_removed(netns: Namespace) -> None:
    """A stop took a family that could not be asked about for one that the kernel lacks, and left its rules."""

    def removed_without_a_free_descriptor() -> None:
        free = os.open(os.devnull, os.O_RDONLY)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        try:
            LegacyHost("a").apply_all({"inet": {}, "inet6": {}}, undo=False)
        finally:
            # Its answer needs some.
            resource.setrlimit(resource.RLIMIT_NOFILE, (free + 10, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

    netns.call(LegacyHost("a").apply_all, {"inet": baseline(), "inet6": baseline()})
    with pytest.raises(RuleError, match="cannot be read: Too many open files"):
        netns.call(removed_without_a_free_descriptor)
    netns.call(LegacyHost("a").apply_all, {"inet": {}, "inet6": {}}, False)
    assert ours(saved(netns)) == []
