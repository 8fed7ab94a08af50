"""`run`, `reload` and `restart`: serving in this process, and requests to a running agent to begin again."""

from __future__ import annotations

import gc
import json
import time
import tomllib
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from nfq_agent.cli import loading, show
from nfq_agent.cli.apart import check_apart
from nfq_agent.cli.confirm import typed_yes
from nfq_agent.cli.flags import Flags
from nfq_agent.config.environment import log_settings
from nfq_agent.config.file import load_table
from nfq_agent.config.models import Config, ConfigError
from nfq_agent.service import control

if TYPE_CHECKING:
    from nfq_agent.service.store import Store

# Seconds that an agent may take to reload, or to check whether it would start (reexec.rehearse).
_ANSWERS_WITHIN: Final = 90.0
# Seconds within which an agent that starts again has to answer.
_BACK_WITHIN: Final = 30.0


def run(flags: Flags) -> int:
    """Serve until a signal stops it."""
    faults: ConfigError | None = None
    try:
        loaded = loading.configuration(flags, partial(check_apart, meanwhile=_load_service))
    except ConfigError as error:
        faults = error
    # Imported while the configuration is checked, or after that, so that a fault is reported quickly.
    from nfq_agent.host.journal import open_log
    from nfq_agent.log_filter import shows
    from nfq_agent.service.supervisor import Supervisor
    from nfq_agent.service.system import this_host

    host = this_host()
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
    # What is loaded is not garbage: it goes to the oldest generation without a look at it, which would take a fifteenth of the
    # start.
    gc.freeze()
    gc.unfreeze()
    gc.enable()
    restore = partial(load_table, path=flags.config, check=check_apart)
    return Supervisor(lambda: loading.configuration(flags, check_apart), loaded, log, host, restore).run()


def _load_service() -> None:
    for name in ("host.journal", "log_filter", "service.supervisor", "service.system"):
        import_module(f"nfq_agent.{name}")


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


def reload(flags: Flags, confirm_within: int | None, wait: bool = True) -> int:
    """Ask the running agent, and wait for its answer; with `confirm_within` seconds and `wait`, also for a person's."""
    name = loading.instance_of(flags)
    asked: dict[str, Any] = {"verb": "reload"}
    if confirm_within is not None:
        asked["confirm"] = confirm_within
    answer = control.ask(name, asked, _ANSWERS_WITHIN, lambda: show.wrapped(f"instance {name}: still reloading ..."))
    if "began" in answer:
        return _await_successor(name, answer["began"])
    if (code := _tell(answer, faulty=78)) != 0 or confirm_within is None:
        return code
    if wait:
        return _confirmed(name, confirm_within, answer.get("trial"))
    show.wrapped(f"It is in force. Without `nfq-agent confirm` within {confirm_within} s the previous configuration is restored.")
    return 0


def _tell(answer: Mapping[str, Any], faulty: int = 1) -> int:
    """Print the agent's answer, and return the exit code. faulty: where a fault in what was asked for is the reason."""
    if answer.get("ok"):
        show.wrapped(str(answer["message"]))
        if waits := answer.get("waits"):
            show.error(f"warning: {waits}")
        return 0
    show.error(answer.get("message", "the agent gave no reason"))
    return faulty if answer.get("config") else 1


def _confirmed(name: str, seconds: int, trial: object) -> int:
    """Ask a person whether the new configuration is to be kept, and tell the agent. trial: which one is answered."""
    show.wrapped(f"It is in force. Type yes within {seconds} s to keep it; otherwise the previous configuration is restored.")
    keep = typed_yes(seconds)
    # Where the time is over, the agent has put it back, and says so.
    answer = control.ask(name, {"verb": "confirm", "keep": keep, "trial": trial}, 60)
    if keep and answer.get("ok"):
        show.wrapped("Kept.")
        return 0
    show.error(answer["message"])
    return 1


def confirm(flags: Flags, keep: bool) -> int:
    """Keep the configuration that `reload --confirm` has put into force, or take it back now."""
    return _tell(control.ask(loading.instance_of(flags), {"verb": "confirm", "keep": keep}, 60))


def chaos(flags: Flags, queue: str | None, faults: Sequence[str], seconds: float) -> int:
    """Break the traffic of a queue for a time; without a queue, end that."""
    name = loading.instance_of(flags)
    if queue is None:
        answer = control.ask(name, {"verb": "confirm", "keep": False, "faults": True}, 60)
    else:
        odds = {key: _toml(value) for key, _, value in (fault.partition("=") for fault in faults)}
        answer = control.ask(name, {"verb": "chaos", "queue": queue, "odds": odds, "seconds": seconds}, 60)
    return _tell(answer, faulty=2)


def _toml(text: str) -> Any:
    """A value as the configuration has it, where it is one, and one that can be sent as JSON; else the text itself."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return text
    return value


def restart(flags: Flags) -> int:
    """Ask the running agent to start again in place, and wait until the new one serves."""
    name = loading.instance_of(flags)
    answer = control.ask(
        name, {"verb": "restart"}, _ANSWERS_WITHIN, lambda: show.wrapped(f"instance {name}: checking whether it would start ...")
    )
    if not answer.get("ok"):
        return _tell(answer)
    return _await_successor(name, answer["began"])


def _await_successor(name: str, before: object) -> int:
    """Wait until an agent answers that began at another time than `before`."""
    asked = time.monotonic()
    while time.monotonic() - asked < _BACK_WITHIN:
        try:
            answer = control.ask(name, {"verb": "ping"}, 5)
        except control.NotRunning:
            # The socket stays open while the program starts again, and without one the process has ended.
            show.error(f"nfq-agent: instance {name} ended while it was started again; see its log")
            return 1
        except control.ControlError:
            answer = {}
        if answer.get("began", before) != before:
            show.wrapped(f"restarted: instance {name} serves with the code that is installed now")
            return 0
        time.sleep(0.02)
    show.error(f"nfq-agent: instance {name} did not come back within {_BACK_WITHIN:g} s; see its log")
    return 1
