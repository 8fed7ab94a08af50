"""`doctor`: what usually goes wrong on a host, looked at one by one, each with what to do. It changes nothing."""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

from nfq_agent.cli.captured import missing
from nfq_agent.cli.running import status_if_any
from nfq_agent.config.models import Config
from nfq_agent.config.warnings import warnings
from nfq_agent.host.nfqueue.statistics import statistics
from nfq_agent.host.nftables.support import probe
from nfq_agent.host.users import CAP_NET_ADMIN, CAP_NET_RAW, find_user, has_capability
from nfq_agent.host.xtables import python_iptables
from nfq_agent.host.xtables.backend import everywhere
from nfq_agent.host.xtables.lock import held_by, holders, lock_path
from nfq_agent.rules.model import FAMILIES, RuleError
from nfq_agent.service.status import Status
from nfq_agent.values import Endpoint

Level = Literal["good", "warning", "error"]
_QUEUES: Final = Path("/proc/self/net/netfilter/nfnetlink_queue")
# From this many legacy rules on, some Kubernetes images take the host for one that uses them (iptables-wrappers).
_KUBERNETES_LIMIT: Final = 10


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. advice: what to do about it, empty where nothing is to be done."""

    level: Level
    subject: str
    text: str
    advice: str = ""

    def as_object(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def examine(config: Config) -> list[Finding]:
    """Everything worth knowing about this host and this configuration, in the order in which it matters."""
    running = status_if_any(config.agent.instance)
    return [
        *_capabilities(),
        *_queue_support(),
        *_rule_engines(),
        *_lock(),
        *_user(config),
        *_queues(config, running),
        *(Finding("warning", "proxy", *each) for each in (missing(running) if running is not None else ())),
        *_side_by_side(),
        *_instances(config, running),
        *_saved_rules(),
        *_conntrack(),
        *_rp_filter(),
        *(Finding("warning", "configuration", text) for text in warnings(config)),
        *(Finding("error", "configuration", text) for text in listener_faults(config)),
    ]


def _capabilities() -> Iterator[Finding]:
    missing = [
        name for name, number in (("CAP_NET_ADMIN", CAP_NET_ADMIN), ("CAP_NET_RAW", CAP_NET_RAW)) if not has_capability(number)
    ]
    if missing:
        yield Finding("error", "capabilities", f"{' and '.join(missing)} missing", "run as root, or start the systemd unit")
    else:
        yield Finding("good", "capabilities", "CAP_NET_ADMIN and CAP_NET_RAW are there")


def _queue_support() -> Iterator[Finding]:
    if _QUEUES.exists():
        yield Finding("good", "kernel", "nfnetlink_queue is there")
    else:
        yield Finding("error", "kernel", "nfnetlink_queue is missing: no packet can be queued", "modprobe nfnetlink_queue")


def _rule_engines() -> Iterator[Finding]:
    legacy = python_iptables.probe()
    if legacy.problem is None:
        mended = ", its option layout mended for python-iptables" if legacy.mended else ""
        yield Finding("good", "rule engine", f"legacy xtables through {legacy.libxtables}{mended}")
        if not legacy.ipv6:
            yield Finding("warning", "rule engine", "the kernel has no legacy xtables for IPv6", "modprobe ip6_tables")
    else:
        yield Finding("warning", "rule engine", f"legacy xtables can't be used: {legacy.problem}")
    owned = probe()
    if owned.problem is not None:
        level: Level = "good" if legacy.problem is None else "error"
        yield Finding(
            level, "rule engine", f"backend owned can't be used: {owned.problem}", "modprobe nf_tables nft_compat nft_queue"
        )
    else:
        how = "its own expression" if owned.native_queue else "nft_compat"
        stay = "" if owned.persist else "; with bypass = false others can change the rules (Linux 6.9 has tables that stay owned)"
        yield Finding("good", "rule engine", f'nf_tables with owned tables, queueing through {how}, for backend = "owned"{stay}')


def _lock() -> Iterator[Finding]:
    path = Path(lock_path())
    if not path.exists():
        yield Finding("good", "xtables lock", f"{path} is not there yet and will be made")
        return
    try:
        lock = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        yield Finding("error", "xtables lock", f"{path}: {error.strerror}", "run as root, or let the agent's group read it")
        return
    try:
        if holders(lock):
            yield Finding(
                "warning", "xtables lock", f"{held_by(lock)} right now", "milliseconds are usual; else look at that process"
            )
        else:
            yield Finding("good", "xtables lock", "free")
    finally:
        os.close(lock)


def _user(config: Config) -> Iterator[Finding]:
    name = config.agent.user
    user = find_user(name)
    if user is None:
        yield Finding("good", "user", f"{name} is missing and will be made at the start")
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
        yield Finding("warning", "queues", f"the holders of queue numbers cannot be read: {error.strerror}", "run as root")
        return
    ours = {worker.number for queue in running.queues for worker in queue.workers} if running is not None else set()
    for name, queue in config.queue.items():
        for number in queue.numbers:
            if number not in bound:
                yield Finding("good", "queues", f"number {number} of [queue.{name}] is free")
            elif number in ours:
                yield Finding("good", "queues", f"number {number} of [queue.{name}] is served by this instance")
            else:
                who = _process(bound[number].portid)
                yield Finding(
                    "error", "queues", f"number {number} of [queue.{name}] is held by {who}", "stop it, or choose another num"
                )


def _process(port: int) -> str:
    """A netlink port id is usually the process id of who opened the socket (netlink(7))."""
    try:
        return f"{Path(f'/proc/{port}/comm').read_text().strip()} (pid {port})"
    except OSError:
        return f"another process (netlink port {port})"


def _side_by_side() -> Iterator[Finding]:
    legacy = sum(_count(command) for command in ("iptables-legacy-save", "ip6tables-legacy-save"))
    modern = sum(_count(command) for command in ("iptables-nft-save", "ip6tables-nft-save"))
    if legacy and modern:
        yield Finding(
            "warning",
            "legacy and nft",
            f"{legacy} legacy and {modern} nft rules are in force; both take effect, and neither tool shows the other's",
            "look with iptables-legacy-save and with iptables-nft-save",
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


def _count(command: str) -> int:
    """Rules of present tables. The save commands list what is there and make no table present."""
    import subprocess

    try:
        done = subprocess.run([command], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return len(re.findall(r"^-A ", done.stdout, re.MULTILINE))


def _instances(config: Config, running: Status | None) -> Iterator[Finding]:
    mine = config.agent.instance
    for host in everywhere(mine):
        try:
            found = {instance for family in FAMILIES for instance in host.instances(family)}
        except RuleError as error:
            yield Finding("warning", "instances", f"chains can't be listed: {error}")
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
                f"{path} holds rules of nfq-agent: each boot restores them before the agent runs, and without it for good",
                "stop the agent, save the rules again, start it (netfilter-persistent save)",
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
            f"strict on {', '.join(strict)}: what comes another way than its answer goes is dropped before it is queued",
            "if packets are missing on a multi-homed host or with TPROXY: sysctl net.ipv4.conf.IF.rp_filter=2",
        )
    else:
        yield Finding("good", "rp_filter", "not strict on any interface")


def listener_faults(config: Config) -> list[str]:
    """A line for each thing that this host or unit forbids: a listener that another process holds, packets of our own.

    Listeners of the running agent of this instance are its own.
    """
    wanted = [(name, endpoint) for name, proxy in config.proxy.items() for endpoint in proxy.listen]
    answering = [
        f"queue.{name}.elements"
        for name, queue in config.queue.items()
        if any(spec.cls.injects_of(spec.options) for spec in config.packet_elements(queue))
    ]
    if (wanted or answering) and _ip_denied():
        return [
            f"configuration: {key}: this service may not send IP packets of its own (IPAddressDeny=any of its unit), which "
            f"{what}; allowed: a drop-in with [Service] IPAddressDeny= and nothing behind it, see nfq-agent(8)"
            for key, what in (
                *((("proxy", "a proxy does"),) if wanted else ()),
                *((key, "`reject` and `chaos` do") for key in answering),
            )
        ]
    if not wanted:
        return []
    running = status_if_any(config.agent.instance)
    ours = {text for proxy in running.proxies for text in proxy.listen} if running is not None else set()
    faults = []
    for name, endpoint in wanted:
        if str(endpoint) not in ours and (reason := _cannot_bind(endpoint)):
            faults.append(
                f"configuration: proxy.{name}.listen: {endpoint} {reason}; allowed: a free address and port of this host"
            )
    return faults


def _ip_denied() -> bool:
    """Whether systemd keeps this process from sending: a datagram to itself is refused (systemd.resource-control(5))."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind(("127.0.0.1", 0))
            probe.sendto(b"", probe.getsockname())
        except PermissionError:
            return True
        except OSError:
            return False
    return False


def _cannot_bind(endpoint: Endpoint) -> str:
    family = socket.AF_INET6 if ":" in endpoint.host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind((endpoint.host, endpoint.port))
            # Two may bind with SO_REUSEADDR; only one may listen.
            probe.listen(1)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return "is in use by another process"
        if error.errno in (errno.EAFNOSUPPORT, errno.EACCES):
            return ""
        return f"can't be bound: {error.strerror or error}"
    return ""
