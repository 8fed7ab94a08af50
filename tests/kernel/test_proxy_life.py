"""Thousands of connections, and a proxy that is stopped, reloaded or killed: nothing is left behind."""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import time
from pathlib import Path

import pytest
from agent import until
from namespace import Namespace
from proxied import configuration
from proxy_process import MB, Run, descriptors, memory, wait_until_released
from tcp_client import Load, Meanwhile, Talk, ask, receive, server

from nfq_agent.proxy.listeners import ACCEPTS, raise_limit
from nfq_agent.stream import Answer, Connection, StreamElement

pytestmark = pytest.mark.kernel


class TestMany:
    def test_five_thousand_at_once(self, netns: Namespace, run: Run) -> None:
        """Each is open, has carried bytes and carries them again; 5,000 in 24 MB of the proxy's own memory."""
        netns.shell("sysctl -qw net.ipv4.tcp_max_syn_backlog=8192 net.core.somaxconn=8192")
        server(netns, "echo")
        proxy = run()
        pid = proxy.pids[0]
        base = descriptors(pid)
        before = memory(pid)

        def many() -> tuple[int, int]:
            # systemd gives a soft limit of 1,024 descriptors.
            raise_limit()
            held = []
            for _ in range(5000):
                it = socket.create_connection(("127.0.0.1", 8080), timeout=60)
                it.sendall(b"first")
                held.append(it)
            good = sum(receive(it, 5) == b"first" for it in held)
            used = memory(pid)
            for it in held:
                it.sendall(b"again")
            good += sum(receive(it, 5) == b"again" for it in held)
            return good, used

        good, used = netns.call(many, timeout=240)
        assert good == 10_000
        print(f"5,000 connections: {(used - before) / MB:.1f} MB")
        assert used - before < 24 * MB
        wait_until_released(proxy, base)

    def test_too_few_descriptors(self, netns: Namespace, run: Run) -> None:
        """No more connections are accepted than there are descriptors for. The others wait, and are served when there is room."""
        server(netns, "echo")
        proxy = run(nofile=64 + 2 * 10)
        assert "enough for 10 connections" in proxy.said()

        def more() -> None:
            held = [socket.create_connection(("127.0.0.1", 8080), timeout=60) for _ in range(30)]
            for it in held:
                it.sendall(b"x")
            while held:
                # The kernel accepts in the order of the backlog.
                served, held = held[:10], held[10:]
                assert [it.recv(1) for it in served] == [b"x"] * 10
                assert select.select(held, [], [], 0.2)[0] == []
                for it in served:
                    it.close()

        netns.call(more)
        proxy.wait_count("connections", 30)

    @pytest.mark.parametrize("word", [b"stop\n", b"drain\n"])
    def test_several_processes_on_the_same_listeners(self, netns: Namespace, run: Run, word: bytes) -> None:
        server(netns, "echo")
        proxy = run(configuration(proxy='elements = ["stream-log"]\nprocesses = 3\nbuffer = 8192\ndrain = "2s"'))

        def several() -> list[bytes]:
            held = [socket.create_connection(("127.0.0.1", 8080), timeout=60) for _ in range(200)]
            for it in held:
                it.sendall(b"x")
            return [it.recv(1) for it in held]

        clients = [Meanwhile(netns, several), Meanwhile(netns, several)]
        assert [client.result() for client in clients] == [[b"x"] * 200] * 2
        proxy.wait_count("bytes_reverse", 400)
        proxy.wait_count("connections", 400)
        # An id begins with what its process drew at random.
        processes = {event["connection"].split("-")[0] for event in proxy.events() if event.get("event") == "opened"}
        assert 1 < len(processes) <= 3
        (pid,) = proxy.pids
        others = list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
        assert len(others) == 2
        proxy.tell(word)
        assert proxy.reap() == [0]
        assert not any(Path(f"/proc/{other}").exists() for other in others)

    def test_one_of_several_that_dies_takes_the_others_with_it(self, netns: Namespace, run: Run) -> None:
        """So that the supervisor starts all of them again."""
        proxy = run(configuration(proxy="processes = 2"))
        (pid,) = proxy.pids
        (other,) = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        os.kill(other, 9)
        assert proxy.reap() == [1]


class TestLife:
    def test_drain_lets_what_runs_end(self, netns: Namespace, run: Run) -> None:
        server(netns, "echo")
        proxy = run(configuration(proxy='drain = "60s"'))
        control, theirs = socket.socketpair()

        def last_words() -> bytes:
            it = socket.create_connection(("127.0.0.1", 8080), timeout=60)
            it.sendall(b"before")
            assert receive(it, 6) == b"before"
            theirs.send(b"running")
            assert theirs.recv(8) == b"draining"
            it.sendall(b"after")
            return receive(it, 5)

        client = Meanwhile(netns, last_words)
        assert control.recv(10) == b"running"
        proxy.rules_parked()
        proxy.tell(b"drain\n")
        control.send(b"draining")
        assert client.result() == b"after"
        # Before its deadline.
        assert proxy.reap(55) == [0]
        for each in (control, theirs):
            each.close()

    def test_drain_ends_at_its_deadline(self, netns: Namespace, run: Run) -> None:
        server(netns, "echo")
        proxy = run(configuration(proxy='drain = "300ms"'))

        def stay() -> str:
            it = socket.create_connection(("127.0.0.1", 8080), timeout=60)
            it.sendall(b"x")
            assert it.recv(1) == b"x"
            proxy.tell(b"drain\n")
            try:
                return it.recv(1).decode() or "end"
            except ConnectionResetError:
                return "reset"

        assert netns.call(stay) == "reset"
        assert proxy.reap() == [0]

    def test_drain_accepts_connections_in_the_backlog(self, netns: Namespace, run: Run) -> None:
        """More connections wait than one turn accepts: those that are left when the order comes are accepted too."""
        server(netns, "echo")
        proxy = run(configuration(proxy='drain = "5s"'))
        count = 3 * ACCEPTS + 1

        def waiting() -> int:
            os.kill(proxy.pids[0], signal.SIGSTOP)
            held = [socket.create_connection(("127.0.0.1", 8080), timeout=60) for _ in range(count)]
            for it in held:
                it.sendall(b"x")
            proxy.tell(b"drain\n")
            os.kill(proxy.pids[0], signal.SIGCONT)
            return sum(it.recv(1) == b"x" for it in held)

        assert netns.call(waiting) == count
        assert proxy.reap() == [0]

    def test_rules_out_and_drain_under_load_lose_nothing(self, netns: Namespace, run: Run) -> None:
        server(netns, "echo")
        proxy = run(configuration(proxy='drain = "100s"'))
        client = Load(netns)
        proxy.wait_above("connections", 50)
        proxy.rules_parked()
        # A handshake that was redirected just before gets the time that it needs.
        time.sleep(0.05)
        proxy.tell(b"drain\n")
        # Before its deadline: nothing is left to wait for.
        assert proxy.reap(60) == [0]
        proxy.rules_out()
        for listener in proxy.listeners:
            listener.close()
        good = client.good
        until(lambda: client.good > good + 10, "the exchanges continue without it")
        assert client.end() == []
        assert "NFQA" not in netns.shell("iptables-legacy-save; ip6tables-legacy-save")

    def test_a_successor_takes_over_under_load_and_nothing_is_lost(self, netns: Namespace, run: Run) -> None:
        server(netns, "echo")
        proxy = run(configuration(proxy='drain = "60s"'))
        clients = [Load(netns), Load(netns)]
        for _ in range(2):
            long = Talk(netns)
            until(lambda long=long: long.good, "it talks")  # type: ignore[misc]  # bound early
            proxy.wait_above("connections", 50)
            proxy.follow()
            # The one that runs is carried on by the process that drains.
            good = long.good
            until(lambda long=long, good=good: long.good > good + 5, "it talks on")  # type: ignore[misc]  # bound early
            assert long.end() == []
            assert proxy.end_drained() == [0]
        assert [client.end() for client in clients] == [[], []]

    @pytest.mark.parametrize("how", ["stop", "EOF"])
    def test_the_end_is_at_once_and_honest(self, netns: Namespace, run: Run, how: str) -> None:
        server(netns, "source")
        proxy = run()

        def cut() -> str:
            it = socket.create_connection(("127.0.0.1", 8080), timeout=60)
            it.recv(1)
            if how == "stop":
                proxy.tell(b"stop\n")
            else:
                proxy._children[0][1].shutdown(socket.SHUT_RDWR)  # noqa: SLF001  # the support class's own child
            try:
                while it.recv(1 << 20):
                    pass
            except ConnectionResetError:
                return "reset"
            return "end"

        # Not an end: a truncated stream must not look complete.
        assert netns.call(cut) == "reset"
        assert proxy.reap() == [0]

    @pytest.mark.parametrize(("on_error", "arrives"), [("pass", b"hello"), ("drop", b"")])
    def test_an_element_that_raises(self, netns: Namespace, run: Run, on_error: str, arrives: bytes) -> None:
        class Bad(StreamElement):
            def request(self, data: bytes, connection: Connection) -> Answer:
                raise RuntimeError("out of ideas")

        server(netns, "echo")
        proxy = run(configuration(proxy=f'on_error = "{on_error}"'), elements=[lambda emit: Bad("bad", None, emit)])
        assert netns.call(ask, "127.0.0.1", 8080) == arrives
        line = proxy.wait_for("out of ideas")
        assert line["element"] == "bad"
        assert line["level"] == "error"
        proxy.wait_count("element_errors", 1)

    def test_an_idle_proxy_sleeps(self, netns: Namespace, run: Run) -> None:
        server(netns, "echo")
        proxy = run()
        base = descriptors(proxy.pids[0])
        netns.call(ask, "127.0.0.1", 8080)
        wait_until_released(proxy, base)
        status = Path(f"/proc/{proxy.pids[0]}/status")
        switches = re.compile(r"^voluntary_ctxt_switches:\s+(\d+)", re.MULTILINE)

        def sleeps() -> bool:
            (before,) = switches.findall(status.read_text())
            began = time.monotonic()
            time.sleep(2)
            (after,) = switches.findall(status.read_text())
            # It wakes twice a second, so that it can be told from one that hangs.
            return int(after) - int(before) <= 2 * (time.monotonic() - began) + 1

        # What is left of the connection may be done a moment later.
        until(sleeps, "it sleeps")
