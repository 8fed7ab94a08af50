"""What arrives through the proxy: bytes, ends, resets and lines of the log."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import socket
import struct
import subprocess
import threading
import time
from pathlib import Path

import pytest
import tcp_server
from agent import until
from namespace import Namespace
from proxied import configuration
from proxy_process import MB, Run, descriptors, memory, wait_until_released
from tcp_client import ask, how_it_ends, receive, server

from nfq_agent.elements.stream_log import StreamLog, StreamLogOptions
from nfq_agent.stream import Answer, Connection, StreamElement

pytestmark = pytest.mark.kernel


def exact(total: int) -> int:
    with socket.create_connection(("127.0.0.1", 8080), timeout=60) as connection:
        return tcp_server.exchange(connection, total)


class TestBytes:
    @pytest.mark.parametrize(
        ("elements", "total"),
        [
            pytest.param("", 1000 * MB, id="past the elements"),
            pytest.param('elements = ["replace"]\nchunk = 65536', 150 * MB, id="through an element"),
        ],
    )
    def test_exact_both_ways(self, netns: Namespace, run: Run, elements: str, total: int) -> None:
        server(netns, "exact", "0.0.0.0", 8080, str(total))
        rest = '[element.replace]\nfind = "not in there, by any chance"\nwith = "x"\n'
        proxy = run(configuration(proxy=elements, rest=rest if elements else ""))
        base = descriptors(proxy.pids[0])
        assert netns.call(exact, total) == total
        wait_until_released(proxy, base)
        counts = proxy.counters.snapshot()
        assert counts["bytes_forward"] == counts["bytes_reverse"] == total
        assert counts["reset"] == 0

    def test_a_slow_reader_is_waited_for_with_bounded_memory(self, netns: Namespace, run: Run) -> None:
        server(netns, "source")
        proxy = run()
        before = memory(proxy.pids[0])

        def read_slowly() -> int:
            with socket.create_connection(("127.0.0.1", 8080), timeout=60) as connection:
                time.sleep(0.5)
                got = tcp_server.receive_exact(connection, 64 * MB)
                time.sleep(0.5)
                return got

        assert netns.call(read_slowly) >= 64 * MB
        # One read each way at most, and what Python keeps of it.
        assert memory(proxy.pids[0]) - before < 4 * MB
        # The sender was stopped: what was carried is what was read, and what fits into sockets' buffers.
        assert proxy.counters.snapshot()["bytes_reverse"] < 64 * MB + 32 * MB

    @pytest.mark.parametrize("elements", ["", 'elements = ["replace"]'], ids=["past", "through"])
    def test_a_slow_server_is_waited_for_too(self, netns: Namespace, run: Run, elements: str) -> None:
        """The client is stopped, nothing piles up in the proxy, and all of it arrives in the end."""
        rest = '[element.replace]\nfind = "nothing like it: 7d1f"\nwith = ""\n' if elements else ""
        proxy = run(configuration(proxy=elements, rest=rest))
        before = memory(proxy.pids[0])
        total = 64 * MB

        def play() -> tuple[bool, int, int]:
            with socket.create_server(("127.0.0.1", 8081)) as listener:
                client = socket.create_connection(("127.0.0.1", 8081), timeout=60)
                there, _ = listener.accept()
                with client, there:
                    sender = threading.Thread(target=tcp_server.send_all, args=(client, total), daemon=True)
                    sender.start()
                    time.sleep(0.5)
                    stopped, piled_up = sender.is_alive(), memory(proxy.pids[0])
                    got = tcp_server.receive_exact(there, total + 1)
                    sender.join(60)
                    return stopped, piled_up, got

        stopped, piled_up, got = netns.call(play)
        assert (stopped, got) == (True, total)
        assert piled_up - before < 4 * MB

    def test_elements_wait_for_a_slow_reader_too(self, netns: Namespace, run: Run) -> None:
        server(netns, "source")
        rest = '[element.limit]\nbytes_per_second = 40000\nway = "response"\n'
        proxy = run(configuration(proxy='elements = ["limit"]', rest=rest))
        before = memory(proxy.pids[0])

        def wait() -> int:
            with socket.create_connection(("127.0.0.1", 8080), timeout=60) as connection:
                time.sleep(1)
                return len(connection.recv(1 << 16))

        netns.call(wait)
        assert memory(proxy.pids[0]) - before < 4 * MB
        assert proxy.counters.snapshot()["bytes_reverse"] <= 512 * 1024


class TestEnds:
    def test_half_close_with_nc(self, netns: Namespace, run: Run) -> None:
        """The server answers only after the client's end; the client must still be able to hear it."""
        server(netns, "whole")
        run()
        assert netns.shell("head -c 300000 /dev/zero | nc -N 127.0.0.1 8080") == "300000 bytes\n"

    def test_the_servers_half(self, netns: Namespace, run: Run) -> None:
        """The server ends first and still listens."""
        run()

        def play() -> tuple[bytes, bytes]:
            with socket.create_server(("127.0.0.1", 8081)) as listener:
                client = socket.create_connection(("127.0.0.1", 8081), timeout=60)
                there, _ = listener.accept()
                with client, there:
                    there.sendall(b"bye")
                    there.shutdown(socket.SHUT_WR)
                    heard = client.recv(10), client.recv(10)
                    assert heard == (b"bye", b"")
                    client.sendall(b"one more thing")
                    client.shutdown(socket.SHUT_WR)
                    return there.recv(100), there.recv(100)

        assert netns.call(play) == (b"one more thing", b"")

    def test_a_reset_of_the_server_is_a_reset_for_the_client(self, netns: Namespace, run: Run) -> None:
        server(netns, "reset")
        run()
        assert netns.call(how_it_ends, "127.0.0.1", 8080, b"x") == "ECONNRESET"

    def test_a_reset_of_the_client_is_a_reset_for_the_server(self, netns: Namespace, run: Run) -> None:
        run()

        def play() -> str:
            with socket.create_server(("127.0.0.1", 8081)) as listener:
                client = socket.create_connection(("127.0.0.1", 8081), timeout=60)
                there, _ = listener.accept()
                there.settimeout(60)
                client.sendall(b"x")
                assert there.recv(1) == b"x"
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                client.close()
                try:
                    there.recv(1)
                except ConnectionResetError:
                    return "reset"
                return "end"

        assert netns.call(play) == "reset"

    def test_no_agent_runs(self, netns: Namespace, run: Run) -> None:
        proxy = run()
        assert netns.call(how_it_ends, "127.0.0.1", 8080) == "ECONNRESET"
        line = proxy.wait_for("cannot connect")
        assert "Connection refused" in line["message"]
        assert (line["dst"], line["dport"]) == ("127.0.0.1", 8080)
        proxy.wait_count("failed_upstream", 1)

    def test_no_answer(self, netns: Namespace, run: Run) -> None:
        netns.shell("iptables-legacy -w -A INPUT -p tcp --dport 8080 -j DROP")
        proxy = run(configuration(proxy='connect_timeout = "200ms"'))
        began = time.monotonic()
        assert netns.call(how_it_ends, "127.0.0.1", 8080) == "ECONNRESET"
        assert time.monotonic() - began >= 0.2
        assert "no answer within 0.2 s" in proxy.wait_for("cannot connect")["message"]

    @pytest.mark.parametrize("elements", ["", 'elements = ["delay"]'], ids=["past", "through"])
    def test_clients_that_vanish_at_every_point(self, netns: Namespace, run: Run, elements: str) -> None:
        server(netns, "echo")
        server(netns, "source", port=8081)
        server(netns, "sink", port=8082)
        netns.shell("iptables-legacy -w -A INPUT -p tcp --dport 8083 -j DROP")
        rest = '[element.delay]\nby = "5ms"\n' if elements else ""
        proxy = run(configuration(proxy=f'connect_timeout = "500ms"\n{elements}', rest=rest))
        base = descriptors(proxy.pids[0])

        def vanish() -> int:
            count = 0
            for port in (8080, 8081, 8082, 8083, 8084):
                for reset in (False, True):
                    for send in (0, 1, 100_000, 5_000_000):
                        for left in (0, 1, 50_000):
                            with contextlib.suppress(OSError), socket.socket() as it:
                                it.settimeout(0.05)
                                # One reset before connect() knows of it, as happens where no server listens (8084), was met too.
                                met = it.connect_ex(("127.0.0.1", port))
                                count += met in (0, errno.ECONNRESET)
                                if met:
                                    continue
                                if reset:
                                    it.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                                with contextlib.suppress(OSError):
                                    it.sendall(bytes(send))
                                with contextlib.suppress(OSError):
                                    receive(it, left)
            return count

        assert netns.call(vanish) > 100
        wait_until_released(proxy, base)
        # Who comes afterwards is served.
        assert netns.call(ask, "127.0.0.1", 8080) == b"hello"


class TestLines:
    def test_every_line_about_a_connection_has_its_id(self, netns: Namespace, run: Run) -> None:
        """Refused, unreachable, failed in an element, carried: each in its text and as a field, and no two are the same."""

        class Bad(StreamElement):
            def request(self, data: bytes, connection: Connection) -> Answer:
                raise RuntimeError("out of ideas")

        server(netns, "echo")
        proxy = run(
            elements=[lambda emit: StreamLog("stream-log", StreamLogOptions(), emit), lambda emit: Bad("bad", None, emit)]
        )
        assert netns.call(ask, "127.0.0.1", 8080) == b"hello"
        assert netns.call(ask, "127.0.0.1", 8080) == b"hello"
        assert netns.call(how_it_ends, "127.0.0.1", 8081) == "ECONNRESET"
        assert netns.call(how_it_ends, "127.0.0.1", 15002) == "ECONNRESET"
        proxy.wait_for("refused, from")

        def lines() -> dict[str, list[str]]:
            found: dict[str, list[str]] = {}
            for event in proxy.events():
                if "src" in event:
                    assert f"connection {event['connection']}: " in event["message"]
                    found.setdefault(event["connection"], []).append(event["message"])
            return found

        # Opened, failed, ended, twice; opened, unreachable, its end; refused. An end may be said behind what came later.
        until(lambda: sorted(map(len, lines().values())) == [1, 3, 3, 3], "all is said")
        prefixes, numbers = zip(*(each.split("-") for each in lines()), strict=True)
        assert (len(set(prefixes)), sorted(numbers)) == (1, ["1", "2", "3", "4"])


class TestSockets:
    def test_no_delay_and_keep_alive_on_both_sides(self, netns: Namespace, run: Run) -> None:
        """The client's side has probes from the first, the server's once the connection has lasted. No small segment waits: the
        server's side has TCP_NODELAY before the second is sent, and the first has none to wait for."""
        server(netns, "echo")
        proxy = run(configuration(proxy='opening_timeout = "2s"\nkeepalive = "7s"'))

        def options() -> list[tuple[int, int, int]]:
            found = []
            for copy in sockets_of(proxy.pids[0]):
                with copy, contextlib.suppress(OSError):
                    if copy.family == socket.AF_INET and copy.getpeername():
                        tcp = [copy.getsockopt(socket.IPPROTO_TCP, each) for each in (socket.TCP_NODELAY, socket.TCP_KEEPIDLE)]
                        found.append((tcp[0], copy.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE), tcp[1]))
            return found

        def look() -> None:
            with socket.create_connection(("127.0.0.1", 8080), timeout=60) as it:
                for _ in range(2):
                    it.sendall(b"x")
                    assert it.recv(1) == b"x"
                assert options().count((1, 1, 7)) == 1
                until(lambda: options() == [(1, 1, 7)] * 2, "both sides have it")

        netns.call(look)

    def test_a_lost_entry_of_connection_tracking_ends_the_connection(self, netns: Namespace, run: Run) -> None:
        """Without its entry nothing translates between the client and the proxy any more: both sides are probed."""
        server(netns, "echo")
        proxy = run(configuration(proxy='keepalive = "1s"\nelements = ["stream-log"]'))
        base = descriptors(proxy.pids[0])

        def lose() -> None:
            with socket.create_connection(("127.0.0.1", 8080), timeout=60) as it:
                it.sendall(b"x")
                assert it.recv(1) == b"x"
                subprocess.run(["conntrack", "-F"], check=True, capture_output=True, stdin=subprocess.DEVNULL)
                wait_until_released(proxy, base)

        netns.call(lose)
        assert "reset" in proxy.wait_for("after")["message"]


def sockets_of(pid: int) -> list[socket.socket]:
    """Copies of another process's sockets (pidfd_getfd(2))."""
    pidfd = os.pidfd_open(pid)
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    fds = Path(f"/proc/{pid}/fd")
    names = [each.name for each in fds.iterdir() if str(each.readlink()).startswith("socket:")]
    copies = [socket.socket(fileno=syscall(438, pidfd, int(name), 0)) for name in names]
    os.close(pidfd)
    return copies
