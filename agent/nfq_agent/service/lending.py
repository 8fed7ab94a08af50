"""What a worker's process is lent (`Context`): memory of its queue that outlives it, and the names that all workers know."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from pathlib import Path
from zlib import crc32

import nfq_agent.names
from nfq_agent import flow_memory
from nfq_agent.config.models import ElementSpec
from nfq_agent.config.name_needs import NameNeeds, learns
from nfq_agent.context import Context
from nfq_agent.flow_memory import FlowMemory
from nfq_agent.host.shared_file import shared_memory
from nfq_agent.names import NameTable
from nfq_agent.values import MidstreamMode

Warn = Callable[[str], object]


def lend(
    folder: Path, worker: tuple[str, str], specs: list[ElementSpec], midstream: MidstreamMode, needs: NameNeeds | None, warn: Warn
) -> Context:
    """What these elements need. folder: where the memory's files are. worker: the instance, and the worker's name in it.

    Where the folder has no room, what is known lasts as long as this worker is configured, and `warn` is called.
    """
    instance, name = worker
    flows = names = None
    if any(spec.cls.keeps_flows_of(spec.options) for spec in specs):
        flows = FlowMemory(memoryview(_memory(folder / f"{instance}.{name}.flows", flow_memory.SIZE, warn)), os.urandom(16))
    if needs is not None and any(name_part(spec) for spec in specs):
        memory = memoryview(_memory(folder / f"{instance}.names", nfq_agent.names.SIZE, warn))
        names = NameTable(memory, os.urandom(16), crc32(name.encode()) or 1, *needs)
        if not names.writes and any(map(learns, specs)):
            warn(f"more than {nfq_agent.names.REGIONS} workers see DNS answers: what this one sees is not used")
    return Context(midstream=midstream, flows=flows, names=names)


def name_part(spec: ElementSpec) -> bool:
    """Whether an element reads DNS answers for the table of names, or asks it."""
    return learns(spec) or bool(spec.cls.names_of(spec.options))


def _memory(path: Path, size: int, warn: Warn) -> mmap.mmap:
    try:
        return shared_memory(path, size)
    except OSError as error:
        warn(f"{path} cannot be made: {error.strerror or error}; what is decided is forgotten when the agent ends")
        return mmap.mmap(-1, size)
