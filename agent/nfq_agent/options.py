"""`Options`, the base of the models of elements' tables. It needs pydantic, which an agent without elements does not load."""

from __future__ import annotations

# Loaded with each element: some use it only once a worker is confined, which can open no file then. An agent without elements
# does not need it, and it brings OpenSSL's library, of 3 MB.
import hashlib as _hashlib  # noqa: F401  # for others
from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict

from nfq_agent.fitting import fit


class Options(BaseModel):
    """The keys of an element's table in the configuration. An element adds its own in a subclass.

    Values are checked strictly (a string is not a number), and every type has a form in TOML: an array for a tuple or set, a
    string for a Path, an address, a network or a member of an Enum, and `"5s"` for a timedelta.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @classmethod
    def from_table(cls, table: Mapping[str, Any], context: Any = None) -> Self:
        """The options of a table as TOML gives it. context: `Lookups`, for names. Raises pydantic's ValidationError."""
        return cls.model_validate(fit(cls, dict(table)), context=context)
