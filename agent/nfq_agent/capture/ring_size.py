"""How much memory the rings of a tap get with `ring = "auto"`. Values only: nothing here opens a socket."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

# A worker that gets no processor, or falls behind in a burst, loses what its ring cannot hold. The kernel allocates a ring whole,
# so a hundred interfaces cannot have one for a second of small packets each.
MOST: Final = 16_000_000
LEAST: Final = 2_000_000
# What all rings together may have above the least, in bytes.
SHARED: Final = 64_000_000


def ring_size(others: Collection[int]) -> int:
    """Bytes of the next ring. others: the sizes of those that are open.

    At most half of what is left of SHARED, so that later interfaces get some: 16 MB for the first three, then less and less.
    """
    left = SHARED - sum(size - LEAST for size in others if size > LEAST)
    return max(LEAST, min(MOST, LEAST + left // 2))
