"""`elements` and `new-element`: lists the elements and their options, and writes a first version of a new one."""

from __future__ import annotations

import contextlib
import difflib
import keyword
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Iterator
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

from nfq_agent.cli import show
from nfq_agent.cli.show import note, prose
from nfq_agent.config.file import DEFAULT_PATH
from nfq_agent.config.models import ConfigError
from nfq_agent.elements import GROUP, PACKET_ELEMENTS, STREAM_ELEMENTS, ElementError, packet_element, stream_element
from nfq_agent.elements.loading import CodeError, look_in

_INTERNAL: Final = frozenset(("generation",))
# From so many columns on.
_WIDE: Final = 80


def elements(name: str | None) -> int:
    """Print all elements, or one with its options."""
    try:
        look_in(DEFAULT_PATH.parent / "elements")
    except CodeError as error:
        raise ConfigError([f"{DEFAULT_PATH.parent / 'elements'}: {error}"]) from error
    if name is not None:
        try:
            cls = _find(name)
        except (CodeError, ElementError) as error:
            near = difflib.get_close_matches(name, [kind for kind, _ in _all()], 1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            unknown = f"unknown element {name!r}{hint}; allowed: what `nfq-agent elements` lists, or package.module:Class"
            show.error(f"nfq-agent: {error if ':' in name else unknown}")
            return 2
        _one(name, cls)
        return 0
    for kind, cls in _all():
        prose(f"{kind:<12} {_in_a_line(kind, cls)}", 13)
    note("")
    prose("`nfq-agent elements NAME` shows the options of one; `new-element NAME` writes a new one.")
    return 0


def _all() -> Iterator[tuple[str, Any]]:
    for kind in PACKET_ELEMENTS:
        yield kind, packet_element(kind)
    for kind in STREAM_ELEMENTS:
        yield kind, stream_element(kind)
    for point in entry_points(group=GROUP):
        yield point.name, point.load()


def _find(name: str) -> Any:
    try:
        return packet_element(name)
    except ElementError as error:
        try:
            return stream_element(name)
        except ElementError:
            raise error from None


def _in_a_line(kind: str, cls: Any) -> str:
    """What it is for: as its module says it (`NAME`: ...), else the first paragraph of its class."""
    said = getattr(sys.modules.get(cls.__module__), "__doc__", None) or ""
    mine = f"`{kind}`: "
    text = said.removeprefix(mine) if said.startswith(mine) else cls.__doc__ or ""
    line = " ".join(text.strip().partition("\n\n")[0].split())
    return line[:1].upper() + line[1:]


def _one(name: str, cls: Any) -> None:
    note(_wrapped(f"{name}: {cls.__doc__ or ''}") + "\n")
    fields = [(key, field) for key, field in cls.Options.model_fields.items() if key not in _INTERNAL]
    if not fields:
        note("It has no options.")
        return
    # A narrow terminal has narrow columns.
    first, second = (18, 34) if _width() >= _WIDE else (13, 24)
    for key, field in fields:
        default = "required" if field.is_required() else f"default {_toml(field.get_default(call_default_factory=True))}"
        prose(f"  {field.alias or key:<{first}} {_type(field.annotation):<{second}} {default}", 4)
    if cls.Options.__doc__:
        note("\n" + _wrapped(cls.Options.__doc__))


def _width() -> int:
    return shutil.get_terminal_size((80, 24)).columns


def _wrapped(doc: str) -> str:
    """A docstring in paragraphs as wide as the terminal."""
    paragraphs = textwrap.dedent("    " + doc.strip()).strip().split("\n\n")
    return "\n\n".join(textwrap.fill(" ".join(paragraph.split()), _width()) for paragraph in paragraphs)


def _type(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        return _type(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(_type(each) for each in get_args(annotation) if each is not type(None))
    if get_origin(annotation) is Literal:
        return " or ".join(map(str, get_args(annotation)))
    if get_origin(annotation) in (tuple, set, frozenset, list):
        return "list"
    words = {"int": "whole number", "float": "number or duration", "str": "string", "bool": "true or false", "dict": "table",
             "Geography": "file, or list of files"}  # fmt: skip
    name = getattr(annotation, "__name__", str(annotation))
    return words.get(name, name.lower())


def _toml(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | set | frozenset | list):
        return "[" + ", ".join(map(str, value)) + "]"
    return f'"{value}"' if isinstance(value, str) else str(value)


_ELEMENT: Final = '''"""{title}: say here what it is for."""

from __future__ import annotations

from nfq_agent import DROP, Flow, Needs, Options, Packet, PacketElement, Verdict


class {cls}Options(Options):
    """The keys of its table in the configuration."""

    port: int = 23


class {cls}(PacketElement[{cls}Options]):
    """Drops packets to one port."""

    needs = Needs.HEADERS

    def decide(self, packet: Packet, flow: Flow | None) -> Verdict | None:
        """DROP, or None to leave the packet to the next element."""
        return DROP if packet.headers.five_tuple.dport == self.options.port else None
'''
_TEST: Final = '''"""Run with: python -m pytest test_{module}.py"""

from nfq_agent.testing import Bench, tcp

# isort: split
from {module} import {cls}


def test_the_port_is_dropped() -> None:
    bench = Bench({cls}, port=23)
    bench.assert_dropped(tcp("192.0.2.1:40000", "192.0.2.2:23"))
    bench.assert_accepted(tcp("192.0.2.1:40000", "192.0.2.2:80"))
'''
_CONFIG: Final = """# nfq-agent check --config {module}.toml
[queue.main]
num = 100
elements = ["{name}"]

[element.{name}]
type = "{module}:{cls}"
port = 23

[rules.incoming]
queue = "main"
hooks = ["input"]
tcp_ports = ["1:65535"]
role = "server"
"""


# Names that the written files import.
_TAKEN: Final = frozenset(("Bench", "Flow", "Needs", "Options", "Packet", "PacketElement", "Verdict"))


def _class_name(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("-"))


def _wrong_name(name: str) -> str:
    """Why an element cannot have this name; empty if it can. Its module would take the place of another one."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) or len(name) > 31:
        return f"{name!r} is not a valid name; allowed: up to 31 small letters and digits, with hyphens between, as in scan-guard"
    module = name.replace("-", "_")
    if name in (*PACKET_ELEMENTS, *STREAM_ELEMENTS):
        taken = "a built-in element has it"
    elif keyword.iskeyword(module):
        taken = "it is a word of Python's language"
    elif _class_name(name) in _TAKEN or keyword.iskeyword(_class_name(name)):
        taken = f"the class {_class_name(name)} would be another one"
    elif module in sys.stdlib_module_names or module in ("nfq_agent", "conftest") or find_spec(module) is not None:
        taken = "a module that the agent or its tests need has it"
    else:
        return ""
    return f"{name!r} is taken: {taken}; allowed: another name, as in my-{name}"


def new_element(name: str, folder: Path) -> int:
    """Write an element, its test and a configuration; if one of the files exists, nothing is written."""
    if wrong := _wrong_name(name):
        show.error(f"nfq-agent: {wrong}")
        return 2
    module, cls = name.replace("-", "_"), _class_name(name)
    words = {"name": name, "module": module, "cls": cls, "title": name.replace("-", " ").capitalize()}
    files = {
        # The agent looks for modules in the folder elements/ beside its configuration.
        folder / "elements" / f"{module}.py": _ELEMENT,
        folder / "elements" / f"test_{module}.py": _TEST,
        folder / f"{module}.toml": _CONFIG,
    }
    if existing := [str(path) for path in files if path.exists() or path.is_symlink()]:
        show.error(f"nfq-agent: {', '.join(existing)} exists; nothing was written")
        return 1
    try:
        (folder / "elements").mkdir(parents=True, exist_ok=True)
        for path, text in files.items():
            path.write_text(text.format(**words))
    except OSError as error:
        # None of them was there before.
        for path in files:
            with contextlib.suppress(OSError):
                path.unlink()
        show.error(
            f"nfq-agent: {error.filename}: {error.strerror}; nothing was written; --into takes a folder that can be written"
        )
        return 1
    for path in files:
        note(f"wrote {path}")
    note(f"next: cd {_for_a_shell(folder / 'elements')} && python -m pytest test_{module}.py")
    note(f"then: nfq-agent check --config {_for_a_shell(folder / f'{module}.toml')}")
    return 0


def _for_a_shell(path: Path) -> str:
    """A path that a shell takes as one word, and a program not as an option."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)
