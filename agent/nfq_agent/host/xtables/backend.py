"""Which of the kernel's two rule engines is used, behind one interface."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, Protocol

from nfq_agent.host.xtables import nft, python_iptables
from nfq_agent.rules.diff import Settled
from nfq_agent.rules.model import Family, RuleError, TableRules, TableState


class RuleHost(Protocol):
    """One instance's rules in the kernel.

    notice: why it is not the first choice here; empty if it is. lock_seconds: how long a change waits for the xtables lock.
    """

    name: str
    notice: str
    lock_seconds: float

    def read(self, family: Family) -> dict[str, TableState]:
        """What each table that is present holds of this instance. It makes no table present, and takes no lock."""

    def apply(self, family: Family, desired: Mapping[str, TableRules]) -> Settled:
        """Make this instance's rules the desired ones, in every present table; {} removes them all. Raises RuleError."""

    def begin(self, family: Family, desired: Mapping[str, TableRules]) -> Callable[[], Settled]:
        """Begin that, where it can go on beside something else; what is returned waits for its end, and is to be called once.

        Both raise RuleError.
        """

    def present(self, family: Family) -> frozenset[str] | None:
        """The names of the tables that are present; None if this process may not know."""

    def instances(self, family: Family) -> frozenset[str]:
        """The instances that own chains, by the names of the chains."""


def choose(backend: Literal["auto", "legacy", "nft"], instance: str, lock: int | None = None) -> RuleHost:
    """The rule engine to use; `auto` is legacy wherever the kernel has it and python-iptables can write it.

    lock: a descriptor of the xtables lock, for a process that may not open it. Raises RuleError where neither can be used.
    """
    if backend == "nft":
        nft.require()
        return nft.NftHost(instance)
    fault = python_iptables.fault()
    if fault is None:
        return python_iptables.LegacyHost(instance, lock)
    if backend == "legacy":
        raise RuleError(f"backend legacy can't be used: {fault}")
    try:
        nft.require()
    except RuleError as error:
        raise RuleError(f"no rules can be written here: legacy: {fault}; nft: {error}") from error
    return nft.NftHost(instance, f"the nft backend is used, since legacy rules can't be: {fault}")


def usable(instance: str) -> list[RuleHost]:
    """Every rule engine that works here: rules may have been put in through one or the other. Raises RuleError if none does."""
    hosts: list[RuleHost] = []
    reasons: list[str] = []
    if (fault := python_iptables.fault()) is None:
        hosts.append(python_iptables.LegacyHost(instance))
    else:
        reasons.append(f"legacy: {fault}")
    try:
        nft.require()
    except RuleError as error:
        reasons.append(f"nft: {error}")
    else:
        hosts.append(nft.NftHost(instance))
    if not hosts:
        raise RuleError(f"no rules can be read here: {'; '.join(reasons)}")
    return hosts
