"""The proxy with real rules, real sockets and a real kernel: where connections go, what arrives, and what is left behind."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import select
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tcp_server
from namespace import Namespace
from proxied import TPROXY, UID, Proxied, configuration
from tcp_client import Meanwhile, ask, how_it_ends, load, receive, server

from nfq_agent.config import file as configfile
from nfq_agent.config.models import ConfigError, ProxyConfig
from nfq_agent.elements.stream_log import StreamLog, StreamLogOptions
from nfq_agent.proxy.listeners import ACCEPTS, listen
from nfq_agent.rules.leaving import keep_for_draining
from nfq_agent.rules.model import Rule
from nfq_agent.rules.plan import plan
from nfq_agent.stream import Answer, Connection, StreamElement

pytestmark = pytest.mark.kernel
HERE = Path(__file__).parent.parent
MB = 1 << 20

Run = Callable[..., Proxied]


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def memory(pid: int) -> int:
    """Bytes that a process alone has. Its part of what is shared (PSS) would change with every other child of the test runner."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(size) for size in re.findall(r"^Private_\w+:\s+(\d+) kB", text, re.M)) * 1024


def wait_until_released(proxy: Proxied, base: int, seconds: float = 10) -> None:
    """Wait until no connection is left in the proxy, by its own count and by the kernel's."""
    deadline = time.monotonic() + seconds
    while True:
        active, there = proxy.counters.snapshot()["active"], descriptors(proxy.pids[0])
        if active == 0 and there == base:
            return
        assert time.monotonic() < deadline, f"{active} connections and {there - base} descriptors are left"
        time.sleep(0.01)


class TestDestination:
    def test_ipv4(self, netns: Namespace, run: Run) -> None:
        netns.run("ip", "address", "add", "192.0.2.1/24", "dev", "lo")
        server(netns, "echo", "192.0.2.1")
        proxy = run(configuration(proxy='elements = ["stream-log"]'))
        assert netns.call(ask, "192.0.2.1", 8080) == b"hello"
        closed = proxy.wait_for("ended")
        assert closed["dst"] == "192.0.2.1:8080"
        assert closed["bytes_forward"] == closed["bytes_reverse"] == 5
        assert closed["connection"] == proxy.wait_for("-> 192.0.2.1:8080")["connection"]

    def test_ipv6(self, netns: Namespace, run: Run) -> None:
        netns.run("ip", "-6", "address", "add", "fd00:7::1/64", "dev", "lo", "nodad")
        server(netns, "echo", "fd00:7::1")
        proxy = run(configuration(proxy='elements = ["stream-log"]'))
        assert netns.call(ask, "fd00:7::1", 8080) == b"hello"
        assert proxy.wait_for("ended")["dst"] == "[fd00:7::1]:8080"

    def test_link_local(self, pair: tuple[Namespace, Namespace], run: Run) -> None:
        """The kernel does not tell the scope of such a destination; the client's own is the same."""
        ours, theirs = "fe80::1", "fe80::2"
        for each, address in zip(pair, (ours, theirs), strict=True):
            each.run("ip", "-6", "address", "add", f"{address}/64", "dev", "eth0", "nodad")
        client, host = pair
        server(host, "echo", "::")
        proxy = run(configuration(hooks='"prerouting"'), host)

        def between() -> bytes:
            scope = socket.if_nametoindex("eth0")
            with socket.socket(socket.AF_INET6) as it:
                it.settimeout(10)
                it.bind((ours, 0, 0, scope))
                it.connect((theirs, 8080, 0, scope))
                it.sendall(b"hello")
                return receive(it, 5)

        assert client.call(between) == b"hello"
        proxy.wait_count("connections", 1)

    def test_v4_mapped_on_a_dual_stack_listener(self, netns: Namespace, run: Run) -> None:
        server(netns, "echo", "127.0.0.1")
        proxy = run(configuration('"[::]:15002"', 'elements = ["stream-log"]'))
        assert netns.call(ask, "127.0.0.1", 8080) == b"hello"
        closed = proxy.wait_for("ended")
        assert closed["dst"] == "127.0.0.1:8080"
        assert closed["src"].startswith("127.0.0.1:")

    def test_prerouting_keeps_to_the_address_that_was_meant(self, pair: tuple[Namespace, Namespace], run: Run) -> None:
        client, host = pair
        server(host, "who", "10.203.0.2")
        proxy = run(configuration(hooks='"prerouting"', proxy='elements = ["stream-log"]'), host)
        # Carried by the proxy: the server sees the host itself.
        assert client.call(ask, "10.203.0.2", 8080, b"").startswith(b"10.203.0.2 ")
        assert proxy.wait_for("ended")["src"].startswith("10.203.0.1:")

    def test_the_contract_file(self, netns: Namespace, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        text = (HERE / "configs" / "transparent-proxy.toml").read_text()
        server(netns, "echo")
        proxy = run(text)
        assert netns.call(ask, "127.0.0.1", 8080) == b"hello"
        proxy.wait_for("ended")


class TestNeverALoop:
    @pytest.mark.parametrize("host", ["127.0.0.1", "::1", "192.0.2.1"])
    def test_our_own_listener_is_refused(self, netns: Namespace, run: Run, host: str) -> None:
        netns.run("ip", "address", "add", "192.0.2.1/24", "dev", "lo")
        proxy = run()
        assert netns.call(how_it_ends, host, 15002) == "ECONNRESET"
        line = proxy.wait_for("refused")
        assert line["level"] == "warning"
        assert "our own listener" in line["message"]
        proxy.wait_count("connections", 0)

    def test_the_rules_leave_every_listener_alone(self, netns: Namespace, run: Run) -> None:
        """8085 is within the ports of the rule, and another proxy's listener: nobody is led there in a circle."""
        proxy = run(configuration(rest='[proxy.other]\nlisten = ["0.0.0.0:8085"]\n'))
        assert netns.call(how_it_ends, "127.0.0.1", 8085) == "ECONNREFUSED"
        assert netns.call(how_it_ends, "127.0.0.1", 8086) == "ECONNRESET"
        assert proxy.wait_for("can't connect")["dst"] == "127.0.0.1:8086"

    @pytest.mark.parametrize("target", ["", "127.0.0.1:9000"])
    def test_a_destination_that_nobody_knows(self, netns: Namespace, run: Run, target: str) -> None:
        """Without an entry in the connection table the kernel can't tell: the target takes it, or it is refused."""
        for chain in ("OUTPUT", "PREROUTING"):
            netns.shell(f"iptables-legacy -w -t raw -A {chain} -p tcp -j CT --notrack")
        server(netns, "echo", port=9000)
        proxy = run(configuration(proxy=f'target = "{target}"'))
        if target:
            assert netns.call(ask, "127.0.0.1", 15002) == b"hello"
        else:
            assert netns.call(how_it_ends, "127.0.0.1", 15002) == "ECONNRESET"
            assert "its original destination is not known, and no target is configured" in proxy.wait_for("refused")["message"]

    def test_another_proxys_listener_is_our_own_too(self, netns: Namespace, run: Run) -> None:
        proxy = run(configuration(rest='[proxy.other]\nlisten = ["0.0.0.0:8085"]\n'))
        netns.shell("iptables-legacy -w -t nat -I OUTPUT -p tcp --dport 8085 -j REDIRECT --to-ports 15002")
        assert netns.call(how_it_ends, "127.0.0.1", 8085) == "ECONNRESET"
        assert "our own listener" in proxy.wait_for("refused")["message"]

    @pytest.mark.parametrize("processes", [1, 2])
    def test_a_rule_of_the_users_own_that_forgets_us(self, netns: Namespace, run: Run, processes: int) -> None:
        """The rule of a README, without an exclusion: our own connection comes back, and is refused at the second hop."""
        netns.shell("iptables-legacy -w -t nat -A OUTPUT -p tcp --dport 9090 -j REDIRECT --to-ports 15002")
        server(netns, "echo", port=9090)
        proxy = run(configuration(proxy=f"processes = {processes}"))
        assert netns.call(how_it_ends, "127.0.0.1", 9090, b"x") == "ECONNRESET"
        assert "a rule leads our own connections back to us" in proxy.wait_for("refused")["message"]
        for name, value in (("refused", 1), ("connections", 1), ("active", 0)):
            proxy.wait_count(name, value)

    def test_two_instances_of_different_users_leave_each_other_alone(self, netns: Namespace, run: Run) -> None:
        server(netns, "echo")
        one = run(configuration())
        other = run('[agent]\ninstance = "other"\n' + configuration('"0.0.0.0:15012", "[::]:15012"'), uid=UID + 1)
        assert netns.call(ask, "127.0.0.1", 8080) == b"hello"
        counts = sorted(proxy.counters.snapshot()["connections"] for proxy in (one, other))
        assert counts == [0, 1]

    def test_every_address_can_be_bound(self, netns: Namespace, run: Run) -> None:
        """With ip_nonlocal_bind, bind(2) takes any address for one of this host's; the routing table does not."""
        netns.shell("sysctl -qw net.ipv4.ip_nonlocal_bind=1")
        netns.shell(
            "ip link add v0 type veth peer name v1; ip link set v0 up; ip link set v1 up; ip address add 192.0.2.1/24 dev v0"
        )
        proxy = run(configuration(proxy='connect_timeout = "300ms"', rest='[proxy.other]\nlisten = ["0.0.0.0:8085"]\n'))
        assert netns.call(how_it_ends, "192.0.2.77", 8085) != "end"
        assert "can't connect" in proxy.wait_for("192.0.2.77")["message"]

    def test_the_target_takes_it(self, netns: Namespace, run: Run) -> None:
        server(netns, "echo", port=9000)
        run(configuration(proxy='target = "127.0.0.1:9000"'))
        assert netns.call(ask, "127.0.0.1", 15002) == b"hello"

    def test_the_environment_wins(self, netns: Namespace, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        server(netns, "echo", port=9001)
        monkeypatch.setenv("TARGET_ADDR", "127.0.0.1:9001")
        run(configuration(proxy='target = "127.0.0.1:9000"'))
        assert netns.call(ask, "127.0.0.1", 15002) == b"hello"

    def test_the_next_address_of_the_target(self, netns: Namespace, run: Run) -> None:
        """`localhost` is ::1 and 127.0.0.1; the server is on one of them only."""
        netns.shell("printf '::1 twofold\\n127.0.0.1 twofold\\n' >> /etc/hosts")
        server(netns, "echo", "127.0.0.1", 9000)
        run(configuration(proxy='target = "twofold:9000"'))
        assert netns.call(ask, "127.0.0.1", 15002) == b"hello"

    def test_a_target_whose_name_is_not_known_yet(self, netns: Namespace, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        """At boot there is no resolver: it starts, says so, refuses, and finds the name when it is there."""
        monkeypatch.setattr("nfq_agent.proxy.target.AGAIN", 0.1)
        server(netns, "echo", port=9000)
        proxy = run(configuration(proxy='target = "later.test:9000"'))
        assert "can't be resolved" in proxy.said()
        assert netns.call(how_it_ends, "127.0.0.1", 15002) == "ECONNRESET"
        netns.shell("echo 127.0.0.1 later.test >> /etc/hosts")
        proxy.wait_for("is resolved: 127.0.0.1:9000")
        assert netns.call(ask, "127.0.0.1", 15002) == b"hello"

    def test_a_target_that_is_a_listener_of_ours(self, netns: Namespace, run: Run) -> None:
        proxy = run(configuration(proxy='target = "127.0.0.1:15002"'))
        assert "listener of our own" in proxy.said()
        assert netns.call(how_it_ends, "127.0.0.1", 15002) == "ECONNRESET"

    def test_the_known_destination_comes_first(self, netns: Namespace, run: Run) -> None:
        server(netns, "echo")
        run(configuration(proxy='target = "127.0.0.1:9000"'))
        assert netns.call(ask, "127.0.0.1", 8080) == b"hello"


class TestRules:
    """What `plan` asks of the kernel for a proxy, in the text of `iptables -S`."""

    def text(self, tmp_path: Path, parked: bool = False, **options: str) -> dict[str, list[str]]:
        path = tmp_path / "agent.toml"
        path.write_text(configuration(**options))
        ruleset = plan(configfile.load(path), 972)
        ruleset = keep_for_draining(ruleset) if parked else ruleset

        def short(rule: Rule) -> str:
            text = re.sub(r' -m comment --comment "nfq-agent:default:(\S+)"', r" #\1", str(rule))
            return text.replace("NFQA-default-", "@").replace("-m multiport ", "")

        return {
            f"{family} {table}": [short(rule) for rule in content.rules]
            for family, tables in ruleset.items()
            for table, content in tables.items()
        }

    def test_redirect(self, tmp_path: Path) -> None:
        listen = '"0.0.0.0:15002", "0.0.0.0:8085", "[::]:15003"'
        found = self.text(tmp_path, listen=listen, proxy='exclude = ["10.0.0.0/8", "fd00::/8", "192.0.2.1/32"]')
        assert found["inet nat"] == [
            "-A OUTPUT #jump -j @OUTPUT",
            "-A @OUTPUT -m owner --uid-owner 972 #own-traffic -j RETURN",
            "-A @OUTPUT -p tcp --dports 8085 -m addrtype --dst-type LOCAL #redirect -j RETURN",
            "-A @OUTPUT -p tcp --dports 8080:8090 -m iprange --dst-range 10.0.0.0-10.255.255.255 #redirect -j RETURN",
            "-A @OUTPUT -p tcp --dports 8080:8090 -m iprange --dst-range 192.0.2.1-192.0.2.1 #redirect -j RETURN",
            "-A @OUTPUT -p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN --dports 8080:8090 -m mark ! --mark 0x1000/0x1000 "
            "#redirect -j REDIRECT --to-ports 15002",
            "-A @OUTPUT #end -j RETURN",
        ]
        assert found["inet6 nat"][-2].endswith("-j REDIRECT --to-ports 15003")

    def test_a_rule_that_names_its_listener(self, tmp_path: Path) -> None:
        found = self.text(tmp_path, listen='"0.0.0.0:15002", "0.0.0.0:15006", "[::]:15002"', rule="port = 15006")
        assert found["inet nat"][-1].endswith("-j REDIRECT --to-ports 15006")
        assert "inet6 nat" not in found or not any("REDIRECT" in rule for rule in found["inet6 nat"])
        for family in ("inet", "inet6"):
            assert self.text(tmp_path, listen='"[::]:15002", "[::]:15006"', rule="port = 15006")[f"{family} nat"][-1].endswith(
                "-j REDIRECT --to-ports 15006"
            )

    def test_tproxy(self, tmp_path: Path) -> None:
        found = self.text(tmp_path, hooks='"prerouting"', proxy=TPROXY)
        assert list(found) == ["inet mangle", "inet6 mangle"]
        assert found["inet6 mangle"] == [
            "-A PREROUTING #jump -j @PREROUTING",
            "-A @PREROUTING -p tcp -m socket --transparent #redirect -j MARK --set-xmark 0x800/0x800",
            "-A @PREROUTING -p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN --dports 8080:8090 -m mark ! --mark 0x1000/0x1000 "
            "#redirect -j TPROXY --on-port 15002 --on-ip :: --tproxy-mark 0x800/0x800",
            "-A @PREROUTING #end -j RETURN",
        ]

    def test_parked(self, tmp_path: Path) -> None:
        assert self.text(tmp_path, parked=True)["inet nat"] == [
            "-A @OUTPUT -p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN --dports 8080:8090 -m mark ! --mark 0x1000/0x1000 "
            "-m owner ! --uid-owner 972 #redirect -j REDIRECT --to-ports 15002"
        ]
        assert self.text(tmp_path, parked=True, hooks='"prerouting"', proxy=TPROXY)["inet mangle"] == [
            "-A PREROUTING #jump -j @PREROUTING",
            "-A @PREROUTING -p tcp -m socket --transparent #redirect -j MARK --set-xmark 0x800/0x800",
        ]

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (
                {"proxy": 'capture = "tproxy"'},
                'rules.redirect.hooks: TPROXY takes what arrives only (line 7); allowed: hooks = ["prerouting"]',
            ),
            ({"proxy": "keep_client = true"}, 'allowed: with capture = "tproxy"'),
            ({"proxy": 'exclude = ["10.0.0.1/8"]'}, "did you mean '10.0.0.0/8'?"),
            ({"proxy": 'elements = ["log"]'}, "unknown element 'log' (line 4); allowed: delay, http-host"),
            ({"rule": "port = 15007"}, "proxy tcp does not listen on port 15007 (line 9); allowed: 15002"),
            ({"proxy": 'elements = ["sni"]'}, "nothing would be denied"),
        ],
    )
    def test_refused(self, tmp_path: Path, options: dict[str, Any], said: str) -> None:
        with pytest.raises(ConfigError, match=re.escape(said)):
            self.text(tmp_path, **options)


class TestListen:
    def test_the_error_names_the_address(self, netns: Namespace) -> None:
        def twice() -> str:
            config = ProxyConfig.model_validate({"listen": ["127.0.0.1:15002", "127.0.0.1:15003"]})
            with socket.create_server(("127.0.0.1", 15003)):
                try:
                    listen(config)
                except OSError as error:
                    return str(error)
            return "no error"

        assert "127.0.0.1:15003: Address already in use" in netns.call(twice)


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
            with socket.create_connection(("127.0.0.1", 8080), timeout=10) as connection:
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
                client = socket.create_connection(("127.0.0.1", 8081), timeout=20)
                there, _ = listener.accept()
                with client, there:
                    sender = threading.Thread(target=tcp_server.send_all, args=(client, total), daemon=True)
                    sender.start()
                    time.sleep(0.5)
                    stopped, piled_up = sender.is_alive(), memory(proxy.pids[0])
                    got = tcp_server.receive_exact(there, total + 1)
                    sender.join(10)
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
            with socket.create_connection(("127.0.0.1", 8080), timeout=10) as connection:
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
                client = socket.create_connection(("127.0.0.1", 8081), timeout=10)
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
                client = socket.create_connection(("127.0.0.1", 8081), timeout=10)
                there, _ = listener.accept()
                there.settimeout(10)
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

    def test_nobody_there(self, netns: Namespace, run: Run) -> None:
        proxy = run()
        assert netns.call(how_it_ends, "127.0.0.1", 8080) == "ECONNRESET"
        line = proxy.wait_for("can't connect")
        assert "Connection refused" in line["message"]
        assert line["dst"] == "127.0.0.1:8080"
        proxy.wait_count("failed_upstream", 1)

    def test_no_answer(self, netns: Namespace, run: Run) -> None:
        netns.shell("iptables-legacy -w -A INPUT -p tcp --dport 8080 -j DROP")
        proxy = run(configuration(proxy='connect_timeout = "200ms"'))
        began = time.monotonic()
        assert netns.call(how_it_ends, "127.0.0.1", 8080) == "ECONNRESET"
        assert 0.2 <= time.monotonic() - began < 2
        assert "no answer within 0.2 s" in proxy.wait_for("can't connect")["message"]

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
                                # One reset before connect() knows of it, as happens where nobody is (8084), was met too.
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
        lines: dict[str, list[str]] = {}
        for event in proxy.events():
            if "src" in event:
                assert f"connection {event['connection']}: " in event["message"]
                lines.setdefault(event["connection"], []).append(event["message"])
        # Opened, failed, ended, twice; opened, unreachable, its end; refused.
        assert sorted(map(len, lines.values())) == [1, 3, 3, 3]
        prefixes, numbers = zip(*(each.split("-") for each in lines), strict=True)
        assert (len(set(prefixes)), sorted(numbers)) == (1, ["1", "2", "3", "4"])


class TestSockets:
    def test_no_delay_and_keep_alive_on_both_sides(self, netns: Namespace, run: Run) -> None:
        """The client's side has probes from the first, the server's once the connection has lasted."""
        server(netns, "echo")
        proxy = run(configuration(proxy='opening_timeout = "300ms"\nkeepalive = "7s"'))

        def options() -> list[tuple[int, int, int]]:
            found = []
            for copy in sockets_of(proxy.pids[0]):
                with copy, contextlib.suppress(OSError):
                    if copy.family == socket.AF_INET and copy.getpeername():
                        tcp = [copy.getsockopt(socket.IPPROTO_TCP, each) for each in (socket.TCP_NODELAY, socket.TCP_KEEPIDLE)]
                        found.append((tcp[0], copy.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE), tcp[1]))
            return found

        def look() -> None:
            with socket.create_connection(("127.0.0.1", 8080), timeout=10) as it:
                it.sendall(b"x")
                assert it.recv(1) == b"x"
                assert options().count((1, 1, 7)) == 1
                deadline = time.monotonic() + 5
                while options() != [(1, 1, 7)] * 2:
                    assert time.monotonic() < deadline, options()
                    time.sleep(0.05)

        netns.call(look)

    def test_a_lost_entry_of_connection_tracking_ends_the_connection(self, netns: Namespace, run: Run) -> None:
        """Without its entry nothing translates between the client and the proxy any more: both sides are probed."""
        server(netns, "echo")
        proxy = run(configuration(proxy='keepalive = "1s"\nelements = ["stream-log"]'))
        base = descriptors(proxy.pids[0])

        def lose() -> None:
            with socket.create_connection(("127.0.0.1", 8080), timeout=10) as it:
                it.sendall(b"x")
                assert it.recv(1) == b"x"
                subprocess.run(["conntrack", "-F"], check=True, capture_output=True, stdin=subprocess.DEVNULL)
                wait_until_released(proxy, base, 8)

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
            held = []
            for _ in range(5000):
                it = socket.create_connection(("127.0.0.1", 8080), timeout=10)
                it.sendall(b"first")
                held.append(it)
            good = sum(receive(it, 5) == b"first" for it in held)
            used = memory(pid)
            for it in held:
                it.sendall(b"again")
            good += sum(receive(it, 5) == b"again" for it in held)
            return good, used

        good, used = netns.call(many, timeout=90)
        assert good == 10_000
        print(f"5,000 connections: {(used - before) / MB:.1f} MB")
        assert used - before < 24 * MB
        wait_until_released(proxy, base, 20)

    def test_too_few_descriptors(self, netns: Namespace, run: Run) -> None:
        """No more connections are accepted than there are descriptors for; the others wait, and are served when there is room."""
        server(netns, "echo")
        proxy = run(nofile=64 + 2 * 10)
        assert "enough for 10 connections" in proxy.said()

        def more() -> list[int]:
            held = [socket.create_connection(("127.0.0.1", 8080), timeout=10) for _ in range(30)]
            for it in held:
                it.sendall(b"x")
            groups = []
            while held:
                assert held[0].recv(1) == b"x"
                # The kernel accepts in the order of the backlog: what is answered now stands in front.
                time.sleep(0.2)
                answered = select.select(held, [], [], 0)[0]
                groups.append(1 + len(answered))
                assert [held[0], *answered] == held[: 1 + len(answered)]
                for it in held[: 1 + len(answered)]:
                    it.close()
                del held[: 1 + len(answered)]
            return groups

        assert netns.call(more) == [10, 10, 10]
        proxy.wait_count("connections", 30)

    @pytest.mark.parametrize("word", [b"stop\n", b"drain\n"])
    def test_several_processes_on_the_same_listeners(self, netns: Namespace, run: Run, word: bytes) -> None:
        server(netns, "echo")
        proxy = run(configuration(proxy='elements = ["stream-log"]\nprocesses = 3\nbuffer = 8192\ndrain = "2s"'))

        def several() -> list[bytes]:
            held = [socket.create_connection(("127.0.0.1", 8080), timeout=10) for _ in range(200)]
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
        proxy = run(configuration(proxy='drain = "10s"'))
        control, theirs = socket.socketpair()

        def last_words() -> bytes:
            it = socket.create_connection(("127.0.0.1", 8080), timeout=10)
            it.sendall(b"before")
            assert receive(it, 6) == b"before"
            theirs.send(b"running")
            time.sleep(0.3)
            it.sendall(b"after")
            return receive(it, 5)

        began = time.monotonic()
        client = Meanwhile(netns, last_words)
        assert control.recv(10) == b"running"
        proxy.rules_parked()
        proxy.tell(b"drain\n")
        assert client.result() == b"after"
        assert proxy.reap() == [0]
        assert time.monotonic() - began < 5
        for each in (control, theirs):
            each.close()

    def test_drain_ends_at_its_deadline(self, netns: Namespace, run: Run) -> None:
        server(netns, "echo")
        proxy = run(configuration(proxy='drain = "300ms"'))

        def stay() -> str:
            it = socket.create_connection(("127.0.0.1", 8080), timeout=10)
            it.sendall(b"x")
            assert it.recv(1) == b"x"
            proxy.tell(b"drain\n")
            try:
                return it.recv(1).decode() or "end"
            except ConnectionResetError:
                return "reset"

        assert netns.call(stay) == "reset"
        assert proxy.reap() == [0]

    def test_drain_takes_who_waits_in_the_backlog(self, netns: Namespace, run: Run) -> None:
        """More connections wait than one turn accepts: those that are left when the order comes are accepted too."""
        server(netns, "echo")
        proxy = run(configuration(proxy='drain = "5s"'))
        count = 3 * ACCEPTS + 1

        def waiting() -> int:
            os.kill(proxy.pids[0], signal.SIGSTOP)
            held = [socket.create_connection(("127.0.0.1", 8080), timeout=10) for _ in range(count)]
            for it in held:
                it.sendall(b"x")
            proxy.tell(b"drain\n")
            os.kill(proxy.pids[0], signal.SIGCONT)
            return sum(it.recv(1) == b"x" for it in held)

        assert netns.call(waiting) == count
        assert proxy.reap() == [0]

    def test_rules_out_and_drain_under_load_lose_nothing(self, netns: Namespace, run: Run) -> None:
        server(netns, "echo")
        proxy = run(configuration(proxy='drain = "5s"'))
        client = Meanwhile(netns, load, 2.0)
        proxy.wait_above("connections", 50)
        proxy.rules_parked()
        # A handshake that was redirected meanwhile gets the moment that it needs.
        time.sleep(0.05)
        proxy.tell(b"drain\n")
        began = time.monotonic()
        assert proxy.reap() == [0]
        assert time.monotonic() - began < 3, "it waited for its deadline with nothing left to wait for"
        proxy.rules_out()
        for listener in proxy.listeners:
            listener.close()
        good, bad = client.result()
        assert bad == []
        assert good > proxy.counters.snapshot()["connections"]
        assert "NFQA" not in netns.shell("iptables-legacy-save; ip6tables-legacy-save")

    def test_a_successor_takes_over_under_load_and_nothing_is_lost(self, netns: Namespace, run: Run) -> None:
        server(netns, "echo")
        proxy = run(configuration(proxy='drain = "5s"'))

        def long() -> bytes:
            with socket.create_connection(("127.0.0.1", 8080), timeout=10) as it:
                for _ in range(20):
                    it.sendall(b"x" * 1000)
                    assert receive(it, 1000) == b"x" * 1000
                    time.sleep(0.05)
                return b"whole"

        clients = [Meanwhile(netns, load, 1.5), Meanwhile(netns, load, 1.5), Meanwhile(netns, long)]
        proxy.wait_above("connections", 50)
        assert proxy.succeed() == [0]
        assert proxy.succeed() == [0]
        *short, whole = (client.result() for client in clients)
        assert whole == b"whole"
        assert [bad for _, bad in short] == [[], []]

    @pytest.mark.parametrize("how", ["stop", "EOF"])
    def test_the_end_is_at_once_and_honest(self, netns: Namespace, run: Run, how: str) -> None:
        server(netns, "source")
        proxy = run()

        def cut() -> str:
            it = socket.create_connection(("127.0.0.1", 8080), timeout=10)
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

        # Not an end: nobody may take a part for the whole.
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
        (before,) = switches.findall(status.read_text())
        time.sleep(2)
        (after,) = switches.findall(status.read_text())
        # It wakes twice a second, so that it can be told from one that hangs.
        assert int(after) - int(before) <= 5
