"""The types of answering.pyx, which says what they do."""

from nfq_agent.packet import Packet
from nfq_agent.verdict import Verdict

class Answering:
    verdicts: list[Verdict]
    hears: bool
    def take_heard(self) -> list[tuple[Packet, Verdict, int]]: ...
