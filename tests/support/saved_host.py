"""What a namespace has of rules, routes and listeners, as text."""

from __future__ import annotations

from namespace import Namespace


def saved(netns: Namespace) -> str:
    """Every rule of every kind in the namespace, and its routing rules."""
    return netns.shell(
        "for save in iptables-legacy-save ip6tables-legacy-save iptables-nft-save ip6tables-nft-save; do $save 2>/dev/null; done;"
        "nft list ruleset;"
        "ip rule; ip -6 rule; ip route show table all; ip -6 route show table all"
    )


def listening(netns: Namespace) -> set[str]:
    """HOST:PORT of every TCP listener."""
    return {line.split()[3] for line in netns.shell("ss -ltnH").splitlines()}
