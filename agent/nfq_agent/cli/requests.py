"""Requests to a running agent: `reload`, `confirm`, `chaos` and `restart`."""

from __future__ import annotations

import json
import time
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any, Final

from nfq_agent.cli import loading, show
from nfq_agent.cli.confirm import typed_yes
from nfq_agent.cli.flags import Flags
from nfq_agent.service import control

# Seconds that an agent may take to reload, or to check whether it would start (reexec.rehearse).
_ANSWERS_WITHIN: Final = 90.0
# Seconds within which an agent that starts again has to answer.
_BACK_WITHIN: Final = 30.0


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
