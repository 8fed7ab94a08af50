"""The installed service on a booted Debian when something fails: what is reported and started again; nothing is left."""

from __future__ import annotations

import time

from booted.container import Container
from booted.nspawn import until
from booted.peers import (
    exchange,
    foreign_rules,
    lock_held,
    main_pid,
    nothing_left,
    ours,
    restarted,
    saved,
    status,
    steady,
    without_start_limit,
)


def test_a_reload_of_a_bad_file_says_so_and_changes_nothing(host: Container) -> None:
    before = saved(host)
    host.write("/etc/nfq-agent/conf.d/bad.toml", "[queue.main]\nmax_lem = 3\n")
    done = host.run("systemctl", "reload", "nfq-agent", check=False)
    assert done.returncode != 0
    assert host.show("nfq-agent", "ActiveState") == "active"
    assert saved(host) == before
    assert "conf.d/bad.toml: queue.main.max_lem: unknown key" in host.journal("--unit=nfq-agent")
    exchange(host)
    host.run("rm", "/etc/nfq-agent/conf.d/bad.toml")
    host.run("systemctl", "reload", "nfq-agent")


def test_a_bad_file_at_start_is_no_restart_loop(host: Container) -> None:
    host.run("systemctl", "stop", "nfq-agent")
    before = saved(host)
    host.write("/etc/nfq-agent/conf.d/bad.toml", "[queue.main]\nnum = 70000\n")
    assert host.run("systemctl", "start", "nfq-agent", check=False).returncode != 0
    assert host.show("nfq-agent", "ActiveState") == "failed"
    assert host.show("nfq-agent", "ExecMainStatus") == "78"
    assert host.show("nfq-agent", "NRestarts") == "0"
    assert "bad.toml: queue.main.num" in host.journal("--unit=nfq-agent")
    assert saved(host) == before


def test_kill_of_the_main_process(host: Container) -> None:
    host.run("systemctl", "stop", "nfq-agent")
    foreign_rules(host)
    before = saved(host)
    host.run("systemctl", "start", "nfq-agent")
    with_agent = saved(host)
    pid = main_pid(host)
    with steady(host):
        host.shell(f"kill -KILL {pid}")
        restarted(host, pid)
    assert saved(host) == with_agent
    assert host.show("nfq-agent", "NRestarts") == "1"
    exchange(host)
    nothing_left(host, before)


def test_a_crash_after_many_is_answered_as_soon_as_the_first(host: Container) -> None:
    """systemd counts the restarts of a unit as long as it is active, and from 254 on may wait the longer the more there were."""
    for _ in range(6):
        pid = main_pid(host)
        host.shell(f"kill -KILL {pid}")
        restarted(host, pid)
    assert int(host.show("nfq-agent", "NRestarts")) == 6
    # Unknown to Debian 12's, which always waits for RestartSec=.
    assert host.show("nfq-agent", "RestartUSecNext") in ("", host.show("nfq-agent", "RestartUSec"))


def test_kill_of_a_worker(host: Container) -> None:
    with_agent = saved(host)
    pid = main_pid(host)
    (queue,) = status(host)["queues"]
    worker = queue["workers"][0]["pid"]
    with steady(host):
        host.shell(f"kill -KILL {worker}")
        until(lambda: status(host)["queues"][0]["workers"][0]["pid"] not in (None, worker), "another worker")
    assert main_pid(host) == pid
    assert saved(host) == with_agent
    exchange(host)
    until(lambda: f"(pid {worker})" in host.journal("--unit=nfq-agent"), "the death is in the log")


def test_a_hung_worker_is_replaced_alone_and_a_hung_supervisor_is_restarted(host: Container) -> None:
    with_agent = saved(host)
    pid = main_pid(host)

    def worker() -> int:
        return int(status(host)["queues"][0]["workers"][0]["pid"] or 0)

    hung = worker()
    with steady(host) as connection:
        host.shell(f"kill -STOP {hung}")
        until(lambda: worker() not in (0, hung), "another worker serves")
    # Traffic stopped while the hung worker held the queue, and then continued.
    assert 0.5 < connection.longest < 9
    assert main_pid(host) == pid
    assert "made no progress" in host.journal("--unit=nfq-agent")
    assert saved(host) == with_agent
    host.write("/etc/systemd/system/nfq-agent.service.d/test.conf", "[Service]\nWatchdogSec=3\n")
    host.run("systemctl", "daemon-reload")
    host.run("systemctl", "restart", "nfq-agent")
    pid = main_pid(host)
    hung = worker()
    host.shell(f"kill -STOP {pid}")
    restarted(host, pid)
    assert "watchdog" in host.journal("--unit=nfq-agent").lower()
    assert saved(host) == with_agent
    assert host.run("test", "-e", f"/proc/{hung}", check=False).returncode != 0


def test_a_crash_at_start_is_reported_and_leaves_nothing(host: Container) -> None:
    host.run("systemctl", "stop", "nfq-agent")
    before = saved(host)
    # Another process has the queue: the kernel refuses ours.
    host.write("/etc/nfq-agent/other.toml", "[queue.main]\nnum = 100\n[rules.app]\nqueue = 'main'\ntcp_ports = [13000]\n")
    host.run("systemctl", "start", "nfq-agent@other")
    without_start_limit(host)
    beside = saved(host)
    assert host.run("systemctl", "start", "nfq-agent", check=False).returncode != 0
    assert [line for line in ours(host) if "default" in line] == []
    assert saved(host) == beside
    until(lambda: int(host.show("nfq-agent", "NRestarts")) >= 1, "systemd tries again")
    # What was in the way goes, and the next try succeeds.
    host.run("systemctl", "stop", "nfq-agent@other")
    restarted(host, 0)
    nothing_left(host, before)


def test_a_stop_while_another_program_holds_the_lock_ends_in_time_and_says_why(host: Container) -> None:
    host.run("systemctl", "stop", "nfq-agent")
    foreign_rules(host)
    before = saved(host)
    host.write("/etc/nfq-agent/conf.d/backend.toml", '[agent]\nbackend = "legacy"\n')
    host.run("systemctl", "start", "nfq-agent")
    assert ours(host)
    with lock_held(host):
        began = time.monotonic()
        host.run("systemctl", "stop", "nfq-agent", check=False)
        took = time.monotonic() - began
    # TimeoutStopSec=20; systemd kills a service that takes longer, and its result is then "timeout".
    assert took < 20
    assert host.show("nfq-agent", "Result") == "exit-code"
    said = "rules could not be removed: the xtables lock /run/xtables.lock was not free within 10 s: held by "
    assert said in host.journal("--unit=nfq-agent")
    # Beside it, the unit that sweeps waits for the lock, and has it now. Where it gave up, it says so, and the verb removes them.
    until(lambda: host.show("nfq-agent-rules", "ActiveState") in ("inactive", "failed"), "the sweep is over")
    if saved(host) != before:
        assert "the xtables lock /run/xtables.lock was not free within 10 s" in host.journal("--unit=nfq-agent-rules")
        host.run("nfq-agent", "remove")
    assert saved(host) == before


def test_fail_closed_stays_closed_after_a_failure_only(host: Container) -> None:
    host.run("systemctl", "stop", "nfq-agent")
    before = saved(host)
    host.write("/etc/nfq-agent/conf.d/closed.toml", "[queue.main]\nbypass = false\n")
    # No restart: what is looked at is the time between a failure and the next start.
    host.write("/etc/systemd/system/nfq-agent.service.d/test.conf", "[Service]\nRestart=no\n")
    host.run("systemctl", "daemon-reload")
    host.run("systemctl", "start", "nfq-agent")
    host.shell(f"kill -KILL {main_pid(host)}")
    until(lambda: host.show("nfq-agent", "ActiveState") == "failed", "the failure is noted")
    until(lambda: host.shell("cat /proc/net/netfilter/nfnetlink_queue") == "", "the workers have judged what came, and ended")
    kept = ours(host)
    assert len([line for line in kept if "NFQUEUE" in line]) == 4
    done = host.run("python3", "-c", "import socket; s = socket.create_server(('127.0.0.1', 11000)); "
                    "socket.create_connection(('127.0.0.1', 11000), timeout=1)", check=False)  # fmt: skip
    assert "timed out" in done.stderr
    host.run("systemctl", "start", "nfq-agent")
    exchange(host)
    nothing_left(host, before)
