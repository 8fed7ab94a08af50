"""What real clients say, as tshark reads it and as we do: the same names, no more and no fewer."""

from __future__ import annotations

import os
from collections import defaultdict
from hashlib import sha256
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from captures import frames, recording, traffic, tshark
from namespace import Namespace

from nfq_agent.elements.dpi import Dpi, DpiOptions
from nfq_agent.flow_table import FlowTable
from nfq_agent.packet import Packet
from nfq_agent.protocols import tls

pytestmark = pytest.mark.kernel

# A flow by its two ends, and what was seen in it: facts by name, all values that each had.
Seen = dict[frozenset[tuple[str, int | None]], dict[str, set[Any]]]


@pytest.fixture(scope="module")
def capture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if os.geteuid() != 0:
        pytest.fail("the kernel tests make network namespaces: run them as root")
    folder = tmp_path_factory.mktemp("capture")
    with Namespace() as netns, recording(netns, folder / "all.pcap"):
        traffic(netns, folder)
    return folder / "all.pcap"


@pytest.fixture(scope="module")
def ours(capture: Path) -> Seen:
    seen: Seen = defaultdict(lambda: defaultdict(set))
    element = Dpi("dpi", DpiOptions(), lambda *_, **__: None)
    table = FlowTable()
    for time, data in frames(capture):
        # Captured where they were sent: an offload fills in the checksum later.
        packet = Packet(data, time=time, checksum_ready=False)
        five_tuple = packet.headers.five_tuple
        flow = table.observe(five_tuple, time)
        assert element.decide(packet, flow) is None
        for name, value in flow.facts.items():
            # The last word on how far it has come; everything that was ever said otherwise.
            if name.startswith("dpi"):
                seen[_key(five_tuple)][name] = {value}
            else:
                seen[_key(five_tuple)][name].add(value)
    return seen


def _key(five_tuple: Any) -> frozenset[tuple[str, int | None]]:
    return frozenset(((str(ip_address(five_tuple.src)), five_tuple.sport), (str(ip_address(five_tuple.dst)), five_tuple.dport)))


def _theirs(capture: Path, only: str, *fields: str) -> dict[frozenset[tuple[str, int | None]], dict[str, list[str]]]:
    """Their fields by flow, those of all its packets together."""
    ends = ["ip.src", "ip.dst", "tcp.srcport", "tcp.dstport", "udp.srcport", "udp.dstport"]
    seen: dict[frozenset[tuple[str, int | None]], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for packet in tshark(capture, [*ends, *fields], only):
        kind = "tcp" if "tcp.srcport" in packet else "udp"
        key = frozenset((packet[f"ip.{end}"][0], int(packet[f"{kind}.{end}port"][0])) for end in ("src", "dst"))
        found = seen[key]
        for field in fields:
            found[field] += packet.get(field, [])
    return seen


def _compare(capture: Path, ours: Seen, only: str, field: str, *facts: str, lower: bool = False) -> set[str]:
    """Fails unless the field and the facts have the same values in the same flows. All values."""
    theirs = {}
    for key, fields in _theirs(capture, only, field).items():
        values = {value.lower().rstrip(".") if lower else value for value in fields[field]} - {""}
        if values:
            theirs[key] = values
    mine = {}
    for key, found in ours.items():
        values = set()
        for fact in facts:
            for value in found.get(fact, ()):
                values |= set(value) if isinstance(value, tuple) else {value}
        if values:
            mine[key] = values
    assert mine == theirs
    return set().union(*theirs.values()) if theirs else set()


def test_tls_names(capture: Path, ours: Seen) -> None:
    names = _compare(capture, ours, "tls", "tls.handshake.extensions_server_name", "tls_sni", lower=True)
    wanted = "small modern large alpn single resumed retry curl db mail imap quic quic2 quicbig"
    assert names == {f"{name}.server.test" for name in wanted.split()}


def test_tls_fingerprints(capture: Path, ours: Seen) -> None:
    assert len(_compare(capture, ours, "tls.handshake.type == 1", "tls.handshake.ja3", "ja3")) >= 8


def test_alpn(capture: Path, ours: Seen) -> None:
    names = _compare(capture, ours, "tls.handshake.type == 1", "tls.handshake.extensions_alpn_str", "tls_alpn")
    assert {"h2", "http/1.1", "h3", "x"} <= names
    assert len(names) > 100


def test_ja4_is_what_the_fields_of_tshark_make(capture: Path, ours: Seen) -> None:
    """tshark 4.0 knows no JA4, but it knows what goes into it."""
    fields = (
        "tls.handshake.ciphersuite", "tls.handshake.extension.type", "tls.handshake.sig_hash_alg",
        "tls.handshake.extensions.supported_version", "tls.handshake.extensions_alpn_str", "tls.handshake.version",
    )  # fmt: skip
    checked = 0
    for packet in tshark(
        capture, ["ip.src", "ip.dst", "tcp.srcport", "tcp.dstport", "udp.srcport", "udp.dstport", *fields],
        "tls.handshake.type == 1",
    ):  # fmt: skip
        kind = "tcp" if "tcp.srcport" in packet else "udp"
        key = frozenset((packet[f"ip.{end}"][0], int(packet[f"{kind}.{end}port"][0])) for end in ("src", "dst"))
        numbers = {field: [int(value, 0) for value in packet.get(field, [])] for field in fields if "alpn" not in field}
        ciphers, extensions, signatures, versions, legacy = (numbers[field] for field in (*fields[:4], "tls.handshake.version"))
        version = {0x0304: "13", 0x0303: "12"}[max(versions, default=legacy[0])]
        alpn = (packet.get("tls.handshake.extensions_alpn_str") or ["00"])[0]
        wanted = (
            f"{'t' if kind == 'tcp' else 'q'}{version}{'d' if 0 in extensions else 'i'}{len(ciphers):02}{len(extensions):02}"
            f"{alpn[0]}{alpn[-1]}_{_short(sorted(ciphers))}_{_short(sorted(set(extensions) - {0, 16}), signatures)}"
        )
        assert wanted in ours[key]["ja4"]
        checked += 1
    assert checked >= 12


def _short(*lists: list[int]) -> str:
    return sha256("_".join(",".join(f"{n:04x}" for n in each) for each in lists if each).encode()).hexdigest()[:12]


def test_http(capture: Path, ours: Seen) -> None:
    hosts = _compare_http_hosts(capture, ours)
    assert hosts == {"plain.server.test", "127.0.0.1"}
    assert _compare(capture, ours, "http.request", "http.request.method", "http_method") == {"GET", "POST"}
    agents = _compare(capture, ours, "http.request", "http.user_agent", "http_user_agent")
    assert "agent/1.0" in agents
    paths = {value for found in ours.values() for value in found.get("http_path", ())}
    assert paths == {"/index.html", "/long", "/form", "/address"}


def _compare_http_hosts(capture: Path, ours: Seen) -> set[str]:
    theirs = {key: {h.rpartition(":")[0] for h in found["http.host"]} for key, found in
              _theirs(capture, "http.request", "http.host").items()}  # fmt: skip
    mine = {key: found["http_host"] for key, found in ours.items() if found.get("http_host")}
    assert mine == theirs
    return set().union(*theirs.values())


def test_dns(capture: Path, ours: Seen) -> None:
    names = _compare(capture, ours, "dns", "dns.qry.name", "dns_name", lower=True)
    assert names == {f"{name}.name.test" for name in ("a", "mail", "txt", "alias", "no")}
    kinds = {value for found in ours.values() for types in found.get("dns_type", ()) for value in types}
    assert kinds == {"A", "AAAA", "MX", "TXT", "HTTPS"}
    answers = {value for found in ours.values() for each in found.get("dns_answers", ()) for value in each}
    theirs: set[str] = set()
    fields = ("dns.a", "dns.aaaa", "dns.cname", "dns.mx.mail_exchange", "dns.txt")
    for found in _theirs(capture, "dns.flags.response == 1", *fields).values():
        theirs |= {value for field in fields for value in found[field]}
    assert answers == theirs
    # The same over both.
    per_flow = [found for found in ours.values() if "dns" in found["protocol"]]
    assert sum(1 for found in per_flow if found.get("dns_answers")) == len(per_flow) == 12


def test_ssh(capture: Path, ours: Seen) -> None:
    assert len(_compare(capture, ours, "ssh", "ssh.protocol", "ssh_banner", "ssh_client_banner")) >= 1
    (found,) = [found for found in ours.values() if "ssh" in found["protocol"]]
    assert found["ssh_banner"]
    assert found["ssh_client_banner"]


def test_postgresql(capture: Path, ours: Seen) -> None:
    flows = [found for found in ours.values() if "postgresql" in found["protocol"]]
    assert len(flows) == 3
    assert [found["tls_sni"] for found in flows if found.get("tls_sni")] == [{"db.server.test"}] * 2
    names = _theirs(capture, "pgsql.parameter_name", "pgsql.parameter_name", "pgsql.parameter_value")
    startups = {
        key: dict(zip(found["pgsql.parameter_name"], found["pgsql.parameter_value"], strict=False))
        for key, found in names.items()
    }
    for key, parameters in startups.items():
        assert ours[key]["pg_user"] == {parameters["user"]}
        assert ours[key]["pg_database"] == {parameters["database"]}
    assert {key for key, found in ours.items() if found.get("pg_user")} == set(startups)
    assert len(startups) == 1


def test_redis(capture: Path, ours: Seen) -> None:
    flows = {key for key, found in ours.items() if "redis" in found["protocol"]}
    assert flows == set(_theirs(capture, "resp"))
    commands = {value for key in flows for value in ours[key]["redis_command"]}
    assert commands <= {"PING", "SET", "COMMAND", "GET"}
    assert "PING" in commands


def test_mail(capture: Path, ours: Seen) -> None:
    smtp = [found for found in ours.values() if "smtp" in found["protocol"]]
    assert [found["smtp_helo"] for found in smtp] == [{"me.test"}] * 2
    assert sorted(len(found.get("tls_sni", ())) for found in smtp) == [0, 1]
    imap = {key for key, found in ours.items() if "imap" in found["protocol"]}
    assert imap == set(_theirs(capture, "imap"))
    assert {value for key in imap for value in ours[key]["imap_banner"]} == {"imap.server.test ready"}


def test_mqtt(capture: Path, ours: Seen) -> None:
    assert len(_compare(capture, ours, "mqtt", "mqtt.clientid", "mqtt_client_id")) == 1


def test_quic(capture: Path, ours: Seen) -> None:
    flows = {key: found for key, found in ours.items() if "quic" in found["protocol"]}
    assert set(flows) == set(_theirs(capture, "quic"))
    assert sorted(version for found in flows.values() for version in found["quic_version"]) == ["1", "1", "2"]
    # The large hello takes several datagrams.
    (large,) = [found for found in flows.values() if found["tls_sni"] == {"quicbig.server.test"}]
    assert max(len(each) for each in large["tls_alpn"]) == 61


def test_every_flow_is_decided_and_none_is_what_tshark_does_not_see(capture: Path, ours: Seen) -> None:
    protocols = {"tls", "http", "dns", "ssh", "smtp", "imap", "postgresql", "redis", "mqtt", "quic"}
    undecided = [key for key, found in ours.items() if found["dpi"] != {"decided"}]
    # The recorder's own last packet, and the ICMP error in answer to it.
    assert all(("127.0.0.1", 9) in key or ("127.0.0.1", None) in key for key in undecided)
    assert {value for found in ours.values() for value in found.get("protocol", ())} == protocols


def test_a_large_hello_really_is_split(capture: Path, ours: Seen) -> None:
    """The capture has to be what it is said to be: a hello that no single packet holds."""
    (key,) = [key for key, found in ours.items() if found.get("tls_sni") == {"large.server.test"}]
    largest = 0
    for _, data in frames(capture):
        packet = Packet(data, checksum_ready=False)
        if _key(packet.headers.five_tuple) == key and packet.headers.five_tuple.dport == 4430:
            largest = max(largest, len(packet.data))
            result = tls.parse(packet.data, b"")
            assert "tls_sni" not in getattr(result, "facts", {})
    assert 1000 < largest < 1500
