"""`nfq-agent demo` where it is less at home than on a host: in a chroot, and in a container that allows nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from agent import COMMAND

pytestmark = pytest.mark.kernel

# A chroot whose / is not a mount, beneath a mount that passes on what is mounted in it; and what is mounted there afterwards.
CHROOT = """
set -e
mount -t tmpfs tmpfs {folder}
mount --make-shared {folder}
root={folder}/root
mkdir -p $root/proc $root/run $root/tmp $root/usr $root/dev
cp -a /etc $root/etc
for name in bin sbin lib lib64; do [ ! -e /$name ] || ln -s usr/$name $root/$name; done
mount --rbind /usr $root/usr
mount --rbind /dev $root/dev
for path in {paths}; do mkdir -p $root$path; mount --bind $path $root$path; done
{proc}
# Those beneath the root alone: others go when another process removes their folder.
before=$(grep -c " $root" /proc/self/mountinfo)
code=0
chroot $root {command} demo || code=$?
[ "$(grep -c " $root" /proc/self/mountinfo)" = "$before" ] || echo "mounts are left"
exit $code
"""


def in_chroot(folder: Path, proc: str) -> subprocess.CompletedProcess[str]:
    paths = " ".join(sorted({str(Path(sys.prefix).parent), sys.prefix}))
    script = CHROOT.format(folder=folder, paths=paths, proc=proc, command=" ".join(COMMAND))
    return subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "sh", "-c", script],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
    )


def test_in_a_chroot(tmp_path: Path) -> None:
    done = in_chroot(tmp_path, "mount -t proc proc $root/proc")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Every step passed" in done.stdout
    assert "mounts are left" not in done.stdout


def test_in_a_chroot_without_proc_it_says_what_to_do(tmp_path: Path) -> None:
    done = in_chroot(tmp_path, "")
    assert done.returncode == 1
    assert "mount -t proc proc /proc" in done.stderr


@pytest.mark.parametrize("lacking", ["sys_admin", "net_admin", "net_raw"])
def test_in_a_container_without_the_rights_it_names_them(lacking: str) -> None:
    done = subprocess.run(
        ["setpriv", f"--inh-caps=-{lacking}", f"--bounding-set=-{lacking}", *COMMAND, "demo"],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
    )
    assert done.returncode == 1
    assert f"CAP_{lacking.upper()}" in done.stderr
