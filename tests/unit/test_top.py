"""The screen of `top`: rates, filters, groups and orders, the keys, and what fits a terminal."""

from __future__ import annotations

import json
import math
import os
import pty
import re
import sys
import termios
from typing import Any

import pytest
from rich.console import Console

from nfq_agent.cli import live_flows
from nfq_agent.cli import top as top_verb
from nfq_agent.cli.flags import Flags
from nfq_agent.cli.flow_records import EVERY, read_filter
from nfq_agent.cli.keys import Keys, split
from nfq_agent.cli.live_flows import Grouping, LiveFlows, Only, Sort, View
from nfq_agent.cli.top import Screen
from nfq_agent.flow_filter import EVERYTHING, parse
from nfq_agent.service import control

SLOW = {"kind": "flow", "src": "10.0.0.1", "sport": 1, "dst": "192.0.2.7", "dport": 443, "proto": "tcp", "bytes": 100}
FAST = {**SLOW, "sport": 2, "tls_sni": "a.test", "protocol": "tls", "unit": "pay.service", "verdict": "accept", "would": "drop"}
DROPPED = {**SLOW, "sport": 3, "dst": "2001:db8::1", "verdict": "drop", "reason": "egress: rule 2", "container": "web"}


def some_flows() -> LiveFlows:
    live = LiveFlows()
    live.add([SLOW, FAST, DROPPED], 1.0)
    # Two records of one flow in one answer: the later one holds.
    live.add([{**SLOW, "bytes": 150}, {**FAST, "bytes": 5100, "reason": "egress: rule 1"}, {**SLOW, "bytes": 200}], 2.0)
    return live


def screen(text: str = "") -> Screen:
    return Screen("default", some_flows(), View(parse(text)), text)


def drawn(shown: Screen, width: int, height: int, now: float = 2.0) -> list[str]:
    console = Console(width=width, height=height, force_terminal=False)
    with console.capture() as captured:
        console.print(shown.draw(width, height, now))
    return [line.rstrip() for line in captured.get().splitlines()]


def typed(shown: Screen, text: str, *keys: str) -> None:
    for key in (*text, *keys):
        shown.press(key)


def test_flows_by_rate() -> None:
    lines = some_flows().lines(View(), 2.0)
    assert [line.rate for line in lines] == [5000.0, 100.0, 0.0]
    assert [line.rate for line in some_flows().lines(View(), 8.0)] == [0.0, 0.0, 0.0]


def test_an_ended_flow_is_shown_for_a_while() -> None:
    live = some_flows()
    live.add([{**FAST, "kind": "end"}], 3.0)
    assert [line.rate for line in live.lines(View(), 3.0)] == [100.0, 0.0, 0.0]
    live.add([], 9.0)
    assert len(live) == 2
    live.add([], 60.0)
    assert len(live) == 0


def test_a_connection_with_the_ports_of_an_ended_one_counts_from_its_own_begin() -> None:
    live = some_flows()
    live.add([{**FAST, "kind": "end", "bytes": 5100}], 3.0)
    live.add([{**FAST, "bytes": 40}], 4.0)
    live.add([{**FAST, "bytes": 140}], 5.0)
    (line,) = live.lines(View(parse("sport = 2")), 5.0)
    assert line.rate == 100.0


@pytest.mark.parametrize(
    ("keys", "ports"),
    [("", [2, 1, 3]), ("d", [2, 3]), ("dd", [2, 1, 3]), ("w", [2]), ("s", [2, 1, 3]), ("fsport != 2\r", [1, 3])],
)
def test_keys_choose_the_flows(keys: str, ports: list[int]) -> None:
    shown = screen()
    typed(shown, "", *split(keys))
    assert [line.record["sport"] for line in shown.live.lines(shown.view, 2.0)] == ports


def test_keys_choose_the_groups() -> None:
    shown = screen()
    names = []
    for _ in Grouping:
        shown.press("g")
        names.append([(line.name, line.flows) for line in shown.live.lines(shown.view, 2.0)])
    assert names == [
        [("pay.service", 1), ("-", 1), ("web", 1)],
        [("a.test", 1), ("-", 2)],
        [("192.0.2.7:443", 2), ("[2001:db8::1]:443", 1)],
        [("", 1), ("", 1), ("", 1)],
    ]


def test_a_wrong_filter_is_shown_and_the_old_one_stays() -> None:
    shown = screen("dport = 443")
    typed(shown, "f", *["backspace"] * 11, *"nam = x", "enter")
    assert drawn(shown, 80, 24)[1] == "character 1: 'nam' is not a field; like it: name"
    assert drawn(shown, 80, 24)[-1] == "filter: nam = x_"
    shown.press("escape")
    assert shown.text == "dport = 443"
    assert drawn(shown, 80, 24)[1] == "all, by flow, sorted by rate  filter: dport = 443"


def test_a_long_fault_of_a_filter_takes_two_lines() -> None:
    shown = screen()
    typed(shown, "f", *"bytes > 1TB", "enter")
    whole = "character 9: '1TB' is not a size; allowed: a number of bytes, or a number with kB, MB or GB, as in 64MB"
    for width in (60, 80, 200):
        lines = drawn(shown, width, 24)
        assert len(lines) == 24
        assert " ".join(lines[:2] if width < 200 else lines[1:2]) == whole


def test_what_is_typed_is_erased_by_the_keys_of_a_terminal() -> None:
    shown = screen()
    typed(shown, "f", *"dport = 443 and  bytes > 1 ", *split("\x17"))
    assert shown.typed == "dport = 443 and  bytes > "
    typed(shown, "", *split("\x17\x17"))
    assert shown.typed == "dport = 443 and  "
    typed(shown, "", *split("\x15\x17"), "suspend")
    assert shown.typed == ""


def test_a_paused_screen_stands_still() -> None:
    shown = screen()
    before = drawn(shown, 80, 24)
    shown.press("p")
    shown.live.add([{**DROPPED, "bytes": 100_100}], 3.0)
    assert drawn(shown, 80, 24, 3.0)[2:] == before[2:]
    shown.press("p")
    assert "50.0 kB" in drawn(shown, 80, 24, 3.0)[3]


@pytest.mark.parametrize("grouping", Grouping)
@pytest.mark.parametrize("sort", Sort)
def test_a_page_is_a_part_of_all_lines(sort: Sort, grouping: Grouping) -> None:
    live = some_flows()
    for second in (1.0, 2.0):
        live.add(
            [
                {**(FAST, SLOW, DROPPED)[number % 3], "sport": number, "packets": number % 7, "duration": number % 5,
                 "bytes": int(second) * number % 11 * 100, "tls_sni": f"{number % 4}.test"}
                for number in range(100, 150)
            ],
            second,
        )  # fmt: skip
    view = View(parse("sport >= 100"), sort=sort, grouping=grouping)
    lines = live.lines(view, 2.0)
    for first, most in ((0, 3), (2, 3), (0, 1000), (45, 10), (1000, 5)):
        page = live.page(view, 2.0, first, most)
        assert page.lines == lines[first : first + most]
        assert (page.count, page.flows) == (len(lines), 50)
        assert page.rate == pytest.approx(sum(line.rate for line in lines))
        assert (page.dropped, page.would_drop) == (
            sum(line.dropped for line in lines),
            sum(line.would_drop for line in lines),
        )


def test_of_too_many_flows_those_that_were_told_last_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_flows, "MOST", 3)
    live = LiveFlows()
    live.add([{**SLOW, "sport": port} for port in (1, 2, 3)], 1.0)
    live.add([{**SLOW, "sport": port} for port in (1, 4)], 2.0)
    assert {line.record["sport"] for line in live.lines(View(), 2.0)} == {1, 3, 4}


def test_lines_are_scrolled() -> None:
    shown = screen()
    shown.live.add([{**SLOW, "sport": port, "bytes": 1} for port in range(100, 200)], 2.0)
    drawn(shown, 80, 24)
    for key in ("page-down", "down", "up", "down"):
        shown.press(key)
    assert drawn(shown, 80, 24)[1].endswith("from line 22")
    typed(shown, "", *["page-down"] * 9)
    assert drawn(shown, 80, 24)[1].endswith("from line 84")
    shown.press("home")
    assert "from line" not in drawn(shown, 80, 24)[1]


@pytest.mark.parametrize("grouping", Grouping)
@pytest.mark.parametrize(("width", "height"), [(60, 10), (80, 24), (200, 60)])
def test_it_fills_the_terminal_and_no_more(width: int, height: int, grouping: Grouping) -> None:
    shown = screen()
    shown.view.grouping = grouping
    shown.live.add([{**FAST, "sport": port, "tls_sni": "x" * 253, "bytes": 10**12} for port in range(100, 200)], 2.0)
    lines = drawn(shown, width, height)
    assert len(lines) == height
    assert max(map(len, lines)) <= width


@pytest.mark.parametrize("width", [60, 80, 200])
@pytest.mark.parametrize("sort", list(Sort))
@pytest.mark.parametrize("grouping", [Grouping.NONE, Grouping.UNIT])
def test_counters_of_ten_digits_are_whole(width: int, sort: Sort, grouping: Grouping) -> None:
    live = LiveFlows()
    figures = {"bytes": 9_876_543_210_123, "packets": 9_876_543_210, "duration": 3e7}
    live.add([{**FAST, **figures}, {**DROPPED, **figures, "sport": 65535}], 1.0)
    shown = Screen("default", live, View(EVERYTHING, sort, grouping), missed=9_876_543_210)
    lines = drawn(shown, width, 24, 1.0)
    assert all(len(line) <= width for line in lines)
    # Its title stands above what they are sorted by.
    assert {Sort.RATE: "B/s", Sort.NEWEST: "age"}.get(sort, sort.value) in lines[2].split()
    if sort is Sort.PACKETS:
        assert sum("9876543210" in line for line in lines[3:]) == 2
    assert "…" not in "".join(re.findall(r"^ *\S+", "\n".join(lines[3:]), re.MULTILINE))


def test_a_row_says_what_is_known() -> None:
    lines = drawn(screen(), 80, 24)
    assert lines[0] == "Instance default: 3 flows, 1 dropped, 1 would drop, 5.1 kB/s"
    assert lines[3].startswith("  5.0 kB pay.ser")
    assert "192.0.2.7:443" in lines[3]
    assert "would drop" in lines[3]
    wide = drawn(screen(), 200, 24)
    assert "10.0.0.1:2" in wide[3]
    assert "[2001:db8::1]:443" in wide[5]


def test_control_characters_of_a_name_do_not_reach_the_terminal() -> None:
    shown = screen()
    shown.live.add([{**FAST, "tls_sni": "a\x1b[2Jb", "bytes": 9000}], 3.0)
    assert "\x1b" not in "".join(drawn(shown, 80, 24, 3.0))
    assert "a?[2Jb" in drawn(shown, 200, 24, 3.0)[3]


def test_keys_of_a_terminal_are_told_apart() -> None:
    assert split("qö\x1b[A\x1b[6~\x1bOB\r\x7f\x1b[99~\x01\x1b") == [
        "q", "ö", "up", "page-down", "down", "enter", "backspace", "escape",
    ]  # fmt: skip


def test_a_terminal_gets_its_settings_back(monkeypatch: pytest.MonkeyPatch) -> None:
    master, slave = pty.openpty()
    with open(slave, closefd=True) as terminal, open(master, "wb", buffering=0) as other:
        monkeypatch.setattr(sys, "stdin", terminal)
        before = termios.tcgetattr(slave)
        with Keys(True) as keys:
            assert not termios.tcgetattr(slave)[3] & termios.ECHO
            assert keys.wait(0.0) == []
            other.write(b"g")
            assert keys.wait(9.0) == ["g"]
        assert termios.tcgetattr(slave) == before


def test_without_a_terminal_no_key_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with open(os.devnull) as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        with Keys(True) as keys:
            assert keys.wait(0.0) == []


class Agent:
    """What answers instead of an agent. Ends the verb when it has told everything."""

    def __init__(self, *answers: list[dict[str, Any]]) -> None:
        self._answers = list(answers)

    def ask(self, instance: str, question: dict[str, Any], timeout: float = 30.0) -> dict[str, Any]:
        assert (instance, question["packets"]) == ("default", None)
        if not self._answers:
            raise KeyboardInterrupt
        return {"ok": True, "records": self._answers.pop(0), "places": {}, "missed": 1}


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = Agent([SLOW, FAST], [{**FAST, "bytes": 100 + int(EVERY * 2_000_000)}])
    monkeypatch.setattr(control, "ask", agent.ask)


def test_as_json_they_are_printed_once(answers: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert top_verb.top(Flags(instance="default"), "sport = 2", 60.0, True) == 0
    out = capsys.readouterr().out
    assert '"tls_sni": "a.test"' in out
    assert '"missed": 2' in out
    assert '"sport": 1' not in out


def test_without_a_terminal_a_table_is_printed_at_the_end(answers: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert top_verb.top(Flags(instance="default"), "", 60.0, False) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("Instance default: 2 flows, 0 dropped, 1 would drop, ")
    assert len([line for line in out if "192.0.2.7:443" in line]) == 2


@pytest.mark.parametrize(
    ("as_json", "said"),
    [
        (False, "nfq-agent: no terminal for a screen: a table every 0 s until Ctrl-C; --for TIME prints one at the end\n"),
        (True, "nfq-agent: one object is printed at the end: after --for TIME, else by Ctrl-C\n"),
    ],
)
def test_without_an_end_and_a_terminal_it_says_what_it_prints(
    answers: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, as_json: bool, said: str
) -> None:
    monkeypatch.setattr(top_verb, "_PRINTED", 0.0)
    assert top_verb.top(Flags(instance="default"), "", math.inf, as_json) == 0
    out, err = capsys.readouterr()
    assert err.startswith(said)
    # Each of the two answers, and what is known when it is interrupted.
    assert out.count("Instance default: 2 flows") == (0 if as_json else 3)


@pytest.mark.parametrize(("text", "column"), [("dport = 1 and nam = x", 14), ("name = ä and (dport = 1", 23)])
def test_a_fault_of_a_filter_stands_below_its_character(text: str, column: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert read_filter(text) is None
    line, mark = capsys.readouterr().err.splitlines()
    assert line == f"nfq-agent: {text}"
    assert mark.index("^") == len("nfq-agent: ") + column


def test_a_wrong_filter_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert top_verb.top(Flags(instance="default"), "nam = x", 60.0, False) == 2
    assert "character 1: 'nam' is not a field" in capsys.readouterr().err


def test_without_an_agent_it_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert top_verb.top(Flags(instance="no-such"), "", 60.0, False) == 1
    assert "no-such" in capsys.readouterr().err


def test_names_are_sorted_as_their_sort_says() -> None:
    live = some_flows()
    live.add([{**SLOW, "sport": 9, "packets": 7, "duration": 0.5}, {**FAST, "duration": 3.0}, {**SLOW, "duration": 2.0}], 3.0)
    assert live.lines(View(sort=Sort.PACKETS, only=Only.ALL), 3.0)[0].record["sport"] == 9
    assert [line.age for line in live.lines(View(sort=Sort.NEWEST), 3.0)] == [0.0, 0.5, 2.0, 3.0]


def test_what_was_told_since_the_last_question_is_shown_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = iter([[], [SLOW]])

    def ask(*_: Any) -> dict[str, Any]:
        return {"ok": True, "places": {}, "missed": 0, "records": next(answers)}

    monkeypatch.setattr(control, "ask", ask)
    assert top_verb.top(Flags(), "", 0.001, True) == 0
    assert [flow["sport"] for flow in json.loads(capsys.readouterr().out)["flows"]] == [1]
