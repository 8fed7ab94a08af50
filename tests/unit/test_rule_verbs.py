"""`plan`, `apply`, `remove` and `rules` over a kernel in memory: what they change, what they say, and how they end."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from answering import Answering
from fake_rules import FakeHost, FakeKernel
from recorded import capture

from nfq_agent.cli import rule_verbs
from nfq_agent.cli.flags import Flags
from nfq_agent.config.models import ConfigError
from nfq_agent.host import pairs, routes
from nfq_agent.host.users import User
from nfq_agent.rules.model import RuleError
from nfq_agent.service import control
from nfq_agent.testing import tcp

FOREIGN = "-A OUTPUT -p tcp -m tcp --dport 7 -j DROP"
CONFIG = """
[queue.open]
num = 1
[queue.closed]
num = 2
bypass = false
[rules.open]
queue = "open"
tcp_ports = [11000]
family = "inet"
[rules.closed]
queue = "closed"
tcp_ports = [11001]
family = "inet"
"""


class World:
    """A kernel in memory, a configuration file, and the users of the host."""

    def __init__(self, folder: Path) -> None:
        self.kernel = FakeKernel()
        self.kernel.restore("inet", f"*mangle\n{FOREIGN}\nCOMMIT")
        self.user: User | None = User(990, 990)
        self.file = folder / "nfq-agent.toml"
        self.configure(CONFIG)

    def configure(self, text: str) -> None:
        self.file.write_text(text)

    @property
    def flags(self) -> Flags:
        return Flags(config=self.file)

    def ensure_user(self, _: str) -> tuple[User, bool]:
        made = self.user is None
        self.user = self.user or User(990, 990)
        return self.user, made

    def rules(self) -> list[str]:
        return [line.partition("] ")[2] for line in self.kernel.save("inet") if "] -A " in line]


@pytest.fixture
def world(tmp_path: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """The verbs, with the operating system's side replaced: the rules of a kernel in memory, its users, its interfaces."""
    assert run_folder.is_dir()
    made = World(tmp_path)
    monkeypatch.setattr(rule_verbs, "choose", lambda _backend, instance, **_: FakeHost(made.kernel, instance))
    monkeypatch.setattr(rule_verbs, "everywhere", lambda instance: [FakeHost(made.kernel, instance)])
    monkeypatch.setattr(rule_verbs, "find_user", lambda _: made.user)
    monkeypatch.setattr(rule_verbs, "ensure_user", made.ensure_user)
    monkeypatch.setattr(routes, "sweep", lambda _: False)
    monkeypatch.setattr(pairs, "sweep", lambda _: 0)
    return made


Said = pytest.CaptureFixture[str]


def test_a_plan_writes_nothing_and_says_what_apply_would_do(world: World, capsys: Said) -> None:
    assert rule_verbs.plan(world.flags, as_json=False, capture=None) == 3
    text = capsys.readouterr().out
    assert text.startswith("# Plan for instance default, fake backend: 9 rules added, 0 removed. Nothing is written.")
    assert world.rules() == [FOREIGN]
    written = [line for line in text.splitlines() if line.startswith("iptables") or " -A " in f" {line}"]
    assert rule_verbs.apply(world.flags, None) == 0
    assert all(any(line in each for each in written) for line in world.rules() if line != FOREIGN)


def test_a_plan_of_what_is_there_is_empty(world: World, capsys: Said) -> None:
    rule_verbs.apply(world.flags, None)
    capsys.readouterr()
    assert rule_verbs.plan(world.flags, as_json=False, capture=None) == 0
    text = capsys.readouterr().out
    assert "Nothing to do: the kernel has the rules of instance default as configured" in text
    assert "besides" not in text


def test_a_plan_without_the_user_says_that_it_would_be_made(world: World, capsys: Said) -> None:
    world.user = None
    assert rule_verbs.plan(world.flags, as_json=False, capture=None) == 3
    assert "# besides: the system user proxyuser would be created" in capsys.readouterr().out
    # Also where no rule is to be changed.
    world.configure('[tap.wire]\ninterfaces = ["none0"]\n')
    assert rule_verbs.plan(world.flags, as_json=False, capture=None) == 3
    assert "# besides: the system user proxyuser would be created" in capsys.readouterr().out


def test_a_plan_for_programs(world: World, capsys: Said) -> None:
    assert rule_verbs.plan(world.flags, as_json=True, capture=None) == 3
    found = json.loads(capsys.readouterr().out)
    assert (found["instance"], found["backend"], found["policy_changed"]) == ("default", "fake", None)
    assert [each["chain"] for each in found["changes"] if each["do"] == "new-chain"] == [
        "NFQA-default-INPUT",
        "NFQA-default-OUTPUT",
    ]
    assert {each["table"] for each in found["changes"]} == {"mangle"}
    assert all(each["rule"].startswith("-A ") for each in found["changes"] if each["do"] == "insert")
    rule_verbs.apply(world.flags, None)
    world.configure(CONFIG.split("[rules.closed]")[0])
    capsys.readouterr()
    assert rule_verbs.plan(world.flags, as_json=True, capture=None) == 3
    changes = json.loads(capsys.readouterr().out)["changes"]
    inserted, deleted = ([each["rule"] for each in changes if each["do"] == do] for do in ("insert", "delete"))
    # A rule that stays is moved to the place of one that goes.
    assert not [rule for rule in inserted if "11001" in rule]
    assert len(deleted) > len(inserted)


def test_a_plan_with_a_capture_is_one_object_for_programs(world: World, capsys: Said, tmp_path: Path) -> None:
    seen = capture(tmp_path / "seen.pcap", [tcp("10.0.0.1:40001", "192.0.2.7:11000", flags="S")])
    assert rule_verbs.plan(world.flags, as_json=True, capture=seen) == 3
    found = json.loads(capsys.readouterr().out)
    assert [(flow["queues"], flow["after"]) for flow in found["replay"]["flows"]] == [(["open"], "accept")]
    assert rule_verbs.plan(world.flags, as_json=True, capture=tmp_path / "none") == 1
    said = capsys.readouterr()
    assert json.loads(said.out)["replay"] is None
    assert "No such file" in said.err


def test_beside_an_agent_a_plan_says_what_changes_for_packets(world: World, agent: Answering, capsys: Said) -> None:
    agent.reply = {"queues": {}}
    assert rule_verbs.plan(world.flags, as_json=False, capture=None) == 3
    assert "new queue open" in capsys.readouterr().out
    agent.reply = {"ok": False}
    assert rule_verbs.plan(world.flags, as_json=False, capture=None) == 3
    assert agent.asked == [{"verb": "policies"}, {"verb": "policies"}]


@pytest.mark.parametrize(
    ("table", "code", "before"),
    [
        (tomllib.loads(CONFIG), 4, "accept"),
        ({**tomllib.loads(CONFIG), "queue": {"open": {"num": 1, "default": "drop"}, "closed": {"num": 2}}}, 3, "drop"),
        # An agent of an earlier version, and one whose configuration cannot be read here.
        (None, 3, None),
        ({"queue": {"open": {"nonsense": 1}}}, 3, None),
    ],
)
def test_beside_an_agent_a_capture_is_compared_with_what_it_does(
    world: World, agent: Answering, capsys: Said, tmp_path: Path, table: dict[str, Any] | None, code: int, before: str | None
) -> None:
    world.configure(CONFIG.replace("[queue.open]", '[queue.open]\ndefault = "drop"'))
    seen = capture(tmp_path / "seen.pcap", [tcp("10.0.0.1:40001", "192.0.2.7:11000", flags="S")])
    agent.reply = {"queues": {}, "table": table}
    assert rule_verbs.plan(world.flags, as_json=True, capture=seen) == code
    (flow,) = json.loads(capsys.readouterr().out)["replay"]["flows"]
    assert (flow["before"], flow["after"]) == (before, "drop")
    assert rule_verbs.plan(world.flags, as_json=False, capture=seen) == code
    text = " ".join(capsys.readouterr().out.split())
    compared = f"compared with the verdicts by the running agent: 1 flow, {int(before == 'accept')} changed"
    alone = "the capture has no verdicts of an agent; beside a running agent its configuration is compared with"
    assert (compared if before else alone) in text


def test_apply_inserts_in_front_of_foreign_rules_that_stay(world: World, capsys: Said) -> None:
    assert rule_verbs.apply(world.flags, None) == 0
    assert FOREIGN in world.rules()
    assert any("--queue-num 1 " in f"{line} " and "--uid-owner" not in line for line in world.rules())
    assert any("--uid-owner 990" in line for line in world.rules())
    text = capsys.readouterr().out
    assert "9 rules added, 0 removed" in text
    assert "warning: no agent serves closed, and bypass = false: its traffic is dropped until an agent runs" in text
    assert rule_verbs.apply(world.flags, None) == 0
    assert "Nothing to do: the rules are as they should be." in capsys.readouterr().out


def test_apply_makes_the_user_and_says_so(world: World, capsys: Said) -> None:
    world.user = None
    assert rule_verbs.apply(world.flags, None) == 0
    assert "created the system user proxyuser (uid 990)" in capsys.readouterr().out


def test_apply_leaves_the_rules_of_a_running_agent_to_it(world: World, agent: Answering) -> None:
    agent.reply = {"ok": True, "pid": 1}
    with pytest.raises(control.ControlError, match="is running and keeps its own rules; use `nfq-agent reload`"):
        rule_verbs.apply(world.flags, None)
    assert world.rules() == [FOREIGN]


def test_apply_of_a_bad_file_changes_nothing(world: World) -> None:
    world.configure(CONFIG.replace("11001", '"no port"'))
    with pytest.raises(ConfigError):
        rule_verbs.apply(world.flags, None)
    assert world.rules() == [FOREIGN]


def test_a_kernel_that_refuses_leaves_what_was_there(world: World) -> None:
    world.kernel.fail_at = 1
    with pytest.raises(RuleError, match="the kernel said no"):
        rule_verbs.apply(world.flags, None)
    assert world.rules() == [FOREIGN]


def test_remove_takes_its_own_rules_alone(world: World, capsys: Said) -> None:
    rule_verbs.apply(world.flags, None)
    assert rule_verbs.remove(world.flags, after_failure=False) == 0
    assert world.rules() == [FOREIGN]
    assert "0 rules added, 9 removed" in capsys.readouterr().out
    assert rule_verbs.remove(world.flags, after_failure=False) == 0
    assert "nothing to remove: no rule of instance default is installed" in capsys.readouterr().out


def test_remove_of_another_instance_leaves_these(world: World, capsys: Said) -> None:
    rule_verbs.apply(world.flags, None)
    before = world.rules()
    assert rule_verbs.remove(Flags(instance="other"), after_failure=False) == 0
    assert world.rules() == before
    assert "no rule of instance other is installed" in capsys.readouterr().out


@pytest.mark.parametrize(("result", "stays"), [("success", False), ("signal", True)])
def test_after_a_failure_the_rules_that_fail_closed_stay(
    world: World, monkeypatch: pytest.MonkeyPatch, result: str, stays: bool
) -> None:
    rule_verbs.apply(world.flags, None)
    monkeypatch.setenv("SERVICE_RESULT", result)
    assert rule_verbs.remove(world.flags, after_failure=True) == 0
    kept = [line for line in world.rules() if "NFQUEUE" in line]
    assert bool(kept) == stays
    assert all("--queue-num 2" in line for line in kept)


def test_a_place_that_cannot_be_cleaned_does_not_keep_the_others(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(FakeHost):
        name = "refusing"

        def apply_all(self, *_: Any, **__: Any) -> Any:
            raise RuleError("it says no")

    rule_verbs.apply(world.flags, None)
    other = FakeKernel()
    monkeypatch.setattr(rule_verbs, "everywhere", lambda name: [Refusing(other, name), FakeHost(world.kernel, name)])
    with pytest.raises(RuleError, match="refusing: it says no"):
        rule_verbs.remove(world.flags, after_failure=False)
    assert world.rules() == [FOREIGN]


def test_routes_and_pairs_are_removed_and_named(world: World, monkeypatch: pytest.MonkeyPatch, capsys: Said) -> None:
    monkeypatch.setattr(routes, "sweep", lambda _: True)
    monkeypatch.setattr(pairs, "sweep", lambda alias: 2 if alias.endswith("default:") else 0)
    assert rule_verbs.remove(world.flags, after_failure=False) == 0
    text = capsys.readouterr().out
    assert "removed the routing rules of instance default (TPROXY)" in text
    assert "removed 2 interface pairs of instance default (inline)" in text
    assert "nothing to remove" not in text


def test_the_installed_rules_with_their_counters(world: World, capsys: Said) -> None:
    assert rule_verbs.rules(world.flags, as_json=False) == 0
    assert "No rule of instance default is in the kernel." in capsys.readouterr().out
    rule_verbs.apply(world.flags, None)
    capsys.readouterr()
    for entries in world.kernel.tables["inet"]["mangle"].chains.values():
        for entry in entries:
            entry.packets, entry.bytes = 3, 180
    assert rule_verbs.rules(world.flags, as_json=False) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "# iptables -t mangle (fake)"
    assert len([line for line in lines if line.split()[:2] == ["3", "180"]]) == 9
    assert rule_verbs.rules(world.flags, as_json=True) == 0
    found = json.loads(capsys.readouterr().out)["rules"]
    assert len(found) == 9
    assert {(each["family"], each["table"], each["packets"]) for each in found} == {("inet", "mangle", 3)}
    assert all("dport 7" not in each["rule"] for each in found)
