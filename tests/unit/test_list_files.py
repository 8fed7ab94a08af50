"""Lists in files: when a change of one is noticed, also while it is being written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nfq_agent.config.file import load
from nfq_agent.config.models import Config, ConfigError


def policy(folder: Path, keys: str) -> Config:
    file = folder / "x.toml"
    file.write_text(
        f'[queue.q]\nelements = ["allow"]\n[element.allow]\ntype = "policy"\nrule = [{{ action = "drop", {keys} }}]\n'
    )
    return load(file)


def test_a_change_of_a_list_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "nets.txt"
    path.write_text("10.0.0.0/8\n")
    config = policy(tmp_path, 'dst = "file:nets.txt"')
    assert config.changed_files() == []
    os.utime(path, ns=(1, 1))
    assert [config.changed_files() for _ in range(2)] == [[], [path]]
    assert config.changed_files() == [], "a list that cannot be used is not tried again until it changes"
    again = policy(tmp_path, 'dst = "file:nets.txt"')
    assert again.changed_files() == []
    path.unlink()
    assert [again.changed_files() for _ in range(2)] == [[], [path]]


def test_a_list_that_is_being_written_is_not_read_before_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "nets.txt"
    path.write_text("10.0.0.0/8\n")
    config = policy(tmp_path, 'dst = "file:nets.txt"')
    # As an editor, or a download: the file is gone or empty for a moment, and then grows.
    path.unlink()
    assert config.changed_files() == []
    with path.open("w") as file:
        for line in ("10.0.0.0/8\n", "192.0.2.0/2", "4\n"):
            file.write(line)
            file.flush()
            assert config.changed_files() == []
    assert config.changed_files() == [path]
    assert config.changed_files() == []
    # Read at that very moment: what came after that is a change.
    with path.open("w") as file:
        file.write("10.0.0.0/8\n192.0.2.0/2")
        file.flush()
        with pytest.raises(ConfigError, match=r"192\.0\.2\.0/2' has bits set"):
            policy(tmp_path, 'dst = "file:nets.txt"')
        file.seek(0)
        file.write("10.0.0.0/8\n192.0.0.0/2")
        file.flush()
        halfway = policy(tmp_path, 'dst = "file:nets.txt"')
        file.write("4\n")
    assert [halfway.changed_files() for _ in range(2)] == [[], [path]]


def test_a_long_list_is_read_once(tmp_path: Path) -> None:
    entries = [f"10.{place >> 16}.{place >> 8 & 255}.{place & 255}" for place in range(20_000)]
    (tmp_path / "nets.txt").write_text("\n".join(entries))
    config = policy(tmp_path, 'dst = "file:nets.txt"')
    (first,) = config.packet_elements(config.queue["q"])
    (second,) = config.packet_elements(config.queue["q"])
    assert second is first
    assert len(first.options.rule[0].dst) == 20_000
