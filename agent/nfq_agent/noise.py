"""Whether bytes look random: encrypted or compressed, without a header of any protocol.

A guess, reported as a guess.
"""

from __future__ import annotations

from typing import Final

# Fewer bytes are not enough.
_LEAST: Final = 64
_MOST: Final = 1024
# Set bits in a byte: 4 on average in noise, and of n bytes within 3 standard deviations, sqrt(2 / n) each.
_MEAN: Final = 4.0
_DEVIATIONS: Final = 3.0
# Text at the beginning, or in half of the payload, is not noise.
_FIRST: Final = 6
_PRINTABLE: Final = bytes(range(0x20, 0x7F))


def looks_encrypted(data: bytes) -> bool:
    """True for a payload whose bits are distributed randomly, and that has no text in it."""
    data = data[:_MOST]
    size = len(data)
    if size < _LEAST:
        return False
    bits = int.from_bytes(data, "big").bit_count() / size
    if abs(bits - _MEAN) > _DEVIATIONS * (2 / size) ** 0.5:
        return False
    if not data[:_FIRST].translate(None, _PRINTABLE):
        return False
    text = size - len(data.translate(None, _PRINTABLE))
    # Three in eight bytes of noise are printable. Of 64 bytes of noise some 52 differ, of text or numbers far fewer.
    return 2 * text < size and len(set(data[:_LEAST])) >= 44
