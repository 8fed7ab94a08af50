"""Rules planned from a configuration, as text."""

from __future__ import annotations

from typing import Any

from nfq_agent.config.models import Config

UID = 999


def config_of(**tables: Any) -> Config:
    return Config.model_validate({"queue": {"main": {"num": 100}}, **tables})
