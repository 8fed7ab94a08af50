"""The sizes of the rings of a tap with `ring = "auto"`."""

from __future__ import annotations

from nfq_agent.capture.ring_size import LEAST, MOST, SHARED, ring_size


def test_the_first_interfaces_get_most_and_all_together_are_bounded() -> None:
    sizes: list[int] = []
    for _ in range(200):
        sizes.append(ring_size(sizes))
    assert sizes[:4] == [MOST, MOST, MOST, 13_000_000]
    assert sizes == sorted(sizes, reverse=True)
    assert min(sizes) >= LEAST
    assert sum(sizes) <= SHARED + 200 * LEAST


def test_what_a_gone_interface_had_is_given_out_again() -> None:
    sizes: list[int] = []
    for _ in range(50):
        sizes.append(ring_size(sizes))
    assert ring_size(sizes[1:]) > sizes[-1]
    assert ring_size([]) == MOST
