"""The verb `export`: its options and its help. Imports no more than verbs.py does."""

from __future__ import annotations

from typing import Annotated, Final

import typer

from nfq_agent.cli.app import FilterArgument, InstanceOption, offering

EXAMPLE: Final = "Example: nfq-agent export ipfix --to udp://192.0.2.9:4739"


def export(
    form: Annotated[
        str,
        typer.Argument(metavar="ipfix|json", help="IPFIX messages (RFC 7011), or JSON lines.", autocompletion=offering("form")),
    ],
    what: FilterArgument = "",
    to: Annotated[
        str,
        typer.Option("--to", metavar="TARGET", help="udp://HOST:PORT, tcp://HOST:PORT, a file, or - for the standard output."),
    ] = "-",
    active: Annotated[
        str,
        typer.Option(
            "--active", metavar="TIME", help="A flow that lasts is reported each time.", autocompletion=offering("time")
        ),
    ] = "60s",
    idle: Annotated[
        str,
        typer.Option(
            "--idle", metavar="TIME", help="A flow is reported after so long a silence.", autocompletion=offering("time")
        ),
    ] = "15s",
    enterprise: Annotated[
        int, typer.Option("--enterprise", metavar="N", min=1, max=0xFFFFFFFF, help="The enterprise number of our IPFIX fields.")
    ] = 32473,
    domain: Annotated[
        int, typer.Option("--domain", metavar="N", min=0, max=0xFFFFFFFF, help="The observation domain of IPFIX.")
    ] = 1,
    instance: InstanceOption = None,
) -> int:
    """Write the flows of the running agents until it is stopped. Needs no root for members of group nfq-agent-flows."""
    from nfq_agent.cli import export as exporting
    from nfq_agent.cli import loading
    from nfq_agent.cli.flags import Flags
    from nfq_agent.cli.flow_records import seconds_of

    if form not in exporting.FORMS:
        raise typer.BadParameter(
            f"{form!r} is not a known format; allowed: {', '.join(exporting.FORMS)}", param_hint="'ipfix|json'"
        )
    if instance is not None:
        instance = loading.instance_of(Flags(None, instance))
    encoding = exporting.FORMS[form](domain, enterprise)
    return exporting.export(instance, encoding, to, what, (seconds_of(active, "--active"), seconds_of(idle, "--idle")))
