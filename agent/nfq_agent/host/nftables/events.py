"""The kernel's events that the ruleset of nf_tables changed: netlink group NFNLGRP_NFTABLES (linux/netfilter/nfnetlink.h)."""

from __future__ import annotations

import errno
import os
import socket
from typing import Final

_NETLINK_NETFILTER: Final = 12
_NFNLGRP_NFTABLES: Final = 7
_RECEIVE: Final = 1 << 16
# A transaction may be thousands of messages: the others stay for the next call.
_MOST: Final = 256


class RulesetEvents:
    """A socket that becomes readable when another process changes the ruleset. The event says that it changed, not what."""

    def __init__(self) -> None:
        """Raises OSError where this process may not listen."""
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        self._socket = socket.socket(socket.AF_NETLINK, kind, _NETLINK_NETFILTER)
        try:
            self._socket.bind((0, 1 << (_NFNLGRP_NFTABLES - 1)))
        except BaseException:
            self._socket.close()
            raise

    def fileno(self) -> int:
        """For a selector."""
        return self._socket.fileno()

    def drain(self) -> None:
        """Read what has arrived. What did not fit into the socket's buffer is not lost: the socket stays readable."""
        for _ in range(_MOST):
            try:
                self._socket.recv(_RECEIVE)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise OSError(error.errno, f"the events of nf_tables: {os.strerror(error.errno or 0)}") from error

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()
