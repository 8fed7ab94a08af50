"""What a namespace has of rules, as text, for the tests of the rules on a real kernel."""

from __future__ import annotations

from namespace import Namespace


def saved(netns: Namespace, tool: str = "iptables-legacy") -> list[str]:
    lines = netns.run(f"{tool}-save", "-c").stdout.splitlines()
    return [line for line in lines if not line.startswith("#")]


def other_table() -> list[str]:
    return [
        'raw -A OUTPUT -m comment --comment "nfq-agent:a:jump" -j NFQA-a-OUTPUT',
        'raw -A NFQA-a-OUTPUT -p udp -m comment --comment "nfq-agent:a:u" -j RETURN',
    ]
