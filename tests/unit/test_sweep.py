"""What `sweep` does for a service in each state that systemd reports; a program plays systemctl, the processes are real."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nfq_agent.cli import rule_verbs, sweep
from nfq_agent.cli.flags import Flags

UNIT = "nfq-agent@lab.service"
# Where systemd puts the units of a template.
GROUP = f"/system.slice/system-nfq\\x2dagent.slice/{UNIT}"
FLAGS = Flags(None, "lab")


class Service:
    """A service in a folder: systemctl reads its properties from files, and its control group is a list of processes."""

    def __init__(self, folder: Path) -> None:
        self.cleaned: list[tuple[str, bool]] = []
        self._folder = folder
        self._group = Path(f"{folder}/cgroup{GROUP}")
        self._group.mkdir(parents=True)
        self._procs = self._group / "cgroup.procs"
        self._procs.touch()
        self.is_now(ActiveState="inactive", Result="success", ControlGroup=GROUP)
        program = folder / "bin/systemctl"
        program.parent.mkdir()
        # systemctl show --value --property=NAME UNIT
        program.write_text(f'#!/bin/sh\n[ "$4" = {UNIT} ] && cat "{folder}/${{3#--property=}}"\n')
        program.chmod(0o755)

    def is_now(self, **properties: str) -> None:
        for name, value in properties.items():
            (self._folder / name).write_text(f"{value}\n")

    def holds(self, *processes: subprocess.Popen[bytes]) -> None:
        self._procs.write_text("".join(f"{each.pid}\n" for each in processes))

    def clean(self, name: str, failed: bool) -> int:
        self.cleaned.append((name, failed))
        return 0


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Service:
    made = Service(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    monkeypatch.setattr(sweep, "_CGROUP_TREES", (str(tmp_path / "none"), str(tmp_path / "cgroup")))
    monkeypatch.setattr(sweep, "_ENDS_WITHIN", 0.3)
    monkeypatch.setattr(rule_verbs, "clean", made.clean)
    return made


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as made:
        yield made
        made.kill()


@pytest.mark.parametrize("state", ["active", "activating", "reloading", "refreshing"])
def test_a_service_that_runs_is_left_alone(
    service: Service, process: subprocess.Popen[bytes], state: str, capfd: pytest.CaptureFixture[str]
) -> None:
    service.is_now(ActiveState=state)
    service.holds(process)
    assert sweep.sweep(FLAGS) == 0
    assert not service.cleaned
    assert process.poll() is None
    assert f"{UNIT} is active: nothing to sweep" in capfd.readouterr().out


@pytest.mark.parametrize(("result", "failed"), [("success", False), ("", False), ("signal", True), ("exit-code", True)])
def test_the_rules_of_a_failed_service_stay_where_they_block_traffic(service: Service, result: str, failed: bool) -> None:
    service.is_now(Result=result)
    assert sweep.sweep(FLAGS) == 0
    assert service.cleaned == [("lab", failed)]


# systemd forgets the group of a unit that has ended.
@pytest.mark.parametrize("group", [GROUP, ""])
def test_what_does_not_end_is_killed(
    service: Service,
    process: subprocess.Popen[bytes],
    group: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    service.is_now(ControlGroup=group)
    # Long for one that ends by itself.
    monkeypatch.setattr(sweep, "_ENDS_WITHIN", 2.0)
    with subprocess.Popen(["sleep", "0.05"]) as ends:
        service.holds(ends, process)
        assert sweep.sweep(FLAGS) == 0
        assert ends.wait(60) == 0
    assert process.wait(60) == -signal.SIGKILL
    assert "killed 1 processes of the service that were left" in capfd.readouterr().out


def test_a_service_that_starts_meanwhile_keeps_its_processes(
    service: Service, process: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    service.holds(process)

    def starts(name: str, failed: bool) -> int:
        service.is_now(ActiveState="active")
        return service.clean(name, failed)

    monkeypatch.setattr(rule_verbs, "clean", starts)
    assert sweep.sweep(FLAGS) == 0
    assert service.cleaned == [("lab", False)]
    assert process.poll() is None


def test_without_systemd_the_rules_are_removed(service: Service, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert sweep.sweep(FLAGS) == 0
    assert service.cleaned == [("lab", False)]
