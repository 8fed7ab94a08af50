"""Real clients and servers on the loopback of a namespace, recorded: what the DPI tests read, and tshark beside them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from agent import until
from namespace import PATIENCE, Namespace

# Servers of protocols that have no small real one to install: each speaks the first words and hands over to TLS where asked.
_SCRIPTED = """
import socket, ssl, sys, threading
port, kind, cert = int(sys.argv[1]), sys.argv[2], sys.argv[3]
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(cert + "/cert.pem", cert + "/key.pem")
def smtp(c):
    c.sendall(b"220 mail.server.test ESMTP ready\\r\\n")
    f = c.makefile("rb")
    for line in f:
        verb = line.split()[0].upper() if line.split() else b""
        if verb == b"EHLO":
            c.sendall(b"250-mail.server.test\\r\\n250 STARTTLS\\r\\n")
        elif verb == b"STARTTLS":
            c.sendall(b"220 go ahead\\r\\n")
            context.wrap_socket(c, server_side=True).close()
            return
        elif verb == b"DATA":
            c.sendall(b"354 go on\\r\\n")
            while f.readline() not in (b".\\r\\n", b""): pass
            c.sendall(b"250 ok\\r\\n")
        elif verb == b"QUIT":
            c.sendall(b"221 bye\\r\\n")
            return
        else:
            c.sendall(b"250 ok\\r\\n")
def imap(c):
    c.sendall(b"* OK imap.server.test ready\\r\\n")
    for line in c.makefile("rb"):
        tag, verb = line.split()[0], line.split()[1].upper()
        if verb == b"CAPABILITY":
            c.sendall(b"* CAPABILITY IMAP4rev1 STARTTLS\\r\\n" + tag + b" OK done\\r\\n")
        elif verb == b"STARTTLS":
            c.sendall(tag + b" OK begin\\r\\n")
            context.wrap_socket(c, server_side=True).close()
            return
        elif verb == b"LOGOUT":
            c.sendall(b"* BYE\\r\\n" + tag + b" OK done\\r\\n")
            return
        else:
            c.sendall(tag + b" OK done\\r\\n")
def mqtt(c):
    c.recv(1000)
    c.sendall(bytes.fromhex("20020000"))
    c.recv(1000)
def serve(c):
    try: globals()[kind](c)
    except (OSError, IndexError): pass
    finally: c.close()
listener = socket.create_server(("127.0.0.1", port))
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""

_QUIC = """
import asyncio, sys
from aioquic.asyncio import connect, serve
from aioquic.quic.configuration import QuicConfiguration
async def main(cert, jobs):
    server = QuicConfiguration(is_client=False, alpn_protocols=["h3"])
    server.load_cert_chain(cert + "/cert.pem", cert + "/key.pem")
    running = await serve("127.0.0.1", 4433, configuration=server)
    for name, version, protocols in jobs:
        client = QuicConfiguration(is_client=True, alpn_protocols=protocols, verify_mode=0, server_name=name)
        client.original_version = version
        client.supported_versions = [version]
        async with connect("127.0.0.1", 4433, configuration=client) as connection:
            await connection.ping()
    running.close()
big = ["h3"] + ["alpn-%03d-%s" % (number, "x" * 40) for number in range(60)]
asyncio.run(main(sys.argv[1], [
    ("quic.server.test", 1, ["h3"]), ("quic2.server.test", 0x6B3343CF, ["h3"]), ("quicbig.server.test", 1, big),
]))
"""


def certificate(folder: Path) -> None:
    """cert.pem and key.pem in `folder`."""
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=server.test", "-keyout", folder / "key.pem", "-out", folder / "cert.pem"],
        check=True, capture_output=True,
    )  # fmt: skip


def listening(netns: Namespace, port: int, kind: str = "-t") -> bool:
    """Whether something listens on a port inside."""
    return f":{port} " in netns.run("ss", "-Hln", kind).stdout


@contextlib.contextmanager
def recording(netns: Namespace, path: Path) -> Iterator[None]:
    """Record the loopback into a pcap file."""
    with open(path.with_suffix(".log"), "wb") as log:
        recorder = netns.start("dumpcap", "-q", "-P", "-B", "16", "-i", "lo", "-w", str(path), stderr=log, stdout=log)
        until(lambda: b"File:" in path.with_suffix(".log").read_bytes(), "dumpcap starts")
        yield
        # What was sent last has to reach the recorder: a packet of an unused port. nc reads a file: it does not wait for a pipe.
        size = path.stat().st_size
        netns.shell("nc -u -w0 127.0.0.1 9 </proc/version")
        until(lambda: path.stat().st_size > size, "the recorder has the last packet")
        recorder.send_signal(signal.SIGTERM)
        recorder.wait(PATIENCE)


def traffic(netns: Namespace, folder: Path) -> None:
    """Every client once, each against a real server or a scripted one, over 127.0.0.1."""
    folder.chmod(0o755)
    certificate(folder)
    for name, text in (("scripted.py", _SCRIPTED), ("quic.py", _QUIC)):
        (folder / name).write_text(text)
    # Segments of an Ethernet's size, one a packet, so that what is large is split.
    netns.run("ip", "link", "set", "lo", "mtu", "1500", "gso_max_segs", "1")
    tls_server(netns, folder)
    plain = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    (folder / "www").mkdir()
    (folder / "www" / "index.html").write_text("here\n")
    netns.start(sys.executable, "-m", "http.server", "8000", "--bind", "127.0.0.1", "-d", str(folder / "www"), **plain)
    for port, kind in ((25, "smtp"), (143, "imap"), (1883, "mqtt")):
        netns.start(sys.executable, str(folder / "scripted.py"), str(port), kind, str(folder), **plain)
    netns.start(
        "dnsmasq", "--keep-in-foreground", "--no-resolv", "--no-hosts", "--listen-address=127.0.0.1", "--bind-interfaces",
        "--user=root", "--pid-file=", "--address=/a.name.test/192.0.2.7", "--address=/a.name.test/2001:db8::7",
        "--mx-host=mail.name.test,mx.name.test,10", "--txt-record=txt.name.test,words", "--cname=alias.name.test,a.name.test",
        "--host-record=a.name.test,192.0.2.7", "--local=/name.test/", **plain,
    )  # fmt: skip
    ssh_server(netns, folder)
    database = postgresql(netns, folder)
    netns.start("bash", "-c", "exec -a redis-server redis-check-rdb --port 6379 --bind 127.0.0.1 --save '' --dir /run", **plain)
    for port in (8000, 25, 143, 1883, 53, 22, 5432, 6379, 4430, 4431):
        until(partial(listening, netns, port), f"port {port} is served")

    def client(*argv: str, **options: Any) -> None:
        netns.run(*argv, check=False, **{"input": "", **options})

    # TLS: small, both versions, without a name, and hellos of several segments.
    long_alpn = ",".join(f"protocol-{number:03}-{'x' * 100}" for number in range(60))
    for more in (
        ("-servername", "small.server.test", "-tls1_2"),
        ("-servername", "Modern.Server.TEST", "-tls1_3"),
        ("-noservername",),
        ("-servername", "large.server.test", "-alpn", long_alpn),
        ("-servername", "alpn.server.test", "-alpn", "h2,http/1.1", "-groups", "P-521:P-384:X25519"),
        ("-servername", "single.server.test", "-alpn", "x"),
        ("-servername", "resumed.server.test", "-sess_out", str(folder / "session")),
        ("-servername", "resumed.server.test", "-sess_in", str(folder / "session")),
        # The server takes P-256 only on this port and asks for it: a second hello (HelloRetryRequest).
        ("-servername", "retry.server.test", "-groups", "X25519:P-256", "-connect", "127.0.0.1:4431"),
    ):
        client("openssl", "s_client", "-connect", "127.0.0.1:4430", *more)
    resolve = ("--resolve", "curl.server.test:4430:127.0.0.1", "-k", "-s", "-m", "60")
    client("curl", *resolve, "--http1.1", "https://curl.server.test:4430/")
    client("curl", *resolve, "--http2", "https://curl.server.test:4430/")
    # HTTP in clear text: small, with a head of several segments, with a body, two requests on one connection.
    at = ("-s", "-m", "60", "--resolve", "plain.server.test:8000:127.0.0.1")
    client("curl", *at, "-A", "agent/1.0", "http://plain.server.test:8000/index.html?secret=1")
    client("curl", *at, "-H", "X-Long: " + "y" * 5000, "-H", "X-More: " + "z" * 5000, "http://plain.server.test:8000/long")
    client("curl", *at, "-d", "a=b", "http://plain.server.test:8000/form")
    client("curl", *at, "http://127.0.0.1:8000/address")
    for how in ("+notcp", "+tcp"):
        for name, kind in (("a.name.test", "A"), ("A.name.TEST", "AAAA"), ("mail.name.test", "MX"), ("txt.name.test", "TXT"),
                           ("alias.name.test", "A"), ("no.name.test", "HTTPS")):  # fmt: skip
            client("dig", "@127.0.0.1", how, "+tries=1", "+time=60", name, kind)
    client(
        "ssh", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "BatchMode=yes",
        "-o", "ConnectTimeout=60", "nobody@127.0.0.1", "true",
    )  # fmt: skip
    for mode in ("require", "disable", "prefer"):
        target = f"host=db.server.test hostaddr=127.0.0.1 user=postgres dbname=template1 sslmode={mode}"
        client("psql", target, "-c", "select 1")
    client("redis-cli", "-h", "127.0.0.1", "PING")
    client("redis-cli", "-h", "127.0.0.1", input="SET a b\nGET a\n")
    mail = ("--mail-from", "a@client.test", "--mail-rcpt", "b@server.test", "-T", "-", "-s", "-m", "60", "-k")
    for extra in ((), ("--ssl",)):
        client(
            "curl", *mail, *extra, "--resolve", "mail.server.test:25:127.0.0.1", "smtp://mail.server.test/me.test", input="x\n"
        )
        client("curl", "-s", "-m", "60", "-k", *extra, "--resolve", "imap.server.test:143:127.0.0.1", "imap://imap.server.test/")
    client("curl", "-s", "-m", "60", "-d", "hello", "mqtt://127.0.0.1/topic")
    netns.run(sys.executable, str(folder / "quic.py"), str(folder))
    # Killed, it would leave its shared memory behind.
    database.send_signal(signal.SIGQUIT)
    database.wait(PATIENCE)


def tls_server(netns: Namespace, folder: Path) -> None:
    """openssl s_server on 4430, and on 4431 with one group alone."""
    for port, extra in ((4430, ("-alpn", "http/1.1,h2")), (4431, ("-groups", "P-256"))):
        netns.start(
            "openssl", "s_server", "-accept", f"127.0.0.1:{port}", "-cert", str(folder / "cert.pem"), "-key",
            str(folder / "key.pem"), "-www", *extra, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip


def ssh_server(netns: Namespace, folder: Path) -> None:
    """sshd on 22."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "host"], check=True)
    netns.run("mkdir", "-p", "/run/sshd")
    with open(folder / "sshd.log", "wb") as log:
        netns.start(
            "/usr/sbin/sshd", "-D", "-e", "-f", "/dev/null", "-h", str(folder / "host"), "-o", "ListenAddress=127.0.0.1",
            "-o", "PidFile=none", stderr=log,
        )  # fmt: skip


def postgresql(netns: Namespace, folder: Path) -> subprocess.Popen[bytes]:
    """A PostgreSQL server on 5432 with TLS. It refuses to run as root; setpriv becomes it, so that it ends with the test."""
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin"))[-1]
    data = "/run/pgdata"
    for file in ("cert.pem", "key.pem"):
        netns.shell(f"install -o postgres -m 600 {folder}/{file} /run/pg-{file}")
    netns.shell(
        f"install -d -o postgres {data} && runuser -u postgres -- {binaries}/initdb -D {data} -A trust --no-sync "
        f"--locale=C -E UTF8 --no-instructions"
    )
    with open(folder / "postgres.log", "wb") as log:
        return netns.start(
            "setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", f"{binaries}/postgres",
            "-D", data, "-h", "127.0.0.1", "-k", "/run/pgdata",
            "-c", "ssl=on", "-c", "ssl_cert_file=/run/pg-cert.pem", "-c", "ssl_key_file=/run/pg-key.pem", "-c", "fsync=off",
            stdout=log, stderr=log,
        )  # fmt: skip


def frames(path: Path) -> Iterator[tuple[float, bytes]]:
    """(seconds, IP packet) of an Ethernet pcap file."""
    data = path.read_bytes()
    # dumpcap 4.4 writes nanoseconds.
    parts = {b"\xd4\xc3\xb2\xa1": 1e6, b"\x4d\x3c\xb2\xa1": 1e9}[data[:4]]
    at = 24
    while at + 16 <= len(data):
        seconds, fraction, size, _ = struct.unpack_from("<4I", data, at)
        yield seconds + fraction / parts, data[at + 30 : at + 16 + size]
        at += 16 + size


def tshark(path: Path, fields: list[str], only: str) -> list[dict[str, list[str]]]:
    """The fields of the packets that a display filter lets pass, as tshark reads them."""
    argv = ["tshark", "-r", str(path), "-Y", only, "-T", "json", "--no-duplicate-keys"]
    for field in fields:
        argv += ["-e", field]
    done = subprocess.run(argv, capture_output=True, check=True, env={**os.environ, "LC_ALL": "C"})
    return [packet["_source"]["layers"] for packet in json.loads(done.stdout)]


def needs(program: str, package: str) -> None:
    """Skip the test where a program is missing; its package is too large for the tests to install it."""
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed (package {package})")
