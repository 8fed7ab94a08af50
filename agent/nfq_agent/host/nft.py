"""Rules through the nft kind of iptables (`iptables-nft-save`, `iptables-nft-restore --noflush`)."""

from __future__ import annotations

from collections.abc import Mapping

from nfq_agent.diff import Settled
from nfq_agent.rules import Family, RuleError, TableRules, TableState


def require() -> None:
    raise RuleError("the nft backend is not there yet")


class NftHost:
    name = "nft"

    def __init__(self, instance: str) -> None:
        self.instance = instance

    def read(self, family: Family) -> dict[str, TableState]:
        raise RuleError("the nft backend is not there yet")

    def apply(self, family: Family, desired: Mapping[str, TableRules]) -> Settled:
        raise RuleError("the nft backend is not there yet")

    def present(self, family: Family) -> frozenset[str] | None:
        raise RuleError("the nft backend is not there yet")

    def instances(self, family: Family) -> frozenset[str]:
        raise RuleError("the nft backend is not there yet")
