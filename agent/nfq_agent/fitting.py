"""Gives values from TOML the Python type that a field of a model has, if TOML has no such type."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from datetime import timedelta
from enum import Enum
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
from pathlib import PurePath
from types import UnionType
from typing import Annotated, Any, Final, Union, get_args, get_origin

from pydantic import BaseModel

from nfq_agent.values import duration

# Types that are made from a string as they are.
_FROM_TEXT: Final = (PurePath, Enum, IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network)


def fit(annotation: Any, value: Any) -> Any:
    """The value as `annotation` needs it: an array as tuple or set, a string as Path, Enum, address, network or timedelta.

    A value that does not fit is returned as it is, and validation then names the fault.
    """
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, UnionType):
        return _fit_union(get_args(annotation), value)
    if isinstance(value, list):
        return _fit_array(annotation, value)
    if isinstance(value, Mapping):
        return _fit_table(annotation, value)
    with contextlib.suppress(ValueError):
        if isinstance(annotation, type) and not isinstance(value, annotation):
            if issubclass(annotation, timedelta) and isinstance(value, str):
                return timedelta(seconds=duration(value))
            if issubclass(annotation, Enum) or (isinstance(value, str) and issubclass(annotation, _FROM_TEXT)):
                return annotation(value)
    return value


def _fit_union(members: tuple[Any, ...], value: Any) -> Any:
    if type(value) in members:
        return value
    return next((fitted for each in members if (fitted := fit(each, value)) is not value), value)


def _fit_array(annotation: Any, value: list[Any]) -> Any:
    kind, members = get_origin(annotation) or annotation, get_args(annotation)
    if kind not in (tuple, set, frozenset, list):
        return value
    if kind is tuple and members[1:] != (...,):
        if len(members) != len(value):
            return tuple(value)
        return tuple(fit(member, each) for member, each in zip(members, value, strict=True))
    fitted = [fit(members[0], each) if members else each for each in value]
    try:
        return kind(fitted)
    except TypeError:
        # Tables in a set.
        return value


def _fit_table(annotation: Any, value: Mapping[str, Any]) -> Any:
    if get_origin(annotation) is dict:
        return {key: fit(get_args(annotation)[1], each) for key, each in value.items()}
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        wanted = {field.alias or name: field.annotation for name, field in annotation.model_fields.items()}
        return {key: fit(wanted.get(key), each) for key, each in value.items()}
    return value
