"""The table of mounts: names of any bytes, and what is read of this very process."""

from __future__ import annotations

from pathlib import Path

import pytest

from nfq_agent.elements import access
from nfq_agent.host import cgroups
from nfq_agent.mounts import TABLE, Mount, mounts

LINES = (
    b"21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/root rw",
    b"22 21 0:5 / /media/a\\040b\\134c ro,nosuid - vfat /dev/sdb1 rw",
    b"23 21 0:6 / /media/caf\xe9 rw shared:2 master:3 - tmpfs none ro",
    b"24 21 0:7 / /sys/fs/cgroup\\011x rw - cgroup2 cgroup2 rw,nsdelegate",
)
READ = [
    Mount("/", "ext4", False),
    Mount("/media/a b\\c", "vfat", True),
    Mount("/media/caf\udce9", "tmpfs", False),
    Mount("/sys/fs/cgroup\tx", "cgroup2", False),
]


def test_each_line_is_a_mount() -> None:
    assert list(mounts(b"\n".join(LINES) + b"\n")) == READ


@pytest.mark.parametrize("table", [b"", b"\n", b"21 1 8:1 /", b" - ext4"])
def test_what_is_no_line_of_the_table_is_no_mount(table: bytes) -> None:
    assert list(mounts(table)) == []


def test_the_table_of_this_process() -> None:
    found = {mount.point: mount.kind for mount in mounts(Path(TABLE).read_bytes())}
    assert found["/proc"] == "proc"


def test_a_mount_point_that_is_not_utf_8_hides_no_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = tmp_path / "mountinfo"
    monkeypatch.setattr(cgroups, "TABLE", str(table))
    monkeypatch.setattr(access, "TABLE", str(table))
    volume = tmp_path / "volume"
    volume.mkdir()
    volume.chmod(0o777)
    table.write_bytes(b"\n".join([*LINES, f"25 21 0:8 / {volume} ro - tmpfs none rw".encode()]))
    assert cgroups.mounted() == Path("/sys/fs/cgroup\tx")
    assert not access.writable_by_others(volume, volume)
