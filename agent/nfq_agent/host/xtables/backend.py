"""Which of the two backends writes the rules, behind one interface."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

from nfq_agent.host.families import families
from nfq_agent.host.nftables import neighbours
from nfq_agent.host.nftables.accepting import AcceptRules
from nfq_agent.host.nftables.leftovers import NftLeftovers
from nfq_agent.host.nftables.netlink import readable
from nfq_agent.host.nftables.owned import OwnedHost
from nfq_agent.host.nftables.support import probe
from nfq_agent.host.xtables import python_iptables
from nfq_agent.host.xtables.legacy import LegacyHost
from nfq_agent.rules.diff import Applied
from nfq_agent.rules.foreign import InFront
from nfq_agent.rules.model import FAMILIES, Family, Rule, RuleError, Ruleset, TableRules, TableState


class RuleHost(Protocol):
    """One instance's rules in the kernel.

    notice: why it is not the first choice here; empty if it is. lock_seconds: how long a change waits for the xtables lock.
    lists: whether one rule takes a list of ports or networks of any length.
    """

    name: str
    instance: str
    notice: str
    lists: bool
    lock_seconds: float

    @property
    def families(self) -> tuple[Family, ...]:
        """Those that the kernel speaks: rules of others would see no packet."""

    def read(self, family: Family) -> dict[str, TableState]:
        """What each table that is present holds of this instance. It makes no table present, and takes no lock."""

    def apply(self, family: Family, desired: Mapping[str, TableRules]) -> Applied:
        """Make this instance's rules the desired ones, in every present table; {} removes them all. Raises RuleError."""

    def apply_all(self, desired: Mapping[Family, Mapping[str, TableRules]], undo: bool = True) -> dict[Family, Applied]:
        """The same for several families. Raises RuleError; with `undo`, what was in force before is in force then."""

    def sign(self) -> object:
        """A value that changes when rules of this instance change, as far as that is cheap to see. It makes no table present."""

    def present(self, family: Family) -> frozenset[str] | None:
        """The names of the tables that are present; None if this process may not know. Raises RuleError."""

    def in_front(self, family: Family, found: Mapping[str, TableState]) -> list[InFront]:
        """Foreign rules that are asked before ours and may take their traffic. found: what `read` gave. Raises RuleError."""

    def instances(self, family: Family) -> frozenset[str]:
        """The instances that own chains, by the names of the chains."""

    @property
    def descriptors(self) -> Sequence[int]:
        """Descriptors that hold the rules: a child must not inherit them, and a successor needs them."""

    def close(self) -> None:
        """Release what the backend holds besides the rules, once they are removed and no packet waits. Raises RuleError."""


def choose(
    backend: Literal["auto", "legacy", "owned"],
    instance: str,
    lock: int | None = None,
    captures: bool = False,
    persist: bool = False,
    inherited: int | None = None,
) -> RuleHost:
    """The backend to use. `auto` is legacy wherever python-iptables can do what is needed, and gives the reason otherwise.

    lock: a descriptor of the xtables lock, for a process that may not open it. captures: whether connections are redirected to
    a proxy by NAT. persist: whether rules have to outlive this process. inherited: the socket that owns the table of the process
    before this one, which is the caller's if another backend is chosen. Raises RuleError where neither backend can be used.
    """
    if backend == "owned":
        return _owned(instance, "", persist, inherited)
    problem = python_iptables.problem()
    if backend == "legacy":
        if problem is not None:
            raise RuleError(f"backend legacy cannot be used: {problem}")
        return LegacyHost(instance, lock)
    if problem is None and (missing := [family for family in families() if not python_iptables.in_kernel(family)]):
        problem = f"the kernel has no legacy xtables for {missing[0]} (module {python_iptables.MODULES[missing[0]]})"
    if problem is not None:
        return _owned(instance, f"backend owned is used, since legacy rules cannot be: {problem}", persist, inherited)
    if captures and (chains := neighbours.nat_chains()) and probe().problem is None:
        return _owned(
            instance,
            f"backend owned is used, since nf_tables does NAT here ({chains[0]}) and may be asked before legacy NAT: a proxy "
            "would miss connections",
            persist,
            inherited,
        )
    return LegacyHost(instance, lock)


def _owned(instance: str, notice: str, persist: bool, inherited: int | None) -> OwnedHost:
    if (problem := probe().problem) is not None:
        before = f"{notice}; " if notice else ""
        raise RuleError(f"{before}backend owned cannot be used: {problem}")
    return OwnedHost(instance, notice, inherited, persist)


class RulePlace(Protocol):
    """A place where rules of one instance can be, to be read and cleaned."""

    name: str

    def read(self, family: Family) -> dict[str, TableState]:
        """What each table holds of this instance. Raises RuleError if it cannot be read."""

    def apply_all(self, desired: Mapping[Family, Mapping[str, TableRules]], undo: bool = True) -> dict[Family, Applied]:
        """With nothing desired: remove all of it. Else make it what `accepting` gave. Raises RuleError."""

    def instances(self, family: Family) -> frozenset[str]:
        """The instances that have rules there. Raises RuleError."""

    def accepting(self, accepts: Mapping[Family, Sequence[Rule]]) -> Ruleset:
        """Those of the rules that accept in hook INPUT (rules.proxies.accept_rules) that belong here now. Raises RuleError."""

    def sign(self) -> object:
        """See RuleHost.sign."""

    def close(self) -> None:
        """Release what it holds, once the rules are removed. Raises RuleError."""


def elsewhere(host: RuleHost, instance: str) -> list[RulePlace]:
    """Every place but the backend in use where rules of the instance may have been left."""
    others: list[RulePlace] = []
    if host.name != "legacy" and any(map(python_iptables.in_kernel, FAMILIES)):
        others.append(LegacyHost(instance))
    # Not by `probe`: a kernel that can be read may hold rules, and the two transactions of a probe take a tenth of a start.
    if readable():
        if host.name != "owned":
            others.append(OwnedHost(instance))
        others += [NftLeftovers(instance), AcceptRules(instance)]
    return others


def everywhere(instance: str) -> list[RulePlace]:
    """Every place where rules of the instance may be. Raises RuleError if none can be looked at."""
    places: list[RulePlace] = [*usable(instance)]
    if probe().problem is None:
        places += [NftLeftovers(instance), AcceptRules(instance)]
    return places


def usable(instance: str) -> list[LegacyHost | OwnedHost]:
    """Every backend that works here: rules may have been put in through one or the other. Raises RuleError if none does."""
    hosts: list[LegacyHost | OwnedHost] = []
    reasons: list[str] = []
    if (problem := python_iptables.problem()) is None:
        hosts.append(LegacyHost(instance))
    else:
        reasons.append(f"legacy: {problem}")
    if (problem := probe().problem) is None:
        hosts.append(OwnedHost(instance))
    else:
        reasons.append(f"owned: {problem}")
    if not hosts:
        raise RuleError(f"no rules can be read here: {'; '.join(reasons)}")
    return hosts
