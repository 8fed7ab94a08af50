"""The verb `explain`: its options and its help."""

from __future__ import annotations

from typing import Annotated, Final

import typer

from nfq_agent.cli.app import ConfigOption, HookName, InstanceOption, offering
from nfq_agent.cli.flags import Flags

EXAMPLE: Final = "Example: nfq-agent explain tcp 10.0.0.5:443 --name evil.example.com"


def explain(  # noqa: PLR0913  # its options
    protocol: Annotated[
        str,
        typer.Argument(
            metavar="PROTOCOL", help="tcp, udp, icmp, or another by name or number.", autocompletion=offering("ip-protocol")
        ),
    ],
    destination: Annotated[
        str,
        typer.Argument(metavar="ADDRESS:PORT", help="The destination; IPv6 in brackets."),
    ],
    name: Annotated[
        str,
        typer.Option(
            "--name", metavar="NAME", help="The name in its first bytes: SNI, Host or DNS name.", autocompletion=offering("name")
        ),
    ] = "",
    source: Annotated[str, typer.Option("--from", metavar="ADDRESS:PORT", help="The source of the packet.")] = "",
    hook: Annotated[HookName, typer.Option("--hook", metavar="HOOK", help="The netfilter hook that sees it.")] = HookName.output,
    interface: Annotated[
        str,
        typer.Option(
            "--interface",
            metavar="NAME",
            help="The interface by which it arrives, or leaves.",
            autocompletion=offering("interface"),
        ),
    ] = "",
    to_interface: Annotated[
        str,
        typer.Option(
            "--to-interface",
            metavar="NAME",
            help="The interface by which it leaves if it is forwarded.",
            autocompletion=offering("interface"),
        ),
    ] = "",
    uid: Annotated[int | None, typer.Option("--uid", metavar="N", help="The sender's user id.")] = None,
    gid: Annotated[int | None, typer.Option("--gid", metavar="N", help="The sender's group id.")] = None,
    unit: Annotated[
        str, typer.Option("--unit", metavar="NAME", help="The systemd unit that has the socket.", autocompletion=offering("unit"))
    ] = "",
    container: Annotated[
        str,
        typer.Option(
            "--container", metavar="NAME", help="The container that has the socket.", autocompletion=offering("container")
        ),
    ] = "",
    exe: Annotated[str, typer.Option("--exe", metavar="PATH", help="The program that has the socket.")] = "",
    cgroup: Annotated[
        str, typer.Option("--cgroup", metavar="PATH", help="The control group of the socket.", autocompletion=offering("cgroup"))
    ] = "",
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME", help="An ipset that has it; may be given more than once.", autocompletion=offering("set")
        ),
    ] = None,
    mark: Annotated[str, typer.Option("--mark", metavar="VALUE", help="The packet's mark.")] = "0",
    config: ConfigOption = None,
    instance: InstanceOption = None,
) -> int:
    """Explain what would happen to a packet: rule, queue, element, and the nearest misses. Needs no root and no agent."""
    from nfq_agent.cli.explain import explain as run
    from nfq_agent.cli.question import Question, has_ports, plain_name
    from nfq_agent.values import Endpoint

    try:
        protocol = plain_name(protocol)
        if not source:
            host = "2001:db8::1" if ":" in destination.rpartition(":")[0] or "[" in destination else "192.0.2.1"
            source = str(Endpoint(host, 40000)) if has_ports(protocol) else host
        question = Question(
            protocol, source, destination, name, hook.value, interface, uid, unit, container, exe, gid, cgroup,
            tuple(sets or ()), _mark(mark), to_interface,
        )  # fmt: skip
        question.check()
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return run(Flags(config, instance), question)


def _mark(text: str) -> int:
    try:
        mark = int(text, 0)
    except ValueError:
        mark = -1
    if not 0 <= mark <= 0xFFFFFFFF:
        raise ValueError(f'{text!r} is not a mark; allowed: 32 bits, as in "0x10"')
    return mark
