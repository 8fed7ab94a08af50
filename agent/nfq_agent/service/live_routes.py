"""The routes that TPROXY needs, as the running agent has them: none is forgotten that could not be removed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set

from nfq_agent.config.models import Config
from nfq_agent.mark import Mark
from nfq_agent.rules import routing
from nfq_agent.rules.model import Family, RuleError


class LiveRoutes:
    """may_be_there: whether this host may have routes of the instance."""

    def __init__(self, instance: str, route: Callable[[str, Mapping[Family, Set[Mark]]], None]) -> None:
        """route: makes the routes of an instance those for these marks (host/routes.py). Raises RuleError."""
        self._instance = instance
        self._route = route
        # Left by an agent that was killed.
        self.may_be_there = True

    def begin(self, config: Config) -> None:
        """Make them those of the configuration, whatever the previous agent left. Raises RuleError."""
        try:
            self.apply(config)
        except RuleError:
            # Where the routing cannot be read and no route is wanted, this host has none of ours.
            if routing.wanted(config):
                raise
            self.may_be_there = False

    def needed(self, *configs: Config) -> bool:
        """Whether `apply` may have something to do."""
        return self.may_be_there or bool(routing.wanted(*configs))

    def apply(self, *configs: Config) -> None:
        """Make them those that the configurations need together; of none, remove them. Raises RuleError, and can be repeated."""
        if not self.needed(*configs):
            return
        self.may_be_there = True
        marks = routing.wanted(*configs)
        self._route(self._instance, marks)
        self.may_be_there = bool(marks)
