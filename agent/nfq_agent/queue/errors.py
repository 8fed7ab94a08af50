"""The exceptions of a queue."""

from __future__ import annotations

import os


class QueueError(Exception):
    """The queue `number` cannot do what was asked. The subclasses give the reason."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(number, reason)
        self.number = number
        self.reason = reason

    def __str__(self) -> str:
        return f"queue {self.number}: {self.reason}"


class QueueStateError(QueueError):
    """A call out of order: before open, after close, twice, or while another thread runs the queue."""


class QueueBusyError(QueueError):
    """Another process has bound the number."""


class QueuePermissionError(QueueError):
    """The process lacks CAP_NET_ADMIN."""


class QueueSettingError(QueueError):
    """The kernel refused a setting. setting: its name. value: the refused value. errno: the kernel's answer."""

    def __init__(self, number: int, setting: str, value: object, code: int) -> None:
        super().__init__(number, f"the kernel refused {setting}={value!r}: {os.strerror(code)}")
        # So that it can be copied and pickled.
        self.args = (number, setting, value, code)
        self.setting = setting
        self.value = value
        self.errno = code
