"""Checks a configuration in a process of its own, which ends: pydantic is a third of the memory of an agent, and of its start."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from nfq_agent.config.file import check
from nfq_agent.config.lookups import HostLookups
from nfq_agent.config.models import Config, ConfigError
from nfq_agent.config.source import WITH_ELEMENTS, Source, tables_of
from nfq_agent.host.one_shot import OneShot, OneShotError


def check_apart(
    merged: dict[str, Any], source: Source, lookups: HostLookups, meanwhile: Callable[[], object] = lambda: None
) -> Config:
    """As `file.check`. meanwhile: what this process does while it waits. Raises ConfigError.

    Elements are checked here: their options are models of pydantic, which this process needs then.
    """
    if "pydantic" in sys.modules or _names_elements(merged):
        return check(merged, source, lookups)
    try:
        child = OneShot(_answer, merged, source, lookups)
    except OSError:
        # No process can be made now.
        return check(merged, source, lookups)
    meanwhile()
    try:
        config, faults = child.result()
    except OneShotError:
        # It was killed.
        return check(merged, source, lookups)
    if config is None:
        raise ConfigError(faults)
    return config


def _answer(merged: dict[str, Any], source: Source, lookups: HostLookups) -> tuple[Config | None, list[str]]:
    # Else pydantic looks through everything that is installed for plugins of its own, and loads `email` and `zipfile` for that.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    try:
        return check(merged, source, lookups), []
    except ConfigError as error:
        return None, error.faults


def _names_elements(merged: Mapping[str, Any]) -> bool:
    return any(table.get("elements") for kind in WITH_ELEMENTS for table in tables_of(merged, kind).values())
