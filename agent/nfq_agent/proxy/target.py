"""Resolves a proxy's target in a separate thread, since a resolver may be slow."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Sequence
from ipaddress import ip_address
from typing import Final

from nfq_agent.element import Emit
from nfq_agent.proxy.dialer import Candidate
from nfq_agent.values import Endpoint

# Seconds that the start waits for the name to be resolved, and between two attempts.
WAIT: Final = 3.0
AGAIN: Final = 5.0


def is_literal(host: str) -> bool:
    """Whether a target is an address, which needs no resolver."""
    try:
        ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


class TargetResolver:
    """Resolves the target once; retries until that succeeds."""

    def __init__(
        self,
        name: str,
        target: tuple[str, int],
        found: Callable[[Sequence[Candidate]], bool],
        emit: Emit,
    ) -> None:
        """name: of the proxy. found: gets the addresses, and returns whether one of them can be used."""
        self._target = target
        self._where = f"proxy {name}: target {Endpoint(*target)}"
        self._found = found
        self._emit = emit
        self._resolved = threading.Event()

    def start(self, wait: float = WAIT) -> None:
        """Begin, and return when it has succeeded or failed once, or after `wait` seconds. An address needs no thread."""
        if is_literal(self._target[0]):
            self._resolve()
            return
        threading.Thread(target=self._resolve, daemon=True).start()
        self._resolved.wait(wait)

    def _resolve(self) -> None:
        failed = False
        while True:
            try:
                answer = socket.getaddrinfo(*self._target, type=socket.SOCK_STREAM)
                break
            except OSError as error:
                if not failed:
                    self._emit(
                        f"{self._where} cannot be resolved: {error.strerror}; connections that need it are refused until it "
                        "can be",
                        level="error",
                    )
                failed = True
                self._resolved.set()
                time.sleep(AGAIN)
        candidates: list[Candidate] = [(family, address) for family, _, _, _, address in answer]
        if not self._found(candidates):
            self._emit(f"{self._where} is a listener of this agent; it is not used", level="error")
        elif failed:
            self._emit(f"{self._where} is resolved: {', '.join(str(Endpoint(*address[:2])) for _, address in candidates)}")
        self._resolved.set()
