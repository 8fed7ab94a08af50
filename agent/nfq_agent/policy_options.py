"""The keys of a policy and of its rules. Models only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    create_model,
    model_validator,
)

from nfq_agent import element
from nfq_agent.filter_rules import rule_tables
from nfq_agent.flow_filter import FilterError
from nfq_agent.geography import Geography
from nfq_agent.globs import cgroup_glob, claim_glob, container_glob, exe_glob, host_glob, unit_glob
from nfq_agent.match import PLACES, Conditions
from nfq_agent.patterns import with_ascii
from nfq_agent.policy_rule import CLAIMS, DST_NAME, ActionName
from nfq_agent.protocols.known import HOSTS, OWNERS
from nfq_agent.values import TableFaults, listed, lookups, one_or_more

# Rule keys that name a fact: every fact that a protocol sets, by its own name, and one short form.
ATTRIBUTES: Final = {**{fact: fact for fact in OWNERS}, "alpn": "tls_alpn", "encrypted": "encrypted"}


def _spelled(value: object) -> object:
    """True and false as TOML writes them."""
    return str(value).lower() if isinstance(value, bool) else value


# Rule keys about who a flow belongs to.
OWNED_BY: Final = ("unit", "container", "cgroup", "exe")
_SPELLED: Final = BeforeValidator(_spelled)
_SOME: Final = Field(min_length=1, strict=False)
Globs = Annotated[tuple[str, ...], BeforeValidator(listed(str)), _SPELLED, _SOME]
UnitGlobs = Annotated[tuple[Annotated[str, AfterValidator(unit_glob)], ...], BeforeValidator(listed(unit_glob)), _SPELLED, _SOME]
ContainerGlobs = Annotated[
    tuple[Annotated[str, AfterValidator(container_glob)], ...], BeforeValidator(listed(container_glob)), _SPELLED, _SOME
]
CgroupGlobs = Annotated[
    tuple[Annotated[str, AfterValidator(cgroup_glob)], ...], BeforeValidator(listed(cgroup_glob)), _SPELLED, _SOME
]
ExeGlobs = Annotated[tuple[Annotated[str, AfterValidator(exe_glob)], ...], BeforeValidator(listed(exe_glob)), _SPELLED, _SOME]
_ASCII: Final = AfterValidator(with_ascii)
# Host names, and those that a client claims.
HostGlobs = Annotated[
    tuple[Annotated[str, AfterValidator(host_glob)], ...], BeforeValidator(listed(host_glob)), _SPELLED, _SOME, _ASCII
]
ClaimGlobs = Annotated[
    tuple[Annotated[str, AfterValidator(claim_glob)], ...], BeforeValidator(listed(claim_glob)), _SPELLED, _SOME, _ASCII
]


def _readable(when: str) -> str:
    """The filter, if it can be the conditions of a rule."""
    try:
        rule_tables(when)
    except FilterError as error:
        raise ValueError(error.quoted) from error
    return when


def _printable(name: str) -> str:
    """The name of a rule: it is in lines of the log."""
    if not name.isprintable():
        raise ValueError(f"{name!r} has a character that cannot be printed; allowed: a name on one line")
    return name


class _Rules(Conditions):
    """One rule: an action and its conditions. facts: patterns for facts of any other name, of elements of others.

    unit, container, cgroup, exe: who has the flow's socket on this host; where that is not known, the rule does not match.
    dst_name: the destination is an address that a DNS answer gave for such a name. verify: a name of `tls_sni` or `http_host`
    counts only for such an address. when: the conditions as a filter, beside the other keys.
    """

    # The keys that ask for facts of protocols.
    fact_keys: ClassVar = frozenset(ATTRIBUTES)

    action: ActionName
    name: Annotated[str, AfterValidator(_printable)] | None = None
    unit: UnitGlobs | None = None
    container: ContainerGlobs | None = None
    cgroup: CgroupGlobs | None = None
    exe: ExeGlobs | None = None
    facts: dict[str, Globs] = Field(default_factory=dict)
    dst_name: HostGlobs | None = None
    verify: Literal["dns"] | None = None
    when: Annotated[str, AfterValidator(_readable)] | None = None
    _alternatives: tuple[Any, ...] = PrivateAttr(default=())

    @model_validator(mode="after")
    def _compiled(self, info: ValidationInfo) -> Self:
        """Turn `when` into rules with the same keys that people write."""
        if self.when is None:
            return self
        given = {name: getattr(self, name) for name in self.model_fields_set - {"when"}}
        tables = rule_tables(self.when)
        if twice := sorted({key for table in tables for key in table.keys() & given.keys()}):
            raise ValueError(f"when asks for {', '.join(twice)}, and so does the key; allowed: one of them")
        try:
            self._alternatives = tuple(type(self).model_validate({**given, **table}, context=info.context) for table in tables)
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"when: {first['msg'].removeprefix('Value error, ')}") from error
        return self

    @property
    def alternatives(self) -> tuple[Self, ...]:
        """The rules without `when` of which one has to match: the rule itself, or those that its filter is turned into."""
        return (self,) if self.when is None else self._alternatives

    @model_validator(mode="after")
    def _verifiable(self) -> Self:
        if self.verify is not None:
            if self.action != "accept":
                raise ValueError(
                    f'verify is for names that are accepted; allowed: without it, or action = "accept", not "{self.action}"'
                )
            if self.when is None and not any(getattr(self, fact) for fact in CLAIMS):
                raise ValueError(f"verify without a name that is claimed; allowed: with {' or '.join(CLAIMS)}")
        return self

    @property
    def owned_by(self) -> list[tuple[str, tuple[str, ...]]]:
        """What the rule asks of the owner, with the patterns of each."""
        return [(key, globs) for key in OWNED_BY if (globs := getattr(self, key)) is not None]

    @property
    def wanted(self) -> list[tuple[str, tuple[str, ...]]]:
        """The facts that the rule asks for, with the patterns of each."""
        wanted = [(fact, globs) for key, fact in ATTRIBUTES.items() if (globs := getattr(self, key)) is not None]
        if self.applications:
            wanted.append(("protocol", self.applications))
        if self.dst_name is not None:
            wanted.append((DST_NAME, self.dst_name))
        return wanted + list(self.facts.items())


if TYPE_CHECKING:
    RuleOptions = _Rules
else:
    # The keys follow from the table of protocols.
    RuleOptions = create_model(
        "RuleOptions",
        __base__=_Rules,
        __doc__=_Rules.__doc__,
        **{
            key: ((ClaimGlobs if fact in CLAIMS else HostGlobs if fact in HOSTS else Globs) | None, None)
            for key, fact in ATTRIBUTES.items()
        },
    )


def _geography(value: object, info: ValidationInfo) -> object:
    """The databases in these files, or the value itself if it is one already."""
    if value is None or isinstance(value, Geography):
        return value
    files = one_or_more(value)
    if isinstance(files, list | tuple) and files and all(isinstance(each, str) and each.isprintable() for each in files):
        return lookups(info.context).geography(tuple(files))
    raise ValueError(f"{value!r} is not a database; allowed: a file in MaxMind's format (.mmdb), or a list of them")


class PolicyOptions(element.Options):
    """default: when no rule matches; if left out, the next elements are asked. undecided: while a fact is awaited.

    within, within_bytes: packets with payload, and bytes of payload, both ways, for which a fact is awaited: what passes until
    then if `undecided` is "accept". conflict: where a rule asks for a name of a message that servers read in different ways. geo:
    databases in MaxMind's format, for conditions on countries and autonomous systems.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    default: ActionName | None = None
    undecided: ActionName = "accept"
    within: Annotated[int, Field(ge=1, le=1000)] = 32
    within_bytes: Annotated[int, Field(ge=1, le=1 << 20)] = 16384
    conflict: ActionName = "drop"
    explain: bool = False
    geo: Annotated[Geography | None, BeforeValidator(_geography)] = None
    rule: Annotated[tuple[RuleOptions, ...], Field(strict=False)] = ()

    @property
    def numbered(self) -> list[tuple[int, RuleOptions]]:
        """The rules without `when`, in their order, each with the number of the rule in the file that it is of."""
        return [(number, each) for number, rule in enumerate(self.rule, 1) for each in rule.alternatives]

    @property
    def rules(self) -> list[RuleOptions]:
        """The same without their numbers."""
        return [rule for _, rule in self.numbered]

    @model_validator(mode="after")
    def _has_places(self) -> Self:
        found: dict[tuple[int, str], str] = {}
        for number, rule in self.numbered:
            asked = [key for key in PLACES if getattr(rule, key) is not None]
            if asked and self.geo is None:
                found[number - 1, asked[0]] = f'{", ".join(asked)} without a database; allowed: with geo = "FILE.mmdb"'
        if found:
            raise TableFaults((("rule", *at), text) for at, text in found.items())
        return self
