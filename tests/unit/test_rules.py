"""From a configuration to rules, as `iptables -S` prints them."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planned import UID, config_of

from nfq_agent.config.file import load
from nfq_agent.config.models import Config, ConfigError
from nfq_agent.config.warnings import warnings
from nfq_agent.rules.model import FAMILIES, Extension, Option, Rule, TableRules, chain_name, instance_of, own_chains
from nfq_agent.rules.plan import plan

CONFIGS = Path(__file__).parent.parent / "configs"


def planned(config: Config) -> dict[str, dict[str, list[str]]]:
    """The rules as text, by family and table: chains in full, then jumps."""
    return {
        family: {
            table: [str(rule) for chain in rules.chains.values() for rule in chain] + [str(jump) for jump in rules.jumps]
            for table, rules in tables.items()
        }
        for family, tables in plan(config, UID).items()
    }


def lines(text: str) -> list[str]:
    """`NAME` stands for the comment's last part, `C-` for the beginning of our chains."""
    made = []
    for line in filter(str.strip, text.splitlines()):
        words = line.replace("C-", "NFQA-default-").split()
        index = words.index("=")
        words[index : index + 2] = ["-m", "comment", "--comment", f'"nfq-agent:default:{words[index + 1]}"']
        made.append(" ".join(words))
    return made


JUMPS = """
-A INPUT = jump -j C-INPUT
-A OUTPUT = jump -j C-OUTPUT
"""


@pytest.mark.parametrize(
    ("name", "families", "table", "expected"),
    [
        (
            "baseline",
            FAMILIES,
            "mangle",
            """
            -A C-INPUT -p tcp -m multiport --ports 11000 = app -j QUEUE
            -A C-OUTPUT -p tcp -m multiport --ports 11000 -m owner ! --uid-owner 999 = app -j QUEUE
            """.replace("QUEUE", "NFQUEUE --queue-num 100 --queue-bypass")
            + JUMPS,
        ),
        (
            "five-tuple-log",
            ("inet",),
            "mangle",
            """
            -A C-INPUT -p tcp -m multiport --ports 11001 = app -j NFQUEUE --queue-num 7 --queue-bypass
            -A C-OUTPUT -p tcp -m multiport --ports 11001 -m owner ! --uid-owner 999 = app -j NFQUEUE --queue-num 7 --queue-bypass
            """
            + JUMPS,
        ),
        (
            "app-map",
            FAMILIES,
            "mangle",
            """
            -A C-INPUT -i eth0 -p tcp -m multiport --dports 443,8080 = apps -j QUEUES
            -A C-INPUT -i eth0 -p udp -m multiport --dports 53 = apps -j QUEUES
            -A C-INPUT = end -j RETURN
            -A C-OUTPUT -m owner --uid-owner 999 = own-traffic -j RETURN
            -A C-OUTPUT -o eth0 -p tcp -m multiport --sports 443,8080 = apps -j QUEUES
            -A C-OUTPUT -o eth0 -p udp -m multiport --sports 53 = apps -j QUEUES
            -A C-OUTPUT = end -j RETURN
            """.replace("QUEUES", "NFQUEUE --queue-balance 200:201 --queue-bypass --queue-cpu-fanout")
            + JUMPS,
        ),
        (
            "multi",
            FAMILIES,
            "mangle",
            """
            -A C-INPUT -p tcp -m multiport --ports 80,8000:8010 = web -j NFQUEUE --queue-num 120 --queue-bypass
            -A C-INPUT -p tcp -m multiport --ports 53 = dns -j NFQUEUE --queue-num 121 --queue-bypass
            -A C-INPUT -p udp -m multiport --ports 53 = dns -j NFQUEUE --queue-num 121 --queue-bypass
            -A C-INPUT = end -j RETURN
            -A C-OUTPUT -m owner --uid-owner 999 = own-traffic -j RETURN
            -A C-OUTPUT -p tcp -m multiport --ports 80,8000:8010 = web -j NFQUEUE --queue-num 120 --queue-bypass
            -A C-OUTPUT -p tcp -m multiport --ports 53 = dns -j NFQUEUE --queue-num 121 --queue-bypass
            -A C-OUTPUT -p udp -m multiport --ports 53 = dns -j NFQUEUE --queue-num 121 --queue-bypass
            -A C-OUTPUT = end -j RETURN
            """
            + JUMPS,
        ),
        (
            "syn-monitor",
            FAMILIES,
            "raw",
            """
            -A C-PREROUTING -p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN = syn -j NFQUEUE --queue-num 1 --queue-bypass
            -A PREROUTING = jump -j C-PREROUTING
            """,
        ),
    ],
)
def test_the_rules_of_every_configuration(name: str, families: tuple[str, ...], table: str, expected: str) -> None:
    assert planned(load(CONFIGS / f"{name}.toml")) == {family: {table: lines(expected)} for family in families}


def by_owner(**rules: dict[str, Any]) -> list[str]:
    """The rules of a configuration that mark connections, or go by the mark."""
    tables = {name: {"queue": "main", "hooks": ["output"], "tcp_ports": [80], **rule} for name, rule in rules.items()}
    found = [line for tables in planned(config_of(rules=tables)).values() for lines in tables.values() for line in lines]
    return [line for line in found if "mark" in line.lower()]


def test_rules_by_owner_have_marks_of_their_own() -> None:
    lines = by_owner(a={"uid": ["1000:1999", 5], "not_gid": 7, "family": "inet"}, b={"cgroup": "nginx.service", "family": "inet"})
    assert len({line.rsplit(" ", 1)[1] for line in lines if "CONNMARK" in line}) == 2
    assert sum("CONNMARK" in line for line in lines) == 3
    # Two users, one rule by the mark; what must not be stays a condition.
    first, second = (line for line in lines if "connmark" in line)
    assert "! --gid-owner 7" in first
    assert "uid-owner" not in first
    assert "cgroup" not in second


@pytest.mark.parametrize("keys", [{"not_uid": 5}, {"owner": 5, "table": "raw"}, {"hooks": ["input"], "cgroup": "x.service"}])
def test_no_marks_where_no_owner_can_be_lost(keys: dict[str, Any]) -> None:
    assert not by_owner(a=keys)


def test_more_rules_by_owner_than_marks_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "many.toml"
    rules = "".join(f'[rules.r{n}]\nqueue = "q"\nhooks = ["output"]\ntcp_ports = [{n + 1}]\nowner = {n}\n' for n in range(8))
    file.write_text("[queue.q]\nnum = 1\n" + rules)
    with pytest.raises(ConfigError, match="8 rules by owner, and the mask 0x700 has marks for 7; allowed: a mask of more bits"):
        load(file)
    file.write_text('[agent]\nowner_mask = "x"\n[queue.q]\nnum = 1\n')
    with pytest.raises(ConfigError, match="'x' is not a mask"):
        load(file)


def test_owner_zero_is_an_owner() -> None:
    assert by_owner(a={"owner": 0})


def test_the_redirection_of_the_transparent_proxy() -> None:
    """Additional exclusions may differ; which packets are taken, and by which rule, may not."""
    for family, tables in planned(load(CONFIGS / "transparent-proxy.toml")).items():
        # Table mangle counts what should be led away, and leads nothing.
        assert list(tables) == ["nat", "mangle"], family
        assert [line.endswith('.expected-15002"') for line in tables["mangle"] if "--tcp-flags" in line] == [True, True]
        assert not any(" -j REDIRECT" in line for line in tables["mangle"])
        redirecting = [line for line in tables["nat"] if "REDIRECT" in line or "--uid-owner" in line]
        first = "-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN -m multiport --dports 8080"
        assert any(f"NFQA-default-PREROUTING {first}" in line for line in redirecting)
        assert all(line.endswith("-j REDIRECT --to-ports 15002") for line in redirecting if "REDIRECT" in line)
        assert any("--uid-owner 999" in line and "-A NFQA-default-OUTPUT" in line for line in redirecting)
        assert tables["nat"][-2:] == lines("-A PREROUTING = jump -j C-PREROUTING\n-A OUTPUT = jump -j C-OUTPUT")


def test_what_one_user_has_begun_is_known_by_a_mark_when_its_socket_is_gone(tmp_path: Path) -> None:
    file = tmp_path / "egress.toml"
    file.write_text((CONFIGS / "egress-policy.toml").read_text().replace('"payments"', "1234"))
    expected = """
    -A C-OUTPUT -p tcp -m multiport --dports 443 -m owner --uid-owner 1234 = egress -j NFQUEUE --queue-num 110
    -A C-OUTPUT -p udp -m multiport --dports 443 -m owner --uid-owner 1234 = egress -j NFQUEUE --queue-num 110
    -A C-OUTPUT -p tcp -m multiport --dports 443 -m connmark --mark 0x300/0x700 = egress -j NFQUEUE --queue-num 110
    -A C-OUTPUT -p udp -m multiport --dports 443 -m connmark --mark 0x300/0x700 = egress -j NFQUEUE --queue-num 110
    -A OUTPUT = jump -j C-OUTPUT
    """
    # The offload may put rules of its own beside it.
    for family in FAMILIES:
        found = planned(load(file))[family]["mangle"]
        assert [line for line in found if "NFQUEUE" in line or "jump" in line] == lines(expected)
        owners = [line for line in found if "owner-new" in line]
        assert owners == lines("""
        -A C-OUTPUT -p tcp -m multiport --dports 443 -m owner --uid-owner 1234 = owner-new -j CONNMARK --set-xmark 0x300/0x700
        -A C-OUTPUT -p udp -m multiport --dports 443 -m owner --uid-owner 1234 = owner-new -j CONNMARK --set-xmark 0x300/0x700
        """)


@pytest.mark.parametrize(
    ("role", "inward", "outward"),
    [("server", "--dports", "--sports"), ("client", "--sports", "--dports"), ("both", "--ports", "--ports")],
)
def test_roles(role: str, inward: str, outward: str) -> None:
    rule = {"queue": "main", "tcp_ports": [80], "role": role, "family": "inet"}
    found = planned(config_of(rules={"app": rule}))["inet"]["mangle"]
    assert [line.split("multiport ")[1].split()[0] for line in found if "multiport" in line] == [inward, outward]


def test_what_is_forwarded_crosses_an_interface_either_way() -> None:
    rule = {"queue": "main", "all": True, "hooks": ["forward"], "interface": "tun+", "family": "inet"}
    found = planned(config_of(rules={"app": rule}))["inet"]["mangle"]
    assert found[:3] == lines(
        """
        -A C-FORWARD -i tun+ = app -j NFQUEUE --queue-num 100 --queue-bypass
        -A C-FORWARD -o tun+ = app -j NFQUEUE --queue-num 100 --queue-bypass
        -A C-FORWARD = end -j RETURN
        """
    )


def test_more_ports_than_one_match_holds() -> None:
    ports = [*range(1, 15), "100:200", "300:400", 5000]
    rule = {"queue": "main", "udp_ports": ports, "hooks": ["input"], "role": "server", "family": "inet"}
    found = planned(config_of(rules={"app": rule}))["inet"]["mangle"]
    groups = [line.split("--dports ")[1].split()[0] for line in found if "multiport" in line]
    # 15 places, and a range takes two (XT_MULTI_PORTS).
    assert groups == [",".join(map(str, range(1, 15))), "100:200,300:400,5000"]


@pytest.mark.parametrize(
    ("mark", "text"),
    [("0x10/0xff", "0x10/0xff"), ("0x10", "0x10"), ("16/0xffffffff", "0x10"), ("0/0xff000000", "0x0/0xff000000")],
)
def test_a_mark_is_said_as_iptables_says_it(mark: str, text: str) -> None:
    rule = {"queue": "main", "tcp_ports": [80], "mark": mark, "hooks": ["input"], "family": "inet"}
    found = planned(config_of(rules={"app": rule}))["inet"]["mangle"]
    assert f"-m mark --mark {text} -m comment" in found[0]


def test_without_bypass_the_rule_holds_without_a_listener() -> None:
    config = config_of(queue={"main": {"bypass": False}}, rules={"app": {"queue": "main", "tcp_ports": [80], "family": "inet"}})
    assert all(line.endswith("--queue-num 100") for line in planned(config)["inet"]["mangle"] if "NFQUEUE" in line)


def test_the_order_of_ports_in_the_file_changes_nothing() -> None:
    first = config_of(rules={"app": {"queue": "main", "tcp_ports": [1, 2, "3:4"]}})
    second = config_of(rules={"app": {"queue": "main", "tcp_ports": ["3:4", 2, 1, 2]}})
    assert planned(first) == planned(second)


def test_the_longest_names_fit_the_kernel() -> None:
    # XT_EXTENSION_MAXNAMELEN is 29, with its NUL.
    assert max(map(len, own_chains("a" * 12))) == 28
    assert instance_of(chain_name("a-b", "postrouting")) == "a-b"
    assert instance_of("NFQA-INPUT") is None
    assert instance_of("NFQA-a-ELSEWHERE") is None
    assert instance_of("DOCKER-USER") is None


words = st.text("abcdefghijklmnopqrstuvwxyz0123456789-_.:/,", min_size=1, max_size=12).filter(lambda word: word[0] not in "-!")

option_names = st.from_regex(r"--[a-z][a-z-]{0,15}", fullmatch=True)

options = st.builds(Option, option_names.filter(lambda name: name != "--comment"), st.just("") | words, st.booleans())

flags = st.just(Option("--tcp-flags", "FIN,SYN,RST,ACK SYN"))

comments = st.builds(lambda text: Extension("comment", (Option("--comment", text),)), words)

names = st.from_regex(r"[A-Za-z][A-Za-z0-9_-]{0,20}", fullmatch=True)

extensions = st.builds(Extension, names, st.lists(options | flags, max_size=4).map(tuple))

maybe_negated = st.just("") | words | words.map(lambda word: f"! {word}")

any_rule = st.builds(
    Rule,
    names,
    extensions | st.just(Extension("")),
    st.lists(extensions | comments, max_size=4).map(tuple),
    maybe_negated,
    maybe_negated,
    maybe_negated,
)


@given(any_rule)
def test_a_rule_is_what_its_text_says(rule: Rule) -> None:
    assert Rule.parse(str(rule)) == rule


@pytest.mark.parametrize(
    "text",
    [
        "-A INPUT -s 10.0.0.0/8 -j ACCEPT",
        "-A INPUT ! -d 10.0.0.0/8 -j ACCEPT",
        "-A INPUT -f -j ACCEPT",
        "-A INPUT -g ELSEWHERE",
        "-P INPUT ACCEPT",
        "-N NFQA-a-INPUT",
        "-A",
        '-A INPUT -m comment --comment "open',
        "",
    ],
)
def test_what_no_rule_of_ours_says_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        Rule.parse(text)


def test_the_queues_and_the_tag_of_a_rule() -> None:
    balanced = Rule.parse('-A X -m comment --comment "nfq-agent:a:b" -j NFQUEUE --queue-balance 100:103 --queue-bypass')
    assert balanced.queues == range(100, 104)
    assert balanced.tag == "nfq-agent:a:b"
    assert Rule.parse("-A X -j NFQUEUE --queue-num 7").queues == range(7, 8)
    other = Rule.parse("-A X -p tcp -j RETURN")
    assert (other.queues, other.tag) == (range(0), "")


def test_all_rules_of_a_table_jumps_first() -> None:
    jump, inside = Rule.parse("-A INPUT -j X"), Rule.parse("-A X -j RETURN")
    assert list(TableRules({"X": (inside,)}, (jump,)).rules) == [jump, inside]


def test_a_policy_that_enforces_is_not_left_open_unsaid() -> None:
    deny = {"type": "policy", "rule": [{"action": "drop", "dport": 23}]}

    def said(**queue: object) -> list[str]:
        config = config_of(queue={"main": {"num": 1, "elements": ["deny"], **queue}}, element={"deny": deny})
        return [line for line in warnings(config) if "a flood of any local user" in line]

    (line,) = said()
    assert "fail_open = true and bypass = true let packets past deny" in line
    assert "fail_open = false, bypass = false; to judge" in line
    assert line.endswith("room_for_known = 1024")
    (line,) = said(bypass=False)
    assert "instead: fail_open = false; to judge" in line
    (line,) = said(room_for_known=9)
    assert line.endswith("fail_open = false, bypass = false")
    assert said(fail_open=False, bypass=False) == []
    assert said(mode="monitor") == []


@pytest.mark.parametrize(
    "comment",
    ['"nfq-agent:a:b"', '"two words"', "plain", '"a \\" b"', '""'],
    ids=["tag", "space", "bare", "escaped", "empty"],
)
def test_a_rule_is_split_as_a_shell_splits_it(comment: str) -> None:
    text = f"-A NFQA-a-INPUT -p tcp -m comment --comment {comment} -j RETURN"
    assert Rule.parse(text).matches[0].options[0].value == shlex.split(text)[7]


@pytest.mark.parametrize(
    ("port", "hooks", "told"), [(80, ["input", "output"], 1), (81, ["input", "output"], 0), (80, ["output"], 0)]
)
def test_a_queue_that_sees_answers_only_is_told(port: int, hooks: list[str], told: int) -> None:
    made = config_of(
        proxy={"web": {"listen": ["127.0.0.1:15002"]}},
        rules={
            "seen": {"queue": "main", "tcp_ports": [port], "hooks": hooks},
            "led": {"proxy": "web", "tcp_ports": [80], "hooks": ["output"]},
        },
    )
    found = [line for line in warnings(made) if "answers of the servers only" in line]
    assert len(found) == told
    assert all(line.startswith("rules.seen and rules.led both take TCP port 80: of what proxy web carries") for line in found)
