"""What the elements of a chain answer to the opening of a flow, by its five-tuple and its name alone. No I/O, no clock.

Where every element can tell that, flows that are accepted need not be shown (nfq_agent.openings).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Final, NamedTuple

from nfq_agent.decisions import Decisions
from nfq_agent.flow import NAME_FACTS, Asked, Exchange, Flow
from nfq_agent.flow_memory import FlowMemory, text_of
from nfq_agent.packet import FiveTuple
from nfq_agent.patterns import Patterns
from nfq_agent.protocols import dns, http1, tls
from nfq_agent.unshown import DETAILS, details_of, facts_of, facts_so_far
from nfq_agent.verdict import ACCEPT, Verdict

# Servers whose openings are read in a way of their own.
APART: Final = dns.PORTS
# What an opening says besides its protocol and its name, and what follows from that, as far as it is not told.
_UNTOLD: Final = frozenset((*http1.PROTOCOL.facts, *tls.PROTOCOL.facts, "dot", "encrypted", "dpi_reason")) - {
    *NAME_FACTS.values(),
    *DETAILS,
}


# What a message of DNS says besides its name.
_DNS_DETAILS: Final = frozenset(dns.PROTOCOL.facts) - {NAME_FACTS["dns"]}
_DATAGRAMS: Final = (Asked.DNS, Asked.DNS_AGAIN, Asked.QUIET, Asked.GAVE_UP)
# Elements of a chain: what finds the facts, and those that judge.
_MOST: Final = 5


# What the packets of one message are together, at most, whose beginning passes without an element (nfq_agent.first_message).
BEGUN_PACKETS: Final = 8
BEGUN_BYTES: Final = 4096


class Foreseen(NamedTuple):
    """What an element answers. open: for the packet alone. reason: of the answer, for the facts of the flow; None for none.

    kept: of an open answer, the facts that the flow memory keeps.
    """

    verdict: Verdict | None
    open: bool = False
    reason: str | None = None
    kept: Mapping[str, Any] | None = None


class Foreseeable:
    """The part of an element (nfq_agent.element) that tells its answers to openings. None unless `parts_read` says so."""

    facts_read: tuple[str, ...] | None = None
    keeps_facts: ClassVar[tuple[str, ...]] = ()
    # Datagrams, and their bytes, for which its answer to a flow that says nothing stays the same.
    patience: tuple[int, int] = (1 << 16, 1 << 30)
    # Whether `patterns_read` has those for the names of DNS.
    questions_fit: bool = True
    # It changes no verdict that is for one packet alone.
    amends_lasting: ClassVar[bool] = False

    def foresee_lasting(self, verdict: Verdict) -> Verdict | None:  # noqa: ARG002  # for those that can tell
        """What it makes of a verdict that lasts, on a packet without a mark; None where that follows from other things too."""
        return None

    def parts_read(self) -> tuple[str, ...] | None:
        """The parts of a flow's five-tuple ("src", "sport", "dst", "dport") from which its answers to an opening follow, together
        with `facts_read`; None if they follow from other things too. Asked after `context` is set."""
        return None

    def patterns_read(self) -> Sequence[Patterns] | None:
        """Patterns for names from which its answers to an opening follow; None if they follow from the whole name."""
        return None if self.facts_read is None or set(NAME_FACTS.values()) & set(self.facts_read) else ()

    def foresee(self, origin: FiveTuple, facts: Mapping[str, Any]) -> Foreseen:
        """Its answer to a packet of a flow with these facts, where `parts_read` is not None."""
        raise NotImplementedError

    def adopt(self, flow: Flow) -> None:
        """Take over a flow of which it was shown nothing, since it was asked for its answers before (`flow.opening`)."""


class Foresight:
    """The answers of these elements. default: the verdict if none of them answers. memory: where decided flows are kept.

    lasting: what is made of an accept that lasts, on a packet without a mark. None: only what comes before the first message is
    answered.

    decisions: where the elements count what their rules decide.

    possible: whether they can be told. reads: the parts of the five-tuple from which they follow. tell: what else they follow
    from, of a ClientHello; None where they do not. questions: whether those to messages of DNS can be told. patience: how many
    datagrams, of how many bytes, may say nothing before they may change; 0 for none.
    """

    def __init__(
        self,
        elements: Sequence[Foreseeable],
        default: Verdict,
        memory: FlowMemory | None,
        lasting: Verdict | None,
        decisions: Decisions | None = None,
    ) -> None:
        self._elements = elements
        self._default = default
        self.memory = memory
        self.decisions = Decisions() if decisions is None else decisions
        self.lasting = lasting
        self.reads: set[str] = set()
        self.tell: Callable[[bytes], bytes] | None = None
        self.questions = False
        self.patience = (0, 0)
        # What finds the facts has to stand before those that judge by them.
        # More could not be counted (nfq_agent.openings).
        self.possible = 0 < len(elements) <= _MOST and elements[0].keeps_facts != ()
        for element in elements:
            parts, facts = element.parts_read(), element.facts_read
            if parts is None or facts is None or not _UNTOLD.isdisjoint(facts):
                self.possible = False
                return
            self.reads |= set(parts)
            if not set(DETAILS).isdisjoint(facts):
                self.tell = details_of
        if lasting is ACCEPT:
            self.questions = all(e.questions_fit and _DNS_DETAILS.isdisjoint(e.facts_read or ()) for e in elements)
            self.patience = min(e.patience[0] for e in elements), min(e.patience[1] for e in elements)

    @property
    def names(self) -> list[tuple[frozenset[str], frozenset[str]]] | None:
        """The groups of patterns from which the answers follow (nfq_agent.name_class); None if more of a name has to be known."""
        found = []
        for element in self._elements:
            if (patterns := element.patterns_read()) is None:
                return None
            for each in patterns:
                if (plain := each.plain) is None:
                    return None
                found.append(plain)
        return list(dict.fromkeys(found))

    def answer(self, asked: str, origin: FiveTuple, name: str, details: bytes = b"") -> tuple[bytes, Sequence[int]] | None:
        """The facts of a connection that is accepted, for the flow memory, and the places of what decided in `decisions`.

        None for a flow whose packets are to be shown.

        asked: see Asked. A SYN is to be accepted for itself alone; a datagram that says nothing may be. name: empty for the
        beginning of a message, too. details: as `tell` gives them.
        """
        if asked and self.lasting is None:
            return None
        facts = facts_of(asked, name, details)
        is_datagram = asked in _DATAGRAMS
        places: list[int] = []
        for element in self._elements:
            verdict, is_open, reason, kept = element.foresee(origin, facts)
            if not name and reason is not None and not is_datagram:
                return (b"" if kept is None else text_of(kept), ()) if is_open and verdict is ACCEPT else None
            if is_open and asked != Asked.QUIET:
                return None
            if reason is not None and not is_open:
                facts["reason"] = reason
                place = self.decisions.place(reason)
                # What does not read the name has decided already.
                if place >= 0 and (asked != Asked.DNS_AGAIN or NAME_FACTS["dns"] in (element.facts_read or ())):
                    places.append(place)
            if verdict is not None:
                break
        else:
            verdict = None if self.lasting is None else self._default
        if verdict is not ACCEPT:
            return None
        return (text_of(facts) if name and not is_datagram else b"", places)

    def adopt(self, flow: Flow) -> None:
        """Let the elements take over a flow of which they were shown nothing, as if they had been."""
        opening = flow.opening
        assert opening is not None
        judged = bool(opening.protocol) or isinstance(opening, Exchange)
        facts: Mapping[str, Any] = facts_so_far(opening)
        for element in self._elements:
            element.adopt(flow)
            if judged and element.foresee(flow.origin, facts).verdict is not None:
                break
        flow.opening = None


def foresight_of(
    deciders: Sequence[Foreseeable],
    amenders: Sequence[Foreseeable],
    default: Verdict,
    memory: FlowMemory | None,
    decisions: Decisions | None = None,
    lasts: bool = True,
) -> Foresight | None:
    """The answers of elements that decide, and others that amend the verdicts; None where they cannot be told.

    lasts: what they come to after a first message lasts.
    """
    if not all(each.amends_lasting for each in amenders):
        return None
    lasting: Verdict | None = ACCEPT
    for each in amenders:
        lasting = each.foresee_lasting(lasting) if lasting is not None and lasts else None
    found = Foresight(deciders, default, memory, lasting, decisions)
    return found if found.possible else None
