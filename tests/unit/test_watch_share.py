"""How much a worker does for its watchers: much while it has time, little while packets wait."""

from __future__ import annotations

from nfq_agent.service.watch_share import FLOWS, MOST, PACKETS, RECORDS, WatchShare


def left(share: WatchShare) -> tuple[int, int, int]:
    return share.flows, share.records, share.packets


def steps(count: int) -> tuple[int, int, int]:
    return FLOWS * count, RECORDS * count, PACKETS * count


def test_at_first_it_is_all_and_what_is_spent_comes_back() -> None:
    share = WatchShare()
    assert left(share) == (0, 0, 0)
    share.renew(True, 1.0, 0.0)
    assert left(share) == steps(MOST)
    share.flows = share.records = share.packets = 0
    share.renew(True, 1.05, 0.001)
    assert left(share) == steps(MOST)


def test_while_packets_wait_there_is_one_step_for_its_own_processor_time() -> None:
    share = WatchShare()
    share.renew(True, 1.0, 0.0)
    share.flows = share.records = share.packets = 0
    # On a loaded machine much time passes, and the process gets little of it.
    for look in range(1, 5):
        share.renew(False, 1.0 + look, 0.01 * look)
        assert left(share) == (0, 0, 0)
    share.renew(False, 6.0, 0.05)
    assert left(share) == steps(1)


def test_it_grows_again_step_by_step() -> None:
    share = WatchShare()
    share.renew(False, 1.0, 1.0)
    grown = []
    for look in range(1, 20):
        share.renew(True, 1.0 + 0.05 * look, 1.0)
        grown.append(share.flows // FLOWS)
    assert grown[:5] == [2, 3, 4, 6, 8]
    assert grown[-1] == MOST


def test_a_worker_that_is_busy_most_of_the_time_does_less() -> None:
    share = WatchShare()
    for look in range(60):
        # It keeps up, at nine tenths of a processor.
        share.renew(True, 1.0 + 0.05 * look, 0.045 * look)
    assert left(share) == steps(1)
