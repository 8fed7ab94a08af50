"""Reads the configuration; the command line and the environment win over the file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from nfq_agent.cli.flags import Flags
from nfq_agent.config.environment import log_settings, target_in_force
from nfq_agent.config.file import Check, check, instance_in, load, load_table, without_elements
from nfq_agent.config.models import INSTANCE, INSTANCE_FORM, Agent, Config, ConfigError, LogConfig
from nfq_agent.config.source import tables_of


def configuration(flags: Flags, check: Check = check) -> Config:
    """The configuration in force. Raises ConfigError."""
    return load(flags.config, lambda merged: _overrides(merged, flags), check)


def served_before(flags: Flags, table: dict[str, Any], check: Check = check) -> Config:
    """The configuration of the previous agent, which left `table`. Raises ConfigError."""
    return checked(load_table(table, flags.config, check), restarts=True)


def checked(config: Config, restarts: bool = False) -> Config:
    """The configuration, if this host can serve it: a listener that another process holds is a fault. Raises ConfigError.

    restarts: an agent that runs here hands its listeners over.
    """
    for proxy in config.proxy.values():
        # The environment is part of it.
        target_in_force(proxy)
    faults = []
    if config.tap or config.inline:
        from nfq_agent.capture.serving import host_faults

        faults += host_faults(config)
    if not restarts:
        from nfq_agent.cli.listeners import listener_faults

        faults = [*listener_faults(config), *faults]
    if faults:
        raise ConfigError(faults)
    return config


def with_marks(config: Config) -> Config:
    """The configuration with the marks that a start or a reload would give to offloaded flows."""
    from nfq_agent.service import control
    from nfq_agent.service.policy_generation import foreseen

    return foreseen(config, control.state_folder() / f"{config.agent.instance}.generations")


def instance_of(flags: Flags) -> str:
    """The instance of a verb. Nothing else of the configuration is read: it may have any other fault.

    Raises ConfigError for a name on the command line that no instance can have: sockets and rules are found by it.
    """
    if flags.instance is not None:
        if re.fullmatch(INSTANCE, flags.instance) is None:
            what = f"command line: agent.instance: {flags.instance!r} is not valid"
            raise ConfigError([f"{what}; allowed: {INSTANCE_FORM}"])
        return flags.instance
    from nfq_agent.cli import show

    name, faults = instance_in(flags.config)
    for fault in faults:
        show.error(fault)
    if faults:
        show.error(f"nfq-agent: this applies to instance {name}; --instance selects another")
    return name


def whatever_can_be_read(flags: Flags) -> tuple[Config, list[str]]:
    """The configuration, and what is wrong with it: without its elements if one is broken, else the built-in defaults."""
    try:
        return configuration(flags), []
    except ConfigError as error:
        faults = list(error.faults)
    name = {} if flags.instance is None else {"agent": {"instance": flags.instance}}
    try:
        return load(flags.config, lambda merged: {**without_elements(merged), **name}), faults
    except ConfigError:
        return Config(agent=Agent(instance=flags.instance or instance_in(flags.config)[0])), faults


def _overrides(merged: dict[str, Any], flags: Flags) -> dict[str, Any]:
    """The flags as keys of the configuration."""
    over: dict[str, Any] = {"agent": {"instance": flags.instance}} if flags.instance is not None else {}
    queues = tables_of(merged, "queue")
    if flags.queue_num is not None:
        over["queue"] = {_the_one_queue(queues): {"num": flags.queue_num}}
    log = flags.log_5tuple or _debug(merged)
    for name, table in queues.items():
        mine = over.setdefault("queue", {}).setdefault(name, {})
        if flags.copymode is not None:
            mine["copy"] = flags.copymode.value
        elements = table.get("elements", [])
        if log and isinstance(elements, list) and "log" not in elements:
            # Last in the chain: it logs what the others decided.
            mine["elements"] = [*elements, "log"]
    if flags.af_family is not None and (rules := tables_of(merged, "rules")):
        over["rules"] = {name: {"family": flags.af_family.value} for name in rules}
    return over


def _the_one_queue(queues: Mapping[str, Any]) -> str:
    if len(queues) != 1:
        raise ConfigError([f"command line: --queue-num: {len(queues)} queues are configured; allowed: with one queue"])
    (name,) = queues
    if "balance" in queues[name]:
        raise ConfigError([f"command line: --queue-num: [queue.{name}] has balance; allowed: with num"])
    return name


def _debug(merged: dict[str, Any]) -> bool:
    """Whether the level of the log is debug: then each packet has its line."""
    table = merged.get("log")
    # Not checked yet, as the whole configuration is later.
    level = table.get("level") if isinstance(table, Mapping) else None
    return log_settings(LogConfig().model_copy({"level": level})).level == "debug"
