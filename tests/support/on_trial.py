"""A supervisor on a fake machine, with what it reads from its file, for the tests of what an agent takes back by itself."""

from __future__ import annotations

import os
import re
from typing import Any

from fake_system import FakeMachine
from store_contract import FakeKeeper

from nfq_agent.config.models import Config, ConfigError
from nfq_agent.service.store import Store
from nfq_agent.service.supervisor import Supervisor


def config(port: int) -> Config:
    return restored({"queue": {"main": {"num": port}}, "rules": {"main": {"queue": "main", "tcp_ports": [port]}}})


def restored(table: dict[str, Any]) -> Config:
    return Config.model_validate(table).made_of(table, outdated=False)


class Agent:
    """A supervisor that serves port 1000, and that reads port 2000 from its file."""

    def __init__(self, keeper: FakeKeeper | None = None) -> None:
        self.machine = FakeMachine(None)
        self._keeper = keeper
        self._start(config(1000), Store({}, keeper))
        self.file: Config | ConfigError = config(2000)

    def _start(self, begins_with: Config, store: Store) -> None:
        self.machine.keep(store)
        self.supervisor = Supervisor(self._read, begins_with, self.machine.log, self.machine.system, restored)
        self.supervisor.start()

    def crash(self) -> None:
        """End without a word, and be started again by the service manager: the file is read, and the notes are there."""
        assert self._keeper is not None
        # The next agent takes over the workers that it wants, and ends the others.
        self.machine.crew.queues.clear()
        self._start(self._read(), Store({"state": os.dup(self._keeper.kept["state"][-1])}, self._keeper))

    def _read(self) -> Config:
        if isinstance(self.file, ConfigError):
            raise self.file
        return self.file

    def ask(self, verb: str, **more: Any) -> dict[str, Any]:
        return self.machine.servers[-1].ask({"verb": verb, **more})

    def pass_time(self, seconds: float) -> None:
        self.machine.now += seconds
        self.supervisor.turn()

    @property
    def port(self) -> int:
        """The one port that rules and workers agree on."""
        (queue,) = self.machine.crew.queues
        ports = {int(port) for line in self.machine.rules() for port in re.findall(r"--ports (\d+)", line)}
        assert ports == {queue}
        return queue


def faulty(agent: Agent) -> bool:
    (worker,) = agent.machine.crew.queues.values()
    return [spec.cls.__name__ for spec in worker.specs][-1:] == ["Chaos"]


def break_traffic(agent: Agent, **odds: Any) -> dict[str, Any]:
    return agent.ask("chaos", queue="main", odds=odds, seconds=30)
