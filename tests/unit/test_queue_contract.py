"""The queue library and the worker's queue on a fake kernel that passes the same contract as the real one."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator

import pytest
from fake_queue import FakeKernel, FakeWire
from queue_contract import CONTRACT
from queue_program import AnyWire
from queued import NUMBER

from nfq_agent import ACCEPT, Queue, QueueSettingError
from nfq_agent.queue.turns import WorkerQueue


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeKernel]:
    fake = FakeKernel()
    fake.install(monkeypatch)
    yield fake
    fake.close()


@pytest.mark.parametrize("promise", CONTRACT)
def test_the_fake_kernel(kernel: FakeKernel, promise: Callable[[AnyWire], None]) -> None:
    promise(FakeWire(kernel))


@pytest.mark.parametrize("number", [1, 1 << 30, 3 << 30, 0xFFFF_FFF0])
def test_closing_answers_what_another_process_has_not_read_whatever_its_number(kernel: FakeKernel, number: int) -> None:
    """The agent's supervisor binds and closes a queue that it never reads, after any number of packets."""
    wire = FakeWire(kernel)
    with Queue(NUMBER):
        kernel.queues[NUMBER].latest = number
        wire.send(b"x", b"y")
        assert wire.waiting() == 2
    assert wire.arrived(2) == [b"x", b"y"]


def test_a_setting_that_the_kernel_refuses_is_named_and_leaves_the_number_free(kernel: FakeKernel) -> None:
    kernel.refused[3] = errno.EOPNOTSUPP
    queue = Queue(NUMBER, max_len=7).open()
    with pytest.raises(QueueSettingError, match="refused max_len=7") as refused:
        queue.bind()
    assert (refused.value.setting, refused.value.errno) == ("max_len", errno.EOPNOTSUPP)
    kernel.settled()
    assert NUMBER not in kernel.queues
    queue.close()


def test_a_full_queue_drops_or_lets_pass(kernel: FakeKernel) -> None:
    wire = FakeWire(kernel)
    with WorkerQueue(NUMBER, max_len=2).open().bind() as queue:
        wire.send(b"1", b"2", b"3")
        assert queue.skim(ACCEPT) == 2
        assert wire.arrived(2) == [b"1", b"2"]
        queue.configure(fail_open=True)
        wire.send(b"4", b"5", b"6")
        assert wire.arrived(1) == [b"6"]
        assert queue.skim(ACCEPT) == 2
        assert wire.arrived(2) == [b"4", b"5"]
