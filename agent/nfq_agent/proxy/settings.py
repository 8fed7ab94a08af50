"""What a process of a proxy needs to know."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nfq_agent.config.environment import target_in_force
from nfq_agent.config.models import Config
from nfq_agent.mark import OWN_TRAFFIC, Mark
from nfq_agent.proxy.deadlines import Timeouts


@dataclass(frozen=True, slots=True)
class ProxySettings:
    """The settings of one proxy. Times in seconds, sizes in bytes.

    target: where connections go whose destination is not known. own_listeners: every listener of the agent.
    keep_client: connect to the destination from the client's address (capture by TPROXY only). mark: of the packets that
    are sent to the destination, 0 for none. own_mark: the part of it by which proxies know each other's connections.
    max_per_source: connections of one source, 0 for no limit. keepalive: silence after which the kernel probes whether a side
    is still there, 0 for no probes. lingers: without a supervisor let what runs end.
    """

    name: str
    target: tuple[str, int] | None = None
    chunk: int = 65536
    on_error: Literal["pass", "drop"] = "pass"
    connect_timeout: float = 10.0
    drain: float = 10.0
    own_listeners: tuple[tuple[str, int], ...] = ()
    capture: Literal["redirect", "tproxy"] = "redirect"
    keep_client: bool = False
    mark: int = 0
    own_mark: Mark = OWN_TRAFFIC
    buffer: int = 256 * 1024
    max_connections: int = 10_000
    max_per_source: int = 0
    processes: int = 1
    timeouts: Timeouts = field(default_factory=Timeouts)
    keepalive: float = 60.0
    lingers: bool = False

    @classmethod
    def of(cls, name: str, config: Config) -> ProxySettings:
        """The settings of `[proxy.NAME]`; TARGET_ADDR in the environment wins over its `target`. Raises ConfigError."""
        proxy = config.proxy[name]
        target = target_in_force(proxy)
        return cls(
            name=name,
            target=None if target is None else (target.host, target.port),
            chunk=proxy.chunk,
            on_error=proxy.on_error,
            connect_timeout=proxy.connect_timeout,
            drain=proxy.drain,
            own_listeners=tuple((e.host, e.port) for each in config.proxy.values() for e in each.listen),
            capture=proxy.capture,
            keep_client=proxy.keep_client,
            mark=proxy.sent_mark,
            own_mark=proxy.own_traffic,
            buffer=proxy.buffer,
            max_connections=proxy.max_connections,
            max_per_source=proxy.max_per_source,
            processes=proxy.processes,
            timeouts=Timeouts(
                opening=proxy.opening_timeout,
                idle=proxy.idle_timeout,
                client=proxy.client_timeout,
                server=proxy.server_timeout,
                full=proxy.idle_when_full,
            ),
            keepalive=proxy.keepalive,
        )
