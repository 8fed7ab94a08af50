"""The findings of `doctor` about the rules of this host: ours, those of others that affect us, and firewalls."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from nfq_agent.cli.finding import Finding
from nfq_agent.cli.running import status_if_any
from nfq_agent.config.models import Config
from nfq_agent.host.nftables import neighbours
from nfq_agent.host.xtables.backend import everywhere
from nfq_agent.rules.model import FAMILIES, RuleError
from nfq_agent.service.host_notices import host_notices
from nfq_agent.service.status import Status
from nfq_agent.values import duration_text

# From this many legacy rules on, some Kubernetes images assume that the host uses them (iptables-wrappers).
_KUBERNETES_LIMIT: Final = 10
_LEGACY: Final = ("iptables-legacy-save", "ip6tables-legacy-save")
_MODERN: Final = ("iptables-nft-save", "ip6tables-nft-save")
_RULE: Final = re.compile(r"^-A ", re.MULTILINE)
_MARKING: Final = re.compile(r"^-A (\S+) .*-j (?:CONN)?MARK (.*)$", re.MULTILINE)
_MASK: Final = re.compile(r"--(?:set-xmark 0x[0-9a-f]+/|nfmask |ctmask )(0x[0-9a-f]+)")
_ALL_BITS: Final = 0xFFFFFFFF


def rule_findings(config: Config, running: Status | None, admin: bool) -> Iterator[Finding]:
    """All of them. running: the status of the running agent, if it answers. admin: whether this process has CAP_NET_ADMIN."""
    if not admin:
        yield Finding(
            "warning",
            "rules",
            "the rules of this host are shown to root only: rules, marks, NAT, firewalls, instances and what the kernel can do "
            "for rules were not looked at",
            "run this as root (sudo)",
        )
    if running is not None:
        yield from _as_configured(running)
        yield from (
            Finding("warning", f"uninspected: {each.cause}", _bypass(each.text, each.count, each.unit), each.advice)
            for each in running.bypasses
        )
    if admin:
        yield from _side_by_side()
        backend = running.backend if running is not None else config.agent.backend
        yield from (Finding("warning", *each) for each in host_notices(config, backend))
        yield from _marks(config)
        yield from _instances(config, running)
    yield from _saved_rules()


def _bypass(text: str, count: float | None, unit: str) -> str:
    return f"{'an unknown number of' if count is None else f'{count:.12g}'} {unit}: {text}"


def _as_configured(running: Status) -> Iterator[Finding]:
    drift = running.drift
    if drift.unreadable:
        yield Finding("error", "rules", f"the running agent cannot read its rules: {drift.unreadable}")
    elif drift.wrong:
        shown = "; ".join(drift.wrong[:3]) + (f"; and {len(drift.wrong) - 3} more" if len(drift.wrong) > 3 else "")
        when = f"the next check, in {duration_text(drift.pause)} at most, repairs them" if drift.pause else "drift_check is 0"
        yield Finding(
            "error",
            "rules",
            f"{len(drift.wrong)} rules or chains are not as configured, and traffic may pass uninspected (+ is missing, - is too "
            f"much): {shown}",
            f"{when}; `nfq-agent reload` puts them back now; then find the program that changed them",
        )
    else:
        yield Finding("good", "rules", f"the {len(running.rules)} rules of the configuration are in the kernel")
    for line in drift.waiting:
        yield Finding("warning", "rules", line, "start its unit, or correct the name (`systemd-cgls` shows all)")
    if drift.pause > drift.check:
        yield Finding(
            "warning",
            "rules",
            f"another program changes the rules of this agent again and again; the next check is in {duration_text(drift.pause)}",
            'find it and stop it, or use backend = "owned"',
        )


def _our_masks(config: Config) -> int:
    """All bits of marks that the configuration uses."""
    bits = 0
    for queue in config.queue.values():
        kept = config.kept(queue)
        bits |= kept.mask if kept is not None else 0
    for proxy in config.proxy.values():
        bits |= proxy.own_traffic.mask | (proxy.tproxy_mark.mask if proxy.capture == "tproxy" else 0)
    return bits


def _marks(config: Config) -> Iterator[Finding]:
    ours = _our_masks(config)
    if not ours:
        return
    for command in (*_LEGACY, *_MODERN):
        for chain, words in _MARKING.findall(_saved(command)):
            masks = [int(mask, 16) for mask in _MASK.findall(words)] or [_ALL_BITS]
            if chain.startswith("NFQA-") or not any(mask & ours for mask in masks):
                continue
            yield Finding(
                "warning",
                "marks",
                f"a rule of chain {chain} ({command.removesuffix('-save')}) changes bits of the mark that this agent uses "
                f"({ours:#x}): -j MARK or CONNMARK {words.strip()}",
                "give that rule a mask without those bits, or set mark, own_mark or tproxy_mark to other bits",
            )
    try:
        native = neighbours.others().marking
    except OSError:
        return
    for place in native:
        yield Finding(
            "warning",
            "marks",
            f"a native rule of nft chain {place} sets a mark; this agent uses the bits {ours:#x}",
            "change it so that it leaves those bits unchanged (`nft list ruleset`)",
        )


def _side_by_side() -> Iterator[Finding]:
    legacy = len(_RULE.findall("".join(map(_saved, _LEGACY))))
    try:
        modern, chains = neighbours.others().rules, [each for each in neighbours.hook_chains() if each.kind == "nat"]
    except OSError:
        modern, chains = 0, []
    if legacy and (modern or chains):
        nat = f"; chains that do NAT in nf_tables: {', '.join(map(str, chains))}" if chains else ""
        yield Finding(
            "warning",
            "legacy and nft",
            f"{legacy} legacy and {modern} foreign nft rules are in force; both take effect, and neither tool shows the "
            f"other's{nat}",
            "look with iptables-legacy-save and with `nft list ruleset`",
        )
    else:
        yield Finding("good", "legacy and nft", f"{legacy} legacy rules, {modern} nft rules")
    if legacy >= _KUBERNETES_LIMIT and any(Path(path).exists() for path in ("/var/lib/kubelet", "/etc/kubernetes")):
        yield Finding(
            "warning",
            "kubernetes",
            f"{legacy} legacy rules on a Kubernetes host: from {_KUBERNETES_LIMIT} on some images choose iptables-legacy",
            'backend = "owned" keeps the legacy tables empty',
        )


def _saved(command: str) -> str:
    """The output of a save command: it lists the tables that are present, and loads no others."""
    import subprocess

    try:
        done = subprocess.run([command], capture_output=True, stdin=subprocess.DEVNULL, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    # A comment is any bytes.
    return done.stdout.decode(errors="replace")


def _instances(config: Config, running: Status | None) -> Iterator[Finding]:
    mine = config.agent.instance
    try:
        places = everywhere(mine)
    except RuleError as error:
        yield Finding("warning", "instances", f"chains cannot be listed: {error}", "run this as root (sudo)")
        return
    for host in places:
        try:
            found = {instance for family in FAMILIES for instance in host.instances(family)}
        except RuleError as error:
            yield Finding("warning", "instances", f"chains cannot be listed: {error}")
            continue
        for instance in sorted(found):
            if instance == mine and running is not None and running.backend != host.name:
                yield Finding(
                    "warning",
                    "instances",
                    f"rules of {instance} are in {host.name} tables too, where the running agent ({running.backend}) has none",
                    "the next check of the rules removes them; if they come back, look at what restores them",
                )
            elif instance == mine and running is not None:
                yield Finding("good", "instances", f"{instance} is running and has its chains ({host.name})")
            elif status_if_any(instance) is not None:
                yield Finding("good", "instances", f"another instance, {instance}, is running and has its chains ({host.name})")
            else:
                yield Finding(
                    "warning",
                    "instances",
                    f"chains of {instance} are in place ({host.name}), and no agent of it runs",
                    f"nfq-agent remove --instance {instance}",
                )


# Where a host's own rules are saved for the next boot: iptables-persistent, the services of Red Hat and Alpine, nftables.
_SAVED: Final = (
    "/etc/iptables/rules.v4", "/etc/iptables/rules.v6", "/etc/sysconfig/iptables", "/etc/sysconfig/ip6tables",
    "/etc/iptables/rules-save", "/etc/nftables.conf", "/etc/sysconfig/nftables.conf",
)  # fmt: skip


def _saved_rules() -> Iterator[Finding]:
    """Rules of ours that will be restored at the next boot, without an agent."""
    for path in map(Path, _SAVED):
        try:
            saved = path.read_text(errors="replace")
        except OSError:
            continue
        if "nfq-agent:" in saved or "NFQA-" in saved:
            yield Finding(
                "warning",
                "saved rules",
                f"{path} holds rules of nfq-agent: each boot restores them before the agent runs, and without an agent they stay",
                "stop the agent, save the rules again, start it (netfilter-persistent save)",
            )
