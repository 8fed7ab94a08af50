"""From argv to a verb to an exit code; the only place that exits.

0 done, 1 runtime failure, 2 usage, 3 `plan` found something to do, 78 (EX_CONFIG of sysexits.h) bad configuration.
"""

from __future__ import annotations

import os
import sys

import typer

from nfq_agent.cli.verbs import app
from nfq_agent.config.models import ConfigError
from nfq_agent.host.users import UserError
from nfq_agent.rules.model import RuleError
from nfq_agent.service.control import ControlError
from nfq_agent.service.status import StatusError


def main() -> None:
    """Run the verb that the command line names."""
    try:
        code = app(standalone_mode=False)
    except ConfigError as error:
        for fault in error.faults:
            print(fault, file=sys.stderr)
        code = 78
    except (RuleError, ControlError, StatusError, UserError) as error:
        print(f"nfq-agent: {error}", file=sys.stderr)
        code = 1
    except typer.TyperException as error:
        # Without a word of its own it is the help, which has been shown.
        if message := error.format_message():
            print(f"nfq-agent: {message}; see `nfq-agent --help`", file=sys.stderr)
        code = error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except BrokenPipeError:
        # Whoever read our output has seen enough (`| head`).
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 0
    sys.exit(code)


if __name__ == "__main__":
    main()
