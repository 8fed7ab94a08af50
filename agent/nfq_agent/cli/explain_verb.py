"""The verb `explain`: its options and its help."""

from __future__ import annotations

from typing import Annotated, Final

import typer

from nfq_agent.cli.app import ConfigOption, HookName, InstanceOption
from nfq_agent.cli.flags import Flags

EXAMPLE: Final = "Example: nfq-agent explain tcp 10.0.0.5:443 --name evil.example.com"


def explain(  # noqa: PLR0913  # its options
    protocol: Annotated[str, typer.Argument(metavar="tcp|udp|icmp", help="Protocol of the packet.")],
    destination: Annotated[str, typer.Argument(metavar="ADDRESS:PORT", help="The destination; IPv6 in brackets.")],
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="The name in its first bytes: SNI, Host or DNS name.")] = "",
    source: Annotated[str, typer.Option("--from", metavar="ADDRESS:PORT", help="The source of the packet.")] = "",
    hook: Annotated[HookName, typer.Option("--hook", metavar="HOOK", help="The netfilter hook that sees it.")] = HookName.output,
    interface: Annotated[
        str, typer.Option("--interface", metavar="NAME", help="The interface through which it arrives or leaves.")
    ] = "",
    uid: Annotated[int | None, typer.Option("--uid", metavar="N", help="The sender's user id.")] = None,
    unit: Annotated[str, typer.Option("--unit", metavar="NAME", help="The systemd unit that has the socket.")] = "",
    container: Annotated[str, typer.Option("--container", metavar="NAME", help="The container that has the socket.")] = "",
    exe: Annotated[str, typer.Option("--exe", metavar="PATH", help="The program that has the socket.")] = "",
    config: ConfigOption = None,
    instance: InstanceOption = None,
) -> int:
    """Explain what would happen to a packet: rule, queue, element, and the nearest misses. Needs no root and no agent."""
    from nfq_agent.cli.explain import Question
    from nfq_agent.cli.explain import explain as run

    if protocol not in ("tcp", "udp", "icmp"):
        raise typer.BadParameter(f"{protocol!r} is not a known protocol; allowed: tcp, udp, icmp")
    if not source:
        host = "[2001:db8::1]" if "[" in destination or (protocol == "icmp" and ":" in destination) else "192.0.2.1"
        source = host.strip("[]") if protocol == "icmp" else f"{host}:40000"
    question = Question(protocol, source, destination, name, hook.value, interface, uid, unit, container, exe)
    try:
        question.check()
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return run(Flags(config, instance), question)
