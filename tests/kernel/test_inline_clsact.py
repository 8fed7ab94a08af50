"""`[inline]` with `attach = "clsact"`, as on a kernel without tcx links: filters that pass without us, removed by handle."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from agent import COMMAND, Agent, until
from containers import bridged, interfaces, traces
from inlined import all_judged, attached, config, inline_of
from namespace import Namespace

CLSACT = config(more='attach = "clsact"\npatience = "300ms"')


def with_foreign_filters(netns: Namespace) -> None:
    netns.shell("""
        tc qdisc add dev veth1 clsact; tc qdisc add dev veth2 clsact
        tc filter add dev veth1 ingress pref 7 protocol ip u32 match ip dport 99 0xffff action mirred egress redirect dev veth2
        tc filter add dev veth1 egress pref 8 protocol all u32 match u32 0 0
    """)


def test_a_denied_name_is_dropped_and_foreign_filters_are_left_to_the_byte(netns: Namespace, tmp_path: Path) -> None:
    first, second = bridged(netns)
    second.serve()
    with_foreign_filters(netns)
    before = traces(netns)
    agent = Agent(netns, tmp_path, CLSACT).ready()
    assert attached(netns) == 0
    for address in ("10.5.0.2", "fd05::2"):
        assert first.get(address, "www.free.test") == "200"
        assert first.get(address, "www.blocked.test", seconds=1.5) == "000"
    inline = all_judged(agent)
    assert (inline["dropped"] > 0, inline["lost"], inline["hidden"]) == (True, 0, 0)
    netns.shell("tc filter add dev veth2 ingress pref 1 protocol ip u32 match ip dport 99 0xffff || true")
    # Theirs has our preference and another handle, or is refused; ours is removed alone.
    agent.configure(CLSACT.replace("300ms", "400ms"))
    agent.verb("reload")
    assert first.get("10.5.0.2", "www.blocked.test", seconds=1.5) == "000"
    assert agent.stop() == 0
    netns.shell("tc filter del dev veth2 ingress pref 1 2>/dev/null || true")
    assert traces(netns) == before


def test_a_filter_that_comes_before_ours_is_noticed(netns: Namespace, tmp_path: Path) -> None:
    bridged(netns)
    netns.shell("tc qdisc add dev veth1 clsact; tc filter add dev veth1 ingress pref 1 protocol all u32 match u32 0 0")
    agent = Agent(netns, tmp_path, CLSACT).ready()
    until(lambda: inline_of(agent)["hidden"] == 1, "it is noticed")
    assert "the filter with preference 1 of another owner" in agent.log
    assert agent.stop() == 0


@pytest.mark.parametrize("victim", ["worker", "all"])
def test_what_a_kill_leaves_passes_everything(netns: Namespace, tmp_path: Path, victim: str) -> None:
    first, second = bridged(netns)
    second.serve()
    with_foreign_filters(netns)
    before = traces(netns)
    agent = Agent(netns, tmp_path, CLSACT).ready()
    worker = inline_of(agent)["pid"]
    if victim == "worker":
        os.kill(worker, signal.SIGKILL)
        until(lambda: inline_of(agent)["pid"] not in (None, worker), "another worker serves")
        assert first.get("10.5.0.2", "www.blocked.test", seconds=1.5) == "000"
        assert agent.stop() == 0
    else:
        os.kill(agent.process.pid, signal.SIGSTOP)
        os.kill(worker, signal.SIGKILL)
        agent.kill()
        assert first.get("10.5.0.2", "www.blocked.test") == "200"
        assert "nfq-agent:default:pods" in netns.shell("tc filter show dev veth1 ingress")
        assert "removed 4 filters of instance default" in agent.verb("remove").stdout
    assert traces(netns) == before


def test_names_that_begin_alike_are_apart(netns: Namespace, tmp_path: Path) -> None:
    first, second = bridged(netns)
    second.serve()
    both = CLSACT + CLSACT[: CLSACT.index("[element")].replace("[inline.pods]", "[inline.pod]").replace("veth*", "cali*")
    agent = Agent(netns, tmp_path, both).ready()
    assert len([name for name in interfaces(netns) if name.startswith("nfq")]) == 4
    assert first.get("10.5.0.2", "www.blocked.test", seconds=1.5) == "000"
    assert agent.stop() == 0


def test_an_ingress_qdisc_is_refused_by_name(netns: Namespace, tmp_path: Path) -> None:
    bridged(netns)
    netns.shell("tc qdisc add dev veth2 ingress")
    agent = Agent(netns, tmp_path, CLSACT).ready()
    assert "veth2 cannot be taken" in agent.log
    assert "its ingress qdisc has no egress side" in agent.log
    assert [each["name"] for each in inline_of(agent)["interfaces"]] == ["veth1"]
    assert agent.stop() == 0
    assert netns.shell("tc filter show dev veth2 ingress") == ""


def test_check_says_what_is_missing(netns: Namespace, tmp_path: Path) -> None:
    path = tmp_path / "inline.toml"
    path.write_text('[inline.t]\ninterfaces = ["veth*"]\nattach = "clsact"\n')
    netns.run(*COMMAND, "check", "--config", str(path))
    # A kernel that has neither module: it names no symbol of theirs.
    netns.shell("mount --bind /dev/null /proc/kallsyms; mkdir /run/none; mount --bind /run/none /lib/modules 2>/dev/null || true")
    done = netns.run(*COMMAND, "check", "--config", str(path), check=False)
    assert done.returncode == 78
    assert "clsact with cls_bpf" in done.stderr
