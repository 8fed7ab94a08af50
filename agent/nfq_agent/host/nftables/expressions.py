"""A rule as the expressions of nf_tables, in the words that `nft` uses for them.

What has no expression, or none in this kernel, goes through nft_compat as the xtables extension that it is. A match that needs
two alternative expressions (a port, in either direction) makes two rules of nf_tables out of one of ours.
"""

from __future__ import annotations

import ipaddress
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from struct import Struct
from typing import Final, NamedTuple

from nfq_agent.host.attributes import attribute, attributes
from nfq_agent.host.nftables import compat, entries
from nfq_agent.host.nftables.netlink import nested, string, text, u32, u64
from nfq_agent.rules.model import AT_LEVEL, PORT, RANGE, VERDICTS, Extension, Family, Option, Rule, RuleError

# enum nft_registers; enum nft_cmp_ops and nft_range_ops; enum nft_payload_bases
_VERDICT, _REGISTER, _REGISTER_2 = 0, 1, 2
_EQUAL, _NOT_EQUAL = 0, 1
_NETWORK_HEADER, _TRANSPORT_HEADER = 1, 2
# enum nft_meta_keys
_META_MARK, _META_IIFNAME, _META_OIFNAME, _META_SKUID, _META_SKGID, _META_L4PROTO = 3, 6, 7, 10, 11, 16
_CT_STATE, _CT_STATUS, _CT_MARK = 0, 2, 3
# Bits of both, in a comparison: NF_CT_STATE_BIT(IP_CT_ESTABLISHED), also of the reply direction, and of IP_CT_NEW; IPS_DST_NAT
# (linux/netfilter/nf_conntrack_common.h)
_CT_BITS: Final = {"ESTABLISHED": (_CT_STATE, 1 << 1), "NEW": (_CT_STATE, 1 << 3), "DNAT": (_CT_STATUS, 1 << 5)}
# The byte at 13 of struct tcphdr, (mask, value): FIN 1, SYN 2, RST 4, ACK 16.
_TCP_FLAGS: Final = {"FIN,SYN,RST,ACK SYN": (b"\x17", b"\x02"), "SYN,ACK SYN,ACK": (b"\x12", b"\x12")}
_SOCKET_TRANSPARENT, _SOCKET_CGROUP2 = 0, 3
# enum nft_fib_result, NFTA_FIB_F_DADDR, RTN_LOCAL (linux/rtnetlink.h)
_FIB_ADDRESS_TYPE, _FIB_DESTINATION, _LOCAL = 3, 2, 2
_FAMILY_NUMBERS: Final[Mapping[Family, int]] = {"inet": 2, "inet6": 10}
_PROTOCOLS: Final = {
    "icmp": 1, "tcp": 6, "udp": 17, "esp": 50, "ah": 51, "icmpv6": 58, "ipv6-icmp": 58, "sctp": 132, "udplite": 136,
}  # fmt: skip
_VERDICTS: Final = {"DROP": 0, "ACCEPT": 1, "RETURN": -5}
_JUMP: Final = -3
_FULL: Final = 0xFFFFFFFF
_WORD: Final = Struct("=I")
# struct xt_NFQ_info_v3 (linux/netfilter/xt_NFQUEUE.h), padded as XT_ALIGN does it.
_NFQUEUE: Final = Struct("=HHH2x")


class Expression(NamedTuple):
    """One expression. data: its attributes."""

    name: str
    data: bytes = b""

    @property
    def packed(self) -> bytes:
        """As an element of NFTA_RULE_EXPRESSIONS."""
        return nested(1, text(1, self.name), nested(2, self.data))


def decoded(data: bytes) -> list[Expression]:
    """The expressions of a rule. data: of NFTA_RULE_EXPRESSIONS."""
    members = (dict(attributes(packed)) for _, packed in attributes(data))
    return [Expression(string(parts[1]), parts.get(2, b"")) for parts in members]


def counted(found: Iterable[Expression]) -> tuple[int, int]:
    """Packets and bytes that the counters among them have."""
    counters = [dict(attributes(each.data)) for each in found if each.name == "counter"]
    packets, size = (sum(int.from_bytes(each.get(kind, b""), "big") for each in counters) for kind in (2, 1))
    return packets, size


def are_those(expected: Sequence[Expression], found: Sequence[Expression]) -> bool:
    """Whether what was dumped is what was sent: the kernel adds attributes of its own, and counters count."""
    return [each.name for each in expected] == [each.name for each in found] and all(
        one.name == "counter" or _contains(one.data, other.data) for one, other in zip(expected, found, strict=True)
    )


def _contains(expected: bytes, found: bytes) -> bool:
    values = dict(attributes(found))
    return all(values.get(kind) == value for kind, value in attributes(expected))


# One of these has to hold; each is a sequence of expressions that all have to hold.
_Alternatives = Sequence[Sequence[Expression]]


def encode(rule: Rule, family: Family, chain_of: Callable[[str], str], native_queue: bool) -> list[list[Expression]]:
    """The rules of nf_tables, usually one, that make up `rule`, each with a counter.

    A list of ports or addresses is the name of a set, `@name`. chain_of: the name of a chain of ours in the table.
    native_queue: whether the kernel has the expression `queue`. Raises RuleError for what cannot be expressed here.
    """
    conditions: list[_Alternatives] = []
    try:
        for key, name in ((_META_IIFNAME, rule.in_interface), (_META_OIFNAME, rule.out_interface)):
            conditions += [[_interface(key, *each)] for each in _words(name)]
        conditions += [[_protocol(*each)] for each in _words(rule.protocol)]
        groups = iter(rule.group_numbers)
        for match in rule.matches:
            if match.name == "cgroup":
                conditions.append(_cgroup(match, next(groups, 0)))
            elif match.name == AT_LEVEL:
                # First: of the rules for deeper groups than a socket's, which come before its own, this ends each one at once.
                conditions.insert(0, _at_level(match, family))
            elif match.name != "comment":
                conditions.append(_MATCHES[match.name](match, family))
        target = list(_target(rule.target, family, chain_of, native_queue))
    except KeyError as error:
        raise RuleError(f'backend owned has no expression for {error} of the rule {rule}; set backend = "legacy"') from error
    except (ValueError, OSError) as error:
        raise RuleError(f"backend owned cannot write the rule {rule}: {error}") from error
    # The elements of a map count.
    counter = [] if rule.target.name == VERDICTS else [_COUNTER]
    return [[*itertools.chain.from_iterable(chosen), *counter, *target] for chosen in itertools.product(*conditions)]


def _load(name: str, key: int) -> Expression:
    return (
        Expression(name, u32(2, key) + u32(1, _REGISTER)) if name == "ct" else Expression(name, u32(1, _REGISTER) + u32(2, key))
    )


def _compare(value: bytes, negated: bool = False) -> Expression:
    return Expression("cmp", u32(1, _REGISTER) + u32(2, _NOT_EQUAL if negated else _EQUAL) + nested(3, attribute(1, value)))


def _bitwise(mask: bytes, xor: bytes) -> Expression:
    return Expression(
        "bitwise",
        u32(1, _REGISTER) + u32(2, _REGISTER) + u32(3, len(mask)) + nested(4, attribute(1, mask)) + nested(5, attribute(1, xor)),
    )


def _immediate(register: int, value: bytes) -> Expression:
    return Expression("immediate", u32(1, register) + nested(2, attribute(1, value)))


def _verdict(code: int, chain: str = "") -> Expression:
    members = u32(1, code & _FULL) + (text(2, chain) if chain else b"")
    return Expression("immediate", u32(1, _VERDICT) + nested(2, nested(2, members)))


_COUNTER: Final = Expression("counter", u64(1, 0) + u64(2, 0))


def _words(value: str) -> list[tuple[str, bool]]:
    """(word, negated) of `eth0`, or of each of `! eth0,wg+`."""
    negated = value.startswith("! ")
    return [(word, negated) for word in value.removeprefix("! ").split(",") if word]


def _interface(key: int, name: str, negated: bool) -> list[Expression]:
    raw = os.fsencode(name)
    # A name is compared whole, in 16 bytes; the beginning of one without its NUL.
    value = raw[:-1] if raw.endswith(b"+") else raw.ljust(16, b"\0")
    return [_load("meta", key), _compare(value, negated)] if value else []


def _protocol(name: str, negated: bool) -> list[Expression]:
    number = int(name) if name.isdecimal() else _PROTOCOLS[name]
    return [_load("meta", _META_L4PROTO), _compare(bytes([number]), negated)]


def _between(first: bytes, last: bytes, negated: bool = False) -> Expression:
    """Whether what was loaded is within these ends, or not."""
    ends = nested(3, attribute(1, first)) + nested(4, attribute(1, last))
    operator = _NOT_EQUAL if negated else _EQUAL
    return _compare(first, negated) if first == last else Expression("range", u32(1, _REGISTER) + u32(2, operator) + ends)


def _packed(value: str) -> bytes:
    return int(value).to_bytes(2, "big") if value.isdecimal() else ipaddress.ip_address(value).packed


def _looked_up(load: Expression, option: Option) -> list[Expression]:
    """Whether what was loaded is in a set, or not; without a set, whether it is the one port or in the one range."""
    if not option.value.startswith("@"):
        ends = [_packed(value) for value in option.value.split(":" if option.name.endswith("ports") else "-")]
        return [load, _between(ends[0], ends[-1], option.negated)]
    flags = u32(5, 1 if option.negated else 0)
    return [load, Expression("lookup", text(1, option.value[1:]) + u32(2, _REGISTER) + flags)]


def _payload(base: int, offset: int, size: int) -> Expression:
    return Expression("payload", u32(1, _REGISTER) + u32(2, base) + u32(3, offset) + u32(4, size))


_SOURCE_PORT: Final = _payload(_TRANSPORT_HEADER, 0, 2)
_DESTINATION_PORT: Final = _payload(_TRANSPORT_HEADER, 2, 2)


def _multiport(match: Extension, _: Family) -> _Alternatives:
    (option,) = match.options
    if option.name == "--dports":
        return [_looked_up(_DESTINATION_PORT, option)]
    if option.name == "--sports":
        return [_looked_up(_SOURCE_PORT, option)]
    destination, source = _looked_up(_DESTINATION_PORT, option), _looked_up(_SOURCE_PORT, option)
    # Neither of both is one condition after the other; one of both is not.
    return [[*destination, *source]] if option.negated else [destination, source]


def _iprange(match: Extension, family: Family) -> _Alternatives:
    # struct iphdr, struct ipv6hdr
    source, destination, size = (12, 16, 4) if family == "inet" else (8, 24, 16)
    found: list[Expression] = []
    for option in match.options:
        place = source if option.name == "--src-range" else destination
        found += _looked_up(_payload(_NETWORK_HEADER, place, size), option)
    return [found]


def _tcp(match: Extension, _: Family) -> _Alternatives:
    (option,) = match.options
    if option.name == "--dport":
        return [[_DESTINATION_PORT, _compare(int(option.value).to_bytes(2, "big"))]]
    if option.name != "--tcp-flags" or option.value not in _TCP_FLAGS:
        raise ValueError(f"{option.name} {option.value}")
    mask, flags = _TCP_FLAGS[option.value]
    return [[_payload(_TRANSPORT_HEADER, 13, 1), _bitwise(mask, b"\0"), _compare(flags, option.negated)]]


def _mark_of(value: str) -> tuple[int, int]:
    mark, _, mask = value.partition("/")
    return int(mark, 0), int(mask, 0) if mask else _FULL


def _masked(load: Expression, option: Option) -> list[Expression]:
    mark, mask = _mark_of(option.value)
    between = [] if mask == _FULL else [_bitwise(_WORD.pack(mask), _WORD.pack(0))]
    return [load, *between, _compare(_WORD.pack(mark), option.negated)]


def _mark(match: Extension, _: Family) -> _Alternatives:
    return [_masked(_load("meta", _META_MARK), match.options[0])]


def _connmark(match: Extension, _: Family) -> _Alternatives:
    return [_masked(_load("ct", _CT_MARK), match.options[0])]


def _conntrack(match: Extension, _: Family) -> _Alternatives:
    (option,) = match.options
    if option.name != "--ctstate" or option.value not in _CT_BITS:
        raise ValueError(f"{option.name} {option.value}")
    key, bit = _CT_BITS[option.value]
    zero = _WORD.pack(0)
    return [[_load("ct", key), _bitwise(_WORD.pack(bit), zero), _compare(zero, negated=not option.negated)]]


def _owner(match: Extension, _: Family) -> _Alternatives:
    if any(option.negated for option in match.options):
        # `meta skuid` knows no packet without a socket; the match of xtables treats it as a packet without an owner, which is
        # what a rule means.
        return [[Expression("match", compat.owner(match))]]
    found: list[Expression] = []
    for option in match.options:
        key = _META_SKUID if option.name == "--uid-owner" else _META_SKGID
        first, last = compat.span(option.value)
        if first == last:
            found += [_load("meta", key), _compare(_WORD.pack(first))]
        else:
            # Numbers of the host's byte order do not compare as bytes: they are put into the other one (NFT_BYTEORDER_HTON).
            swap = Expression("byteorder", u32(1, _REGISTER) + u32(2, _REGISTER) + u32(3, 1) + u32(4, 4) + u32(5, 4))
            found += [_load("meta", key), swap, _between(first.to_bytes(4, "big"), last.to_bytes(4, "big"))]
    return [found]


def _set(match: Extension, _: Family) -> _Alternatives:
    return [[Expression("match", compat.ipset(match.options[0]))]]


def _addrtype(match: Extension, _: Family) -> _Alternatives:
    (option,) = match.options
    if (option.name, option.value) != ("--dst-type", "LOCAL"):
        raise ValueError(f"{option.name} {option.value}")
    asked = u32(1, _REGISTER) + u32(2, _FIB_ADDRESS_TYPE) + u32(3, _FIB_DESTINATION)
    return [[Expression("fib", asked), _compare(_WORD.pack(_LOCAL), option.negated)]]


def _socket(match: Extension, _: Family) -> _Alternatives:
    if match.options != (Option("--transparent"),):
        raise ValueError("socket")
    return [[Expression("socket", u32(1, _SOCKET_TRANSPARENT) + u32(2, _REGISTER)), _compare(b"\x01")]]


def _cgroup(match: Extension, number: int) -> _Alternatives:
    """number: of the group (rules.groups), 0 where it is not known."""
    (option,) = match.options
    if not number:
        raise ValueError(f"the number of the control group {option.value} is not known: is a cgroup2 file system mounted?")
    level = len(option.value.strip("/").split("/"))
    return [[_group_at(level), _compare(Struct("=Q").pack(number), option.negated)]]


def _group_at(level: int) -> Expression:
    """Loads the number of the socket's control group, or of the one above it, at this level. Without one no rule matches."""
    return Expression("socket", u32(1, _SOCKET_CGROUP2) + u32(2, _REGISTER) + u32(3, level))


def _at_level(match: Extension, _: Family) -> _Alternatives:
    level, *numbers = match.options
    load = _group_at(int(level.value))
    # No group has the number 0.
    return [_looked_up(load, numbers[0]) if numbers else [load, _compare(bytes(8), negated=True)]]


def _entries(match: Extension, family: Family) -> _Alternatives:
    return [list(_fields_looked_up(match, family))]


def _fields_looked_up(extension: Extension, family: Family) -> Iterator[Expression]:
    of, option = extension.options
    if not option.value.startswith("@"):
        raise ValueError(f"{option.name} {option.value} is not the name of a set")
    for name, data in entries.loads(of.value.split(","), family):
        yield Expression(name, data)
    yield Expression("lookup", entries.lookup(option.value[1:], extension.name == VERDICTS, option.negated))


def _limit(match: Extension, _family: Family) -> _Alternatives:
    options = {option.name: option.value for option in match.options}
    rate, _, unit = options["--limit"].partition("/")
    if unit != "sec":
        raise ValueError(f"--limit {options['--limit']}")
    # A number of packets (NFT_LIMIT_PKTS) in a number of seconds.
    parts = u64(1, int(rate)) + u64(2, 1) + u32(3, int(options["--limit-burst"])) + u32(4, 0)
    return [[Expression("limit", parts)]]


_MATCHES: Final[Mapping[str, Callable[[Extension, Family], _Alternatives]]] = {
    "multiport": _multiport, PORT: _multiport, "iprange": _iprange, RANGE: _iprange, "tcp": _tcp, "mark": _mark,
    "connmark": _connmark, "conntrack": _conntrack, "owner": _owner,
    "addrtype": _addrtype, "socket": _socket, "set": _set, "limit": _limit, "entries": _entries,
}  # fmt: skip


def _target(target: Extension, family: Family, chain_of: Callable[[str], str], native_queue: bool) -> Iterator[Expression]:
    options = {option.name: option.value for option in target.options}
    match target.name:
        case "":
            # It counts, and the next rule is asked.
            return
        case "DROP" | "ACCEPT" | "RETURN":
            yield _verdict(_VERDICTS[target.name])
        case "NFQUEUE":
            yield _queue(options, native_queue)
        case "REDIRECT":
            yield _immediate(_REGISTER, int(options["--to-ports"]).to_bytes(2, "big"))
            # NF_NAT_RANGE_PROTO_SPECIFIED
            yield Expression("redir", u32(1, _REGISTER) + u32(3, 2))
        case "TPROXY":
            if not ipaddress.ip_address(options["--on-ip"]).is_unspecified:
                raise ValueError("--on-ip")
            yield _immediate(_REGISTER, int(options["--on-port"]).to_bytes(2, "big"))
            yield Expression("tproxy", u32(1, _FAMILY_NUMBERS[family]) + u32(3, _REGISTER))
            yield from _set_mark("meta", _META_MARK, options["--tproxy-mark"])
            yield _verdict(_VERDICTS["ACCEPT"])
        case "MARK":
            yield from _set_mark("meta", _META_MARK, options["--set-xmark"])
        case "CONNMARK":
            yield from _set_mark("ct", _CT_MARK, options["--set-xmark"])
        case "VERDICTS":
            yield from _fields_looked_up(target, family)
        case name if name.startswith("NFQA-"):
            yield _verdict(_JUMP, chain_of(name))
        case name:
            raise KeyError(name)


def _set_mark(name: str, key: int, value: str) -> Iterator[Expression]:
    """The bits of the mask become the value's, the others stay."""
    mark, mask = _mark_of(value)
    if mask == _FULL:
        yield _immediate(_REGISTER, _WORD.pack(mark))
    else:
        yield _load(name, key)
        yield _bitwise(_WORD.pack(_FULL & ~mask), _WORD.pack(mark))
    # NFTA_META_SREG, NFTA_CT_SREG
    yield Expression(name, u32(2, key) + u32(3 if name == "meta" else 4, _REGISTER))


def _queue(options: Mapping[str, str], native: bool) -> Expression:
    numbers = options.get("--queue-balance") or options["--queue-num"]
    first, _, last = numbers.partition(":")
    total = int(last or first) - int(first) + 1
    # NFT_QUEUE_FLAG_BYPASS and NFT_QUEUE_FLAG_CPU_FANOUT; xt_NFQUEUE has the same values.
    flags = ("--queue-bypass" in options) | ("--queue-cpu-fanout" in options) << 1
    if native:
        sizes = [(1, int(first)), (2, total), (3, flags)]
        return Expression("queue", b"".join(attribute(kind, value.to_bytes(2, "big")) for kind, value in sizes))
    info = _NFQUEUE.pack(int(first), total, flags)
    return Expression("target", text(1, "NFQUEUE") + u32(2, 3) + attribute(3, info))
