"""The Ansible role: hosts install from the repository over SSH, and get a configuration with a way back."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from booted.container import Container, Layer
from booted.nspawn import checked, until
from booted.packages import TOP, Packages
from booted.peers import status
from booted.repository import repository, served
from booted.roots import RELEASES, Release, cache, made_once, neighbours_root

ROLE = TOP / "packaging/ansible"
_GOOD = """
[queue.main]
num = 7
elements = ["log"]
[rules.web]
queue = "main"
tcp_ports = [{port}]
"""
# The agent does not repair what another program changes.
_UNCHECKED = '[agent]\ndrift_check = "0"\n' + _GOOD.format(port=8500)
_BAD = "[queue.main]\nnum = 70000\n"
# What it accepts is nothing, and SSH is what it is shown.
_CUTTING = """
[queue.main]
num = 7
elements = ["nothing"]
[element.nothing]
type = "policy"
default = "drop"
[rules.ssh]
queue = "main"
tcp_ports = [22]
hooks = ["input"]
"""
# Seconds until a configuration that is not confirmed is taken back: far more than a roll-out takes, less where one is cut off.
_WITHIN = 300
_CUT_WITHIN = 60


@pytest.fixture(scope="session")
def ansible() -> Path:
    """The programs that packaging/requirements-ansible.txt pins."""
    lock = TOP / "packaging/requirements-ansible.txt"
    name = f"ansible-{hashlib.sha256(lock.read_bytes() + sys.version.encode()).hexdigest()[:12]}"

    def make(folder: Path) -> None:
        checked([sys.executable, "-m", "venv", str(folder)])
        pip = [
            str(folder / "bin/python"),
            "-m",
            "pip",
            "--quiet",
            "--disable-pip-version-check",
            "--retries=10",
            "--timeout=60",
            "install",
        ]
        checked([*pip, "--require-hashes", "--requirement", str(lock)], timeout=1800)
        # Programs begin with the path of their Python, which is not that of the folder's final name yet.
        for program in (folder / "bin").glob("ansible*"):
            program.write_text(program.read_text().replace(str(folder), str(cache() / name), 1))

    return made_once(name, make) / "bin"


def with_programs(programs: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "ANSIBLE_NOCOLOR": "1",
        "NO_COLOR": "1",
        "LC_ALL": "C.UTF-8",
    }


def test_ansible_lint_finds_no_fault(ansible: Path, tmp_path: Path) -> None:
    checked(["cp", "-r", str(ROLE), str(tmp_path / "ansible")])
    command = [str(ansible / "ansible-lint"), "--offline", "--strict", "--profile=production"]
    done = subprocess.run(
        command, cwd=tmp_path / "ansible", env=with_programs(ansible), capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Passed: 0 failure(s), 0 warning(s)" in done.stdout + done.stderr


class Fleet:
    """Three hosts that can be reached over SSH, and one machine that runs Ansible."""

    def __init__(self, programs: Path, work: Path, hosts: Mapping[str, Container]) -> None:
        self.hosts = hosts
        self._programs, self._work = programs, work
        checked(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(work / "key")])
        lines = []
        for name, host in hosts.items():
            host.write("/root/.ssh/authorized_keys", (work / "key.pub").read_text())
            host.shell("chmod 700 /root/.ssh; mkdir -p /run/sshd; systemctl start ssh")
            enter = f"nsenter --target={host.pid} --net nc 127.0.0.1 22"
            lines.append(f"{name} ansible_ssh_extra_args='-o ProxyCommand=\"{enter}\"'\n")
        shared = f"ansible_user=root\nansible_ssh_private_key_file={work}/key\nansible_python_interpreter=/usr/bin/python3\n"
        (work / "inventory").write_text("".join(lines) + f"[all:vars]\n{shared}")

    def roll_out(self, texts: Mapping[str, str], batches: str | None = "[3]", within: int = _WITHIN) -> dict[str, dict[str, int]]:
        """Run the playbook with a configuration for each host. What its recapitulation says of each host.

        batches: how many hosts at a time; None: as the playbook says, one, a tenth, the rest.
        """
        for name, text in texts.items():
            (self._work / f"{name}.toml").write_text(text)
        variables = [
            f"nfq_agent_config={self._work}/{{{{ inventory_hostname }}}}.toml",
            "nfq_agent_repository=http://127.0.0.1:8000",
            f"nfq_agent_keyring={self._work}/out/nfq-agent-archive-keyring.gpg",
            f"nfq_agent_confirm_within={within}",
        ]
        command = [str(self._programs / "ansible-playbook"), "--inventory", str(self._work / "inventory")]
        for each in variables:
            command += ["--extra-vars", each]
        if batches is not None:
            command += ["--extra-vars", f'{{"nfq_agent_batches": {batches}}}']
        command.append(str(ROLE / "rollout.yml"))
        environment = {
            **with_programs(self._programs), "ANSIBLE_CONFIG": str(ROLE / "ansible.cfg"), "ANSIBLE_HOST_KEY_CHECKING": "False",
            "ANSIBLE_HOME": str(self._work / "home"), "ANSIBLE_LOCAL_TEMP": str(self._work / "temporary"),
        }  # fmt: skip
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, stdin=subprocess.DEVNULL)
        print(done.stdout, done.stderr)
        found = re.findall(r"^(\w+) +: (.*)$", done.stdout.partition("PLAY RECAP")[2], re.MULTILINE)
        return {name: {key: int(number) for key, number in re.findall(r"(\w+)=(\d+)", text)} for name, text in found}


@pytest.fixture
def fleet(release: Release, built: Packages, key: str, ansible: Path, tmp_path: Path) -> Iterator[Fleet]:
    out = repository(built, key, tmp_path)
    # What the package depends on is there: the hosts have no way to Debian's own repository.
    root = neighbours_root(release, "openssh-server", "python3-apt", "iptables", "kmod", "libnetfilter-queue1")
    with contextlib.ExitStack() as stack:
        hosts = {}
        for name in ("good", "bad", "cut"):
            layer = stack.enter_context(Layer(root))
            (layer.root / "etc/apt/sources.list").write_text("")
            hosts[name] = stack.enter_context(Container(layer))
            stack.enter_context(served(hosts[name], out))
        yield Fleet(ansible, tmp_path, hosts)


def ports(host: Container) -> set[str]:
    """The ports of the agent's rules."""
    return set(re.findall(r"--ports (\d+)", host.run("iptables-legacy", "--wait", "10", "-t", "mangle", "-S").stdout))


@contextlib.contextmanager
def flushed(host: Container, port: int) -> Iterator[None]:
    """Another program removes all rules of the table whenever those of this port are there. A new connection and the start of
    `doctor`, which comes behind both, take far longer than a look."""
    table = "iptables-legacy --wait 10 --table mangle"
    look = f"if {table} -S | grep -q -e '--ports {port}'; then {table} --flush; fi"
    flushing = host.start("sh", "-c", f"until test -e /run/over; do {look}; sleep 0.05; done")
    try:
        yield
    finally:
        host.write("/run/over", "")
        flushing.communicate(timeout=30)


# One release is enough: how packages install is tested on each.
@pytest.mark.parametrize("release", RELEASES[1:], ids=lambda release: release.name, indirect=True)
def test_a_roll_out(fleet: Fleet) -> None:
    first = {name: _GOOD.format(port=8000 + number) for number, name in enumerate(fleet.hosts, 1)}
    for name, each in fleet.roll_out(first).items():
        assert (each["failed"], each["unreachable"]) == (0, 0), name
        assert ports(fleet.hosts[name]) == set(re.findall(r"\d{4}", first[name]))
    # Once more: nothing changes.
    assert {name: each["changed"] for name, each in fleet.roll_out(first).items()} == dict.fromkeys(fleet.hosts, 0)

    # In batches: `doctor` says that rules of the first host are away; it gets its file back, and the others are left alone.
    with flushed(fleet.hosts["good"], 8500):
        said = fleet.roll_out({**first, "good": _UNCHECKED}, batches="[1]")
    assert (set(said), said["good"]["failed"], said["good"]["rescued"]) == ({"good"}, 1, 1)
    assert fleet.hosts["good"].shell("cat /etc/nfq-agent/nfq-agent.toml") == first["good"]
    until(lambda: ports(fleet.hosts["good"]) == {"8001"}, "the rules before it are back")

    second = {"good": _GOOD.format(port=9001), "bad": _BAD, "cut": _CUTTING}
    said = fleet.roll_out(second, within=_CUT_WITHIN)
    good, bad_host, cut = fleet.hosts.values()
    assert (said["good"]["failed"], said["good"]["unreachable"], ports(good)) == (0, 0, {"9001"})
    assert (said["bad"]["failed"], ports(bad_host)) == (1, {"8002"})
    assert bad_host.shell("cat /etc/nfq-agent/nfq-agent.toml") == first["bad"]
    # SSH was cut before the configuration could be confirmed: the agent puts the one before it back by its own clock.
    assert said["cut"]["unreachable"] == 1
    until(lambda: ports(cut) == {"8003"}, "the agent goes back", 2 * _CUT_WITHIN)
    until(lambda: "not confirmed in time" in cut.journal("--unit=nfq-agent"), "it says so")
    assert status(cut)["queues"][0]["uninspected"] == 0

    # All get a good one, also the host whose file is the refused one.
    third = {name: _GOOD.format(port=9000 + number) for number, name in enumerate(fleet.hosts, 1)}
    for name, each in fleet.roll_out(third, batches=None).items():
        assert (each["failed"], each["unreachable"]) == (0, 0), name
        assert ports(fleet.hosts[name]) == set(re.findall(r"\d{4}", third[name]))
        assert fleet.hosts[name].shell("ls /etc/nfq-agent").split() == ["conf.d", "elements", "nfq-agent.toml"]
        assert fleet.hosts[name].shell("ls /run/nfq-agent-before.toml 2>/dev/null || :") == ""
