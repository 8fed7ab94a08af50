"""Descriptors and notes that the next agent gets: by systemd's store, and by starting again in place."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from store_contract import FakeKeeper, alive, check_keeper, manager

from nfq_agent.host import reexec, systemd
from nfq_agent.host.memory import Note, SharedNumbers
from nfq_agent.service.store import Store


def test_the_fake_keeps_the_contract() -> None:
    fake = FakeKeeper()
    check_keeper(fake, iter(lambda: fake.kept, None))


def test_the_protocol_keeps_the_contract(tmp_path: Path) -> None:
    with manager(str(tmp_path)) as (end, service):
        check_keeper(service, iter(lambda: end.kept, None))


def test_a_socket_that_was_full_is_not_polled(tmp_path: Path) -> None:
    with manager(str(tmp_path)) as (end, service):
        store = Store({}, service)
        reader, writer = os.pipe()
        store.put("queue-1", reader)
        store.put("worker-1", writer, True)
        assert sorted(end.kept) == ["queue-1", "worker-1"]
        assert end.polled == {"queue-1": False, "worker-1": True}
        os.close(reader)
        os.close(writer)


def test_a_name_has_one_descriptor() -> None:
    keeper = FakeKeeper()
    store = Store({}, keeper)
    first, second = os.pipe()
    store.put("worker-1", first)
    store.put("worker-1", first)
    assert len(keeper.kept["worker-1"]) == 1
    store.put("worker-1", second)
    assert len(keeper.kept["worker-1"]) == 1
    assert store.kept == {"worker-1": second}
    store.clear()
    assert keeper.kept == {}
    os.close(second)
    assert not alive(first)
    os.close(first)


def test_what_is_handed_over_is_taken_once_and_kept_for_the_next() -> None:
    keeper = FakeKeeper()
    reader, writer = os.pipe()
    store = Store({"queue-1": reader, "worker-1": writer}, keeper)
    assert store.inherited
    assert store.waiting("queue-") == ["queue-1"]
    assert store.take("queue-1") == reader
    assert store.take("queue-1") is None
    assert store.kept == {"queue-1": reader}
    # The service manager has it already.
    assert keeper.kept == {}
    store.discard("worker-1")
    assert not store.inherited
    assert not alive(reader)
    os.close(reader)


def test_notes_reach_the_next_process() -> None:
    first = Store()
    first.note("meter", {"rules": [["inet", "mangle", "rule", 7]]})
    first.note("queue-1", {"settings": (1, 2)})
    first.note("queue-1", None)
    handed = {name: os.dup(descriptor) for name, descriptor in first.kept.items()}
    second = Store(handed)
    assert second.noted("meter") == {"rules": [["inet", "mangle", "rule", 7]]}
    assert second.noted("queue-1") == {}
    assert not second.inherited


def test_a_note_that_was_not_written_to_its_end_is_the_one_before() -> None:
    note = Note()
    assert note.read() == {}
    note.write({"number": 1})
    note.write({"number": 2})
    # The second is in the first place of the two.
    os.pwrite(note.fileno(), b"x", 20)
    assert note.read() == {"number": 1}
    note.write({"number": 3})
    assert Note(os.dup(note.fileno())).read() == {"number": 3}
    with pytest.raises(OSError, match="does not fit"):
        note.write({"long": "x" * (1 << 20)})


def test_numbers_are_shared_by_descriptor() -> None:
    first = SharedNumbers()
    second = SharedNumbers(os.dup(first.fileno()))
    first.numbers[:2] = b"ab"
    assert bytes(second.numbers[:2]) == b"ab"


def test_descriptors_of_the_service_manager_go_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    script = """
import os
from nfq_agent.host import systemd
os.environ["LISTEN_PID"] = str(os.getpid())
found = systemd.passed()
print({name: os.get_inheritable(number) or number for name, number in found.items()}, systemd.passed())
"""
    reader, writer = os.pipe()
    words = f'exec 3<&{reader} 4>&{writer} 5>&{writer}; LISTEN_FDS=3 LISTEN_FDNAMES=one:two:two exec {sys.executable} -c "$0"'
    done = subprocess.run(["bash", "-c", words, script], pass_fds=[reader, writer], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("{'one': 3, 'two': 5} {}")
    monkeypatch.setenv("LISTEN_PID", "1")
    monkeypatch.setenv("LISTEN_FDS", "1")
    monkeypatch.setenv("LISTEN_FDNAMES", "one")
    assert systemd.passed() == {}


def test_a_program_that_starts_again_has_its_descriptors_and_its_signals() -> None:
    script = """
import os, signal, sys
from nfq_agent.host import reexec
found = reexec.handed()
if not found:
    reader, writer = os.pipe()
    os.write(writer, b"from before")
    os.close(writer)
    reexec.start_again({"pipe": reader})
assert signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ())
signal.signal(signal.SIGTERM, lambda *_: print("told to stop"))
os.kill(os.getpid(), signal.SIGTERM)
print(os.read(found["pipe"], 100).decode(), os.get_inheritable(found["pipe"]), reexec.handed())
reexec.take_signals()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "from before False {}\ntold to stop\n"
    assert reexec.handed() == {}
