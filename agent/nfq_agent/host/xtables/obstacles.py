"""What in this host's tables may keep redirected connections from a proxy: firewalls, and rules against connection tracking."""

from __future__ import annotations

from contextlib import suppress

from nfq_agent.host.families import ADDRESS_FAMILIES
from nfq_agent.host.nftables.dropping import dropping_chains
from nfq_agent.host.nftables.neighbours import CT_NOTRACK, others
from nfq_agent.host.xtables.image import Image
from nfq_agent.host.xtables.legacy import drops_in_input, tables_present


def firewalls(translated: bool) -> list[str]:
    """Chains of others that drop what they do not accept in hook INPUT. What cannot be looked at is left out.

    translated: they drop connections with a translated destination (capture = "redirect"), which some firewalls accept.
    """
    found = [
        f"chain INPUT of the {family} table filter (legacy)" for family in ADDRESS_FAMILIES if drops_in_input(family, translated)
    ]
    with suppress(OSError):
        found += [f"nft chain {each}" for each in dropping_chains(translated)]
    return found


def untracked() -> list[str]:
    """Tables and chains with rules that take packets out of connection tracking (NOTRACK), which is what REDIRECT works with."""
    found = []
    for family, number in ADDRESS_FAMILIES.items():
        with suppress(OSError):
            if "raw" in (tables_present(family) or ()):
                image = Image(number, "raw")
                # struct xt_ct_target_info begins with its flags.
                flags = [data[0] for data in image.data_of(b"CT")]
                if any(each & CT_NOTRACK for each in flags) or any(True for _ in image.data_of(b"NOTRACK")):
                    found.append(f"the {family} table raw (legacy)")
    with suppress(OSError):
        found += [f"nft chain {each}" for each in others().untracking]
    return found
