"""Debian hosts for tests: a root made once and kept, a throw-away layer over it, and a real systemd booted in it.

Nothing is written to a kept root after it is made; what a test changes lives in memory and goes with its container.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

_PREFIX = "nfq-agent-test-"
# Seconds that packages are kept after their last use.
_KEEP = 86400.0
_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "DEBIAN_FRONTEND": "noninteractive",
}
# System calls that a container may make beyond those that systemd-nspawn allows. bpf: systemd keeps IPAddressDeny= with it, and
# inline queues attach their programs. @keyring: Docker's containers have a session keyring of their own. landlock_*: a worker
# confines itself with them.
_CALLS = "bpf @keyring landlock_create_ruleset landlock_add_rule landlock_restrict_self"
# What a test's host has beside a minimal Debian, and what the package depends on: that is downloaded only, so that
# installing it shows whether its dependencies are right.
_HOST = ("iproute2", "systemd-sysv", "ca-certificates")
_DEPENDENCIES = ("iptables", "kmod", "libnetfilter-queue1", "python3")
_BUILD = (
    "build-essential", "clang", "debhelper", "dh-python", "libnetfilter-queue-dev", "lintian", "man-db", "pkgconf",
    "python3-dev", "python3-venv", "rpm", "rpmlint",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Release:
    """A Debian release. id: as in its os-release."""

    name: str
    id: str
    python: str


RELEASES = (Release("bookworm", "debian12", "3.11"), Release("trixie", "debian13", "3.13"))


def cache() -> Path:
    """The folder of all that is made once."""
    folder = Path(os.environ.get("NFQ_AGENT_TEST_CACHE", "/var/cache/nfq-agent-tests"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def made_once(name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache, filled by `make` if it is not there. Another run that needs it waits."""
    folder = cache() / name
    with (cache() / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            partial = cache() / f"{name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                make(partial)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            partial.rename(folder)
    os.utime(folder)
    return folder


def base_root(release: Release) -> Path:
    """A minimal host of the release, with the packages that nfq-agent depends on waiting in apt's cache."""
    wanted = _hash("base 1", *_HOST, *_DEPENDENCIES)

    def make(root: Path) -> None:
        command = ["debootstrap", "--variant=minbase", f"--include={','.join(_HOST)}", release.name, str(root), _mirror()]
        _checked(command, timeout=600)
        with _apt(root):
            _apt_get(root, "update")
            _apt_get(root, "install", "--download-only", *_DEPENDENCIES)

    return made_once(f"{release.name}-base-{wanted}", make)


def build_root(release: Release) -> Path:
    """A host of the release with what building and checking packages takes."""
    base = base_root(release)
    wanted = _hash("build 1", base.name, *_BUILD)

    def make(root: Path) -> None:
        _checked(["cp", "-a", "--reflink=auto", f"{base}/.", str(root)])
        with _apt(root):
            _apt_get(root, "install", "--no-install-recommends", *_BUILD)
            _apt_get(root, "clean")

    return made_once(f"{release.name}-build-{wanted}", make)


def neighbours_root(release: Release, *neighbours: str) -> Path:
    """A host of the release with packages of programs that write rules of their own. None of their services is enabled."""
    base = base_root(release)
    wanted = _hash("neighbours 1", base.name, *neighbours)

    def make(root: Path) -> None:
        _checked(["cp", "-a", "--reflink=auto", f"{base}/.", str(root)])
        preset = root / "etc/systemd/system-preset/00-none.preset"
        preset.parent.mkdir(parents=True, exist_ok=True)
        preset.write_text("disable *\n")
        with _apt(root):
            _apt_get(root, "install", "--no-install-recommends", *neighbours)
            _apt_get(root, "install", "--download-only", *_DEPENDENCIES)
        preset.unlink()

    return made_once(f"{release.name}-neighbours-{wanted}", make)


def _hash(*words: str) -> str:
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:12]


def _checked(command: Sequence[str], timeout: float = 300, **options: Any) -> str:
    done: subprocess.CompletedProcess[str] = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL, **options
    )
    if done.returncode != 0:
        raise AssertionError(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    return done.stdout


def _mirror() -> str:
    """Where this machine gets Debian from, else Debian's own address."""
    targets = _checked(["apt-get", "indextargets", "--format", "$(LABEL)|$(TARGET_OF)|$(REPO_URI)", "Created-By: Packages"])
    for line in targets.splitlines():
        label, kind, address = line.split("|")
        if (label, kind) == ("Debian", "deb"):
            return address
    return "http://deb.debian.org/debian"


@contextlib.contextmanager
def _apt(root: Path) -> Iterator[None]:
    """This machine's way to the mirror (proxies and the like), lent to a root while it is made."""
    settings = root / "etc/apt/apt.conf.d/90lent"
    lines = _checked(["apt-config", "dump"]).splitlines()
    settings.write_text("".join(f"{line}\n" for line in lines if line.startswith("Acquire::")))
    resolver = root / "etc/resolv.conf"
    resolver.unlink(missing_ok=True)
    shutil.copy("/etc/resolv.conf", resolver)
    try:
        yield
    finally:
        settings.unlink()
        resolver.write_text("")


def _apt_get(root: Path, *words: str) -> None:
    with _control_group() as enter:
        _checked([*enter, *_nspawn(root), "--pipe", *_setenv(), "apt-get", "-qq", "-y", *words], timeout=900)


def _nspawn(root: Path) -> list[str]:
    # Without --register and with --keep-unit no running systemd is needed on this machine. The machine's name is that of a
    # folder under /run/systemd/nspawn, so no two may have the same.
    words = ["systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--resolv-conf=off", "--hostname=testhost"]
    return [*words, f"--machine={_PREFIX}{os.getpid()}-{time.monotonic_ns()}", f"--directory={root}"]


def _setenv() -> list[str]:
    return [f"--setenv={name}={value}" for name, value in _ENVIRONMENT.items()]


@contextlib.contextmanager
def _control_group() -> Iterator[list[str]]:
    """A control group of its own, as the words that enter it. Two containers in one group collide."""
    name = f"{_PREFIX}{os.getpid()}-{time.monotonic_ns()}"
    groups = [tree / name for tree in _trees()]
    for group in groups:
        group.mkdir()
    try:
        script = "".join(f"echo $$ >{group}/cgroup.procs; " for group in groups)
        # Whoever ends this process ends the container: systemd-nspawn sees to its own children in the same way.
        yield [
            "setpriv",
            "--pdeathsig=KILL",
            "env",
            "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1",
            "sh",
            "-ec",
            f'{script}exec "$@"',
            "sh",
        ]
    finally:
        for group in groups:
            for folder, _, _ in os.walk(group, topdown=False):
                # A process that is just ending keeps its group busy for a moment.
                until(partial(_rmdir, folder), f"{folder} empty", 5)


def _rmdir(folder: str) -> bool:
    try:
        os.rmdir(folder)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def until(condition: Callable[[], Any], what: str, seconds: float = 15) -> Any:
    """What `condition` returns as soon as it is true; an AssertionError that says `what` did not come in time."""
    deadline = time.monotonic() + seconds
    while True:
        if found := condition():
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s: {what}")
        time.sleep(0.05)


class Layer:
    """A throw-away layer over kept folders: `root` is what one sees, `changes` what was written."""

    def __init__(self, *lower: Path) -> None:
        """lower: the folders beneath, uppermost first."""
        self._folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
        self.root = self._folder / "root"
        self.changes = self._folder / "changes"
        _checked(["mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", str(self._folder)])
        try:
            for folder in (self.root, self.changes, self._folder / "work"):
                folder.mkdir()
            beneath = ":".join(map(str, lower))
            options = f"lowerdir={beneath},upperdir={self.changes},workdir={self._folder}/work"
            _checked(["mount", "-t", "overlay", "-o", options, "overlay", str(self.root)])
        except BaseException:
            self._unmount(self._folder)
            self._folder.rmdir()
            raise

    def __enter__(self) -> Layer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def detach(self) -> None:
        """Take the view away and keep the changes, so that they can be a layer beneath another."""
        self._unmount(self.root)

    def close(self) -> None:
        """Forget everything."""
        if os.path.ismount(self.root):
            self._unmount(self.root)
        self._unmount(self._folder)
        self._folder.rmdir()

    @staticmethod
    def _unmount(folder: Path) -> None:
        until(lambda: subprocess.run(["umount", str(folder)], capture_output=True).returncode == 0, f"{folder} unmounted", 10)

    def run(self, *argv: str, binds: Sequence[str] = (), environment: dict[str, str] | None = None, timeout: float = 600) -> str:
        """Run a command in the root without booting it; its output. There is no network."""
        extra = [f"--setenv={name}={value}" for name, value in (environment or {}).items()]
        with _control_group() as enter:
            words = [*enter, *_nspawn(self.root), "--private-network", "--pipe", *_setenv(), *extra, *binds, *argv]
            return _checked(words, timeout=timeout)

    def show(self, *argv: str, binds: Sequence[str] = (), environment: dict[str, str] | None = None) -> int:
        """Run a command in the root without booting it, with every capability and a kernel interface that it may write to. There
        is no network. What it prints is seen; its exit code."""
        extra = [f"--setenv={name}={value}" for name, value in (environment or {}).items()]
        with _control_group() as enter:
            words = ["env", "SYSTEMD_NSPAWN_API_VFS_WRITABLE=1", *enter, *_nspawn(self.root), "--private-network", "--pipe"]
            words += ["--capability=all", f"--system-call-filter={_CALLS}", *_setenv(), *extra, *binds, *argv]
            return subprocess.run(words, stdin=subprocess.DEVNULL).returncode


def sweep() -> None:
    """Take away what test runs left that were killed (their number is in the names), and packages of sources of old."""
    for folder in cache().glob("*-packages-*"):
        if folder.is_dir() and time.time() - folder.stat().st_mtime > _KEEP:
            shutil.rmtree(folder, ignore_errors=True)
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        if not Path(f"/proc/{folder.name.removeprefix(_PREFIX).partition('-')[0]}").exists():
            for each in (folder / "root", folder):
                while subprocess.run(["umount", str(each)], capture_output=True).returncode == 0:
                    pass
            with contextlib.suppress(OSError):
                folder.rmdir()
    for tree in _trees():
        for group in tree.glob(f"{_PREFIX}*"):
            if not Path(f"/proc/{group.name.removeprefix(_PREFIX).partition('-')[0]}").exists():
                for inner, _, _ in os.walk(group, topdown=False):
                    _rmdir(inner)


def _trees() -> list[Path]:
    """Where control groups are made: the unified tree, and beside it systemd's own where the machine is a hybrid."""
    trees = [path for path in map(Path, ("/sys/fs/cgroup/unified", "/sys/fs/cgroup/systemd")) if path.is_dir()]
    return trees or [Path("/sys/fs/cgroup")]


class Container:
    """A booted host: pid 1 is its own systemd, its network is its own loopback."""

    def __init__(self, layer: Layer) -> None:
        self.root = layer.root
        self._console = self.root.parent / "console"
        self._stack = contextlib.ExitStack()
        enter = self._stack.enter_context(_control_group())
        try:
            words = ["--boot", "--private-network", "--capability=all", f"--system-call-filter={_CALLS}"]
            words += ["--link-journal=no", "--console=pipe"]
            with self._console.open("wb") as console:
                self._nspawn = subprocess.Popen(
                    [*enter, *_nspawn(self.root), *words], stdin=subprocess.DEVNULL, stdout=console, stderr=console
                )
            self._stack.callback(self._end)
            self.pid = until(self._leader, "a first process in the container")
            until(self._booted, "systemd has booted", 60)
        except BaseException:
            print(self._console.read_text(errors="replace"))
            self._stack.close()
            raise

    def _leader(self) -> int:
        if self._nspawn.poll() is not None:
            raise AssertionError(f"systemd-nspawn ended with {self._nspawn.returncode}")
        # env and sh have given way to systemd-nspawn, whose only child is the container's first process.
        try:
            children = Path(f"/proc/{self._nspawn.pid}/task/{self._nspawn.pid}/children").read_text().split()
            return int(children[0]) if children and Path(f"/proc/{children[0]}/comm").read_text() == "systemd\n" else 0
        except FileNotFoundError:
            return 0

    def _booted(self) -> bool:
        done = self.run("systemctl", "is-system-running", check=False)
        return done.stdout.strip() in ("running", "degraded")

    def __enter__(self) -> Container:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Pull the plug."""
        self._stack.close()

    def _end(self) -> None:
        if self._nspawn.poll() is None:
            pid = self._leader()
            if pid:
                os.kill(pid, signal.SIGKILL)
            else:
                self._nspawn.kill()
        self._nspawn.wait(20)

    def power_off(self) -> None:
        """Shut down in order, as a person would."""
        self.run("systemctl", "poweroff", check=False)
        self._nspawn.wait(60)
        self._stack.close()

    def command(self, argv: Sequence[str]) -> list[str]:
        """The argv that runs `argv` inside."""
        words = [f"{name}={value}" for name, value in _ENVIRONMENT.items()]
        return ["nsenter", f"--target={self.pid}", "--all", "--", "env", "-i", *words, *argv]

    def run(self, *argv: str, check: bool = True, timeout: float = 60, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command inside to its end, with its output captured; a failure shows it."""
        options.setdefault("stdin", None if "input" in options else subprocess.DEVNULL)
        if "input" in options:
            del options["stdin"]
        done = subprocess.run(self.command(argv), capture_output=True, text=True, timeout=timeout, **options)
        if check and done.returncode != 0:
            raise AssertionError(f"{' '.join(argv)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def start(self, *argv: str, **options: Any) -> subprocess.Popen[str]:
        """Start a command inside. It ends with the container at the latest."""
        return subprocess.Popen(self.command(argv), **{"text": True, "stdin": subprocess.DEVNULL, **options})

    def shell(self, script: str, **options: Any) -> str:
        """The output of a shell script run inside."""
        return self.run("sh", "-ec", script, **options).stdout

    def write(self, path: str, text: str) -> None:
        """Write a file inside."""
        self.run("sh", "-ec", 'mkdir -p "$(dirname "$1")"; cat >"$1"', "sh", path, input=text)

    def show(self, unit: str, what: str) -> str:
        """A property of a unit, as systemctl shows it."""
        return self.run("systemctl", "show", "--value", f"--property={what}", unit).stdout.strip()

    def journal(self, *words: str) -> str:
        """What the journal has; journald is asked to write down everything first."""
        self.run("journalctl", "--sync", check=False)
        return self.run("journalctl", "--no-pager", *words).stdout
