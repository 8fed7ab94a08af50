"""The verbs. Each takes its words, does its work through the modules below it, and returns an exit code."""

from __future__ import annotations

import os
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from nfq_agent.capture.serving import host_faults, taken
from nfq_agent.cli import running, show
from nfq_agent.cli.confirm import Guard
from nfq_agent.config.file import DEFAULT_PATH, load
from nfq_agent.config.models import Agent, Config, ConfigError, log_settings, target_in_force, warnings
from nfq_agent.host import routes
from nfq_agent.host.users import ensure_user, find_user
from nfq_agent.host.xtables.backend import choose, usable
from nfq_agent.rules.plan import plan as plan_rules
from nfq_agent.rules.plan import redirects
from nfq_agent.service import control
from nfq_agent.service.live_rules import LiveRules, compare, listing
from nfq_agent.service.policy_generation import foreseen

app = typer.Typer(
    name="nfq-agent",
    help="Takes traffic through netfilter, judges it, and leaves nothing behind when it goes.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        metavar="FILE",
        readable=False,
        help="The configuration; by default /etc/nfq-agent/nfq-agent.toml, else the baseline.",
    ),
]
InstanceOption = Annotated[
    str | None, typer.Option("--instance", metavar="NAME", help="The instance, whatever the configuration says.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")]


class CopyMode(StrEnum):
    """--copymode"""

    packet = "packet"
    meta = "meta"
    none = "none"


class AddressFamily(StrEnum):
    """--af-family"""

    unspec = "unspec"
    inet = "inet"
    inet6 = "inet6"


def _load(path: Path | None, instance: str | None = None, flags: dict[str, Any] | None = None) -> Config:
    """The configuration with what the command line says on top. Raises ConfigError."""

    def adjust(merged: dict[str, Any]) -> dict[str, Any]:
        return _overrides(merged, instance, flags or {})

    return load(path, adjust)


def _foreseen(config: Config) -> Config:
    """The configuration with the marks that a start or a reload would give to offloaded flows."""
    return foreseen(config, control.folder() / f"{config.agent.instance}.generations")


def _overrides(merged: dict[str, Any], instance: str | None, flags: dict[str, Any]) -> dict[str, Any]:
    """The seed's flags as keys of the configuration."""
    over: dict[str, Any] = {"agent": {"instance": instance}} if instance is not None else {}
    queues = {name: table for name, table in merged.get("queue", {}).items() if isinstance(table, dict)}
    if (number := flags.get("queue_num")) is not None:
        if len(queues) != 1:
            raise ConfigError([f"command line: --queue-num: {len(queues)} queues are configured; allowed: with one queue"])
        (name,) = queues
        if "balance" in queues[name]:
            raise ConfigError([f"command line: --queue-num: [queue.{name}] has balance; allowed: with num"])
        over.setdefault("queue", {}).setdefault(name, {})["num"] = number
    for name, table in queues.items():
        mine = over.setdefault("queue", {}).setdefault(name, {})
        if flags.get("copymode") is not None:
            mine["copy"] = flags["copymode"]
        elements = table.get("elements", [])
        if flags.get("log_5tuple") and isinstance(elements, list) and "log" not in elements:
            # Last in the chain: it sees what the others decided.
            mine["elements"] = [*elements, "log"]
    if flags.get("af_family") is not None:
        over["rules"] = {name: {"family": flags["af_family"]} for name in merged.get("rules", {})}
    return over


@app.command(epilog="Example: nfq-agent run --log-5tuple --queue-num 7")
def run(
    config: ConfigOption = None,
    instance: InstanceOption = None,
    queue_num: Annotated[int | None, typer.Option("--queue-num", metavar="N", help="The queue's number, 0 to 65535.")] = None,
    copymode: Annotated[CopyMode | None, typer.Option("--copymode", help="What the kernel copies of a packet.")] = None,
    log_5tuple: Annotated[bool, typer.Option("--log-5tuple", help="Log protocol, addresses and ports of each packet.")] = False,
    af_family: Annotated[AddressFamily | None, typer.Option("--af-family", help="Address family of all rules.")] = None,
) -> int:
    """Serve in the foreground until told to stop (what the systemd unit starts)."""
    flags = {"queue_num": queue_num, "copymode": copymode and copymode.value, "log_5tuple": log_5tuple,
             "af_family": af_family and af_family.value}  # fmt: skip
    loaded = _load(config, instance, flags)
    # Not before the configuration is known to be good: a fault is answered without waking the rest.
    from nfq_agent.host.journal import open_log
    from nfq_agent.service.supervisor import Supervisor

    settings = log_settings(loaded.log)
    log = open_log(settings.format, settings.level)
    # A reload finds the listeners in use: by this very agent. One that is new and not free fails when it is opened.
    return Supervisor(lambda: _load(config, instance, flags), _checked(loaded), log).run()


def _checked(config: Config) -> Config:
    """The configuration, if this host can take it as well: listeners that others hold are a fault. Raises ConfigError."""
    from nfq_agent.cli.doctor import listener_faults

    for proxy in config.proxy.values():
        # What the environment says is part of it.
        target_in_force(proxy)
    if faults := listener_faults(config) + host_faults(config):
        raise ConfigError(faults)
    return config


@app.command(epilog="Example: nfq-agent check --config /etc/nfq-agent/nfq-agent.toml")
def check(config: ConfigOption = None, instance: InstanceOption = None) -> int:
    """Say whether a configuration is good: every fault on a line, exit 78."""
    loaded = _checked(_load(config, instance))
    log_settings(loaded.log)
    show.note(f"{config or (DEFAULT_PATH if DEFAULT_PATH.exists() else 'the baseline')}: good")
    for line in warnings(loaded):
        show.note(f"warning: {line}")
    return 0


@app.command(epilog="Example: nfq-agent plan --config new.toml")
def plan(config: ConfigOption = None, instance: InstanceOption = None, json_: JsonOption = False) -> int:
    """Show what applying would change, as rules in iptables text. Writes nothing; exit 3 if there is something to do."""
    loaded = _foreseen(_checked(_load(config, instance)))
    installation = LiveRules(choose(loaded.agent.backend, loaded.agent.instance, captures=redirects(loaded)))
    user = find_user(loaded.agent.user)
    ruleset = plan_rules(loaded, loaded.agent.user if user is None else user.uid, installation.host.lists)
    changes = compare(ruleset, installation.read())
    besides = show.side_effects(ruleset, installation.host, loaded.agent.user if user is None else None)
    if json_:
        found = show.plan_object(loaded.agent.instance, installation.host.name, changes, besides)
        show.json_object({**found, "interfaces": dict(taken(loaded))})
    else:
        show.plan(loaded.agent.instance, installation.host.name, changes, besides)
        for name, interfaces in taken(loaded):
            show.note(f"# {name} takes these interfaces, and others that match later: {', '.join(interfaces) or 'none now'}")
    return 3 if changes or user is None else 0


@app.command(epilog="Example: nfq-agent apply --confirm 60")
def apply(
    config: ConfigOption = None,
    instance: InstanceOption = None,
    confirm_within: Annotated[
        int | None,
        typer.Option(
            "--confirm", metavar="SECONDS", min=1, help="Take the rules away again unless confirmed within so many seconds."
        ),
    ] = None,
) -> int:
    """Put the rules in without serving; with bypass, traffic flows on."""
    loaded = _foreseen(_checked(_load(config, instance)))
    _refuse_beside_agent(loaded.agent.instance)
    user, made = ensure_user(loaded.agent.user)
    if made:
        show.note(f"made the system user {loaded.agent.user} (uid {user.uid})")
    # The rules outlive this process, and the table that they are in.
    installation = LiveRules(choose(loaded.agent.backend, loaded.agent.instance, captures=redirects(loaded), persist=True))
    guard = None if confirm_within is None else Guard(confirm_within, installation, installation.read())
    done = installation.apply(plan_rules(loaded, user.uid, installation.host.lists))
    changes = {family: settled.changes for family, settled in done.items() if settled.changes}
    show.changes(changes)
    closed = [name for name, queue in loaded.queue.items() if not queue.bypass]
    if closed:
        show.note(f"warning: nobody serves {', '.join(closed)}, and bypass = false: its traffic is kept out until an agent runs")
    if guard is None:
        return 0
    if not changes:
        guard.dismiss()
        return 0
    return guard.ask()


def _refuse_beside_agent(instance: str) -> None:
    try:
        control.ask(instance, {"verb": "ping"}, timeout=5)
    except control.NotRunning:
        return
    raise control.ControlError(f"the agent of instance {instance} is running and keeps its own rules; use `nfq-agent reload`")


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
) -> int:
    """Take away exactly this instance's rules. Needs no configuration; none left to remove is success."""
    name = _instance_for_removal(config, instance)
    failed = after_failure and os.environ.get("SERVICE_RESULT", "success") != "success"
    if not after_failure:
        _refuse_removal_beside_agent(name)
    removed = 0
    for host in usable(name):
        done = LiveRules(host).remove(keep_fail_closed=failed)
        changes = {family: settled.changes for family, settled in done.items() if settled.changes}
        removed += sum(len(steps) for each in changes.values() for steps in each.values())
        show.changes(changes)
        host.close()
    if routes.sweep(name):
        removed += 1
        show.note(f"removed the routing rules of instance {name} (TPROXY)")
    if not removed:
        show.note(f"nothing to remove: no rule of instance {name} is here")
    return 0


def _instance_for_removal(path: Path | None, instance: str | None) -> str:
    """The instance, also where the configuration is broken or gone."""
    if instance is not None:
        return instance
    try:
        return load(path).agent.instance
    except ConfigError:
        if path is not None:
            raise
        return Agent().instance


def _refuse_removal_beside_agent(instance: str) -> None:
    try:
        answer = control.ask(instance, {"verb": "ping"}, timeout=5)
    except control.ControlError:
        return
    raise control.ControlError(
        f"the agent of instance {instance} runs (pid {answer.get('pid')}) and would put its rules back; stop it, and they go"
    )


@app.command(epilog="Example: nfq-agent reload")
def reload(config: ConfigOption = None, instance: InstanceOption = None) -> int:
    """Ask the running agent to take its configuration anew, and wait: exit 0 only when it is in force."""
    name = instance or _load(config).agent.instance
    answer = control.ask(name, {"verb": "reload"}, 60, lambda: show.note(f"the agent of instance {name} is at it ..."))
    if answer.get("ok"):
        show.note(str(answer["message"]))
        return 0
    print(answer.get("message", "the agent gave no reason"), file=sys.stderr)
    return 78 if answer.get("config") else 1


@app.command(epilog="Example: nfq-agent status --json")
def status(config: ConfigOption = None, instance: InstanceOption = None, json_: JsonOption = False) -> int:
    """Say what is running: queues, verdicts, workers, rules, drift. Exit 1 if no agent runs."""
    from nfq_agent.cli import show_status

    name = instance or _load(config).agent.instance
    try:
        if json_:
            show.json_object(running.status_object(name))
        else:
            show_status.status(running.status(name), running.others(name), time.time())
    except control.NotRunning as error:
        if json_:
            show.json_object({"instance": name, "running": False})
        else:
            show.note(f"{error}; `nfq-agent rules` shows whether rules were left")
        return 1
    return 0


@app.command(epilog="Example: nfq-agent rules --json")
def rules(config: ConfigOption = None, instance: InstanceOption = None, json_: JsonOption = False) -> int:
    """Show this instance's rules as the kernel has them, with their counters."""
    loaded = _load(config, instance)
    found = [(host.name, each) for host in usable(loaded.agent.instance) for each in listing(LiveRules(host).read())]
    if json_:
        show.json_object(show.rules_object(loaded.agent.instance, found))
    else:
        show.rules(loaded.agent.instance, found)
    return 0


@app.command(epilog="Example: nfq-agent doctor")
def doctor(config: ConfigOption = None, instance: InstanceOption = None, json_: JsonOption = False) -> int:
    """Look at what usually goes wrong on a host and say what to do. Exit 1 if something stands in the way."""
    from nfq_agent.cli.doctor import examine

    findings = examine(_load(config, instance))
    if json_:
        show.json_object({"findings": [finding.as_object() for finding in findings]})
    else:
        show.findings(findings)
    return 1 if any(finding.level == "fault" for finding in findings) else 0


@app.command(epilog="Example: nfq-agent demo")
def demo() -> int:
    """Show the whole job in a private network namespace, where it can harm nothing."""
    from nfq_agent.cli.demo import tell

    return tell()
