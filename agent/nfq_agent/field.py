"""What is said beside the type of a key: its bounds, and what makes or checks its value. By the names that pydantic has for it.

pydantic itself, a third of the memory of an agent, is loaded only where a value is checked: not in the process that serves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

# What a key without a default has as default.
MISSING: Any = ...


@dataclass(frozen=True, slots=True)
class BeforeValidator:
    """`func` makes the value of what the file has, before anything else is checked. Raises ValueError."""

    func: Callable[..., Any]

    def __get_pydantic_core_schema__(self, source: Any, build: Any) -> Any:
        from pydantic import BeforeValidator as Theirs

        return Theirs(self.func).__get_pydantic_core_schema__(source, build)


@dataclass(frozen=True, slots=True)
class AfterValidator:
    """`func` gets a value of the right type, and returns what takes its place. Raises ValueError."""

    func: Callable[..., Any]

    def __get_pydantic_core_schema__(self, source: Any, build: Any) -> Any:
        from pydantic import AfterValidator as Theirs

        return Theirs(self.func).__get_pydantic_core_schema__(source, build)


class Bounds:
    """What a value may be, as the arguments of pydantic's `Field`. alias: the key's name in the file, where it is another."""

    # So that pydantic asks for the parts (annotated_types.GroupedMetadata).
    __is_annotated_types_grouped_metadata__ = True

    def __init__(self, alias: str | None, bounds: dict[str, Any]) -> None:
        self.alias = alias
        self._bounds = bounds

    def __iter__(self) -> Iterator[Any]:
        from pydantic import Field as Theirs

        return iter(Theirs(**self._bounds).metadata)


class Made:
    """The default of a key that is made for each table."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make


def Field(*, default_factory: Callable[[], Any] | None = None, alias: str | None = None, init: bool = True, **bounds: Any) -> Any:
    """Beside a type, its bounds; in place of a default, what makes it. init: False for what is no key."""
    return Made(default_factory) if default_factory is not None and init else Bounds(alias, bounds)
