"""How events are written: JSON lines that are whole whatever is in them, and console lines that steer no terminal."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from nfq_agent.log import Log, LogEvent, as_json, console, journal

FIELDS = st.dictionaries(st.text(max_size=12), st.one_of(st.text(), st.integers(), st.none()), max_size=30)


@given(st.text(), FIELDS, st.integers(400, 5000))
def test_a_json_line_is_whole_and_fits(message: str, fields: dict[str, object], most: int) -> None:
    line = as_json(LogEvent("info", message, 1.0, fields), most)
    assert len(line) <= most
    assert line.count(b"\n") == 1
    assert json.loads(line)["level"] == "info"


def test_a_hostile_name_is_shortened_and_the_rest_stays() -> None:
    event = LogEvent("info", "tls", 1.0, {"tls_sni": "\\" * 4000, "src": "192.0.2.1"})
    record = json.loads(as_json(event, 4096))
    assert record["cut"] is True
    assert record["src"] == "192.0.2.1"
    assert 1000 <= len(record["tls_sni"]) < 4000


def test_many_short_fields_are_left_out_before_the_message() -> None:
    record = json.loads(as_json(LogEvent("info", "what happened", 1.0, {f"f{n}": "x" * 20 for n in range(500)}), 4096))
    assert record["message"] == "what happened"
    assert record["cut"] is True


def test_a_short_message_of_wide_characters_is_shortened_too() -> None:
    """Each takes twelve bytes in JSON; shortening once never ended."""
    record = json.loads(as_json(LogEvent("info", "\N{GRINNING FACE}" * 63, 1.0, {"a": "b"}), 400))
    assert set(record["message"]) == {"\N{GRINNING FACE}"}
    assert record["cut"] is True


def test_a_field_with_a_long_name_is_left_out() -> None:
    record = json.loads(as_json(LogEvent("info", "m", 1.0, {"a" * 500: None}), 400))
    assert record == {"time": "1970-01-01T00:00:01.000000Z", "level": "info", "message": "m", "cut": True}


def test_what_fits_is_not_cut() -> None:
    assert json.loads(as_json(LogEvent("warning", "m", 1.0, {"a": "b"}), 4096)) == {
        "a": "b", "time": "1970-01-01T00:00:01.000000Z", "level": "warning", "message": "m",
    }  # fmt: skip


@given(st.text())
def test_a_console_line_is_one_line_without_control_characters(message: str) -> None:
    line = console(LogEvent("info", message, 1.0))
    assert line.count(b"\n") == 1
    assert line.decode(errors="replace").rstrip("\n").isprintable()


def test_the_journal_gets_a_text_with_a_newline_by_its_length() -> None:
    assert b"MESSAGE\n\x03\0\0\0\0\0\0\0a\nb\n" in journal(LogEvent("info", "a\nb", 1.0))


def test_the_journal_gets_a_truth_value_as_json_has_it() -> None:
    event = LogEvent("info", "m", 1.0, {"ech": True, "dot": False, "duration": 0.25, "left": None})
    assert journal(event).splitlines()[3:] == [b"NFQ_ECH=true", b"NFQ_DOT=false", b"NFQ_DURATION=0.25"]
    assert json.loads(as_json(event)).items() >= event.fields.items()


class Sink:
    """Takes events while it is open, and keeps them."""

    def __init__(self) -> None:
        self.open = True
        self.taken: list[tuple[str, str, float]] = []

    def __call__(self, event: LogEvent) -> bool:
        if self.open:
            self.taken.append((event.level, event.message, event.time))
        return self.open


def test_lines_that_were_lost_are_counted_and_said_first() -> None:
    sink = Sink()
    log = Log(sink, "info", lambda: 5.0)
    sink.open = False
    for _ in range(3):
        log("not taken")
    log("below the level", level="debug")
    assert (log.lost, sink.taken) == (3, [])
    sink.open = True
    log("taken", level="error")
    assert log.lost == 0
    assert sink.taken == [
        ("warning", "3 log lines were lost: the log did not accept them", 5.0),
        ("error", "taken", 5.0),
    ]
    log("the next")
    assert [message for _, message, _ in sink.taken][2:] == ["the next"]


def test_a_count_that_was_not_taken_itself_is_kept() -> None:
    answers = iter([False, False, True, True, True])
    offered: list[str] = []

    def write(event: LogEvent) -> bool:
        offered.append(event.message)
        return next(answers)

    log = Log(write, "info", lambda: 0.0)
    log("one")
    log("two")
    assert log.lost == 1
    log("three")
    assert log.lost == 0
    count = "1 log lines were lost: the log did not accept them"
    assert offered == ["one", count, "two", count, "three"]


def test_what_becomes_another_log_says_there_what_it_said_here() -> None:
    first, second = Sink(), Sink()
    log = Log(first, "warning", lambda: 0.0)
    before = log.become(Log(second, "error", lambda: 0.0))
    log("too low for the second", level="warning")
    log("for the second", level="error")
    before("for the first", level="warning")
    before("too low for the first")
    assert [message for _, message, _ in first.taken] == ["for the first"]
    assert [message for _, message, _ in second.taken] == ["for the second"]


def test_a_field_of_the_journal_has_its_name_and_one_without_a_value_is_left_out() -> None:
    entry = journal(LogEvent("warning", "what happened", 1.0, {"queue": 0, "name": None, "text": ""}))
    assert entry.splitlines() == [
        b"MESSAGE=what happened", b"PRIORITY=4", b"SYSLOG_IDENTIFIER=nfq-agent", b"NFQ_QUEUE=0", b"NFQ_TEXT=",
    ]  # fmt: skip
