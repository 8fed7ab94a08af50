"""The unit of one's own of SECURITY.md, in a real systemd: its agent takes real traffic, and leaves nothing."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from booted.beside import foreign
from booted.container import Container
from booted.nspawn import until
from booted.peers import exchange, foreign_rules, main_pid, ours, settled, status

_PAGE = Path(__file__).parent.parent.parent / "SECURITY.md"
# A queue with its rules, a proxy with its rule, and a tap.
_CONFIG = """
[queue.main]
num = 140
[rules.app]
queue = "main"
tcp_ports = [11000]
[proxy.tcp]
listen = ["127.0.0.1:15002"]
[rules.proxied]
proxy = "tcp"
hooks = ["output"]
tcp_ports = [8080]
[tap.all]
interfaces = ["lo"]
tcp_ports = [11000]
"""
# Asks a server of this host through the proxy: as another user, since what proxyuser asks is never redirected.
_FETCH = """
import http.server, os, socketserver, threading, urllib.request
class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = b"0123456789abcdef" * 65536
        self.send_response(200); self.send_header("Content-Length", str(len(body))); self.end_headers(); self.wfile.write(body)
    def log_message(self, *_): pass
server = socketserver.ThreadingTCPServer(("127.0.0.1", 8080), Page)
threading.Thread(target=server.serve_forever, daemon=True).start()
import hashlib
print(hashlib.sha256(urllib.request.urlopen("http://127.0.0.1:8080/", timeout=60).read()).hexdigest(), flush=True)
os._exit(0)
"""


def test_it_takes_traffic_and_leaves_nothing(host: Container) -> None:
    (unit,) = re.findall(r"```ini\n(.*?)```", _PAGE.read_text(), re.DOTALL)
    host.run("systemctl", "stop", "nfq-agent")
    foreign_rules(host)
    before = foreign(host)
    host.write("/etc/systemd/system/own.service", unit)
    host.write("/etc/nfq-agent/own.toml", _CONFIG)
    host.run("systemctl", "daemon-reload")
    host.run("systemctl", "start", "own")
    assert host.show("own", "ActiveState") == "active"
    assert len([line for line in ours(host) if "--queue-num 140" in line]) == 4

    exchange(host)
    body = hashlib.sha256(b"0123456789abcdef" * 65536).hexdigest()
    assert host.run("python3", "-c", _FETCH).stdout.strip() == body
    report = settled(host)
    (worker,) = report["queues"][0]["workers"]
    assert worker["received"] == worker["accepted"] > 20
    assert report["queues"][0]["uninspected"] == 0
    assert report["proxies"][0]["counters"]["connections"] == 1
    assert report["proxies"][0]["counters"]["bytes_reverse"] > 1 << 20
    until(lambda: status(host)["taps"][0]["counters"]["judged"] > 20, "the tap has seen it")

    # The supervisor has what the unit gives it, and no process more than that.
    given = {"CAP_NET_ADMIN": 12, "CAP_NET_RAW": 13}
    assert set(re.findall(r"CAP_\w+", unit)) == set(given)
    main = main_pid(host, "own")
    pids = [main, worker["pid"], report["proxies"][0]["pid"], report["taps"][0]["pid"]]
    rights = [int(host.shell(f"sed -n 's/^CapPrm:\t//p' /proc/{pid}/status"), 16) for pid in pids]
    assert rights[0] == sum(1 << number for number in given.values())
    assert all(right & ~rights[0] == 0 for right in rights)

    host.run("systemctl", "stop", "own")
    assert host.show("own", "Result") == "success"
    assert ours(host) == []
    assert foreign(host) == before
    assert host.shell("cat /proc/net/netfilter/nfnetlink_queue") == ""
    exchange(host)


def test_what_a_kill_leaves_the_next_start_removes(host: Container) -> None:
    (unit,) = re.findall(r"```ini\n(.*?)```", _PAGE.read_text(), re.DOTALL)
    host.run("systemctl", "stop", "nfq-agent")
    before = foreign(host)
    host.write("/etc/systemd/system/own.service", unit)
    host.write("/etc/nfq-agent/own.toml", _CONFIG)
    host.run("systemctl", "daemon-reload")
    host.run("systemctl", "start", "own")
    host.run("systemctl", "kill", "--signal=SIGKILL", "own")
    until(lambda: host.show("own", "ActiveState") == "failed", "it has ended")
    # Traffic passes without it, by `bypass`.
    exchange(host)
    host.run("systemctl", "start", "own")
    exchange(host)
    (worker,) = status(host)["queues"][0]["workers"]
    assert worker["received"] > 20
    host.run("systemctl", "stop", "own")
    assert foreign(host) == before
