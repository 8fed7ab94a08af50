"""`run` with a fault in the files: what the previous agent served stays in force."""

from __future__ import annotations

from pathlib import Path

import pytest
from store_contract import FakeKeeper

from nfq_agent.cli import loading, serve
from nfq_agent.cli.flags import Flags
from nfq_agent.config.models import ConfigError
from nfq_agent.service.inheritance import CONFIGURATION, TRIAL
from nfq_agent.service.store import Store

GOOD = '[queue.main]\nnum = 7\n[rules.app]\nqueue = "main"\ntcp_ports = [11000]\n'


def test_the_configuration_that_was_served_stays_in_force(tmp_path: Path) -> None:
    file = tmp_path / "main.toml"
    flags = Flags(file)
    file.write_text(GOOD)
    served = loading.configuration(flags)
    file.write_text(GOOD.replace("num", "number"))
    with pytest.raises(ConfigError) as fault:
        loading.configuration(flags)
    store = Store({"queue-7": 99}, FakeKeeper())
    with pytest.raises(ConfigError, match="number"):
        serve.served_before(flags, store, fault.value)
    store.note(CONFIGURATION, served.table)
    again = serve.served_before(flags, store, fault.value)
    assert again == served
    assert again.remark == "; with the previous configuration, not that of the files"
    # Where that cannot be served either, all faults are named.
    store.note(CONFIGURATION, {"queue": {"main": {"num": 70000}}})
    with pytest.raises(ConfigError, match=r"number[\s\S]*70000"):
        serve.served_before(flags, store, fault.value)
    # Nothing serves: a start is refused.
    with pytest.raises(ConfigError, match="number"):
        serve.served_before(flags, Store({}, FakeKeeper()), fault.value)


def test_a_crash_does_not_bring_in_a_file_that_was_taken_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "main.toml"
    flags = Flags(file)
    file.write_text(GOOD)
    before = loading.configuration(flags)
    file.write_text(GOOD.replace("11000", "22"))
    refused = loading.configuration(flags)
    store = Store({}, FakeKeeper())
    store.note(CONFIGURATION, before.table)
    assert serve.without_taken_back(flags, store, refused) == (refused, None)
    store.note(TRIAL, {"taken back": True})
    served, why = serve.without_taken_back(flags, store, refused)
    assert served == before
    assert why is not None
    assert why.faults == ["the reload of the file was taken back; `nfq-agent reload` reads it again"]
    # What cannot be served any more leaves the file.
    store.note(CONFIGURATION, {"queue": {"main": {"num": 70000}}})
    assert serve.without_taken_back(flags, store, refused) == (refused, None)
    assert "the file was taken back, and is read nevertheless" in capsys.readouterr().err
