"""Namespaces as containers of a host: each behind a veth pair, on a bridge or routed, as container engines set them up."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from agent import until
from namespace import Namespace

# Serves HTTP on 8080 and 9090: 200 and a body of BYTES (the argument), whatever is asked for.
SERVER = """
import http.server, sys, threading
body = b"0123456789abcdef" * (int(sys.argv[1]) // 16)
class Responder(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass
class Server(http.server.ThreadingHTTPServer):
    address_family = 10
    request_queue_size = 1024
servers = [Server(("::", port), Responder) for port in (8080, 9090)]
print("ready", flush=True)
threads = [threading.Thread(target=server.serve_forever) for server in servers]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""


class Container(Namespace):
    """A namespace with `eth0`, whose other end `veth` is in the host."""

    def __init__(self, host: Namespace, number: int) -> None:
        super().__init__()
        self.number = number
        self.veth = f"veth{number}"
        host.contains.append(self)
        host.run("ip", "link", "add", self.veth, "type", "veth", "peer", "name", "eth0", "netns", str(self.pid))

    def serve(self, size: int = 1600) -> subprocess.Popen[Any]:
        """Start the HTTP server on 8080 and 9090."""
        server = self.start(sys.executable, "-c", SERVER, str(size), stdout=subprocess.PIPE)
        assert server.stdout is not None
        assert server.stdout.readline() == b"ready\n"
        return server

    def get(self, address: str, name: str = "free.test", port: int = 8080, seconds: float = 30) -> str:
        """The status code of a request to `address` for `name`; 000 if there was no answer."""
        where = f"[{address}]" if ":" in address else address
        return self.run(
            "curl", "-s", "-o", "/dev/null", "-m", str(seconds), "-w", "%{http_code}", "-H", f"Host: {name}",
            f"http://{where}:{port}/", check=False,
        ).stdout  # fmt: skip


def bridged(host: Namespace, count: int = 2, mtu: int = 1500) -> list[Container]:
    """Containers on a bridge without an address: 10.5.0.N and fd05::N."""
    host.run("ip", "link", "add", "br0", "type", "bridge", "forward_delay", "0")
    host.run("ip", "link", "set", "br0", "mtu", str(mtu), "up")
    containers = [Container(host, number) for number in range(1, count + 1)]
    for each in containers:
        host.run("ip", "link", "set", each.veth, "mtu", str(mtu), "master", "br0", "up")
        each.run("ip", "address", "add", f"10.5.0.{each.number}/24", "dev", "eth0")
        each.run("ip", "address", "add", f"fd05::{each.number}/64", "dev", "eth0", "nodad")
        each.run("ip", "link", "set", "eth0", "mtu", str(mtu), "up")
    until(lambda: "state UP" in host.run("ip", "-o", "link", "show", containers[-1].veth).stdout, "the last port is up")
    return containers


def routed(host: Namespace, count: int = 2) -> list[Container]:
    """Containers that the host routes between: 10.6.N.2 and fd06:N::2, the host's end is .1 and ::1."""
    host.shell("echo 1 >/proc/sys/net/ipv4/ip_forward; echo 1 >/proc/sys/net/ipv6/conf/all/forwarding")
    containers = [Container(host, number) for number in range(1, count + 1)]
    for each in containers:
        number = each.number
        host.run("ip", "address", "add", f"10.6.{number}.1/24", "dev", each.veth)
        host.run("ip", "address", "add", f"fd06:{number}::1/64", "dev", each.veth, "nodad")
        host.run("ip", "link", "set", each.veth, "up")
        each.run("ip", "address", "add", f"10.6.{number}.2/24", "dev", "eth0")
        each.run("ip", "address", "add", f"fd06:{number}::2/64", "dev", "eth0", "nodad")
        each.run("ip", "link", "set", "eth0", "up")
        each.run("ip", "route", "add", "default", "via", f"10.6.{number}.1")
        each.run("ip", "route", "add", "default", "via", f"fd06:{number}::1")
    return containers


def traces(host: Namespace) -> str:
    """All that a capture could leave behind in the host: rules, qdiscs, filters, devices."""
    script = """
        iptables-legacy-save | sed /^#/d; ip6tables-legacy-save | sed /^#/d; tc qdisc show
        for name in $(ip -o link show | sed 's/^[0-9]*: \\([^:@]*\\).*/\\1/'); do
            echo $name
            tc filter show dev $name ingress 2>&1 || true; tc filter show dev $name egress 2>&1 || true
        done"""
    return host.shell(script)


def interfaces(host: Namespace) -> list[str]:
    """The names of the host's interfaces. Not from /sys: that is the machine's."""
    return [line.split()[1].rstrip(":").partition("@")[0] for line in host.run("ip", "-o", "link").stdout.splitlines()]


def packet_sockets(host: Namespace) -> int:
    """How many packet sockets there are in the host."""
    return len(host.run("cat", "/proc/net/packet").stdout.splitlines()) - 1
