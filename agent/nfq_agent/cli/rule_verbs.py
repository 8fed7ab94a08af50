"""`plan`, `apply`, `remove` and `rules`: the rules of an instance, without an agent."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from nfq_agent.capture.serving import taken
from nfq_agent.cli import loading, show
from nfq_agent.cli.confirm import Guard
from nfq_agent.cli.flags import Flags
from nfq_agent.cli.replay import replayed, tell
from nfq_agent.cli.show import PolicyPlan
from nfq_agent.config.file import load_table
from nfq_agent.config.models import Config, ConfigError
from nfq_agent.config.policy_summary import differences, summary, told
from nfq_agent.host import cgroups, filters, pairs, routes
from nfq_agent.host.users import ensure_user, find_user
from nfq_agent.host.xtables.backend import choose, everywhere
from nfq_agent.rules.group_tree import GroupTree
from nfq_agent.rules.groups import Numbers, bound, needs_tree, paths
from nfq_agent.rules.leaving import fail_closed
from nfq_agent.rules.model import FAMILIES, RuleError, Ruleset
from nfq_agent.rules.proxies import accept_rules, redirects
from nfq_agent.service import control
from nfq_agent.service.instance_lock import living_agent
from nfq_agent.service.live_rules import LiveRules, compare, listing
from nfq_agent.service.planned import planned


def plan(flags: Flags, as_json: bool, capture: Path | None) -> int:
    """Print what `apply`, or a reload of the running agent, would change; with a capture, also for its flows."""
    loaded = loading.with_marks(loading.checked(loading.configuration(flags)))
    live = LiveRules(choose(loaded.agent.backend, loaded.agent.instance, captures=redirects(loaded)))
    user = find_user(loaded.agent.user)
    ruleset = planned(loaded, loaded.agent.user if user is None else user.uid, live.host)
    numbers = _group_numbers(ruleset)
    changes = compare(bound(ruleset, numbers, _group_tree(ruleset)), live.read())
    besides = show.side_effects(ruleset, live.host, loaded.agent.user if user is None else None)
    policy, running = _policy_plan(loaded, flags.config)
    besides += [
        f"{cgroups.absence(path)}; a running agent puts its rules in when it appears"
        for path, each in numbers.items()
        if each is None
    ]
    if accept_rules(loaded):
        besides.append("with accept_input a running agent also accepts at the head of nf_tables chains that drop in hook INPUT")
    code = 3 if changes or policy.changed or user is None else 0
    if as_json:
        found = show.plan_object(loaded.agent.instance, live.host.name, changes, besides, policy)
        done = None if capture is None else replayed(flags, capture, running, enforce=False)
        judged = {} if capture is None else {"replay": None if done is None else done.as_object()}
        show.json_object({**found, "interfaces": dict(taken(loaded)), **judged})
        return code if capture is None else 1 if done is None else done.code or code
    show.plan(loaded.agent.instance, live.host.name, changes, besides if changes or user is None else [], policy)
    for name, interfaces in taken(loaded):
        how = _how_taken(loaded, name)
        show.comment(f"# {name} {how} these interfaces, and others that match later: {', '.join(interfaces) or 'none now'}")
    if capture is None:
        return code
    if (done := replayed(flags, capture, running, enforce=False)) is None:
        return 1
    tell(done, "" if running is None else "by the running agent", "beside a running agent its configuration is compared with")
    # Worse than a change is one that drops what passed.
    return done.code or code


def _how_taken(config: Config, table: str) -> str:
    """What a tap or an inline link does with interfaces."""
    kind, _, name = table.partition(".")
    if kind == "tap":
        return "takes"
    way = "filters of clsact" if filters.wanted(config.inline[name].attach) else "tcx links"
    return f"takes, by programs on both sides ({way}),"


def _group_numbers(ruleset: Ruleset) -> Numbers:
    """The numbers of the control groups that the rules name, as they are now."""
    return {path: cgroups.number(path) for path in paths(ruleset)}


def _group_tree(ruleset: Ruleset) -> GroupTree:
    """All control groups, where a rule asks for them."""
    return GroupTree(cgroups.all_groups() if needs_tree(ruleset) else ())


def _policy_plan(config: Config, path: Path | None) -> tuple[PolicyPlan, Config | None]:
    """What changes beside the policies of the running agent, and its configuration, as far as it can be had; without an agent,
    what the policies are. path: of the main file, beside which elements are looked for."""
    after = summary(config)
    try:
        answer = control.ask(config.agent.instance, {"verb": "policies"}, timeout=5)
    except control.NotRunning:
        answer = {}
    except control.ControlError as error:
        return PolicyPlan([f"what the running agent does now is not known: {error}"], False), None
    before, table = answer.get("queues"), answer.get("table")
    if before is None:
        return PolicyPlan(list(told(after)), False), None
    running = None
    # It may be of another version, or of files that are gone.
    with contextlib.suppress(ConfigError):
        running = None if table is None else load_table(table, path)
    return PolicyPlan(list(differences(before, after)), True), running


def apply(flags: Flags, confirm_within: int | None) -> int:
    """Insert the rules."""
    loaded = loading.with_marks(loading.checked(loading.configuration(flags)))
    _refuse_beside_agent(loaded.agent.instance)
    user, made = ensure_user(loaded.agent.user)
    if made:
        show.wrapped(f"created the system user {loaded.agent.user} (uid {user.uid})")
    # The rules outlive this process, and the table that they are in.
    live = LiveRules(choose(loaded.agent.backend, loaded.agent.instance, captures=redirects(loaded), persist=True))
    ruleset = planned(loaded, user.uid, live.host)
    numbers = _group_numbers(ruleset)
    for path in (path for path, each in numbers.items() if each is None):
        # Without an agent nothing would put its rules in when it appears.
        raise RuleError(f"{cgroups.absence(path)}; start it first: only a running agent waits for it")
    ruleset = bound(ruleset, numbers, _group_tree(ruleset))
    guard = None if confirm_within is None else Guard(confirm_within, live, live.read(), ruleset)
    done = live.apply(ruleset)
    # Another process must hold them too: the guard may have to undo the change.
    live.close()
    changes = {family: applied.changes for family, applied in done.items() if applied.changes}
    show.changes(changes)
    closed = [name for name, queue in loaded.queue.items() if not queue.bypass]
    if closed:
        show.wrapped(
            f"warning: no agent serves {', '.join(closed)}, and bypass = false: its traffic is dropped until an agent runs"
        )
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
        if not (agent := living_agent(instance)):
            return
        where = f" with another /run ({agent})"
    else:
        where = ""
    raise control.ControlError(
        f"the agent of instance {instance} is running{where} and keeps its own rules; use `nfq-agent reload`"
    )


def remove(flags: Flags, after_failure: bool) -> int:
    """Remove the rules. Reads of the configuration only the instance, and works with a broken one."""
    name = loading.instance_of(flags)
    failed = after_failure and os.environ.get("SERVICE_RESULT", "success") != "success"
    if not after_failure:
        _refuse_removal_beside_agent(name)
    return clean(name, failed)


def clean(name: str, failed: bool) -> int:
    """Remove all that an instance has put into the kernel. failed: leave the rules that block traffic. Raises RuleError."""
    removed, problems = _removed_everywhere(name, failed)
    if routes.sweep(name):
        removed += 1
        show.wrapped(f"removed the routing rules of instance {name} (TPROXY)")
    if pairs_removed := pairs.sweep(f"{pairs.ALIAS}{name}:"):
        removed += 1
        show.wrapped(f"removed {pairs_removed} interface pair{'s' * (pairs_removed > 1)} of instance {name} (inline)")
    if filters_removed := filters.sweep(f"{pairs.ALIAS}{name}:"):
        removed += 1
        show.wrapped(f"removed {filters_removed} filter{'s' * (filters_removed > 1)} of instance {name} (inline)")
    if problems:
        raise RuleError("; ".join(problems))
    if not removed:
        show.wrapped(f"nothing to remove: no rule of instance {name} is installed")
    return 0


def _removed_everywhere(instance: str, failed: bool) -> tuple[int, list[str]]:
    """Remove the rules of an instance from every place; returns how many changes that took, and why a place could not be
    cleaned."""
    removed = 0
    problems: list[str] = []
    for place in everywhere(instance):
        try:
            kept = {family: fail_closed(place.read(family)) if failed else {} for family in FAMILIES}
            done = place.apply_all(kept, undo=False)
            place.close()
        except RuleError as error:
            problems.append(f"{place.name}: {error}")
            continue
        changes = {family: applied.changes for family, applied in done.items() if applied.changes}
        removed += sum(len(steps) for each in changes.values() for steps in each.values())
        if changes:
            show.changes(changes)
    return removed, problems


def _refuse_removal_beside_agent(instance: str) -> None:
    try:
        agent = f"pid {control.ask(instance, {'verb': 'ping'}, timeout=5).get('pid')}"
    except control.NotRunning:
        # One with another /run.
        agent = living_agent(instance)
    except control.ControlError:
        # One that hangs must not keep its rules.
        return
    if agent:
        raise control.ControlError(
            f"the agent of instance {instance} is running ({agent}) and would insert its rules again; "
            "stop it, and it removes them"
        )


def rules(flags: Flags, as_json: bool) -> int:
    """Print the installed rules."""
    name = loading.instance_of(flags)
    found = [
        (place.name, each) for place in everywhere(name) for each in listing({family: place.read(family) for family in FAMILIES})
    ]
    if as_json:
        show.json_object(show.rules_object(name, found))
    else:
        show.rules(name, found)
    return 0
