"""Patterns as people write them: one that can fit nothing is refused, or a list in another form would block nothing. Pure."""

from __future__ import annotations

import re
from typing import Final

from nfq_agent.patterns import SPECIAL, ascii_form

# What a line of a hosts file begins with (hosts(5)); one of a list for browsers, or the address of a page.
_HOSTS_LINE: Final = re.compile(r"[0-9A-Fa-f]*[.:][0-9A-Fa-f.:]*\s+\S")
_OF_BROWSERS: Final = re.compile(r"\|\||@@|.*://")
# What is in the names that clients send in a ClientHello or a request, and in patterns of them; addresses come without brackets.
_CLAIMED: Final = re.compile(r"[A-Za-z0-9_.*?\[\]!-]+")
_ADDRESS: Final = re.compile(r"[0-9A-Fa-f:.*?\[\]!-]+")
_WITH_PORT: Final = re.compile(r"[^:]+:[0-9]+")
_IN_BRACKETS: Final = re.compile(r"\[[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*\]")
_WHOLE_ID: Final = re.compile(r"[0-9a-f]{64}")
_HOST: Final = 'allowed: a name as "www.example.org", or a pattern as "*.example.org"'


def host_glob(text: str) -> str:
    """A pattern of host names. Raises ValueError, as the others."""
    if not text:
        raise ValueError(f"a name is empty; {_HOST}")
    if not text.isprintable():
        raise ValueError(f"{text!r} has a character that cannot be printed; {_HOST}")
    if _HOSTS_LINE.match(text):
        raise ValueError(f"{text!r} has an address before the name, as lines of a hosts file; {_HOST}")
    if _OF_BROWSERS.match(text):
        raise ValueError(f"{text!r} is not a host name; {_HOST}")
    return text


def claim_glob(text: str) -> str:
    """A pattern of the names that clients send in a ClientHello or a request: letters, digits, hyphens, underscores and dots."""
    if _CLAIMED.fullmatch(text):
        # Most of a long list: nothing below is about one of these characters.
        return text
    form = ascii_form(host_glob(text))
    if _WITH_PORT.fullmatch(form):
        raise ValueError(f"{text!r} has a port, which is no part of a name; {_HOST}")
    if _IN_BRACKETS.fullmatch(form):
        raise ValueError(f"{text!r} is an address in brackets; {_HOST}, or an address without them")
    if not (_CLAIMED.fullmatch(form) or _ADDRESS.fullmatch(form)):
        raise ValueError(f"{text!r} is not a host name; {_HOST}")
    return text


def unit_glob(text: str) -> str:
    """A pattern of systemd units: their names have a suffix."""
    if not ("." in text or SPECIAL.search(text)):
        raise ValueError(
            f'{text!r} is not the name of a unit; allowed: a name as "payments.service", or a pattern as "payments@*"'
        )
    return text


def container_glob(text: str) -> str:
    """A pattern of containers, which are known by their names or by the first 12 digits of their ids."""
    if not text or _WHOLE_ID.fullmatch(text):
        what = f"{text!r} is a whole id" if text else "a name is empty"
        raise ValueError(f'{what}; allowed: a name, the first 12 digits of an id, or a pattern as "web-*"')
    return text


def cgroup_glob(text: str) -> str:
    """A pattern of control groups, by their absolute paths."""
    return _absolute(text, 'a path as "/system.slice/nginx.service", or a pattern as "*/nginx.service"')


def exe_glob(text: str) -> str:
    """A pattern of programs, by their absolute paths."""
    return _absolute(text, 'a path as "/usr/bin/curl", or a pattern as "*/curl"')


def _absolute(text: str, allowed: str) -> str:
    if text[:1] not in ("/", "*", "?", "["):
        raise ValueError(f"{text!r} is not an absolute path; allowed: {allowed}")
    return text
