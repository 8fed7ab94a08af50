"""The hand-over of places (a place is what one worker serves) to workers that are prepared for it: events in, commands out.

The whole state machine is the table below. A place is never served by two, and nothing is begun before every successor could
serve: until then the predecessors keep serving whatever happens. To change it: change the table, then the words beside it.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from enum import Enum, auto
from typing import Final, Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class Stage(Enum):
    """Where the hand-over of one place stands."""

    PREPARING = auto()
    """The successor is being started; the predecessor serves, if there is one."""
    PREPARED = auto()
    """The successor could serve; others are not so far."""
    HANDING = auto()
    """The predecessor was told to stop: it answers what it has read."""
    ENDING = auto()
    """The predecessor did not stop and was killed."""
    SERVING = auto()
    """The successor serves."""
    REFUSED = auto()
    """Some successor could not be prepared: the predecessor keeps serving."""


class Happening(Enum):
    """What happened at a place."""

    READY = auto()
    """The successor could serve."""
    FAILED = auto()
    """The successor cannot be prepared."""
    DONE = auto()
    """The predecessor has stopped reading, and every packet that it read has its verdict."""
    ENDED = auto()
    """The predecessor has ended without saying that it is done."""
    LATE = auto()
    """The predecessor has had its time."""


class Command(Enum):
    """What is to be done at a place."""

    STOP = auto()
    """Tell the predecessor to stop."""
    KILL = auto()
    """Kill the predecessor."""
    KEEP_BESIDE = auto()
    """Keep the successor's control socket for the next agent, beside the predecessor's."""
    BEGIN = auto()
    """Tell the successor to serve: nothing is owed."""
    KEEP = auto()
    """Keep the successor's control socket alone: the predecessor serves no more. Packets do not wait for this."""
    TAKE_LOST = auto()
    """Tell the successor to serve, and to queue again what a predecessor had read."""
    END_NEW = auto()
    """End the successor, which serves nothing."""


_TABLE: Final[Mapping[tuple[Stage, Happening], tuple[Stage, tuple[Command, ...]]]] = {
    (Stage.PREPARING, Happening.READY): (Stage.PREPARED, ()),
    (Stage.PREPARING, Happening.FAILED): (Stage.REFUSED, (Command.END_NEW,)),
    (Stage.HANDING, Happening.DONE): (Stage.SERVING, (Command.BEGIN, Command.KEEP)),
    (Stage.HANDING, Happening.ENDED): (Stage.SERVING, (Command.TAKE_LOST, Command.KEEP)),
    (Stage.HANDING, Happening.LATE): (Stage.ENDING, (Command.KILL,)),
    # It may have finished between the last look at it and the kill.
    (Stage.ENDING, Happening.DONE): (Stage.SERVING, (Command.BEGIN, Command.KEEP)),
    (Stage.ENDING, Happening.ENDED): (Stage.SERVING, (Command.TAKE_LOST, Command.KEEP)),
    # A predecessor that ends early is noticed when its place is handed over.
    (Stage.PREPARING, Happening.ENDED): (Stage.PREPARING, ()),
}
# What is done when the last successor is prepared, by whether the place has a predecessor.
_BEGUN: Final[Mapping[bool, tuple[Stage, tuple[Command, ...]]]] = {
    True: (Stage.HANDING, (Command.KEEP_BESIDE, Command.STOP)),
    False: (Stage.SERVING, (Command.KEEP_BESIDE, Command.TAKE_LOST, Command.KEEP)),
}


class Succession(Generic[K]):
    """The hand-over of several places together."""

    def __init__(self, places: Mapping[K, bool]) -> None:
        """places: each with whether a predecessor serves it."""
        self._served = dict(places)
        self.stages = dict.fromkeys(places, Stage.PREPARING)

    def on(self, place: K, event: Happening) -> list[tuple[K, Command]]:
        """Take an event in; returns the commands, in order. Raises KeyError for an event that cannot come at this stage."""
        stage, commands = _TABLE[self.stages[place], event]
        self.stages[place] = stage
        todo = [(place, command) for command in commands]
        if stage is Stage.REFUSED:
            for other, its in self.stages.items():
                if its in (Stage.PREPARING, Stage.PREPARED):
                    self.stages[other] = Stage.REFUSED
                    todo.append((other, Command.END_NEW))
        elif all(each is Stage.PREPARED for each in self.stages.values()):
            for other, served in self._served.items():
                self.stages[other], commands = _BEGUN[served]
                todo += [(other, command) for command in commands]
        return todo

    @property
    def over(self) -> bool:
        """Whether nothing is left to be done."""
        return all(stage in (Stage.SERVING, Stage.REFUSED) for stage in self.stages.values())
