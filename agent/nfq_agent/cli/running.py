"""Asks the running agent of an instance for its status."""

from __future__ import annotations

from typing import Any

from nfq_agent.service import control
from nfq_agent.service.status import Status, StatusError


def status_object(instance: str, timeout: float = 30.0) -> dict[str, Any]:
    """The status as JSON. Raises NotRunning, ControlError."""
    return control.ask(instance, {"verb": "status"}, timeout)


def status(instance: str, timeout: float = 30.0) -> Status:
    """The status. Raises NotRunning, ControlError, StatusError."""
    return Status.from_object(status_object(instance, timeout))


def status_if_any(instance: str) -> Status | None:
    """The status; None if no agent runs, or if it does not answer this process."""
    try:
        return status(instance, 5.0)
    except (control.ControlError, StatusError):
        return None


def others(instance: str) -> list[Status]:
    """The running agents of other instances on this host, those that this process may ask."""
    found = (status_if_any(name) for name in control.instances() if name != instance)
    return [each for each in found if each is not None]
