"""A change for a time: a reload that is not confirmed, or faults that were asked for, are taken back by the agent itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, Final

from nfq_agent.config.drill import with_chaos
from nfq_agent.config.models import Config, ConfigError
from nfq_agent.log import Log
from nfq_agent.service.status import TrialStatus
from nfq_agent.service.system import FAILURES

# Seconds after its end for which a trial of an earlier process counts: no restart takes longer.
_FORGOTTEN: Final = 600.0
# Seconds until it is tried again to put the configuration from before a trial into force.
_AGAIN: Final = 10.0
# Why a restart is not made.
ON_TRIAL: Final = "a reload or faults are on trial, and a new start would read the file; end that first"
# Why a reload is not tried.
NEW_CODE: Final = (
    "the agent's code has changed on disk, and cannot be taken back: run `nfq-agent restart` first, then reload --confirm"
)
# The note that the file holds a configuration that was taken back.
_TAKEN_BACK: Final = "taken back"
_NONE_WAITS: Final = "no reload waits for a confirmation"


class Trial:
    """The agent keeps the time itself, so that a terminal that is lost undoes the change as well.

    A reload on trial ends when it is confirmed, taken back or over, and by nothing else: another reload meanwhile is part of it.
    Faults also end with a reload, which brings in a configuration without them.
    """

    def __init__(
        self,
        put_back: Callable[[Config], str],
        due: MutableMapping[Callable[[], None], float],
        clock: Callable[[], float],
        log: Log,
        note: Callable[[dict[str, Any] | None], None],
    ) -> None:
        """put_back: puts a configuration into force, and says what changed; raises one of FAILURES. due: what is done when.

        note: keeps what the next process needs to continue a reload on trial; None where there is none.
        """
        self._put = put_back
        self._note = note
        self._due = due
        self._clock = clock
        self._log = log
        self._before: Config | None = None
        # Of faults on trial, their queue and keys; None while it is a reload, or nothing.
        self._drill: tuple[str, Mapping[str, Any]] | None = None
        # Whether the file holds a configuration that was taken back, and what is said to an answer that comes too late.
        self._refused = False
        self._said = _NONE_WAITS
        # How many trials have begun, or were extended: an answer is for one of them.
        self._number = 0

    @property
    def runs(self) -> bool:
        """Whether a reload waits to be confirmed."""
        return self._before is not None

    @property
    def _faults(self) -> bool:
        return self._drill is not None

    @property
    def keeps_file_out(self) -> bool:
        """Whether the file must not be read by the agent's own decision: its content waits for an answer, or was taken back."""
        return self.runs or self._refused

    @property
    def _left(self) -> float:
        """Seconds until what is on trial is taken back."""
        return max(0.0, self._due[self._over] - self._clock())

    def status(self) -> TrialStatus | None:
        """What is on trial, for a person; None where nothing is."""
        if not self.runs:
            return None
        queue, odds = self._drill or ("", {})
        return TrialStatus("faults" if self._faults else "reload", queue, odds, round(self._left, 1))

    def leave(self) -> None:
        """A person asked for a new start. It reads the file, also one that was taken back; a reload on trial continues."""
        if self._refused:
            self._refused = False
            self._keep()

    def resume(self, noted: Mapping[str, Any], restore: Callable[[dict[str, Any]], Config]) -> None:
        """Continue the reload on trial that the previous process left, if it left one: this one read the file, as a reload does.

        noted: what that process noted last. restore: makes a configuration of its table; raises ConfigError.
        """
        self._refused = was_taken_back(noted)
        table, due, number = noted.get("before"), noted.get("due"), noted.get("number")
        if not (isinstance(table, dict) and isinstance(due, float) and isinstance(number, int)):
            return
        self._note(None)
        if due < self._clock() - _FORGOTTEN:
            return
        try:
            before = restore(table)
        except ConfigError as error:
            faults = "; ".join(error.faults)
            self._log(f"the reload that waits for its confirmation cannot be taken back any more, and stays: {faults}", "error")
            return
        self._before, self._number, self._due[self._over] = before, number, due
        self._keep()
        self._log(
            f"a reload from before this start still waits for its confirmation; it is taken back in {self._left:.0f} s", "warning"
        )

    def _keep(self) -> None:
        """Note the reload on trial, or that the file was taken back. Faults end with a start: they are in no file."""
        if self._before is not None and not self._faults:
            self._note({"before": self._before.table, "due": float(self._due[self._over]), "number": self._number})
        else:
            self._note({_TAKEN_BACK: True} if self._refused else None)

    def foresee(self, before: Config, seconds: float | None) -> None:
        """A person's reload is about to be made: from now on the next process may find it in the file, or in force.

        before, seconds: as of `begin`. A trial that runs already is noted, and takes this reload back as well.
        """
        if seconds is not None and (self._faults or not self.runs):
            # What is noted of a configuration with faults has none.
            self._note({"before": before.table, "due": self._clock() + seconds, "number": self._number + 1})

    def unchanged(self) -> None:
        """The reload that was foreseen is not made."""
        self._keep()

    def begin(self, before: Config, seconds: float | None) -> dict[str, Any]:
        """A person's reload is in force. before: what was. seconds: until it has to be confirmed; None asks for nothing.

        Returns what the answer to the reload has beside its message: `trial`, the number that an answer names; `waits`, a
        sentence where an earlier reload still waits.
        """
        self._refused, self._said = False, _NONE_WAITS
        if self._faults:
            # What was in force had the faults.
            before = self._end()
            self._log("the faults have ended with the reload")
        if seconds is None:
            if not self.runs:
                self._keep()
                return {}
            self._number += 1
            self._keep()
            waits = f"an earlier reload waits for its confirmation, and takes this one back with it in {self._left:.0f} s"
            self._log(waits, "warning")
            return {"waits": f"{waits}; `nfq-agent confirm` keeps both"}
        self._begin(self._before or before, seconds)
        return {"trial": self._number}

    def answer(self, keep: bool, faults: bool = False, number: object = None) -> dict[str, Any]:
        """Keep the configuration, or take it back now. faults: only faults are meant, and no reload. number: of the trial that is
        meant; None means the one that runs.

        The answer to `nfq-agent reload --confirm`, and to `nfq-agent chaos off`.
        """
        if self.runs and number not in (None, self._number):
            how = "`nfq-agent confirm` keeps what is in force now, `nfq-agent confirm --undo` takes it back"
            return {"ok": False, "message": f"another change came since, and this is no answer to it; {how}"}
        if faults and not self._faults:
            waits = "; a reload waits for its confirmation: `nfq-agent confirm --undo` takes it back" if self.runs else ""
            return {"ok": False, "message": f"no queue has faults{waits}"}
        if self._before is None:
            return {"ok": False, "message": self._said}
        if not keep:
            return self._take_back("ended" if self._faults else "not confirmed")
        if self._faults:
            return {"ok": False, "message": "faults are not kept; `nfq-agent chaos off` ends them"}
        self._end()
        self._keep()
        self._said = _NONE_WAITS
        self._log("the reload is confirmed")
        return {"ok": True, "message": "the reload is confirmed"}

    @property
    def _busy(self) -> str:
        if self._faults:
            return "a queue has faults already; `nfq-agent chaos off` ends them"
        return "a reload waits to be confirmed; `nfq-agent confirm` keeps it, `nfq-agent confirm --undo` takes it back"

    def drill(self, now: Config, question: Mapping[str, Any]) -> dict[str, Any]:
        """Break the traffic of a queue for a time. now: what is in force. The answer to `nfq-agent chaos`."""
        queue, seconds = str(question.get("queue")), float(question.get("seconds", 0.0))
        odds = dict(question.get("odds", {}))
        if self.runs:
            return {"ok": False, "message": self._busy}
        try:
            self._put(with_chaos(now, queue, odds))
        except ConfigError as error:
            return {"ok": False, "config": True, "message": "\n".join(error.faults)}
        except FAILURES as error:
            return {"ok": False, "message": str(error)}
        self._drill = queue, odds
        self._begin(now, seconds)
        said = " ".join(f"{key}={value}" for key, value in odds.items())
        self._log(f"faults in queue {queue} for {seconds:g} s: {said}", "warning")
        return {"ok": True, "message": f"queue {queue} has faults for {seconds:g} s; `nfq-agent chaos off` ends them"}

    def _begin(self, before: Config, seconds: float) -> None:
        self._before = before
        self._number += 1
        self._due[self._over] = self._clock() + seconds
        self._keep()

    def _over(self) -> None:
        self._take_back("over" if self._faults else "not confirmed in time")

    def _take_back(self, why: str) -> dict[str, Any]:
        assert self._before is not None
        faults = self._faults
        try:
            changed = self._put(self._before)
        except FAILURES as error:
            # The note stays until it is done, also for the next process.
            self._due[self._over] = self._clock() + _AGAIN
            self._keep()
            stays = "the faults stay" if faults else "the new one is in force"
            self._said = (
                f"{why}, and the configuration before {'them' if faults else 'the reload'} could not be restored: {error}; "
                f"{stays}, and it is tried again in {_AGAIN:g} s"
            )
            self._log(self._said, "error")
            return {"ok": False, "message": self._said}
        self._end()
        # The end of faults says nothing about the file: what a person refused before stays out.
        self._refused |= not faults
        self._keep()
        if faults:
            self._said = f"{why}: no faults any more ({changed})"
            self._log(self._said, "warning")
        else:
            self._said = f"{why}: the configuration before the reload is in force again ({changed})"
            self._log(f"{self._said}; the file still holds the other one", "warning")
        return {"ok": True, "message": self._said}

    def _end(self) -> Config:
        before, self._before, self._drill = self._before, None, None
        assert before is not None
        del self._due[self._over]
        return before


def was_taken_back(noted: Mapping[str, Any]) -> bool:
    """Whether the configuration in the file was taken back, by what the previous process noted about its trials."""
    return noted.get(_TAKEN_BACK) is True
