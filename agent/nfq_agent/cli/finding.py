"""One thing that `doctor` looked at."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Level = Literal["good", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding. advice: what to do about it, empty if there is nothing to do."""

    level: Level
    subject: str
    text: str
    advice: str = ""

    def as_object(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)
