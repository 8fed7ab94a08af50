"""From argv to a verb to an exit code; the only place that exits.

0 done, 1 runtime failure, 2 usage, 3 `plan` found a change to make, 78 (EX_CONFIG of sysexits.h) bad configuration.
"""

from __future__ import annotations

import errno
import gc
import importlib
import io
import os
import sys
from typing import Final

# A full file system, a quota, or a limit of file size.
_NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# The variable by which a shell asks for completions (click's name for it).
_COMPLETE: Final = "_NFQ_AGENT_COMPLETE"


def main() -> None:
    """Run the verb that the command line names, or answer the shell's question for completions."""
    _open_standard_streams()
    try:
        quick = _completed() if _COMPLETE in os.environ else _unparsed()
        code = _parsed() if quick is None else quick
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        # The reader of our output has closed it (`| head`).
        _discard_output()
        code = 0
    except Exception as error:
        code = _failed(error)
    sys.exit(code)


def _unparsed() -> int | None:
    """The exit code of `run` as the units have it, and of `status`; None for all else. The parser would take a fifth of
    the time of a start, and packets wait for a start after a crash."""
    verb, *rest = sys.argv[1:] or [""]
    if (verb, "QUEUE_NUM" in os.environ) != ("run", False) and verb != "status":
        return None
    from nfq_agent.cli.flags import plain

    as_json = verb == "status" and "--json" in rest
    if as_json:
        rest.remove("--json")
    if (flags := plain(rest)) is None:
        return None
    if verb == "status":
        from nfq_agent.cli import inspect

        return inspect.status(flags, as_json)
    # Modules are not garbage. `serve.run` switches the collector on.
    gc.disable()
    from nfq_agent.cli import serve
    from nfq_agent.host.users import use_permitted

    use_permitted()
    return serve.run(flags)


def _parsed() -> int:
    """What the command line says."""
    import typer

    from nfq_agent.cli.app import two_dashes
    from nfq_agent.cli.verbs import app

    if _COMPLETE not in os.environ:
        from nfq_agent.host.users import use_permitted

        use_permitted()
    try:
        return int(app(two_dashes(sys.argv[1:]), standalone_mode=False) or 0)
    except typer.TyperException as error:
        # Without a message of its own it is the help, which was printed.
        if message := _plainly(error.format_message()):
            _say(f"nfq-agent: {message}{'' if message.endswith('?') else ';'} see `nfq-agent {_verb_of(error)}--help`")
        return error.exit_code
    except typer.Abort:
        return 130
    except SystemExit as error:
        # The library would exit with 1 where the reader of our output has closed it.
        if isinstance(error.__context__, BrokenPipeError):
            raise error.__context__ from None
        raise


# What the command line's library says about a value, and what is printed instead.
_PLAINLY: Final = (
    (r"\.$|Value error, ", ""),
    (r"Input should be a valid (?:integer|number), .*", "not a whole number"),
    (r"Input should be greater than or equal to (\S+)", r"allowed: at least \1"),
    (r"Input should be less than or equal to (\S+)", r"allowed: at most \1"),
)


def _plainly(message: str) -> str:
    import re

    for pattern, instead in _PLAINLY:
        message = re.sub(pattern, instead, message)
    return message


def _verb_of(error: object) -> str:
    """The verb whose arguments are wrong, with a space behind it; nothing where no verb was recognized."""
    context = getattr(error, "ctx", None)
    return f"{context.info_name} " if context is not None and context.parent is not None else ""


def _completed() -> int | None:
    """Answer a question for completions by the table of the package. None where the command line's library is to answer."""
    try:
        # Made when the package is built.
        table = importlib.import_module("nfq_agent.cli.completion_table").TABLE
    except ImportError:
        return None
    from nfq_agent.cli.quick_completion import answer

    if (said := answer(os.environ, table)) is None:
        return None
    text, code = said
    if text:
        print(text)
    return code


def _open_standard_streams() -> None:
    """Put /dev/null where standard input, output or error is closed: a socket opened later would take its number and receive
    its text."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            # The lowest free number is the one that is missing.
            os.open(os.devnull, os.O_RDWR)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  # for as long as the process lives
    # A locale without UTF-8 has no form for some characters, and a name of a file may be no text at all.
    for stream in (sys.stdout, sys.stderr):
        if not isinstance(stream, io.TextIOWrapper):
            continue
        # In the locale C Python escapes what came from bytes, and fails at all else.
        if stream.errors == "strict" or (stream.errors == "surrogateescape" and stream.encoding.lower() != "utf-8"):
            stream.reconfigure(errors="replace")


def _failed(error: Exception) -> int:
    """Print a failure that has a name, and return its exit code. Raises any other."""
    # Imported only here: the modules of these classes take longer to load than a verb's help to print.
    from nfq_agent.config.models import ConfigError
    from nfq_agent.host.users import UserError
    from nfq_agent.rules.model import RuleError
    from nfq_agent.service.control import ControlError
    from nfq_agent.service.status import StatusError

    if isinstance(error, ConfigError):
        for fault in error.faults:
            _say(fault)
        return 78
    if isinstance(error, RuleError | ControlError | StatusError | UserError):
        _say(f"nfq-agent: {error}")
        return 1
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        # Text that is still in the buffer would fail once more at the end.
        _discard_output()
        what = error.filename or "standard output"
        _say(f"nfq-agent: {what} cannot be written: {error.strerror}; free some space there, or write elsewhere")
        return 1
    raise error


def _say(line: str) -> None:
    """Print it on standard error, if that can be written; the exit code says it as well. On a terminal the lines are wrapped."""
    try:
        print(_wrapped(line) if sys.stderr.isatty() else line, file=sys.stderr, flush=True)
    except OSError:
        # Text that comes later, as a warning at the end, would fail as well, and Python would exit with 120.
        _discard_output(2)


def _wrapped(line: str) -> str:
    import shutil
    import textwrap

    width = shutil.get_terminal_size().columns
    return textwrap.fill(line, width, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)


def _discard_output(descriptor: int = 1) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


if __name__ == "__main__":
    main()
