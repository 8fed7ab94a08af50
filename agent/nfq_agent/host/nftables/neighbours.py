"""What others have in nf_tables that concerns us. It is looked at, never changed."""

from __future__ import annotations

from nfq_agent.host.nftables import layout, netlink
from nfq_agent.host.nftables.netlink import NftSocket, attributes, string

# NFPROTO_INET, and the two families of IP.
_FAMILIES = {"inet": 1, "ip": 2, "ip6": 10}


def nat_chain() -> str | None:
    """A chain of others that does NAT, as `ip nat PREROUTING`; None where there is none, or where this process may not look."""
    try:
        with NftSocket() as connection:
            for name, number in _FAMILIES.items():
                for body in connection.dump(netlink.GET_CHAIN, number):
                    found = dict(attributes(body))
                    table = string(found[1])
                    # NFTA_CHAIN_TYPE is there for chains in a hook only.
                    if string(found.get(7, b"")) == "nat" and layout.instance_of_table(table) is None:
                        return f"{name} {table} {string(found[3])}"
    except OSError:
        pass
    return None
