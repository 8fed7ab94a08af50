"""Runs tests in a root of another Debian release: `tests/run --in RELEASE [what tests/run takes]`.

The clone stands in a folder of mode 0700, and the user proxyuser exists already. The first run downloads; the next ones do not.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(TOP / "tests"))

from booted.container import Layer, sweep  # noqa: E402  # found by the line above
from booted.packages import git, wheels  # noqa: E402  # found by the path above
from booted.roots import RELEASES, neighbours_root, unpacked  # noqa: E402  # found by the line above

_CLONE = "srv/clone/nfq-agent"


def system_packages(*lists: str) -> list[str]:
    """What packaging/setup and tests/run install or unpack: the packages of these lists."""
    script = f". packaging/setup.sh; echo {' '.join(f'${each}' for each in lists)}"
    return subprocess.run(["sh", "-ec", script], cwd=TOP, check=True, capture_output=True, text=True).stdout.split()


def main(name: str, *options: str) -> int:
    """The exit code of tests/run in there."""
    release = next((each for each in RELEASES if each.name == name), None)
    if release is None:
        print(f"{name!r} is not a release; allowed: {', '.join(each.name for each in RELEASES)}", file=sys.stderr)
        return 2
    if os.geteuid() != 0:
        print("tests/run --in makes a root and runs in it: it needs to be run as root", file=sys.stderr)
        return 2
    sweep()
    found = wheels(release, "-build", "-dev")
    apart = unpacked(release, *system_packages("UNPACKED_PACKAGES"))
    with Layer(neighbours_root(release, *system_packages("RUN_PACKAGES", "TEST_PACKAGES"), "git")) as layer:
        clone = layer.root / _CLONE
        for each in git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0"):
            if each and (TOP / each).is_file():
                (clone / each).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(TOP / each, clone / each)
        # There is no network in there to download them by.
        shutil.copytree(apart, clone / "build" / "unpacked", symlinks=True)
        clone.parent.chmod(0o700)
        offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/srv/wheels", "LC_ALL": "C.UTF-8"}
        # systemd-nspawn's own socket for notices, which it does not serve here: unbound, for one, ends because of it.
        run = "unset NOTIFY_SOCKET; useradd --system --user-group proxyuser;"
        run += f' git init -q /{_CLONE}; exec /{_CLONE}/tests/run "$@"'
        return layer.show("sh", "-ec", run, "sh", *options, binds=[f"--bind-ro={found}:/srv/wheels"], environment=offline)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:] or [""]))
