"""Kernels for the contract of the rule backends: a fake one, and the real one through either backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Protocol, cast

from fake_rules import FakeHost, FakeKernel
from namespace import Namespace
from resident import Resident

from nfq_agent.host.nftables.owned import OwnedHost
from nfq_agent.host.xtables.backend import RuleHost
from nfq_agent.host.xtables.legacy import LegacyHost
from nfq_agent.rules.diff import Applied
from nfq_agent.rules.foreign import InFront
from nfq_agent.rules.model import FAMILIES, Family, TableRules, TableState


class World(Protocol):
    """A kernel, with what other programs do to it."""

    name: str

    def host(self, instance: str) -> RuleHost: ...

    def restore(self, family: Family, text: str) -> None:
        """iptables-restore --noflush --counters"""

    def save(self, family: Family) -> list[str]:
        """iptables-save --counters, without remarks"""


class FakeWorld:
    name = "fake"

    def __init__(self) -> None:
        self.kernel = FakeKernel()
        self.restore, self.save = self.kernel.restore, self.kernel.save

    def host(self, instance: str) -> RuleHost:
        return FakeHost(self.kernel, instance)


class Inside:
    """A backend whose calls run inside a namespace."""

    def __init__(self, namespace: Namespace, host: RuleHost) -> None:
        self.name, self.notice, self.lists, self.lock_seconds = host.name, host.notice, host.lists, host.lock_seconds
        self.descriptors, self.instance = host.descriptors, host.instance
        self._namespace, self._host = namespace, host

    def _call(self, name: str, *args: Any) -> Any:
        return self._namespace.call(getattr(self._host, name), *args)

    def read(self, family: Family) -> dict[str, TableState]:
        found: dict[str, TableState] = self._call("read", family)
        return found

    def apply(self, family: Family, desired: Mapping[str, TableRules]) -> Applied:
        applied: Applied = self._call("apply", family, desired)
        return applied

    def apply_all(self, desired: Mapping[Family, Mapping[str, TableRules]], undo: bool = True) -> dict[Family, Applied]:
        applied: dict[Family, Applied] = self._call("apply_all", desired, undo)
        return applied

    def present(self, family: Family) -> frozenset[str] | None:
        found: frozenset[str] | None = self._call("present", family)
        return found

    @property
    def families(self) -> tuple[Family, ...]:
        return FAMILIES

    def sign(self) -> object:
        return self._call("sign")

    def in_front(self, family: Family, found: Mapping[str, TableState]) -> list[InFront]:
        found_in_front: list[InFront] = self._call("in_front", family, found)
        return found_in_front

    def instances(self, family: Family) -> frozenset[str]:
        found: frozenset[str] = self._call("instances", family)
        return found

    def close(self) -> None:
        self._call("close")


def _called(state: dict[str, Any], host: RuleHost, name: str, args: tuple[Any, ...]) -> Any:
    """Call a method of the host that lives inside, which is the first that came with its instance's name."""
    instance = cast(OwnedHost, host).instance
    return getattr(state.setdefault(instance, host), name)(*args)


class Owning(Inside):
    """The same, in one process that lives on: it owns what it makes."""

    def __init__(self, namespace: Namespace, host: RuleHost, resident: Resident) -> None:
        super().__init__(namespace, host)
        self._resident = resident

    def _call(self, name: str, *args: Any) -> Any:
        return self._resident.call(_called, self._host, name, args)


class LegacyWorld:
    name = "legacy"

    def __init__(self, namespace: Namespace) -> None:
        self.namespace = namespace

    def host(self, instance: str) -> RuleHost:
        return Inside(self.namespace, LegacyHost(instance))

    def restore(self, family: Family, text: str) -> None:
        self.namespace.run(f"{_TOOLS[family]}-restore", "--noflush", "--counters", "--wait", input=text)

    def save(self, family: Family) -> list[str]:
        lines = self.namespace.run(f"{_TOOLS[family]}-save", "-c").stdout.splitlines()
        return [line for line in lines if not line.startswith("#")]


class OwnedWorld(LegacyWorld):
    """Others have legacy rules; ours are where no tool of iptables looks, and are listed as our own reading has them."""

    name = "owned"

    def __init__(self, namespace: Namespace) -> None:
        super().__init__(namespace)
        self.resident = Resident(namespace)
        self.instances: list[str] = []

    def host(self, instance: str) -> RuleHost:
        if instance not in self.instances:
            self.instances.append(instance)
        return Owning(self.namespace, OwnedHost(instance), self.resident)

    def save(self, family: Family) -> list[str]:
        lines = super().save(family)
        for instance in self.instances:
            for table, state in self.host(instance).read(family).items():
                place = lines.index(f"*{table}") + 1 if f"*{table}" in lines else len(lines)
                ours = [f":{chain} - [0:0]" for chain in state.chains]
                lines[place:place] = [*ours, *(f"[{each.packets}:{each.bytes}] {each.rule}" for each in state.installed)]
        return lines


_TOOLS: Final[Mapping[Family, str]] = {"inet": "iptables-legacy", "inet6": "ip6tables-legacy"}
REAL: Final[Mapping[str, type[LegacyWorld]]] = {"legacy": LegacyWorld, "owned": OwnedWorld}
