"""How a worker's process is confined before its first packet: by what the configuration says, and what its elements need."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from nfq_agent.access import Access, together
from nfq_agent.config.models import Config, ElementSpec
from nfq_agent.host.jail import door
from nfq_agent.host.jail.calls import SOL_SOCKET, ProcessNeeds
from nfq_agent.log import Log
from nfq_agent.service.status import ConfinementStatus

Mode = Literal["required", "available", "off"]

# What an element that opens sockets may set on them: options of the socket and of TCP, none of IP, where rules are replaced.
_IPPROTO_TCP: Final = 6
_SO_KEEPALIVE, _SO_SNDBUF, _SO_RCVBUF, _SO_RCVTIMEO, _SO_SNDTIMEO, _SO_ERROR = 9, 7, 8, 20, 21, 4
_SETS: Final = (
    *((SOL_SOCKET, name) for name in (_SO_KEEPALIVE, _SO_SNDBUF, _SO_RCVBUF, _SO_RCVTIMEO, _SO_SNDTIMEO)),
    # TCP_NODELAY, TCP_KEEPIDLE, TCP_KEEPINTVL, TCP_KEEPCNT (linux/tcp.h)
    *((_IPPROTO_TCP, name) for name in (1, 4, 5, 6)),
)


def access_of(specs: Iterable[ElementSpec]) -> Access:
    """What these elements need together."""
    return together(spec.cls.access_of(spec.options) for spec in specs)


def exemptions(config: Config) -> tuple[str, ...]:
    """A line for each element that has one: `queue web: capture writes /var/lib/captures`."""
    specs: dict[str, Iterable[ElementSpec]] = {}
    specs |= {f"queue {name}": config.packet_elements(queue) for name, queue in config.queue.items()}
    specs |= {f"tap {name}": config.packet_elements(tap) for name, tap in config.tap.items()}
    specs |= {f"inline {name}": config.packet_elements(inline) for name, inline in config.inline.items()}
    specs |= {f"proxy {name}": config.stream_elements(proxy) for name, proxy in config.proxy.items()}
    found = ((f"{title}: {spec.name}", spec.cls.access_of(spec.options).words) for title, each in specs.items() for spec in each)
    return tuple(f"{title} {words}" for title, words in found if words)


def lacking(mode: Mode) -> str | None:
    """What is missing for the mode that the configuration asks for, as text; None if nothing."""
    if mode == "off" or not (missing := door.missing()):
        return None
    return "workers cannot be confined as they should be: " + "; ".join(missing)


def status(config: Config) -> ConfinementStatus:
    """How the workers are confined."""
    off = config.agent.confinement == "off"
    return ConfinementStatus(
        mode=config.agent.confinement,
        by=() if off else tuple(door.means()),
        missing=() if off else tuple(door.missing()),
        exemptions=exemptions(config),
    )


@dataclass(frozen=True, slots=True)
class Confinement:
    """Confines one process. needs: of the process itself. access: of its elements."""

    mode: Mode
    access: Access = field(default_factory=Access)
    needs: ProcessNeeds = field(default_factory=ProcessNeeds)

    def with_needs(self, needs: ProcessNeeds) -> Confinement:
        """For a process that needs this itself."""
        return replace(self, needs=needs)

    def close(self, needs: ProcessNeeds | None = None) -> None:
        """Confine this process; this cannot be undone. needs: instead of those that were given. Raises OSError."""
        if self.mode == "off":
            return
        access = self.access
        own = self.needs if needs is None else needs
        door.close(
            replace(
                own,
                reads=own.reads + access.reads,
                writes=own.writes + access.writes,
                connects=own.connects or access.sockets,
                datagrams=own.datagrams or access.sockets,
                sets=own.sets + (_SETS if access.sockets else ()),
                gets=own.gets + (((_IPPROTO_TCP, 11),) if access.sockets else ()),
                threads=own.threads or access.threads,
            )
        )


def log_lacking(mode: Mode, log: Log) -> None:
    """Log what the kernel lacks to confine workers."""
    if (what := lacking(mode)) is not None:
        log(f"{what}; they run without that", "warning")
