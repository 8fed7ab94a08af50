"""Both families together: all or nothing."""

from __future__ import annotations

import subprocess
import time

import pytest
from namespace import Namespace
from rule_texts import baseline, rules

from nfq_agent.host.nftables.owned import OwnedHost
from nfq_agent.host.xtables.backend import RuleHost
from nfq_agent.host.xtables.legacy import LegacyHost
from nfq_agent.rules.model import FAMILIES, Family, RuleError, Ruleset
from nfq_agent.service.live_rules import LiveRules, listing

pytestmark = pytest.mark.kernel

HOSTS = pytest.mark.parametrize("host", [LegacyHost("a"), OwnedHost("a")], ids=["legacy", "owned"])
# The kernel takes TPROXY in PREROUTING only (xt_TPROXY.c, nft_tproxy.c).
REFUSED = rules(
    "mangle -A INPUT -m comment --comment nfq-agent:a:jump -j NFQA-a-INPUT",
    "mangle -A NFQA-a-INPUT -p tcp -m multiport --dports 80 -m comment --comment nfq-agent:a:r "
    "-j TPROXY --on-port 15002 --on-ip :: --tproxy-mark 0x800/0x800",
)


def _count(live: LiveRules) -> dict[Family, int]:
    found = listing(live.read())
    return {family: sum(each.family == family for each in found) for family in FAMILIES}


@HOSTS
def test_what_one_family_refuses_the_other_does_not_keep(netns: Namespace, host: RuleHost) -> None:
    def inside() -> None:
        live = LiveRules(host)
        before: Ruleset = {"inet": baseline("a", 1), "inet6": baseline("a", 2)}
        live.apply(before)
        old = [str(each.installed.rule) for each in listing(live.read())]
        assert _count(live) == {"inet": 4, "inet6": 4}
        with pytest.raises(RuleError):
            live.apply({"inet": baseline("a", 1, 2, 3), "inet6": REFUSED})
        assert [str(each.installed.rule) for each in listing(live.read())] == old
        # Nor the other way round.
        with pytest.raises(RuleError):
            live.apply({"inet": REFUSED, "inet6": baseline("a", 1, 2, 3)})
        assert [str(each.installed.rule) for each in listing(live.read())] == old
        live.apply({"inet": baseline("a", 1, 2, 3), "inet6": baseline("a", 1, 2, 3)})
        assert _count(live) == {"inet": 8, "inet6": 8}
        assert set(live.remove()) == set(FAMILIES)
        assert _count(live) == {"inet": 0, "inet6": 0}

    netns.call(inside)


def test_a_family_that_can_not_be_cleaned_does_not_keep_the_other(netns: Namespace) -> None:
    class Broken(LegacyHost):
        """IPv4 fails when its end is awaited."""

        def _finished(self, running: object) -> object:
            answer = super()._finished(running)  # type: ignore[arg-type]  # whatever it was given
            if self.broken and not self.awaited:
                self.awaited = True
                raise RuleError("the child ended without an answer")
            return answer

        broken = awaited = False

    def inside() -> None:
        host = Broken("a")
        live = LiveRules(host)
        live.apply({"inet": baseline(), "inet6": baseline()})
        host.broken = True
        with pytest.raises(RuleError, match="without an answer"):
            live.remove()
        host.broken = False
        assert _count(live)["inet6"] == 0

    netns.call(inside)


def test_two_changes_at_a_time_that_share_a_descriptor_of_the_lock_come_one_after_the_other(netns: Namespace) -> None:
    """A descriptor's lock is everybody's who has it: side by side, both families would think that they hold it."""

    def inside() -> None:
        with open("/run/xtables.lock", "w") as lock:
            host = LegacyHost("a", lock.fileno())
            both = [host.begin(family, baseline()) for family in FAMILIES]
            time.sleep(0.3)
            assert [host.read(family) for family in FAMILIES] == [{}, {}]
            for finish in both:
                assert finish().changes
            # And given back.
            done = subprocess.run(["flock", "--nonblock", "/run/xtables.lock", "echo", "free"], capture_output=True, text=True)
            assert done.stdout == "free\n"

    netns.call(inside)
