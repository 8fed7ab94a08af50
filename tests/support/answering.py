"""A running agent as the verbs see it: its control socket, with answers that the test chooses."""

from __future__ import annotations

import selectors
import threading
from typing import Any

from nfq_agent.service import control


class Answering:
    """An agent's control socket that gives one answer to everything."""

    def __init__(self) -> None:
        self.reply: dict[str, Any] = {}
        self.asked: list[dict[str, Any]] = []
        # After so many answers it ends, and its socket with it.
        self.answers: int | None = None
        self._ended = False
        self._selector = selectors.DefaultSelector()
        self._server = control.Server("default")
        self._server.serve(self._selector, self._respond)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _respond(self, question: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(question)
        return self.reply

    def _run(self) -> None:
        while not self._ended and (self.answers is None or len(self.asked) < self.answers):
            for key, _ in self._selector.select(0.02):
                key.data()
        self._server.close()

    def close(self) -> None:
        self._ended = True
        self._thread.join()
        self._selector.close()
