"""The program behind a socket: found among the processes of one group by a process of its own, or not known."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nfq_agent.host.programs import ProgramFinder, program_of

THIS = os.readlink("/proc/self/exe")


def group(folder: Path, *processes: int) -> Path:
    """What a control group shows of its processes."""
    (folder / "cgroup.procs").write_text("".join(f"{each}\n" for each in processes))
    return folder


def inode(of: socket.socket) -> int:
    return os.fstat(of.fileno()).st_ino


def test_the_process_that_has_the_socket_is_found(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    with socket.socket() as mine:
        assert program_of(inode(mine), group(tmp_path, gone.pid, os.getpid()), 5) == THIS
        number = inode(mine)
    assert program_of(number, group(tmp_path, os.getpid()), 5) is None


def test_a_socket_of_two_programs_is_of_none(tmp_path: Path) -> None:
    with socket.socket() as mine, subprocess.Popen(["sleep", "60"], pass_fds=[mine.fileno()]) as other:
        while os.readlink(f"/proc/{other.pid}/exe") == THIS:
            time.sleep(0.01)
        assert program_of(inode(mine), group(tmp_path, os.getpid(), other.pid), 5) is None
        assert str(program_of(inode(mine), group(tmp_path, other.pid), 5)).endswith("/sleep")
        other.kill()


def test_a_process_that_may_not_be_seen_leaves_it_unknown(tmp_path: Path) -> None:
    with socket.socket() as mine:
        assert program_of(inode(mine), group(tmp_path, os.getpid(), 0), 5) is None
        assert program_of(inode(mine), tmp_path / "none", 5) is None


def test_a_search_takes_no_longer_than_it_may(tmp_path: Path) -> None:
    with socket.socket() as mine:
        assert program_of(inode(mine), group(tmp_path, os.getpid()), -1) is None


def test_its_process_keeps_nothing_open_and_ends_with_the_worker() -> None:
    code = """
import os, socket
import pytest

from nfq_agent.host.programs import ProgramFinder
kept = socket.socketpair()
finder = ProgramFinder(None)
# No group has this number.
print(finder.program(1, 1 << 62), finder.program(1, None), finder.program(0, 1))
# This end is the only one left: the other process has closed its copy.
kept[1].close()
print(kept[0].recv(1))
finder.close()
print(os.wait()[1])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "None None None\nb''\n0\n", done.stderr


@pytest.mark.parametrize("answered", [False, True])
def test_a_worker_that_ends_before_it_has_read_an_answer_is_no_fault(answered: bool) -> None:
    code = f"""
import os, select, signal
from pathlib import Path
import pytest

from nfq_agent.host.programs import ProgramFinder
finder = ProgramFinder(None)
(child,) = Path(f"/proc/self/task/{{os.getpid()}}/children").read_text().split()
# The worker gives up: no answer comes.
os.kill(int(child), signal.SIGSTOP)
os.waitid(os.P_PID, int(child), os.WSTOPPED)
print(finder.program(1, 1 << 62))
if {answered}:
    os.kill(int(child), signal.SIGCONT)
    select.select([finder._end], [], [])
finder.close()
os.kill(int(child), signal.SIGCONT)
print(os.waitpid(int(child), 0)[1])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("None\n0\n", "")


def test_searches_that_take_too_long_are_left_out() -> None:
    now = [0.0]
    each = [0.9]

    def clock() -> float:
        now[0] += each[0]
        return now[0]

    skipped: list[None] = []
    finder = ProgramFinder(None, clock, lambda: skipped.append(None))
    try:
        # Each question takes 0.9 s by this clock, of 1.8 s in all.
        while not skipped:
            assert finder.program(1, 1) is None
        each[0] = 0.0
        now[0] += 10
        finder.program(1, 1)
        assert len(skipped) == 1
    finally:
        finder.close()
        os.wait()
