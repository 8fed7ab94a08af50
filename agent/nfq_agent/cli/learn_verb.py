"""The verb `learn`: its options and its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

from nfq_agent.cli.app import ConfigOption, InstanceOption, OutputOption, offering
from nfq_agent.cli.flags import Flags

EXAMPLE: Final = "Example: nfq-agent learn --for 24h -o proposal.toml"


def learn(
    capture: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="A capture, pcap or pcapng; without it the running agent is watched.")
    ] = None,
    config: ConfigOption = None,
    instance: InstanceOption = None,
    output: OutputOption = None,
    last: Annotated[
        str,
        typer.Option(
            "--for", metavar="TIME", help='How long to watch the running agent, as in "24h".', autocompletion=offering("time")
        ),
    ] = "",
    by_domain: Annotated[bool, typer.Option("--by-domain", help="One rule for all names under a registered domain.")] = False,
) -> int:
    """Propose a policy that accepts what a capture, or the running agent, shows: a rule for each name. FILE needs no root."""
    from nfq_agent.cli.flow_records import seconds_of

    if (capture is None) == (not last):
        raise typer.BadParameter("a capture, or --for with a time for the running agent; not both")
    from nfq_agent.cli.proposal import grouping

    grouped = grouping() if by_domain else None
    if capture is None:
        from nfq_agent.cli.learn_live import learn as watch

        return watch(Flags(config, instance), seconds_of(last), output, grouped)
    from nfq_agent.cli.learn import learn as run

    return run(Flags(config, instance), capture, output, grouped)
