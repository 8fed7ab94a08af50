"""The namespaces that tests run in: nothing of the host is changed from inside one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from namespace import Namespace

pytestmark = pytest.mark.kernel
IN_ONE = f"import sys; sys.path[:0] = {sys.path!r}\nfrom namespace import Namespace\nwith Namespace() as inner:\n    "


def test_a_chroot_is_refused(tmp_path: Path) -> None:
    """There a test's `useradd` met the host itself."""
    script = f'mount --make-rprivate /; mount --rbind / {tmp_path}; exec chroot {tmp_path} {sys.executable} -c "$0"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-ec", script, IN_ONE + "inner.run('true')"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0
    assert "RuntimeError: this is a chroot" in done.stderr


def test_a_system_user_of_the_host_is_not_there(netns: Namespace) -> None:
    """The tests make it, and say what comes of one that differs."""
    netns.run("useradd", "--system", "--user-group", "proxyuser")
    done = netns.run(sys.executable, "-c", IN_ONE + "print(inner.run('getent', 'passwd', 'proxyuser', check=False).returncode)")
    assert done.stdout == "2\n"
    assert netns.run("id", "-u", "proxyuser").stdout.strip().isdecimal()
