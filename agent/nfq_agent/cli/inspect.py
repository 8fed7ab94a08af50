"""`check`, `status` and `doctor`: what is configured, what runs, and what is wrong. They change nothing.

`status` is run often, so each verb imports only what it needs.
"""

from __future__ import annotations

import time

from nfq_agent.cli import loading, running, show
from nfq_agent.cli.flags import Flags
from nfq_agent.service import control


def check(flags: Flags, code: bool) -> int:
    """Print that the configuration is valid, and its warnings. code: as before a restart."""
    from nfq_agent.config.environment import log_settings
    from nfq_agent.config.file import DEFAULT_PATH
    from nfq_agent.config.policy_summary import summary, told
    from nfq_agent.config.warnings import warnings
    from nfq_agent.service.confinement import exemptions
    from nfq_agent.service.planned import not_compiled

    if code:
        from nfq_agent.service.supervisor import Supervisor

        del Supervisor
    loaded = loading.checked(loading.configuration(flags), restarts=code)
    log_settings(loaded.log)
    show.wrapped(f"{flags.config or (DEFAULT_PATH if DEFAULT_PATH.exists() else 'the baseline')}: valid")
    for line in told(summary(loaded)):
        show.prose(line, 4)
    for line in exemptions(loaded):
        show.prose(f"exemption: {line}", 11)
    for line in warnings(loaded):
        show.prose(f"warning: {line}", 9)
    for name, queue in loaded.queue.items():
        if why := not_compiled(loaded, queue, loaded.agent.backend):
            show.prose(f"note: on this host, queue {name} is not compiled: {why}", 6)
    return 0


def status(flags: Flags, as_json: bool) -> int:
    """Print the status of the running agent."""
    from nfq_agent.cli import show_status

    name = loading.instance_of(flags)
    try:
        if as_json:
            show.json_object(running.status_object(name))
        else:
            show_status.status(running.status(name), running.others(name), time.time())
    except control.NotRunning as error:
        if as_json:
            show.json_object({"instance": name, "running": False})
        else:
            show.wrapped(f"{error}; `nfq-agent rules` shows whether rules were left")
            show_status.others(running.others(name), time.time())
        return 1
    return 0


def doctor(flags: Flags, as_json: bool) -> int:
    """Print the findings."""
    from nfq_agent.cli.doctor import examine
    from nfq_agent.cli.finding import Finding

    found, faults = loading.whatever_can_be_read(flags)
    findings = [*examine(found), *(Finding("error", "configuration", text) for text in faults)]
    if as_json:
        show.json_object({"findings": [finding.as_object() for finding in findings]})
    else:
        show.findings(findings)
    return 1 if any(finding.level == "error" for finding in findings) else 0
