"""`run` and `reload`: serving in this process, and having the running agent read its configuration again."""

from __future__ import annotations

import sys

from nfq_agent.cli import loading, show
from nfq_agent.cli.app import Flags
from nfq_agent.config.environment import log_settings
from nfq_agent.service import control


def run(flags: Flags) -> int:
    """Serve until a signal stops it."""
    loaded = loading.configuration(flags)
    # Imported once the configuration is known to be good, so that a fault is reported quickly.
    from nfq_agent.host.journal import open_log
    from nfq_agent.service.supervisor import Supervisor
    from nfq_agent.service.system import this_host

    settings = log_settings(loaded.log)
    log = open_log(settings.format, settings.level)
    # A reload does not check listeners: this agent holds them. A new one that is not free fails when it is opened.
    return Supervisor(lambda: loading.configuration(flags), loading.checked(loaded), log, this_host()).run()


def reload(flags: Flags) -> int:
    """Ask the running agent, and wait for its answer."""
    name = loading.instance_of(flags)
    answer = control.ask(name, {"verb": "reload"}, 60, lambda: show.note(f"instance {name}: still reloading ..."))
    if answer.get("ok"):
        show.note(str(answer["message"]))
        return 0
    print(answer.get("message", "the agent gave no reason"), file=sys.stderr)
    return 78 if answer.get("config") else 1
