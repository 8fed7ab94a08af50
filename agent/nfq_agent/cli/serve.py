"""`run`: serving in this process. What it loads first is what the check of the configuration needs; the rest meanwhile."""

from __future__ import annotations

import gc
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING

from nfq_agent.cli import loading
from nfq_agent.cli.apart import check_apart
from nfq_agent.cli.flags import Flags
from nfq_agent.config.environment import log_settings
from nfq_agent.config.file import load_table
from nfq_agent.config.models import Config, ConfigError

if TYPE_CHECKING:
    from nfq_agent.service.store import Store
    from nfq_agent.service.system import System


def run(flags: Flags) -> int:
    """Serve until a signal stops it."""
    faults: ConfigError | None = None
    hosts: list[System] = []
    try:
        loaded = loading.configuration(flags, partial(check_apart, meanwhile=lambda: hosts.append(_host())))
    except ConfigError as error:
        faults = error
    host = hosts[0] if hosts else _host()
    from nfq_agent.host.journal import open_log
    from nfq_agent.log_filter import shows
    from nfq_agent.service.supervisor import Supervisor

    try:
        if faults is not None:
            raise faults
        # Neither a reload nor a restart checks listeners: this agent holds them. A new one that is not free fails when it is
        # opened.
        loading.checked(loaded, restarts=host.store.inherited)
    except ConfigError as error:
        faults = error
        loaded = served_before(flags, host.store, error)
    else:
        loaded, faults = without_taken_back(flags, host.store, loaded)
    settings = log_settings(loaded.log)
    log = open_log(settings.format, settings.level, shows(settings.when))
    for fault in faults.faults if faults is not None else ():
        log(f"the configuration from before the restart stays in force: {fault}", "error")
    # What is loaded is not garbage. The collector never looks at it: that would take a fifteenth of the start, and each page that
    # it writes to is copied, since workers share it.
    gc.freeze()
    gc.enable()
    restore = partial(load_table, path=flags.config, check=check_apart)
    return Supervisor(lambda: loading.configuration(flags, check_apart), loaded, log, host, restore).run()


def _host() -> System:
    """What the supervisor uses of the operating system, with the modules that serve: loaded while the configuration is checked,
    or after that, so that a fault is reported quickly."""
    for name in ("host.journal", "log_filter", "service.supervisor"):
        import_module(f"nfq_agent.{name}")
    from nfq_agent.service.system import this_host

    return this_host()


def without_taken_back(flags: Flags, store: Store, loaded: Config) -> tuple[Config, ConfigError | None]:
    """What to serve, and why not what was loaded: a crash does not bring in a file that was taken back by a reload on trial."""
    from nfq_agent.service.inheritance import CONFIGURATION, TRIAL
    from nfq_agent.service.trial import was_taken_back

    table = store.noted(CONFIGURATION)
    if not (table and was_taken_back(store.noted(TRIAL))):
        return loaded, None
    try:
        before = loading.served_before(flags, table, check_apart)
    except ConfigError as error:
        from nfq_agent.cli import show

        show.error(f"nfq-agent: the file was taken back, and is read nevertheless: {'; '.join(error.faults)}")
        return loaded, None
    return before, ConfigError(["the reload of the file was taken back; `nfq-agent reload` reads it again"])


def served_before(flags: Flags, store: Store, faults: ConfigError) -> Config:
    """The configuration that the previous agent served: a fault in the files must not end what still serves.

    Raises ConfigError if there is none, with the present faults.
    """
    from nfq_agent.service.inheritance import CONFIGURATION

    if store.inherited and (table := store.noted(CONFIGURATION)):
        try:
            return loading.served_before(flags, table, check_apart)
        except ConfigError as error:
            faults = ConfigError([*faults.faults, *error.faults])
    _clean_up(flags)
    raise faults


def _clean_up(flags: Flags) -> None:
    """Remove the rules of the agent that this process was, if it was started again in place and does not serve after all.

    A service manager starts it again, and its workers serve until then.
    """
    from nfq_agent.cli import rule_verbs
    from nfq_agent.host import reexec, systemd

    if reexec.was_started_again() and not systemd.ServiceManager().stores:
        rule_verbs.clean(loading.instance_of(flags), failed=True)
