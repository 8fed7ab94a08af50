"""A proxy of a test's own: its rules in a namespace, by their text, and `serve` in a child with no privilege left."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from namespace import Namespace

from nfq_agent.config import file as configfile
from nfq_agent.config.models import Config
from nfq_agent.counters import PROXY_COUNTERS, Slots
from nfq_agent.host import routes
from nfq_agent.host.users import CAP_NET_ADMIN, User, become
from nfq_agent.proxy.listeners import listen
from nfq_agent.proxy.serve import serve
from nfq_agent.proxy.settings import ProxySettings
from nfq_agent.rules import routing
from nfq_agent.rules.leaving import keep_for_draining
from nfq_agent.rules.model import Ruleset, TableRules
from nfq_agent.rules.plan import plan
from nfq_agent.stream import StreamChain, StreamElement

# A system user's number that no rule of a test's host has; only the number counts.
UID = 972
TPROXY = 'capture = "tproxy"\n'


def configuration(
    listen: str = '"0.0.0.0:15002", "[::]:15002"', proxy: str = "", hooks: str = '"output"', rule: str = "", rest: str = ""
) -> str:
    """A proxy behind the TCP ports 8080 to 8090."""
    return f"""
[proxy.tcp]
listen = [{listen}]
{proxy}
[rules.redirect]
proxy = "tcp"
hooks = [{hooks}]
tcp_ports = ["8080:8090"]
{rule}
{rest}
"""


class Proxied:
    """`[proxy.NAME]` of a configuration, running in a namespace. Lines that it said are in `events()`."""

    def __init__(
        self,
        namespace: Namespace,
        folder: Path,
        text: str,
        name: str = "tcp",
        elements: Sequence[Callable[[Callable[..., None]], StreamElement]] | None = None,
        processes: int = 1,
        nofile: int | None = None,
        uid: int = UID,
    ) -> None:
        """elements: made in the child, in place of those of the configuration."""
        path = folder / "agent.toml"
        path.write_text(text)
        self.namespace = namespace
        self.config: Config = configfile.load(path)
        self._log = folder / "events"
        # Opened here: the child may not even look into the folder.
        self._log_fd = os.open(self._log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC)
        self._name = name
        self._elements = elements
        self._nofile = nofile
        self._uid = uid
        self.counters = Slots(tuple(PROXY_COUNTERS))
        self.listeners: list[socket.socket] = []
        self._draining: list[tuple[int, socket.socket]] = []
        self._children = [self._start(number, processes) for number in range(processes)]
        self.pids = [pid for pid, _ in self._children]
        try:
            for _, control in self._children:
                control.settimeout(60)
                assert control.recv(64) == b"ready\n", f"the proxy did not start: {self.said()}"
            self.rules_in()
        except BaseException:
            self.stop()
            os.close(self._log_fd)
            raise

    def _start(self, number: int, processes: int) -> tuple[int, socket.socket]:
        ours, theirs = socket.socketpair()
        if number == 0:
            # Made by a process inside the namespace, and handed out: a socket belongs to where it was made.
            left, right = socket.socketpair()
            maker = os.fork()
            if maker == 0:
                try:
                    self.namespace.enter()
                    made = listen(self.config.proxy[self._name])
                    socket.send_fds(right, [b"x"], [each.fileno() for each in made])
                except BaseException:
                    traceback.print_exc()
                os._exit(0)
            right.close()
            _, descriptors, _, _ = socket.recv_fds(left, 1, 16)
            os.waitpid(maker, 0)
            left.close()
            self.listeners = [socket.socket(fileno=each) for each in descriptors]
            for listener in self.listeners:
                listener.setblocking(False)
            assert self.listeners, "no listeners"
        pid = os.fork()
        if pid:
            theirs.close()
            return pid, ours
        code = 1
        try:
            # As host/child.py has it: the collector would copy the test runner's memory page by page, and it counts as ours.
            gc.freeze()
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            ours.close()
            if self._nofile is not None:
                resource.setrlimit(resource.RLIMIT_NOFILE, (self._nofile, self._nofile))
            self.namespace.enter()
            become(User(self._uid, self._uid), (CAP_NET_ADMIN,))
            self._serve(theirs)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def _serve(self, control: socket.socket) -> None:
        def emit(message: str, level: str = "info", **fields: Any) -> None:
            os.write(self._log_fd, json.dumps({"message": message, "level": level, **fields}).encode() + b"\n")

        settings = ProxySettings.of(self._name, self.config)

        def chain_of() -> StreamChain:
            if self._elements is not None:
                return StreamChain([make(emit) for make in self._elements])
            specs = self.config.stream_elements(self.config.proxy[self._name])
            return StreamChain([spec.cls(spec.name, spec.options, emit) for spec in specs])

        serve(self.listeners, chain_of, settings, self.counters, control, emit)

    def _write(self, ruleset: Ruleset, wanted: bool) -> None:
        for family, tables in ruleset.items():
            command = "ip6tables-legacy" if family == "inet6" else "iptables-legacy"
            for table, content in tables.items():
                lines = []
                for chain, inside in content.chains.items():
                    lines += [f"-N {chain}", *map(str, inside)] if wanted else [f"-F {chain}", f"-X {chain}"]
                jumps = [str(jump) if wanted else f"-D{str(jump)[2:]}" for jump in content.jumps]
                lines = [*lines, *jumps] if wanted else [*jumps, *lines]
                self.namespace.shell("\n".join(f"{command} -w 10 -t {table} {line}" for line in lines))

    def rules_in(self) -> None:
        """Put the rules in, as `plan` has them."""
        self.namespace.call(routes.ensure, self.config.agent.instance, routing.wanted(self.config))
        self._now = plan(self.config, self._uid)
        self._write(self._now, True)

    def rules_parked(self) -> None:
        """What is left while the proxy drains."""
        parked = keep_for_draining(self._now)
        for family, tables in self._now.items():
            command = "ip6tables-legacy" if family == "inet6" else "iptables-legacy"
            for table, content in tables.items():
                kept = set(map(str, parked.get(family, {}).get(table, TableRules()).rules))
                for rule in content.rules:
                    if str(rule) not in kept:
                        self.namespace.shell(f"{command} -w 10 -t {table} -D{str(rule)[2:]}")
                if table not in parked.get(family, {}):
                    for chain in content.chains:
                        self.namespace.shell(f"{command} -w 10 -t {table} -X {chain}")
        self._now = parked

    def rules_out(self) -> None:
        """Take them out."""
        self._write(self._now, False)
        self._now = {}
        self.namespace.call(routes.ensure, self.config.agent.instance, {})

    def events(self) -> list[dict[str, Any]]:
        """What it has said so far. The last line may be half written, and is left out then."""
        return [json.loads(line) for line in self._log.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def said(self) -> str:
        """The messages, one a line."""
        return "\n".join(event["message"] for event in self.events())

    def wait_for(self, text: str, seconds: float = 60.0) -> dict[str, Any]:
        """The first event whose message holds a text, once it is there."""
        deadline = time.monotonic() + seconds
        while True:
            for event in self.events():
                if text in event["message"]:
                    return event
            assert time.monotonic() < deadline, f"{text!r} was not said:\n{self.said()}"
            time.sleep(0.01)

    def wait_count(self, name: str, value: int, seconds: float = 60.0) -> None:
        """Until a counter has a value: it is written at the end of a turn, after what was said in it."""
        deadline = time.monotonic() + seconds
        while (there := self.counters.snapshot()[name]) != value:
            assert time.monotonic() < deadline, f"{name} is {there}, not {value}"
            time.sleep(0.005)

    def wait_above(self, name: str, value: int, seconds: float = 60.0) -> None:
        """Until a counter is above a value."""
        deadline = time.monotonic() + seconds
        while (there := self.counters.snapshot()[name]) <= value:
            assert time.monotonic() < deadline, f"{name} is {there}, not above {value}"
            time.sleep(0.005)

    def follow(self) -> None:
        """Another process takes the listeners over; the ones before it begin to drain."""
        pid, control = self._start(1, 1)
        control.settimeout(60)
        assert control.recv(64) == b"ready\n"
        self.tell(b"drain\n")
        self._draining = self._children
        self._children = [(pid, control)]
        self.pids = [pid]

    def end_drained(self) -> list[int]:
        """The exit codes of those that drained, once they have ended."""
        now, self._children = self._children, self._draining
        codes = self.reap()
        self._children = now
        return codes

    def tell(self, word: bytes) -> None:
        """Say a word on every control socket."""
        for _, control in self._children:
            with contextlib.suppress(BrokenPipeError):
                control.send(word)

    def reap(self, seconds: float = 60.0) -> list[int]:
        """The exit codes, once all have ended."""
        codes = []
        deadline = time.monotonic() + seconds
        for pid, control in self._children:
            while True:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes.append(os.waitstatus_to_exitcode(status))
                    break
                if time.monotonic() > deadline:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    codes.append(-signal.SIGKILL)
                    break
                time.sleep(0.005)
            control.close()
        self._children = []
        return codes

    def stop(self) -> list[int]:
        """End it at once."""
        if not self._children:
            return []
        self.tell(b"stop\n")
        codes = self.reap()
        for listener in self.listeners:
            listener.close()
        return codes

    def __enter__(self) -> Proxied:
        return self

    def __exit__(self, *_: object) -> None:
        codes = self.stop()
        os.close(self._log_fd)
        for listener in self.listeners:
            listener.close()
        assert not any(codes), f"the proxy ended with {codes}:\n{self.said()}"
