"""Rules in a table that belongs to a process, for the tests of it."""

from __future__ import annotations

import socket

from namespace import Namespace


def listed(netns: Namespace) -> str:
    done = netns.run("nft", "list", "ruleset")
    # nft says so of any table that has an xtables target in it.
    remarks = [line for line in done.stderr.splitlines() if "is managed by iptables-nft, do not touch!" not in line]
    assert remarks == []
    return done.stdout


def send(port: int, count: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for _ in range(count):
            sender.sendto(b"x", ("127.0.0.1", port))


OTHERS = {
    "legacy": "iptables-legacy -w -t nat -I OUTPUT -p tcp --dport 8080 -j REDIRECT --to-ports 9",
    "iptables-nft": "iptables-nft -t nat -I OUTPUT -p tcp --dport 8080 -j REDIRECT --to-ports 9",
    "nft": "nft 'add table ip other; add chain ip other c { type nat hook output priority -100; };"
    " add rule ip other c tcp dport 8080 redirect to :9'",
}
