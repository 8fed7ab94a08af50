"""TLS behind another protocol, at real servers: what a client says before it, and a second hello, hide no denied name."""

from __future__ import annotations

import contextlib
import socket
import ssl
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from agent import Agent, until
from captures import certificate, listening, needs
from namespace import Namespace

pytestmark = pytest.mark.kernel

_QUIET: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}

_POLICY = """
[queue.egress]
num = 112
fail_open = false
bypass = false
elements = ["dpi", "names"]
[element.names]
type = "policy"
default = "accept"
rule = [ { action = "drop", tls_sni = ["*.refused.test"] } ]
[rules.egress]
queue = "egress"
hooks = ["output"]
tcp_ports = [21, 110, 143, 5222]
role = "client"
"""
_XMPP = "<stream:stream\nto='chat.test' xmlns='jabber:client' xmlns:stream='http://etherx.jabber.org/streams' version='1.0'>"
_STARTTLS = "<starttls xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>"
# The port, whether the server speaks first, and what the client says; the server answers each.
_TALKS = {
    "pop3": (110, True, ("STLS\r\n",)),
    "pop3-user": (110, True, ("USER ann\r\n", "STLS\r\n")),
    "imap": (143, True, ("a STARTTLS\r\n",)),
    "imap-unknown": (143, True, ("a FOO\r\n", "b STARTTLS\r\n")),
    "imap-looks-like-ssh": (143, True, ("SSH-2.0-x\r\n", "b STARTTLS\r\n")),
    "ftp-user": (21, True, ("USER anonymous\r\n", "AUTH TLS\r\n")),
    "ftp-noop": (21, True, ("NOOP\r\n", "AUTH SSL\r\n")),
    "xmpp": (5222, False, (_XMPP, _STARTTLS)),
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Namespace:  # type: ignore[misc]  # a generator
    needs("dovecot", "dovecot-pop3d and dovecot-imapd")
    needs("vsftpd", "vsftpd")
    needs("prosody", "prosody")
    folder = tmp_path_factory.mktemp("starttls")
    folder.chmod(0o755)
    certificate(folder)
    with Namespace() as netns:
        _serve(netns, folder)
        yield netns


def _serve(netns: Namespace, folder: Path) -> None:
    """One group alone, so that a client that offers another share is asked for a second hello."""
    tls = f"ssl_cert = <{folder}/cert.pem\nssl_key = <{folder}/key.pem\nssl_curve_list = P-384\n"
    (folder / "dovecot.conf").write_text(
        "protocols = pop3 imap\nbase_dir = /run/dovecot\nlog_path = /dev/null\nlisten = 127.0.0.1\nssl = yes\n" + tls +
        "passdb {\n driver = static\n args = password=secret\n}\n"
        "userdb {\n driver = static\n args = uid=mail gid=mail home=/run/mail\n}\n"
    )  # fmt: skip
    (folder / "vsftpd.conf").write_text(
        "listen=YES\nbackground=NO\nanonymous_enable=YES\nsecure_chroot_dir=/run/empty\nseccomp_sandbox=NO\nssl_enable=YES\n"
        f"allow_anon_ssl=YES\nrsa_cert_file={folder}/cert.pem\nrsa_private_key_file={folder}/key.pem\n"
    )
    (folder / "prosody.cfg.lua").write_text(
        'run_as_root = true\npidfile = "/run/prosody.pid"\ndata_path = "/run/prosody"\nmodules_enabled = { "tls", "saslauth" }\n'
        'modules_disabled = { "s2s" }\ninterfaces = { "127.0.0.1" }\nlog = { error = "/dev/null" }\n'
        f'ssl = {{ key = "{folder}/key.pem", certificate = "{folder}/cert.pem" }}\nVirtualHost "chat.test"\n'
    )
    netns.shell("install -d -o mail -g mail /run/mail; mkdir -p /run/empty /run/prosody")
    netns.start("dovecot", "-F", "-c", str(folder / "dovecot.conf"), **_QUIET)
    netns.start("vsftpd", str(folder / "vsftpd.conf"), **_QUIET)
    netns.start("prosody", "-F", "--config", str(folder / "prosody.cfg.lua"), **_QUIET)
    for port in (21, 110, 143, 5222):
        until(partial(listening, netns, port), f"port {port} is served")


@dataclass(frozen=True)
class Asked:
    """How a client turns to TLS. joined: the hello comes in one segment with the last command. first: a name asked for before."""

    talk: str
    name: str
    joined: bool = False
    first: str = ""


def _understood(asked: Asked, seconds: float) -> bool:
    """Whether the server answers the ClientHello with its own, within so many seconds."""
    port, greets, lines = _TALKS[asked.talk]
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    client = context.wrap_bio(incoming, outgoing, server_hostname=asked.first or asked.name)

    def flight() -> bytes:
        with contextlib.suppress(ssl.SSLError):
            client.do_handshake()
        return outgoing.read()

    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if greets:
            connection.recv(4096)
        for line in lines[:-1]:
            connection.sendall(line.encode())
            connection.recv(4096)
        last = lines[-1].encode()
        hello = flight()
        if not asked.joined:
            connection.sendall(last)
            connection.recv(4096)
            last = b""
        connection.sendall(last + hello)
        connection.settimeout(seconds)
        with contextlib.suppress(OSError):
            got = connection.recv(65536)
            if asked.joined and got[:1] != b"\x16":
                got = connection.recv(65536)
            if asked.first:
                incoming.write(got)
                connection.sendall(flight().replace(asked.first.encode(), asked.name.encode()))
                got = connection.recv(65536)
            return got[:2] in (b"\x16\3", b"\x14\3", b"\x15\3")
        return False


def _tries(asked: tuple[Asked, ...], seconds: float = 60) -> list[bool]:
    def one(each: Asked) -> bool:
        try:
            return _understood(each, seconds)
        except OSError:
            return False

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(one, asked))


_TRIES = (
    *(Asked(talk, "name.refused.test") for talk in _TALKS),
    # vsftpd and prosody throw away what comes with the command.
    *(Asked(talk, "name.refused.test", first="aaaa.allowed.test") for talk in ("pop3", "imap")),
)


def test_what_a_client_says_before_its_hello_hides_no_name(served: Namespace, tmp_path: Path) -> None:
    def tried(seconds: float) -> dict[Asked, bool]:
        return dict(zip(_TRIES, served.call(_tries, _TRIES, seconds, timeout=240), strict=True))

    assert [asked for asked, understood in tried(60).items() if not understood] == [], "it is not an evasion"
    agent = Agent(served, tmp_path, _POLICY).ready()
    assert [asked for asked, understood in tried(1).items() if understood] == [], agent.log
    honest = tuple(Asked(talk, "name.allowed.test") for talk in _TALKS)
    assert served.call(_tries, honest, timeout=240) == [True] * len(honest), agent.log
    agent.stop()
