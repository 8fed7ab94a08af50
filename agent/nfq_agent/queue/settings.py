"""The settings of a queue: their values and limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from nfq_agent.host.nfqueue.messages import COPY_MODES, Flag

Copy = Literal["packet", "meta"]
BoundFamily = Literal["unspec", "inet", "inet6"]

FLAGS: Final = {"fail_open": Flag.FAIL_OPEN, "gso": Flag.GSO, "uid_gid": Flag.UID_GID}


@dataclass(frozen=True, slots=True)
class QueueSettings:
    """The settings in force, as the kernel acknowledged them. See `Queue` for each."""

    copy: Copy
    copy_range: int
    max_len: int
    fail_open: bool
    gso: bool
    uid_gid: bool


def check_settings(settings: QueueSettings) -> None:
    """Raise ValueError for a value that is not allowed."""
    copy: str = settings.copy
    if copy not in COPY_MODES:
        reason = ": with mode none the kernel loses every packet of the queue" if copy == "none" else ""
        raise ValueError(f"copy {copy!r}{reason}; allowed: packet, meta")
    if not 1 <= settings.copy_range <= 0xFFFF:
        raise ValueError(f"copy_range {settings.copy_range}; allowed: 1 to 65535")
    if not 1 <= settings.max_len <= 0xFFFFFFFF:
        raise ValueError(f"max_len {settings.max_len}; allowed: 1 to 4294967295")
