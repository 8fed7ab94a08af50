"""The lock-out guard of `apply --confirm`: a change is taken back unless a person says yes in time.

The guard is a process of its own, so that a lost terminal, a killed session or a cut connection takes the change back too.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time

from nfq_agent.installation import Installation, State
from nfq_agent.rules import RuleError


def or_put_back(seconds: int, installation: Installation, before: State) -> int:
    """Ask for a `yes` on standard input; without one within `seconds`, put back what stood before. The exit code."""
    reader, writer = os.pipe()
    guard = os.fork()
    if guard == 0:
        os.close(writer)
        _guard(reader, seconds, installation, before)
    os.close(reader)
    print(f"The rules are in. Type yes within {seconds} s to keep them; otherwise they are taken back.", flush=True)
    confirmed = _answer(seconds)
    if confirmed:
        os.write(writer, b"y")
    os.close(writer)
    _, status = os.waitpid(guard, 0)
    if confirmed:
        print("Kept.")
        return 0
    if os.waitstatus_to_exitcode(status) != 0:
        print("Not confirmed, and the rules could not be taken back; run `nfq-agent remove`.", file=sys.stderr)
        return 1
    print("Not confirmed: what stood before is back.", file=sys.stderr)
    return 1


def _answer(seconds: int) -> bool:
    deadline = time.monotonic() + seconds
    typed = b""
    while (left := deadline - time.monotonic()) > 0:
        try:
            ready, _, _ = select.select([0], [], [], left)
            if not ready:
                return False
            chunk = os.read(0, 256)
        except (OSError, KeyboardInterrupt):
            return False
        if not chunk:
            # Nobody can type a yes here any more; the time is kept all the same.
            time.sleep(left)
            return False
        typed += chunk
        if b"\n" in typed:
            line, _, typed = typed.partition(b"\n")
            if line.strip().lower() in (b"yes", b"y"):
                return True
            print("Not a yes.", flush=True)
    return False


def _guard(reader: int, seconds: int, installation: Installation, before: State) -> None:
    """In a session of its own: wait for the word, else put back. EOF means that whoever asked is gone."""
    code = 1
    try:
        os.setsid()
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        # One second more than the person has, so that a late yes is not half a yes.
        ready, _, _ = select.select([reader], [], [], seconds + 1)
        if not (ready and os.read(reader, 1) == b"y"):
            installation.apply(
                {family: {name: each.as_rules() for name, each in tables.items()} for family, tables in before.items()}
            )
        code = 0
    except RuleError as error:
        print(f"nfq-agent: {error}", file=sys.stderr)
    finally:
        os._exit(code)
