"""The error about rules of the kernel that cannot be read, with what to do."""

from __future__ import annotations

import errno

from nfq_agent.rules.model import RuleError


def unreadable(what: str, error: OSError) -> RuleError:
    """what: which rules, as `nf_tables`. error: the kernel's."""
    remedy = "; run as root, or with CAP_NET_ADMIN" if error.errno in (errno.EPERM, errno.EACCES) else ""
    return RuleError(f"{what} cannot be read: {error.strerror or error}{remedy}")
