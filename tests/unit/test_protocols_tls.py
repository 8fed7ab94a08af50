"""ClientHellos: names, fingerprints against published values, and what is malformed."""

from __future__ import annotations

import pytest
from openings import client_hello, made_hello, numbers, record, server_name

from nfq_agent.protocols import MORE, NO, Found, tls

# The example of JA4.md (github.com/FoxIO-LLC/ja4), in the original order of its raw output, with GREASE put in.
JA4_CIPHERS = "1301,1302,1303,c02b,c02f,c02c,c030,cca9,cca8,c013,c014,009c,009d,002f,0035"
JA4_EXTENSIONS = "001b,0000,0033,0010,4469,0017,002d,000d,0005,0023,0012,002b,ff01,000b,000a,0015"
JA4_SIGNATURES = "0403,0804,0401,0503,0805,0501,0806,0601"


def facts(data: bytes) -> dict[str, object]:
    result = tls.parse(data, b"")
    assert isinstance(result, Found)
    assert result.decided
    return result.facts


def test_the_published_example_of_ja4() -> None:
    special = {
        0x0000: server_name(b"example.com")[1],
        0x0010: b"\0\x0c\x02h2\x08http/1.1",
        0x000D: numbers(13, *(int(each, 16) for each in JA4_SIGNATURES.split(",")))[1],
        0x002B: b"\x06\x0a\x0a\x03\x04\x03\x03",
        0x000A: numbers(10, 0x1A1A, 29, 23, 24)[1],
        0x000B: b"\1\0",
    }
    extensions = [(int(kind, 16), special.get(int(kind, 16), b"")) for kind in JA4_EXTENSIONS.split(",")]
    ciphers = [0x3A3A, *(int(each, 16) for each in JA4_CIPHERS.split(","))]
    found = facts(made_hello(ciphers, [(0x4A4A, b""), *extensions, (0xDADA, b"\0")]))
    assert found["ja4"] == "t13d1516h2_8daaf6152771_e5627efa2ab1"
    assert found["tls_sni"] == "example.com"


def test_the_published_example_of_ja3() -> None:
    """github.com/salesforce/ja3, README, "How it works": with extensions, and without any."""
    extensions = [(0, server_name(b"a")[1]), numbers(10, 23, 24, 25), (11, b"\1\0")]
    found = facts(made_hello([47, 53, 5, 10, 49161, 49162, 49171, 49172, 50, 56, 19, 4], extensions, version=0x0301))
    assert found["ja3"] == "ada70206e40642a3e4461f35503241d5"
    found = facts(made_hello([4, 5, 10, 9, 100, 98, 3, 6, 19, 18, 99], [], version=0x0301))
    assert found["ja3"] == "de350869b8c85de67a350c8d186f11e6"


@pytest.mark.parametrize(
    ("alpn", "wanted"),
    [(b"\xab", "ab"), (b"\xab\xcd", "ad"), (b"\x30\xab", "3b"), (b"\x30\x31\xab\xcd", "3d"), (b"\x30\xab\xcd\x31", "01"),
     (b"x", "xx"), (b"http/1.1", "h1"), (b"", "00")],
)  # fmt: skip
def test_the_alpn_in_ja4(alpn: bytes, wanted: str) -> None:
    """The examples of JA4.md, "ALPN Extension Value"."""
    entry = bytes((len(alpn),)) + alpn
    found = facts(made_hello([0x1301], [(16, len(entry).to_bytes(2, "big") + entry)]))
    assert str(found["ja4"]).split("_")[0] == "t12i0101" + wanted


def test_a_hello_over_many_records() -> None:
    whole = client_hello("split.server.test")
    for size in (1, 3, 4, 100):
        data = record(whole[5:], size)
        assert facts(data) == facts(whole)


def test_ech_is_said_with_the_outer_name() -> None:
    outer = made_hello([0x1301], [server_name(b"public.test"), (0xFE0D, b"\0" + bytes(50))])
    assert facts(outer)["ech"] is True
    assert facts(outer)["tls_sni"] == "public.test"
    assert facts(made_hello([0x1301], [server_name(b"public.test")]))["ech"] is False


def test_names_are_host_names_or_a_conflict() -> None:
    assert facts(made_hello([0x1301], [server_name(b"A.Test.")]))["tls_sni"] == "a.test"
    assert "tls_sni" not in facts(made_hello([0x1301], []))
    for name in (b"a\0.test", b"a\\x00.test", b"a..test", b"a.test:443", b"a/b", b"\xc3\xa4.test", b"x" * 64):
        found = facts(made_hello([0x1301], [server_name(name)]))
        assert found["conflict"], name
        assert "tls_sni" not in found


@pytest.mark.parametrize("name", [b"", b"\0\0", b"\0\3\0\0\0"])
def test_an_empty_name_leaves_the_rest_readable(name: bytes) -> None:
    found = facts(made_hello([0x1301], [(0, name), (16, b"\0\3\2h2")]))
    assert found["tls_alpn"] == ("h2",)
    assert "tls_sni" not in found
    assert "conflict" not in found


CCS = b"\x14\3\3\0\1\1"


def test_what_follows_a_hello() -> None:
    hello = made_hello([0x1301], [server_name(b"a.test")])
    first = tls.parse(hello, b"")
    assert isinstance(first, Found)
    assert first.used == len(hello)
    assert first.then is tls.after_hello
    ccs = tls.after_hello(CCS + hello)
    assert isinstance(ccs, Found)
    assert (ccs.facts, ccs.used + ccs.skip, ccs.then) == ({}, len(CCS), tls.after_hello)
    assert tls.after_hello(hello) == first
    # The handshake continues, or data come: nothing more can be read.
    for end in (b"\x16\3\3\0\5\x10", b"\x17\3\3\0\5"):
        assert tls.after_hello(end) == Found({})
    assert tls.after_hello(b"\x16\3\3") is MORE
    empty = tls.after_hello(b"\x16\3\3\0\0" + hello)
    assert isinstance(empty, Found)
    assert (empty.facts, empty.used + empty.skip, empty.then) == ({}, 5, tls.after_hello)
    malformed = tls.after_hello(b"\x16\3\3\xff\xff\1" + bytes(20))
    assert isinstance(malformed, Found)
    assert malformed.facts["conflict"]


def test_early_data_is_passed_over() -> None:
    first = tls.parse(made_hello([0x1301], [server_name(b"a.test"), (42, b"")]), b"")
    assert isinstance(first, Found)
    assert first.facts["tls_early_data"] is True
    assert first.then is not None
    data = first.then(b"\x17\3\3\1\0" + bytes(10), b"")
    assert isinstance(data, Found)
    assert (data.facts, data.used, data.skip, data.then) == ({}, 5, 256, first.then)


HELLO = made_hello([0x1301], [server_name(b"a.test")])[5:]


def made_record(data: bytes, *, kind: int = 22, version: bytes = b"\3\1") -> bytes:
    return bytes((kind,)) + version + len(data).to_bytes(2, "big") + data


WARNING = made_record(b"\1\x5a", kind=21)


@pytest.mark.parametrize(
    ("data", "taken_by"),
    [
        (made_record(HELLO, version=b"\3\5"), "OpenSSL, GnuTLS, Go, Java, NSS"),
        (made_record(HELLO, version=b"\3\xff"), "OpenSSL, GnuTLS, Go, Java, NSS"),
        (made_record(HELLO, version=b"\0\1"), "Go, NSS"),
        (made_record(HELLO, version=b"\x0f\0"), "Go, Java, NSS"),
        (made_record(HELLO, version=b"\xff\0"), "Java, NSS"),
        (made_record(HELLO[:50]) + made_record(HELLO[50:], version=b"\3\x09"), "OpenSSL, GnuTLS, Go, Java, NSS"),
        (made_record(b"") + made_record(HELLO), "OpenSSL, Java, NSS"),
        (made_record(HELLO[:3]) + made_record(b"") * 9 + made_record(HELLO[3:]), "OpenSSL, Java, NSS"),
        (WARNING + made_record(HELLO), "Go, Java, NSS"),
        (made_record(HELLO[:50]) + WARNING + made_record(HELLO[50:]), "Go"),
        (made_record(b"", kind=20) + made_record(HELLO), "OpenSSL"),
        (CCS + made_record(HELLO), "GnuTLS"),
        (made_record(HELLO[:50]) + CCS + made_record(HELLO[50:]), "GnuTLS"),
        (record(HELLO, 1), "OpenSSL, GnuTLS, Go, Java, NSS"),
    ],
)
def test_records_that_some_server_takes(data: bytes, taken_by: str) -> None:
    assert facts(data)["tls_sni"] == "a.test", taken_by
    # However little has come, it is not said to be something else.
    for size in range(len(data)):
        result = tls.parse(data[:size], b"")
        assert result is MORE or (isinstance(result, Found) and not result.decided and result.facts == {"protocol": "tls"})


# As OpenSSL 3.0 takes it.
VERSION_2 = b"\x80\x2f\1\3\3\0\6\0\0\0\x20\0\xc0\x2f\0\0\x2f" + bytes(32)


def test_a_hello_of_sslv2_has_no_name() -> None:
    assert facts(VERSION_2) == {"protocol": "tls", "tls_version": "1.2", "ech": False}
    for size in range(1, len(VERSION_2)):
        result = tls.parse(VERSION_2[:size], b"")
        assert result is MORE or (isinstance(result, Found) and not result.decided)


@pytest.mark.parametrize("at", [2, 3, 6, 8, 10, 1])
def test_other_bytes_are_no_hello_of_sslv2(at: int) -> None:
    assert tls.parse(VERSION_2[:at] + b"\x7d" + VERSION_2[at + 1 :], b"") is NO


TWO_NAMES = b"\0\x0c\0\0\3a.a\0\0\3b.b"


@pytest.mark.parametrize(
    "data",
    [
        b"\x17\3\3\0\5hello",
        b"\x16\3\1\0\0",
        b"\x15\3\1\0\3\1\0\0",
        b"\x14\3\1\0\1\1\x17\3\1\0\1x",
        b"\x16\3\1\0\4\2\0\0\0\0",
        b"\x16\3\1\xff\xff\1\0\0\1\0",
    ],
)
def test_what_is_no_hello(data: bytes) -> None:
    assert tls.parse(data + bytes(20), b"") is NO


@pytest.mark.parametrize(
    "data",
    [
        made_hello([0x1301], [server_name(b"a.test"), server_name(b"b.test")]),
        made_hello([0x1301], [(0, TWO_NAMES)]),
        made_hello([0x1301], [(0, b"\0\5\0\0\x09a")]),
        made_hello([0x1301], [(16, b"\0\5\2h2")]),
        made_hello([0x1301], [(43, b"\3\3\4")]),
        made_hello([0x1301], [], version=0x0202),
        # Another message in the same record, or a record between the parts that no server takes.
        record(made_hello([0x1301], [server_name(b"a.test")])[5:] + b"\1\0\0\0"),
        made_record(HELLO[:9]) + made_record(b"x", kind=99) + made_record(HELLO[9:]),
    ],
)
def test_a_hello_that_is_malformed_is_a_conflict(data: bytes) -> None:
    found = facts(data)
    assert found["protocol"] == "tls"
    assert found["conflict"]
    assert "tls_sni" not in found


@pytest.mark.parametrize("size", [1, 4, 7, 100, 4000])
def test_nothing_changes_before_the_bytes_that_a_hello_needs(size: int) -> None:
    """Also with a wrong record behind the first, another message in the record, and records that are passed over."""
    hello = client_hello("needs.server.test")
    half = tls.parse(hello[:100], b"")
    assert isinstance(half, Found)
    assert half.needs == len(hello)
    for whole in (
        record(hello[5:], size), record(hello[5:] + b"\1\0\0\0", size), record(hello[5:150], size) + b"\x99" + bytes(50),
        made_record(hello[5:80]) + made_record(b"\1", kind=20) + made_record(hello[80:]),
    ):  # fmt: skip
        results = [tls.parse(whole[:end], b"") for end in range(len(whole) + 1)]
        for end, result in enumerate(results):
            if isinstance(result, Found) and not result.decided:
                for other in results[end : result.needs]:
                    assert isinstance(other, Found)
                    assert (other.decided, other.facts) == (False, result.facts)


def test_fingerprints_of_a_hello_that_is_too_large_to_be_remembered() -> None:
    small, large = (made_hello([0x1301], [(0x15, bytes(size)), server_name(b"a.test")]) for size in (9, 3000))
    assert facts(small) == facts(large) == facts(small)
    many = [(number, b"") for number in range(100, 190)]
    assert facts(made_hello([0x1301], many)) == facts(made_hello([0x1301], many))
    assert facts(made_hello([0x1301], many))["ja4"] != facts(made_hello([0x1301], many[1:]))["ja4"]


def test_the_beginning_of_something_else_is_no_tls() -> None:
    assert tls.parse(b"", b"hello") is MORE
    assert tls.parse(b"\x16", b"") is MORE
    assert tls.parse(b"\x16\2", b"") is MORE
    assert tls.parse(b"G", b"") is NO
