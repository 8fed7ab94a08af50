"""The verbs: their options, their help, and which module does their work. Each returns an exit code."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nfq_agent.cli import explain_verb, export_verb, learn_verb
from nfq_agent.cli.app import (
    CaptureArgument,
    ConfigOption,
    CopyModeOption,
    FamilyOption,
    FilterArgument,
    FiveTupleOption,
    ForOption,
    InstanceOption,
    JsonOption,
    OnOff,
    OutputOption,
    QueueNumOption,
    app,
    offering,
)
from nfq_agent.cli.flags import Flags

__all__ = ["app"]


def _print_version(wanted: bool) -> None:
    if wanted:
        from nfq_agent.version import version

        print(f"nfq-agent {version()}")
        raise typer.Exit


@app.callback()
def command(
    version: Annotated[
        bool, typer.Option("--version", "-V", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    """Intercepts traffic through netfilter and judges it. Its rules are removed when it stops."""
    del version


@app.command(epilog="Example: nfq-agent run --log-5tuple --queue-num 7")
def run(
    config: ConfigOption = None,
    instance: InstanceOption = None,
    queue_num: QueueNumOption = None,
    copymode: CopyModeOption = None,
    log_5tuple: FiveTupleOption = False,
    af_family: FamilyOption = None,
) -> int:
    """Serve in the foreground until stopped. The systemd unit starts this. SIGTERM and SIGINT stop it, SIGHUP reloads."""
    from nfq_agent.cli import serve

    return serve.run(Flags(config, instance, queue_num, copymode, log_5tuple, af_family))


@app.command(epilog="Example: nfq-agent check --config /etc/nfq-agent/nfq-agent.toml")
def check(
    config: ConfigOption = None,
    instance: InstanceOption = None,
    queue_num: QueueNumOption = None,
    copymode: CopyModeOption = None,
    log_5tuple: FiveTupleOption = False,
    af_family: FamilyOption = None,
    code: Annotated[bool, typer.Option("--code", help="Load all code of the agent as well, as before a restart.")] = False,
) -> int:
    """Check a configuration. Prints one line for each fault; exit 78 if there is one."""
    from nfq_agent.cli import inspect

    return inspect.check(Flags(config, instance, queue_num, copymode, log_5tuple, af_family), code)


@app.command(epilog="Example: nfq-agent plan --config new.toml")
def plan(
    config: ConfigOption = None,
    instance: InstanceOption = None,
    json_: JsonOption = False,
    queue_num: QueueNumOption = None,
    copymode: CopyModeOption = None,
    log_5tuple: FiveTupleOption = False,
    af_family: FamilyOption = None,
    pcap: Annotated[
        Path | None, typer.Option("--pcap", metavar="FILE", help="Replay this capture as well; exit 4 if more would be dropped.")
    ] = None,
) -> int:
    """Show what would change: rules as iptables text, and policies. Writes nothing; exit 3 if there is a change."""
    from nfq_agent.cli import rule_verbs

    return rule_verbs.plan(Flags(config, instance, queue_num, copymode, log_5tuple, af_family), json_, pcap)


@app.command(epilog="Example: nfq-agent apply --confirm 60")
def apply(
    config: ConfigOption = None,
    instance: InstanceOption = None,
    confirm_within: Annotated[
        int | None,
        typer.Option("--confirm", metavar="SECONDS", min=1, help="Take the rules back unless confirmed within this time."),
    ] = None,
    queue_num: QueueNumOption = None,
    copymode: CopyModeOption = None,
    log_5tuple: FiveTupleOption = False,
    af_family: FamilyOption = None,
) -> int:
    """Insert the rules without serving. With bypass, traffic passes."""
    from nfq_agent.cli import rule_verbs

    return rule_verbs.apply(Flags(config, instance, queue_num, copymode, log_5tuple, af_family), confirm_within)


@app.command(epilog="Example: nfq-agent remove --instance default")
def remove(
    config: ConfigOption = None,
    instance: InstanceOption = None,
    after_failure: Annotated[
        bool,
        typer.Option(
            "--after-failure",
            help="For ExecStopPost=: if the service failed (SERVICE_RESULT), leave the rules of queues with bypass = false.",
        ),
    ] = False,
    queue_num: Annotated[
        int | None,
        typer.Option(
            "--queue-num", metavar="N", envvar="QUEUE_NUM", help="Accepted and not used: rules are found by their instance."
        ),
    ] = None,
) -> int:
    """Remove exactly the rules of this instance. Needs no valid configuration; no rule to remove is success."""
    from nfq_agent.cli import rule_verbs

    return rule_verbs.remove(Flags(config, instance, queue_num), after_failure)


@app.command(epilog="Example: nfq-agent sweep --instance default")
def sweep(config: ConfigOption = None, instance: InstanceOption = None) -> int:
    """Clean up after the service of this instance, unless it is active: its rules, then its processes. For the unit beside it."""
    from nfq_agent.cli.sweep import sweep as clean

    return clean(Flags(config, instance))


@app.command(epilog="Example: nfq-agent reload")
def reload(
    config: ConfigOption = None,
    instance: InstanceOption = None,
    confirm_within: Annotated[
        int | None,
        typer.Option("--confirm", metavar="SECONDS", min=1, help="Restore the old configuration unless confirmed in time."),
    ] = None,
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="With --confirm: end when it is in force; `nfq-agent confirm` confirms.")
    ] = False,
) -> int:
    """Make the running agent read its configuration again, and wait. Exit 0 only when it is in force."""
    from nfq_agent.cli import requests

    return requests.reload(Flags(config, instance), confirm_within, not no_wait)


@app.command(epilog="Example: nfq-agent confirm")
def confirm(
    config: ConfigOption = None,
    instance: InstanceOption = None,
    undo: Annotated[bool, typer.Option("--undo", help="Restore the previous configuration now.")] = False,
) -> int:
    """Keep the configuration that `reload --confirm` has put into force. Exit 1 if none waits for it."""
    from nfq_agent.cli import requests

    return requests.confirm(Flags(config, instance), keep=not undo)


@app.command(epilog="Example: nfq-agent restart")
def restart(config: ConfigOption = None, instance: InstanceOption = None) -> int:
    """Start the running agent again in place, with the code that is installed now, and wait. No packet is lost meanwhile."""
    from nfq_agent.cli import requests

    return requests.restart(Flags(config, instance))


@app.command(epilog="Example: nfq-agent status --json")
def status(config: ConfigOption = None, instance: InstanceOption = None, json_: JsonOption = False) -> int:
    """Show what runs: queues, verdicts, workers, uninspected packets, rules, drift. Exit 1 if no agent runs."""
    from nfq_agent.cli import inspect

    return inspect.status(Flags(config, instance), json_)


@app.command(epilog="Example: nfq-agent rules --json")
def rules(config: ConfigOption = None, instance: InstanceOption = None, json_: JsonOption = False) -> int:
    """Show the rules of this instance as the kernel has them, with their counters."""
    from nfq_agent.cli import rule_verbs

    return rule_verbs.rules(Flags(config, instance), json_)


@app.command(epilog="Example: nfq-agent doctor")
def doctor(
    config: ConfigOption = None,
    instance: InstanceOption = None,
    json_: JsonOption = False,
    queue_num: QueueNumOption = None,
    copymode: CopyModeOption = None,
    log_5tuple: FiveTupleOption = False,
    af_family: FamilyOption = None,
) -> int:
    """Check this host for common problems, and say what to do. Exit 1 if a problem stops the agent."""
    from nfq_agent.cli import inspect

    return inspect.doctor(Flags(config, instance, queue_num, copymode, log_5tuple, af_family), json_)


@app.command(epilog="Example: nfq-agent demo")
def demo() -> int:
    """Show the whole job in a private network namespace. Nothing outside of it is changed."""
    from nfq_agent.cli.demo import tell

    return tell()


app.command(epilog=explain_verb.EXAMPLE)(explain_verb.explain)


@app.command(epilog="Example: nfq-agent elements rate-limit")
def elements(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="One element.", autocompletion=offering("type"))] = None,
) -> int:
    """List the elements, or show the options of one."""
    from nfq_agent.cli import catalogue

    return catalogue.elements(name)


@app.command(epilog="Example: nfq-agent chaos on main drop=0.2 delay=0.5 --for 30s")
def chaos(
    state: Annotated[OnOff, typer.Argument(metavar="on|off")],
    queue: Annotated[
        str | None,
        typer.Argument(
            metavar="QUEUE", help="The queue, by its name in the configuration.", autocompletion=offering("queue-name")
        ),
    ] = None,
    faults: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="Keys of element chaos: drop, delay, corrupt, duplicate.", autocompletion=offering("fault")
        ),
    ] = None,
    last: ForOption = "30s",
    config: ConfigOption = None,
    instance: InstanceOption = None,
) -> int:
    """Break the traffic of a queue for a time. The faults end by themselves, also when this terminal is lost."""
    from nfq_agent.cli import requests
    from nfq_agent.values import duration

    if (state is OnOff.on) != (queue is not None):
        raise typer.BadParameter("on takes a queue and faults, off takes neither")
    try:
        seconds = duration(last)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="'--for'") from error
    return requests.chaos(Flags(config, instance), queue, faults or [], seconds)


@app.command(epilog="Example: nfq-agent new-element scan-guard --into /etc/nfq-agent")
def new_element(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Small letters, digits and hyphens.")],
    into: Annotated[Path, typer.Option("--into", metavar="FOLDER", help="Where the files are written.")] = Path(),
) -> int:
    """Write the file, the test and the configuration of a new element."""
    from nfq_agent.cli import catalogue

    return catalogue.new_element(name, into)


@app.command(epilog="Example: nfq-agent replay week.pcapng --config new.toml --against old.toml")
def replay(
    capture: CaptureArgument,
    config: ConfigOption = None,
    instance: InstanceOption = None,
    against: Annotated[
        Path | None,
        typer.Option("--against", metavar="FILE", help="The configuration to compare with; else the verdicts in the capture."),
    ] = None,
    enforce: Annotated[bool, typer.Option("--enforce", help="Judge as if queues in monitor mode enforced.")] = False,
    json_: JsonOption = False,
) -> int:
    """Judge a capture by a configuration. Exit 4 if something that passed would be dropped. Needs no root and no agent."""
    from nfq_agent.cli.replay import replay as run

    return run(Flags(config, instance), capture, against, enforce, json_)


app.command(epilog=learn_verb.EXAMPLE)(learn_verb.learn)


@app.command(epilog="Example: nfq-agent top 'unit = payments.service and bytes > 1000' --for 60")
def top(
    what: FilterArgument = "",
    config: ConfigOption = None,
    instance: InstanceOption = None,
    last: ForOption = "",
    json_: JsonOption = False,
) -> int:
    """Show the live flows by rate, until q: who, name, verdict, rule. Needs no root for members of group nfq-agent-flows."""
    from nfq_agent.cli.flow_records import seconds_of
    from nfq_agent.cli.top import top as run

    return run(Flags(config, instance), what, seconds_of(last), json_)


@app.command(epilog="Example: nfq-agent trace 'name ~ *.stripe.com and verdict = drop' --for 60")
def trace(
    what: FilterArgument = "",
    config: ConfigOption = None,
    instance: InstanceOption = None,
    last: ForOption = "60s",
    json_: JsonOption = False,
) -> int:
    """Show the way of each matching packet through the elements: which was asked, by which rule.

    Needs no root for members of group nfq-agent-flows.
    """
    from nfq_agent.cli.flow_records import seconds_of
    from nfq_agent.cli.trace import trace as run

    return run(Flags(config, instance), what, seconds_of(last), json_)


app.command(epilog=export_verb.EXAMPLE)(export_verb.export)


@app.command(epilog="Example: nfq-agent metrics --instance web")
def metrics(
    config: ConfigOption = None,
    instance: InstanceOption = None,
    listen: Annotated[
        str | None,
        typer.Option("--listen", metavar="ADDRESS:PORT", help="Answer scrapes there, or on the socket that systemd passes."),
    ] = None,
) -> int:
    """Print the metrics of the running agents, for Prometheus. Needs no root for members of group nfq-agent."""
    from nfq_agent.cli import scrape
    from nfq_agent.values import Endpoint

    flags = Flags(config, instance)
    if listen is None:
        return scrape.show(flags)
    try:
        return scrape.serve(flags, Endpoint.parse(listen))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="'--listen'") from error


@app.command(epilog="Example: nfq-agent bugreport --anonymize")
def bugreport(
    config: ConfigOption = None,
    instance: InstanceOption = None,
    output: OutputOption = None,
    anonymize: Annotated[bool, typer.Option("--anonymize", help="Replace addresses and names.")] = False,
) -> int:
    """Write one file with configuration, status, rules, findings and log, for a report of a problem."""
    from nfq_agent.cli.bugreport import bugreport as write

    return write(Flags(config, instance), output, anonymize)
