"""Elements: small classes that examine a packet and may answer. `element_chain.py` asks them in order.

An element knows no other element, reads no clock and does no I/O of its own: events go through `emit`.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, get_args

from nfq_agent.access import HasAccess
from nfq_agent.compiled import Compilable
from nfq_agent.context import Context
from nfq_agent.flow import Account, Flow, Watch
from nfq_agent.foresight import Foreseeable
from nfq_agent.mark import Kept
from nfq_agent.packet import Packet
from nfq_agent.verdict import Verdict

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    from nfq_agent.options import Options as Options

    O = TypeVar("O", bound=Options, default=Any)  # noqa: E741  # a type variable
else:
    from typing import TypeVar

    # The default of a type variable is one of typing_extensions, which pydantic needs, and nothing else.
    O = TypeVar("O")  # noqa: E741  # a type variable

    def __getattr__(name: str) -> Any:
        # Not loaded before an element is: it needs pydantic.
        if name != "Options":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from nfq_agent.options import Options

        return Options


Emit = Callable[..., None]


class Needs(IntEnum):
    """How much of a packet an element reads; copy range and decoding follow from the most that a chain asks for."""

    METADATA = 0
    HEADERS = 1
    PAYLOAD = 2
    FLOW = 3


def options_of(cls: type[Any]) -> type[Options] | None:
    """The model that an element names as its parameter, as in `PacketElement[MyOptions]`; None if it names none."""
    arguments = [each for base in cls.__dict__.get("__orig_bases__", ()) for each in get_args(base) if isinstance(each, type)]
    if arguments:
        from nfq_agent.options import Options

        return next((each for each in arguments if issubclass(each, Options)), None)
    return None


class _NoOptions:
    """`Options` of an element that names none: the base of them all."""

    def __get__(self, element: object, cls: type[Any]) -> type[Options]:
        from nfq_agent.options import Options

        return Options


class HasOptions:
    """The part of an element that says which options its table takes: `Options`, or the parameter of its base."""

    if TYPE_CHECKING:
        Options: ClassVar[type[Options]] = Options
    else:
        Options = _NoOptions()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "Options" not in cls.__dict__ and (model := options_of(cls)) is not None:
            cls.Options = model


class PacketElement(HasOptions, HasAccess, Foreseeable, Compilable, Generic[O]):
    """Base of every element that judges packets.

    The model of its table is the parameter of its base, as in `class MyElement(PacketElement[MyOptions])`, or its attribute
    `Options`. `emit(message, level="info", **fields)` emits one event; it never blocks, and may suppress events that come too
    fast.

    `needs`: how much of the packet it reads. `rewrites`: it may answer with a changed payload.
    `rewrites_small`: it may, for packets alone that no offload joins (a SYN). `pure`: the answer follows from
    protocol, addresses, ports, hook and interfaces alone, so that the worker may remember it. `lasting`: the answer, None too,
    holds for the whole flow from then on, unless `flow.undecided`. `reads_process`: it reads uid or gid. `degrades`: it works,
    with less to report, where the kernel shows metadata alone. An instance may set `needs`, `pure`, `lasting` and
    `reads_process` for itself, by its options. `keeps_facts`: the facts that it puts into flows; a rule on a fact needs such an
    element before it. `access`: what it needs besides packets, as files or sockets (`nfq_agent.access`).

    `answers`: False for one whose `decide` always returns None.

    `context`: what the worker lends, set before `start`. `facts_read`: the facts that its answers follow from, None for any.
    Where each element of a chain names them, later HTTP requests for the same host need not be shown to it if it reads no more
    than the host.

    The time is `packet.time`: the worker stamps packets that the kernel did not stamp.
    """

    context: Context = Context()
    needs: Needs = Needs.HEADERS
    rewrites: ClassVar[bool] = False
    rewrites_small: ClassVar[bool] = False
    pure: bool = False
    lasting: bool = False
    reads_process: bool = False
    degrades: ClassVar[bool] = False
    answers: ClassVar[bool] = True
    keeps_facts: ClassVar[tuple[str, ...]] = ()
    facts_read: tuple[str, ...] | None = None

    def __init__(self, name: str, options: O, emit: Emit) -> None:
        self.name = name
        self.options = options
        self.emit = emit

    @classmethod
    def needs_of(cls, options: O) -> Needs:
        """How much an element with these options reads: `needs`, unless a subclass knows it more exactly."""
        return cls.needs

    @classmethod
    def logs_drops_of(cls, options: O) -> Literal["all", "own", "none"]:
        """Which drops an element with these options logs or records: those of its whole chain, its own, or none."""
        return "none"

    @classmethod
    def reads_process_of(cls, options: O) -> bool:
        """Whether an element with these options looks at uid or gid: `reads_process`, unless a subclass knows it more exactly."""
        return cls.reads_process

    @classmethod
    def reads_owner_of(cls, options: O) -> bool:
        """Whether an element with these options asks who a flow belongs to (`context.owners`)."""
        return False

    @classmethod
    def reads_program_of(cls, options: O) -> bool:
        """Whether it asks for the program of a flow's process (`exe`) as well."""
        return False

    @classmethod
    def facts_of(cls, options: O) -> tuple[str, ...]:
        """The facts that an element with these options needs another one, before it in the chain, to put into flows."""
        return ()

    @classmethod
    def rewrites_of(cls, options: O) -> bool:
        """Whether an element with these options may change payloads: `rewrites`, unless a subclass knows it more exactly."""
        return cls.rewrites

    @classmethod
    def kept_of(cls, options: O) -> Kept | None:
        """The connection marks by which the kernel keeps verdicts on flows, None if the element keeps none there."""
        return None

    @classmethod
    def keeps_flows_of(cls, options: O) -> bool:
        """Whether an element with these options judges flows by what they said, which is to outlive the worker."""
        return False

    @classmethod
    def names_of(cls, options: O) -> tuple[str, ...]:
        """Patterns of the names for which an element with these options has to know the addresses that DNS answers gave."""
        return ()

    @classmethod
    def rules_of(cls, options: O) -> tuple[str, ...]:
        """The labels under which it counts in `context.decisions`; empty for an element without rules."""
        return ()

    @classmethod
    def denies_of(cls, options: O) -> bool:
        """Whether an element with these options blocks traffic by a policy, which overload must not undo without a warning."""
        return False

    @classmethod
    def injects_of(cls, options: O) -> bool:
        """Whether an element with these options gives verdicts with packets to be sent besides (`Verdict.inject`)."""
        return False

    def start(self) -> None:
        """Called once in the worker, before the first packet."""

    def stop(self) -> None:
        """Called once in the worker, after the last packet."""

    def decide(self, packet: Packet, flow: Flow | None) -> Verdict | None:
        """The verdict on this packet, or None to leave it to the next elements. `flow` is None unless needs is FLOW."""
        return None

    def rule(self, packet: Packet, flow: Flow | None) -> str:
        """The rule of its latest answer, which was for this packet; empty for an element without rules."""
        return ""

    def watches(self, flow: Flow) -> int:
        """Which packets of this flow it has to be shown from now on; asked after each packet of the flow that it was shown.

        What it does not ask for, it promises to answer as it answered that packet, in either direction and at any hook: it is not
        called for it. All packets, unless a subclass knows it more exactly. The beginning and the end of a TCP connection,
        and the first two datagrams of a UDP flow, are always shown.
        """
        return Watch.ALL

    def amend(self, packet: Packet, flow: Flow | None, verdict: Verdict, lasting: bool) -> Verdict:
        """The verdict that was chosen, or another in its place. lasting: it holds for the whole flow."""
        return verdict

    def follow(self, packet: Packet, flow: Flow, verdict: Verdict, account: Callable[[Flow], Account | None]) -> None:
        """Called after each packet that the chain was shown, with its verdict. account: what has passed of a flow so far.

        It causes no more packets to be shown: those that no element has to see still pass without the chain.
        """

    def forgotten(self, flow: Flow, account: Account, stopped: bool) -> None:
        """Called when a flow is forgotten, or the worker stops."""

    def tick(self, now: float, account: Callable[[Flow], Account | None]) -> None:
        """Called a few times a second. now: seconds, on the clock of `Flow.last`."""

    def judged(self, packet: Packet, flow: Flow | None, verdict: Verdict) -> bool | None:
        """Called with the verdict of a packet of this element's chain, after it was given.

        flow: the packet's, where some element of the chain needs FLOW. With False the later elements that listen are not
        called for this packet.
        """
