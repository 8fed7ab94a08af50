"""What real programs send, client and server, as `dpi` reads it: recorded on the loopback. A program that is missing is named."""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from agent import Agent, until
from captures import certificate, frames, listening, needs, recording, ssh_server
from namespace import Namespace

from nfq_agent.packet import Packet
from nfq_agent.testing import Bench

pytestmark = pytest.mark.kernel

QUIET: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
Facts = list[dict[str, Any]]


class Seen:
    """What dpi found of each flow, in their order."""

    def __init__(self, netns: Namespace, folder: Path) -> None:
        self.netns, self.folder = netns, folder
        self.flows: Facts = []

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        path = self.folder / "record.pcap"
        with recording(self.netns, path):
            yield
        bench = Bench("dpi")
        for time, data in frames(path):
            # Captured where they were sent: an offload fills in the checksum later.
            packet = Packet(data, time=1000.0 + time % 1000, checksum_ready=False)
            bench.decide(packet)
            flow = bench.flows.find(packet.headers.five_tuple)
            if flow is not None and not any(flow.facts is facts for facts in self.flows):
                self.flows.append(flow.facts)

    def of(self, protocol: str) -> Facts:
        return [facts for facts in self.flows if facts.get("protocol") == protocol]

    def run(self, *argv: str, **options: Any) -> None:
        """A client, whatever comes of it."""
        self.netns.run(*argv, check=False, **options)

    def serve(self, port: int, *argv: str, **options: Any) -> None:
        self.netns.start(*argv, **{**QUIET, **options})
        until(partial(listening, self.netns, port), f"{argv[0]} listens on {port}")


@pytest.fixture
def seen(netns: Namespace, tmp_path: Path) -> Seen:
    tmp_path.chmod(0o755)
    certificate(tmp_path)
    return Seen(netns, tmp_path)


def test_socks_by_ssh_and_curl(seen: Seen) -> None:
    ssh_server(seen.netns, seen.folder)
    until(partial(listening, seen.netns, 22), "sshd listens")
    key = seen.folder / "user"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    home = seen.netns.shell("getent passwd root | cut -d: -f6").strip()
    seen.netns.shell(
        f"mount -t tmpfs -o mode=700 tmpfs {home} && mkdir -m 700 {home}/.ssh && cp {key}.pub {home}/.ssh/authorized_keys"
    )
    seen.serve(8000, "python3", "-m", "http.server", "8000")
    with seen.recorded():
        seen.serve(
            1080, "ssh", "-N", "-D", "127.0.0.1:1080", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null",
            "-i", str(key), "127.0.0.1",
        )  # fmt: skip
        # Some versions of curl look up ::1 first for --socks5, where nothing listens.
        for way in ("--socks4", "--socks4a", "--socks5", "--socks5-hostname"):
            done = seen.netns.run("curl", "-4sf", "-m", "60", way, "127.0.0.1:1080", "http://localhost:8000/", check=False)
            assert done.returncode == 0, way
    found = [(facts["socks_version"], facts["socks_host"]) for facts in seen.of("socks")]
    assert found == [("4", "127.0.0.1"), ("4", "localhost"), ("5", "127.0.0.1"), ("5", "localhost")]
    assert seen.of("ssh")


def test_ntp_by_chrony(seen: Seen) -> None:
    needs("chronyd", "chrony")
    (seen.folder / "server.conf").write_text("local stratum 8\nallow\ncmdport 0\nbindaddress 127.0.0.1\npidfile /run/s.pid\n")
    seen.netns.start("chronyd", "-x", "-d", "-u", "root", "-f", str(seen.folder / "server.conf"), **QUIET)
    until(lambda: listening(seen.netns, 123, "-u"), "chronyd listens")
    with seen.recorded():
        seen.run(
            "timeout",
            "4",
            "chronyd",
            "-Q",
            "-x",
            "-u",
            "root",
            "-t",
            "3",
            "server 127.0.0.1 iburst",
            "pidfile /run/q.pid",
            "cmdport 0",
        )
    assert {facts["ntp_version"] for facts in seen.of("ntp")} == {"4"}


@pytest.mark.parametrize("proto", ["udp", "tcp-client"])
@pytest.mark.parametrize("secured", ["", "--tls-auth", "--tls-crypt"])
def test_openvpn(seen: Seen, proto: str, secured: str) -> None:
    """Packets of 200 bytes at most: the ClientHello takes several, as the one of OpenSSL 3.5 does by itself."""
    needs("openvpn", "openvpn")
    key = seen.folder / "static.key"
    subprocess.run(["openvpn", "--genkey", "secret", str(key)], check=True)
    own, private = str(seen.folder / "cert.pem"), str(seen.folder / "key.pem")
    files = ["--ca", own, "--cert", own, "--key", private, *([secured, str(key)] if secured else [])]
    common = ["--dev", "null", "--ifconfig-noexec", "--verb", "0", "--max-packet-size", "200", *files]
    server = proto.replace("client", "server")
    seen.netns.start("openvpn", "--tls-server", "--dh", "none", "--proto", server, "--port", "1194", *common, **QUIET)
    kind = "-u" if proto == "udp" else "-t"
    until(lambda: listening(seen.netns, 1194, kind), "openvpn listens")
    log = seen.folder / "client.log"
    with seen.recorded(), log.open("wb") as output:
        client = seen.netns.start(
            "openvpn", "--tls-client", "--proto", proto, "--nobind", "--remote", "127.0.0.1", "1194", *common, "--verb", "3",
            stdout=output, stderr=output,
        )  # fmt: skip
        until(lambda: "Control Channel: TLS" in log.read_text(), "the handshake is over")
        client.kill()
        client.wait()
    found = seen.of("openvpn")
    assert found
    assert not seen.of("tls")
    assert not any("conflict" in facts for facts in found)
    if proto != "udp" and secured != "--tls-crypt":
        assert found[0]["tls_version"] == "1.3"


_TORRENT = """
import os, sys, time
import libtorrent as lt
folder = sys.argv[1]
os.makedirs(folder + "/a", exist_ok=True); os.makedirs(folder + "/b", exist_ok=True)
open(folder + "/a/file", "wb").write(os.urandom(100000))
files = lt.file_storage(); lt.add_files(files, folder + "/a/file")
made = lt.create_torrent(files, flags=lt.create_torrent.v1_only); lt.set_piece_hashes(made, folder + "/a")
info = lt.torrent_info(made.generate())
def session(port):
    return lt.session({"listen_interfaces": "127.0.0.1:%d" % port, "enable_dht": True, "enable_lsd": False, "enable_upnp": False,
        "enable_natpmp": False, "enable_outgoing_tcp": True,
        "enable_outgoing_utp": False, "out_enc_policy": 2, "in_enc_policy": 2,
        "allow_multiple_connections_per_ip": True, "dht_bootstrap_nodes": "127.0.0.1:6999"})
one, two = session(6881), session(6882)
seed = one.add_torrent({"ti": info, "save_path": folder + "/a"})
peer = two.add_torrent({"ti": info, "save_path": folder + "/b"})
print(info.info_hash(), flush=True)
time.sleep(0.5)
peer.connect_peer(("127.0.0.1", 6881))
for _ in range(600):
    if peer.status().progress == 1: break
    time.sleep(0.1)
"""


def test_bittorrent_by_libtorrent(seen: Seen) -> None:
    python = "/usr/bin/python3"
    if subprocess.run([python, "-c", "import libtorrent"], capture_output=True, check=False).returncode != 0:
        pytest.skip("libtorrent is not installed (package python3-libtorrent)")
    with seen.recorded():
        done = seen.netns.run(python, "-c", _TORRENT, str(seen.folder), check=False)
    assert done.stdout.strip() in [facts.get("bittorrent_info_hash") for facts in seen.of("bittorrent")], done.stderr
    # The distributed hash table, over UDP.
    assert any("bittorrent_info_hash" not in facts for facts in seen.of("bittorrent"))


def test_ftp_by_vsftpd_and_curl(seen: Seen) -> None:
    needs("vsftpd", "vsftpd")
    conf = seen.folder / "vsftpd.conf"
    conf.write_text(
        "listen=YES\nbackground=NO\nanonymous_enable=YES\nanon_root=/run/ftp\nsecure_chroot_dir=/run/empty\nseccomp_sandbox=NO\n"
        f"ssl_enable=YES\nallow_anon_ssl=YES\nrsa_cert_file={seen.folder}/cert.pem\nrsa_private_key_file={seen.folder}/key.pem\n"
        "ftpd_banner=ftp of the test\nforce_local_logins_ssl=NO\nrequire_ssl_reuse=NO\n"
    )
    seen.netns.shell("mkdir -p /run/ftp /run/empty && echo hello >/run/ftp/file && chown root /run/ftp && chmod 755 /run/ftp")
    seen.serve(21, "vsftpd", str(conf))
    with seen.recorded():
        seen.netns.run("curl", "-sf", "-m", "60", "ftp://anonymous:me@127.0.0.1/file")
        resolve = ("--resolve", "ftp.server.test:21:127.0.0.1")
        seen.run("curl", "-sk", "-m", "60", "--ssl-reqd", *resolve, "ftp://anonymous:me@ftp.server.test/file")
    plain, secured = seen.of("ftp")
    assert (plain["ftp_banner"], plain["ftp_user"]) == ("ftp of the test", "anonymous")
    assert secured["tls_sni"] == "ftp.server.test"


def test_pop3_and_imap_by_dovecot(seen: Seen) -> None:
    needs("dovecot", "dovecot-pop3d and dovecot-imapd")
    conf = seen.folder / "dovecot.conf"
    conf.write_text(
        "protocols = pop3 imap\nbase_dir = /run/dovecot\nlog_path = /dev/null\nlisten = 127.0.0.1\nssl = yes\n"
        "mail_location = maildir:/run/mail\n"
        f"ssl_cert = <{seen.folder}/cert.pem\nssl_key = <{seen.folder}/key.pem\ndisable_plaintext_auth = no\n"
        "passdb {\n driver = static\n args = password=secret\n}\n"
        "userdb {\n driver = static\n args = uid=mail gid=mail home=/run/mail\n}\n"
        "login_greeting = mail of the test\n"
    )
    seen.netns.shell("install -d -o mail -g mail /run/mail")
    seen.serve(110, "dovecot", "-F", "-c", str(conf))
    with seen.recorded():
        for scheme, port in (("pop3", 110), ("imap", 143)):
            seen.run("curl", "-s", "-m", "60", f"{scheme}://ann:secret@127.0.0.1:{port}/")
            resolve = ("--resolve", f"{scheme}.server.test:{port}:127.0.0.1")
            seen.run("curl", "-sk", "-m", "60", "--ssl-reqd", *resolve, f"{scheme}://ann:secret@{scheme}.server.test:{port}/")
            arguments = ("-starttls", scheme, "-servername", f"openssl.{scheme}.test")
            seen.run("openssl", "s_client", "-connect", f"127.0.0.1:{port}", *arguments, input="")
    for scheme in ("pop3", "imap"):
        plain, *secured = seen.of(scheme)
        assert "mail of the test" in plain[f"{scheme}_banner"]
        assert [facts.get("tls_sni") for facts in secured] == [f"{scheme}.server.test", f"openssl.{scheme}.test"]


def test_xmpp_by_prosody(seen: Seen) -> None:
    needs("prosody", "prosody")
    conf = seen.folder / "prosody.cfg.lua"
    conf.write_text(
        'run_as_root = true\npidfile = "/run/prosody.pid"\ndata_path = "/run/prosody"\n'
        'modules_enabled = { "tls", "saslauth" }\n'
        'modules_disabled = { "s2s" }\ninterfaces = { "127.0.0.1" }\nlog = { error = "/dev/null" }\n'
        f'ssl = {{ key = "{seen.folder}/key.pem", certificate = "{seen.folder}/cert.pem" }}\nVirtualHost "chat.test"\n'
    )
    seen.netns.shell("mkdir -p /run/prosody")
    seen.serve(5222, "prosody", "-F", "--config", str(conf))
    with seen.recorded():
        seen.run(
            "timeout", "60", "openssl", "s_client", "-connect", "127.0.0.1:5222", "-starttls", "xmpp", "-xmpphost", "chat.test",
            "-servername", "xmpp.server.test", input="",
        )  # fmt: skip
    (found,) = seen.of("xmpp")
    assert (found["xmpp_to"], found.get("tls_sni")) == ("chat.test", "xmpp.server.test")


def test_dns_over_tls_by_unbound_and_kdig(seen: Seen) -> None:
    conf = seen.folder / "unbound.conf"
    conf.write_text(
        "server:\n interface: 127.0.0.1@853\n interface: 127.0.0.1@8853\n tls-port: 853\n additional-tls-port: 8853\n"
        f' tls-service-key: "{seen.folder}/key.pem"\n tls-service-pem: "{seen.folder}/cert.pem"\n username: ""\n chroot: ""\n'
        ' pidfile: ""\n do-daemonize: no\n use-syslog: no\n local-zone: "test." static\n local-data: "a.good.test. A 192.0.2.7"\n'
    )
    seen.serve(853, "unbound", "-c", str(conf))
    until(partial(listening, seen.netns, 8853), "unbound listens on 8853")
    with seen.recorded():
        for port in ("853", "8853"):
            done = seen.netns.run("kdig", "@127.0.0.1", "-p", port, "+tls", "+tls-sni=dns.good.test", "+short", "a.good.test")
            assert "192.0.2.7" in done.stdout
        # The same bytes without the protocol's name, on its port and on another one.
        for port in ("853", "8853"):
            argv = ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-servername", "plain.good.test"]
            seen.netns.run(*argv, check=False, input="")
    said = [(facts["tls_sni"], facts.get("tls_alpn"), facts.get("dot")) for facts in seen.of("tls")]
    assert said == [
        ("dns.good.test", ("dot",), True), ("dns.good.test", ("dot",), True), ("plain.good.test", None, True),
        ("plain.good.test", None, None),
    ]  # fmt: skip


def test_stun_by_coturn(seen: Seen) -> None:
    seen.serve(
        3478,
        "turnserver",
        "-n",
        "--no-tls",
        "--no-dtls",
        "--no-cli",
        "-L",
        "127.0.0.1",
        "--pidfile",
        "/run/turn.pid",
        "--log-file",
        "stdout",
        "-b",
        str(seen.folder / "turn.db"),
    )
    with seen.recorded():
        seen.run("timeout", "60", "turnutils_stunclient", "127.0.0.1")
    assert seen.of("stun")


def test_wireguard_by_wireguard_go(seen: Seen) -> None:
    """Two ends in one namespace: the handshake goes over loopback, whatever is inside of it."""
    if not Path("/dev/net/tun").exists():
        pytest.skip("/dev/net/tun is missing, which wireguard-go needs")
    keys = {}
    for name in ("wga", "wgb"):
        private = seen.netns.run("wg", "genkey").stdout.strip()
        keys[name] = private, seen.netns.run("wg", "pubkey", input=private).stdout.strip()
        (seen.folder / name).write_text(private)
        seen.netns.start("wireguard-go", "-f", name, **QUIET)
        until(lambda: seen.netns.run("ip", "link", "show", name, check=False).returncode == 0, f"{name} is there")  # noqa: B023  # called before the next turn of the loop
    for name, other, number in (("wga", "wgb", 1), ("wgb", "wga", 2)):
        seen.netns.shell(
            f"wg set {name} listen-port 5182{number} private-key {seen.folder}/{name} peer {keys[other][1]} "
            f"allowed-ips 10.9.0.{3 - number}/32 endpoint 127.0.0.1:5182{3 - number}; ip link set {name} up"
        )
    seen.netns.shell("ip address add 10.9.0.1/32 dev wga; ip route add 10.9.0.2/32 dev wga")
    with seen.recorded():
        seen.netns.shell("echo hello | nc -u -w 1 10.9.0.2 9 || true")
        until(lambda: "latest handshake" in seen.netns.run("wg", "show", "wga").stdout, "the handshake is done")
    assert seen.of("wireguard")


_RDP_RULES = """
[queue.main]
num = 9
elements = ["dpi", "names"]
[element.names]
type = "policy"
default = "accept"
rule = [ { action = "drop", rdp_user = ["mallory"] } ]
[rules.app]
queue = "main"
hooks = ["output"]
tcp_ports = [3389]
role = "client"
"""


def test_rdp_by_rdesktop_and_xrdp(seen: Seen, tmp_path: Path) -> None:
    """The user's name and the hello behind it are read; a denied user's request does not arrive."""
    for program, package in (("rdesktop", "rdesktop"), ("xrdp", "xrdp"), ("Xvfb", "xvfb")):
        needs(program, package)
    netns, log = seen.netns, seen.folder / "xrdp.log"
    netns.shell(
        f"sed 's,^certificate=.*,certificate={seen.folder}/cert.pem,; s,^key_file=.*,key_file={seen.folder}/key.pem,;"
        f"s,^LogFile=.*,LogFile={log},; s,^EnableSyslog=.*,EnableSyslog=false,' /etc/xrdp/xrdp.ini >/run/xrdp.ini;"
        "mkdir -p /run/xrdp"
    )
    seen.serve(3389, "xrdp", "--nodaemon", "--config", "/run/xrdp.ini")
    screen = netns.start("Xvfb", "-displayfd", "1", "-nolisten", "tcp", stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert screen.stdout is not None
    display = screen.stdout.readline().strip().decode()

    def connect(user: str, seconds: int) -> None:
        own = f"HOME={seen.folder} DISPLAY=:{display}"
        netns.shell(f"echo yes | {own} timeout {seconds} rdesktop -u {user} 127.0.0.1:3389 >/dev/null 2>&1 || true")

    with seen.recorded():
        connect("ann", 3)
    (found,) = seen.of("rdp")
    assert (found["rdp_user"], found["tls_version"]) == ("ann", "1.3")
    agent = Agent(netns, tmp_path, _RDP_RULES).ready()
    for user, seconds in (("mallory", 2), ("bob", 3)):
        connect(user, seconds)
    said = log.read_text()
    # Of the three connections the server has read two requests. xrdp 0.9 says "received", 0.10 "accepted".
    connections = re.findall(r"connection (?:received|accepted) from", said)
    assert (len(connections), said.count("Security protocol")) == (3, 2), said
    assert agent.stop() == 0
