"""`offload`: has the kernel keep the verdict on a flow, in its connection mark, so that its later packets are not queued."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from nfq_agent import element
from nfq_agent.element import Emit, Needs, PacketElement
from nfq_agent.flow import Flow, Watch
from nfq_agent.mark import Kept, MarkField, kept
from nfq_agent.packet import Packet
from nfq_agent.verdict import Action, Verdict


class OffloadOptions(element.Options):
    """mark: value and mask; all bits of the mask are ours, on packets and connections. generation: of the policy.

    The agent raises the generation when the policy of a queue changes, so that no flow keeps the verdict of the previous policy.
    """

    mark: MarkField
    generation: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _wide_enough(self) -> Self:
        if self.mark.mask.bit_count() < 3 or self.mark.value == 0:
            raise ValueError(
                f"mark {self.mark} leaves no room for accepted, denied and a changed policy; "
                'allowed: a value other than 0, and at least 3 bits, as in "0x4e000000/0xff000000"'
            )
        return self


class Offload(PacketElement[OffloadOptions]):
    """Turns the verdict on a packet, where it holds for the flow, into that mark and REPEAT.

    The packet then goes through our rules again (see `rules`): they save the mark in the connection, and accept or drop
    this packet and all that follow, in both directions. Verdicts that are more than accept or drop stay unchanged.
    """

    needs = Needs.METADATA
    lasting = True
    facts_read = ()
    amends_lasting = True

    def __init__(self, name: str, options: OffloadOptions, emit: Emit) -> None:
        super().__init__(name, options, emit)
        self._marks = {Action.ACCEPT: self.kept_of(options).accept, Action.DROP: self.kept_of(options).deny}
        self._untracked = False

    @classmethod
    def kept_of(cls, options: OffloadOptions) -> Kept:
        """The marks that the rules look for."""
        return kept(options.mark, options.generation)

    def watches(self, flow: Flow) -> int:
        """Nothing: its answer depends only on whether the verdict lasts."""
        return Watch.NOTHING

    def foresee_lasting(self, verdict: Verdict) -> Verdict | None:
        """The same with its mark."""
        mark = self._marks.get(verdict.action) if verdict.plain else None
        return None if mark is None else Verdict(Action.REPEAT, mark=mark.value, means=verdict.action)

    def amend(self, packet: Packet, flow: Flow | None, verdict: Verdict, lasting: bool) -> Verdict:
        """REPEAT with the mark, or the verdict itself if it does not last, or if the packet has the mark already."""
        if not lasting or not verdict.plain or (mark := self._marks.get(verdict.action)) is None:
            return verdict
        if packet.mark & mark.mask == mark.value:
            # The packet came back and no rule matched it: the kernel does not track its connection. Do not repeat it.
            if not self._untracked:
                self._untracked = True
                self.emit(
                    f"{self.name}: {packet!r} belongs to no tracked connection; such packets are judged one by one",
                    level="warning",
                )
            if flow is not None:
                flow.kept = None
            return verdict
        if flow is not None:
            flow.kept = flow.last if flow.kept is None else flow.kept
        return Verdict(Action.REPEAT, mark=mark.on(packet.mark), means=verdict.action)
