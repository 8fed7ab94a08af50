"""The model that every table of the configuration is made from: frozen, no value converted, no unknown key.

A model is a plain class. What checks a table is made from it on first use (`checking.py`), with pydantic: a process that gets a
configuration which another one has checked never loads that.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, ClassVar, NamedTuple, Self, dataclass_transform, get_args, get_origin, get_type_hints

from nfq_agent.field import MISSING, Bounds, Field, Made


class ModelField(NamedTuple):
    """A key: its type, what is said beside that, its name in the file where that is another, and its default."""

    annotation: Any
    metadata: tuple[Any, ...]
    alias: str | None
    default: Any


@cache
def fields_of(model: Any) -> Mapping[str, ModelField]:
    """The keys of a model (a class) by their names in Python."""
    found = {}
    for name, hint in get_type_hints(model, include_extras=True).items():
        if name in model.defaults:
            kind, *beside = get_args(hint) if get_origin(hint) is Annotated else (hint,)
            alias = next((each.alias for each in beside if isinstance(each, Bounds) and each.alias), None)
            found[name] = ModelField(kind, tuple(beside), alias, model.defaults[name])
    return found


class _Fields:
    """`model_fields`, as models of pydantic have it."""

    def __get__(self, table: object, model: Any) -> Mapping[str, ModelField]:
        return fields_of(model)


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(Field,))
class Model:
    """A table of the configuration. `Model(key=value)` and `model_validate` check what they are given.

    A subclass that defines `faults` is asked for what is wrong with a table as a whole, one text for each fault.
    """

    defaults: ClassVar[dict[str, Any]] = {}
    model_fields: ClassVar[_Fields] = _Fields()

    def __init_subclass__(cls) -> None:
        own = {name: vars(cls).get(name, MISSING) for name in vars(cls).get("__annotations__", {}) if not name.startswith("_")}
        cls.defaults = {**cls.defaults, **own}

    def __init__(self, **values: Any) -> None:
        """Raises pydantic's ValidationError."""
        cls = type(self)
        if not values and not hasattr(cls, "faults") and MISSING not in cls.defaults.values():
            # Defaults need no check, and modules have them as their own defaults.
            values = {name: each.make() if isinstance(each, Made) else each for name, each in cls.defaults.items()}
        else:
            from nfq_agent.config.checking import checked

            values = checked(cls, values)
        vars(self).update(values)

    @classmethod
    def model_validate(cls, table: object) -> Self:
        """The model of a table as TOML has it. Raises pydantic's ValidationError."""
        from nfq_agent.config.checking import checked

        return cls.of(checked(cls, table))

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """The model with these values, which were checked."""
        made = cls.__new__(cls)
        vars(made).update(values)
        return made

    def model_copy(self, update: Mapping[str, Any]) -> Self:
        """The same with other values, which are not checked."""
        return self.of({**vars(self), **update})

    @property
    def values(self) -> dict[str, Any]:
        """The value of each key, by its name in Python."""
        return {name: getattr(self, name) for name in self.defaults}

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__}.{name}: a configuration is not changed")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, type(self)) and self.values == other.values

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.values.items())})"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, build: Any) -> Any:
        from nfq_agent.config.checking import schema

        return schema(cls, build)
