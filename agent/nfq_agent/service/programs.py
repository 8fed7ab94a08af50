"""What a worker needs to know the programs behind flows (`exe`): a right for a moment, and the process that keeps it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from nfq_agent.config.models import ElementSpec
from nfq_agent.host.users import CAP_NET_ADMIN, CAP_SYS_PTRACE, User, become, has_capability

if TYPE_CHECKING:
    from nfq_agent.host.programs import ProgramFinder


def asks_programs(specs: Iterable[ElementSpec]) -> bool:
    """Whether one of these elements asks for programs."""
    return any(spec.cls.reads_program_of(spec.options) for spec in specs)


def capabilities(specs: Iterable[ElementSpec]) -> tuple[int, ...]:
    """What the worker of a queue with these elements has until its finder runs."""
    looks = asks_programs(specs) and has_capability(CAP_SYS_PTRACE)
    return (CAP_NET_ADMIN, CAP_SYS_PTRACE) if looks else (CAP_NET_ADMIN,)


def program_finder(
    specs: Iterable[ElementSpec], user: User | None, warn: Callable[[str], None], on_skip: Callable[[], None]
) -> ProgramFinder | None:
    """In the worker's process: what finds programs; None where no element asks. The worker gives its right to look up.

    on_skip: called for each flow whose program is not searched, since searches took too much time. Raises OSError.
    """
    if not asks_programs(specs):
        return None
    # In memory already: host/owners.py, which takes the finder, imports it.
    from nfq_agent.host.programs import ProgramFinder

    finder = ProgramFinder(user, on_skip=on_skip)
    if not finder.complete:
        what = "only programs of the agent's own user are known (`exe`): CAP_SYS_PTRACE is missing"
        warn(f"{what}; allowed: the drop-in exe.conf of the unit")
    if user is not None:
        become(user)
    return finder
