"""What a message about a bad value says: the value, the member of a list, and what is allowed, in words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty import faults
from pydantic import BaseModel

import nfq_agent
from nfq_agent.config.file import load
from nfq_agent.config.model import Model
from nfq_agent.config.models import ConfigError
from nfq_agent.config.wording import _FORMS
from nfq_agent.elements import PACKET_ELEMENTS, STREAM_ELEMENTS, packet_element, stream_element

POLICY = '[queue.q]\nelements = ["e"]\n[rules.r]\nqueue = "q"\ntcp_ports = [80]\n[element.e]\ntype = "policy"\nrule = [\n%s\n]\n'
# What pydantic says, and a reader does not know.
FOREIGN = re.compile(
    r"\^|valid (tuple|dictionary|list|integer|string|boolean|number)|[Vv]alue error|Input should|pattern '|model"
    r"|\(\)|\bTrue\b|datetime|': "
)
VALUES = ("5", "-1", "1.5", "true", '"x y"', '""', '["x y", 5, -1, true]', "[]", "[[]]", "{ a = 1 }", "1979-05-27")
TABLES = {
    "Agent": "agent", "LogConfig": "log", "QueueConfig": "queue.q", "RuleConfig": "rules.r", "ProxyConfig": "proxy.p",
    "TapConfig": "tap.t", "InlineConfig": "inline.i",
}  # fmt: skip
ELEMENT = '[queue.q]\nelements = ["e"]\n[rules.r]\nqueue = "q"\ntcp_ports = [80]\n[element.e]\ntype = "%s"\n'
STREAM = '[proxy.p]\nlisten = ["[::]:1"]\nelements = ["e"]\n[element.e]\ntype = "%s"\n'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            '[agent]\ninstance = "a b"\n',
            ["agent.instance: 'a b' is not valid (line 2); allowed: 1 to 12 small letters, digits and hyphens"],
        ),
        (
            '[agent]\ncontainer_sockets = ["run/x", "/run/y", "z"]\n',
            [
                f"agent.container_sockets: '{each}' is not valid (line 2); allowed: an absolute path: it begins with /"
                for each in ("run/x", "z")
            ],
        ),
        (
            '[agent]\nuser = "Proxy User"\n',
            ["agent.user: 'Proxy User' is not valid (line 2); "
             "allowed: 1 to 32 small letters, digits, hyphens and underscores, the first one no digit"],
        ),
        (
            '[tap.t]\ninterfaces = ["a b"]\n',
            ["tap.t.interfaces: 'a b' is not valid (line 2); allowed: the name of an interface, or a pattern as \"veth*\""],
        ),
        (POLICY % "5, {action='drop'}, 'x'", ["element.e.rule[1]: 5 is not a table (line 9); allowed: a table",
                                             "element.e.rule[3]: 'x' is not a table (line 9); allowed: a table"]),
        (
            POLICY % "{action='drop', facts = {a = []}}",
            ["element.e.rule[1].facts.a: [] is too short (line 9); allowed: at least 1 of them"],
        ),
        ("[queue.q]\nbusy_poll = true\n", ["queue.q.busy_poll: true is not a valid duration (line 2); "
                                         'allowed: "0", or a number with us, ms, s, m or h, as in "5s", or auto']),
        ("[queue.q]\nnum = 1979-05-27\n", ["queue.q.num: 1979-05-27 is not a whole number (line 2); allowed: a whole number"]),
        (
            "[queue.q]\nnum = {a = [true]}\n",
            ["queue.q.num: { a = [true] } is not a whole number (line 2); allowed: a whole number"],
        ),
        (
            '[rules.r]\nproxy = "p"\ntcp_ports = [80]\nowner = ""\n',
            ["rules.r.owner: '' is too short (line 4); allowed: at least 1 character, or a whole number"],
        ),
        ('[rules.r]\nqueue = "q"\nall = true\nowner = -1\n',
         ["rules.r.owner: -1 is too small (line 4); allowed: a string in quotes, or at least 0"]),
        ('[rules.r]\nqueue = "q"\nall = true\nmark = 5\n',
         ['rules.r.mark: 5 is not a mark (line 4); allowed: "VALUE/MASK", as in "0x10/0xff"']),
        ('[rules.r]\nqueue = "q"\nall = true\nmark = "0x100000000"\n',
         ["rules.r.mark: '0x100000000' is not a mark: it and its mask have 32 bits, and a mask is not 0 (line 4); "
          'allowed: "VALUE/MASK", as in "0x10/0xff"']),
        ('[rules.r]\nqueue = "q"\ntcp_ports = "file:ports"\nsrc = ["file:nets", "10.0.0.0/8"]\n', [
            "rules.r.tcp_ports: 'file:ports': entries of a file are for rules of a policy, and not taken here (line 3); "
            "allowed: ports and ranges of them",
            "rules.r.src: 'file:nets': entries of a file are for rules of a policy, and not taken here (line 4); "
            "allowed: networks, or the name of an ipset in set",
        ]),
        # All that does not go together.
        ('[queue.q]\nnum = 1\nbalance = "1:2"\ncpu_fanout = true\nroom_for_known = 5\n', [
            "queue.q: num and balance both name the queue (line 2); allowed: one of them",
            "queue.q: room_for_known beside cpu_fanout: a worker sends what is another's on through that one's queue for new "
            "flows (line 5); allowed: one of them",
        ]),
        ('[rules.r]\nqueue = "q"\nall = true\ntcp_ports = [80]\nport = 8\nhooks = ["input", "input"]\n', [
            "rules.r: all = true takes everything (line 3); allowed: without tcp_ports, udp_ports, tcp_syn and protocol",
            "rules.r: port is a listener of a proxy (line 5); allowed: with proxy = NAME",
            "rules.r: hooks has one twice (line 6); allowed: each once",
        ]),
        ('[rules.r]\nqueue = "q"\nhooks = ["output"]\nall = true\nowner = "no\\u0000ne"\nuid = "\\u0000"\n', [
            "rules.r.uid: no user '\\x00' on this host (line 6); "
            'allowed: an existing user\'s name, an id, or a range as "1000:1999"',
        ]),
        ('[rules.r]\nqueue = "q"\nhooks = ["output"]\nall = true\nowner = "no\\u0000ne"\n', [
            r"rules.r: owner: no user 'no\x00ne' on this host (line 5); allowed: an existing user's name, or a uid",
        ]),
        (POLICY.replace("rule = [", 'geo = "a\\nb"\nrule = [') % "", [
            r"element.e.geo: 'a\nb' is not a database (line 8); allowed: a file in MaxMind's format (.mmdb), or a list of them",
        ]),
        # The rule of a policy, and its line.
        (POLICY % "{action='drop'},\n{action='drop', dst_country='DE'},\n{action='drop', src_asn=5}", [
            'element.e.rule[2].dst_country: dst_country without a database (line 10); allowed: with geo = "FILE.mmdb"',
            'element.e.rule[3].src_asn: src_asn without a database (line 11); allowed: with geo = "FILE.mmdb"',
        ]),
        (POLICY % "{action='drop'},\n{action='drop', tls_sni='x.test'}", [
            "element.e.rule[2]: a rule asks for tls_sni, which no element before 'e' in the chain finds (line 10); "
            'allowed: "dpi" before it in the queue\'s elements',
        ]),
        (POLICY.replace('["e"]', '["dpi", "e"]') % "{action='accept', tls_sni='a.test'},\n{action='accept', dst_name='x.test'}", [
            "element.e.rule[2]: verify and dst_name need DNS answers, and no rule shows them to an element dpi (line 10); "
            'allowed: with a [rules.NAME] of udp_ports = [53] and hooks = ["input", "output"], or ["forward"], for a queue with '
            '"dpi"',
        ]),
        (POLICY % "{action='drop', name=\"a\\nb\"}", [
            r"element.e.rule[1].name: 'a\nb' has a character that cannot be printed (line 9); allowed: a name on one line",
        ]),
        (POLICY % "{action='drop', dst_name='*\u00fc.test'}", [
            "element.e.rule[1].dst_name: '*\u00fc' is no part of a host name (line 9); "
            "allowed: letters, digits and hyphens, or a pattern of ASCII letters",
        ]),
        ('[queue.q]\nelements = ["alow"]\n[element.allow]\ntype = "policy"\n', [
            "queue.q.elements: unknown element 'alow' (did you mean 'allow'?) (line 2); allowed: chaos, dns-answer, dpi, log, "
            "offload, pcap, policy, rate-limit, record, refuse-mptcp, sample, syn-monitor, an [element.NAME] table, or "
            "package.module:Class",
        ]),
        ('[queue.q]\nelements = ["s"]\n[element.s]\ntype = "sample"\nprobability = nan\n',
         ["element.s.probability: nan is not a number (line 5); allowed: a number"]),
    ],
)  # fmt: skip
def test_a_fault_is_told_in_words(tmp_path: Path, text: str, expected: list[str]) -> None:
    assert faults(tmp_path, text) == expected


def models() -> Iterator[type[BaseModel | Model]]:
    from nfq_agent.config.models import Config  # noqa: PLC0415  # its fields lead to all tables

    waiting: list[object] = [Config, *(packet_element(kind).Options for kind in PACKET_ELEMENTS)]
    waiting += [stream_element(kind).Options for kind in STREAM_ELEMENTS]
    seen: set[object] = set()
    while waiting:
        each = waiting.pop()
        if each in seen:
            continue
        seen.add(each)
        if isinstance(each, type) and issubclass(each, BaseModel | Model):
            # That one has tables alone.
            if each is not Config:
                yield each
            waiting += [field.annotation for field in each.model_fields.values()]
        waiting += getattr(each, "__args__", ())


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("model", list(models()), ids=lambda model: model.__name__)
def test_no_value_is_answered_in_words_of_pydantic(tmp_path: Path, model: type[BaseModel | Model], value: str) -> None:
    """Each key of each table gets each value; what is refused is told in words of the configuration."""
    kinds = {packet_element(kind).Options: kind for kind in PACKET_ELEMENTS}
    streams = {stream_element(kind).Options: kind for kind in STREAM_ELEMENTS}
    keys = [field.alias or key for key, field in model.model_fields.items()]
    assignments = "\n".join(f"{key} = {value}" for key in keys)
    if model.__name__ in TABLES:
        text = f"[{TABLES[model.__name__]}]\n{assignments}\n"
    elif model in kinds:
        text = ELEMENT % kinds[model] + assignments + "\n"
    elif model in streams:
        text = STREAM % streams[model] + assignments + "\n"
    elif model.__name__ == "RuleOptions":
        text = POLICY % ("{" + ", ".join(f"{key} = {value}" for key in keys) + "}")
    else:
        pytest.fail("which table has its keys?")
    path = tmp_path / "x.toml"
    path.write_text(text)
    try:
        load(path)
    except ConfigError as error:
        for fault in error.faults:
            assert not FOREIGN.search(fault.replace("x.toml", "")), fault
            assert "(line " in fault, fault


def test_every_form_is_told_in_words() -> None:
    folder = Path(nfq_agent.__file__).parent
    written = {
        pattern
        for path in (*folder.glob("config/*.py"), *folder.glob("elements/*.py"))
        for pattern in re.findall(r'pattern=r?"([^"]*)"', path.read_text())
    }
    assert written - _FORMS.keys() == set()
