"""What the shell is offered in place of a name: of the configuration, of agents, of this host; and in a filter."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from nfq_agent.cli import offered_names
from nfq_agent.cli.completing import filled, filter_fields, fixed
from nfq_agent.cli.offered_names import matching, offered
from nfq_agent.flow_filter import FilterError, parse

CONFIG = """
[agent]
instance = "web"
[queue.egress]
num = 7
elements = ["dpi", "allow", "own:Guard"]
[queue.ingress]
balance = "8:9"
[element.allow]
type = "policy"
rule = [
  { action = "accept", name = "shop", tls_sni = ["*.shop.test", "shop.test"], unit = "payments.service", dport = [443, "8:9"] },
  { action = "drop", container = "web-*", dst = ["10.0.0.0/8", "file:list"], interface = "eth7", set = "blocked src" },
]
[rules.egress]
queue = "egress"
tcp_ports = [25]
set = "bad dst"
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (path := tmp_path / "main.toml").write_text(CONFIG)
    monkeypatch.setattr(offered_names, "_CGROUPS", str(tmp_path / "cgroup"))
    monkeypatch.setattr(offered_names, "_SOCKETS", str(tmp_path / "run"))
    monkeypatch.setattr(offered_names, "_FOLDER", str(tmp_path / "etc"))
    return str(path)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("queue-name", ["egress", "ingress"]),
        ("queue", ["7"]),
        ("instance", ["web"]),
        ("element", ["allow", "dpi", "own:Guard"]),
        ("rule", ["rule 1 (shop)", "rule 2"]),
        ("reason", ["allow: rule 1 (shop)", "allow: rule 2"]),
        ("name", ["*.shop.test", "shop.test"]),
        ("unit", ["payments.service"]),
        ("container", ["web-*"]),
        ("dport", ["25", "443", "8:9"]),
        ("host", ["10.0.0.0/8"]),
        ("set", ["bad", "blocked"]),
        ("nonsense", []),
    ],
)
def test_names_of_the_configuration(config: str, kind: str, names: list[str]) -> None:
    assert offered(kind, config) == names


def test_drop_ins_count_and_a_file_of_an_instance(config: str, tmp_path: Path) -> None:
    for folder, name in (("conf.d", "a"), ("main.d", "b"), ("other.d", "c")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{name}.toml").write_text(f"[queue.{name}]\nnum = 1\n")
    assert offered("queue-name", config) == ["a", "b", "egress", "ingress"]
    (tmp_path / "etc").mkdir()
    assert offered("queue-name") == ["main"]
    for name in ("nfq-agent", "api", "Not-One"):
        (tmp_path / "etc" / f"{name}.toml").write_text(f"[queue.of-{name}]\nnum = 1\n")
    assert offered("queue-name") == ["of-nfq-agent"]
    assert offered("queue-name", None, "api") == ["of-api"]
    assert offered("queue-name", None, "../main") == ["of-nfq-agent"]
    assert offered("instance") == ["api"]


def test_names_of_the_host(config: str, tmp_path: Path) -> None:
    for path in ("system.slice/nginx.service", "user.slice/user-7.slice/session-3.scope", "init.scope", "other/no.service"):
        (tmp_path / "cgroup" / path).mkdir(parents=True)
    names = ["init.scope", "nginx.service", "payments.service", "session-3.scope", "system.slice", "user-7.slice", "user.slice"]
    assert offered("unit", config) == names
    assert offered("interface", config) == sorted({"eth7", *(name for _, name in socket.if_nameindex())})
    (tmp_path / "run").mkdir()
    for name in ("default.sock", "default.lock", "state"):
        (tmp_path / "run" / name).touch()
    assert offered("instance", config) == ["default", "web"]


@pytest.mark.parametrize(
    ("text", "queues"),
    [
        ("[queue.a]\nnum = \n[queue.b]\n[[rules.c]]\n", ["a", "b"]),
        ("queue = 5", []),
        ("queue = [1, 2]\nelement = 3", []),
        ('[queue]\n"a\\u0007b" = 1\n"$(id)" = 2\n"`id`" = 3\n"it\'s" = 4\n"ok" = 5', ["ok"]),
        ("[" * 10_000, []),
        ("", []),
        ("[queue.big]\n#" + "x" * 200_000, ["big"]),
    ],
)
def test_whatever_a_file_has_the_shell_is_not_told_of_it(config: str, text: str, queues: list[str]) -> None:
    Path(config).write_text(text)
    assert offered("queue-name", config) == queues
    for kind in ("element", "rule", "reason", "instance", "unit", "name"):
        offered(kind, config)


def test_a_pipe_and_a_missing_file_are_not_waited_for(config: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "missing", "conf.d", ""):
        assert offered("queue-name", str(tmp_path / name)) == ["main"]


def at(typed: str, config: str) -> list[str]:
    return [text.removeprefix(typed) for text in matching("filter", typed, config)]


@pytest.mark.parametrize(
    ("typed", "offers"),
    [
        ("uni", ["t =", "t !=", "t ~", "t !~"]),
        ("dst", [" =", " !="]),
        ("byt", ["es =", "es !=", "es <", "es <=", "es >", "es >="]),
        ("verdict ", ["=", "!=", "~", "!~"]),
        ("verdict !", ["=", "~"]),
        ("verdict =", [" accept", " drop", " reject", " would-drop"]),
        ("verdict = ", ["accept", "drop", "reject", "would-drop"]),
        ("verdict = D", []),
        ("hook = p", ["rerouting", "ostrouting"]),
        ("unit = pay", ["ments.service"]),
        ("container = ", []),
        ("container ~ ", ["web-*"]),
        ("name ~ *", [".shop.test"]),
        ("name = ", ["shop.test"]),
        ("dport = 443,", [" 25", " 443", " 8:9"]),
        ("dst = 10", [".0.0.0/8"]),
        ("rule = ", ['"rule 1 (shop)"', '"rule 2"']),
        ('rule = "rule 1', [' (shop)"']),
        ("verdict = drop ", ["and", "or"]),
        ("verdict = drop a", ["nd"]),
        ("verdict = drop and (uni", ["t =", "t !=", "t ~", "t !~"]),
        ("(verdict = drop) o", ["r"]),
        ("not (verdict = drop or dir", ["ection =", "ection !=", "ection ~", "ection !~"]),
        ("verdict = drop drop ", []),
        ("nam = ", []),
        ("= ", []),
        ("verdict = drop ; ", []),
        ('rule = "x" ', ["and", "or"]),
    ],
)
def test_a_filter_is_completed_where_each_part_is_expected(config: str, typed: str, offers: list[str]) -> None:
    assert at(typed, config) == offers


def test_what_is_offered_can_be_read() -> None:
    fields = filter_fields()
    for field, known in fields.items():
        for operator in known["operators"]:
            values = known["values"] or ["10.0.0.1" if field in ("src", "dst", "host") else "7"]
            for value in values:
                parse(f"{field} {operator} {value}")
        assert filled(f"{field} ", fields, lambda _: ()) == [f"{field} {each}" for each in known["operators"]]
    with pytest.raises(FilterError, match="compares numbers"):
        parse("unit < a")


def test_names_that_do_not_change() -> None:
    assert "drop=" in fixed("fault")
    assert "generation=" not in fixed("fault")
    assert {"tcp", "udp"} < {*fixed("ip-protocol")}
    assert fixed("unit") == []
