"""`bugreport --anonymize`: what may be sent to others has no address and no name of this host, its users or its peers."""

from __future__ import annotations

import ipaddress
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfq_agent.cli.anonymous import names_in, without_comments
from nfq_agent.cli.bugreport import anonymous, bugreport
from nfq_agent.cli.flags import Flags
from nfq_agent.service.control import ControlError

TABLES = "[queue.main]\n[element.allow]\n[proxy.tcp]\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # As the log writes the ends of a flow.
        ("accept tcp 10.0.0.5:443 -> 192.0.2.9:80.", "accept tcp ipv4-1:443 -> ipv4-2:80."),
        ("connect 10.0.0.5:443: refused", "connect ipv4-1:443: refused"),
        ("fd00::1: refused, [FD00:0::1]:80, fd00::2.", "ipv6-1: refused, [ipv6-1]:80, ipv6-2."),
        ("fe80::1%eth0 ::ffff:192.0.2.1", "ipv6-1%eth0 ipv6-2"),
        ("10.0.0.0/8 ip_10.0.0.5 10.0.0.5-10.0.0.9", "ipv4-1/8 ip_ipv4-2 ipv4-2-ipv4-3"),
        ("127.0.0.1 ::1 [::]:80 0.0.0.0 12:34:56 2026-11-28T07:12:33+00:00", None),
        ("de:ad:be:ef:00:01 DE-AD-BE-EF-00-02", "mac-1 mac-2"),
        # Names that begin or end as other words do.
        ("proxy.acme.com agent.acme.com net.acme.com", "name-1 name-2 name-3"),
        ('"*.acme.com" https://ACME.com/x acme.com:80', '"*.name-1" https://name-1/x name-1:80'),
        ("b\u00fccher.example _acme.com acme.com-x", "name-1 name-2 name-3"),
        ("acme.so shop.py acme.md", "file-1.so file-2.py file-3.md"),
        ("alice@acme.com", "mail-1"),
        ("j\u00f6rg@b\u00fccher.example", "mail-1"),
        # Letters with marks of their own, in two forms, and the full stops of other scripts.
        ("connect bu\u0308cher.example: refused", "connect name-1: refused"),
        ("\u0909\u0926\u093e\u0939\u0930\u0923.\u092a\u0930\u0940\u0915\u094d\u0937\u093e, x", "name-1, x"),
        ("\u4f8b\u3048\u3002\u30c6\u30b9\u30c8 xn--bcher-kva.example", "name-1 name-2"),
        ("2001:db8::1 . 443, src:2001:db8::2 ip6-2001-db8", "ipv6-1 . 443, src:ipv6-2 ip6-2001-db8"),
        # Paths.
        ("/var/log/acme.com.pcap /etc/lists/acme.com.txt", "/var/log/file-1.pcap /etc/lists/file-2.txt"),
        ("/home/alice/x /home/bob/x", "/home/user-1/x /home/user-2/x"),
        # Units, containers, programs.
        ("payments.service /system.slice/payments.service", "unit-1.service /system.slice/unit-1.service"),
        ("nfq-agent@web.service docker.service session-3.scope", None),
        ("web-acme, alice-laptop: alice", "container-1, user-1-laptop: user-1"),
        # Remarks of others in rules.
        ('-m comment --comment "default/payments:http" -j X', '-m comment --comment "comment-1" -j X'),
        ("-m comment --comment nfq-agent:default:web -j X", None),
        ('-j LOG --log-prefix "acme drop: " --log-level 4', '-j LOG --log-prefix "comment-1" --log-level 4'),
        ("-m string --string acme --algo bm", '-m string --string "comment-1" --algo bm'),
        ("-m recent --name ACME --rsource", '-m recent --name "comment-1" --rsource'),
        ("-m set --match-set acme-vpn dst -j X", '-m set --match-set "comment-1" dst -j X'),
        ('"rule": "-m comment --comment \\"nfq-agent:default:web\\" -j X"', None),
        ('"rule": "-m comment --comment \\"of acme\\" -j X"', '"rule": "-m comment --comment "comment-1" -j X"'),
        ("al\\u0069ce \\U00000061lice \\u0007 \\Uffffffff", "user-1 user-1 \\u0007 \\Uffffffff"),
        ('udp dport 53 log prefix "acme " accept', 'udp dport 53 log prefix "comment-1" accept'),
        ('ip saddr 10.0.0.1 comment "for alice"', 'ip saddr ipv4-1 comment "comment-1"'),
        # What a reader of the report needs.
        ("queue.main.elements element.allow.rule[2].dst agent.drift_check", None),
        ("net.ipv4.conf.all.rp_filter /etc/nfq-agent/nfq-agent.toml", None),
        ('File "/usr/lib/nfq-agent/nfq_agent/elements/policy.py", line 3, in selectors.py, nfq_agent.elements', None),
    ],
)
def test_addresses_and_names_are_replaced(text: str, expected: str | None) -> None:
    assert anonymous(text, {"alice": "user", "web-acme": "container"}, TABLES) == (text if expected is None else expected)


@given(
    address=st.ip_addresses().filter(lambda each: not each.is_loopback and not each.is_unspecified),
    before=st.sampled_from(["", " ", "(", "[", "=", '"', "/", ",", "<", "a ", "a:", "::ffff:0:0/96 "]),
    after=st.sampled_from(["", " ", ")", "]", ":", ".", ",", ":443", ": ", "/24", "%eth0", '"', "-", ";"]),
)
def test_no_address_is_left_whatever_stands_beside_it(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address, before: str, after: str
) -> None:
    assert str(address) not in anonymous(f"{before}{address}{after}", {})


LABEL = st.text("abcxyz0189-\u00fc\u0308\u093e\u4f8b", min_size=1, max_size=6).filter(lambda each: each.strip("-") == each)


@given(
    labels=st.lists(LABEL, min_size=1, max_size=3),
    top=st.sampled_from(["com", "org", "so", "py", "md", "service", "internal"]),
    before=st.sampled_from(["", " ", "(", "=", '"', "/", "://", "*.", "@", ",", "net.", "queue.", "proxy.tcp."]),
    after=st.sampled_from(["", " ", ")", ":", ".", ":443", "/x", '"', "-", ".log", ".pcap"]),
)
def test_no_name_is_left_whatever_stands_beside_it(labels: list[str], top: str, before: str, after: str) -> None:
    name = ".".join(["acme", *labels, top])
    assert "acme" not in anonymous(f"{before}{name}{after}", {}, TABLES)


CONFIG = """
# for Alice of Acme
[queue.main]
num = 7   # see acme-wiki
elements = ["dpi", "allow", "files"]
[element.allow]
type = "policy"
geo = "/srv/acme/places.mmdb"
[[element.allow.rule]]
name = 'acme-shop "\u0440\u0443\u0441"'
action = "accept"
tls_sni = ["*.acme.com", "intranet"]
unit = "payments*"
when = 'container ~ web-acme* and dport = 443'
[[element.allow.rule]]
action = "drop"
exe = "/opt/acme/bin/pay"
dst = ["203.0.113.7", "2001:db8::7", "file:acme-list"]
[element.files]
type = "pcap"
directory = "/srv/acme"
[proxy.tcp]
target = "db1:5432"
[rules.web]
queue = "main"
tcp_ports = [443]
owner = "root"
uid = ["acmeldap", "1000:1999"]
set = "acmeset dst"
"""


def test_names_without_a_form_are_those_of_the_configuration_and_the_log() -> None:
    rule = {"when": "name = shop and not (unit = z or dport = 1)", "dport": 1, "src": ["file:lists/x", "10.0.0.0/8"]}
    found = set(names_in({"unit": ["a", "b*"], "facts": {"own": "c"}, "rule": [rule], "name": "d", "mode": "e"}))
    assert found == {
        ("a", "unit"),
        ("b*", "unit"),
        ("c", "name"),
        ("shop", "name"),
        ("z", "unit"),
        ("lists/x", "list"),
        ("d", "label"),
    }


def test_comments_are_emptied_and_strings_are_not() -> None:
    assert without_comments("a = \"#x\" # y\n# z\nb = '#'#") == "a = \"#x\" #\n#\nb = '#'#"


def test_a_report_has_no_name_of_its_host_or_its_peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder := tmp_path / "acmeconf").mkdir()
    (folder / "conf.d").mkdir()
    main = folder / "main.toml"
    main.write_text(CONFIG)
    (folder / "conf.d" / "acme.toml").write_text('[element.allow]\ndefault = "drop"\n# acme\n')
    (folder / "acme-list").write_text("203.0.113.8\n")
    # A log as journald prints it, with the names in its fields.
    said = 'drop tcp 203.0.113.7:443 by allow: rule 1 (acme-shop "\u0440\u0443\u0441"), payments-eu.service'
    said += ", web-acme-1, db1-old: acme-host"
    fields = {
        "NFQ_UNIT": "payments-eu.service",
        "NFQ_CONTAINER": "web-acme-1",
        "_HOSTNAME": "acme-host",
        "NFQ_EXE": "/opt/acme/payd",
        "NFQ_CONTAINER_TO": "acmepod",
        "NFQ_RULE": "rule 7 (acmeold)",
        "NFQ_PG_USER": "acmeclerk",
        "NFQ_PG_DATABASE": "acmebooks",
        "NFQ_RDP_USER": "ACME\\\\clerk",
        "NFQ_HTTP_PATH": "/acme/secret",
        "NFQ_TLS_VERSION": "1.3",
    }
    said += ", to acmepod by rule 7 (acmeold), acmeclerk acmebooks /acme/secret, tls 1.3"
    (tmp_path / "bin").mkdir()
    tool = tmp_path / "bin" / "journalctl"
    tool.write_text(f"#!/bin/sh\ncase \"$*\" in *json*) echo '{json.dumps(fields)}';; *) echo '{said}, /opt/acme/payd';; esac\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    assert bugreport(Flags(main), tmp_path / "report.txt", True) == 0
    text = (tmp_path / "report.txt").read_text()
    left = re.findall(r"(?i).*(?:acme|alice|payments|intranet|db1|203\.0\.113|2001:db8|/opt/).*", text)
    assert left == []
    assert "\u0440\u0443\u0441" not in text
    assert "[element.allow]" in text
    assert 'elements = ["dpi", "allow", "files"]' in text


def test_names_in_the_status_are_those_of_the_answer_that_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [{"owners": [{"container": "web-acme"}], "rule": 'rule 1 (acme-shop "\u0440\u0443\u0441")'}]

    def asked(*_: object) -> dict[str, Any]:
        if not answers:
            raise ControlError("the container and the agent are gone")
        return answers.pop()

    monkeypatch.setattr("nfq_agent.cli.running.status_object", asked)
    (main := tmp_path / "main.toml").write_text(CONFIG)
    assert bugreport(Flags(main), tmp_path / "report.txt", True) == 0
    text = (tmp_path / "report.txt").read_text()
    assert re.search(r'"container": "container-\d+"', text)
    assert re.findall(r".*(?:acme|\u0440\u0443\u0441|u0440).*", text) == []
