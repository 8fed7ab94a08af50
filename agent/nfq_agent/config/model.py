"""The model that every table of the configuration is made from: frozen, no value converted, no unknown key."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Model(BaseModel):
    """A table of the configuration."""

    # What validates a table is built with the whole configuration's, once, and not for each table before that.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, arbitrary_types_allowed=True, defer_build=True)
