"""The queue and the kernel: settings acknowledged one by one, privileges, other namespaces."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from namespace import ROOT, UNPRIVILEGED, Namespace
from queued import NUMBER, Sender, Wire, passed, queue_rule, until

from nfq_agent import (
    ACCEPT,
    Packet,
    Queue,
    QueuePermissionError,
    QueueSettingError,
    QueueStateError,
    Verdict,
)
from nfq_agent.host.nfqueue.channel import open_socket
from nfq_agent.host.nfqueue.statistics import statistics
from nfq_agent.host.users import CAP_NET_ADMIN, User, become
from nfq_agent.queue import settings as queue_settings
from nfq_agent.queue.turns import WorkerQueue

pytestmark = pytest.mark.kernel


USER = User(UNPRIVILEGED, UNPRIVILEGED)


def test_every_setting_is_in_force_from_the_start_and_changes_while_bound(netns: Namespace) -> None:
    def inside() -> None:
        with Queue(NUMBER, copy_range=1000, max_len=77, fail_open=True, gso=True, uid_gid=True) as queue:
            settings = queue.settings
            assert (settings.copy_range, settings.max_len, settings.fail_open, settings.gso, settings.uid_gid) == (
                1000, 77, True, True, True,
            )  # fmt: skip
            line = queue.statistics()
            assert (line.copy_mode, line.copy_range) == (2, 1000)
            assert queue.receive_buffer == 8 << 20
            queue.configure(copy="meta", gso=False)
            assert queue.statistics().copy_mode == 1
            queue.configure(copy="packet", copy_range=65535, fail_open=False, uid_gid=False, max_len=5)
            # What a message holds beside the attribute's header; the kernel says so itself.
            assert (queue.statistics().copy_mode, queue.statistics().copy_range) == (2, 65531)
            assert queue.settings == type(queue.settings)("packet", 65535, 5, False, False, False)
            with pytest.raises(ValueError, match="copy_range 0"):
                queue.configure(copy_range=0)

    netns.call(inside)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("copy", "meta"), ("copy_range", 100), ("max_len", 5), ("fail_open", True), ("gso", True), ("uid_gid", True)],
)
def test_a_refusal_names_what_was_refused(netns: Namespace, setting: str, value: object) -> None:
    def inside() -> None:
        with Queue(NUMBER) as queue:
            before = queue.settings
            child = os.fork()
            if child == 0:
                become(USER, ())
                try:
                    queue.configure(**{setting: value})  # type: ignore[arg-type]  # each has its own type
                except QueueSettingError as error:
                    copy = pickle.loads(pickle.dumps(error))
                    good = (copy.setting, copy.value) == (setting, value) and str(copy) == (
                        f"queue 7: the kernel refused {setting}={value!r}: Operation not permitted"
                    )
                    os._exit(0 if good and queue.settings == before else 1)
                os._exit(2)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            assert queue.settings == before

    netns.call(inside)


def test_a_bind_whose_settings_are_refused_leaves_the_number_free(netns: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    # A flag that no kernel has (NFQA_CFG_F_MAX is 1 << 5).
    monkeypatch.setitem(queue_settings.FLAGS, "gso", 1 << 10)

    def inside() -> None:
        queue = Queue(NUMBER, gso=True).open()
        with pytest.raises(QueueSettingError, match="gso=True: Operation not supported"):
            queue.bind()
        assert statistics() == {}
        with pytest.raises(QueueStateError, match="not bound"):
            queue.read()
        with Queue(NUMBER) as other:
            assert other.settings.gso is False
        queue.close()

    netns.call(inside)


@pytest.mark.parametrize("elsewhere", [True, False])
def test_settings_change_in_a_flood_and_no_packet_is_lost(netns: Namespace, elsewhere: bool) -> None:
    queue_rule(netns)

    def inside() -> int:
        with Queue(NUMBER, copy_range=100, max_len=20000, receive_buffer=64 << 20) as queue:
            changes = 0

            def change() -> None:
                nonlocal changes
                copy_range = (65535, 100, 3000, 5000)[changes % 4]
                assert queue.configure(copy_range=copy_range, gso=bool(changes % 3)).copy_range == copy_range
                changes += 1

            def callback(packet: Packet) -> Verdict:
                if not elsewhere and packet.id % 100 == 0:
                    change()
                return ACCEPT

            runner = threading.Thread(target=queue.run, args=(callback,))
            runner.start()
            sender = Sender()
            for _ in range(40):
                sender.send(400, 40)
                sender.send(100, 9000)
                for _ in range(3 if elsewhere else 0):
                    change()
            assert sender.end() == 20_000
            until(lambda: queue.statistics().waiting == 0)
            queue.stop()
            runner.join()
            assert changes >= 120
            line = queue.statistics()
            assert (line.dropped, line.user_dropped, queue.unanswered) == (0, 0, 0)
        return passed()

    assert netns.call(inside) == 20_000


def test_without_the_capability_opening_is_refused(netns: Namespace) -> None:
    def inside() -> None:
        with Queue(NUMBER + 1) as queue:
            become(USER, ())
            with pytest.raises(QueuePermissionError, match="needs root or CAP_NET_ADMIN"):
                Queue(NUMBER).open()
            # The kernel's figures are root's alone.
            with pytest.raises(PermissionError):
                queue.statistics()

    netns.call(inside)


@pytest.mark.parametrize("copy_range", [100, 65535])
def test_the_capability_alone_is_enough_from_then_on(netns: Namespace, copy_range: int) -> None:
    queue_rule(netns)

    def inside() -> None:
        wire = Wire()
        with WorkerQueue(NUMBER, copy_range=copy_range) as queue:
            become(USER, (CAP_NET_ADMIN,))
            assert os.getuid() == UNPRIVILEGED
            queue.confirm()
            wire.send(b"one", b"two")
            for packet in queue.read():
                packet.accept()
        assert wire.arrived(2) == [b"one", b"two"]
        with WorkerQueue(NUMBER, copy_range=copy_range, uid_gid=True) as queue:
            assert queue.configure(max_len=9).max_len == 9

    netns.call(inside)


def test_without_the_capability_the_kernel_takes_no_verdict(netns: Namespace) -> None:
    queue_rule(netns)

    def inside() -> None:
        wire = Wire()
        with WorkerQueue(NUMBER) as queue:
            child = os.fork()
            if child == 0:
                become(USER, ())
                try:
                    queue.confirm()
                except QueuePermissionError as error:
                    os._exit(0 if "needs CAP_NET_ADMIN" in str(error) else 1)
                os._exit(2)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            wire.send(b"x")
            # The opener may.
            queue.confirm()
            assert [packet.data for packet in queue.read()] == [b"x"]

    netns.call(inside)


def test_a_queue_in_another_namespace(netns: Namespace) -> None:
    queue_rule(netns)
    ours, theirs = socket.socketpair()

    def make() -> None:
        with open_socket() as made:
            socket.send_fds(theirs, [b"x"], [made.fileno()])

    netns.call(make)
    _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
    with Namespace() as other:

        def serve() -> None:
            with Queue(NUMBER, socket=socket.socket(fileno=descriptors[0])) as queue:
                assert queue.statistics(netns.pid).number == NUMBER
                threading.Timer(60, queue.stop).start()

                def callback(packet: Packet) -> Verdict:
                    queue.stop()
                    return ACCEPT

                theirs.send(b"bound")
                queue.run(callback)
                os._exit(0)

        def send() -> None:
            wire = Wire()
            wire.send(b"from over there")
            assert wire.arrived(1) == [b"from over there"]

        server = os.fork()
        if server == 0:
            other.enter()
            serve()
        assert ours.recv(5) == b"bound"
        netns.call(send)
        assert os.waitstatus_to_exitcode(os.waitpid(server, 0)[1]) == 0
    os.close(descriptors[0])
    ours.close()
    theirs.close()


_CONSUMER = """
import asyncio
from nfq_agent import ACCEPT, DROP, RETAIN, Action, Packet, Queue, QueueError, QueueSettings, Verdict

def judge(packet: Packet) -> Verdict:
    if packet.uid is None and packet.headers.five_tuple.dport == 53:
        return DROP
    return Verdict(Action.ACCEPT, mark=7)

def main() -> None:
    try:
        with Queue(5, copy_range=200, fail_open=True) as queue:
            settings: QueueSettings = queue.configure(gso=True)
            print(settings.gso, queue.statistics().waiting)
            queue.run(judge)
            for packet in queue:
                packet.accept(mark=3)
    except QueueError as error:
        print(error.number)

async def later(queue: Queue) -> None:
    async for packet in queue:
        packet.drop()
"""


def test_the_types_hold_for_a_program_outside(tmp_path: Path) -> None:
    (tmp_path / "consumer.py").write_text(_CONSUMER)
    (tmp_path / "careless.py").write_text(
        "from nfq_agent import Packet, Queue\n\ndef forgets(packet: Packet) -> None:\n    pass\n\nQueue(5).run(forgets)\n"
        "Queue('5')\nQueue(5).run(lambda packet: packet.no_such_thing)\n"
    )

    def mypy(name: str) -> str:
        return subprocess.run(
            [sys.executable, "-m", "mypy", "--strict", f"--cache-dir={tmp_path / 'cache'}", name],
            cwd=tmp_path, capture_output=True, text=True, check=False,
        ).stdout  # fmt: skip

    assert "Success" in mypy("consumer.py")
    for example in ("syn_monitor.py", "rewriter.py"):
        assert "Success" in mypy(str(ROOT / "examples" / example))
    careless = mypy("careless.py")
    assert 'expected "Callable[[Packet], Verdict]"' in careless
    assert 'incompatible type "str"; expected "int"' in careless
    assert 'has no attribute "no_such_thing"' in careless
