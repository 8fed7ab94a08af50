"""Files that are no configuration at all: each is refused in words, with the line where that can be said."""

from __future__ import annotations

import os
from datetime import date, datetime, time
from pathlib import Path
from typing import Any

import pytest
from faulty import faults
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from nfq_agent.config.file import load
from nfq_agent.config.model import Model
from nfq_agent.config.models import Config, ConfigError
from nfq_agent.config.source import key_as_written
from nfq_agent.elements import PACKET_ELEMENTS, packet_element
from unit.test_wording import FOREIGN, TABLES, models

NOT_TOML = "not TOML: "
DEEP = "not TOML: tables or lists are nested too deeply; allowed: at most 50 levels"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("[queue.q]\n# \u00e4\n".encode("latin-1"), NOT_TOML + "byte 0xe4 is not UTF-8 (at line 2); allowed: text in UTF-8"),
        ("[queue.q]\n".encode("utf-16"), NOT_TOML + "byte 0xff is not UTF-8 (at line 1); allowed: text in UTF-8"),
        (b"a = " + b"[" * 3000 + b"]" * 3000, DEEP),
        # Not too deep for tomllib.
        (b"a = " + b"{a=" * 400 + b"1" + b"}" * 400, DEEP),
        (b"[" + b".".join([b"a"] * 3000) + b"]\n", DEEP),
        (
            b"\n[queue.q]\nnum = " + b"9" * 5000 + b"\n",
            NOT_TOML + "a number is too large (at line 3); allowed: whole numbers of 64 bits",
        ),
        (
            b"[queue.q]\nnum = 0x" + b"f" * 5000 + b"\n",
            "queue.q.num: a number is too large (line 2); allowed: whole numbers of 64 bits",
        ),
        (
            b'[element.e]\nlist = [\n1,\n{ "a b" = 9223372036854775808 }]\n',
            'element.e.list[2]."a b": a number is too large (line 4); allowed: whole numbers of 64 bits',
        ),
        (b"[queue.q]\n[queue.q]\n", NOT_TOML + "Cannot declare [queue.q] twice (at line 2, column 9); allowed: TOML 1.0"),
        (b"[queue.q]\nelements = [\n", NOT_TOML + "Invalid value (at line 2, the end of the file); allowed: TOML 1.0"),
    ],
)
def test_what_is_no_toml_is_told_with_its_line(tmp_path: Path, data: bytes, expected: str) -> None:
    assert faults(tmp_path, data) == [expected]


def test_the_mark_of_an_encoding_and_other_line_ends_are_read(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_bytes(b"\xef\xbb\xbf[queue.q]\r\nnum = 7\r\n")
    assert load(tmp_path / "x.toml").queue["q"].num == 7
    (fault,) = faults(tmp_path, b"\xef\xbb\xbf[queue.q]\r\n\r\nnum = 70000\r\n")
    assert fault.startswith("queue.q.num: 70000 is too large (line 3)")


def test_a_key_in_quotes_is_told_as_it_is_written_with_its_line(tmp_path: Path) -> None:
    told = faults(tmp_path, b'[queue."a\\nb\\u001b[31m"]\n\nnum = 70000\n"n\\u0061m" = 1\n["a.b"]\n')
    assert [fault.partition("; allowed")[0] for fault in told] == [
        r"""queue."a\nb\u001b[31m": 'a\nb\x1b[31m' is not valid (line 1)""",
        r'queue."a\nb\u001b[31m".num: 70000 is too large (line 3)',
        r"""queue."a\nb\u001b[31m".nam: unknown key (did you mean 'num'?) (line 4)""",
        '"a.b": unknown key (line 5)',
    ]


def test_a_pipe_that_nothing_writes_to_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.toml")
    with pytest.raises(ConfigError, match="is a named pipe; allowed: a readable TOML file"):
        load(tmp_path / "pipe.toml")
    os.mkfifo(tmp_path / "nets", 0o600)
    (fault,) = faults(
        tmp_path,
        b'[queue.q]\nelements = ["e"]\n[element.e]\ntype = "policy"\nrule = [{ action = "drop", src = "file:nets" }]\n',
    )
    assert fault.endswith("nets: is not a regular file (line 5); allowed: one, or a link to one")


def test_a_pipe_of_the_shell_is_read(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.write(write, b"[queue.q]\nnum = 7\n")
    os.close(write)
    assert load(Path(f"/dev/fd/{read}")).queue["q"].num == 7
    os.close(read)


RULE = '[queue.q]\nelements = ["e"]\n[element.e]\ntype = "policy"\nrule = [{ action = "drop", %s }]\n'


def test_all_bad_members_of_a_list_with_files_are_told(tmp_path: Path) -> None:
    (tmp_path / "bad").write_text("10.0.0.0/8\nten\n")
    (tmp_path / "empty").write_text("")
    told = faults(tmp_path, RULE % 'src = [\n"file:none", "a",\n"file:bad", "10.0.0.0/8", "file:", "file:empty"]')
    assert [fault.partition("; allowed")[0].replace(f"{tmp_path}/", "") for fault in told] == [
        "element.e.rule[1].src: none: cannot be read: No such file or directory (line 6)",
        "element.e.rule[1].src: 'a' is not a valid network (line 6)",
        "element.e.rule[1].src: file:bad, line 2: 'ten' is not a valid network (line 7)",
        "element.e.rule[1].src: 'file:' is not the name of a file (line 7)",
        "element.e.rule[1].src: file:empty has no entry (line 7)",
    ]
    (fault,) = faults(tmp_path, RULE % 'src = "file:a\\u0000b"')
    assert fault.startswith(r"element.e.rule[1].src: 'file:a\x00b' is not the name of a file (line 5); allowed: file:NAME")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            '[queue.q]\nelements = ["nfq_agent.elements.policy:Polcy"]\n',
            "queue.q.elements: nfq_agent.elements.policy:Polcy cannot be imported: module 'nfq_agent.elements.policy' has no "
            "attribute 'Polcy' (line 2); allowed: package.module:Class",
        ),
        (
            '[queue.q]\nelements = ["nfq_agent.nothing:Policy"]\n',
            "queue.q.elements: nfq_agent.nothing:Policy cannot be imported: No module named 'nfq_agent.nothing' (line 2); "
            "allowed: package.module:Class",
        ),
        (
            '[queue.q]\nelements = ["e"]\n[element.e]\ntype = 5\n',
            "element.e: type = 5 is not the name of an element (line 3); allowed: a name in quotes",
        ),
        (
            '[proxy.p]\nelements = ["e"]\n[element.e]\ntype = ["delay"]\n',
            "element.e: type = ['delay'] is not the name of an element (line 3); allowed: a name in quotes",
        ),
    ],
)
def test_the_kind_of_an_element_that_is_none(tmp_path: Path, text: str, expected: str) -> None:
    assert faults(tmp_path, text) == [expected]


def written(value: Any) -> str:
    """A value as TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        quoted = key_as_written(value)
        return quoted if quoted[:1] == '"' else f'"{quoted}"'
    if isinstance(value, list):
        return f"[{', '.join(map(written, value))}]"
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{key_as_written(key)} = {written(each)}' for key, each in value.items())} }}"
    return value.isoformat() if isinstance(value, date | time) else str(value)


WORDS = st.sampled_from(
    [
        "",
        "a",
        "q",
        "e",
        "log",
        "policy",
        "80",
        "1:2",
        "2:1",
        "10.0.0.0/8",
        "10.0.0.1/8",
        "file:",
        "file:nothing",
        "file:\0",
        "*",
        "5s",
    ]
)
NUMBERS = st.integers(-(1 << 64), 1 << 64) | st.integers(-2, 70000) | st.floats()
SCALARS = st.booleans() | NUMBERS | WORDS | st.text(st.characters(max_codepoint=0x3000), max_size=6) | st.dates() | st.times()
TABLE_MODELS: list[type[BaseModel | Model]] = [Config, *models()]
KEYS = st.sampled_from(
    sorted({field.alias or key for model in TABLE_MODELS for key, field in model.model_fields.items()} | {"type"})
) | st.text(max_size=4)
VALUES = st.recursive(
    SCALARS | st.datetimes(datetime(1, 1, 1), datetime(9999, 1, 1)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)
TABLE = st.dictionaries(KEYS, VALUES, max_size=6)
KINDS = st.sampled_from(sorted(PACKET_ELEMENTS))


def pairs(table: dict[str, Any]) -> str:
    return "".join(f"{key_as_written(key)} = {written(each)}\n" for key, each in table.items())


@st.composite
def configurations(draw: st.DrawFn) -> str:
    """Tables that exist, or do not, with keys and values of any type."""
    heads = draw(st.lists(st.sampled_from([*TABLES.values(), "element.e", "nothing"]), min_size=1, unique=True))
    taken = {head.partition(".")[0] for head in heads}
    text = pairs({key: each for key, each in draw(st.dictionaries(KEYS, VALUES, max_size=1)).items() if key not in taken})
    for head in heads:
        table = draw(TABLE)
        if head == "element.e" and draw(st.booleans()):
            kind = draw(KINDS)
            options: Any = packet_element(kind).Options
            own = st.sampled_from([field.alias or key for key, field in options.model_fields.items()] or ["a"])
            table = {"type": kind, **draw(st.dictionaries(own, VALUES, max_size=5))}
        if head == "queue.q" and draw(st.booleans()):
            table["elements"] = ["e"]
        text += f"[{head}]\n{pairs(table)}"
    return text


def refused(path: Path) -> list[str]:
    """The faults of a file; none where it is a configuration. Any other exception is a fault of the agent."""
    try:
        load(path)
    except ConfigError as error:
        return error.faults
    return []


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None)
@given(text=configurations())
def test_whatever_is_written_is_read_or_refused_in_words_with_lines(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.toml"
    path.write_text(text, encoding="utf-8", newline="")
    for fault in refused(path):
        assert "line " in fault, fault
        assert fault.isprintable(), fault


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.binary(max_size=40) | st.text("[]{}=\"'#,.\\\n ab1-:T", max_size=60).map(str.encode))
def test_whatever_the_bytes_they_are_read_or_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.toml"
    path.write_bytes(data)
    assert all(not FOREIGN.search(fault) or "not TOML" in fault for fault in refused(path))


def test_a_file_without_end_is_not_read_to_the_end(tmp_path: Path) -> None:
    (fault,) = faults(tmp_path, b"# long\n" + b"#" * 8_000_000)
    assert fault == "has more than 8.0 MB; allowed: less, and long lists in files of their own (file:NAME)"
    with (tmp_path / "list").open("wb") as file:
        file.truncate(20_000_001)
    (fault,) = faults(tmp_path, RULE % 'src = "file:list"')
    assert fault.endswith("/list: has more than 20.0 MB (line 5); allowed: less, or the name of an ipset in set of [rules.NAME]")


def test_a_long_value_is_cut_in_what_is_said_of_it(tmp_path: Path) -> None:
    long = "x" * 5000
    (tmp_path / "list").write_text(f"{long}\n")
    text = RULE % f'src = ["{long}"], dst = "file:list", sport = ["file:none", "{long}"], exe = "{long}"'
    told = faults(tmp_path, text + f'[queue.p]\nbalance = "{long}"\n')
    assert len(told) == 6
    assert [fault for fault in told if len(fault) > 500] == []
