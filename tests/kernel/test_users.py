"""Capabilities of this process: what it may have, and what it uses."""

from __future__ import annotations

import ctypes
import struct

import pytest
from forked import in_child

from nfq_agent.host.users import CAP_NET_ADMIN, CAP_NET_RAW, capabilities, use_permitted

pytestmark = pytest.mark.kernel

# capget(2), version 3: effective, permitted and inheritable, the lower words before the upper ones.
_HEAD = struct.pack("Ii", 0x20080522, 0)
_TWO = 1 << CAP_NET_ADMIN | 1 << CAP_NET_RAW


@pytest.mark.parametrize("effective", [0, 1 << CAP_NET_RAW, _TWO])
def test_what_the_file_of_a_program_permits_is_used(effective: int) -> None:
    def life() -> int:
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.capset(_HEAD, struct.pack("6I", effective, _TWO, 0, 0, 0, 0)) == 0
        assert capabilities() == effective
        use_permitted()
        assert capabilities() == _TWO
        return 0

    done = in_child(life)
    assert (done.returncode, done.stderr) == (0, "")
