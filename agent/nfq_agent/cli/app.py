"""The command and its verbs' shared options. Imports nothing but the command line's library.

Shell completion loads this module and verbs.py alone, and so must stay quick; verbs import what they need when they run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from typer.core import TyperGroup

from nfq_agent.cli.flags import AddressFamily, CopyMode


class _Verbs(TyperGroup):
    """Shows parameters without the types of the code: an argument by its name, and a flag, which takes no value, by its own."""

    def get_params(self, ctx: typer.Context) -> list[Any]:  # type: ignore[override]  # the library's own types are not exported
        found: list[Any] = super().get_params(ctx)
        return _without_types(found)

    def get_command(self, ctx: typer.Context, cmd_name: str) -> Any:  # type: ignore[override]  # likewise
        found = super().get_command(ctx, cmd_name)
        if found is not None:
            _without_types(found.get_params(ctx))
        return found


def _without_types(parameters: list[Any]) -> list[Any]:
    for each in parameters:
        if getattr(each, "is_flag", False):
            each.metavar = ""
        elif each.param_type_name == "argument":
            each.display_type_rich = _no_text
        # Ranges as "1<=x<=9": a value outside of one is refused with what is allowed.
        each._get_number_range_help_str = _no_text  # noqa: SLF001  # the library has no public way
    return parameters


def _no_text(**_: Any) -> None:
    """No column for it in the help."""


app = typer.Typer(
    name="nfq-agent",
    cls=_Verbs,
    help="Intercepts traffic through netfilter and judges it. Its rules are removed when it stops.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class OnOff(StrEnum):
    """The first argument of `chaos`."""

    on = "on"
    off = "off"


class HookName(StrEnum):
    """--hook"""

    prerouting = "prerouting"
    input = "input"
    forward = "forward"
    output = "output"
    postrouting = "postrouting"


def offering(kind: str) -> Callable[[typer.Context, str], list[str]]:
    """What completes a value: the names of a kind (`offered_names.matching`)."""

    def complete(ctx: typer.Context, incomplete: str) -> list[str]:
        from nfq_agent.cli import offered_names

        config, instance = ctx.params.get("config"), ctx.params.get("instance")
        return offered_names.matching(kind, incomplete, config and str(config), instance)

    return complete


ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        metavar="FILE",
        readable=False,
        help="The configuration file. Without it: /etc/nfq-agent/nfq-agent.toml if it exists, else the baseline.",
    ),
]
InstanceOption = Annotated[
    str | None,
    typer.Option("--instance", metavar="NAME", help="The instance; wins over the file.", autocompletion=offering("instance")),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
QueueNumOption = Annotated[
    int | None,
    typer.Option("--queue-num", metavar="N", envvar="QUEUE_NUM", help="Number of the queue, 0 to 65535; wins over the file."),
]
CopyModeOption = Annotated[CopyMode | None, typer.Option("--copymode", help="What the kernel copies of each packet.")]
FiveTupleOption = Annotated[bool, typer.Option("--log-5tuple", help="Log protocol, addresses and ports of each packet.")]
CaptureArgument = Annotated[Path, typer.Argument(metavar="FILE", help="The capture, pcap or pcapng, or - for standard input.")]
OutputOption = Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="The file to write.")]
FilterArgument = Annotated[
    str,
    typer.Argument(metavar="FILTER", help="A filter, as in docs/filter.md; all without it.", autocompletion=offering("filter")),
]
ForOption = Annotated[str, typer.Option("--for", metavar="TIME", help='How long, as in "60s".', autocompletion=offering("time"))]
FamilyOption = Annotated[AddressFamily | None, typer.Option("--af-family", help="Address family of all rules.")]


_ONE_DASH: Final = ("queue-num", "copymode", "log-5tuple", "af-family")
# A boolean flag of Go may carry its value after "=" (strconv.ParseBool).
_TRUE: Final = ("1", "t", "T", "TRUE", "true", "True")
_FALSE: Final = ("0", "f", "F", "FALSE", "false", "False")


def two_dashes(arguments: Sequence[str]) -> list[str]:
    """The arguments, with the flags that may be written with one dash (`-queue-num 100`, `-log-5tuple=true`) written with two."""
    result = []
    for argument in arguments:
        bare = argument.lstrip("-")
        name, equals, value = bare.partition("=")
        if len(argument) - len(bare) in (1, 2) and name in _ONE_DASH:
            argument = f"--{bare}"
            if name == "log-5tuple" and equals:
                if value in _FALSE:
                    continue
                # Another value is left to the parser, which refuses it.
                argument = f"--{name}" if value in _TRUE else argument
        result.append(argument)
    return result
