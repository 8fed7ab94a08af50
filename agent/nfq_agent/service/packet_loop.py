"""One worker's loop: read packets, judge them, send the verdicts; turn by turn, until it is told to stop.

It runs in a process of its own, without the right to change a rule. Every packet that it reads gets its verdict, whatever an
element does. Events are logged after the verdicts of the turn are sent.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable
from functools import partial
from socket import MSG_DONTWAIT
from typing import Any, Final

from nfq_agent.answering import Answering
from nfq_agent.counters import Counters
from nfq_agent.element import Emit
from nfq_agent.element_chain import ElementChain
from nfq_agent.host.child import DONE, READY, STOP
from nfq_agent.host.own_process import OwnProcess
from nfq_agent.latency import Latency
from nfq_agent.packet import Packet
from nfq_agent.service.delayed import DelayedVerdicts
from nfq_agent.service.flow_watch import FlowWatch
from nfq_agent.service.order import await_order
from nfq_agent.service.packet_judge import EVERY_PACKET, PacketJudge, WorkerSettings
from nfq_agent.service.packet_source import Control, FlowQueue, KernelQueue, PacketSource
from nfq_agent.service.poll_count import PollCount
from nfq_agent.service.takeover import Takeover
from nfq_agent.service.turn_policy import BUDGET, FIRST, PATIENCE, Turn, TurnPolicy, forgets
from nfq_agent.verdict import RETAIN, Action, Verdict, VerdictError

# How often the loop checks other things than packets, in seconds: the control socket while packets keep coming, and the counters
# that the source keeps. And how often a worker shows a sign of life while no packets come.
_LOOK: Final = 0.05
_BEAT: Final = 1.0
# Seconds without a packet after which a worker without a supervisor ends, and seconds after which it ends in any case.
_IDLE: Final = 0.5
_LINGERS: Final = 10.0

# Sends a whole packet; the interface's index is for a destination of link-local scope. Raises OSError.
Inject = Callable[[bytes, int], None]


class WorkerLoop:
    """The loop of one worker over one source of packets.

    inject: sends the packets that go with a verdict (`Verdict.inject`). Without it they are not sent, which is logged. by_flow:
    the source, if it reads by flows. watch: reports flows while they are watched. latency: of verdicts. moment: see PacketJudge.
    """

    def __init__(  # noqa: PLR0913  # one for each thing that it uses
        self,
        source: PacketSource,
        chain: ElementChain,
        settings: WorkerSettings,
        counters: Counters,
        control: Control,
        emit: Emit,
        inject: Inject | None = None,
        process: OwnProcess = OwnProcess(),  # noqa: B008  # frozen
        by_flow: FlowQueue | None = None,
        watch: FlowWatch | None = None,
        latency: Latency | None = None,
        moment: Callable[[Packet], float] | None = None,
    ) -> None:
        self._shut = process.shut
        self._source = source
        self._kernel = source.kernel
        self._chain = chain
        self._settings = settings
        self._counters = counters
        self._control = control
        self._emit = emit
        self._inject = inject
        self._beat = process.beat
        self._judge = PacketJudge(chain, settings, counters, emit, source.check, moment)
        self._known: dict[Any, Verdict] = {}
        self._asked = 0
        self._delayed = DelayedVerdicts()
        self._now = self._looked = self._counted = self._served = 0.0
        self._stopping = False
        # Without a supervisor: when to end at the latest. `_served` is when the latest packet came, then.
        self._leaves: float | None = None
        self._takeover = Takeover(settings.lost, settings.on_error, counters, emit)
        # How many packets of many datagrams are counted.
        self._cut = 0
        self._watch = watch
        # Whether no packet waited at some moment since the watch was last tended.
        self._caught_up = True
        self._latency = Latency() if latency is None else latency
        self._turn, waits = self._choose_turn(by_flow)
        # The turn while no flows are watched.
        self._unwatched = self._turn
        self._policy = TurnPolicy(waits, settings.busy_poll)
        self._polled = PollCount(self._kernel)

    def _choose_turn(self, by_flow: FlowQueue | None) -> tuple[Callable[[], int], bool]:
        """The kind of turn, and whether it may wait for packets."""
        kernel = self._kernel
        monitored = self._settings.monitor and self._settings.default.action is Action.DROP
        if kernel is None:
            return self._judge_each, False
        # A drop that is to be logged has to be looked at.
        looks = self._settings.drop_lines is not None and self._settings.default.action is Action.DROP
        if len(self._chain) == 0 and not monitored and not looks:
            return partial(self._pass_all, kernel), kernel.may_wait
        # A listener is shown each packet, so that a known verdict saves nothing. A five-tuple does not tell whose packet it is.
        if self._chain.pure and not self._chain.listens and not self._chain.reads_process:
            return partial(self._look_up, kernel), kernel.may_wait
        if by_flow is None or os.environ.get(EVERY_PACKET):
            return self._judge_each, False
        if (steps := self._judge.compile_chain()) is not None:
            return partial(self._look_up_flows, by_flow, steps), kernel.may_wait
        if (flows := self._judge.settle_flows()) is not None:
            return partial(self._look_up_flows, by_flow, flows), kernel.may_wait
        return self._judge_each, False

    def run(self) -> None:
        """Serve until `stop` is read from `control`, or its other end is closed; say `done` when nothing is owed any more.

        Raises QueuePermissionError if the kernel does not let this process answer. Any other exception is a fault of the agent.
        """
        source, counters = self._source, self._counters
        if not self._settings.waits:
            source.start(self._control.fileno())
        if self._kernel is not None:
            self._kernel.be_patient(PATIENCE)
            self._kernel.poll_for(self._policy.poll)
        self._chain.start()
        in_order = False
        try:
            # What elements opened stays open; from here on hostile bytes come in.
            self._shut(None)
            self._control.send(READY)
            if self._settings.waits:
                self._stopping = not self._may_begin()
            while not self._stopping:
                self._now = self._judge.now = time.monotonic()
                count = self._take_turn()
                self._count_cut()
                if self._policy.adapts:
                    self._report(count)
                if self._policy.sleeps(count):
                    self._wait()
                elif self._now - self._looked > _LOOK:
                    self._look_around(0.0)
                if self._leaves is not None:
                    self._stopping = self._has_left(count)
                counters.turns += 1
                counters.heartbeat = time.monotonic_ns()
            in_order = True
        finally:
            self._release(math.inf)
            source.finish()
            self._count_rare()
            self._judge.end_flows()
            if in_order:
                self._judge.keep_silent()
                with contextlib.suppress(OSError):
                    self._control.send(DONE)
            self._judge.stop()

    def _may_begin(self) -> bool:
        """Wait until the predecessor owes nothing any more. False if this worker is not to serve at all."""
        order = await_order(self._control, self._beat, _BEAT)
        if order is None:
            return False
        self._takeover.order = order
        self._source.start(self._control.fileno())
        return True

    def _has_left(self, count: int) -> bool:
        """Whether a worker without a supervisor is to end now."""
        assert self._leaves is not None
        if count:
            self._served = self._now
        else:
            # The control socket is readable all the time: nothing waits for packets here.
            time.sleep(0.001)
        return self._now >= self._leaves or self._now - self._served >= _IDLE

    def _take_turn(self) -> int:
        if self._takeover.due:
            assert self._kernel is not None
            return self._takeover.account_for(self._kernel.lanes, self._judge_packets)
        if self._delayed:
            self._release(self._now)
        count = self._turn()
        self._judge.keep_lapsed()
        self._judge.log_pending()
        return count

    def _wait(self) -> None:
        """Sleep until packets or a control word come; with busy_poll, poll for packets before."""
        if self._policy.polls:
            count = self._poll(self._policy.polls)
            if self._policy.adapts:
                self._report(count)
            if count:
                return
        # Who watches is told of flows that no packet has come of since it began.
        self._look_around(_BEAT if self._judge.watch is None else _LOOK)

    def _poll(self, seconds: float) -> int:
        """Take turns for `seconds`, until one meets packets. Returns how many."""
        begin = now = time.monotonic()
        count = 0
        while not count and now < begin + seconds:
            self._now = self._judge.now = now
            count = self._take_turn()
            now = time.monotonic()
        self._polled.add(count > 0, now - begin)
        return count

    def _report(self, count: int) -> None:
        """Let the policy know what was polled, and let the source poll as the policy says then."""
        changes = self._policy.report(count, time.monotonic(), self._polled.take())
        if changes and self._kernel is not None:
            self._kernel.poll_for(self._policy.poll)

    def _look_around(self, timeout: float) -> None:
        self._looked = self._now
        self._beat()
        timeout = self._delayed.wait(timeout, time.monotonic())
        if self._control.fileno() in self._source.wait(timeout):
            try:
                said = self._control.recv(4096, MSG_DONTWAIT)
            except BlockingIOError:
                said = b"\n"
            except ConnectionResetError:
                # The supervisor was killed with something unread.
                said = b""
            if STOP in said:
                self._stopping = True
            elif not said:
                self._on_orphaned()
        if self._now - self._counted > _LOOK:
            self._counted = self._now
            self._count_rare()
            self._judge.tend()

    def _on_orphaned(self) -> None:
        """The supervisor has ended, and nothing keeps its end of the control socket for another one."""
        if not self._settings.lingers:
            self._stopping = True
        elif self._leaves is None:
            self._leaves, self._served = self._now + _LINGERS, self._now

    def _count_cut(self) -> None:
        if self._kernel is not None and (cut := self._kernel.cut) != self._cut:
            self._counters.cut += cut - self._cut
            self._cut = cut

    def _count_rare(self) -> None:
        self._counters.enobufs = self._source.drops()
        self._counters.unanswered = self._source.unanswered
        self._judge.count_drops(self._stopping)
        if self._watch is not None:
            self._tend_watch(self._watch)
        self._judge.count_flows()

    def _tend_watch(self, watch: FlowWatch) -> None:
        """Report flows while they are watched. Where the chain follows none, packets are looked at meanwhile, as many as may."""
        judge = self._judge
        judge.watch = watch if watch.tend(time.monotonic_ns(), judge.flows, self._caught_up, time.process_time()) else None
        self._caught_up = False
        if judge.watch is not None:
            watch.follow(judge.show_openings(watch.room))
        watched = judge.watch is not None and judge.flows is None
        if self._kernel is not None and (watched or self._turn != self._unwatched):
            self._kernel.note_flows(watch.own_flows, self._now)
        self._turn = self._judge_watched if watched else self._unwatched

    # The three ways of a turn.

    def _pass_all(self, queue: KernelQueue) -> int:
        """No element looks at any packet: all get the default verdict."""
        verdict = self._settings.default
        turn = self._policy.next
        count = queue.skim_each(verdict, turn.budget) if turn.waits else queue.skim(verdict, turn.budget)
        self._end_turn(turn, count, queue)
        if count:
            self._judge.count(verdict, count)
            self._counters.received += count
            self._counters.last_id = queue.last
        return count

    def _look_up(self, queue: KernelQueue) -> int:
        """Every element is pure: its answer follows from the five-tuple and the place, and is remembered by them."""
        if forgets(len(self._known)):
            self._known.clear()
        self._asked = 0
        turn = self._policy.next
        count, runs = queue.sort(self._known, self._remember, turn.budget, turn.waits)
        self._end_turn(turn, count, queue)
        if count:
            for _, number, verdict in runs:
                self._judge.count(verdict, number)
            self._counters.received += count
            self._counters.cached += count - self._asked
            self._counters.last_id = queue.last
        return count

    def _remember(self, packet: Packet, key: bytes | None) -> Verdict:
        self._asked += 1
        verdict, lasts = self._judge.pure_verdict(packet)
        if lasts and key is not None:
            self._known[key] = verdict
        return verdict

    def _look_up_flows(self, queue: FlowQueue, flows: Answering) -> int:
        """Each element says which packets have to be shown to it; the others get their verdict without Python."""
        turn = self._policy.next
        if queue.must_answer_each:
            count = self._judge_each()
            self._policy.ended(Turn(BUDGET, False), count, 0.0)
            return count
        count, runs, left = queue.judge(flows, self._judge.verdict, self._now, turn.budget, turn.waits)
        self._end_turn(turn, count, queue)
        if count:
            for _, number, verdict in runs:
                self._judge.count(verdict, number)
            self._counters.received += sum(number for _, number, _ in runs)
            self._counters.last_id = queue.last
            if left is not None:
                self._answer([left])
        if flows.hears:
            for packet, verdict, which in flows.take_heard():
                self._judge.tell(packet, verdict, which)
        return count

    def _judge_each(self) -> int:
        """The elements look at each packet."""
        packets = self._source.read(FIRST)
        self._caught_up |= len(packets) < FIRST
        if packets:
            self._judge_packets(packets)
            self._latency.observe(time.monotonic() - self._now)
        return len(packets)

    def _end_turn(self, turn: Turn, count: int, queue: KernelQueue | FlowQueue) -> None:
        """Note how long a turn took; a turn that waits, how long its first packet took."""
        seconds = time.monotonic() - self._now
        self._policy.ended(turn, count, seconds)
        self._caught_up |= not turn.waits and count < min(turn.budget, BUDGET)
        if count and (took := queue.first_took if turn.waits else seconds):
            self._latency.observe(took)

    def _judge_watched(self) -> int:
        watch = self._judge.watch
        if watch is not None and not watch.has_time:
            count = self._unwatched()
            watch.leave_unlooked(count)
            return count
        count = self._judge_each()
        # As a turn that waited, so that the loop sleeps when there is nothing.
        self._policy.ended(Turn(BUDGET, True), count, 0.0)
        return count

    def _judge_packets(self, packets: list[Packet]) -> None:
        self._answer([(packet, self._judge.verdict(packet)) for packet in packets])

    def _answer(self, answers: list[tuple[Packet, Verdict]]) -> None:
        judge = self._judge
        self._source.answer([(packet, self._delay(packet, v) if v.delay else v) for packet, v in answers])
        listens = self._chain.listens
        for packet, verdict in answers:
            if verdict.inject:
                self._send(packet, verdict.inject)
        for packet, verdict in answers:
            judge.count(verdict, 1)
            if listens:
                judge.judged(packet, verdict)
        self._counters.received += len(answers)
        self._counters.last_id = answers[-1][0].id if self._kernel is None else self._kernel.last

    def _delay(self, packet: Packet, verdict: Verdict) -> Verdict:
        self._delayed.add(packet, verdict, self._now)
        return RETAIN

    def _release(self, until: float) -> None:
        """Give the delayed verdicts whose time has come."""
        for packet, verdict in self._delayed.due(until):
            # The queue answers by its own policy when too many packets wait, or one waits for too long.
            with contextlib.suppress(VerdictError):
                self._source.verdict(packet, verdict)

    def _send(self, packet: Packet, others: tuple[bytes, ...]) -> None:
        """Send the packets that go with a verdict. The verdict is given, whether they can be sent or not."""
        for other in others:
            try:
                if self._inject is None:
                    raise OSError("there is no raw socket")
                self._inject(other, packet.outdev or packet.indev)
            except OSError as error:
                self._judge.unsent(packet, error)
