"""Real clients and servers through the proxy, and each built-in element with one of them."""

from __future__ import annotations

import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tcp_server
from agent import until
from namespace import Namespace
from proxied import TPROXY, UID, Proxied, configuration
from tcp_client import Meanwhile, ask, how_it_ends, receive, server

pytestmark = pytest.mark.kernel
Run = Callable[..., Proxied]
CURL = ("curl", "-sS", "--max-time", "90", "--noproxy", "*")


def wait_for_port(netns: Namespace, port: int) -> None:
    """Until a process listens there. Connecting would not show it: the proxy accepts every connection."""
    until(lambda: netns.shell(f"ss -ltnH sport = :{port}"), f"a process listens on port {port}")


@pytest.fixture
def site(netns: Namespace, tmp_path: Path) -> Path:
    """HTTP/1.1 on 8080, HTTP/2 in clear text on 8081, with TLS on 8083; all serve one folder."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "large").write_bytes(tcp_server.BLOCK * 20)
    (folder / "small").write_text("as small as that\n")
    netns.run(
        "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=name.example.org",
        "-keyout", str(tmp_path / "key.pem"), "-out", str(tmp_path / "cert.pem"),
    )  # fmt: skip
    plain = {"stdout": -3, "stderr": -3}
    netns.start(sys.executable, "-m", "http.server", "--protocol", "HTTP/1.1", "-d", str(folder), "8080", **plain)
    netns.start("nghttpd", "--no-tls", "-d", str(folder), "8081", **plain)
    netns.start("nghttpd", "-d", str(folder), "8083", str(tmp_path / "key.pem"), str(tmp_path / "cert.pem"), **plain)
    for port in (8080, 8081, 8083):
        wait_for_port(netns, port)
    return folder


@pytest.fixture(params=["past", "through"])
def carried(request: pytest.FixtureRequest, run: Run) -> Iterator[Proxied]:
    """A proxy that carries bytes past its elements, and one that carries them through one."""
    if request.param == "past":
        yield run()
    else:
        rest = '[element.replace]\nfind = "nothing like it: 7d1f"\nwith = ""\n'
        yield run(configuration(proxy='elements = ["replace"]', rest=rest))


class TestClients:
    @pytest.mark.parametrize(
        ("url", "version"),
        [
            (("--http1.1", "http://127.0.0.1:8080/"), "1.1"),
            (("--http2-prior-knowledge", "http://127.0.0.1:8081/"), "2"),
            (("--http2", "-k", "https://127.0.0.1:8083/"), "2"),
        ],
        ids=["http1", "http2", "http2-tls"],
    )
    def test_curl(
        self, netns: Namespace, site: Path, carried: Proxied, tmp_path: Path, url: tuple[str, ...], version: str
    ) -> None:
        *options, base = url
        fetched = [tmp_path / name for name in ("large", "small")]
        calls = [["-o", str(path), base + path.name] for path in fetched]
        # Both on one connection; curl 7.88 cannot do that with prior knowledge of HTTP/2.
        runs = calls if "--http2-prior-knowledge" in options else [[*calls[0], *calls[1]]]
        for arguments in runs:
            done = netns.run(*CURL, *options, "-w", "%{http_version} %{http_code}\n", *arguments)
            assert done.stdout == f"{version} 200\n" * (3 - len(runs))
        for path in fetched:
            assert path.read_bytes() == (site / path.name).read_bytes()
        carried.wait_count("connections", len(runs))

    def test_redis(self, netns: Namespace, carried: Proxied) -> None:
        netns.start(
            "bash", "-c", "exec -a redis-server redis-check-rdb --port 8086 --bind 127.0.0.1 --save '' --dir /run",
            stdout=-3, stderr=-3,
        )  # fmt: skip
        wait_for_port(netns, 8086)
        lines = "".join(f"SET key{n} {'v' * n}\nSTRLEN key{n}\n" for n in range(1, 500))
        answer = netns.run("redis-cli", "-h", "127.0.0.1", "-p", "8086", input=lines).stdout.split()
        assert answer == [word for n in range(1, 500) for word in ("OK", str(n))]
        bench = netns.run("redis-benchmark", "-p", "8086", "-n", "5000", "-c", "20", "-P", "8", "-t", "set,get", "-q").stdout
        assert len(re.findall(r"requests per second", bench)) == 2


class TestElements:
    def test_stream_log(self, netns: Namespace, run: Run, site: Path) -> None:
        proxy = run(configuration(proxy='elements = ["stream-log"]'))
        netns.run(*CURL, "http://127.0.0.1:8080/small")
        line = proxy.wait_for("ended")
        assert line["bytes_reverse"] > len("as small as that\n")
        assert 0 <= line["seconds"] < 90
        assert re.fullmatch(r"[0-9a-f]{8}-1", line["connection"])

    def test_replace(self, netns: Namespace, run: Run, site: Path) -> None:
        rest = '[element.swap]\ntype = "replace"\nregex = "sm(a)ll"\nwith = "l\\\\1rge"\nway = "response"\n'
        run(configuration(proxy='chunk = 7\nelements = ["swap"]', rest=rest))
        assert netns.run(*CURL, "http://127.0.0.1:8080/small").stdout == "as large as that\n"

    def test_replace_does_not_hold_up_a_conversation(self, netns: Namespace, run: Run) -> None:
        """Each line ends as what is looked for begins; its last byte must come without another behind it."""
        server(netns, "echo")
        rest = '[element.replace]\nfind = "!!"\nwith = "?"\nwait = "10ms"\n'
        run(configuration(proxy='elements = ["replace"]', rest=rest))

        def talk() -> None:
            with socket.create_connection(("127.0.0.1", 8080), timeout=60) as it:
                for _ in range(5):
                    it.sendall(b"hey!")
                    assert receive(it, 4) == b"hey!"

        netns.call(talk)

    def test_limit(self, netns: Namespace, run: Run, site: Path) -> None:
        rest = '[element.slow]\ntype = "limit"\nbytes_per_second = 20_000_000\nway = "response"\n'
        run(configuration(proxy='chunk = 65536\nelements = ["slow"]', rest=rest))
        began = time.monotonic()
        netns.run(*CURL, "-o", "/dev/null", "http://127.0.0.1:8080/large")
        # 20 MB at 20 MB/s; what comes before and after takes its time too.
        assert time.monotonic() - began >= 1.0

    def test_delay(self, netns: Namespace, run: Run) -> None:
        server(netns, "echo")
        rest = '[element.delay]\nby = "100ms"\n'
        run(configuration(proxy='elements = ["delay"]', rest=rest))
        began = time.monotonic()
        assert netns.call(ask, "127.0.0.1", 8080) == b"hello"
        assert time.monotonic() - began >= 0.2

    @pytest.mark.parametrize(
        ("element", "whole", "end"),
        [("timeout", 0, "reset"), ("slow-close", 2500, "end"), ("limit-bytes", 1000, "reset"), ("slicer", 2500, "end")],
    )
    def test_faults_on_purpose(self, netns: Namespace, run: Run, element: str, whole: int, end: str) -> None:
        """What a client sees of each: a reset in time, a late end, so many bytes, one small piece after the other."""
        server(netns, "echo")
        rest = """[element.timeout]
after = "300ms"
[element.slow-close]
by = "300ms"
way = "response"
[element.limit-bytes]
bytes = 1000
way = "response"
[element.slicer]
size = 10
way = "response"
"""

        def see(send: bytes) -> tuple[bytes, str, float]:
            began = time.monotonic()
            got, how = b"", "end"
            with socket.create_connection(("127.0.0.1", 8080), timeout=60) as it:
                it.sendall(send)
                it.shutdown(socket.SHUT_WR)
                try:
                    while piece := it.recv(1 << 16):
                        got += piece
                except ConnectionResetError:
                    how = "reset"
            return got, how, time.monotonic() - began

        data = bytes(range(250)) * 10
        run(configuration(proxy=f'elements = ["{element}"]', rest=rest))
        got, how, seconds = netns.call(see, data)
        assert (got, how) == (data[:whole], end)
        if element in ("timeout", "slow-close"):
            assert seconds >= 0.3
        if element == "slicer":
            # 250 pieces, a millisecond between two. How many of them a reader sees apart is up to how soon it reads.
            assert seconds >= 0.249

    def test_http_host(self, netns: Namespace, run: Run, site: Path) -> None:
        rest = '[element.http-host]\nallow = ["*.example.org"]\n'
        proxy = run(configuration(proxy='elements = ["http-host"]', rest=rest))
        there = ("--resolve", "name.example.org:8080:127.0.0.1", "--resolve", "name.example.com:8080:127.0.0.1")
        good = netns.run(*CURL, *there, "http://name.example.org:8080/small")
        assert good.stdout == "as small as that\n"
        bad = netns.run(*CURL, *there, "http://name.example.com:8080/small", check=False)
        assert bad.returncode != 0
        assert bad.stdout == ""
        assert proxy.wait_for("deny")["http_host"] == "name.example.com"

    def test_sni(self, netns: Namespace, run: Run, site: Path) -> None:
        rest = '[element.sni]\ndeny = ["name.example.com"]\n'
        proxy = run(configuration(proxy='elements = ["sni"]', rest=rest))
        there = ("-k", "--resolve", "name.example.org:8083:127.0.0.1", "--resolve", "name.example.com:8083:127.0.0.1")
        good = netns.run(*CURL, *there, "https://name.example.org:8083/small")
        assert good.stdout == "as small as that\n"
        bad = netns.run(*CURL, *there, "https://name.example.com:8083/small", check=False)
        assert bad.returncode == 35
        assert proxy.wait_for("deny")["tls_sni"] == "name.example.com"

    def test_tap(self, netns: Namespace, run: Run, site: Path) -> None:
        # In the namespace's /run: the proxy's user may write nowhere else.
        netns.shell(f"install -d -m 700 -o {UID} /run/tap")
        rest = '[element.tap]\nfolder = "/run/tap"\nmax_bytes = 0\n'
        proxy = run(configuration(proxy='elements = ["tap", "stream-log"]', rest=rest))
        netns.run(*CURL, "-o", "/dev/null", "http://127.0.0.1:8080/large")
        proxy.wait_for("ended")

        def read() -> tuple[bytes, bool, bytes]:
            (request,) = Path("/run/tap").glob("*.request")
            (response,) = Path("/run/tap").glob("*.response")
            return request.read_bytes(), response.read_bytes().endswith(tcp_server.BLOCK * 20), response.name.encode()

        request, whole, name = netns.call(read)
        assert request.startswith(b"GET /large HTTP/1.1\r\n")
        assert whole
        assert name.decode() == f"{proxy.wait_for('ended')['connection']}.response"

    def test_a_tap_that_can_not_write_does_not_start(self, netns: Namespace, run: Run, capfd: pytest.CaptureFixture[str]) -> None:
        rest = '[element.tap]\nfolder = "/root/none"\n'
        with pytest.raises(AssertionError, match="did not start"):
            run(configuration(proxy='elements = ["tap"]', rest=rest))
        assert "/root/none is not a folder" in capfd.readouterr().err


class TestTproxy:
    @pytest.mark.parametrize(("host", "router"), [("10.2.0.2", "10.2.0.1"), ("fd02::2", "fd02::1")], ids=["v4", "v6"])
    @pytest.mark.parametrize("keep", [True, False])
    def test_captured(self, routed: tuple[Namespace, Namespace, Namespace], run: Run, host: str, router: str, keep: bool) -> None:
        client, gateway, target = routed
        server(target, "who", host)
        proxy = run(
            configuration(proxy=f'{TPROXY}keep_client = {str(keep).lower()}\nelements = ["stream-log"]', hooks='"prerouting"'),
            gateway,
        )
        seen = client.call(ask, host, 8080, b"").decode().split()
        line = proxy.wait_for("ended")
        ours = "10.1.0.2" if "." in host else "fd01::2"
        # Who the server thinks it spoke with: the client, with its own port, or the gateway.
        assert seen[0] == (ours if keep else router)
        assert line["src"] == ours
        assert (line["sport"] == int(seen[1])) is keep
        assert line["dport"] == 8080

    @pytest.mark.parametrize("keep", [True, False])
    @pytest.mark.parametrize("host", ["10.1.0.1", "fd01::1"], ids=["v4", "v6"])
    def test_the_hosts_own_address_is_no_loop(
        self, routed: tuple[Namespace, Namespace, Namespace], run: Run, host: str, keep: bool
    ) -> None:
        """What the proxy sends to an address of this host comes back over lo, where the TPROXY rules apply too."""
        client, gateway, _ = routed
        server(gateway, "echo", host)
        proxy = run(configuration(proxy=f"{TPROXY}keep_client = {str(keep).lower()}", hooks='"prerouting"'), gateway)
        for _ in range(2):
            assert client.call(ask, host, 8080) == b"hello"
        proxy.wait_count("connections", 2)

    def test_its_listener_is_not_called_by_name(self, routed: tuple[Namespace, Namespace, Namespace], run: Run) -> None:
        client, gateway, _ = routed
        proxy = run(configuration(proxy=TPROXY, hooks='"prerouting"'), gateway)
        assert client.call(how_it_ends, "10.1.0.1", 15002) == "ECONNRESET"
        proxy.wait_for("our own listener")

    def test_drained_and_nothing_left(self, routed: tuple[Namespace, Namespace, Namespace], run: Run) -> None:
        client, gateway, target = routed
        foreign = gateway.shell(
            "ip rule add fwmark 7 lookup 77; ip route add 192.0.2.0/24 dev eth1 table 77; ip rule; ip -6 rule"
        )
        server(target, "echo", "10.2.0.2")
        proxy = run(configuration(proxy=f'{TPROXY}keep_client = true\ndrain = "5s"', hooks='"prerouting"'), gateway)
        assert "15002:" in gateway.shell("ip rule")

        control, theirs = socket.socketpair()

        def talk() -> bytes:
            with socket.create_connection(("10.2.0.2", 8080), timeout=60) as it:
                it.sendall(b"before")
                assert receive(it, 6) == b"before"
                theirs.send(b"running")
                assert theirs.recv(10) == b"parked"
                it.sendall(b"after")
                return receive(it, 5)

        running = Meanwhile(client, talk)
        assert control.recv(10) == b"running"
        proxy.rules_parked()
        proxy.tell(b"drain\n")
        control.send(b"parked")
        assert running.result() == b"after"
        assert proxy.reap() == [0]
        control.close()
        theirs.close()
        proxy.rules_out()
        assert gateway.shell("ip rule; ip -6 rule") == foreign
        assert "proto 221" not in gateway.shell("ip route show table all; ip -6 route show table all")
        assert "NFQA" not in gateway.shell("iptables-legacy-save; ip6tables-legacy-save")

    def test_excluded_networks(self, netns: Namespace, run: Run) -> None:
        netns.shell("ip address add 192.0.2.1/24 dev lo; ip address add 198.51.100.1/24 dev lo")
        netns.run("ip", "-6", "address", "add", "fd00:7::1/64", "dev", "lo", "nodad")
        server(netns, "echo")
        server(netns, "echo", "fd00:7::1", 8081)
        proxy = run(configuration(proxy='exclude = ["192.0.2.0/24", "fd00:7::/64"]'))
        for host, port, connections in (("192.0.2.1", 8080, 0), ("fd00:7::1", 8081, 0), ("198.51.100.1", 8080, 1)):
            assert netns.call(ask, host, port) == b"hello"
            proxy.wait_count("connections", connections)
