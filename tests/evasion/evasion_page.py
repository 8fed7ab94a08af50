"""The table of evasions, and the page of the documentation that it is: `evasion_page.py > docs/evasion.md`."""

from __future__ import annotations

import evasion_decoys
import evasion_dns
import evasion_elsewhere
import evasion_events
import evasion_gate
import evasion_host
import evasion_http
import evasion_names
import evasion_packets
import evasion_pressure
import evasion_quic
import evasion_tls
import evasion_unnamed
from evasion_line import Line

LINES: tuple[Line, ...] = (
    *evasion_http.LINES,
    *evasion_dns.LINES,
    *evasion_tls.LINES,
    *evasion_quic.LINES,
    *evasion_decoys.LINES,
    *evasion_packets.LINES,
    *evasion_host.LINES,
    *evasion_names.LINES,
    *evasion_gate.LINES,
    *evasion_unnamed.LINES,
    *evasion_pressure.LINES,
    *evasion_events.LINES,
)

_HEAD = """# Evasions: what a name policy holds against

Each line is tried by `tests/evasion/` against real servers (nginx, Python's HTTP server, dnsmasq, OpenSSL, aioquic, and an
application that writes down the bytes it reads): in IPv4 and IPv6, for an allow-list (`default = "drop"`, some names
accepted) and a block-list (`default = "accept"`, some names dropped), with `drop` and with `reject`, and `undecided = "accept"`.
Without the agent the server understands the denied name; with it, "blocked" means that it never does, and that allowed names
arrive where they can be sent in the same form. A limit is a line that is not blocked, with the reason. The
spellings of HTTP are tried on Apache, Node, HAProxy and Go too, where these are installed. A generator
(`test_understood.py`, `test_understood_more.py`) alters requests of HTTP, ClientHellos and DNS queries at random: neither nginx,
Python's server, OpenSSL nor dnsmasq may understand a name that the policy denies.
This page is made from the table in the tests.

| evasion | who can do it | what happens to it |
|---|---|---|
"""

_ELSEWHERE = """
These are tried by tests of their own, with the configuration that they need: forged answers of a resolver, long waits, large
floods, and faults of a configuration.

| what is tried | who can do it | what happens to it |
|---|---|---|
"""

_PAGES = """
Bytes that the sender changes: a process can send a page of a file or of its memory without a copy, and write to the page while
the packet waits in the queue. The kernel sends what the page holds then, and the agent has judged what it held before. With
`gso = false` the kernel adds up the checksum before the queue, and copies the page for that. This is not the default, since bulk
streams through the queue are several times slower with it; with the element `offload` those of accepted connections leave the
queue. Two other ways were tried, and neither is built. A verdict that carries the bytes that were read costs about 6 % more
processor time for each packet. A rule with the target `CHECKSUM` before the queue costs between nothing and 5 %, and leaves out
packets that an offload joined. The figures are in `tests/bench/NOTES.md`.
"""


def page() -> str:
    """The page in Markdown."""
    tried = "".join(f"| {line.text} | {line.who} | {_outcome(line)} |\n" for line in LINES)
    elsewhere = "".join(f"| {line.text} | {line.who} | {line.outcome} |\n" for line in evasion_elsewhere.LINES)
    return _HEAD + tried + _ELSEWHERE + elsewhere + _PAGES


def _outcome(line: Line) -> str:
    if line.limit is None:
        return line.outcome
    holds = f"; an {' and a '.join(line.holds)} blocks it" if line.holds else ""
    return f"limit: {line.limit}{holds}"


if __name__ == "__main__":
    print(page(), end="")
