"""What the tests of the proxy share: its descriptors and its memory."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path

from proxied import Proxied

MB = 1 << 20

Run = Callable[..., Proxied]


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def memory(pid: int) -> int:
    """Bytes that a process alone has. Its part of what is shared (PSS) would change with every other child of the test runner."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(size) for size in re.findall(r"^Private_\w+:\s+(\d+) kB", text, re.M)) * 1024


def wait_until_released(proxy: Proxied, base: int, seconds: float = 60) -> None:
    """Wait until no connection is left in the proxy, by its own count and by the kernel's."""
    deadline = time.monotonic() + seconds
    while True:
        active, there = proxy.counters.snapshot()["active"], descriptors(proxy.pids[0])
        if active == 0 and there == base:
            return
        assert time.monotonic() < deadline, f"{active} connections and {there - base} descriptors are left"
        time.sleep(0.01)
