"""Checks a configuration as a whole: each table, the elements, and what is wrong between tables."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from nfq_agent.config.element_faults import element_faults
from nfq_agent.config.lookups import HostLookups
from nfq_agent.config.models import Config, ConfigError
from nfq_agent.config.problems import cross_faults
from nfq_agent.config.source import Source
from nfq_agent.config.wording import model_faults


def checked(merged: dict[str, Any], source: Source, lookups: HostLookups) -> Config:
    """The configuration that was read as `merged`. Raises ConfigError with every fault found."""
    faults: list[str] = []
    try:
        config = Config.model_validate(merged)
    except ValidationError as error:
        faults += model_faults(source, error)
        rest = _sound_part(merged, error)
        config = Config() if rest is None else Config.model_validate(rest)
    config = config.with_lookups(lookups).made_of(merged, outdated=False)
    faults += element_faults(merged, source, lookups)
    faults += cross_faults(config, source)
    if faults:
        # What is wrong with an element is found for each chain that has it.
        raise ConfigError(list(dict.fromkeys(faults)))
    return config


def _sound_part(merged: Mapping[str, Any], error: ValidationError) -> dict[str, Any] | None:
    """The configuration without the tables that have faults, so that the others can be compared with each other.

    None where one of these is missed by others: a rule names a queue, but nothing names a rule.
    """
    rest = copy.deepcopy(dict(merged))
    for details in error.errors():
        kind, *names = details["loc"]
        if kind in ("agent", "log"):
            rest.pop(str(kind), None)
        elif kind == "rules" and names and isinstance(rest.get("rules"), dict):
            rest["rules"].pop(names[0], None)
        else:
            return None
    return rest
