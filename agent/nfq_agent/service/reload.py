"""A reload: ordered steps, each with its undo. All of them are done, or none is left."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from nfq_agent.config.models import Config
from nfq_agent.log import Log
from nfq_agent.rules.model import RuleError
from nfq_agent.service.system import FAILURES, Workers
from nfq_agent.service.worker import Worker


@dataclass(frozen=True, slots=True)
class Step:
    """name: for messages. do: does all of it or nothing, then raises. undo: restores the state before `do`."""

    name: str
    do: Callable[[], object]
    undo: Callable[[], object]


def carry_out(steps: Iterable[Step], log: Log) -> None:
    """Do the steps in order. When one raises, undo those before it, the last one first, and raise that.

    An undo that fails is logged and does not keep the others from being undone.
    """
    done: list[Step] = []
    try:
        for step in steps:
            step.do()
            done.append(step)
    except BaseException:
        for step in reversed(done):
            try:
                step.undo()
            except FAILURES as error:
                log(f"after the failed reload, {step.name} could not be undone: {error}; restart the agent", "error")
        raise


@dataclass(frozen=True, slots=True)
class WorkerChange:
    """How the workers differ from those that a configuration needs. replaced: each with its successor."""

    added: Sequence[Worker]
    replaced: Sequence[tuple[Worker, Worker]]
    gone: Sequence[Worker]

    def __str__(self) -> str:
        return f"{len(self.added)} new, {len(self.replaced)} replaced, {len(self.gone)} ended"


def change_of(old: Iterable[Worker], new: Iterable[Worker], all_differ: bool) -> WorkerChange:
    """Compare the workers that serve with those that are wanted. all_differ: replace those too that serve the same way."""
    serving = {worker.key: worker for worker in old}
    wanted = {worker.key: worker for worker in new}
    return WorkerChange(
        added=[worker for key, worker in wanted.items() if key not in serving],
        replaced=[
            (serving[key], worker)
            for key, worker in wanted.items()
            if key in serving and (all_differ or serving[key].differs(worker))
        ],
        gone=[worker for key, worker in serving.items() if key not in wanted],
    )


def worker_steps(crew: Workers, change: WorkerChange) -> list[Step]:
    """The steps that start the new workers. Those that end are left: their rules have to be removed first."""
    steps = [Step("new workers", lambda: crew.add(change.added), lambda: crew.retire(change.added))]
    for old, successor in change.replaced:
        steps.append(
            Step(
                f"the change of {old.title}",
                partial(crew.replace, old, successor),
                partial(crew.replace, successor, old),
            )
        )
    return steps


def log_step(log: Log, opened: Callable[[], Log]) -> Step:
    """The step that lets `log` write as the new configuration says."""
    before: list[Log] = []
    return Step("the log", lambda: before.append(log.become(opened())), lambda: log.become(before.pop()))


def route_step(route: Callable[..., None], old: Config, new: Config) -> Step:
    """The step that adds the routes of `new` to those of `old`: they have to be there before the rules that need them.

    route: makes the routes those of the configurations that it is given. Raises RuleError.
    """

    def add() -> None:
        try:
            route(old, new)
        except RuleError:
            route(old)
            raise

    return Step("the routes", add, lambda: route(old))
