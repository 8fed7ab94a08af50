"""The types of step_chain.pyx, which says what they do."""

from collections.abc import Sequence

from nfq_agent.answering import Answering
from nfq_agent.steps import Step
from nfq_agent.verdict import Verdict

MOST: int

class Steps(Answering):
    def __init__(self, steps: Sequence[Step], monitor: bool) -> None: ...
    def look_up(self, packet: bytes, now: float) -> tuple[Verdict | None, int]: ...
