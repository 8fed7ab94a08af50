"""Faults of a configuration: file, key, line, what is wrong, what is allowed; and lists that are read from files."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

import pytest
from faulty import faults
from hypothesis import given
from hypothesis import strategies as st

from nfq_agent.config.file import load
from nfq_agent.config.lines import lines
from nfq_agent.config.models import Config, ConfigError
from nfq_agent.config.warnings import warnings
from nfq_agent.elements import stream_element
from nfq_agent.patterns import Patterns, ascii_form
from nfq_agent.testing import Bench, udp

TEXT = '''# a comment
top = 1
[queue.main]
num = 100 # [not.a.table]
elements = [
  "dpi",   # , ]
  "log",
]
"quoted key" = """
[not]
= a key""""
dotted.inner = { a = 1, b = [1, 2] }

[[element.allow.rule]]
action = "drop"
[[element.allow.rule]]
action = 'x'
src = ["10.0.0.0/8",
       "ten"]
[element.allow.rule.deep]
key = 1979-05-27 07:32:00
[element]
after = true
'''


def test_lines_of_keys_and_members() -> None:
    tomllib.loads(TEXT)
    found = lines(TEXT)
    assert found[("top",)] == 2
    assert found[("queue",)] == found[("queue", "main")] == 3
    assert found[("queue", "main", "num")] == 4
    assert found[("queue", "main", "elements")] == 5
    assert [found[("queue", "main", "elements", place)] for place in (0, 1)] == [6, 7]
    assert found[("queue", "main", "quoted key")] == 9
    assert found[("queue", "main", "dotted", "inner", "b", 1)] == 12
    assert found[("element", "allow", "rule", 0, "action")] == 15
    assert found[("element", "allow", "rule", 1)] == 16
    assert found[("element", "allow", "rule", 1, "src", 1)] == 19
    assert found[("element", "allow", "rule", 1, "deep", "key")] == 21
    assert found[("element", "after")] == 23


@given(st.text(alphabet='[]{}="\'#,.\\\n ab1"', max_size=60))
def test_lines_ends_whatever_the_text(text: str) -> None:
    lines(text)


def paths(value: Any, at: tuple[str | int, ...] = ()) -> set[tuple[str | int, ...]]:
    found = {at} if at else set()
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in members:
        found |= paths(each, (*at, key))
    return found


def test_every_path_of_every_configuration_is_found() -> None:
    files = sorted((Path(__file__).parents[1] / "configs").glob("*.toml"))
    assert len(files) > 5
    for file in files:
        assert set(lines(file.read_text())) >= paths(tomllib.loads(file.read_text())), file


RULES = '[queue.q]\nelements = ["allow"]\n[element.allow]\ntype = "policy"\n'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            '[queue.q]\n[rules.r]\nqueue = "q"\ntcp_ports = [\n  80,\n  0,\n  "http",\n]\n',
            [
                'rules.r.tcp_ports: 0 is not a valid port (line 6); allowed: 1 to 65535, or a range as "8000:8010"',
                "rules.r.tcp_ports: 'http' is not a valid port (line 7); allowed: 1 to 65535, or a range as \"8000:8010\"",
            ],
        ),
        ("[queue.q]\nnum = 70000\n", ["queue.q.num: 70000 is too large (line 2); allowed: at most 65535"]),
        ('[queue.q]\nnum = "1"\n', ["queue.q.num: '1' is not a whole number (line 2); allowed: a whole number"]),
        ("[queue.q]\nbypass = 1\n", ["queue.q.bypass: 1 is neither true nor false (line 2); allowed: true or false"]),
        ('[queue.q]\nelements = "log"\n', ["queue.q.elements: 'log' is not a list (line 2); allowed: a list in brackets, as in"]),
        ("[queue]\nq = 5\n", ["queue.q: 5 is not a table (line 2); allowed: a table"]),
        ('[queue.q]\nmode = "watch"\n', ["queue.q.mode: 'watch' is unknown (line 2); allowed: enforce or monitor"]),
        ("[queue.q]\n\nnam = 1\n", ["queue.q.nam: unknown key (did you mean 'num'?) (line 3); allowed: num, balance"]),
        (
            RULES + 'rule = [\n{ action = "drop" },\n{ action = "drop", src = "ten", dport = [1, "x", "y"] },\n'
            '{ action = "burn" }, { src = "::/0" }, { action = "drop", srk = "::/0" } ]\n',
            [
                "element.allow.rule[2].src: 'ten' is not a valid network (line 7); allowed: an address",
                "element.allow.rule[2].dport: 'x' is not a valid port (line 7); allowed: 0 to 65535",
                "element.allow.rule[2].dport: 'y' is not a valid port (line 7); allowed: 0 to 65535",
                "element.allow.rule[3].action: 'burn' is unknown (line 8); allowed: accept, drop or reject",
                "element.allow.rule[4].action: is missing (line 8); allowed: action = VALUE",
                "element.allow.rule[5].srk: unknown key (did you mean 'src'?) (line 8); allowed: ",
            ],
        ),
        (
            RULES + '[[element.allow.rule]]\naction = "drop"\n[[element.allow.rule]]\naction = "drop"\nhook = "input"\n'
            'direction = "out"\n',
            ["element.allow.rule[2]: no packet goes out in the hook named (line 7); allowed: one of hook and direction"],
        ),
    ],
)
def test_a_fault_names_key_and_line(tmp_path: Path, text: str, expected: list[str]) -> None:
    found = faults(tmp_path, text)
    assert len(found) == len(expected), found
    for fault, start in zip(found, expected, strict=True):
        assert fault.startswith(start)
        assert not [word for word in ("Value error", "Input should", "valid tuple", "valid list", "pydantic") if word in fault]


def policy(folder: Path, keys: str) -> Config:
    file = folder / "x.toml"
    file.write_text(RULES + f'rule = [{{ action = "drop", {keys} }}]\n')
    return load(file)


def test_networks_ports_and_names_from_files(tmp_path: Path) -> None:
    (tmp_path / "nets.txt").write_text("# ours\n10.0.0.0/8\n\n2001:db8::/32  # documentation\n")
    (tmp_path / "ports").write_text("53\n8000:8010\n")
    config = policy(tmp_path, 'dst = ["file:nets.txt", "192.0.2.1"], dport = "file:ports"')
    (spec,) = config.packet_elements(config.queue["q"])
    bench = Bench(spec.cls, **{**dict(spec.options), "rule": []})
    rule = spec.options.rule[0]
    assert [str(each) for each in rule.dst] == ["10.0.0.0/8", "2001:db8::/32", "192.0.2.1/32"]
    assert [str(each) for each in rule.dport] == ["53", "8000:8010"]
    bench.assert_accepted(udp("192.0.2.1:1", "10.1.2.3:53"))


def test_a_list_as_other_systems_write_it(tmp_path: Path) -> None:
    (tmp_path / "nets.txt").write_bytes(b"\xef\xbb\xbf10.0.0.0/8\r\n\r\n  192.0.2.1  # one\r\n2001:db8::/32")
    config = policy(tmp_path, 'dst = "file:nets.txt"')
    (spec,) = config.packet_elements(config.queue["q"])
    assert [str(each) for each in spec.options.rule[0].dst] == ["10.0.0.0/8", "192.0.2.1/32", "2001:db8::/32"]


@pytest.mark.parametrize(
    ("written", "seen"),
    [
        ("b\u00fccher.test", "xn--bcher-kva.test"),
        ("*.B\u00dcCHER.test", "shop.xn--bcher-kva.test"),
        # Not strasse.test, which is another name.
        ("stra\u00dfe.test", "xn--strae-oqa.test"),
        ("\uff41.test", "a.test"),
        # A client may send it unchanged, too.
        ("b\u00fccher.test", "b\u00fccher.test"),
    ],
)
def test_a_name_of_other_letters_is_known_as_it_is_sent(tmp_path: Path, written: str, seen: str) -> None:
    (tmp_path / "names.txt").write_text(f"{written}\n")
    for value in (f'"{written}"', '"file:names.txt"'):
        (tmp_path / "x.toml").write_text(
            RULES.replace('"allow"', '"dpi", "allow"', 1) + f'rule = [{{ action = "drop", http_host = {value} }}]\n'
        )
        config = load(tmp_path / "x.toml")
        _, spec = config.packet_elements(config.queue["q"])
        (wanted,) = [globs for fact, globs in spec.options.rule[0].wanted if fact == "http_host"]
        assert Patterns(wanted, caseless=True).match(seen)
        assert not Patterns(wanted, caseless=True).match("strasse.test")
    gate = stream_element("http-host").Options.model_validate({"deny": [written]}, context=None)
    assert dict(gate)["deny"] == (ascii_form(written.lower()),)


def test_an_element_that_nothing_uses_is_warned_about(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text(
        '[queue.q]\nelements = ["policy"]\n[rules.r]\nqueue = "q"\nall = true\n[element.polcy]\ndefault = "drop"\n'
    )
    assert list(warnings(load(tmp_path / "x.toml"))) == [
        "element.polcy: it is in the elements of no queue, tap, inline link or proxy, and does nothing"
    ]


def test_a_list_without_an_entry_is_named(tmp_path: Path) -> None:
    (tmp_path / "nets.txt").write_text("# nothing yet\n\n")
    (fault,) = faults(tmp_path, RULES + 'rule = [{ action = "drop", dst = "file:nets.txt" }]\n')
    assert fault == "element.allow.rule[1].dst: file:nets.txt has no entry (line 5); allowed: one or more, one a line"


def test_a_bad_line_of_a_list_is_refused_with_number_and_text(tmp_path: Path) -> None:
    (tmp_path / "nets.txt").write_text("10.0.0.0/8\nten\n10.0.0.1/8\n" + "bad\n" * 20)
    text = RULES + 'rule = [\n{ action = "drop", dst = "file:nets.txt" }]\n'
    (fault,) = faults(tmp_path, text)
    assert fault.startswith(
        "element.allow.rule[1].dst: file:nets.txt, line 2: 'ten' is not a valid network; "
        "file:nets.txt, line 3: '10.0.0.1/8' has bits set after its prefix"
    )
    assert "and 17 more (line 6); allowed: an address, or a network" in fault


def test_a_list_that_cannot_be_read_or_that_others_may_write(tmp_path: Path) -> None:
    text = RULES + 'rule = [{ action = "drop", dst = "file:nets.txt" }]\n'
    (fault,) = faults(tmp_path, text)
    assert "nets.txt: cannot be read: No such file or directory" in fault
    (tmp_path / "nets.txt").write_text("10.0.0.0/8\n")
    (tmp_path / "nets.txt").chmod(0o666)
    (fault,) = faults(tmp_path, text)
    assert "nets.txt: others may write to this file (line 5); allowed: chown root" in fault


def test_a_list_in_a_folder_that_others_may_write(tmp_path: Path) -> None:
    text = RULES + 'rule = [{ action = "drop", dst = "file:lists/nets.txt" }]\n'
    folder = tmp_path / "lists"
    folder.mkdir()
    (folder / "nets.txt").write_text("10.0.0.0/8\n")
    for mode in (0o777, 0o775):
        folder.chmod(mode)
        (fault,) = faults(tmp_path, text)
        assert f"nets.txt: others may write to its folder (line 5); allowed: chown root {folder}" in fault
    # No user replaces the file of another there.
    folder.chmod(0o1777)
    assert load(tmp_path / "x.toml").element.keys() == {"allow"}


def test_drop_ins_of_one_file_alone(tmp_path: Path) -> None:
    for folder, number in (("conf.d", 7), ("blue.d", 8)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.toml").write_text(f"[queue.q]\nnum = {number}\n")
    for name in ("blue", "green"):
        (tmp_path / f"{name}.toml").write_text("[queue.q]\nnum = 6\n")
    assert load(tmp_path / "blue.toml").queue["q"].num == 8
    assert load(tmp_path / "green.toml").queue["q"].num == 7


@pytest.mark.parametrize(
    ("extra", "warned"),
    [
        ('[queue.q]\ndefault = "drop"\n', 'default = "drop" of its queue'),
        ('[queue.q]\nelements = ["policy"]\n[element.policy]\ndefault = "drop"\n', 'default = "drop" of [element.policy]'),
        ('[queue.q]\ndefault = "drop"\nmode = "monitor"\n', ""),
        ('[queue.q]\ndefault = "drop"\nelements = ["policy"]\n[element.policy]\ndefault = "accept"\n', ""),
        ("[queue.q]\n", ""),
    ],
)
def test_all_traffic_dropped_by_default_warns_about_ssh(tmp_path: Path, extra: str, warned: str) -> None:
    file = tmp_path / "x.toml"
    file.write_text(extra + '[rules.r]\nqueue = "q"\nall = true\n')
    said = [line for line in warnings(load(file)) if "SSH included" in line]
    assert len(said) == bool(warned)
    assert all(warned in line for line in said)


def test_files_of_the_configuration_are_watched_where_that_is_asked_for(tmp_path: Path) -> None:
    # As Kubernetes mounts a ConfigMap: a link to a file behind a link that is exchanged.
    for version in ("one", "two"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "agent.toml").write_text("[agent]\nreload_on_change = true\n")
    (tmp_path / "..data").symlink_to("one")
    main = tmp_path / "agent.toml"
    main.symlink_to("..data/agent.toml")
    config = load(main)
    assert [config.changed_files() for _ in range(2)] == [[], []]
    (tmp_path / "..new").symlink_to("two")
    (tmp_path / "..new").rename(tmp_path / "..data")
    assert config.changed_files() == [], "an editor may still be writing"
    assert config.changed_files() == [main]
    assert config.changed_files() == [], "what cannot be used is not tried again until it changes"
    folder = tmp_path / "agent.d"
    folder.mkdir()
    added = folder / "more.toml"
    added.write_text("")
    assert [config.changed_files() for _ in range(2)] == [[], [added]]
    added.unlink()
    assert [config.changed_files() for _ in range(2)] == [[], [added]]
    main.unlink()
    main.write_text("")
    quiet = load(main)
    os.utime(main, ns=(2, 2))
    assert [quiet.changed_files() for _ in range(2)] == [[], []]


def test_all_faults_of_a_file_are_told_at_once_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "agent.toml"
    path.write_text(
        """
[agent]
drift_check = "soon"
[queue.main]
num = 100
elements = ["dpi", "allow", "deny", "nothing"]
[rules.web]
queue = "main"
hooks = ["sideways"]
tcp_ports = [80]
[rules.other]
queue = "none"
tcp_ports = [81]
[element.allow]
type = "policy"
[[element.allow.rule]]
action = "accept"
dport = 443
[[element.allow.rule]]
action = "allow"
dst = ["10.0.0.0/8", "ten"]
[element.deny]
type = "policy"
undecided = "maybe"
[[element.deny.rule]]
action = "drop"
when = "dprot = 1"
"""
    )
    with pytest.raises(ConfigError) as caught:
        load(path)
    told = [fault.removeprefix(f"{path}: ").partition("; allowed")[0] for fault in caught.value.faults]
    starts = [
        "agent.drift_check: ", "rules.web.hooks: ", "element.allow.rule[2].action: ", "element.allow.rule[2].dst: ",
        "element.deny.undecided: ", "element.deny.rule[1].when: character 1: 'dprot' is not a field",
        "queue.main.elements: unknown element 'nothing'", "rules.other.queue: no queue 'none' is configured",
    ]  # fmt: skip
    assert len(told) == len(starts), told
    for start, line in zip(starts, (3, 9, 20, 21, 24, 27, 6, 12), strict=True):
        assert any(fault.startswith(start) and f"(line {line})" in fault for fault in told), (start, line, told)


def test_an_element_of_two_chains_is_told_once(tmp_path: Path) -> None:
    path = tmp_path / "agent.toml"
    path.write_text(
        '[queue.a]\nnum = 1\nelements = ["log"]\n[queue.b]\nnum = 2\nelements = ["log"]\n[element.log]\neach = "second"\n'
    )
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert len(caught.value.faults) == 1
    # Nor is what it lacks in both.
    elements = 'elements = ["allow"]\n'
    rule = '[element.allow]\ntype = "policy"\nrule = [{ action = "drop", tls_sni = "*.test" }]\n'
    path.write_text(f"[queue.a]\nnum = 1\n{elements}[queue.b]\nnum = 2\n{elements}{rule}")
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert len(caught.value.faults) == 1
