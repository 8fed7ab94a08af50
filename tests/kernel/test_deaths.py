"""A short part of tests/fuzz/deaths: each kind of process, killed in each scenario; and the lives in which faults were found."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from namespace import PATIENCE, ROOT

pytestmark = pytest.mark.kernel

# In each of them the host was not as before, until the fault was mended.
FOUND = (
    # A reload could not remove the routes of TPROXY (its ip(8) was killed), and the stop did not know of them any more.
    "tproxy/legacy/reload/command:104:STOP,command:115:KILL,command:129:KILL/none/0",
    # A restart in place failed at its proxy, and the earlier rules and routes stayed, without a process.
    "tproxy/legacy/restart/successor:288:KILL/none/0",
    # A restarted agent that was stopped before it served left the earlier rules, and said that none was left.
    "queue/legacy/upgrade/successor:406:TERM/none/0",
    # What a killed agent had left stayed when the next start failed.
    "tproxy/owned/start/supervisor:226:STOP,worker:16:KILL/none/0",
)
LIVES = (
    "all/legacy/start/supervisor:40:KILL,supervisor:90:STOP,child:30:KILL,command:5:KILL,worker:10:STOP,supervisor:170:TERM/none/0",
    "all/owned/start/supervisor:60:KILL,supervisor:120:STOP,supervisor:200:KILL,child:12:KILL,worker:20:KILL/none/0",
    "all/legacy/serve/worker:10:KILL,worker:20:STOP,supervisor:5:KILL,supervisor:30:STOP/none/0",
    "all/legacy/reload/child:20:KILL,worker:5:KILL,supervisor:30:STOP,supervisor:80:KILL/none/0",
    "all/owned/reload/child:5:STOP,supervisor:60:KILL,supervisor:140:STOP/none/0",
    "all/legacy/stop/supervisor:5:KILL,supervisor:20:STOP,child:10:KILL,supervisor:40:TERM/none/0",
    "queue/legacy/repair/child:10:KILL,supervisor:4:KILL/none/0",
    "proxy/owned/stop/supervisor:10:STOP,supervisor:25:KILL/none/0",
    "queue/owned/start/supervisor:100:KILL,supervisor:150:KILL/disk/0",
    "proxy/legacy/start/supervisor:120:KILL,supervisor:140:KILL/lock/300",
    "queue/legacy/start/supervisor:150:KILL/descriptors/25",
)


def died(plan: str) -> int:
    """How many processes are killed in a life of this plan. Fails if the host is not as before."""
    command = [sys.executable, str(ROOT / "tests/fuzz/deaths"), "--only", plan]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            said, _ = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            # It closes its namespaces.
            process.terminate()
            raise
    assert process.returncode == 0, said
    found = re.search(r"(\d+) deaths, 0 with a problem", said.splitlines()[-1])
    assert found is not None, said
    return int(found[1])


# Under load all of them take longer than one test usually may; each has its own limit.
@pytest.mark.timeout(1200)
def test_after_each_death_the_host_is_as_before() -> None:
    counts = {plan: died(plan) for plan in (*FOUND, *LIVES)}
    # A step that a change of the agent removed costs a death, not the test.
    assert sum(counts.values()) >= 30, counts
