"""Flows of each kind on a router with an agent: forwarded, its own, at its interfaces, through its proxy."""

from __future__ import annotations

import sys
from subprocess import DEVNULL

from agent import until
from captures import listening
from namespace import Namespace

# On the router: what is forwarded, what it sends and gets itself, and what its interfaces see.
CONFIG = """
[element.allow]
type = "policy"
default = "drop"
[[element.allow.rule]]
action = "accept"
when = "http_host ~ *.free.test or dport = 7000"
[[element.allow.rule]]
action = "reject"
name = "refuse"
http_host = "*.refused.test"
[[element.allow.rule]]
action = "accept"
protocol = ["icmp", "icmpv6"]
[element.ports]
type = "policy"
default = "drop"
rule = [{ action = "accept", dport = 7000 }]
[element.broken]
type = "broken_element:Broken"

[queue.forward]
num = 7
elements = ["dpi", "allow", "record"]
[rules.forward]
queue = "forward"
hooks = ["forward"]
all = true

[queue.plain]
num = 8
elements = ["ports"]
[rules.plain]
queue = "plain"
hooks = ["output"]
udp_ports = [7000, 7001]
role = "client"

[queue.failed]
num = 9
elements = ["broken", "log"]
on_error = "drop"
[rules.failed]
queue = "failed"
hooks = ["output"]
udp_ports = [7002]
role = "client"

[queue.input]
num = 10
mode = "monitor"
elements = ["ports"]
default = "drop"
[rules.input]
queue = "input"
hooks = ["input"]
udp_ports = [7001]
role = "server"

[queue.first]
num = 11
elements = ["syn-monitor", "log"]
[rules.first]
queue = "first"
table = "raw"
hooks = ["prerouting"]
tcp_syn = true

[queue.last]
num = 12
elements = ["ports", "record"]
[rules.last]
queue = "last"
hooks = ["postrouting"]
udp_ports = [7003]

[tap.web]
interfaces = ["eth1"]
tcp_ports = [8080]
elements = ["dpi", "allow", "record"]

[inline.web]
interfaces = ["eth2"]
tcp_ports = [8080]
elements = ["dpi", "allow", "record"]

[proxy.web]
listen = ["127.0.0.1:15002"]
elements = ["stream-log"]
[rules.web]
proxy = "web"
hooks = ["output"]
tcp_ports = [8081]
"""
BROKEN = """
from nfq_agent.element import PacketElement


class Broken(PacketElement):
    def decide(self, packet, flow):
        raise ValueError("broken")
"""
# Requests on one connection: ADDRESS PORT END HOST...; END is how it ends.
CLIENT = """
import socket, struct, sys, time
address, port, end, *hosts = sys.argv[1:]
one = socket.create_connection((address, int(port)), 60)
try:
    for host in hosts:
        one.settimeout(60 if "free" in host else 1)
        one.sendall(b"GET / HTTP/1.1\\r\\nHost: " + host.encode() + b"\\r\\n\\r\\n")
        while not one.recv(65536).endswith(b"!"):
            pass
except OSError:
    pass
if end == "reset":
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
if end == "silent":
    # The socket goes without a packet (TCP_REPAIR), and the next connection has its ports.
    one.setsockopt(socket.IPPROTO_TCP, 19, 1)
    name = one.getsockname()
    one.close()
    one = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    one.bind(name)
    one.settimeout(2)
    try:
        one.connect((address, int(port)))
    except OSError:
        pass
one.close()
"""
SERVER = """
import http.server, socket
class Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "1")
        self.end_headers()
        self.wfile.write(b"!")
    def log_message(self, *_):
        pass
class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6
Server(("::", 8080), Answer).serve_forever()
"""
DATAGRAMS = """
import socket, sys
address, size, *ports = sys.argv[1:]
one = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
for port in ports:
    try:
        one.sendto(b"x" * int(size), (address, int(port)))
    except OSError:
        pass
"""
PEERS = {"inet": "10.2.0.2", "inet6": "fd02::2"}


def send_all(client: Namespace, router: Namespace) -> None:
    for address in PEERS.values():
        for end, *hosts in (
            ("closed", "a.free.test", "b.free.test"),
            ("closed", "a.free.test", "bad.test"),
            ("reset", "a.free.test"),
            ("silent", "a.free.test"),
            ("closed", "c.refused.test"),
            ("closed", "bad.test"),
        ):
            client.run(sys.executable, "-c", CLIENT, address, "8080", end, *hosts)
        for size in (10, 4000):
            client.run(sys.executable, "-c", DATAGRAMS, address, str(size), "7000", "7005")
        client.run("ping", "-c", "1", "-W", "1", address, check=False)
        router.run(sys.executable, "-c", DATAGRAMS, address, "10", "7000", "7001", "7002", "7003")
    for address in ("10.1.0.1", "fd01::1"):
        client.run(sys.executable, "-c", DATAGRAMS, address, "10", "7001")
    router.run(sys.executable, "-c", CLIENT, "10.2.0.2", "8081", "closed", "a.free.test", check=False)


def serve(server: Namespace) -> None:
    """Answer requests on port 8080."""
    server.start(sys.executable, "-c", SERVER, stdout=DEVNULL, stderr=DEVNULL)
    until(lambda: listening(server, 8080), "the server listens")
