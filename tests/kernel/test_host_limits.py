"""Hosts that lack something: the agent works without it, or says in one sentence what is missing and what to do."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from subprocess import PIPE

import pytest
from agent import COMMAND, Agent, Started, ours, until
from namespace import PATIENCE, ROOT, Namespace
from reachable import reachable, seen
from tcp_client import ask, server

from nfq_agent.service import control

pytestmark = pytest.mark.kernel

SMALL = '[queue.main]\n[rules.app]\nqueue = "main"\ntcp_ports = [11000]\n'
WITHOUT_IPV6 = (sys.executable, str(ROOT / "tests" / "support" / "without_ipv6.py"))
NET_ADMIN_ALONE = ("setpriv", "--bounding-set=-all,+net_admin,+setuid,+setgid,+kill", "--inh-caps=-all,+net_admin")


def refused(netns: Namespace, tmp_path: Path, before: Sequence[str] = (), text: str = SMALL) -> str:
    """What `run` says when it does not start: one line."""
    config = tmp_path / "a.toml"
    config.write_text(text)
    done = netns.run(*before, "env", "LOG_FORMAT=console", *COMMAND, "run", "--config", str(config), check=False)
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if "created the system user" not in line]
    assert len(lines) == 1, done.stderr
    (line,) = lines
    return line.partition("error")[2].strip()


@pytest.mark.parametrize("backend", ["legacy", "owned"])
def test_without_ipv6_the_rules_are_made_for_ipv4(netns: Namespace, tmp_path: Path, backend: str) -> None:
    agent = Started(netns, tmp_path, f'[agent]\nbackend = "{backend}"\ndrift_check = "200ms"\n{SMALL}', WITHOUT_IPV6).ready()
    assert "this kernel has no IPv6" in agent.log
    assert not re.search(" error ", agent.log)
    assert agent.log.count(" warning ") == 1
    done = netns.run(*WITHOUT_IPV6, *COMMAND, "plan", "--config", str(agent.config))
    assert "Nothing to do" in done.stdout
    assert agent.stop() == 0
    assert ours(netns) == []


@pytest.mark.parametrize("backend", ["legacy", "owned"])
def test_on_a_host_that_was_booted_a_second_ago(netns: Namespace, tmp_path: Path, backend: str) -> None:
    """A clock that began with the boot is not a reason to wait shorter, for the lock or for anything else."""
    since = int(time.clock_gettime(time.CLOCK_BOOTTIME)) - 1
    holder = netns.start("flock", "--close", "/run/xtables.lock", "sh", "-c", "echo held; sleep 2", stdout=PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    young = ("unshare", "--time", f"--monotonic=-{since}", f"--boottime=-{since}")
    agent = Started(netns, tmp_path, f'[agent]\nbackend = "{backend}"\n{SMALL}', young).ready()
    assert holder.wait(PATIENCE) == 0
    agent.verb("reload")
    if backend == "legacy":
        netns.run("iptables-legacy", "-w", "-t", "mangle", "-F")
        until(lambda: "repaired" in agent.log, "our rules are back")
    assert not re.search(" error |Traceback", agent.log)
    assert agent.log.count(" warning ") <= 2
    assert agent.stop() == 0
    assert ours(netns) == []


def test_ipv6_that_is_switched_off_is_no_fault(netns: Namespace, tmp_path: Path) -> None:
    netns.shell("sysctl -qw net.ipv6.conf.all.disable_ipv6=1")
    agent = Agent(netns, tmp_path, SMALL).ready()
    assert not re.search(" (warning|error) ", agent.log)
    assert agent.stop() == 0


def test_net_admin_alone_writes_legacy_rules(netns: Namespace, tmp_path: Path) -> None:
    agent = Started(netns, tmp_path, f'[agent]\nbackend = "legacy"\n{SMALL}', NET_ADMIN_ALONE).ready()
    # libxtables says on its own what it could not ask the kernel.
    assert "Could not" not in agent.log
    assert "NFQUEUE" in netns.shell("iptables-legacy-save -t mangle")
    assert agent.stop() == 0
    assert "NFQUEUE" not in netns.shell("iptables-legacy-save -t mangle")


def test_no_capability_is_named(netns: Namespace, tmp_path: Path) -> None:
    said = refused(netns, tmp_path, ("setpriv", "--bounding-set=-all", "--inh-caps=-all"))
    assert said == "CAP_NET_ADMIN is missing: without it no queue and no rule can be made; start as root, or with that capability"


def test_root_that_cannot_become_the_agents_user_is_told_what_it_lacks(netns: Namespace, tmp_path: Path) -> None:
    said = refused(netns, tmp_path, ("setpriv", "--bounding-set=-all,+net_admin", "--inh-caps=-all"))
    assert said.startswith("running as root without CAP_SETGID and CAP_SETUID: no worker can become uid")
    assert said.endswith("add to the capabilities, or start as that user with CAP_NET_ADMIN alone")


def test_root_without_the_right_to_signal_others_replaces_a_worker_that_hangs(netns: Namespace, tmp_path: Path) -> None:
    """With the capabilities that the page about containers names."""
    before = ("setpriv", "--bounding-set=-all,+net_admin,+setuid,+setgid", "--inh-caps=-all")
    agent = Started(netns, tmp_path, SMALL, before).ready()
    (worker,) = agent.workers()
    os.kill(worker, signal.SIGSTOP)
    until(lambda: agent.workers() not in ([worker], [None]), "another worker serves")
    (worker,) = agent.workers()
    # And at a stop, where it does not end in time.
    os.kill(worker, signal.SIGSTOP)
    assert agent.stop() == 0
    assert ours(netns) == []
    assert not Path(f"/proc/{worker}").exists()


@pytest.mark.parametrize("backend", ["legacy", "owned"])
def test_a_verb_without_capabilities_says_one_line(netns: Namespace, tmp_path: Path, backend: str) -> None:
    """Also where there are rules to be read."""
    (tmp_path / "a.toml").write_text(f'[agent]\nbackend = "{backend}"\n{SMALL}')
    config = ("--config", str(tmp_path / "a.toml"))
    netns.run(*COMMAND, "apply", *config)
    rules = "iptables-legacy-save -t mangle | grep -v '^#'; nft list ruleset"
    before = netns.shell(rules)
    assert "NFQA-default-INPUT" in before
    for verb in ("plan", "apply", "rules", "remove", "sweep"):
        done = netns.run("setpriv", "--bounding-set=-all", "--inh-caps=-all", *COMMAND, verb, *config, check=False)
        assert (done.returncode, done.stdout) == (1, "")
        (line,) = done.stderr.splitlines()
        assert re.search("run as root, or with (that capability|CAP_NET_ADMIN)|start as root, or with that capability", line), (
            line
        )
    assert netns.shell(rules) == before
    netns.run(*COMMAND, "remove", *config)


def with_file_capabilities(folder: Path, capabilities: str) -> tuple[str, ...]:
    """The command by an interpreter of its own that has these capabilities, as `setcap` gives them (capabilities(7))."""
    interpreter = folder / "python"
    shutil.copy(os.path.realpath(sys.executable), interpreter)
    subprocess.run(["setcap", f"{capabilities}+ep", str(interpreter)], check=True)
    folder.chmod(0o755)
    # A copy does not know the virtual environment.
    return (
        "env",
        "LOG_FORMAT=console",
        f"PYTHONPATH={':'.join(seen(each) for each in sys.path if each)}",
        str(interpreter),
        "-m",
        "nfq_agent",
        "run",
    )


def test_an_interpreter_with_a_capability_serves_as_the_agents_user(netns: Namespace) -> None:
    reachable(netns)
    netns.run(*COMMAND, "apply")
    netns.run(*COMMAND, "remove")
    # What tmpfiles.d and RuntimeDirectory= do in the packaged unit.
    netns.shell("install -d -o proxyuser /run/nfq-agent; chgrp proxyuser /run/xtables.lock; chmod 0640 /run/xtables.lock")
    # Not /tmp, which may be mounted with nosuid: capabilities of files do not count there.
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        command = with_file_capabilities(Path(folder), "cap_net_admin")
        user = ("setpriv", "--reuid=proxyuser", "--regid=proxyuser", "--clear-groups")
        with (Path(folder) / "log").open("w+") as log:
            process = netns.start(*user, *command, stdout=log, stderr=log)
            until(lambda: "is serving queue 100" in Path(log.name).read_text() or process.poll() is not None, "it serves")
            assert "NFQUEUE" in netns.run("iptables-legacy-save").stdout, Path(log.name).read_text()
            process.terminate()
            assert process.wait(timeout=PATIENCE) == 0
        assert ours(netns) == []
        other = netns.run("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *command, check=False)
        assert other.returncode == 1
        assert other.stderr.count("\n") == 1
        assert "running as uid 65534, which cannot become uid" in other.stderr
        less = with_file_capabilities(Path(folder), "cap_net_raw")
        lacking = netns.run(*user, *less, check=False)
        assert (lacking.returncode, "CAP_NET_ADMIN is missing" in lacking.stderr) == (1, True)


def test_an_extension_that_is_missing_is_named_with_its_package(netns: Namespace, tmp_path: Path) -> None:
    netns.shell("mkdir /run/empty")
    # `auto` finds it out only where libxtables is one that is tested before it is used, and is `owned` there.
    said = refused(netns, tmp_path, ("env", "XTABLES_LIBDIR=/run/empty"), f'[agent]\nbackend = "legacy"\n{SMALL}')
    assert said.endswith('its extension is not in /run/empty: install the package iptables whole, or set backend = "owned"')


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("mount -o remount,ro /run", "/run/nfq-agent/default.lock: Read-only file system; mount /run/nfq-agent writable"),
        (
            "mount -t tmpfs -o size=4k tmpfs /run; dd if=/dev/zero of=/run/fill bs=4k count=1 status=none",
            "/run/nfq-agent/default.lock cannot be written: No space left on device; free some space there",
        ),
        ("touch /run/nfq-agent", "/run/nfq-agent/default.lock: File exists; remove /run/nfq-agent, which is not a folder"),
        (
            "ln -s /nowhere /run/nfq-agent",
            "/run/nfq-agent/default.lock: File exists; remove /run/nfq-agent, which is not a folder",
        ),
        ("mkdir -p /run/nfq-agent/default.lock", "/run/nfq-agent/default.lock: Is a directory; remove it"),
        ("mkdir -p /run/nfq-agent/default.sock", "/run/nfq-agent/default.sock: Is a directory; remove it"),
        (
            "rm -f /run/xtables.lock; mkfifo /run/xtables.lock",
            "the xtables lock /run/xtables.lock is not a regular file; remove it: iptables takes a lock on a file of that name",
        ),
    ],
    ids=["read-only", "full", "file", "link", "lock", "socket", "fifo"],
)
def test_a_run_folder_that_takes_nothing_is_named(netns: Namespace, tmp_path: Path, change: str, expected: str) -> None:
    netns.shell(change)
    assert refused(netns, tmp_path) == expected


@pytest.mark.parametrize(
    ("change", "subject", "text", "advice"),
    [
        ("mount -o remount,ro /run", "run folder", "its file system is read-only", "mount /run writable"),
        ("mount -o remount,ro /run", "xtables lock", "cannot be created: its file system is read-only", "mount /run writable"),
        ("mount -t tmpfs -o size=4k tmpfs /run; cat /dev/zero >/run/a ||:", "run folder", "its file system is full", "free some"),
        ("mount -t tmpfs -o nr_inodes=1 tmpfs /run", "xtables lock", "cannot be created: its file system is full", "free some"),
        ("touch /run/nfq-agent", "run folder", "it is not a folder", "remove /run/nfq-agent"),
        ("rm -f /run/xtables.lock; mkdir /run/xtables.lock", "xtables lock", "is not a regular file", "remove it"),
        ("rm -f /run/xtables.lock; mkfifo /run/xtables.lock", "xtables lock", "is not a regular file", "remove it"),
    ],
)  # fmt: skip
def test_doctor_names_what_is_wrong_in_run(netns: Namespace, change: str, subject: str, text: str, advice: str) -> None:
    netns.shell(change)
    done = netns.run(*COMMAND, "doctor", "--json", check=False)
    found = [each for each in json.loads(done.stdout)["findings"] if each["subject"] == subject]
    assert [each["level"] for each in found] == ["error"]
    assert text in found[0]["text"]
    assert advice in found[0]["advice"]
    assert done.returncode == 1


PROXY = '[proxy.web]\nlisten = [{}]\n[rules.web]\nproxy = "web"\ntcp_ports = [8080]\nhooks = ["output"]\n'


@pytest.mark.parametrize("listen", ['"[::]:15002"', '"0.0.0.0:15002", "[::]:15002"'])
def test_a_listener_of_both_families_takes_ipv4_where_there_is_no_ipv6(netns: Namespace, tmp_path: Path, listen: str) -> None:
    agent = Started(netns, tmp_path, PROXY.format(listen), WITHOUT_IPV6).ready()
    server(netns, "echo", "127.0.0.1")
    assert netns.call(ask, "127.0.0.1", 8080) == b"hello"
    (proxy,) = agent.status()["proxies"]
    assert proxy["counters"]["connections"] == 1
    assert agent.stop() == 0


def test_a_listener_of_ipv6_alone_is_named_where_there_is_no_ipv6(netns: Namespace, tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(PROXY.format('"[::1]:15002"'))
    done = netns.run(
        *WITHOUT_IPV6, "env", "LOG_FORMAT=console", *COMMAND, "run", "--config", str(tmp_path / "a.toml"), check=False
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (error,) = [line for line in done.stderr.splitlines() if " error " in line]
    assert error.endswith("cannot listen on [::1]:15002: this kernel speaks no IPv6; name an IPv4 address in listen")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_descriptors_change_nothing(netns: Namespace, tmp_path: Path, closed: str) -> None:
    """The numbers 0 to 2 must not become the queue's socket, or a rule's."""
    config = tmp_path / "default.toml"
    config.write_text(SMALL)
    command = f"exec env LOG_FORMAT=console {' '.join(COMMAND)} run --config {config} {closed}"
    process = netns.start("sh", "-c", command, stdin=None, stdout=PIPE, stderr=PIPE)
    until(lambda: len(ours(netns)) == 12 or process.poll() is not None, "its rules are in")
    until(lambda: netns.call(answers), "it serves")
    process.terminate()
    said, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    assert said == b""
    assert b"Traceback" not in errors
    assert ours(netns) == []


def answers() -> bool:
    """Whether the agent answers on its control socket."""
    try:
        return bool(control.ask("default", {"verb": "ping"}, 5.0))
    except control.ControlError:
        return False


def test_a_client_bound_to_a_device_is_counted_and_named(netns: Namespace, tmp_path: Path) -> None:
    netns.shell(
        "ip link add eth0 type veth peer name eth1; ip address add 10.9.0.1/24 dev eth0; ip link set eth0 up;"
        "ip link set eth1 up; ip neighbour add 10.9.0.2 dev eth0 lladdr 02:00:00:00:00:02"
    )
    agent = Agent(netns, tmp_path, PROXY.format('"0.0.0.0:15002"')).ready()
    netns.call(bound_clients, 30)

    def missing() -> list[dict[str, object]]:
        answer = netns.call(control.ask, "default", {"verb": "status"}, 30.0)
        return [dict(each) for each in answer["bypasses"] if each["cause"] == "proxy"]

    until(missing, "they are missing")
    (found,) = missing()
    assert "SO_BINDTODEVICE" in str(found["text"])
    assert found["count"] == 30
    assert "SO_BINDTODEVICE" in agent.verb("doctor", check=False).stdout
    assert agent.stop() == 0


def bound_clients(count: int) -> None:
    """Clients whose packets may leave by one interface only."""
    for _ in range(count):
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
            client.setblocking(False)
            client.connect_ex(("10.9.0.2", 8080))
