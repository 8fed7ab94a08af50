"""What a worker lends its elements: how they treat what began before, and memory that outlives the worker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nfq_agent.flow_memory import FlowMemory

# What becomes of a connection whose beginning was not seen. judge: what its next message says decides, else the policy's default.
MidstreamMode = Literal["accept", "drop", "judge"]


@dataclass(frozen=True, slots=True)
class Context:
    """midstream: for a connection whose beginning was not seen. flows: connections that were decided; None keeps none."""

    midstream: MidstreamMode = "accept"
    flows: FlowMemory | None = None
