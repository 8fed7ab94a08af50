"""Openings for the DPI tests: what clients and servers say first, and what is to be found in it."""

from __future__ import annotations

import ssl
import struct
from collections.abc import Sequence
from typing import Any


def client_hello(name: str | None, *, alpn: Sequence[str] = (), version: ssl.TLSVersion | None = None) -> bytes:
    """The records that OpenSSL would send."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if alpn:
        context.set_alpn_protocols(list(alpn))
    if version is not None:
        context.maximum_version = version
    outgoing = ssl.MemoryBIO()
    connection = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name)
    try:
        connection.do_handshake()
    except ssl.SSLWantReadError:
        return outgoing.read()
    raise AssertionError("a handshake without an answer")


def made_hello(
    ciphers: Sequence[int], extensions: Sequence[tuple[int, bytes]], *, version: int = 0x0303, session: bytes = b""
) -> bytes:
    """A ClientHello of one's own in one record."""
    options = b"".join(struct.pack("!HH", kind, len(data)) + data for kind, data in extensions)
    body = struct.pack("!H", version) + bytes(32) + bytes((len(session),)) + session
    body += struct.pack(f"!H{len(ciphers)}H", 2 * len(ciphers), *ciphers) + b"\1\0"
    if extensions:
        body += struct.pack("!H", len(options)) + options
    return record(b"\1" + len(body).to_bytes(3, "big") + body)


def record(handshake: bytes, size: int = 16384) -> bytes:
    """A handshake message in records of at most `size` bytes."""
    parts = [handshake[at : at + size] for at in range(0, len(handshake), size)]
    return b"".join(b"\x16\3\1" + struct.pack("!H", len(part)) + part for part in parts)


def server_name(name: bytes) -> tuple[int, bytes]:
    """The server_name extension (RFC 6066 3)."""
    return 0, struct.pack("!HBH", len(name) + 3, 0, len(name)) + name


def numbers(kind: int, *values: int) -> tuple[int, bytes]:
    """An extension that is a list of 16-bit numbers."""
    return kind, struct.pack(f"!H{len(values)}H", 2 * len(values), *values)


def dns_query(name: str, kind: int = 1, number: int = 7, *, flags: int = 0x0100) -> bytes:
    """A query without EDNS."""
    labels = b"".join(bytes((len(label),)) + label.encode() for label in name.split(".") if label)
    return struct.pack("!6H", number, flags, 1, 0, 0, 0) + labels + b"\0" + struct.pack("!HH", kind, 1)


def over_tcp(message: bytes) -> bytes:
    """With its length before it (RFC 1035 4.2.2)."""
    return struct.pack("!H", len(message)) + message


POSTGRESQL = b"\0\3\0\0user\0ann\0database\0shop\0application_name\0psql\0\0"
MQTT = b"\0\4MQTT\4\2\0\x3c\0\5meter"

# (what the client says, what the server says, the facts that have to be found)
OPENINGS: dict[str, tuple[bytes, bytes, dict[str, Any]]] = {
    "tls": (
        client_hello("a.server.test", alpn=("h2",)), b"",
        {"protocol": "tls", "tls_sni": "a.server.test", "tls_alpn": ("h2",)},
    ),
    "http": (
        b"GET /a/b?c=d HTTP/1.1\r\nUser-Agent: me\r\nHost: A.server.test:8080\r\n\r\n", b"",
        {"protocol": "http", "http_method": "GET", "http_path": "/a/b", "http_host": "a.server.test", "http_user_agent": "me"},
    ),
    "dns": (
        over_tcp(dns_query("A.name.test", 28)), b"",
        {"protocol": "dns", "dns_name": ("a.name.test",), "dns_type": ("AAAA",)},
    ),
    "ssh": (b"SSH-2.0-client_1\r\n", b"", {"protocol": "ssh", "ssh_client_banner": "SSH-2.0-client_1"}),
    "ssh-server": (b"", b"hello\r\nSSH-2.0-server_1\r\n", {"protocol": "ssh", "ssh_banner": "SSH-2.0-server_1"}),
    "smtp": (
        b"EHLO me.test\r\nMAIL FROM:<a@b.test>\r\n", b"220 mail.test ESMTP\r\n",
        {"protocol": "smtp", "smtp_helo": "me.test", "smtp_banner": "mail.test ESMTP"},
    ),
    "smtp-starttls": (
        b"EHLO me.test\r\nSTARTTLS\r\n" + client_hello("mail.server.test"), b"220 mail.test ESMTP\r\n",
        {"protocol": "smtp", "smtp_helo": "me.test", "tls_sni": "mail.server.test"},
    ),
    "imap": (
        b"a1 CAPABILITY\r\na2 LOGIN ann secret\r\n", b"* OK ready\r\n", {"protocol": "imap", "imap_banner": "ready"},
    ),
    "imap-starttls": (
        b"a1 STARTTLS\r\n" + client_hello("imap.server.test"), b"* OK ready\r\n",
        {"protocol": "imap", "tls_sni": "imap.server.test"},
    ),
    "postgresql": (
        struct.pack("!I", len(POSTGRESQL) + 4) + POSTGRESQL, b"",
        {"protocol": "postgresql", "pg_user": "ann", "pg_database": "shop"},
    ),
    "postgresql-tls": (
        bytes.fromhex("00000008 04d21630 00000008 04d2162f") + client_hello("db.server.test"), b"NS",
        {"protocol": "postgresql", "tls_sni": "db.server.test"},
    ),
    "redis": (b"*2\r\n$4\r\nauth\r\n$6\r\nsecret\r\n", b"", {"protocol": "redis", "redis_command": "AUTH"}),
    "mqtt": (
        b"\x10" + bytes((len(MQTT),)) + MQTT, b"", {"protocol": "mqtt", "mqtt_version": "3.1.1", "mqtt_client_id": "meter"},
    ),
    "tls-dns": (client_hello("dns.server.test", alpn=("dot",)), b"", {"protocol": "tls", "tls_alpn": ("dot",)}),
    "socks4": (
        b"\4\1\0\x50\xc0\0\2\7me\0", b"", {"protocol": "socks", "socks_version": "4", "socks_host": "192.0.2.7"},
    ),
    "socks4a": (
        b"\4\1\0\x50\0\0\0\1\0A.server.test\0", b"",
        {"protocol": "socks", "socks_host": "a.server.test", "socks_command": "connect"},
    ),
    "socks5": (
        b"\5\1\0\5\1\0\3\x0da.server.test\1\xbb", b"\5\0",
        {"protocol": "socks", "socks_version": "5", "socks_host": "a.server.test"},
    ),
    "socks5-password": (
        b"\5\2\0\2\1\2me\3you\5\1\0\4" + bytes(15) + b"\1\1\xbb", b"\5\2\1\0", {"protocol": "socks", "socks_host": "::1"},
    ),
    "pop3": (b"CAPA\r\nUSER me\r\n", b"+OK pop.test ready\r\n", {"protocol": "pop3", "pop3_banner": "pop.test ready"}),
    "pop3-stls": (
        b"STLS\r\n" + client_hello("pop.server.test"), b"+OK ready\r\n", {"protocol": "pop3", "tls_sni": "pop.server.test"},
    ),
    "ftp": (
        b"FEAT\r\nUSER ann\r\n", b"220 ftp.test\r\n", {"protocol": "ftp", "ftp_banner": "ftp.test", "ftp_user": "ann"},
    ),
    "ftp-tls": (
        b"AUTH TLS\r\n" + client_hello("ftp.server.test"), b"220 ftp.test\r\n", {"protocol": "ftp", "tls_sni": "ftp.server.test"},
    ),
    "xmpp": (
        b"<?xml version='1.0'?><stream:stream xmlns='jabber:client' to='Chat.test' version='1.0'><auth mechanism='PLAIN'/>", b"",
        {"protocol": "xmpp", "xmpp_to": "chat.test"},
    ),
    "xmpp-starttls": (
        b"<?xml version='1.0'?><stream:stream to='chat.test' xmlns='jabber:client'>"
        b"<starttls xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>" + client_hello("xmpp.server.test"), b"",
        {"protocol": "xmpp", "xmpp_to": "chat.test", "tls_sni": "xmpp.server.test"},
    ),
    "rdp": (
        b"\3\0\0\x21\x1c\xe0\0\0\0\0\0Cookie: mstshash=ann\r\n", b"", {"protocol": "rdp", "rdp_user": "ann"},
    ),
    "rdp-tls": (
        b"\3\0\0\x13\x0e\xe0\0\0\0\0\0\1\0\x08\0\3\0\0\0" + client_hello("rdp.server.test"), b"",
        {"protocol": "rdp", "tls_sni": "rdp.server.test"},
    ),
    "bittorrent": (
        b"\x13BitTorrent protocol" + bytes(8) + b"\xab" * 20 + b"-XX0001-" + bytes(12), b"",
        {"protocol": "bittorrent", "bittorrent_info_hash": "ab" * 20},
    ),
    "openvpn": (b"\0\x0e\x38" + b"sessions" + bytes(5), b"", {"protocol": "openvpn"}),
    "mqtt5": (
        bytes.fromhex("1015 0004 4d515454 05 02 003c 03 21000a 0005") + b"meter", b"",
        {"protocol": "mqtt", "mqtt_version": "5.0", "mqtt_client_id": "meter"},
    ),
}  # fmt: skip

# Datagrams of UDP, and the facts that have to be found.
DATAGRAMS: dict[str, tuple[bytes, dict[str, Any]]] = {
    "wireguard": (b"\1\0\0\0" + bytes(144), {"protocol": "wireguard"}),
    "wireguard-response": (b"\2\0\0\0" + bytes(88), {"protocol": "wireguard"}),
    "stun": (
        bytes.fromhex("0001000c2112a442") + bytes(12) + b"\x80\x22\0\7client1\0",
        {"protocol": "stun", "stun_software": "client1"},
    ),
    "ntp": (b"\x23\0\6\xec" + bytes(36) + b"\xe8\0\0\1\0\0\0\0", {"protocol": "ntp", "ntp_version": "4"}),
    "openvpn": (b"\x38" + b"sessions" + bytes(5), {"protocol": "openvpn"}),
    "openvpn-auth": (b"\x38" + b"sessions" + b"d" * 20 + b"\0\0\0\1time" + bytes(5), {"protocol": "openvpn"}),
    "openvpn-crypt": (b"\x38" + b"sessions" + b"\0\0\0\1time" + b"t" * 32 + b"crypt", {"protocol": "openvpn"}),
    "bittorrent": (b"d1:ad2:id20:" + b"x" * 20 + b"e1:q4:ping1:t2:aa1:y1:qe", {"protocol": "bittorrent"}),
    "dns": (dns_query("a.server.test"), {"protocol": "dns", "dns_name": ("a.server.test",)}),
}
