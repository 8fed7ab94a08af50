"""Both families together, all or nothing; and every place where rules of an instance may be."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from agent import Agent, until
from namespace import PATIENCE, Namespace
from rule_texts import baseline, rules

from nfq_agent.host.nftables import support
from nfq_agent.host.nftables.owned import OwnedHost
from nfq_agent.host.xtables.backend import RuleHost, elsewhere
from nfq_agent.host.xtables.legacy import LegacyHost
from nfq_agent.rules.model import FAMILIES, Family, RuleError, Ruleset
from nfq_agent.service.live_rules import LiveRules, Swept, listing

pytestmark = pytest.mark.kernel

HOSTS = pytest.mark.parametrize("host", [LegacyHost("a"), OwnedHost("a")], ids=["legacy", "owned"])
# The kernel takes TPROXY in PREROUTING only (xt_TPROXY.c, nft_tproxy.c).
REFUSED = rules(
    "mangle -A INPUT -m comment --comment nfq-agent:a:jump -j NFQA-a-INPUT",
    "mangle -A NFQA-a-INPUT -p tcp -m multiport --dports 80 -m comment --comment nfq-agent:a:r "
    "-j TPROXY --on-port 15002 --on-ip :: --tproxy-mark 0x800/0x800",
)


def _count(live: LiveRules) -> dict[Family, int]:
    found = listing(live.read())
    return {family: sum(each.family == family for each in found) for family in FAMILIES}


@HOSTS
def test_what_one_family_refuses_the_other_does_not_keep(netns: Namespace, host: RuleHost) -> None:
    def inside() -> None:
        live = LiveRules(host)
        before: Ruleset = {"inet": baseline("a", 1), "inet6": baseline("a", 2)}
        live.apply(before)
        old = [str(each.installed.rule) for each in listing(live.read())]
        assert _count(live) == {"inet": 4, "inet6": 4}
        with pytest.raises(RuleError):
            live.apply({"inet": baseline("a", 1, 2, 3), "inet6": REFUSED})
        assert [str(each.installed.rule) for each in listing(live.read())] == old
        # Nor the other way round.
        with pytest.raises(RuleError):
            live.apply({"inet": REFUSED, "inet6": baseline("a", 1, 2, 3)})
        assert [str(each.installed.rule) for each in listing(live.read())] == old
        live.apply({"inet": baseline("a", 1, 2, 3), "inet6": baseline("a", 1, 2, 3)})
        assert _count(live) == {"inet": 8, "inet6": 8}
        assert set(live.remove()) == set(FAMILIES)
        assert _count(live) == {"inet": 0, "inet6": 0}

    netns.call(inside)


def test_a_family_that_can_not_be_cleaned_does_not_keep_the_other(netns: Namespace) -> None:
    class Broken(LegacyHost):
        """IPv4 fails when its end is awaited."""

        def _finished(self, running: object) -> object:
            answer = super()._finished(running)  # type: ignore[arg-type]  # whatever it was given
            if self.broken and not self.awaited:
                self.awaited = True
                raise RuleError("the child ended without an answer")
            return answer

        broken = awaited = False

    def inside() -> None:
        host = Broken("a")
        live = LiveRules(host)
        live.apply({"inet": baseline(), "inet6": baseline()})
        host.broken = True
        with pytest.raises(RuleError, match="without an answer"):
            live.remove()
        host.broken = False
        assert _count(live)["inet6"] == 0

    netns.call(inside)


def test_two_changes_at_a_time_that_share_a_descriptor_of_the_lock_come_one_after_the_other(netns: Namespace) -> None:
    """A descriptor's lock is everybody's who has it: side by side, both families would think that they hold it."""

    def inside() -> None:
        with open("/run/xtables.lock", "w") as lock:
            host = LegacyHost("a", lock.fileno())
            both = [host.begin(family, baseline()) for family in FAMILIES]
            time.sleep(0.3)
            assert [host.read(family) for family in FAMILIES] == [{}, {}]
            for finish in both:
                assert finish().changes
            # And given back.
            done = subprocess.run(["flock", "--nonblock", "/run/xtables.lock", "echo", "free"], capture_output=True, text=True)
            assert done.stdout == "free\n"

    netns.call(inside)


NATIVE = "nft add rule ip mangle OUTPUT ct state new counter"


def place_everywhere() -> None:
    """Rules of one instance in every place where rules can be."""
    LegacyHost("a").apply_all({family: baseline() for family in FAMILIES})
    for tool in ("iptables", "ip6tables"):
        text = "\n".join(
            [
                "*mangle",
                ":NFQA-a-INPUT - [0:0]",
                ":NFQA-a-OUTPUT - [0:0]",
                *(str(rule) for rule in baseline()["mangle"].rules),
                "-A OUTPUT -p tcp -m comment --comment theirs -j ACCEPT",
                "COMMIT\n",
            ]
        )
        subprocess.run([f"{tool}-nft-restore", "--noflush"], input=text, text=True, check=True)


def everything(netns: Namespace) -> str:
    return netns.shell("iptables-legacy-save; ip6tables-legacy-save; nft list ruleset 2>/dev/null")


def test_legacy_rules_need_no_transaction_of_nf_tables(netns: Namespace) -> None:
    """A probe is one, or two: each waits for all processors, which was a tenth of a start."""

    def look() -> tuple[list[str], Swept, bool]:
        support.kept.clear()
        places = elsewhere(LegacyHost("a"), "a")
        return [place.name for place in places], LiveRules(LegacyHost("a"), places).sweep(), bool(support.kept)

    places, swept, asked = netns.call(look)
    assert (places, swept, asked) == (["owned", "iptables-nft", "foreign nf_tables"], Swept(), False)


def test_rules_that_were_left_elsewhere_are_swept(netns: Namespace) -> None:
    """Also beside a native rule, which keeps iptables-nft from listing the table at all."""

    def sweep() -> tuple[list[str], list[str]]:
        place_everywhere()
        subprocess.run(NATIVE.split(), check=True)
        host = OwnedHost("a")
        live = LiveRules(host, elsewhere(host, "a"))
        live.apply({family: baseline() for family in FAMILIES})
        first, second = live.sweep(), live.sweep()
        assert second == Swept()
        assert first.unknown == ()
        assert _count(live) == {"inet": 4, "inet6": 4}
        live.remove()
        live.close()
        return list(first.removed), list(first.unknown)

    removed, _ = netns.call(sweep)
    assert removed == [
        "removed 8 rules of this instance from legacy tables, where they were left or restored",
        "removed 8 rules of this instance from iptables-nft tables, where they were left or restored",
    ]
    text = everything(netns)
    assert "NFQA" not in text
    assert "nfq-agent" not in text
    # iptables-nft 1.8.11 writes the IPv4 rule as "ip protocol".
    assert len(re.findall("(?:meta l4proto|ip protocol) tcp  counter packets 0 bytes 0 accept", text)) == 2
    assert "ct state new counter" in text


def test_remove_cleans_every_place_and_needs_no_good_configuration(netns: Namespace, tmp_path: Path) -> None:
    netns.call(place_everywhere)
    netns.shell(NATIVE)
    broken = tmp_path / "broken.toml"
    broken.write_text('[agent]\ninstance = "a"\nthis is = no toml [')
    said = netns.run(sys.executable, "-m", "nfq_agent", "remove", "--config", str(broken)).stdout
    assert said.count("# iptables\n") == 2
    assert "NFQA" not in everything(netns)
    again = netns.run(sys.executable, "-m", "nfq_agent", "remove", "--config", str(broken)).stdout
    assert again == "nothing to remove: no rule of instance a is installed\n"


def test_a_chain_of_ours_that_others_jump_to_stays_empty(netns: Namespace) -> None:
    netns.call(place_everywhere)
    netns.shell("iptables-nft -t mangle -A OUTPUT -p udp -j NFQA-a-INPUT")
    netns.run(sys.executable, "-m", "nfq_agent", "remove", "--instance", "a")
    assert [line for line in netns.shell("iptables-nft-save -t mangle").splitlines() if "NFQA" in line] == [
        ":NFQA-a-INPUT - [0:0]",
        "-A OUTPUT -p udp -j NFQA-a-INPUT",
    ]


def test_rules_restored_beside_a_running_agent_go(netns: Namespace, tmp_path: Path) -> None:
    config = '[agent]\nbackend = "owned"\ndrift_check = "200ms"\n[queue.main]\n[rules.app]\nqueue = "main"\ntcp_ports = [1]\n'
    agent = Agent(netns, tmp_path, config).ready()
    rules_of_default = "\n".join(str(rule) for rule in baseline("default")["mangle"].rules)
    text = f"*mangle\n:NFQA-default-INPUT - [0:0]\n:NFQA-default-OUTPUT - [0:0]\n{rules_of_default}\nCOMMIT\n"
    for tool in ("iptables-legacy", "iptables-nft"):
        netns.run(f"{tool}-restore", "--noflush", "--wait", input=text)
        until(lambda tool=tool: "NFQA" not in netns.run(f"{tool}-save").stdout, f"the {tool} rules go")  # type: ignore[misc]  # a default of a lambda
    for kind in ("legacy", "iptables-nft"):
        # It is logged a moment after they are gone.
        until(lambda kind=kind: f"removed 4 rules of this instance from {kind} tables" in agent.log, "it is logged")  # type: ignore[misc]  # as above
    assert agent.status()["drift"]["repairs"] == 0
    assert agent.stop() == 0


def _between(log: str, *words: str) -> float:
    """Seconds between the first lines with these words."""
    times = [next(line for line in log.splitlines() if each in line).split()[0].split(":") for each in words]
    begin, end = (int(hours) * 3600 + int(minutes) * 60 + float(seconds) for hours, minutes, seconds in times)
    # Midnight may lie between them.
    return (end - begin) % 86400


def test_a_start_and_a_stop_wait_for_the_lock_once(netns: Namespace, tmp_path: Path) -> None:
    """Both at a time, since each waits 10 s. The unit has TimeoutStopSec=20, and a proxy's rules go in two steps."""
    text = (
        '[agent]\nbackend = "legacy"\ninstance = "{}"\n[log]\nlevel = "debug"\n'
        '[queue.main]\nnum = {}\n[rules.app]\nqueue = "main"\ntcp_ports = [1]\n'
    )
    proxy = '[proxy.web]\nlisten = ["127.0.0.1:15002"]\n[rules.web]\nproxy = "web"\nhooks = ["output"]\ntcp_ports = [8080]\n'
    stopping = Agent(netns, tmp_path, text.format("b", 101) + proxy + 'family = "inet"\n', instance="b").ready()
    holder = netns.start("flock", "--close", "/run/xtables.lock", "sh", "-c", "echo held; exec sleep 60", stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    stopping.process.terminate()
    starting = Agent(netns, tmp_path, text.format("default", 100))
    assert (stopping.process.wait(PATIENCE), starting.process.wait(PATIENCE)) == (1, 1)
    # Twice would be 20 s. By the log: how long a loaded machine takes to load a program is another matter.
    assert 10 <= _between(starting.log, "start: workers answer", "was not free within") < 20
    assert 10 <= _between(stopping.log, "stop: removing the rules", "was not free within") < 20
    assert "/run/xtables.lock was not free within 10 s: held by flock" in starting.log
    assert "putting" not in starting.log
    assert re.search(r"rules could not be removed: the xtables lock .* held by flock .*; run `nfq-agent remove`", stopping.log)
    holder.kill()
    holder.wait()
    stopping.verb("remove")
    assert "NFQA" not in netns.run("iptables-legacy-save").stdout


def test_a_lock_that_is_a_folder_is_named(netns: Namespace) -> None:
    netns.shell("mkdir /run/xtables.lock")
    with pytest.raises(RuleError, match=r"/run/xtables.lock cannot be opened: Is a directory; remove that directory"):
        netns.call(LegacyHost("a").apply, "inet", baseline())


def test_a_lock_of_another_mount_namespace_is_named(netns: Namespace, tmp_path: Path) -> None:
    text = '[agent]\nbackend = "legacy"\n[queue.main]\n[rules.app]\nqueue = "main"\ntcp_ports = [1]\n'
    agent = Agent(netns, tmp_path, text).ready()
    said = "in this network namespace and this agent take the xtables lock on different files (/run/xtables.lock of another"
    assert said not in agent.log
    assert said not in " ".join(agent.verb("doctor", check=False).stdout.split())
    # As a container with the network of the host.
    words = "mount -t tmpfs tmpfs /run; touch /run/xtables.lock; echo is there; exec sleep 60"
    other = netns.start("unshare", "--mount", "sh", "-ec", words, stdout=subprocess.PIPE)
    assert other.stdout is not None
    other.stdout.readline()
    until(lambda: Path(f"/proc/{other.pid}/comm").read_text() == "sleep\n", "the shell has become sleep")
    doctor = " ".join(agent.verb("doctor", check=False).stdout.split())
    assert f"sleep (pid {other.pid}) {said}" in doctor
    assert 'mount one /run/xtables.lock for both, or set backend = "owned"' in doctor
    assert agent.stop() == 0
    agent.start()
    agent.ready()
    assert said in agent.log
    assert agent.stop() == 0
    other.kill()


SMALL = '[queue.main]\n[rules.app]\nqueue = "main"\ntcp_ports = [1]\n'


def test_one_agent_of_an_instance_for_a_network_namespace(netns: Namespace, tmp_path: Path) -> None:
    """Though each has a /run of its own, as a container with --net=host has."""
    agent = Agent(netns, tmp_path, SMALL).ready()
    command = f"mount -t tmpfs tmpfs /run; exec {sys.executable} -m nfq_agent run --config {agent.config}"
    for _ in range(3):
        second = netns.run("unshare", "--mount", "sh", "-ec", command, check=False)
        assert second.returncode == 1
        assert "an agent of instance default runs in this network namespace with another /run" in second.stderr
        assert f"(pid {agent.process.pid})" in second.stderr
    assert _count_of(netns, "default") == 8
    # Its workers hold nothing that would keep it from coming back.
    agent.kill()
    agent.start()
    agent.ready()
    assert agent.stop() == 0


def test_a_name_that_others_have_taken_keeps_no_agent_from_starting(netns: Namespace, tmp_path: Path) -> None:
    program = (
        "import os, socket, time; os.setuid(65534); s = socket.socket(socket.AF_UNIX); s.bind(chr(0) + 'nfq-agent/default');"
        "s.listen(1); print('there', flush=True); time.sleep(60)"
    )
    squatter = netns.start(sys.executable, "-c", program, stdout=subprocess.PIPE)
    assert squatter.stdout is not None
    assert squatter.stdout.readline() == b"there\n"
    assert Agent(netns, tmp_path, SMALL).ready().stop() == 0
    squatter.kill()


def _count_of(netns: Namespace, instance: str) -> int:
    return netns.shell("iptables-legacy-save; ip6tables-legacy-save").count(f'"nfq-agent:{instance}:')


@pytest.mark.parametrize("backend", ["legacy", "owned"])
def test_an_agent_that_starts_while_a_change_waits_for_its_yes_keeps_its_rules(
    netns: Namespace, tmp_path: Path, backend: str
) -> None:
    head = f'[agent]\nbackend = "{backend}"\n'
    file = tmp_path / "change.toml"
    file.write_text(f"{head}{SMALL.replace('[1]', '[2]')}")
    command = [sys.executable, "-m", "nfq_agent", "apply", "--confirm", "120", "--config", str(file)]
    waiting = netns.start(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert waiting.stdout is not None
    until(lambda: b"Type yes" in waiting.stdout.readline(), "the rules are in")  # type: ignore[union-attr]  # asserted above
    agent = Agent(netns, tmp_path, head + SMALL).ready()
    # As if its time were over.
    waiting.kill()
    assert b"has been started and keeps its rules" in waiting.stdout.read()
    assert "Nothing to do" in agent.verb("plan").stdout
    assert agent.stop() == 0


def test_closed_standard_streams(netns: Namespace, tmp_path: Path) -> None:
    """A socket would take their numbers, and the log would be written into it."""
    config = tmp_path / "a.toml"
    config.write_text(SMALL)
    command = f"exec {sys.executable} -m nfq_agent"
    assert netns.run("sh", "-c", f"{command} plan --config {config} <&- >&- 2>&-", check=False).returncode == 3
    process = netns.start("sh", "-c", f"{command} run --config {config} <&- >&- 2>&-")
    until(lambda: _count_of(netns, "default") == 8, "the rules are in")
    process.terminate()
    assert process.wait(PATIENCE) == 0
    assert _count_of(netns, "default") == 0
