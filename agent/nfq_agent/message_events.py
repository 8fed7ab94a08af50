"""What the packets of a flow show `dpi` about its messages, and the limits of a message. Values only."""

from __future__ import annotations

from enum import Enum
from typing import Any, Final, NamedTuple

# The limits of a message, after which it is given up: packets with payload, bytes, seconds.
PACKETS: Final = 32
BYTES: Final = 16384
SECONDS: Final = 10.0


class Event(Enum):
    """What a segment shows.

    MESSAGE: a whole message, `facts`. PART: the message that has begun is not whole; `facts` is what is known of it.
    ADDED: `facts` belong to the first message too. GAVE_UP: the message cannot be read, `reason`; nor can any later one.
    AHEAD: the segment comes before bytes that have to be read first. DIFFERS: two segments say different things about the same
    bytes, so that nothing is known of the connection, `reason`; nothing later will be read.
    """

    MESSAGE = "message"
    PART = "part"
    ADDED = "added"
    GAVE_UP = "gave up"
    AHEAD = "ahead"
    DIFFERS = "differs"


class Said(NamedTuple):
    """One event. conflict: the message has a name that is not known, and `reason` says why."""

    event: Event
    facts: dict[str, Any]
    reason: str = ""
    conflict: bool = False


AHEAD: Final = [Said(Event.AHEAD, {})]
