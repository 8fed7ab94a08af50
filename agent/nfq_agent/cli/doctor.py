"""`doctor`: checks the common problems of a host one by one, each with advice. It changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from nfq_agent.cli.doctor_cores import core_findings
from nfq_agent.cli.doctor_rules import rule_findings
from nfq_agent.cli.doctor_run import run_findings
from nfq_agent.cli.finding import Finding, Level
from nfq_agent.cli.listeners import listener_faults
from nfq_agent.cli.running import status_if_any
from nfq_agent.config.models import Config
from nfq_agent.config.name_needs import name_needs
from nfq_agent.config.warnings import warnings
from nfq_agent.elements import ElementError
from nfq_agent.host.jail import door
from nfq_agent.host.netlink_holders import described
from nfq_agent.host.nfqueue.statistics import statistics
from nfq_agent.host.nftables.support import groups_problem, probe
from nfq_agent.host.users import CAP_NET_ADMIN, find_user, has_capability
from nfq_agent.host.xtables import python_iptables
from nfq_agent.service.confinement import exemptions, lacking
from nfq_agent.service.foreign_marks import rewriting
from nfq_agent.service.status import Status

_QUEUES: Final = Path("/proc/self/net/netfilter/nfnetlink_queue")
_DNS: Final = 53


def examine(config: Config) -> list[Finding]:
    """All findings about this host and this configuration, the most important first."""
    running = status_if_any(config.agent.instance)
    # Without this capability the kernel shows no rules and no features, and would seem to have none.
    admin = has_capability(CAP_NET_ADMIN)
    return [
        *_capabilities(admin),
        *_queue_support(),
        *(_rule_engines() if admin else ()),
        *_confinement(config),
        *run_findings(admin),
        *_user(config),
        *_queues(config, running),
        *core_findings(config, running),
        *rule_findings(config, running, admin),
        *_conntrack(),
        *(_foreign_marks(config) if admin else ()),
        *_rp_filter(),
        *_resolvers(config),
        *(Finding("warning", "configuration", text) for text in warnings(config)),
        *(Finding("error", "configuration", text) for text in listener_faults(config)),
    ]


def _foreign_marks(config: Config) -> Iterator[Finding]:
    found = list(rewriting(config))
    for text in found:
        yield Finding(
            "warning",
            "marks",
            f"{text} of an offload element before its rules see them: each packet with a verdict for its flow comes back",
            "give that rule a mask (--nfmask, --set-xmark VALUE/MASK) without these bits, or choose another mark for offload",
        )
    if not found:
        yield Finding("good", "marks", "no rule of others rewrites the mark bits of an offload element")


def _capabilities(admin: bool) -> Iterator[Finding]:
    if not admin:
        yield Finding("error", "capabilities", "CAP_NET_ADMIN is missing", "run as root, or start the systemd unit")
    else:
        yield Finding("good", "capabilities", "CAP_NET_ADMIN is present")


def _queue_support() -> Iterator[Finding]:
    if _QUEUES.exists():
        yield Finding("good", "kernel", "nfnetlink_queue is there")
    else:
        yield Finding("error", "kernel", "nfnetlink_queue is missing: no packet can be queued", "modprobe nfnetlink_queue")


def _rule_engines() -> Iterator[Finding]:
    legacy = python_iptables.probe()
    if legacy.problem is None:
        mended = ", its option layout corrected for python-iptables" if legacy.mended else ""
        yield Finding("good", "rule engine", f"legacy xtables through {legacy.libxtables}{mended}")
        if not legacy.ipv6:
            yield Finding("warning", "rule engine", "the kernel has no legacy xtables for IPv6", "modprobe ip6_tables")
    else:
        yield Finding("warning", "rule engine", f"legacy xtables cannot be used: {legacy.problem}")
    owned = probe()
    if owned.problem is not None:
        level: Level = "good" if legacy.problem is None else "error"
        yield Finding(
            level, "rule engine", f"backend owned cannot be used: {owned.problem}", "modprobe nf_tables nft_compat nft_queue"
        )
    else:
        how = "its own expression" if owned.native_queue else "nft_compat"
        stay = "" if owned.persist else "; with bypass = false others can change the rules (Linux 6.9 has tables that stay owned)"
        problem = groups_problem()
        groups = "" if problem is None else f"; policies by unit, container and cgroup are not compiled: {problem}"
        yield Finding(
            "good", "rule engine", f'nf_tables with owned tables, queueing through {how}, for backend = "owned"{stay}{groups}'
        )


def _confinement(config: Config) -> Iterator[Finding]:
    mode = config.agent.confinement
    if mode == "off":
        yield Finding("warning", "confinement", 'off: a worker that is taken over can change rules (confinement = "off")')
    elif (what := lacking(mode)) is not None:
        yield Finding("error" if mode == "required" else "warning", "confinement", what)
    else:
        yield Finding("good", "confinement", f"workers are confined by {' and '.join(door.means())}")
    for exempt in exemptions(config):
        yield Finding("good", "confinement", f"exempt: {exempt}")


def _user(config: Config) -> Iterator[Finding]:
    name = config.agent.user
    user = find_user(name)
    if user is None:
        yield Finding("good", "user", f"{name} is missing and will be created at the start")
    elif user.uid == 0:
        yield Finding(
            "warning", "user", f"{name} is root: workers keep its files, and root's traffic is never queued", "use a system user"
        )
    else:
        yield Finding("good", "user", f"{name} has uid {user.uid}; its traffic is never queued")


def _queues(config: Config, running: Status | None) -> Iterator[Finding]:
    try:
        bound = statistics()
    except OSError as error:
        yield Finding(
            "warning", "queues", f"the processes that use queue numbers cannot be read: {error.strerror}", "run as root"
        )
        return
    ours = {worker.number for queue in running.queues for worker in queue.workers} if running is not None else set()
    for name, queue in config.queue.items():
        for number in queue.numbers:
            if number not in bound:
                yield Finding("good", "queues", f"number {number} of [queue.{name}] is free")
            elif number in ours:
                yield Finding("good", "queues", f"number {number} of [queue.{name}] is served by this instance")
            else:
                who = described(bound[number].portid)
                yield Finding(
                    "error", "queues", f"number {number} of [queue.{name}] is used by {who}", "stop it, or choose another num"
                )


def _conntrack() -> Iterator[Finding]:
    base = Path("/proc/sys/net/netfilter")
    try:
        count = int((base / "nf_conntrack_count").read_text())
        limit = int((base / "nf_conntrack_max").read_text())
    except (OSError, ValueError):
        yield Finding("warning", "conntrack", "not there: offload and redirection to a proxy need it", "modprobe nf_conntrack")
        return
    if count > limit * 0.9:
        yield Finding("warning", "conntrack", f"{count} of {limit} entries are in use", "raise net.netfilter.nf_conntrack_max")
    else:
        yield Finding("good", "conntrack", f"{count} of {limit} entries in use")


def _rp_filter() -> Iterator[Finding]:
    base = Path("/proc/sys/net/ipv4/conf")
    strict = []
    for path in sorted(base.glob("*/rp_filter")):
        try:
            if path.read_text().strip() == "1":
                strict.append(path.parent.name)
        except OSError:
            continue
    if strict:
        yield Finding(
            "warning",
            "rp_filter",
            f"strict on {', '.join(strict)}: a packet is dropped before it is queued if its answer leaves by another interface",
            "if packets are missing on a multi-homed host or with TPROXY: sysctl net.ipv4.conf.IF.rp_filter=2",
        )
    else:
        yield Finding("good", "rp_filter", "not strict on any interface")


def _resolvers(config: Config) -> Iterator[Finding]:
    """Where names that DNS proves decide: whether any user of this host can answer as a resolver that is believed."""
    try:
        needs = name_needs(config)
        first = int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())
    except (ElementError, OSError, ValueError):
        return
    here = [] if needs is None else [str(each) for each in map(ip_address, needs.believed) if each.is_loopback]
    if here and first <= _DNS:
        yield Finding(
            "warning",
            "resolvers",
            f"any user of this host can answer as {', '.join(here)}, whose answers prove names (verify, dst_name): "
            f"net.ipv4.ip_unprivileged_port_start is {first}",
            "sysctl net.ipv4.ip_unprivileged_port_start=1024, or resolvers of other hosts in table agent",
        )
    elif here:
        yield Finding("good", "resolvers", f"no user without CAP_NET_BIND_SERVICE can answer as {', '.join(here)}")
