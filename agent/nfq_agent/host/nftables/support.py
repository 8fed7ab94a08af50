"""What this kernel's nf_tables can do for the backend `owned`, tested in transactions that the kernel rolls back."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import Final

from nfq_agent.host.nftables import netlink
from nfq_agent.host.nftables.expressions import encode
from nfq_agent.host.nftables.netlink import Message, NftError, NftSocket, nested, text, u32
from nfq_agent.host.nftables.snapshot import OWNER, PERSIST
from nfq_agent.rules.group_tree import DEEPEST
from nfq_agent.rules.model import AT_LEVEL, Rule

_QUEUE: Final = Rule.parse("-A NFQA-probe-OUTPUT -j NFQUEUE --queue-num 65535 --queue-bypass")
# The deepest level that rules ask for. The kernel counts levels from the group that is the root of this process, and refuses
# one that is too deep for it (nft_socket_init in net/netfilter/nft_socket.c).
_GROUP: Final = Rule.parse(f"-A NFQA-probe-OUTPUT -m {AT_LEVEL} --level {DEEPEST + 1}")
# What the kernel answered: none, or one.
kept: list[Support] = []
kept_groups: list[str | None] = []


@dataclass(frozen=True, slots=True)
class Support:
    """problem: why the backend cannot be used, None if it can. native_queue: the expression, as against nft_compat.

    persist: whether an owner's table can outlive it (Linux 6.9).
    """

    problem: str | None
    native_queue: bool = False
    persist: bool = False


def probe() -> Support:
    """Ask the kernel. Its answer is kept if the backend can be used."""
    if not kept:
        found = _ask()
        if found.problem is not None:
            return found
        kept.append(found)
    return kept[0]


def groups_problem() -> str | None:
    """Why no rule can ask for the control group of a socket; None if one can, and where the kernel cannot be asked.

    Its answer is kept. Only for a configuration that has such rules: the question waits until all processors have seen it.
    """
    if not kept_groups:
        try:
            with NftSocket() as connection:
                refused = _refused(connection, OWNER, rule=_GROUP)
        except OSError:
            return None
        if refused is not None and refused.errno == errno.EPERM:
            return None
        kept_groups.append(
            None
            if refused is None
            else "nf_tables of this kernel cannot ask for the control group of a socket (`socket cgroupv2`: Linux 5.13, module "
            f"nft_socket): {refused.strerror}"
        )
    return kept_groups[0]


def _ask() -> Support:
    try:
        with NftSocket() as connection:
            # Each question waits until all processors have seen it: a kernel that can do all is asked once, one with
            # nft_compat twice.
            for native in (True, False):
                if _refused(connection, OWNER | PERSIST, _QUEUE, native) is None:
                    return Support(None, native, True)
            if (refused := _refused(connection, OWNER)) is not None:
                return Support(_why(refused))
            persist = _refused(connection, OWNER | PERSIST) is None
            if _refused(connection, OWNER, _QUEUE, native=True) is None:
                return Support(None, True, persist)
            if (refused := _refused(connection, OWNER, _QUEUE, native=False)) is not None:
                return Support(
                    "the kernel queues no packet from nf_tables (modules nft_queue, or nft_compat and xt_NFQUEUE): "
                    f"{refused.strerror}"
                )
            return Support(None, False, persist)
    except OSError as error:
        return Support(f"nf_tables cannot be reached (module nf_tables): {error.strerror or error}")


def _refused(connection: NftSocket, flags: int, rule: Rule | None = None, native: bool = False) -> NftError | None:
    """Why a table with these flags, and a rule in it, cannot be made; None if it can. No chain is in a hook."""
    table = f"nfq-agent-probe.{os.getpid()}"
    # NFPROTO_IPV4
    messages = [
        Message(netlink.NEW_TABLE, 2, text(1, table) + u32(2, flags), netlink.CREATE | netlink.EXCLUSIVE),
        Message(netlink.NEW_CHAIN, 2, text(1, table) + text(3, "probe"), netlink.CREATE),
    ]
    if rule is not None:
        (expressions,) = encode(rule, "inet", str, native)
        body = text(1, table) + text(2, "probe") + nested(4, *(each.packed for each in expressions))
        messages.append(Message(netlink.NEW_RULE, 2, body, netlink.CREATE | netlink.APPEND))
    # There is no such chain, so the kernel rolls everything back.
    last = Message(netlink.DEL_CHAIN, 2, text(1, table) + text(3, "none"))
    try:
        connection.commit([*messages, last])
    except NftError as error:
        return None if error.message is last else error
    raise AssertionError("a chain that is not there was deleted")


def _why(refused: NftError) -> str:
    if refused.errno == errno.EPERM:
        return "CAP_NET_ADMIN is missing; start as root, or with that capability"
    if refused.errno in (errno.EOPNOTSUPP, errno.EINVAL):
        return "the kernel has no tables with an owner (Linux 5.12 and later have)"
    return f"the kernel refuses the table: {refused.strerror}"
