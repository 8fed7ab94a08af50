"""One agent of an instance: the second is refused, by the file and by the name, until the first has released both."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from forked import in_child

from nfq_agent.service.control import ControlError, folder, state_folder
from nfq_agent.service.instance_lock import Lock, living_agent

# Of this run alone: the name is one of the network namespace.
INSTANCE = f"unit-{os.getpid()}"


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path / "state"))


def test_a_second_agent_is_refused_by_the_pid_of_the_first(tmp_path: Path) -> None:
    first = Lock(INSTANCE)
    assert (tmp_path / f"{INSTANCE}.lock").read_text() == f"{os.getpid()}\n"
    with pytest.raises(ControlError, match=rf"is already running \(pid {os.getpid()}\)"):
        Lock(INSTANCE)
    Lock(f"{INSTANCE}-other").release()
    first.release()
    Lock(INSTANCE).release()


def test_another_run_folder_does_not_make_two_agents_in_a_network_namespace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "state").mkdir()
    first = Lock(INSTANCE)
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path / "container" / "state"))
    with pytest.raises(ControlError, match=rf"with another /run \(pid {os.getpid()}\)"):
        Lock(INSTANCE)
    first.release()
    second = Lock(INSTANCE)
    assert len(set(second.descriptors)) == 2
    second.release()


def test_a_living_agent_is_told_from_one_that_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert living_agent(INSTANCE) == ""
    lock = Lock(INSTANCE)
    assert living_agent(INSTANCE) == f"pid {os.getpid()}"
    assert living_agent(f"{INSTANCE}-other") == ""
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path / "container" / "state"))
    assert living_agent(INSTANCE) == f"pid {os.getpid()}"
    lock.release()
    assert living_agent(INSTANCE) == ""


def test_a_name_that_does_not_tell_whose_it_is_does_not_hide_an_agent() -> None:
    """Its backlog may be full, or it may be another user's."""
    lock = Lock(INSTANCE)
    lock._name.close()  # noqa: SLF001  # as if another process had taken it before
    with socket.socket(socket.AF_UNIX) as other, socket.socket(socket.AF_UNIX) as waiting:
        other.bind(f"\0nfq-agent/{INSTANCE}")
        other.listen(0)
        waiting.connect(f"\0nfq-agent/{INSTANCE}")
        assert living_agent(INSTANCE) == f"pid {os.getpid()}"
        os.close(lock.descriptors[0])
        assert living_agent(INSTANCE) == ""


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    tmp_path.joinpath(f"{INSTANCE}.lock").mkdir()
    with pytest.raises(ControlError, match=rf"{INSTANCE}\.lock: Is a directory; remove it"):
        Lock(INSTANCE)


@pytest.mark.parametrize("inner", ["", "state"])
def test_a_runtime_directory_of_one_s_own_is_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inner: str) -> None:
    """RuntimeDirectory=nfq-agent, and nfq-agent/state as in the packaged unit."""
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path / "nfq-agent" / inner))
    assert folder() == tmp_path / "nfq-agent"
    assert state_folder() == tmp_path / "nfq-agent" / "state"


def test_an_agent_that_is_started_again_lives_and_keeps_others_out() -> None:
    lock = Lock(INSTANCE)
    (descriptor,) = lock.handed().values()
    # As the program that follows has it.
    kept = os.dup(descriptor)
    lock.release()
    assert living_agent(INSTANCE) == f"pid {os.getpid()}"

    def other() -> int:
        try:
            Lock(INSTANCE)
        except ControlError as error:
            print(error)
            return 1
        return 0

    done = in_child(other)
    assert (done.returncode, f"is being started again (pid {os.getpid()})" in done.stdout) == (1, True)
    # The program that follows, in the same process.
    second = Lock(INSTANCE)
    os.close(kept)
    assert living_agent(INSTANCE) == f"pid {os.getpid()}"
    second.release()
    assert living_agent(INSTANCE) == ""
    assert in_child(other).returncode == 0
