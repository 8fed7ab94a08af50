"""`verify` and `dst_name` in a configuration: refused where no rule shows DNS answers, and whose answers are believed."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from nfq_agent.config.file import load
from nfq_agent.config.models import Config, ConfigError
from nfq_agent.config.name_needs import name_needs
from nfq_agent.config.warnings import warnings

CONFIG = """
[agent]
resolvers = ["192.0.2.53", "2001:db8::53"]
[queue.q]
elements = ["dpi", "allow"]
[queue.dns]
num = 101
elements = [{dns}]
[element.allow]
type = "policy"
rule = [ {{ action = "accept", {rule} }} ]
[rules.web]
queue = "q"
tcp_ports = [443]
[rules.dns]
queue = "dns"
{selection}
"""
VERIFY = 'tls_sni = ["*.good.test"], verify = "dns"'


def config(
    folder: Path, selection: str = 'hooks = ["input", "output"]\nudp_ports = [53]', dns: str = '"dpi"', rule: str = VERIFY
) -> Config:
    path = folder / "x.toml"
    path.write_text(CONFIG.format(selection=selection, dns=dns, rule=rule))
    return load(path)


@pytest.mark.parametrize(
    "selection",
    [
        'hooks = ["input", "output"]\nudp_ports = [53]',
        'hooks = ["input", "output"]\nudp_ports = ["50:60"]\nrole = "client"',
        'hooks = ["output", "forward"]\nall = true',
        'hooks = ["output", "forward"]\nall = true\nrole = "client"',
        'hooks = ["forward"]\nudp_ports = [53]',
        'hooks = ["output"]\nudp_ports = [53]\nrole = "both"',
        'hooks = ["input", "output"]\nprotocol = ["udp"]',
    ],
)
@pytest.mark.parametrize("rule", [VERIFY, 'dst_name = ["a.good.test"]'])
def test_rules_that_show_answers(tmp_path: Path, selection: str, rule: str) -> None:
    needs = name_needs(config(tmp_path, selection, rule=rule))
    assert needs is not None
    assert needs.wanted == (("*.good.test",) if rule is VERIFY else ("a.good.test",))
    assert needs.believed == (socket.inet_aton("192.0.2.53"), socket.inet_pton(socket.AF_INET6, "2001:db8::53"))


@pytest.mark.parametrize(
    ("selection", "dns"),
    [
        ('hooks = ["input", "output"]\nudp_ports = [53]', '"log"'),
        ('hooks = ["input", "output"]\ntcp_ports = [53]', '"dpi"'),
        ('hooks = ["input"]\nudp_ports = [53]', '"dpi"'),
        ('hooks = ["output"]\nudp_ports = [53]\nrole = "client"', '"dpi"'),
        ('hooks = ["input", "output"]\nudp_ports = [53]\nrole = "server"', '"dpi"'),
        ('hooks = ["output"]\nall = true\nuid = [0]', '"dpi"'),
        ('hooks = ["input", "output"]\nall = true\nnot_udp_ports = [53]', '"dpi"'),
    ],
)
def test_rules_that_do_not(tmp_path: Path, selection: str, dns: str) -> None:
    with pytest.raises(ConfigError, match="verify and dst_name need DNS answers"):
        config(tmp_path, selection, dns)


@pytest.mark.parametrize(
    ("rule", "what"),
    [
        ('verify = "dns"', "without a name"), ('tls_sni = ["a"], verify = "yes"', "verify"), ('dst_name = []', "dst_name"),
        ('dns_name = ["a"], verify = "dns"', "without a name"),
    ],
)  # fmt: skip
def test_rules_that_prove_nothing(tmp_path: Path, rule: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        config(tmp_path, rule=rule)


def test_a_rule_that_drops_proves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    text = CONFIG.format(selection='hooks = ["input", "output"]\nudp_ports = [53]', dns='"dpi"', rule=VERIFY)
    path.write_text(text.replace('action = "accept"', 'action = "drop"'))
    with pytest.raises(ConfigError, match='not "drop"'):
        load(path)


def test_a_resolver_whose_answers_are_not_seen_is_warned_about(tmp_path: Path) -> None:
    said = [line for line in warnings(config(tmp_path, 'hooks = ["output"]\nall = true')) if "192.0.2.53" in line]
    assert len(said) == 1
    assert not [line for line in warnings(config(tmp_path)) if "192.0.2.53" in line]


def test_without_such_rules_nothing_is_needed(tmp_path: Path) -> None:
    assert name_needs(config(tmp_path, 'hooks = ["input"]\ntcp_ports = [9]', rule='tls_sni = ["a"]')) is None


def test_the_resolvers_of_the_host_and_its_stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resolv = tmp_path / "resolv.conf"
    resolv.write_text("# nameserver 192.0.2.1\nsearch x\nnameserver 192.0.2.2\nnameserver fe80::1%eth0\nnameserver none\n")
    monkeypatch.setattr("nfq_agent.config.lookups._RESOLV", resolv)
    path = tmp_path / "y.toml"
    text = CONFIG.format(selection='hooks = ["input", "output"]\nudp_ports = [53]', dns='"dpi"', rule=VERIFY)
    path.write_text(text.replace('resolvers = ["192.0.2.53", "2001:db8::53"]', ""))
    loaded = load(path)
    needs = name_needs(loaded)
    assert needs is not None
    shown = [socket.inet_ntop(socket.AF_INET if len(each) == 4 else socket.AF_INET6, each) for each in needs.believed]
    assert shown == ["192.0.2.2", "fe80::1", "127.0.0.53", "127.0.0.54"]
    assert loaded.changed_files() == []
    resolv.write_text("nameserver 192.0.2.3\n")
    assert [loaded.changed_files() for _ in range(2)] == [[], [resolv]]
