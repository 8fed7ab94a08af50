"""What a worker's process is lent: memory of its queue that outlives it (`Context`)."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from pathlib import Path

from nfq_agent import flow_memory
from nfq_agent.config.models import ElementSpec
from nfq_agent.context import Context, MidstreamMode
from nfq_agent.flow_memory import FlowMemory
from nfq_agent.host.shared_file import shared_memory

Warn = Callable[[str], object]


def lend(folder: Path, name: str, specs: list[ElementSpec], midstream: MidstreamMode, warn: Warn) -> Context:
    """What these elements need. folder: where the memory's files are. name: of the worker, unlike that of any other.

    Where the folder has no room, decided connections are remembered as long as the agent runs, which `warn` is told.
    """
    flows = None
    if any(spec.cls.keeps_flows_of(spec.options) for spec in specs):
        flows = FlowMemory(memoryview(_memory(folder / f"{name}.flows", flow_memory.SIZE, warn)), os.urandom(16))
    return Context(midstream=midstream, flows=flows)


def _memory(path: Path, size: int, warn: Warn) -> mmap.mmap:
    try:
        return shared_memory(path, size)
    except OSError as error:
        warn(f"{path} cannot be made: {error.strerror or error}; what is decided is forgotten when the agent ends")
        return mmap.mmap(-1, size)
