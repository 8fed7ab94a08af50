"""Rules as lines of `iptables-save`: what the tests want, and which of the saved lines are ours."""

from __future__ import annotations

import re

from nfq_agent.rules.model import Rule, TableRules


def rules(*texts: str) -> dict[str, TableRules]:
    """Desired rules from lines of `iptables-save`."""
    tables: dict[str, TableRules] = {}
    for text in texts:
        table, _, line = text.partition(" ")
        rule = Rule.parse(line)
        before = tables.get(table, TableRules())
        if rule.chain.startswith("NFQA-"):
            chains = dict(before.chains)
            chains[rule.chain] = (*chains.get(rule.chain, ()), rule)
            tables[table] = TableRules(chains, before.jumps)
        else:
            tables[table] = TableRules(before.chains, (*before.jumps, rule))
    return tables


def rule(instance: str, port: int, chain: str = "INPUT", queue: int = 100) -> str:
    return (
        f"-A NFQA-{instance}-{chain} -p tcp -m multiport --dports {port} "
        f'-m comment --comment "nfq-agent:{instance}:r{port}" -j NFQUEUE --queue-num {queue} --queue-bypass'
    )


def jump(instance: str, chain: str = "INPUT") -> str:
    return f'-A {chain} -m comment --comment "nfq-agent:{instance}:jump" -j NFQA-{instance}-{chain}'


def baseline(instance: str = "a", *ports: int) -> dict[str, TableRules]:
    """One table, two chains."""
    chosen = ports or (11000,)
    return rules(
        f"mangle {jump(instance)}",
        *(f"mangle {rule(instance, port)}" for port in chosen),
        f"mangle {jump(instance, 'OUTPUT')}",
        *(f"mangle {rule(instance, port, 'OUTPUT')}" for port in chosen),
    )


def is_ours(line: str, instance: str) -> bool:
    return re.search(rf'--comment "nfq-agent:{instance}:|^:NFQA-{instance}-[A-Z]+ |-A NFQA-{instance}-[A-Z]+ ', line) is not None


def ours(lines: list[str], instance: str = "a") -> list[str]:
    """The lines of a saved ruleset that are an instance's, without counters."""
    return [bare(line) for line in lines if is_ours(line, instance)]


def foreign(lines: list[str], instance: str = "a") -> list[str]:
    """The others, counters and all."""
    return [line for line in lines if not is_ours(line, instance)]


def bare(line: str) -> str:
    """A saved rule without its counters."""
    return re.sub(r"^\[\d+:\d+\] ", "", line)


def many(count: int) -> str:
    """Rules with counters in three tables."""
    lines = []
    for table, share in (("mangle", count // 2), ("filter", count // 4), ("raw", count // 4)):
        lines += [f"*{table}", ":OUTPUT ACCEPT [11:1100]", ":MANY - [0:0]"]
        for number in range(share):
            chain = ("OUTPUT", "PREROUTING" if table != "filter" else "INPUT", "MANY")[number % 3]
            lines.append(f"[{number}:{number * 60}] -A {chain} -p tcp -m tcp --dport {number % 65535 + 1} -j RETURN")
        lines.append("COMMIT")
    return "\n".join([*lines, ""])
