"""Settings of the environment: LOG_LEVEL, LOG_FORMAT and TARGET_ADDR override the file."""

from __future__ import annotations

import os
from typing import get_args

from nfq_agent.config.models import ConfigError, LogConfig
from nfq_agent.config.proxy import ProxyConfig
from nfq_agent.values import Endpoint


def log_settings(config: LogConfig) -> LogConfig:
    """The log settings in force: LOG_LEVEL and LOG_FORMAT in the environment win over the file. Raises ConfigError."""
    values: dict[str, str] = {}
    for key in ("level", "format"):
        variable = f"LOG_{key.upper()}"
        if value := os.environ.get(variable):
            allowed = get_args(LogConfig.model_fields[key].annotation)
            if value.lower() not in allowed:
                raise ConfigError([f"environment: {variable}: {value!r} is unknown; allowed: {', '.join(allowed)}"])
            values[key] = value.lower()
    return config.model_copy(values)


def target_in_force(proxy: ProxyConfig) -> Endpoint | None:
    """The target of a proxy: TARGET_ADDR in the environment wins over the file. Raises ConfigError."""
    value = os.environ.get("TARGET_ADDR")
    if not value:
        return proxy.target
    try:
        return Endpoint.parse(value)
    except ValueError as error:
        raise ConfigError([f"environment: TARGET_ADDR: {error}"]) from error
