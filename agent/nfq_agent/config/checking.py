"""Checks tables with pydantic, whose models are made from those of the configuration: these stay the only definition."""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, create_model, model_validator
from pydantic import Field as TheirField
from pydantic_core import core_schema

from nfq_agent.field import Made
from nfq_agent.values import raise_faults


class _Checked(BaseModel):
    # What validates a table is built with the whole configuration's, once, and not for each table before that.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, arbitrary_types_allowed=True, defer_build=True)


@cache
def checker(model: Any) -> type[BaseModel]:
    """The model of pydantic that checks the tables of a `config.model.Model`, a class."""

    def together(table: BaseModel) -> BaseModel:
        raise_faults(model.of(vars(table)).faults())
        return table

    keys: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        kind: Any = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
        default = {"default_factory": field.default.make} if isinstance(field.default, Made) else {"default": field.default}
        keys[name] = (kind, TheirField(**default, alias=field.alias))
    validators: dict[str, Any] = {"together": model_validator(mode="after")(together)} if hasattr(model, "faults") else {}
    return create_model(model.__name__, __base__=_Checked, __module__=model.__module__, __validators__=validators, **keys)


def checked(model: Any, table: object) -> dict[str, Any]:
    """The values of a table's keys. Raises pydantic's ValidationError."""
    return vars(checker(model).model_validate(table))


def schema(model: Any, build: Any) -> Any:
    """What checks a table within another one, as pydantic has it."""

    def made(value: object, check: Any) -> Any:
        return value if isinstance(value, model) else model.of(vars(check(value)))

    return core_schema.no_info_wrap_validator_function(made, build.generate_schema(checker(model)))
