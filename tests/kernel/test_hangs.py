"""Workers that hang: replaced alone while the supervisor lives, ended by the kernel when it does not."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import struct
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from agent import Agent, Started, ours, until
from agent_flood import another_than
from namespace import PATIENCE, Namespace
from traffic import PYTHON, echo, send

from nfq_agent.host.nfqueue.statistics import statistics
from nfq_agent.host.pulse import ENDS_AFTER, DeadlineTimer

pytestmark = pytest.mark.kernel
# asm-generic/socket.h
SO_TIMESTAMP = 29

# In C, with the interpreter's lock held: no handler, thread or exception gets in.
HANG = """
import re
from nfq_agent import PacketElement, StreamElement
class Packets(PacketElement):
    def decide(self, packet, flow):
        re.match("(a+)+$", "a" * 60 + "b")
class Streams(StreamElement):
    def request(self, data, connection):
        re.match("(a+)+$", "a" * 60 + "b")
        return data
"""
QUEUE = """
[queue.main]
num = 100
elements = ["hang:Packets"]
[rules.app]
queue = "main"
hooks = ["output"]
udp_ports = [11000]
"""
PROXY = """
[proxy.tcp]
listen = ["127.0.0.1:15002"]
{elements}
[rules.redirect]
proxy = "tcp"
hooks = ["output"]
family = "inet"
tcp_ports = [8080]
"""


@pytest.fixture
def hang(tmp_path: Path) -> None:
    """Puts the element beside the configuration."""
    folder = tmp_path / "elements"
    folder.mkdir(mode=0o755)
    (folder / "hang.py").write_text(HANG)


def _runs(pid: int) -> bool:
    """Whether a process has not ended; one that is not reaped yet has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def poke(namespace: Namespace) -> None:
    """One datagram."""
    namespace.run(PYTHON, "-c", "import socket; socket.socket(2, 2).sendto(b'x', ('127.0.0.1', 11000))", check=False)


def test_a_hung_worker_does_not_keep_the_queue_of_a_killed_agent(netns: Namespace, tmp_path: Path, hang: None) -> None:
    agent = Agent(netns, tmp_path, QUEUE).ready()
    (worker,) = agent.workers()
    poke(netns)
    until(lambda: statistics(netns.pid)[100].waiting == 1, "it holds the packet, and hangs", 60)
    agent.kill()
    began = time.monotonic()
    until(lambda: 100 not in statistics(netns.pid), "the queue is free", ENDS_AFTER + 20)
    until(lambda: not _runs(worker), "the worker has ended")
    # It was told to end as soon as its supervisor was gone, and could not.
    assert time.monotonic() - began > 1
    agent.configure(QUEUE.replace('elements = ["hang:Packets"]\n', ""))
    agent.start()
    agent.ready()
    assert agent.stop() == 0
    assert ours(netns) == []


def test_a_hung_worker_is_replaced_alone(netns: Namespace, tmp_path: Path, hang: None) -> None:
    agent = Agent(netns, tmp_path, QUEUE + PROXY.format(elements="")).ready()
    (worker,) = agent.workers()
    (proxy,) = [each["pid"] for each in agent.status()["proxies"]]
    poke(netns)
    # By the supervisor, or, where the machine leaves a hung worker hardly any CPU, by the worker's own timer.
    until(lambda: agent.workers() not in ([worker], [None]), "another worker serves", 60)
    assert "made no progress" in agent.log or "died: SIGKILL" in agent.log
    assert [each["pid"] for each in agent.status()["proxies"]] == [proxy]
    assert agent.stop() == 0


def test_a_hung_proxy_is_replaced_alone(netns: Namespace, tmp_path: Path, hang: None) -> None:
    agent = Agent(netns, tmp_path, QUEUE + PROXY.format(elements='elements = ["hang:Streams"]')).ready()
    (worker,) = agent.workers()
    (proxy,) = [each["pid"] for each in agent.status()["proxies"]]
    echo(netns)

    def talk() -> None:
        with socket.create_connection(("127.0.0.1", 8080), timeout=60) as it:
            it.sendall(b"x")
            with contextlib.suppress(ConnectionError):
                assert it.recv(1) == b""

    netns.call(talk)
    until(lambda: [each["pid"] for each in agent.status()["proxies"]] not in ([proxy], [None]), "another serves", 60)
    assert "proxy tcp (pid" in agent.log
    assert agent.workers() == [worker]
    assert agent.stop() == 0


def test_a_healthy_agent_outlives_a_loaded_machine(netns: Namespace, tmp_path: Path) -> None:
    """Twenty processes for its core."""
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind(str(path))
        config = QUEUE.replace('elements = ["hang:Packets"]\n', "") + PROXY.format(elements="")
        # On one core, so that a test beside this one has another.
        core = ("taskset", "-c", str(max(os.sched_getaffinity(0))))
        before = (*core, "env", f"NOTIFY_SOCKET={path}", "WATCHDOG_USEC=3000000")
        agent = Started(netns, tmp_path, config, before).ready()
        pids = agent.workers()
        load = "timeout 8 sh -c 'while :; do :; done'"
        busy = [netns.start(*core, "sh", "-c", load) for _ in range(20)]
        # The kernel says when each was sent: this process may get little of the processor, too.
        end.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMP, 1)
        times = [time.time()]
        end.settimeout(PATIENCE)
        while any(process.poll() is None for process in busy):
            data, ancillary, _, _ = end.recvmsg(4096, 64)
            if data == b"WATCHDOG=1" and ancillary:
                seconds, micro = struct.unpack("@qq", ancillary[0][2])
                times.append(seconds + micro * 1e-6)
        assert len(times) > 3
        # What the unit has (WatchdogSec=).
        assert max(later - earlier for earlier, later in itertools.pairwise(times)) < 30
        assert agent.workers() == pids
        assert "made no progress" not in agent.log
        assert agent.stop() == 0


def test_the_kernel_would_end_a_worker_first(netns: Namespace, tmp_path: Path) -> None:
    agent = Agent(netns, tmp_path, QUEUE.replace('elements = ["hang:Packets"]\n', "")).ready()

    def score(pid: int) -> int:
        return int(Path(f"/proc/{pid}/oom_score_adj").read_text())

    (worker,) = agent.workers()
    assert score(worker) == score(agent.process.pid) + 500
    assert agent.stop() == 0


# Keeps what it is sent for: 8 MB for each packet.
GREEDY = """
from nfq_agent import PacketElement
class Greedy(PacketElement):
    kept = []
    def decide(self, packet, flow):
        self.kept.append(bytearray(b"x" * 8_000_000))
"""


@pytest.fixture
def memory_group() -> Iterator[Path]:
    """A control group of 64 MB, by either version of the controller."""
    first = Path("/sys/fs/cgroup/memory")
    second = Path("/sys/fs/cgroup")
    old = (first / "memory.limit_in_bytes").exists()
    if not old and "memory" not in _text(second / "cgroup.subtree_control"):
        pytest.skip("this machine has no memory controller for a new group")
    group = (first if old else second) / f"nfq-agent-test-{os.getpid()}"
    group.mkdir()
    (group / ("memory.limit_in_bytes" if old else "memory.max")).write_text("64000000")
    yield group
    for pid in _text(group / "cgroup.procs").split():
        with contextlib.suppress(OSError):
            (group.parent / "cgroup.procs").write_text(pid)
    group.rmdir()


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def test_short_of_memory_the_kernel_ends_the_worker(netns: Namespace, tmp_path: Path, memory_group: Path) -> None:
    (tmp_path / "elements").mkdir()
    (tmp_path / "elements" / "greedy.py").write_text(GREEDY)
    agent = Agent(netns, tmp_path, QUEUE.replace("hang:Packets", "greedy:Greedy")).ready()
    # Supervisor and worker together, and what is started later: the kernel has the choice.
    for pid in (agent.process.pid, *agent.workers()):
        (memory_group / "cgroup.procs").write_text(str(pid))
    for deaths in (1, 2):
        netns.call(send, 11000, 20)
        # Packets are queued again once, so that it may die twice of them. Five deaths within half a minute end the agent.
        until(partial(_died, agent, deaths), "the worker dies")
        until(partial(another_than, agent, 0), "another worker serves")
        assert agent.process.poll() is None
    assert agent.log.count("died: SIGKILL") >= 2
    assert agent.stop() == 0
    assert ours(netns) == []


def _died(agent: Agent, times: int) -> bool:
    return agent.log.count("died: SIGKILL") >= times


def _ends(seconds: float, life: str) -> tuple[int, float]:
    """How a process with such a timer ended, and after how long."""
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        timer = DeadlineTimer(seconds)
        # Whatever an element may do about signals.
        for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))
        if life == "set":
            for _ in range(40):
                time.sleep(seconds / 20)
                timer.set()
        else:
            exec("import re; re.match('(a+)+$', 'a' * 60 + 'b')")
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), time.monotonic() - began


def test_nothing_in_a_process_stops_its_timer() -> None:
    code, took = _ends(1.0, "hang")
    assert code == -signal.SIGKILL
    assert took > 0.9
    # And one that is set again in time does nothing.
    assert _ends(2.0, "set")[0] == 0
