"""Debian hosts for tests: a root made once and kept, a throw-away layer over it, and a real systemd booted in it.

Nothing is written to a kept root after it is made; what a test changes lives in memory and goes with its container.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from booted.nspawn import ENVIRONMENT, PATIENCE, PREFIX, checked, control_group, nspawn, remove_group, setenv, trees, until
from booted.roots import cache

# Seconds that packages are kept after their last use.
_KEEP = 86400.0
# System calls that a container may make beyond those that systemd-nspawn allows. bpf: systemd keeps IPAddressDeny= with it, and
# inline queues attach their programs. @keyring: Docker's containers have a session keyring of their own. landlock_*: a worker
# confines itself with them. pidfd_getfd: tests look at the sockets of a process.
_CALLS = "bpf @keyring landlock_create_ruleset landlock_add_rule landlock_restrict_self pidfd_getfd"


class Layer:
    """A throw-away layer over kept folders: `root` is what one sees, `changes` what was written."""

    def __init__(self, *lower: Path) -> None:
        """lower: the folders beneath, uppermost first."""
        self._folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
        self.root = self._folder / "root"
        self.changes = self._folder / "changes"
        checked(["mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", str(self._folder)])
        try:
            for folder in (self.root, self.changes, self._folder / "work"):
                folder.mkdir()
            beneath = ":".join(map(str, lower))
            options = f"lowerdir={beneath},upperdir={self.changes},workdir={self._folder}/work"
            checked(["mount", "-t", "overlay", "-o", options, "overlay", str(self.root)])
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
        until(lambda: subprocess.run(["umount", str(folder)], capture_output=True).returncode == 0, f"{folder} unmounted")

    def run(self, *argv: str, binds: Sequence[str] = (), environment: dict[str, str] | None = None, timeout: float = 900) -> str:
        """Run a command in the root without booting it; its output. There is no network."""
        extra = [f"--setenv={name}={value}" for name, value in (environment or {}).items()]
        with control_group() as enter:
            words = [*enter, *nspawn(self.root), "--private-network", "--pipe", *setenv(), *extra, *binds, *argv]
            return checked(words, timeout=timeout)

    def show(self, *argv: str, binds: Sequence[str] = (), environment: dict[str, str] | None = None) -> int:
        """Run a command in the root without booting it, with every capability and a kernel interface that it may write to, and
        without a network. What it prints is seen; its exit code."""
        extra = [f"--setenv={name}={value}" for name, value in (environment or {}).items()]
        with control_group() as enter:
            words = ["env", "SYSTEMD_NSPAWN_API_VFS_WRITABLE=1", *enter, *nspawn(self.root), "--private-network", "--pipe"]
            words += ["--capability=all", f"--system-call-filter={_CALLS}", *setenv(), *extra, *binds, *argv]
            return subprocess.run(words, stdin=subprocess.DEVNULL).returncode


def sweep() -> None:
    """Remove what killed test runs left (their pid is in the names), and packages of earlier sources."""
    for folder in cache().glob("*-packages-*"):
        if folder.is_dir() and time.time() - folder.stat().st_mtime > _KEEP:
            shutil.rmtree(folder, ignore_errors=True)
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        if not Path(f"/proc/{folder.name.removeprefix(PREFIX).partition('-')[0]}").exists():
            for each in (folder / "root", folder):
                while subprocess.run(["umount", str(each)], capture_output=True).returncode == 0:
                    pass
            with contextlib.suppress(OSError):
                folder.rmdir()
    for tree in trees():
        for group in tree.glob(f"{PREFIX}*"):
            if not Path(f"/proc/{group.name.removeprefix(PREFIX).partition('-')[0]}").exists():
                for inner, _, _ in os.walk(group, topdown=False):
                    remove_group(inner)


class Container:
    """A booted host: pid 1 is its own systemd, its network is its own loopback."""

    def __init__(self, layer: Layer, own_clock: bool = False) -> None:
        """own_clock: its monotonic clock begins with its boot, as that of a machine does."""
        self.root = layer.root
        self._console = self.root.parent / "console"
        self._stack = contextlib.ExitStack()
        enter = self._stack.enter_context(control_group())
        try:
            words = ["--boot", "--private-network", "--capability=all", f"--system-call-filter={_CALLS}"]
            words += ["--link-journal=no", "--console=pipe"]
            with self._console.open("wb") as console:
                self._nspawn = subprocess.Popen(
                    [*enter, *(_new_clock() if own_clock else ()), *nspawn(self.root), *words],
                    stdin=subprocess.DEVNULL,
                    stdout=console,
                    stderr=console,
                )
            self._stack.callback(self._end)
            self.pid = until(self._leader, "a first process in the container")
            until(self._booted, "systemd has booted")
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
        except (FileNotFoundError, ProcessLookupError):
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
        self._nspawn.wait(PATIENCE)

    def power_off(self) -> None:
        """Shut down in order, as a person would."""
        self.run("systemctl", "poweroff", check=False)
        self._nspawn.wait(PATIENCE)
        self._stack.close()

    def command(self, argv: Sequence[str]) -> list[str]:
        """The argv that runs `argv` inside."""
        words = [f"{name}={value}" for name, value in ENVIRONMENT.items()]
        return ["nsenter", f"--target={self.pid}", "--all", "--", "env", "-i", *words, *argv]

    def run(self, *argv: str, check: bool = True, timeout: float = PATIENCE, **options: Any) -> subprocess.CompletedProcess[str]:
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


def _new_clock() -> list[str]:
    since = int(time.clock_gettime(time.CLOCK_BOOTTIME)) - 1
    return ["unshare", "--time", f"--monotonic=-{since}", f"--boottime=-{since}"]
