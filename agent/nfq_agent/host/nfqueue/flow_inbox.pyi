"""The types of flow_inbox.pyx, which says what they do."""

from collections import deque
from collections.abc import Callable, Iterable
from typing import final

from nfq_agent.answering import Answering
from nfq_agent.host.nfqueue.inbox import Inbox
from nfq_agent.host.nfqueue.messages import FlowTurn
from nfq_agent.packet import Packet
from nfq_agent.verdict import Verdict

def glances_of(found: Iterable[bool]) -> list[int]: ...

@final
class FlowInbox(Inbox):
    def forget_messages(self) -> None: ...
    def note_flows(self, table: Answering | None, now: float) -> None: ...
    def judge(
        self, budget: int, pending: deque[bytes], table: Answering, time: float, ask: Callable[[Packet], Verdict]
    ) -> FlowTurn: ...
    def judge_each(
        self,
        budget: int,
        pending: deque[bytes],
        table: Answering,
        time: float,
        ask: Callable[[Packet], Verdict],
        single: Callable[[int, Verdict], bytes],
        together: int,
        spin: float,
    ) -> FlowTurn: ...
