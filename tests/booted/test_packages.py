"""The packages themselves, and their way onto a host and off it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from quic_flights import quic_flight

from booted.container import Container, Layer
from booted.nspawn import until
from booted.packages import TOP, Installed, Packages, packages
from booted.peers import exchange, foreign_rules, main_pid, ours, saved, steady
from booted.roots import Release, base_root, build_root


@pytest.fixture
def workshop(release: Release, built: Packages) -> Iterator[Layer]:
    """A root with the tools that look at packages, and the packages in /srv."""
    with Layer(build_root(release)) as layer:
        for package in (built.deb, built.rpm):
            shutil.copy(package, layer.root / "srv")
        shutil.copy(Path(__file__).parent.parent.parent / "packaging/rpm/rpmlintrc", layer.root / "srv")
        yield layer


def test_building_twice_gives_the_same_bytes(release: Release, built: Packages) -> None:
    again = packages(release, again=built)
    assert built.deb.name == again.deb.name
    assert built.deb.read_bytes() == again.deb.read_bytes()
    assert built.rpm.name == again.rpm.name
    assert built.rpm.read_bytes() == again.rpm.read_bytes()


def test_lintian_finds_no_fault(workshop: Layer) -> None:
    done = workshop.run("sh", "-c", "lintian --allow-root --fail-on none --tag-display-limit 0 /srv/*.deb")
    assert re.findall(r"^[EW]: .*$", done, re.MULTILINE) == []


def test_rpmlint_finds_no_fault(workshop: Layer, release: Release) -> None:
    option = "--file" if release.name == "bookworm" else "--rpmlintrc"
    done = workshop.run("sh", "-c", f"rpmlint {option} /srv/rpmlintrc /srv/*.rpm 2>&1; true")
    assert "1 packages" in done
    assert re.findall(r"^.* E: .*$", done, re.MULTILINE) == []


def test_the_dependencies_are_those_of_the_release(workshop: Layer, release: Release) -> None:
    fields = workshop.run("sh", "-c", "dpkg-deb --field /srv/*.deb Depends")
    major, minor = release.python.split(".")
    for wanted in (f"python3 (<< {major}.{int(minor) + 1})", f"python3 (>= {release.python}~)", "libnetfilter-queue1", "iptables",
                   "libip4tc2", "libxtables12"):  # fmt: skip
        assert wanted in fields
    for bundled in ("pydantic", "typer", "rich"):
        assert bundled not in fields
    requires = workshop.run("sh", "-c", "rpm --query --package --requires /srv/*.rpm").splitlines()
    for wanted in (f"python(abi) = {release.python}", "libnetfilter_queue.so.1()(64bit)", "libip4tc.so.2()(64bit)", "systemd"):
        assert wanted in requires


def test_the_package_is_small(built: Packages) -> None:
    # Of it pydantic's compiled core alone is 1.35 MB; CONTRIBUTING.md has the other parts.
    assert built.deb.stat().st_size < 2_500_000


def test_documentation_and_samples_are_in_the_package(host: Container) -> None:
    folder = "/usr/share/doc/nfq-agent"
    for page in (TOP / "docs").glob("*.md"):
        text = host.shell(f"cat {folder}/docs/{page.name}")
        assert len(text.splitlines()) > 10, page.name
    assert host.shell(f"cat {folder}/docs/changelog.md") == (TOP / "CHANGELOG.md").read_text()
    assert host.shell(f"cat {folder}/examples/rewriter.py") == (TOP / "examples/rewriter.py").read_text()
    # The one that names a user of its host.
    host.run("useradd", "--system", "payments")
    configs = sorted((TOP / "tests/configs").glob("*.toml"))
    assert configs
    for config in configs:
        host.run("nfq-agent", "check", "--config", f"{folder}/examples/configs/{config.name}")


def test_help_of_every_verb_from_the_package(host: Container) -> None:
    shown = host.run("nfq-agent", "--help").stdout
    verbs = re.findall(r"^│ ([a-z][a-z-]*) ", shown, re.MULTILINE)
    assert {"demo", "top", "metrics", "export"} <= set(verbs)
    done = host.shell("for verb in " + " ".join(verbs) + "; do nfq-agent $verb --help; done")
    assert done.count("Usage: nfq-agent") == len(verbs)


_QUIC = """
[queue.web]
num = 7
elements = ["dpi", "names"]
[element.names]
type = "policy"
default = "accept"
rule = [{ action = "drop", tls_sni = "quic.example.org" }]
[rules.web]
queue = "web"
udp_ports = [443]
hooks = ["output"]
"""


def test_quic_has_a_name_beside_the_suggested_package(with_cryptography: tuple[Path, ...]) -> None:
    send = "import socket, sys; socket.socket(type=socket.SOCK_DGRAM).sendto(bytes.fromhex(sys.argv[1]), ('127.0.0.1', 443))"
    with Layer(*with_cryptography) as layer, Container(layer) as host:
        host.write("/etc/nfq-agent/nfq-agent.toml", _QUIC)
        host.run("systemctl", "restart", "nfq-agent")
        host.run("python3", "-c", send, quic_flight("quic.example.org").hex())
        until(lambda: "quic.example.org" in host.journal("--unit=nfq-agent", "--output=cat"), "the dropped name is in the log")
        assert "stay without a name" not in host.journal("--unit=nfq-agent")


def higher(host: Container, version: str, work: Path) -> None:
    """Make the .deb on the host one of a higher version, with another default in its configuration."""
    host.shell(
        f"""
        cd /root
        dpkg-deb --raw-extract nfq-agent_*.deb new
        sed -i 's/^Version: .*/Version: {version}/' new/DEBIAN/control
        sed -i 's/max_len = 4096 /max_len = 8192 /' new/etc/nfq-agent/nfq-agent.toml
        dpkg-deb -Zgzip -z1 --build --root-owner-group new higher.deb
        """,
        timeout=120,
    )


def test_upgrade_while_traffic_flows(host: Container, tmp_path: Path) -> None:
    host.shell('sed -i \'s/^level = "info"/level = "debug"/\' /etc/nfq-agent/nfq-agent.toml')
    host.write("/etc/nfq-agent/second.toml", "[queue.main]\nnum = 7\n[rules.app]\nqueue = 'main'\ntcp_ports = [14000]\n")
    host.run("systemctl", "restart", "nfq-agent")
    host.run("systemctl", "enable", "--now", "nfq-agent@second")
    mine = host.shell("cat /etc/nfq-agent/nfq-agent.toml")
    with_agent = saved(host)
    pids = main_pid(host), main_pid(host, "nfq-agent@second")
    higher(host, "9.0.0~test", tmp_path)
    with steady(host) as connection:
        done = host.run("dpkg", "--force-confdef", "--force-confold", "--install", "/root/higher.deb")
    assert connection.rounds > 50
    assert "9.0.0~test" in host.run("dpkg-query", "--show", "nfq-agent").stdout, done.stdout
    assert host.shell("cat /etc/nfq-agent/nfq-agent.toml") == mine
    assert host.show("nfq-agent", "ActiveState") == "active"
    assert host.show("nfq-agent@second", "ActiveState") == "active"
    assert main_pid(host) not in (0, pids[0])
    assert main_pid(host, "nfq-agent@second") not in (0, pids[1])
    assert saved(host) == with_agent
    exchange(host)


def test_an_upgrade_keeps_a_service_that_was_switched_off(host: Container, tmp_path: Path) -> None:
    host.run("systemctl", "disable", "--now", "nfq-agent")
    higher(host, "9.0.0~test", tmp_path)
    host.run("dpkg", "--install", "/root/higher.deb")
    assert host.run("systemctl", "is-enabled", "nfq-agent", check=False).stdout == "disabled\n"
    assert host.show("nfq-agent", "ActiveState") == "inactive"
    assert ours(host) == []


_LEFT = "find / -xdev ( -path /proc -o -path /sys -o -path /root -o -path /var/log ) -prune -o -name *nfq*agent* -print"


def test_remove_and_purge(host: Container) -> None:
    host.run("systemctl", "stop", "nfq-agent")
    foreign_rules(host)
    before = saved(host)
    host.run("systemctl", "start", "nfq-agent")
    host.write("/etc/nfq-agent/second.toml", "[queue.main]\nnum = 7\n[rules.app]\nqueue = 'main'\ntcp_ports = [14000]\n")
    host.run("systemctl", "enable", "--now", "nfq-agent@second")
    # Rules without a service: they were applied by hand.
    host.write("/etc/nfq-agent/third.toml", "[queue.main]\nnum = 8\n[rules.app]\nqueue = 'main'\ntcp_ports = [15000]\n")
    host.run("nfq-agent", "apply", "--config", "/etc/nfq-agent/third.toml", "--instance", "third")
    assert len([line for line in ours(host) if "--queue-num 8 " in line]) == 4

    host.run("apt-get", "remove", "-y", "nfq-agent")
    assert saved(host) == before
    assert "nfq-agent" not in host.shell("cat /proc/[0-9]*/cmdline | tr '\\0' ' '").replace("cat /proc", "")
    assert host.run("test", "-e", "/usr/lib/nfq-agent", check=False).returncode != 0
    assert host.run("test", "-e", "/etc/nfq-agent/nfq-agent.toml").returncode == 0

    host.run("apt-get", "purge", "-y", "nfq-agent")
    left = host.run(*_LEFT.split()).stdout.split()
    assert left == []
    assert host.run("systemctl", "list-units", "--all", "--plain", "--no-legend", "nfq-agent*").stdout == ""
    assert host.run("getent", "passwd", "proxyuser").returncode == 0


@pytest.fixture
def rpm_host(release: Release, built: Packages) -> Iterator[Container]:
    """A booted host with rpm and what the .rpm needs. It is a Debian: the database is empty, the scripts are run nevertheless."""
    with Layer(build_root(release)) as layer:
        shutil.copy(built.rpm, layer.root / "root")
        for archive in (base_root(release) / "var/cache/apt/archives").glob("*.deb"):
            shutil.copy(archive, layer.root / "var/cache/apt/archives")
        layer.run("apt-get", "install", "-y", "iptables", "kmod")
        with Container(layer) as container:
            yield container


def test_the_rpm(rpm_host: Container, built: Packages) -> None:
    host = rpm_host
    before = saved(host)
    host.run("rpm", "--initdb")
    host.shell(f"rpm --install --nodeps /root/{built.rpm.name}")
    # Nothing is started by an .rpm, and enabled as the presets say; Debian's say yes to all.
    assert host.show("nfq-agent", "ActiveState") == "inactive"
    assert host.run("systemctl", "is-enabled", "nfq-agent").stdout == "enabled\n"
    assert host.run("rpm", "--verify", "--nodeps", "nfq-agent").stdout == ""
    assert (
        host.run("systemd-analyze", "verify", "--man=no", "nfq-agent.service", "nfq-agent@x.service", check=False).returncode == 0
    )
    host.run("systemctl", "start", "nfq-agent")
    exchange(host)
    assert len([line for line in ours(host) if "--queue-num 100" in line]) == 4

    # A reinstallation is an upgrade to rpm's scripts: what runs is restarted, an edited configuration is kept.
    host.shell("echo '# mine' >>/etc/nfq-agent/nfq-agent.toml")
    pid = main_pid(host)
    host.shell(f"rpm --upgrade --force --nodeps /root/{built.rpm.name}")
    until(lambda: main_pid(host) not in (0, pid), "the service was restarted")
    assert host.shell("tail -n 1 /etc/nfq-agent/nfq-agent.toml") == "# mine\n"

    host.run("rpm", "--erase", "nfq-agent")
    assert ours(host) == []
    assert set(before.splitlines()) <= set(saved(host).splitlines())
    assert host.run("getent", "passwd", "proxyuser").returncode == 0
    left = set(host.run(*_LEFT.split()).stdout.split())
    assert left == {"/etc/nfq-agent", "/etc/nfq-agent/nfq-agent.toml.rpmsave"}


def test_the_installed_tree_has_no_trace_of_the_build(installed: Installed, workshop: Layer) -> None:
    listed = workshop.run(
        "sh", "-c", "dpkg-deb --extract /srv/*.deb /tmp/x && grep -rlE '/tmp/tmp|/srv/nfq-agent|pip-' /tmp/x || true"
    )
    assert listed == ""
