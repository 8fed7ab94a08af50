"""TLS: the ClientHello (RFC 8446 4.1.2), its server name (RFC 6066 3), ALPN (RFC 7301), ECH (RFC 9849), JA3 and JA4.

Steps: at most one for each record (5 bytes or more) and one for each extension (4 bytes or more) or list entry.
Sources of the fingerprints: github.com/salesforce/ja3, and technical_details/JA4.md of github.com/FoxIO-LLC/ja4.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from struct import Struct, pack, unpack_from
from typing import Any, Final

from nfq_agent.protocols import MORE, NO, Found, Parser, Protocol, Result, host_name, text

_CHANGE_CIPHER_SPEC: Final = 20
_ALERT: Final = 21
_HANDSHAKE: Final = 22
_DATA: Final = 23
_CLIENT_HELLO: Final = 1
# A record carries at most 2^14 bytes of plain text (RFC 8446 5.1).
_RECORD_LIMIT: Final = 1 << 14
_SERVER_NAME: Final = 0
_GROUPS: Final = 10
_POINT_FORMATS: Final = 11
_SIGNATURES: Final = 13
_ALPN: Final = 16
_EARLY_DATA: Final = 42
_VERSIONS: Final = 43
_ECH: Final = 0xFE0D
# RFC 8701: 0x0a0a, 0x1a1a, ... 0xfafa have no meaning.
GREASE: Final = frozenset(0x0A0A + 0x1010 * number for number in range(16))
_VERSION_NAMES: Final = {0x0300: "ssl3", 0x0301: "1.0", 0x0302: "1.1", 0x0303: "1.2", 0x0304: "1.3"}
_JA4_VERSIONS: Final = {0x0300: "s3", 0x0301: "10", 0x0302: "11", 0x0303: "12", 0x0304: "13"}
_NONE: Final = "0" * 12
_EXTENSION: Final = Struct("!HH")
# The hello of a program differs in its name, its keys and its random value: what fingerprints are made of is the same.
_REMEMBERED: Final = 256
_REMEMBERED_BYTES: Final = 2048


def parse(client: bytes, server: bytes) -> Result:
    """The ClientHello at the beginning of what the client sent. Source: RFC 8446 5.1 for the records.

    Every form that a server takes is taken: each version in a record's header (OpenSSL 0x0300 to 0x03ff, Go up to 0x0fff, Java
    and NSS more), and in front of the hello or between its parts empty records (OpenSSL, Java, NSS), alerts (Go, Java, NSS) and
    ChangeCipherSpec (GnuTLS).
    """
    if client[:1] >= b"\x80":
        return _version_2(client)
    # Most hellos are one record; a longer or a split one is put together.
    parts: list[bytes] = []
    body = b""
    end = 0
    have = 0
    wanted = 4
    while have < wanted:
        head = client[end : end + 5]
        if head[:1] not in _KINDS:
            return _BROKEN if have else NO
        if len(head) < 5:
            # Until the hello or its record ends, and the next begins, nothing changes.
            return Found(_TLS, decided=False, needs=min(len(client) + wanted - have, end + 1)) if have >= 4 else MORE
        kind, _, size = unpack_from("!BHH", head)
        # The longest of the skipped records is an alert.
        if size > (_RECORD_LIMIT if kind == _HANDSHAKE else 2):
            return _BROKEN if have else NO
        part = client[end + 5 : end + 5 + size]
        end += 5 + size
        if kind != _HANDSHAKE or not part:
            continue
        if not have and part[0] != _CLIENT_HELLO:
            return NO
        parts.append(part)
        have += len(part)
        if wanted == 4 and have >= 4:
            body = parts[0] if len(parts) == 1 else b"".join(parts)
            parts = [body]
            wanted = 4 + int.from_bytes(body[1:4], "big")
    body = parts[0] if len(parts) == 1 else b"".join(parts)
    # Another message in the record of the hello: some servers refuse it (RFC 8446 5.1), some continue to read.
    facts = hello(body[4:]) if have == wanted else None
    if facts is None:
        return Found({"protocol": "tls", "conflict": "a ClientHello that servers may read in different ways"})
    then = after_hello_with_early_data if "tls_early_data" in facts else after_hello
    return Found({"protocol": "tls", **facts}, used=end, then=then)


# What may begin the records of a client; nothing, where a record has not come.
_KINDS: Final = frozenset((b"", b"\x14", b"\x15", b"\x16"))
_TLS: Final = {"protocol": "tls"}
_PARTIAL: Final = Found(_TLS, decided=False)
_BROKEN: Final = Found({"protocol": "tls", "conflict": "not valid records"})


def _version_2(client: bytes) -> Result:
    """The ClientHello of SSLv2 that offers TLS (RFC 5246 E.2), which OpenSSL takes. It has no extensions, so no name."""
    if client[2:3] not in (b"\1", b"") or client[3:4] not in (b"\3", b""):
        return NO
    if len(client) < 11:
        return MORE
    size, _, version, ciphers, session, challenge = unpack_from("!HBHHHH", client)
    size &= 0x7FFF
    if not ciphers or ciphers % 3 or session not in (0, 16) or not 16 <= challenge <= 32:
        return NO
    if size != 9 + ciphers + session + challenge:
        return NO
    if len(client) < 2 + size:
        return _PARTIAL
    facts = {"protocol": "tls", "tls_version": _VERSION_NAMES.get(version, f"{version:#06x}"), "ech": False}
    return Found(facts, used=2 + size, then=after_hello)


def after_hello(client: bytes, server: bytes = b"") -> Result:
    """The client's records behind its hello: a second hello, where the server asked for one (RFC 8446 4.1.4), or the rest.

    Before a second hello a ChangeCipherSpec may stand (RFC 8446 D.4), an alert and an empty record. Anything else ends what can
    be read.
    """
    return _after(client, after_hello, early=False)


def after_hello_with_early_data(client: bytes, server: bytes = b"") -> Result:
    """The same, where data may stand before the second hello: the server skips it (RFC 8446 4.2.10)."""
    return _after(client, after_hello_with_early_data, early=True)


def _after(client: bytes, then: Parser, early: bool) -> Result:
    kind = client[0]
    if kind not in (_CHANGE_CIPHER_SPEC, _ALERT, _HANDSHAKE) and not (early and kind == _DATA):
        return Found({})
    if len(client) < 5:
        return MORE
    size = int.from_bytes(client[3:5], "big")
    if kind == _HANDSHAKE and size:
        if len(client) < 6:
            return MORE
        if client[5] != _CLIENT_HELLO:
            return Found({})
        result = parse(client, b"")
        return _BROKEN if result is NO else result
    return Found({}, used=5, skip=size, then=then)


def hello(body: bytes, transport: str = "t") -> dict[str, Any] | None:  # noqa: C901  # one branch for each extension
    """The facts in a ClientHello without its handshake header; None if it is malformed.

    transport: "t" for TCP, "q" for QUIC (JA4's first letter). tls_version is the highest offered.
    """
    size = len(body)
    if size < 38 or body[0] != 3:
        return None
    legacy = body[0] << 8 | body[1]
    at = 35 + body[34]
    if size < at + 2:
        return None
    length = body[at] << 8 | body[at + 1]
    at += 2
    if length & 1 or size < at + length + 1:
        return None
    ciphers = body[at : at + length]
    at += length
    at += 1 + body[at]
    name: bytes | None = None
    alpn: tuple[bytes, ...] | None = None
    groups = formats = signatures = b""
    extensions: list[int] = []
    version = legacy
    ech = False
    if at != size:
        if size < at + 2 or size != at + 2 + (body[at] << 8 | body[at + 1]):
            return None
        at += 2
        while at < size:
            if size < at + 4:
                return None
            kind, length = _EXTENSION.unpack_from(body, at)
            at += 4
            end = at + length
            if end > size:
                return None
            if kind in _READ:
                if kind in extensions:
                    # Not more than one of a type (RFC 8446 4.2): which of two names counts is not known.
                    return None
                if kind == _SERVER_NAME:
                    if length and (name := _server_name(body[at:end])) is None:
                        return None
                elif kind == _ALPN:
                    if (alpn := _protocols(body[at:end])) is None:
                        return None
                elif kind == _VERSIONS:
                    if not length or body[at] != length - 1 or body[at] & 1:
                        return None
                    version = max(_numbers(body[at + 1 : end]), default=legacy)
                elif kind == _POINT_FORMATS:
                    formats = body[at + 1 : end]
                elif kind == _ECH:
                    # Type 0 is the outer hello; an inner one is never seen in clear (RFC 9849 5).
                    ech = body[at:end].startswith(b"\0")
                elif length >= 2:
                    if length & 1 or (body[at] << 8 | body[at + 1]) != length - 2:
                        return None
                    if kind == _GROUPS:
                        groups = body[at + 2 : end]
                    else:
                        signatures = body[at + 2 : end]
            if kind not in GREASE:
                extensions.append(kind)
            at = end
    elif at > size:
        return None
    facts: dict[str, Any] = {"tls_version": _VERSION_NAMES.get(version, f"{version:#06x}"), "ech": ech}
    if name:
        # RFC 6066 3: a DNS host name. Servers differ in what they make of other bytes.
        if (host := host_name(name)) is not None:
            facts["tls_sni"] = host
        else:
            facts["conflict"] = "a server name that is not a host name"
    if _EARLY_DATA in extensions:
        facts["tls_early_data"] = True
    if alpn is not None:
        facts["tls_alpn"] = tuple(text(each) for each in alpn)
    make = _fingerprints if size <= _REMEMBERED_BYTES and len(extensions) <= 64 else _fingerprints.__wrapped__
    versions, offered = (legacy, version), alpn[0] if alpn else b""
    facts["ja3"], facts["ja4"] = make(transport, versions, ciphers, tuple(extensions), groups, formats, signatures, offered)
    return facts


_READ: Final = frozenset((_SERVER_NAME, _GROUPS, _POINT_FORMATS, _SIGNATURES, _ALPN, _VERSIONS, _ECH))


def _numbers(data: bytes) -> list[int]:
    """16-bit numbers, those without meaning left out."""
    numbers = unpack_from(f"!{len(data) // 2}H", data)
    return [number for number in numbers if number not in GREASE]


def _server_name(data: bytes) -> bytes | None:
    """The one name of type host_name (RFC 6066 3: "MUST NOT contain more than one name of the same name_type"), or empty."""
    if data == b"\0\0":
        return b""
    if len(data) < 5 or int.from_bytes(data[:2], "big") != len(data) - 2 or data[2] != 0:
        return None
    size = int.from_bytes(data[3:5], "big")
    # Only host_name was ever defined, so the list has one entry.
    return data[5:] if len(data) == 5 + size else None


def _protocols(data: bytes) -> tuple[bytes, ...] | None:
    if len(data) < 2 or int.from_bytes(data[:2], "big") != len(data) - 2:
        return None
    names: list[bytes] = []
    at = 2
    while at < len(data):
        end = at + 1 + data[at]
        if end > len(data):
            return None
        names.append(data[at + 1 : end])
        at = end
    return tuple(names)


@lru_cache(_REMEMBERED)
def _fingerprints(
    transport: str,
    versions: tuple[int, int],
    ciphers: bytes,
    extensions: tuple[int, ...],
    groups: bytes,
    formats: bytes,
    signatures: bytes,
    alpn: bytes,
) -> tuple[str, str]:
    """JA3 and JA4. versions: of the hello, and the highest offered. Of the others the bytes, without lengths; alpn: the first."""
    numbers = _numbers(ciphers)
    ja3 = _ja3(versions[0], numbers, extensions, _numbers(groups), formats)
    return ja3, _ja4(transport, versions[1], numbers, extensions, _numbers(signatures), alpn)


def _ja3(version: int, ciphers: list[int], extensions: tuple[int, ...], groups: list[int], formats: bytes) -> str:
    line = f"{version},{_dashed(ciphers)},{_dashed(extensions)},{_dashed(groups)},{_dashed(formats)}"
    import hashlib

    return hashlib.md5(line.encode(), usedforsecurity=False).hexdigest()


def _dashed(numbers: Iterable[int]) -> str:
    return "-".join(map(str, numbers))


def _ja4(
    transport: str,
    version: int,
    ciphers: list[int],
    extensions: tuple[int, ...],
    signatures: list[int],
    alpn: bytes,
) -> str:
    shown = _JA4_VERSIONS.get(version, "00")
    sni = "d" if _SERVER_NAME in extensions else "i"
    head = f"{transport}{shown}{sni}{min(len(ciphers), 99):02}{min(len(extensions), 99):02}{_ja4_alpn(alpn)}"
    others = sorted([number for number in extensions if number not in _IN_HEAD])
    extension_text = _hexadecimal(others)
    if others and signatures:
        extension_text += "_" + _hexadecimal(signatures)
    return f"{head}_{_short(_hexadecimal(sorted(ciphers)))}_{_short(extension_text)}"


_IN_HEAD: Final = frozenset((_SERVER_NAME, _ALPN))


def _hexadecimal(numbers: list[int]) -> str:
    """Four digits each, with commas between."""
    return pack(f"!{len(numbers)}H", *numbers).hex(",", 2)


def _short(data: str) -> str:
    import hashlib

    return hashlib.sha256(data.encode()).hexdigest()[:12] if data else _NONE


def _ja4_alpn(alpn: bytes) -> str:
    if not alpn:
        return "00"
    first, last = alpn[:1], alpn[-1:]
    if first.isalnum() and last.isalnum():
        return (first + last).decode("ascii")
    digits = alpn.hex()
    return digits[0] + digits[-1]


PROTOCOL: Final = Protocol(
    "tls",
    facts=("tls_sni", "tls_alpn", "tls_version", "tls_early_data", "ech", "ja3", "ja4"),
    headline="tls_sni",
    hosts=("tls_sni",),
    parse=parse,
    # The hello after a HelloRetryRequest may carry another name.
    changes=("tls_sni", "tls_alpn", "tls_version", "tls_early_data", "ech", "ja3", "ja4"),
    # Found from the hello and the port (dot.py).
    carries=("dot",),
)
