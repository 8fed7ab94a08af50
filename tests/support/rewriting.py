"""An element that a configuration of the tests names by its import path."""

from __future__ import annotations

from nfq_agent import PacketElement


class Rewriter(PacketElement):
    """A packet element that rewrites."""

    rewrites = True
