"""The faults of a configuration that is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from nfq_agent.config.file import load
from nfq_agent.config.models import ConfigError


def faults(folder: Path, text: str | bytes) -> list[str]:
    """What is said of a file in `folder` that has this text, without its path."""
    file = folder / "x.toml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ConfigError) as refused:
        load(file)
    return [fault.removeprefix(f"{file}: ") for fault in refused.value.faults]
