"""The table of evasions, and the page of the documentation that it is: `evasion_page.py > docs/evasion.md`."""

from __future__ import annotations

from dataclasses import replace

import evasion_dns
import evasion_http
import evasion_tls
from evasion_line import Line

# Reproduced, and not mended yet.
_OPEN = """
    dns-tcp-after-bytes-behind
    dns-tcp-after-pointer-forward
    dns-tcp-after-record-missing
    dns-tcp-after-z-bit
    dns-tcp-bytes-behind
    dns-tcp-pointer-forward
    dns-tcp-record-missing
    dns-tcp-z-bit
    dns-udp-after-pointer-forward
    dns-udp-pointer-forward
    http-absolute
    http-absolute-without-version
    http-after-absolute
    http-after-absolute-without-version
    http-after-folded-host
    http-after-folded-host-tab
    http-after-host-with-a-name-as-port
    http-after-host-with-userinfo
    http-after-long-method
    http-after-nbsp-in-line
    http-after-space-after-version
    http-after-space-first
    http-after-spaces-before-version
    http-after-tab-in-line
    http-after-two-hosts
    http-after-two-spaces
    http-after-version-1.10
    http-after-version-1.2
    http-behind-a-body
    http-behind-chunks
    http-body-like-a-request
    http-folded-host
    http-folded-host-tab
    http-host-with-a-name-as-port
    http-host-with-userinfo
    http-large
    http-long-method
    http-nbsp-in-line
    http-pipelined
    http-pipelined-behind-a-body
    http-pipelined-between
    http-sixty-segments
    http-slow
    http-port-that-is-none
    http-after-port-that-is-none
    http-space-after-version
    http-space-first
    http-spaces-before-version
    http-split-name
    http-tab-in-line
    http-ten-segments
    http-two-hosts
    http-two-spaces
    http-urgent
    http-version-1.10
    http-version-1.2
    quic-again
    quic-behind-junk
    quic-behind-much-junk
    tls-pieces-10
    tls-retry
    tls-urgent
    """
LINES: tuple[Line, ...] = tuple(
    replace(line, still_open="reproduced, the mend is under way" if line.name in _OPEN.split() else line.still_open)
    for line in (*evasion_http.LINES, *evasion_dns.LINES, *evasion_tls.LINES)
)

_HEAD = """# Evasions: what a name policy holds against

Each line is tried by `tests/evasion/` against real servers (nginx, Python's HTTP server, dnsmasq, OpenSSL, aioquic, and an
application that writes down the bytes it reads): in IPv4 and IPv6, for an allow-list (`default = "drop"`, some names
accepted) and a block-list (`default = "accept"`, some names dropped), with `drop` and with `reject`, and `undecided = "accept"`.
Without the agent the server understands the denied name; with it, "blocked" means that it never does. A limit is a line that is
not blocked, with the reason. This page is made from the table in the tests.

| evasion | who can do it | what becomes of it |
|---|---|---|
"""


def page() -> str:
    """The page in Markdown."""
    return _HEAD + "".join(f"| {line.text} | {line.who} | {_outcome(line)} |\n" for line in LINES)


def _outcome(line: Line) -> str:
    if line.still_open:
        return f"not blocked yet: {line.still_open}"
    if line.limit is None:
        return "blocked"
    holds = f"; an {' and a '.join(line.holds)} blocks it" if line.holds else ""
    return f"limit: {line.limit}{holds}"


if __name__ == "__main__":
    print(page(), end="")
