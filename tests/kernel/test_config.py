"""The file format: what must work unchanged, and what must be refused, how, and with nothing changed."""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path

import pytest
from agent import COMMAND, saved
from namespace import Namespace

VERBS = ("check", "plan", "apply", "run")
QUEUE = "[queue.q]\nnum = 1\n"
RULE = '[rules.r]\nqueue = "q"\n'

NAMES = '[element.names]\ntype = "policy"\nrule = [ { action = "accept", tls_sni = "a.test" } ]\n'

# (what, file, key, a part of what must be said, a part of what is allowed)
BAD = [
    ("num-too-large", "[queue.q]\nnum = 70000\n", "queue.q.num", "70000", "at most 65535"),
    ("num-negative", "[queue.q]\nnum = -1\n", "queue.q.num", "-1", "at least 0"),
    ("balance-falls", '[queue.q]\nbalance = "5:3"\n', "queue.q.balance", "5:3", "FIRST below LAST"),
    ("shared-number", QUEUE + '[queue.p]\nbalance = "0:2"\n', "queue.p.balance", "1 is used by [queue.q]", "another number"),
    ("fanout-alone", QUEUE + "cpu_fanout = true\n", "queue.q", "cpu_fanout", "balance"),
    ("copy-none", QUEUE + 'copy = "none"\n', "queue.q.copy", "lose every packet", "packet, meta"),
    ("copy-range", QUEUE + "copy_range = 70000\n", "queue.q.copy_range", "70000", "65535"),
    ("gso-rewriter", QUEUE + 'gso = true\nelements = ["rewriting:Rewriter"]\n', "queue.q.gso", "rewrites packets", "gso = false"),
    ("unknown-key", QUEUE + RULE + "tcp_port = [1]\n", "rules.r.tcp_port", "did you mean 'tcp_ports'?)", "tcp_ports"),
    ("unknown-element", QUEUE + 'elements = ["lgo"]\n', "queue.q.elements", "did you mean 'log'?", "log"),
    ("unknown-type", QUEUE + 'elements = ["e"]\n[element.e]\ntype = "lgo"\n', "element.e", "unknown element 'lgo'", "log"),
    ("element-option", QUEUE + 'elements = ["log"]\n[element.log]\nper_secnd = 1\n', "element.log.per_secnd", "unknown key", ""),
    ("unknown-hook", QUEUE + RULE + 'all = true\nhooks = ["inptu"]\n', "rules.r.hooks", "inptu", "input"),
    ("unknown-table", QUEUE + RULE + 'all = true\ntable = "magnle"\n', "rules.r.table", "magnle", "mangle"),
    ("unknown-family", QUEUE + RULE + 'all = true\nfamily = "ipv4"\n', "rules.r.family", "ipv4", "inet6"),
    ("hook-not-in-table", QUEUE + RULE + 'all = true\ntable = "raw"\n', "rules.r", "raw has no hook input", "prerouting, output"),
    ("no-traffic", QUEUE + RULE + "tcp_ports = []\n", "rules.r", "takes no traffic", "tcp_syn"),
    ("port-0", QUEUE + RULE + "tcp_ports = [0]\n", "rules.r.tcp_ports", "0 is not a valid port", "1 to 65535"),
    ("port-65536", QUEUE + RULE + "udp_ports = [65536]\n", "rules.r.udp_ports", "65536 is not a valid port", "1 to 65535"),
    ("range-falls", QUEUE + RULE + 'tcp_ports = ["9000:8000"]\n', "rules.r.tcp_ports", "ends before it begins", "8000:8010"),
    ("owner-input", QUEUE + RULE + 'all = true\nowner = "root"\n', "rules.r", "hook input", "output"),
    ("owner-nobody", QUEUE + RULE + 'all = true\nhooks = ["output"]\nowner = "no-such"\n', "rules.r", "'no-such'", "existing"),
    ("interface", QUEUE + RULE + 'all = true\ninterface = "a-very-long-name"\n', "rules.r.interface", "a-very-long-name",
     "15 characters"),
    ("mark", QUEUE + RULE + 'all = true\nmark = "0x100/0xff"\n', "rules.r.mark", "outside its mask", "bits of the mask"),
    ("instance-long", '[agent]\ninstance = "thirteen-long"\n', "agent.instance", "thirteen-long", "1 to 12 small letters"),
    ("instance-characters", '[agent]\ninstance = "Prod"\n', "agent.instance", "Prod", "small letters, digits and hyphens"),
    ("rule-to-nowhere", "[rules.r]\nall = true\n", "rules.r", "one place", "queue = NAME"),
    ("rule-to-unknown-queue", QUEUE + '[rules.r]\nqueue = "p"\nall = true\n', "rules.r.queue", "no queue 'p'", "q"),
    ("rule-to-unknown-proxy", '[rules.r]\nproxy = "p"\nhooks = ["output"]\ntcp_ports = [1]\n', "rules.r.proxy", "'p'", "proxy.p"),
    ("proxy-without-listener", "[proxy.p]\nlisten = []\n", "proxy.p", "without a listener", "HOST:PORT"),
    (
        "listener-twice",
        '[proxy.a]\nlisten = ["127.0.0.1:15002"]\n[proxy.b]\nlisten = ["127.0.0.1:15002"]\n',
        "proxy.b.listen",
        "in use by [proxy.a]",
        "its own",
    ),
    ("facts-without-dpi", QUEUE + 'elements = ["names"]\n' + NAMES, "element.names.rule", "asks for tls_sni, which", '"dpi"'),
    ("dpi-behind", QUEUE + 'elements = ["names", "dpi"]\n' + NAMES, "element.names.rule", "finds (it comes later)", '"dpi"'),
    (
        "protocol-without-dpi", QUEUE + 'elements = ["names"]\n' + NAMES.replace("tls_sni", "protocol").replace("a.test", "ssh"),
        "element.names.rule", "asks for protocol", '"dpi" before',
    ),
    (
        "fact-of-nobody", QUEUE + 'elements = ["dpi", "names"]\n' + NAMES.replace("tls_sni =", "facts.country ="),
        "element.names.rule", "asks for country", "keeps_facts",
    ),
    ("not-toml", "[queue.q\nnum = 1\n", "not TOML", "line 1, column 9", "TOML"),
]  # fmt: skip


def check(folder: Path, text: str, verb: str = "check", namespace: Namespace | None = None) -> tuple[int, str]:
    """Exit code and standard error of a verb on a file with this text."""
    path = folder / "bad.toml"
    path.write_text(text)
    if namespace is None:
        raise AssertionError("verbs run in a namespace")
    here = Path(__file__).parent
    found = f"PYTHONPATH={here}:{here.parent / 'support'}"
    done = namespace.run("env", found, *COMMAND, verb, "--config", str(path), check=False)
    return done.returncode, done.stderr


@pytest.mark.kernel
@pytest.mark.parametrize(("text", "key", "said", "allowed"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_configuration_is_refused(netns: Namespace, tmp_path: Path, text: str, key: str, said: str, allowed: str) -> None:
    netns.run("iptables-legacy", "-w", "-t", "mangle", "-A", "INPUT", "-j", "MARK", "--set-mark", "1")
    before, users = saved(netns), netns.run("cat", "/etc/passwd").stdout
    for verb in VERBS:
        code, errors = check(tmp_path, text, verb, netns)
        assert code == 78, errors
        (line,) = errors.splitlines()
        assert line.startswith(f"{tmp_path}/bad.toml: {key}"), line
        what, _, rest = line.removeprefix(f"{tmp_path}/bad.toml: ").rpartition("; allowed: ")
        assert said in what, line
        assert allowed in rest, line
    assert saved(netns) == before
    assert netns.run("cat", "/etc/passwd").stdout == users


@pytest.mark.kernel
def test_every_fault_has_a_line_of_its_own(netns: Namespace, tmp_path: Path) -> None:
    code, errors = check(tmp_path, '[queue.q]\nnum = -1\ncopy = "none"\n[log]\nlevel = "loud"\n', "check", netns)
    assert code == 78
    assert len(errors.splitlines()) == 3
    assert "Traceback" not in errors


@pytest.mark.kernel
def test_a_listener_in_use_is_refused(netns: Namespace, tmp_path: Path) -> None:
    listener = netns.start("nc", "-l", "127.0.0.1", "15002")
    try:
        netns.shell("for i in $(seq 100); do ss -ltn | grep -q 15002 && exit 0; sleep 0.05; done; exit 1")
        for verb in VERBS:
            code, errors = check(tmp_path, '[proxy.p]\nlisten = ["127.0.0.1:15002"]\n', verb, netns)
            assert code == 78
            assert re.search(r"proxy\.p\.listen: 127\.0\.0\.1:15002 is in use by another process; allowed: ", errors)
    finally:
        listener.kill()


@pytest.mark.kernel
@pytest.mark.parametrize("verb", VERBS)
def test_what_cannot_be_read_is_refused(netns: Namespace, tmp_path: Path, verb: str) -> None:
    before = saved(netns)
    missing = tmp_path / "missing.toml"
    done = netns.run(*COMMAND, verb, "--config", str(missing), check=False)
    assert (done.returncode, done.stderr) == (
        78,
        f"{missing}: cannot be read: No such file or directory; allowed: a readable TOML file\n",
    )
    closed = tmp_path / "closed.toml"
    closed.write_text(QUEUE)
    closed.chmod(0)
    # Root without the capabilities that pass over a file's mode.
    powerless = ("setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override,-dac_read_search")
    done = netns.run(*powerless, *COMMAND, verb, "--config", str(closed), check=False)
    assert (done.returncode, done.stderr) == (78, f"{closed}: cannot be read: Permission denied; allowed: a readable TOML file\n")
    folder = tmp_path / "conf.d"
    folder.mkdir()
    folder.chmod(0o777)
    code, errors = check(tmp_path, QUEUE, verb, netns)
    assert (code, errors) == (
        78,
        f"{folder}: others may write to this folder; allowed: chown root {folder}; chmod go-w {folder}\n",
    )
    folder.chmod(0o755)
    for file in (tmp_path / "a.toml", folder / "b.toml"):
        file.write_text(QUEUE)
        file.chmod(0o664)
        done = netns.run(*COMMAND, verb, "--config", str(tmp_path / "a.toml"), check=False)
        assert (done.returncode, done.stderr) == (
            78,
            f"{file}: others may write to this file; allowed: chown root {file}; chmod go-w {file}\n",
        )
        file.chmod(0o644)
    assert saved(netns) == before


@pytest.mark.kernel
def test_each_way_for_others_to_write_a_file_is_refused(netns: Namespace, tmp_path: Path) -> None:
    """Another owner, an access list, a folder in which it can be replaced, and the same behind a link."""
    open_folder = tmp_path / "open"
    own = tmp_path / "own"
    for folder in (open_folder, own):
        folder.mkdir()
    for file in (open_folder / "a.toml", own / "of-another.toml", own / "listed.toml", own / "good.toml"):
        file.write_text(QUEUE)
    (own / "link.toml").symlink_to(open_folder / "a.toml")
    (own / "link-to-good.toml").symlink_to(own / "good.toml")
    os.chown(own / "of-another.toml", 65534, 0)
    # An entry that lets user 65534 write. The mask of such a list stands in the place of the group's rights (acl(5)).
    entries = ((1, 6, -1), (2, 6, 65534), (4, 4, -1), (16, 6, -1), (32, 4, -1))
    packed = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", kind, rights, who & 0xFFFFFFFF) for kind, rights, who in entries)
    os.setxattr(own / "listed.toml", "system.posix_acl_access", packed)
    open_folder.chmod(0o777)

    def refused(file: Path, what: Path, kind: str) -> None:
        done = netns.run(*COMMAND, "check", "--config", str(file), check=False)
        name = "" if kind == "file" else f"{file}: "
        assert (done.returncode, done.stderr) == (
            78,
            f"{name}{what}: others may write to this {kind}; allowed: chown root {what}; chmod go-w {what}\n",
        )

    refused(own / "of-another.toml", own / "of-another.toml", "file")
    refused(own / "listed.toml", own / "listed.toml", "file")
    refused(open_folder / "a.toml", open_folder, "folder")
    refused(own / "link.toml", open_folder, "folder")
    open_folder.chmod(0o775)
    refused(own / "link.toml", open_folder, "folder")
    # In a folder with the sticky bit no user replaces the file of another, but the folder's owner.
    open_folder.chmod(0o1777)
    for file in (own / "link.toml", own / "link-to-good.toml"):
        assert netns.run(*COMMAND, "check", "--config", str(file), check=False).returncode == 0
    os.chown(open_folder, 65534, 0)
    refused(own / "link.toml", open_folder, "folder")


@pytest.mark.kernel
def test_a_config_map_as_conf_d_is_read_and_its_changes_are_taken(netns: Namespace, tmp_path: Path) -> None:
    """As the kubelet mounts one: a folder of mode 0777, mounted read-only; files are links by way of another link."""
    folder, main = tmp_path / "conf.d", tmp_path / "a.toml"
    folder.mkdir()
    main.write_text(QUEUE)
    first = "mkdir ..1; echo '[queue.main]\nmode = \"monitor\"' >..1/b.toml; ln -s ..1 ..data; ln -s ..data/b.toml b.toml"
    netns.shell(f"mount -t tmpfs -o mode=0777 volume {folder}; cd {folder}; {first}")
    show = (*COMMAND, "check", "--config", str(main))
    assert netns.run(*show, check=False).returncode == 78
    netns.shell(f"mount -o remount,ro,mode=0777 {folder}")
    done = netns.run(*show, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    # A folder that is writable in a mount above it is refused as before.
    netns.shell(f"umount {folder}; mount --bind {tmp_path} {tmp_path}; chmod 0777 {folder}; mount -o remount,bind,ro {tmp_path}")
    assert netns.run(*show, check=False).returncode == 0
    netns.shell(
        f"umount {tmp_path}; mount --bind {tmp_path.parent} {tmp_path.parent}; mount -o remount,bind,ro {tmp_path.parent}"
    )
    done = netns.run(*show, check=False)
    assert (done.returncode, "others may write to this folder" in done.stderr) == (78, True)


@pytest.mark.kernel
def test_flags_win_over_the_file_and_none_is_refused(netns: Namespace, tmp_path: Path) -> None:
    done = netns.run(*COMMAND, "run", "--copymode", "none", check=False)
    assert done.returncode == 78
    assert "lose every packet" in done.stderr
    done = netns.run(*COMMAND, "run", "--queue-num", "70000", check=False)
    assert done.returncode == 78
    assert "command line: queue.main.num: 70000" in done.stderr
    assert netns.run(*COMMAND, "run", "--af-family", "ipx", check=False).returncode == 2
