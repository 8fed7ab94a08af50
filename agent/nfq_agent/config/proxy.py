"""`[proxy.NAME]`: a transparent proxy. Models only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Final, Literal

from nfq_agent.config.model import Model
from nfq_agent.field import BeforeValidator, Field
from nfq_agent.mark import OWN_TRAFFIC, Mark, MarkField
from nfq_agent.values import Duration, Endpoint, EndpointField, NetworkField

# Where a proxy listens unless the configuration says otherwise.
LISTEN: Final = (Endpoint("0.0.0.0", 15002), Endpoint("0.0.0.0", 15006), Endpoint("::", 15002), Endpoint("::", 15006))


def parse_target(value: object) -> Endpoint | None:
    """A target; None for an empty text. Raises ValueError."""
    return None if value is None or value == "" else Endpoint.parse(value)


class ProxyConfig(Model):
    """`[proxy.NAME]`"""

    listen: Annotated[tuple[EndpointField, ...], Field(strict=False)] = LISTEN
    target: Annotated[Endpoint | None, BeforeValidator(parse_target)] = None
    # The most bytes that an element sees at once. One read of the proxy is 64 KiB.
    chunk: Annotated[int, Field(ge=1, le=1 << 20)] = 65536
    on_error: Literal["pass", "drop"] = "pass"
    elements: Annotated[tuple[str, ...], Field(strict=False)] = ()
    # How connections are taken: REDIRECT in table nat, or TPROXY in table mangle.
    capture: Literal["redirect", "tproxy"] = "redirect"
    # Whether rules of ours accept what is redirected to the proxy in front of a host firewall that drops in hook INPUT.
    accept_input: bool = False
    # Networks whose connections are not redirected.
    exclude: Annotated[tuple[NetworkField, ...], Field(strict=False)] = ()
    connect_timeout: Annotated[Duration, Field(gt=0)] = 10.0
    # Deadlines of a connection, 0 for none: until its first byte is carried; without a byte either way; without a byte that one
    # side sends or takes; and without a byte either way while `max_connections` is reached.
    opening_timeout: Duration = 60.0
    idle_timeout: Duration = 3600.0
    client_timeout: Duration = 3600.0
    server_timeout: Duration = 3600.0
    idle_when_full: Duration = 60.0
    # Silence after which the kernel probes whether a side is still there; 0 for no probes.
    keepalive: Annotated[Duration, Field(le=32767)] = 60.0
    # How long connections may continue after the rules are removed; then they are reset.
    drain: Duration = 10.0
    # Processes that share the listeners.
    processes: Annotated[int, Field(ge=1, le=64)] = 1
    # Connections at once, in each process; further ones wait in the kernel's backlog.
    max_connections: Annotated[int, Field(ge=1, le=1_000_000)] = 10_000
    # Connections at once from one source, in each process; further ones are refused. 0 for no limit.
    max_per_source: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    # Bytes that may wait in each direction of a connection while elements look at it.
    buffer: Annotated[int, Field(ge=4096, le=1 << 26)] = 256 * 1024
    # TPROXY only: connect to the destination from the client's own address.
    keep_client: bool = False
    # The packet mark of what the proxy sends to the destination.
    mark: MarkField | None = None
    # What marks the proxy's own packets to the destination, so that no rule of any instance takes them again.
    own_mark: MarkField = OWN_TRAFFIC
    # TPROXY only: the mark that sends its packets to this host.
    tproxy_mark: MarkField = Mark(0x800, 0x800)

    def faults(self) -> Iterator[str]:
        """Keys that do not go together."""
        if not self.listen:
            yield 'a proxy without a listener; allowed: listen = ["HOST:PORT", ...]'
        elif self.keep_client and self.capture != "tproxy":
            yield 'keep_client = true needs the rules of TPROXY; allowed: with capture = "tproxy"'

    @property
    def own_traffic(self) -> Mark:
        """The mark by which rules know the proxy's own packets: `own_mark`, or `mark` where that sets the same bits."""
        return self.own_mark if self.mark is None or not self.mark.mask & self.own_mark.mask else self.mark

    @property
    def sent_mark(self) -> int:
        """The mark that the proxy's own packets carry."""
        return self.own_traffic.value | (0 if self.mark is None else self.mark.value)
