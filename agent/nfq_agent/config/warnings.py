"""Settings that are allowed, but may surprise: one sentence each."""

from __future__ import annotations

from collections.abc import Iterator

from nfq_agent.config.capture import CaptureConfig, overlap
from nfq_agent.config.models import Config, QueueConfig
from nfq_agent.config.name_needs import hidden_resolvers
from nfq_agent.config.overlaps import shared_ports
from nfq_agent.config.policies import drops_by_default
from nfq_agent.config.ssh_access import cuts_ssh
from nfq_agent.values import LAST_PORT, Ports


def warnings(config: Config) -> Iterator[str]:
    """One sentence for each setting that is allowed, but may surprise."""
    for name, rule in config.rules.items():
        if rule.table_name == "filter":
            yield (
                f"rules.{name}: in table filter an ACCEPT verdict, or bypass, skips the host firewall's later rules; "
                "in mangle it does not"
            )
        if rule.all and rule.queue is not None and (culprit := drops_by_default(config, config.queue[rule.queue])):
            ssh = f", {cut} included" if (cut := cuts_ssh(config, config.queue[rule.queue])) else ""
            yield (
                f"rules.{name}: all = true with {culprit} drops every packet that no rule accepts{ssh}; "
                'accept what you need first, or begin with mode = "monitor"'
            )
        if rule.queue is not None and not config.queue[rule.queue].bypass:
            yield f"rules.{name}: bypass = false drops this traffic while no agent serves queue {rule.queue}"
    yield from _queues_beside_proxies(config)
    yield from _rules_beside_inline(config)
    if hidden := hidden_resolvers(config):
        yield (
            f"the answers of the resolvers {', '.join(hidden)} come in at hook input, which no rule with dpi takes: verify and "
            'dst_name see answers of a local stub only; add a rule with udp_ports = [53] and hooks = ["input", "output"]'
        )
    for name, queue in config.queue.items():
        denies = [spec.name for spec in config.packet_elements(queue) if spec.cls.denies_of(spec.options)]
        open_by = [key for key, value in (("fail_open", queue.fail_open), ("bypass", queue.bypass)) if value]
        if denies and open_by and queue.mode == "enforce":
            yield (
                f"queue.{name}: {' and '.join(f'{key} = true' for key in open_by)} let packets past {', '.join(denies)} without "
                "a verdict when the queue is full or no agent serves it, and a flood of any local user can fill it; to keep them "
                f"out instead: {', '.join(f'{key} = false' for key in open_by)}{_room(queue)}"
            )
        if queue.gso is True and config.gets_udp(queue) and (specs := config.packet_elements(queue)):
            yield (
                f"queue.{name}: gso = true takes one UDP send of many datagrams as one packet, of which {specs[0].name} "
                "judges the first, and counts one; leave gso out, or send UDP to a queue of its own"
            )
        if not any(rule.queue == name for rule in config.rules.values()):
            yield f"queue.{name}: no rule sends anything to it"
    tables: list[QueueConfig | CaptureConfig] = [*config.queue.values(), *config.tap.values(), *config.inline.values()]
    chains = [each.elements for each in tables]
    chains += [each.elements for each in config.proxy.values()]
    used = {element for chain in chains for element in chain}
    for name in config.element:
        if name not in used:
            yield f"element.{name}: it is in the elements of no queue, tap, inline link or proxy, and does nothing"


def _room(queue: QueueConfig) -> str:
    if queue.room_for_known or not queue.fail_open or queue.cpu_fanout:
        return ""
    return "; to judge the requests on connections in spite of a flood of new flows: room_for_known = 1024"


def _rules_beside_inline(config: Config) -> Iterator[str]:
    """A rule for all forwarded packets takes those of containers too, where netfilter sees them."""
    for name, inline in config.inline.items():
        for other, rule in config.rules.items():
            if rule.queue is None or rule.interface is not None or not {"forward", "prerouting", "postrouting"} & set(rule.hooks):
                continue
            if (ports := shared_ports(inline, rule)) is not None:
                yield (
                    f"inline.{name} and rules.{other} both take port {ports}: where netfilter sees the packets of these "
                    f"interfaces, they are judged twice; name the interfaces of rules.{other}, or give the port to one of them"
                )


def _queues_beside_proxies(config: Config) -> Iterator[str]:
    """A proxy's own packets are never queued, and its clients' packets have its port: of a connection, the rest are answers."""
    for name, rule in config.rules.items():
        for other, led in config.rules.items():
            if rule.queue is None or led.proxy is None or not {"input", "forward"} & set(rule.hooks):
                continue
            ports = overlap((Ports(1, LAST_PORT),) if rule.all else rule.tcp_ports, led.tcp_ports)
            if ports is not None:
                yield (
                    f"rules.{name} and rules.{other} both take TCP port {ports}: of what proxy {led.proxy} carries, queue "
                    f"{rule.queue} sees the answers of the servers only; give those ports to one of them, or look at them with "
                    "elements of the proxy"
                )
