"""The worker of one `[inline.NAME]`: the programs, the pair of interfaces between kernel and worker, and a link for each side.

Only the worker's process keeps the links: when it dies the kernel detaches the programs, and traffic passes. Where the kernel has
no links the programs are filters, which stay: they pass everything once the heartbeat is stale, until they are removed here.
"""

from __future__ import annotations

import mmap
import os
import secrets
import socket
import struct
from collections.abc import Callable, Iterable
from typing import Final, Self

from nfq_agent.capture import handing, link_maps
from nfq_agent.capture.following import Followed
from nfq_agent.capture.inline import InlineSource
from nfq_agent.config.models import Config
from nfq_agent.counters import INLINE_COUNTERS
from nfq_agent.element_chain import ElementChain
from nfq_agent.host import bpf, filters, packet_socket, pairs
from nfq_agent.host.jail.calls import ProcessNeeds
from nfq_agent.host.own_process import OwnProcess
from nfq_agent.host.users import User
from nfq_agent.log import Log
from nfq_agent.service.element_log import ElementLog
from nfq_agent.service.flow_watch import FlowWatch
from nfq_agent.service.interface_worker import InterfaceWorker
from nfq_agent.service.packet_judge import WorkerSettings
from nfq_agent.service.packet_loop import WorkerLoop
from nfq_agent.service.worker import WorkerError, judged_now
from nfq_agent.verdict import ACCEPT, DROP

_VERDICTS: Final = {"accept": ACCEPT, "drop": DROP}
# Bytes on their way to the worker, and the room for them in the socket: the kernel counts up to three times a frame's bytes.
_MOST_BYTES: Final = 32 << 20
_ROOM: Final = 4 * _MOST_BYTES
# What the kernel's counts are called in the status.
_NAMES: Final = {
    "up": "up", "accepted": "decided_accepted", "dropped": "decided_dropped", "stale": "past_stale", "full": "past_full",
    "tagged": "past_tagged", "fragments": "past_fragments", "unread": "past_unread",
}  # fmt: skip


class InlineWorker(InterfaceWorker):
    """The process of one inline link, and the pair and programs that outlive it."""

    kind = "inline"
    columns = ("judged", "dropped", "would_drop")

    def __init__(self, name: str, config: Config, user: User, log: Log, close: Callable[[], Iterable[int]]) -> None:
        self.settings = config.inline[name]
        self.midstream = self.settings.midstream
        super().__init__(name, self.settings, config, user, log, close)
        self._loaded: bpf.Loaded | None = None
        self._socket: socket.socket | None = None
        self._pair = (0, 0)
        self._pair_links: list[int] = []
        self._hidden: set[int] = set()
        self._filters: filters.Filters | None = None

    def open(self) -> None:
        """Load the programs, make the pair, and listen for interfaces. Raises WorkerError, OSError; nothing is left then."""
        if (what := packet_socket.missing() or filters.missing(self.settings.attach)) is not None:
            raise WorkerError(f"{self.title}: it needs {what}")
        try:
            self._open()
        except BaseException:
            self.close()
            raise
        super().open()

    def _open(self) -> None:
        alias = f"{pairs.ALIAS}{self.instance}:{self.name}"
        pairs.sweep(alias)
        if filters.wanted(self.settings.attach):
            filters.sweep(alias)
            self._filters = filters.Filters(alias)
        loaded = self._loaded = bpf.load(bpf.OBJECT.read_bytes())
        with pairs.PairSocket() as writer:
            self._pair = writer.make_pair(*pairs.names(alias), alias)
        near, far = self._pair
        selection, settings = self.selection, self.settings
        loaded.maps["settings"].put(
            link_maps.ZERO,
            link_maps.settings(
                settings.patience,
                _MOST_BYTES,
                settings.max_waiting,
                near,
                secrets.randbits(32) | 1,
                selection.everything,
                settings.role,
            ),
        )
        loaded.maps["ports"].put(link_maps.ZERO, link_maps.ports(selection.tcp, selection.udp))
        self._socket = packet_socket.open_judged(far, _ROOM)
        self._pair_links = [
            self._attach(loaded.programs["back"], near, bpf.TCX_INGRESS),
            self._attach(loaded.programs["end"], far, bpf.TCX_INGRESS),
        ]

    def _attach(self, program: int, interface: int, side: int) -> int:
        attach = bpf.attach if self._filters is None else self._filters.attach
        return attach(program, interface, side)

    def close(self) -> None:
        """Remove the pair and unload the programs."""
        super().close()
        if self._filters is not None:
            self._filters.close()
            self._filters = None
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._pair[0]:
            with pairs.PairSocket() as writer:
                writer.remove(self._pair[0])
            self._pair = (0, 0)
        for descriptor in self._pair_links:
            os.close(descriptor)
        self._pair_links = []
        if self._loaded is not None:
            self._loaded.close()
            self._loaded = None

    @property
    def keeps(self) -> set[int]:
        """The socket, the maps and the programs."""
        if self._loaded is None or self._socket is None:
            return set()
        return {self._socket.fileno(), *self._loaded.descriptors, *self._pair_links}

    def differs(self, other: Self) -> bool:
        """By settings, or by an element's class or options."""
        return (
            self.settings != other.settings
            or self.specs != other.specs
            or self.names != other.names
            or self.confinement != other.confinement
        )

    def start(self) -> None:
        """Return the credits of frames that a dead worker had taken, fork, and attach."""
        assert self._loaded is not None
        with mmap.mmap(self._loaded.maps["live"].descriptor, mmap.PAGESIZE) as memory:
            up = struct.unpack_from("=QQ", memory, 8 * link_maps.UP)
            struct.pack_into("=QQQ", memory, 0, 0, *up)
        super().start()

    def enter(self, followed: Followed) -> None:
        """Attach to both sides of the interface and pass the links to the worker."""
        assert self._loaded is not None
        index = followed.link.index
        self._loaded.maps["interfaces"].put(struct.pack("=I", index), link_maps.no_counts())
        held: list[int] = []
        try:
            for name, side in (("from", bpf.TCX_INGRESS), ("to", bpf.TCX_EGRESS)):
                held.append(self._attach(self._loaded.programs[name], index, side))
            self._tell(f"link {index} {followed.row}", held)
        finally:
            for descriptor in held:
                os.close(descriptor)

    def left(self, followed: Followed) -> None:
        """Remove the kernel's counters of it."""
        if self._filters is not None:
            self._filters.detach(followed.link.index)
        if self._loaded is not None:
            self._loaded.maps["interfaces"].remove(struct.pack("=I", followed.link.index))

    def counts(self, followed: Followed) -> dict[str, int]:
        """What the worker counts of an interface, and what the kernel counts."""
        found = dict.fromkeys(INLINE_COUNTERS, 0) | super().counts(followed)
        if self._loaded is not None:
            value = self._loaded.maps["interfaces"].get(struct.pack("=I", followed.link.index))
            if value is not None:
                found.update({_NAMES[name]: count for name, count in link_maps.counts(value).items()})
        return found

    def look(self) -> None:
        """Log it if a foreign program is attached before ours: it may withhold packets."""
        super().look()
        if self._loaded is None or self.child is None:
            return
        for side in (bpf.TCX_INGRESS, bpf.TCX_EGRESS):
            for followed in self._follower.followed.values():
                try:
                    other = self._before_ours(followed.link.index, side)
                except OSError:
                    continue
                if other is not None and followed.link.index not in self._hidden:
                    self._hidden.add(followed.link.index)
                    self._log(
                        f"{self.title}: on {followed.link.name} {other} of another owner is attached before ours; "
                        "packets that it does not pass on are not judged",
                        "warning",
                        inline=self.name,
                    )

    def _before_ours(self, interface: int, side: int) -> str | None:
        assert self._loaded is not None
        if self._filters is not None:
            found = self._filters.before_ours(interface, side)
            return None if found is None else f"the filter with preference {found.preference}"
        programs = bpf.query(interface, side).programs
        first = bpf.program_id(self._loaded.programs["from" if side == bpf.TCX_INGRESS else "to"])
        return f"program {programs[0]}" if programs and programs[0] != first else None

    @property
    def hidden(self) -> int:
        """Interfaces on which a program of others was seen before ours."""
        return len(self._hidden & set(self._follower.followed))

    def body(self, control: socket.socket) -> None:
        """Judge packets until told to stop."""
        assert self._loaded is not None
        assert self._socket is not None
        settings = self.settings
        emit = self.prepare()
        # Opened before anything is given up that comes after the fork.
        removal = pairs.Removal(self._pair[0])
        needs = ProcessNeeds(
            sends=((frozenset((removal.fileno(),)), removal.headers),), many=frozenset((self._socket.fileno(),)),
            maps=True, gets=((263, 6),),
        )  # fmt: skip
        maps = self._loaded.maps
        source = InlineSource(self._socket, maps["live"], maps["flows"], settings.patience, self.table)
        handed = handing.Handed(control, self.words(source, "link", 2))
        default, on_error = _VERDICTS[settings.default], _VERDICTS[settings.on_error]
        monitor = settings.mode == "monitor"
        log = ElementLog(emit, self.counters.suppress)
        elements = [spec.cls(spec.name, spec.options, log.of(spec)) for spec in self.specs]
        chain = ElementChain(elements, default, monitor=monitor, context=self.lent)
        loop = WorkerLoop(
            source,
            chain,
            WorkerSettings(number=-1, default=default, on_error=on_error, monitor=monitor, drop_lines=self.drop_lines),
            self.counters,
            handed,
            emit,
            # The source has sent it, as a frame.
            lambda _packet, _interface: None,
            OwnProcess(self.pulse.beat, self.confinement.with_needs(needs).close),
            by_flow=source,
            watch=FlowWatch(self.ring, chain, {"inline": self.name}),
            moment=judged_now if chain.follows else None,
        )
        try:
            loop.run()
        finally:
            if handed.ended:
                # No other process is left to remove it.
                removal.send()
