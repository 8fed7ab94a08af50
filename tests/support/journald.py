"""A real journald in a namespace of its own, and what journalctl reads back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import pytest
from agent import until
from namespace import Namespace

_PROGRAM: Final = "/lib/systemd/systemd-journald"
# The kernel's log and the audit socket are the machine's.
_CONFIG: Final = """
mkdir -p /run/systemd/journal /etc/systemd/journald.conf.d
cat >/etc/systemd/journald.conf.d/90-test.conf <<END
[Journal]
Storage=volatile
ReadKMsg=no
Audit=no
RateLimitIntervalSec=0
END
test -s /etc/machine-id || tr -d - </proc/sys/kernel/random/uuid >/etc/machine-id
"""


class Journald:
    """Serves until the namespace ends."""

    def __init__(self, namespace: Namespace) -> None:
        if not Path(_PROGRAM).exists():
            pytest.skip(f"{_PROGRAM} is not installed (package systemd)")
        self._namespace = namespace
        namespace.shell(_CONFIG)
        namespace.start(_PROGRAM)
        until(lambda: self._serves, "journald serves")

    @property
    def _serves(self) -> bool:
        return self._namespace.run("journalctl", "--sync", check=False).returncode == 0

    def entries(self, *matches: str) -> list[dict[str, Any]]:
        """The entries with these fields (`NFQ_EVENT=drop`), as `journalctl -o json` has them, in their order."""
        self._namespace.run("journalctl", "--sync")
        # Without --all it leaves out the value of a long field.
        query = ["journalctl", "--directory=/run/log/journal", "--no-pager", "--all", "--quiet", "--output=json", *matches]
        return [json.loads(line) for line in self._namespace.run(*query, check=False).stdout.splitlines()]
