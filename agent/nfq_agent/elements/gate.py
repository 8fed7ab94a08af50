"""What `http-host` and `sni` share: look at a connection's first bytes, find a name in them, and let the connection pass or
reset it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from nfq_agent import element
from nfq_agent.globs import claim_glob
from nfq_agent.patterns import ascii_form
from nfq_agent.protocols import MORE, Found, Result
from nfq_agent.stream import CLOSE, Answer, Connection, Done, StreamElement, Way

# The most bytes to wait for: a name comes early.
_MOST: Final = 32 * 1024


def _pattern(text: str) -> str:
    name = text.lower().rstrip(".")
    if not name or "*" in name.removeprefix("*.").replace("*", "", name == "*"):
        raise ValueError(f'{text!r} is not a valid pattern; allowed: NAME, "*.NAME" for what is below it, "*" for any name')
    return ascii_form(claim_glob(name))


NamePatterns = Annotated[tuple[Annotated[str, AfterValidator(_pattern)], ...], Field(strict=False)]


class GateOptions(element.Options):
    """deny, allow: names, looked at in this order; `*.NAME` is everything below NAME. default: for other names; deny if
    there is an allow list. unknown: for connections that show no name; as default if it is left out. conflict: where a name
    is there that is not known, because servers read the bytes in different ways, or because it takes more than 32 KiB."""

    allow: NamePatterns = ()
    deny: NamePatterns = ()
    default: Literal["allow", "deny"] | None = None
    unknown: Literal["allow", "deny"] | None = None
    conflict: Literal["allow", "deny"] = "deny"

    @model_validator(mode="after")
    def _judges(self) -> Self:
        if not self.allow and not self.deny and self.default is None and self.unknown is None:
            raise ValueError("nothing would be denied; allowed: allow, deny, default or unknown")
        return self


class Gate(StreamElement[GateOptions]):
    """Holds a connection's first bytes until the name is known, then passes them or resets the connection.

    After that it is not called any more.
    """

    # The parser of an opening, and the fact that is the name.
    parse: ClassVar[Callable[..., Result]]
    fact: ClassVar[str]

    def request(self, data: bytes, connection: Connection) -> Answer:
        """Nothing until the name is known; then everything so far, or CLOSE."""
        seen = connection.state.pop(self, b"") + data
        result = type(self).parse(seen, b"")
        undecided = result is MORE or (isinstance(result, Found) and not result.decided)
        if undecided and len(seen) < _MOST:
            connection.state[self] = seen
            return b""
        facts: dict[str, Any] = result.facts if isinstance(result, Found) else {}
        if undecided:
            facts = {**facts, "conflict": "a name that does not come within 32 KiB"}
        if not self._lets_through(facts.get(self.fact), connection, facts.get("conflict")):
            return CLOSE
        connection.facts.update(facts)
        return Done(seen)

    def rest(self, way: Way, connection: Connection) -> bytes:
        """The client ended before it showed a name."""
        seen = connection.state.pop(self, b"")
        return seen if seen and self._lets_through(None, connection) else b""

    def _lets_through(self, name: str | None, connection: Connection, conflict: str | None = None) -> bool:
        options = self.options
        default = options.default or ("deny" if options.allow else "allow")
        if conflict is not None:
            verdict = options.conflict
        elif name is None:
            verdict = options.unknown or default
        elif any(_matches(name, pattern) for pattern in options.deny):
            verdict = "deny"
        elif any(_matches(name, pattern) for pattern in options.allow):
            verdict = "allow"
        else:
            verdict = default
        self.emit(
            f"{self.name}: connection {connection.id}: {name or conflict or 'no name'}: {verdict}",
            level="warning" if verdict == "deny" else "info",
            verdict="drop" if verdict == "deny" else "accept",
            **({self.fact: name} if name else {}),
            **connection.fields,
        )
        return bool(verdict == "allow")


def _matches(name: str, pattern: str) -> bool:
    return pattern == "*" or name == pattern or (pattern.startswith("*.") and name.endswith(pattern[1:]))
