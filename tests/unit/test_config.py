"""The file format: what must work unchanged, drop-ins, and any value of any key."""

from __future__ import annotations

import json
import pwd
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planned import UID, config_of

from nfq_agent.config.file import BASELINE, load, load_table
from nfq_agent.config.models import Config, ConfigError
from nfq_agent.rules.plan import plan

CONFIGS = Path(__file__).parent.parent / "configs"
SHIPPED = CONFIGS.parents[1] / "packaging" / "nfq-agent.toml"


QUEUE = "[queue.q]\nnum = 1\n"


RULE = '[rules.r]\nqueue = "q"\n'


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*.toml")))
def test_every_shared_configuration_is_good(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root = pwd.getpwnam("root")
    # egress-policy names a user of its own; which host has it is not the file's matter.
    monkeypatch.setattr(pwd, "getpwnam", lambda _: root)
    load(CONFIGS / name)


def test_without_a_file_the_baseline_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nfq_agent.config.file.DEFAULT_PATH", tmp_path / "nfq-agent.toml")
    assert load() == Config.model_validate(BASELINE)
    assert load().takes_whole(load().queue["main"])
    for written_out in map(load, (CONFIGS / "baseline.toml", SHIPPED)):
        assert written_out == load().model_copy({"rules": written_out.rules})
        # Table and role of a rule are those of its target where the file leaves them out.
        assert plan(written_out, UID) == plan(load(), UID)


def test_drop_ins_are_merged_in_name_order(tmp_path: Path) -> None:
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "main.toml").write_text(QUEUE + RULE + "tcp_ports = [1]\n")
    (tmp_path / "conf.d" / "20.toml").write_text("[queue.q]\nnum = 20\n")
    (tmp_path / "conf.d" / "10.toml").write_text('[queue.q]\nnum = 10\ndefault = "drop"\n')
    (tmp_path / "conf.d" / "notes.txt").write_text("not ours")
    config = load(tmp_path / "main.toml")
    assert (config.queue["q"].num, config.queue["q"].default) == (20, "drop")
    (tmp_path / "conf.d" / "30.toml").write_text("[queue.q]\nnum = 70000\n")
    with pytest.raises(ConfigError, match=r"30\.toml: queue\.q\.num"):
        load(tmp_path / "main.toml")
    # What was read before the fault can be served again.
    again = load_table(json.loads(json.dumps(config.table)), tmp_path / "main.toml")
    assert again == config
    assert (config.remark == "", again.remark == "") == (True, False)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=9), lambda inner: st.lists(inner, max_size=3)))
def test_no_value_of_any_key_breaks_the_check(value: object) -> None:
    for table, model in (("queue", "q"), ("rules", "r"), ("proxy", "p"), ("agent", None), ("log", None)):
        fields = Config.model_fields[table].annotation
        for key in (
            "num",
            "elements",
            "hooks",
            "tcp_ports",
            "listen",
            "instance",
            "level",
            "balance",
            "copy",
            "owner",
            str(fields),
        ):
            inner = {key: value}
            merged = {table: {model: inner} if model else inner}
            try:
                Config.model_validate(merged)
            except ValueError:
                continue


@pytest.mark.parametrize(
    ("rule", "elements", "gso", "whole", "cuts"),
    [
        ({"tcp_ports": [80], "udp_ports": [53]}, ["log"], {}, True, True),
        ({"all": True}, ["log"], {}, True, True),
        ({"udp_ports": [53]}, [], {}, True, False),
        ({"udp_ports": [53]}, ["chaos"], {}, True, True),
        ({"udp_ports": [53]}, ["answers"], {}, False, False),
        ({"udp_ports": [53]}, ["log"], {"gso": True}, True, False),
        ({"tcp_ports": [80]}, ["log"], {"gso": False}, False, False),
    ],
)
def test_offloaded_packets_come_whole_and_datagrams_are_cut_where_nothing_is_rewritten(
    rule: dict[str, Any], elements: list[str], gso: dict[str, bool], whole: bool, cuts: bool
) -> None:
    tables = {"answers": {"type": "dns-answer", "names": ["ads.test"]}}
    config = config_of(queue={"main": {"elements": elements, **gso}}, rules={"app": {"queue": "main", **rule}}, element=tables)
    assert config.takes_whole(config.queue["main"]) is whole
    assert config.cuts_datagrams(config.queue["main"]) is cuts
