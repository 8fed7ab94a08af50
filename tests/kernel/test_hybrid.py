"""The hybrid: the same agent watches all, judges one port in a queue and another inline, on a bridge and routed."""

from __future__ import annotations

from pathlib import Path

import pytest
from agent import COMMAND, Agent, ours, until
from containers import bridged, routed
from inlined import all_judged
from namespace import Namespace

CONFIG = Path(__file__).parent.parent / "configs" / "hybrid.toml"


@pytest.mark.parametrize("layout", ["bridged", "routed"])
def test_the_hybrid_judges_each_port_where_it_is_said(netns: Namespace, tmp_path: Path, layout: str) -> None:
    first, second = bridged(netns) if layout == "bridged" else routed(netns)
    address = "10.5.0.2" if layout == "bridged" else "10.6.2.2"
    netns.shell("echo 1 >/proc/sys/net/bridge/bridge-nf-call-iptables")
    second.serve()
    agent = Agent(netns, tmp_path, CONFIG.read_text()).ready()
    for port in (8080, 9090):
        assert first.get(address, "www.free.test", port=port) == "200"
        assert first.get(address, "www.blocked.test", port=port, seconds=1.5) == "000"
    # Neither sees the other's port.
    all_judged(agent)
    status = agent.status()
    (queue,), (inline,), (tap,) = status["queues"], status["inlines"], status["taps"]
    assert sum(worker["dropped"] for worker in queue["workers"]) > 0
    assert inline["counters"]["dropped"] > 0
    until(lambda: agent.status()["taps"][0]["counters"]["judged"] > 20, "the tap has seen both")
    assert tap["counters"]["would_drop"] == 0
    assert agent.stop() == 0
    assert ours(netns) == []
    assert first.get(address, "www.blocked.test") == "200"


def test_one_port_is_judged_and_another_is_watched(netns: Namespace, tmp_path: Path) -> None:
    netns.shell("echo 1 >/proc/sys/net/bridge/bridge-nf-call-iptables")
    first, second = bridged(netns)
    second.serve()
    text = CONFIG.read_text()
    watched = '[tap.pods]\ninterfaces = ["veth1"]\ntcp_ports = [9090]\nelements = ["dpi", "verdicts"]\n'
    text = watched + text[text.index("[queue.l7]") : text.index("[inline.apps]")] + text[text.index("[element.verdicts]") :]
    agent = Agent(netns, tmp_path, text).ready()
    assert first.get("10.5.0.2", "www.blocked.test", port=8080, seconds=1.5) == "000"
    assert first.get("10.5.0.2", "www.blocked.test", port=9090) == "200"
    until(lambda: agent.status()["taps"][0]["counters"]["would_drop"] > 0, "the tap would have dropped it")
    assert sum(worker["dropped"] for worker in agent.status()["queues"][0]["workers"]) > 0
    assert agent.stop() == 0


def test_netfilter_sees_nothing_of_a_bridge_without_br_netfilter(netns: Namespace, tmp_path: Path) -> None:
    netns.shell("echo 0 >/proc/sys/net/bridge/bridge-nf-call-iptables")
    first, second = bridged(netns)
    second.serve()
    agent = Agent(netns, tmp_path, CONFIG.read_text()).ready()
    assert first.get("10.5.0.2", "www.blocked.test", port=8080) == "200"
    assert first.get("10.5.0.2", "www.blocked.test", port=9090, seconds=1.5) == "000"
    status = agent.status()
    assert sum(worker["received"] for queue in status["queues"] for worker in queue["workers"]) == 0
    assert status["inlines"][0]["counters"]["dropped"] > 0
    assert agent.stop() == 0


@pytest.mark.parametrize(("inline", "queued"), [("server", "client"), ("client", "server")])
def test_each_role_of_an_application_is_judged_where_it_is_said(
    netns: Namespace, tmp_path: Path, inline: str, queued: str
) -> None:
    """The first container asks, the second serves; both are one interface with one port in two roles."""
    netns.shell("echo 1 >/proc/sys/net/bridge/bridge-nf-call-iptables")
    first, second = bridged(netns)
    second.serve()
    roles = f"""
[queue.l7]
num = 120
[rules.apps]
queue = "l7"
hooks = ["forward"]
interface = "veth1"
bridge = true
tcp_ports = [8080]
role = "{queued}"
[inline.apps]
interfaces = ["veth1"]
tcp_ports = [8080]
role = "{inline}"
"""
    agent = Agent(netns, tmp_path, roles).ready()
    assert first.get("10.5.0.2") == "200"
    assert first.get("fd05::2") == "200"
    status = agent.status()
    seen = {
        queued: sum(worker["received"] for worker in status["queues"][0]["workers"]),
        inline: status["inlines"][0]["counters"]["judged"],
    }
    assert seen["client"] >= 20
    assert seen["server"] == 0
    assert agent.stop() == 0


INLINE = '[inline.i]\ninterfaces = ["veth*"]\ntcp_ports = ["8000:8100"]\n'
RULE = '[queue.q]\nnum = 1\n[rules.r]\nqueue = "q"\nhooks = ["forward"]\n'
BAD = [
    ("rules", INLINE + RULE + 'interface = "veth1"\ntcp_ports = [8080]\n', "port 8080 of veth1 is judged by [rules.r] too"),
    ("all", INLINE + RULE + 'interface = "v*"\nall = true\n', "port 8000:8100 of v* is judged by [rules.r] too"),
    ("inline", INLINE + '[inline.j]\ninterfaces = ["veth7"]\n', "port 8000:8100 of veth7 is judged by [inline.i] too"),
    ("exclude", INLINE + 'exclude = ["veths1"]\n' + RULE + 'interface = "veths*"\ntcp_ports = [8080]\n', "port 8080 of veths*"),
    ("role", '[inline.i]\ninterfaces = ["veth*"]\nrole = "client"\n', "no port is named"),
    ("bridge", RULE + "bridge = true\ntcp_ports = [1]\n", "bridge = true matches ports of a bridge"),
]
GOOD = [
    INLINE + RULE + 'interface = "eth*"\ntcp_ports = [8080]\n',
    INLINE + RULE + 'interface = "veth*"\ntcp_ports = [9090]\nudp_ports = [8080]\n',
    INLINE + '[inline.j]\ninterfaces = ["cali*"]\n',
    INLINE + 'exclude = ["vethshop"]\n' + RULE + 'interface = "vethshop"\ntcp_ports = [8080]\n',
    INLINE + 'exclude = ["vethshop*"]\n[inline.j]\ninterfaces = ["vethshop?"]\ntcp_ports = [8080]\n',
    INLINE + 'role = "server"\n' + RULE + 'interface = "veth1"\ntcp_ports = [8080]\nrole = "client"\n',
    INLINE + 'role = "server"\n[inline.j]\ninterfaces = ["veth*"]\ntcp_ports = [8080]\nrole = "client"\n',
]


@pytest.mark.parametrize(("text", "said"), [bad[1:] for bad in BAD], ids=[bad[0] for bad in BAD])
def test_overlapping_selections_are_refused(netns: Namespace, tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    done = netns.run(*COMMAND, "check", "--config", str(path), check=False)
    assert done.returncode == 78
    assert said in done.stderr


@pytest.mark.parametrize("text", GOOD)
def test_selections_beside_each_other_are_good(netns: Namespace, tmp_path: Path, text: str) -> None:
    path = tmp_path / "good.toml"
    path.write_text(text)
    netns.run(*COMMAND, "check", "--config", str(path))


@pytest.mark.parametrize(("hook", "warned"), [("forward", True), ("input", False)])
def test_a_rule_for_all_forwarded_packets_beside_an_inline_link_is_warned_about(
    netns: Namespace, tmp_path: Path, hook: str, warned: bool
) -> None:
    path = tmp_path / "warned.toml"
    path.write_text(INLINE + RULE.replace("forward", hook) + "tcp_ports = [8080]\n")
    done = netns.run(*COMMAND, "check", "--config", str(path))
    assert ("inline.i and rules.r both take port 8080" in done.stdout + done.stderr) == warned
