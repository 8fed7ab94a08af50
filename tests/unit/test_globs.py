"""Patterns in rules that can fit nothing are refused: a list in another form would be a policy that blocks nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from faulty import faults

from nfq_agent.config.file import load
from nfq_agent.elements import stream_element

RULE = '[queue.q]\nelements = ["dpi", "e"]\n[element.e]\ntype = "policy"\nrule = [{ action = "drop", %s }]\n'
NAME = 'allowed: a name as "www.example.org", or a pattern as "*.example.org"'


@pytest.mark.parametrize("key", ["tls_sni", "http_host", "dns_name"])
def test_a_list_of_names_in_another_form_is_refused_line_by_line(tmp_path: Path, key: str) -> None:
    (tmp_path / "list").write_bytes(
        b"ads.test\n0.0.0.0 ads.test\n::1 localhost # own\n||ads.test^\nhttps://ads.test/x\nads.test\0\n*.ads.test\n"
    )
    (fault,) = faults(tmp_path, RULE % f'{key} = "file:list"')
    assert fault == (
        f"element.e.rule[1].{key}: "
        "file:list, line 2: '0.0.0.0 ads.test' has an address before the name, as lines of a hosts file; "
        "file:list, line 3: '::1 localhost' has an address before the name, as lines of a hosts file; "
        "file:list, line 4: '||ads.test^' is not a host name; "
        "file:list, line 5: 'https://ads.test/x' is not a host name; "
        r"file:list, line 6: 'ads.test\x00' has a character that cannot be printed "
        f"(line 5); {NAME}"
    )


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ('tls_sni = ["a.test", ""]', "tls_sni: a name is empty"),
        ('tls_sni = "a.test:443"', "tls_sni: 'a.test:443' has a port, which is no part of a name"),
        ('tls_sni = "a.test b.test"', "tls_sni: 'a.test b.test' is not a host name"),
        ('tls_sni = "FILE:list"', "tls_sni: 'FILE:list' is not a host name"),
        ('tls_sni = "a.test\\u2028"', r"tls_sni: 'a.test\u2028' has a character that cannot be printed"),
        ('http_host = "a.test/x"', "http_host: 'a.test/x' is not a host name"),
        ('http_host = "[::1]"', "http_host: '[::1]' is an address in brackets"),
        (
            'dst_name = "192.0.2.1 a.test"',
            "dst_name: '192.0.2.1 a.test' has an address before the name, as lines of a hosts file",
        ),
        ('unit = "payments"', "unit: 'payments' is not the name of a unit"),
        ('container = ""', "container: a name is empty"),
        (f'container = "{"0a" * 32}"', f"container: '{'0a' * 28}... is a whole id"),
        ('cgroup = "system.slice"', "cgroup: 'system.slice' is not an absolute path"),
        ('exe = "curl"', "exe: 'curl' is not an absolute path"),
        ('when = "exe = curl"', ": when: 'curl' is not an absolute path"),
    ],
)
def test_a_pattern_that_can_fit_nothing_is_refused(tmp_path: Path, keys: str, what: str) -> None:
    told = [each for each in faults(tmp_path, RULE % keys) if "DNS answers" not in each]
    assert [each.partition(" (line 5); allowed: ")[0] for each in told] == [
        f"element.e.rule[1]{'' if what.startswith(':') else '.'}{what}"
    ]


def test_patterns_that_something_may_fit_are_taken(tmp_path: Path) -> None:
    keys = (
        'tls_sni = ["a.test", "*.A.test", "a_b-c.test.", "w?w.[ab].test", "*", "192.0.2.1", "b\u00fccher.test"]',
        'http_host = ["::1", "192.0.2.1", "fd00::*"]',
        'dns_name = [".", "My Printer._ipp._tcp.local", "0/25.2.0.192.in-addr.arpa", "dead.beef"]',
        'unit = ["a.service", "a@*", "session-?"]',
        'container = ["web", "0a0a0a0a0a0a"]',
        'cgroup = "/system.slice/*"',
        'exe = ["/usr/bin/a b", "*/curl"]',
        'http_path = ""',
        'http_user_agent = "a b"',
    )
    (tmp_path / "x.toml").write_text(RULE % ", ".join(keys))
    assert load(tmp_path / "x.toml").element.keys() == {"e"}


@pytest.mark.parametrize("kind", ["sni", "http-host"])
@pytest.mark.parametrize("name", ["a.test:443", "https://a.test", "a.test b.test", "[::1]"])
def test_gates_of_streams_refuse_them_too(kind: str, name: str) -> None:
    options = stream_element(kind).Options
    assert dict(options.model_validate({"deny": ["a.test", "*.a.test", "*"]}))["deny"] == ("a.test", "*.a.test", "*")
    with pytest.raises(ValueError, match=r"allowed: a name as|allowed: NAME"):
        options.model_validate({"deny": [name]})
