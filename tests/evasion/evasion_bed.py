"""Where evasions are tried: an attacker's host with the agent on it, and a host of servers that write down what they saw.

All lines of the table are tried at the same time, in one process for each kind of attacker, so that what waits for an
answer that never comes costs its time only once.
"""

from __future__ import annotations

import errno
import os
import re
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from agent import Agent, until
from captures import certificate, listening
from evasion_attempt import NOTES, Attempt, How, Try
from evasion_config import DNS, GIVEN, MARKED, NGINX_2, NGINX_PORTS, TAKEN, UNNAMED, Policy
from evasion_servers import COUNTING, HTTP_PORTS, PLAIN_PORTS, QUIC, TALKING, TLS_PORTS
from namespace import UNPRIVILEGED, Namespace, join

# A hop limit with which a packet does not reach the servers: their host drops it, as a router on the way would.
FAR = 2

_NGINX = """
daemon off; master_process off; user root; pid /run/nginx.pid; error_log FOLDER/nginx-error.log;
events { worker_connections 1024; }
http {
  log_format seen 'nginx $host $request_uri'; access_log FOLDER/nginx.log seen;
  keepalive_timeout 60s; large_client_header_buffers 4 32k; client_body_temp_path /run/nginx-body;
  server { LISTEN location / { return 200 "ok\\n"; } }
}
"""


class Bed:
    """Two joined hosts, the servers on one of them, and on the other the agent, if there is a policy."""

    def __init__(
        self, policy: Policy, folder: Path, more_ports: Sequence[int] = (), serve: Callable[[Bed], None] | None = None
    ) -> None:
        """more_ports: judged too. serve: starts other servers in place of those of the table."""
        self.policy = policy
        self.folder = folder
        self._whole = serve is None
        folder.chmod(0o755)
        self.servers, self.attacker = Namespace(), Namespace()
        self.agent: Agent | None = None
        try:
            self._join()
            if serve is None:
                self._serve()
            else:
                serve(self)
            if policy.kind != "none":
                # As JSON, so that the test sees that each line is whole.
                config = policy.config(more_ports, self._whole)
                self.agent = Agent(self.attacker, folder, config, LOG_FORMAT="json").ready()
            # As VPN tools have it: the connection's mark, which is still 0, takes the place of the packet's.
            for tables in ("iptables-legacy", "ip6tables-legacy"):
                self.attacker.shell(
                    f"{tables} -w -t mangle -I OUTPUT -p tcp --dport {MARKED} -j CONNMARK --restore-mark 2>/dev/null"
                )
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End everything."""
        if self.agent is not None and self.agent.process.poll() is None:
            self.agent.stop()
        self.attacker.close()
        self.servers.close()

    def _join(self) -> None:
        join(self.servers, self.attacker)
        self.servers.run("ip", "link", "add", "eth1", "type", "veth", "peer", "name", "eth1", "netns", str(self.attacker.pid))
        for number, namespace in ((1, self.servers), (2, self.attacker)):
            namespace.shell(
                f"ip address add 10.204.0.{number}/24 dev eth1; ip -6 address add fd00:204::{number}/64 dev eth1 nodad;"
                "ip link set eth1 up"
            )
        for addresses in (TAKEN, UNNAMED):
            self.servers.run("ip", "address", "add", f"{addresses[4]}/24", "dev", "eth0")
            self.servers.run("ip", "-6", "address", "add", f"{addresses[6]}/64", "dev", "eth0", "nodad")
        # Sources of their own, so that what one of them is told uses up nothing of another's allowance.
        self.attacker.shell(
            "for n in 11 12 13; do ip address add 10.203.0.$n/24 dev eth0;"
            "ip -6 address add fd00:203::$n/64 dev eth0 nodad; done;"
            f"install -m 666 /dev/null {NOTES}"
        )
        self.servers.shell(
            f"iptables-legacy -w -t raw -A PREROUTING -m ttl --ttl-lt {FAR + 1} -j DROP;"
            f"ip6tables-legacy -w -t raw -A PREROUTING -m hl --hl-lt {FAR + 1} -j DROP"
        )

    def _serve(self) -> None:
        certificate(self.folder)
        listen = " ".join(f"listen [::]:{port} ipv6only=off backlog=512;" for port in NGINX_PORTS)
        listen += f" listen [::]:{NGINX_2} ipv6only=off http2;"
        (self.folder / "nginx.conf").write_text(_NGINX.replace("FOLDER", str(self.folder)).replace("LISTEN", listen))
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        script = Path(__file__).with_name("evasion_servers.py")
        with open(self.folder / "servers.err", "wb") as errors:
            self.servers.start(sys.executable, str(script), str(self.folder), stdout=errors, stderr=errors)
        self.servers.start("nginx", "-c", str(self.folder / "nginx.conf"), **quiet)
        self.servers.start(
            "dnsmasq", "--keep-in-foreground", "--no-resolv", "--no-hosts", "--user=root", "--pid-file=",
            "--address=/test/192.0.2.7", "--max-tcp-connections=200",
            *(f"--address=/given.test/{address}" for address in GIVEN.values()),
            *(f"--address=/taken.test/{address}" for address in TAKEN.values()),
            "--log-queries", f"--log-facility={self.folder / 'dnsmasq.log'}", **quiet,
        )  # fmt: skip
        for port in (*TLS_PORTS, *PLAIN_PORTS, *HTTP_PORTS, *NGINX_PORTS, NGINX_2, DNS, COUNTING, TALKING):
            until(partial(listening, self.servers, port), f"port {port} is served")
        for port in (QUIC, DNS):
            until(partial(listening, self.servers, port, "-u"), f"UDP port {port} is served")

    def understood(self, name: str) -> list[str]:
        """The lines in which a server understood a name."""
        whole = re.compile(rf"^.*(?<![\w-]){re.escape(name)}(?![\w-]).*$", re.IGNORECASE | re.MULTILINE)
        lines: list[str] = []
        for file in ("seen.log", "nginx.log", "dnsmasq.log"):
            if (path := self.folder / file).exists():
                text = path.read_text(errors="replace")
                # The quick look first: most names are nowhere.
                lines += whole.findall(text) if name.lower() in text.lower() else []
        return lines

    def counted(self, address: str, port: str) -> int:
        """The bytes that the counting server has read from a client."""
        text = (self.folder / "seen.log").read_text(errors="replace")
        found = re.findall(rf"^counted {re.escape(address)} {port} (\d+)$", text, re.MULTILINE)
        return int(found[-1]) if found else 0

    def notes(self, attempt: Attempt) -> list[str]:
        """What an attempt has left so far."""
        lines = (line.partition(" ") for line in Path(f"/proc/{self.attacker.pid}/root{NOTES}").read_text().splitlines())
        return [text for name, _, text in lines if name == attempt.name]

    def log(self) -> list[str]:
        """All that the agent has logged, over its restarts. The last line may be half written, and is left out then."""
        text = (self.folder / "default.log").read_text(errors="replace") if self.agent else ""
        return text[: text.rfind("\n") + 1].splitlines()

    def configure(self, more_names: str) -> None:
        """Put another name onto the list."""
        assert self.agent is not None
        self.agent.configure(self.policy.config((), self._whole, more_names))

    def run(self, tries: Sequence[Try], raw: bool, timeout: float = 120) -> None:
        """Make all the tries at once, as nobody, or as root where `raw`."""
        self.attacker.call(_run_all, tries, raw, timeout=timeout)


# What a client may see when its packets are refused, or its server is busy.
_REFUSED = {
    errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH,
    errno.EACCES, errno.EPERM, errno.EAGAIN, errno.ENOTCONN,
}  # fmt: skip


def _run_all(tries: Sequence[Try], raw: bool) -> None:
    failed: list[BaseException] = []
    if not raw:
        os.setgroups([])
        os.setresgid(UNPRIVILEGED, UNPRIVILEGED, UNPRIVILEGED)
        os.setresuid(UNPRIVILEGED, UNPRIVILEGED, UNPRIVILEGED)

    def one(attempt: Attempt, how: How, name: str) -> None:
        try:
            how(attempt, name)
        except Exception as error:
            # Any other error means that the try was not made as it is described.
            if not isinstance(error, (TimeoutError, ssl.SSLError)) and getattr(error, "errno", None) not in _REFUSED:
                error.add_note(f"{attempt.name}: {how}")
                failed.append(error)

    threads = [threading.Thread(target=one, args=each, daemon=True) for each in tries]
    for thread in threads:
        thread.start()
        # Not all handshakes in the same millisecond.
        time.sleep(0.002)
    for thread in threads:
        thread.join(60)
    if failed:
        raise failed[0]
