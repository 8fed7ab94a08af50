"""Where the proxy sends a connection: the original destination, and never to itself."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from namespace import Namespace
from proxied import UID, configuration
from proxy_process import Run
from tcp_client import ask, how_it_ends, receive, server

pytestmark = pytest.mark.kernel


HERE = Path(__file__).parent.parent


class TestDestination:
    def test_ipv4(self, netns: Namespace, run: Run) -> None:
        netns.run("ip", "address", "add", "192.0.2.1/24", "dev", "lo")
        server(netns, "echo", "192.0.2.1")
        proxy = run(configuration(proxy='elements = ["stream-log"]'))
        assert netns.call(ask, "192.0.2.1", 8080) == b"hello"
        closed = proxy.wait_for("ended")
        assert (closed["dst"], closed["dport"]) == ("192.0.2.1", 8080)
        assert closed["bytes_forward"] == closed["bytes_reverse"] == 5
        assert closed["connection"] == proxy.wait_for("-> 192.0.2.1:8080")["connection"]

    def test_ipv6(self, netns: Namespace, run: Run) -> None:
        netns.run("ip", "-6", "address", "add", "fd00:7::1/64", "dev", "lo", "nodad")
        server(netns, "echo", "fd00:7::1")
        proxy = run(configuration(proxy='elements = ["stream-log"]'))
        assert netns.call(ask, "fd00:7::1", 8080) == b"hello"
        assert proxy.wait_for("ended").items() >= {"dst": "fd00:7::1", "dport": 8080}.items()

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
                it.settimeout(60)
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
        assert (closed["src"], closed["dst"], closed["dport"]) == ("127.0.0.1", "127.0.0.1", 8080)

    def test_prerouting_keeps_to_the_address_that_was_meant(self, pair: tuple[Namespace, Namespace], run: Run) -> None:
        client, host = pair
        server(host, "who", "10.203.0.2")
        proxy = run(configuration(hooks='"prerouting"', proxy='elements = ["stream-log"]'), host)
        # Carried by the proxy: the server sees the host itself.
        assert client.call(ask, "10.203.0.2", 8080, b"").startswith(b"10.203.0.2 ")
        assert proxy.wait_for("ended")["src"] == "10.203.0.1"

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
        """8085 is within the ports of the rule, and another proxy's listener: no connection is redirected in a loop."""
        proxy = run(configuration(rest='[proxy.other]\nlisten = ["0.0.0.0:8085"]\n'))
        assert netns.call(how_it_ends, "127.0.0.1", 8085) == "ECONNREFUSED"
        assert netns.call(how_it_ends, "127.0.0.1", 8086) == "ECONNRESET"
        assert proxy.wait_for("cannot connect").items() >= {"dst": "127.0.0.1", "dport": 8086}.items()

    @pytest.mark.parametrize("target", ["", "127.0.0.1:9000"])
    def test_a_destination_that_is_not_known(self, netns: Namespace, run: Run, target: str) -> None:
        """Without an entry in the connection table the kernel cannot tell: the target takes it, or it is refused."""
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
        assert "a rule redirects the proxy's own connections to it" in proxy.wait_for("refused")["message"]
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
        assert "cannot connect" in proxy.wait_for("192.0.2.77")["message"]

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
        assert "cannot be resolved" in proxy.said()
        assert netns.call(how_it_ends, "127.0.0.1", 15002) == "ECONNRESET"
        netns.shell("echo 127.0.0.1 later.test >> /etc/hosts")
        proxy.wait_for("is resolved: 127.0.0.1:9000")
        assert netns.call(ask, "127.0.0.1", 15002) == b"hello"

    def test_a_target_that_is_a_listener_of_ours(self, netns: Namespace, run: Run) -> None:
        proxy = run(configuration(proxy='target = "127.0.0.1:15002"'))
        assert "listener of this agent" in proxy.said()
        assert netns.call(how_it_ends, "127.0.0.1", 15002) == "ECONNRESET"

    def test_the_known_destination_comes_first(self, netns: Namespace, run: Run) -> None:
        server(netns, "echo")
        run(configuration(proxy='target = "127.0.0.1:9000"'))
        assert netns.call(ask, "127.0.0.1", 8080) == b"hello"
