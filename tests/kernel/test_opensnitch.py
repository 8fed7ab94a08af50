"""The owners of our record beside those that OpenSnitch finds: both are asked for each connection, each by a queue of its own.

OpenSnitch looks the process up in /proc (`ProcMonitorMethod` "proc"), and decides by a rule for each program and user.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
from agent import Agent, until
from captures import listening
from namespace import ROOT, UNPRIVILEGED, Namespace

PROGRAM: Final = str(Path(sys.executable).resolve())
NETCAT: Final = str(Path(shutil.which("nc") or "nc").resolve())
FiveTuple = tuple[str, str, int, str, int]
# User and program by our record, the same by OpenSnitch, and the name of its rule.
Answers = tuple[tuple[int | None, str | None], tuple[int, str], str]
# Of the agent and of OpenSnitch: an NFQUEUE number has one reader.
_OURS, _THEIRS = 7, 8
CONFIG: Final = f"""
[queue.main]
num = {_OURS}
elements = ["record"]
[element.record]
exe = true
[rules.out]
queue = "main"
hooks = ["output"]
tcp_ports = [8080]
udp_ports = [8081]
role = "client"
"""
# No window asks: OpenSnitch has its rules.
SETTINGS: Final = {
    "Server": {"Address": "unix:///run/no-window.sock", "LogFile": "/dev/stdout"},
    "DefaultAction": "allow",
    "DefaultDuration": "once",
    "InterceptUnknown": False,
    "ProcMonitorMethod": "proc",
    "LogLevel": 0,
    "Firewall": "iptables",
    "Stats": {"MaxEvents": 150, "MaxStats": 25},
}
# Its start takes the place of the host's: firewall, log, rules.
START: Final = """
install -d /etc/opensnitchd
cp "$1"/*.json /etc/opensnitchd
exec "$2" -rules-path "$1/rules" -process-monitor-method proc -queue-num "$3" -debug
"""
_ASKED: Final = re.compile(r"new connection (tcp|udp)6? => (\d+):(\S+) -> (\S+?)(?: \(.*?\))?:(\d+) uid: (\d+)")
_DECIDED: Final = re.compile(r"[✔✘] (\S+) -> .*\b8\d{3}\b.* \((\S+)\)")
# What it prints of a packet that none of its threads took within a millisecond, and of which it is not asked.
_GIVEN_UP: Final = "Timed out while sending packet to queue channel"
_COLOURS: Final = re.compile(r"\x1b\[[0-9;]*m")
# KIND ADDRESS PORT SOURCE_PORT: the socket stays open until standard input ends, so that its owner can be asked for.
PYTHON: Final = """
import socket, sys
kind, host, port, source = sys.argv[1:]
family = socket.AF_INET6 if ":" in host else socket.AF_INET
with socket.socket(family, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM) as client:
    client.bind(("", int(source)))
    client.connect((host, int(port)))
    client.send(b"hello")
    sys.stdin.read()
"""
# Joins a control group, and becomes a program of another user: GROUP UID PROGRAM...
ENTER: Final = 'echo $$ >"$1/cgroup.procs"; shift; uid=$1; shift; exec setpriv --reuid="$uid" --clear-groups -- "$@"'
SERVERS: Final = (("tcp", "127.0.0.1", 8080), ("tcp", "::1", 8080), ("udp", "127.0.0.1", 8081))


def opensnitchd() -> Path:
    """The daemon, unpacked by tests/run: its package would take over the firewall of this host."""
    found = ROOT / "build" / "unpacked" / "opensnitch" / "usr" / "bin" / "opensnitchd"
    if not found.is_file():
        pytest.skip("opensnitch is not unpacked (tests/run --kernel does it)")
    return found


def rule(name: str, program: str, uid: int) -> dict[str, Any]:
    """A rule of OpenSnitch that allows a program of a user."""
    asked = {"process.path": program, "user.id": str(uid)}
    each = [{"type": "simple", "operand": key, "sensitive": False, "data": value, "list": None} for key, value in asked.items()]
    time = "2026-01-01T00:00:00Z"
    return {
        "created": time, "updated": time, "name": name, "enabled": True, "precedence": False,
        "action": "allow", "duration": "always",
        "operator": {"type": "list", "operand": "list", "sensitive": False, "data": "", "list": each},
    }  # fmt: skip


class OpenSnitch:
    """The daemon in a namespace, with rules."""

    def __init__(self, netns: Namespace, folder: Path, rules: list[dict[str, Any]]) -> None:
        program = opensnitchd()
        folder.mkdir()
        shutil.copy(program.parents[2] / "etc" / "opensnitchd" / "system-fw.json", folder)
        (folder / "default-config.json").write_text(json.dumps(SETTINGS))
        (folder / "rules").mkdir()
        for each in rules:
            (folder / "rules" / f"{each['name']}.json").write_text(json.dumps(each))
        self._log = folder / "log"
        with self._log.open("wb") as log:
            argv = ("sh", "-ec", START, "sh", str(folder), str(program), str(_THEIRS))
            self._process = netns.start(*argv, stdout=log, stderr=log)

        def serves() -> bool:
            assert self._process.poll() is None, self.log
            bound = netns.shell("cat /proc/net/netfilter/nfnetlink_queue").splitlines()
            led = [netns.run(f"{save}-save", check=False).stdout for save in ("iptables", "ip6tables")]
            return any(line.split()[0] == str(_THEIRS) for line in bound) and all(
                f"--queue-num {_THEIRS}" in each for each in led
            )

        until(serves, "OpenSnitch has its queue, and its rules of both families")

    @property
    def log(self) -> str:
        """What it has logged so far, without colours."""
        return _COLOURS.sub("", self._log.read_text(errors="replace"))

    def users(self, begin: int) -> dict[FiveTuple, int]:
        """The user of each connection by its five-tuple. begin: of what it has logged."""
        found = _ASKED.findall(self.log[begin:])
        return {(kind, source, int(sport), target, int(dport)): int(uid) for kind, sport, source, target, dport, uid in found}

    def gave_up(self, begin: int) -> bool:
        """Whether it took no look at a packet, as on a loaded machine. begin: of what it has logged."""
        return _GIVEN_UP in self.log[begin:]

    def decisions(self, begin: int) -> set[tuple[str, str]]:
        """Program and rule of each decision."""
        return set(_DECIDED.findall(self.log[begin:]))


class Both:
    """The agent and OpenSnitch in one namespace, and programs that connect there."""

    def __init__(self, netns: Namespace, agent: Agent, opensnitch: OpenSnitch, group: Path) -> None:
        self._netns, self._agent, self._opensnitch, self._group = netns, agent, opensnitch, group
        self._sources = iter(range(20001, 30000))
        # What OpenSnitch has decided about the connection before.
        self._before: set[tuple[str, str]] = set()

    def answers(self, client: Callable[[int], list[str]], uid: int, server: tuple[str, str, int]) -> Answers | None:
        """Whom both name for one connection; None if OpenSnitch did not look. client: its argv, from its source port."""
        kind, host, port = server
        source = next(self._sources)
        five_tuple = (kind, host, source, host, port)
        begin = len(self._opensnitch.log)
        process = self._netns.start("sh", "-ec", ENTER, "sh", str(self._group), str(uid), *client(source), stdin=subprocess.PIPE)
        try:
            return self._answers(process, client(source)[0] == NETCAT, five_tuple, begin)
        finally:
            process.kill()
            process.wait()

    def _answers(self, process: subprocess.Popen[bytes], writes: bool, five_tuple: FiveTuple, begin: int) -> Answers | None:
        assert process.stdin is not None
        if writes:
            process.stdin.write(b"hello\n")
            process.stdin.flush()
        record = until(lambda: self._record(five_tuple), f"a record of {five_tuple}")

        def met() -> bool:
            return five_tuple in self._opensnitch.users(begin) or self._opensnitch.gave_up(begin)

        until(met, f"OpenSnitch was asked about {five_tuple}")
        if five_tuple not in self._opensnitch.users(begin):
            return None
        # A SYN that was sent again may have another line of the connection before.
        decisions = until(lambda: self._opensnitch.decisions(begin) - self._before, f"OpenSnitch has decided about {five_tuple}")
        process.stdin.close()
        ours = record.get("uid"), record.get("exe")
        ((program, rule),) = decisions
        return ours, (self._opensnitch.users(begin)[five_tuple], program), rule

    def goes_on(self, answers: Answers) -> None:
        """The next connection is another program's or another user's."""
        _, (_, program), rule = answers
        self._before = {(program, rule)}

    def _record(self, five_tuple: FiveTuple) -> dict[str, Any] | None:
        # The last line may be half written.
        for record in map(json.loads, self._agent.log.split("\n")[:-1]):
            if record.get("event") == "begin" and five_tuple == tuple(
                record[key] for key in ("proto", "src", "sport", "dst", "dport")
            ):
                return dict(record)
        return None


def test_both_name_the_same_user_and_program(netns: Namespace, tmp_path: Path, groups: tuple[Path, str]) -> None:
    root, tag = groups
    clients = {PROGRAM: python, NETCAT: netcat}
    rules = [rule(f"{Path(path).name}-of-{uid}", path, uid) for path in clients for uid in (0, UNPRIVILEGED)]
    netns.start(sys.executable, "-m", "http.server", "8080", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    netns.start(NETCAT, "-u", "-lk", "127.0.0.1", "8081", stdout=subprocess.DEVNULL)
    until(lambda: listening(netns, 8080) and listening(netns, 8081, "-u"), "the servers listen")
    opensnitch = OpenSnitch(netns, tmp_path / "opensnitch", rules)
    agent = Agent(netns, tmp_path, CONFIG, LOG_FORMAT="json").ready()
    both = Both(netns, agent, opensnitch, root / f"other-{tag}.service")
    for server in SERVERS:
        for program, client in clients.items():
            for uid in (0, UNPRIVILEGED):
                ask = functools.partial(both.answers, functools.partial(client, server), uid, server)
                answers = until(lambda ask=ask: known(ask()), f"both name {program} of {uid} to {server}")  # type: ignore[misc]  # its default is the type
                both.goes_on(answers)
                ours, theirs, name = answers
                assert ours == theirs == (uid, program), server
                assert name == f"{Path(program).name}-of-{uid}"
    assert agent.stop() == 0


def known(answers: Answers | None) -> Answers | None:
    """Answers of both where our record names a program."""
    return None if answers is None or answers[0][1] is None else answers


def python(server: tuple[str, str, int], source: int) -> list[str]:
    """A Python program that connects from a port."""
    kind, host, port = server
    return [PROGRAM, "-c", PYTHON, kind, host, str(port), str(source)]


def netcat(server: tuple[str, str, int], source: int) -> list[str]:
    """The same of netcat."""
    kind, host, port = server
    return [NETCAT, *(["-u"] if kind == "udp" else []), "-p", str(source), host, str(port)]
