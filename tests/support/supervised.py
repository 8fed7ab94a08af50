"""A supervisor on a fake machine, for the tests of its start, its reload, its restart and its stop."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

from fake_system import FakeMachine

from nfq_agent.config.models import Config, ConfigError
from nfq_agent.host.users import UserError
from nfq_agent.queue.errors import QueueError
from nfq_agent.rules.model import RuleError
from nfq_agent.service.control import ControlError
from nfq_agent.service.store import Store
from nfq_agent.service.supervisor import Supervisor

FOREIGN = "-A OUTPUT -p tcp -m tcp --dport 7 -j DROP"


def config(**changes: Any) -> Config:
    """A queue that fails open, one that fails closed, and a proxy by TPROXY. `changes` replaces whole tables."""
    tables: dict[str, Any] = {
        "queue": {"open": {"num": 1}, "closed": {"num": 2, "bypass": False}},
        "proxy": {"web": {"listen": ["127.0.0.1:15002"], "capture": "tproxy"}},
        "rules": {
            "open": {"queue": "open", "tcp_ports": [11000]},
            "closed": {"queue": "closed", "tcp_ports": [11001], "family": "inet"},
            "web": {"proxy": "web", "hooks": ["prerouting"], "tcp_ports": [8080], "family": "inet"},
        },
    }
    return Config.model_validate({**tables, **changes})


class Agent:
    """A supervisor on a fake machine with a foreign rule."""

    def __init__(self, first: Config | None = None, watchdog: float | None = None) -> None:
        self.machine = FakeMachine(watchdog)
        self.machine.kernel.restore("inet", f"*mangle\n{FOREIGN}\nCOMMIT")
        self.next: Config | ConfigError = first or config()
        assert isinstance(self.next, Config)
        self.supervisor = Supervisor(self._read, self.next, self.machine.log, self.machine.system)

    def _read(self) -> Config:
        if isinstance(self.next, ConfigError):
            raise self.next
        return self.next

    def begin_with(self, store: Store) -> None:
        """Have another supervisor, with this store."""
        self.machine.keep(store)
        assert isinstance(self.next, Config)
        self.supervisor = Supervisor(self._read, self.next, self.machine.log, self.machine.system)

    def ask(self, verb: str) -> dict[str, Any]:
        """Ask it by its control socket."""
        return self.machine.servers[-1].ask({"verb": verb})

    def run(self, *turns: Callable[[], Any]) -> int:
        """Its whole life: `turns` are done one after the other while it serves, then it is stopped."""
        self.machine.turns = [*turns, lambda: os.kill(os.getpid(), signal.SIGTERM)]
        return self.supervisor.run()

    def in_force(self) -> dict[str, Any]:
        """All that a reload may change."""
        return {
            "rules": self.machine.rules(),
            "workers": self.machine.crew.workers,
            "serving": set(self.machine.crew.serving),
            "routes": self.machine.routes,
        }


START = {
    "lock": ControlError("taken"),
    "ensure_user": UserError("no user"),
    "choose": RuleError("no backend"),
    "advance": OSError("disk full"),
    "crew.add worker of queue 1": QueueError(1, "another process has already bound this queue"),
    "crew.add proxy web": OSError("address in use"),
    "route": RuleError("no route"),
    "rules.apply inet": RuleError("no rule"),
    "rules.apply inet6": RuleError("no rule"),
}
