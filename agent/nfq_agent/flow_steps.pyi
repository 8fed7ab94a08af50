"""The types of flow_steps.pyx, which says what they do."""

from collections.abc import Sequence
from typing import final

from nfq_agent.flow_table import FlowTable
from nfq_agent.step_chain import Steps
from nfq_agent.steps import Step
from nfq_agent.verdict import Verdict

@final
class FlowSteps(Steps):
    def __init__(self, steps: Sequence[Step], monitor: bool, table: FlowTable, first: bool) -> None: ...
    def judge(self, packet: bytes, length: int, now: float, time: float, ready: bool = True) -> tuple[Verdict | None, int]: ...
