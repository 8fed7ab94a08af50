"""Under which name the store has the control socket of the process that serves a queue: two while it is handed over, else one.

A process serves as long as the store, or an agent, has the other end of its control socket. The service manager keeps no socket
under two names.
"""

from __future__ import annotations

from typing import Final

from nfq_agent.host.child import Child
from nfq_agent.service.store import Store

_NAME: Final = "control"


class StoredControl:
    """Of one queue number."""

    def __init__(self, number: int) -> None:
        self.alone = f"worker-{number}"
        self._note = f"queue-{number}"
        self._beside = f"coming-{number}"
        self._name = self.alone

    @property
    def noted(self) -> dict[str, str]:
        """Which of the two belongs to the process that serves, for `adopt`."""
        return {_NAME: self._name}

    def adopt(self, store: Store, title: str) -> Child | None:
        """Take over the process that served last. A hand-over that was not finished left another one: it ends by itself."""
        noted = store.noted(self._note)
        names = [self.alone, self._beside]
        if noted.get(_NAME) == self._beside and self._beside in store.waiting(self._beside):
            names.reverse()
        child = Child.adopted(title, store.take(names[0]), noted.get("process"))
        store.discard(names[1])
        # The name for a successor becomes free.
        store.drop(self._beside)
        if child is not None:
            store.put(self.alone, child.control.fileno(), True)
        if noted.get(_NAME) == self._beside:
            store.note(self._note, {**noted, _NAME: self.alone})
        return child

    def keep_beside(self, store: Store, child: Child | None) -> None:
        """Keep the control socket of a process that waits, beside that of the one that serves. Raises OSError."""
        if child is None:
            return
        store.put(self._beside, child.control.fileno(), True)
        self._name = self._beside

    def keep_alone(self, store: Store) -> None:
        """The other process serves no more, and the one that waited is to have its name. Raises OSError."""
        store.drop(self._beside)
        self._name = self.alone
