"""Where evasions are tried: an attacker's host with the agent on it, and a host of servers that write down what they saw.

All lines of the table are tried at the same time, in one process for each kind of attacker, so that what waits for an
answer that never comes costs its time only once.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from agent import Agent
from captures import certificate, listening, wait_until
from evasion_servers import PLAIN, PYTHON, QUIC, TLS
from namespace import UNPRIVILEGED, Namespace, join

NGINX, DNS = 8000, 53
ADDRESSES = {4: "10.203.0.1", 6: "fd00:203::1"}
# A hop limit with which a packet does not reach the servers: their host drops it, as a router on the way would.
FAR = 2

_NGINX = """
daemon off; master_process off; user root; pid /run/nginx.pid; error_log FOLDER/nginx-error.log;
events { worker_connections 512; }
http {
  log_format seen 'nginx $host $request_uri'; access_log FOLDER/nginx.log seen;
  keepalive_timeout 20s; large_client_header_buffers 4 32k; client_body_temp_path /run/nginx-body;
  server { listen [::]:8000 ipv6only=off backlog=512; location / { return 200 "ok\\n"; } }
}
"""

_CONFIG = """
[queue.egress]
num = 120
elements = ["dpi", "names"]

[element.names]
type = "policy"
default = "{default}"
undecided = "accept"
rule = [
  {{ action = "{action}", tls_sni = ["{names}"] }},
  {{ action = "{action}", http_host = ["{names}"] }},
  {{ action = "{action}", dns_name = ["{names}"] }},
]

[rules.egress]
queue = "egress"
hooks = ["output"]
tcp_ports = [{tcp}]
udp_ports = [{udp}]
role = "client"
"""


@dataclass(frozen=True)
class Policy:
    """kind: "allow-list", "block-list", or "none" for no agent at all. action: what happens to a denied name."""

    kind: str
    action: str = "drop"

    def __str__(self) -> str:
        return self.kind if self.kind == "none" else f"{self.kind}-{self.action}"

    def config(self, more_ports: Sequence[int] = ()) -> str:
        """The agent's configuration."""
        allow = self.kind == "allow-list"
        tcp = ", ".join(map(str, (DNS, TLS, PLAIN, NGINX, PYTHON, *more_ports)))
        return _CONFIG.format(
            default=self.action if allow else "accept", action="accept" if allow else self.action,
            # The second is what some lines show us while the server reads `refused`.
            names='*.allowed.test", "*.refuused.test' if allow else "*.refused.test", tcp=tcp, udp=f"{DNS}, {QUIC}",
        )  # fmt: skip


@dataclass(frozen=True)
class Attempt:
    """One try. name: unlike that of any other try. family: 4 or 6. allowed, denied: names of equal length."""

    name: str
    family: int

    @property
    def address(self) -> str:
        """The servers'."""
        return ADDRESSES[self.family]

    @property
    def allowed(self) -> str:
        """A name that the policy lets pass."""
        return f"{self.name}.allowed.test"

    @property
    def denied(self) -> str:
        """A name that it does not."""
        return f"{self.name}.refused.test"

    def tcp(self, port: int) -> socket.socket:
        """A connection that sends each write as a segment of its own."""
        connection = socket.create_connection((self.address, port), timeout=2)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def udp(self, port: int) -> socket.socket:
        """A connected datagram socket."""
        kind = socket.AF_INET if self.family == 4 else socket.AF_INET6
        client = socket.socket(kind, socket.SOCK_DGRAM)
        client.connect((self.address, port))
        client.settimeout(1)
        return client

    def say(self, port: int, *segments: bytes, pause: float = 0.05, linger: float = 0.5) -> None:
        """One connection: segments with a pause after each; what comes back is read and thrown away."""
        with self.tcp(port) as connection:
            for segment in segments:
                connection.sendall(segment)
                time.sleep(pause)
            self.drain(connection, linger)

    @staticmethod
    def drain(connection: socket.socket, seconds: float = 0.5) -> bytes:
        """What comes within a time."""
        connection.settimeout(seconds)
        got = b""
        end = time.monotonic() + seconds
        try:
            while time.monotonic() < end and (data := connection.recv(65536)):
                got += data
                connection.settimeout(max(0.01, end - time.monotonic()))
        except OSError:
            pass
        return got


# The name that must not arrive is given apart from the attempt, so that an honest twin can be given the allowed one.
How = Callable[[Attempt, str], None]
Try = tuple[Attempt, How, str]


class Bed:
    """Two joined hosts, the servers on one of them, and on the other the agent, if there is a policy."""

    def __init__(
        self, policy: Policy, folder: Path, more_ports: Sequence[int] = (), serve: Callable[[Bed], None] | None = None
    ) -> None:
        """more_ports: judged too. serve: starts other servers in place of those of the table."""
        self.policy = policy
        self.folder = folder
        folder.chmod(0o755)
        self.servers, self.attacker = Namespace(), Namespace()
        self.agent: Agent | None = None
        try:
            join(self.servers, self.attacker)
            self.servers.shell(
                f"iptables-legacy -w -t raw -A PREROUTING -m ttl --ttl-lt {FAR + 1} -j DROP;"
                f"ip6tables-legacy -w -t raw -A PREROUTING -m hl --hl-lt {FAR + 1} -j DROP"
            )
            if serve is None:
                self._serve()
            else:
                serve(self)
            if policy.kind != "none":
                self.agent = Agent(self.attacker, folder, policy.config(more_ports)).ready()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End everything."""
        if self.agent is not None and self.agent.process.poll() is None:
            self.agent.stop()
        self.attacker.close()
        self.servers.close()

    def _serve(self) -> None:
        certificate(self.folder)
        (self.folder / "nginx.conf").write_text(_NGINX.replace("FOLDER", str(self.folder)))
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        script = Path(__file__).with_name("evasion_servers.py")
        with open(self.folder / "servers.err", "wb") as errors:
            self.servers.start(sys.executable, str(script), str(self.folder), stdout=errors, stderr=errors)
        self.servers.start("nginx", "-c", str(self.folder / "nginx.conf"), **quiet)
        self.servers.start(
            "dnsmasq", "--keep-in-foreground", "--no-resolv", "--no-hosts", "--user=root", "--pid-file=",
            "--address=/test/192.0.2.7", "--max-tcp-connections=200",
            "--log-queries", f"--log-facility={self.folder / 'dnsmasq.log'}", **quiet,
        )  # fmt: skip
        for port in (TLS, PLAIN, PYTHON, NGINX, DNS):
            wait_until(partial(listening, self.servers, port), f"port {port} is served")
        for port in (QUIC, DNS):
            wait_until(partial(listening, self.servers, port, "-u"), f"UDP port {port} is served")

    def seen(self) -> list[str]:
        """What the servers have understood so far, a line each."""
        lines: list[str] = []
        for file in ("seen.log", "nginx.log", "dnsmasq.log"):
            if (path := self.folder / file).exists():
                lines += path.read_text(errors="replace").splitlines()
        return lines

    def understood(self, name: str) -> list[str]:
        """The lines in which a server understood a name."""
        whole = re.compile(rf"(?<![\w.-]){re.escape(name)}(?![\w-])", re.IGNORECASE)
        return [line for line in self.seen() if whole.search(line)]

    def run(self, tries: Sequence[Try], raw: bool, timeout: float = 120) -> None:
        """Make all the tries at once, as nobody, or as root where `raw`."""
        self.attacker.call(_run_all, tries, raw, timeout=timeout)


def _run_all(tries: Sequence[Try], raw: bool) -> None:
    if not raw:
        os.setgroups([])
        os.setresgid(UNPRIVILEGED, UNPRIVILEGED, UNPRIVILEGED)
        os.setresuid(UNPRIVILEGED, UNPRIVILEGED, UNPRIVILEGED)

    def one(attempt: Attempt, how: How, name: str) -> None:
        # What is refused shows as an error to the client: that is no failure of the test.
        with contextlib.suppress(OSError):
            how(attempt, name)

    threads = [threading.Thread(target=one, args=each, daemon=True) for each in tries]
    for thread in threads:
        thread.start()
        # Not all handshakes in the same millisecond.
        time.sleep(0.002)
    for thread in threads:
        thread.join(60)
