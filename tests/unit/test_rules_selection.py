"""What a rule selects, from a configuration to the text of `iptables -S`."""

from __future__ import annotations

from typing import Any

import pytest
from planned import UID, config_of
from pydantic import ValidationError

from nfq_agent.rules.model import RuleError
from nfq_agent.rules.plan import plan


def selected(rule: dict[str, Any], lists: bool = False, family: str = "inet") -> list[str]:
    """The rules of one [rules.app] in its hooks: without queue, exclusion, end, and those by the mark of connections."""
    config = config_of(rules={"app": {"queue": "main", **rule}})
    found = plan(config, UID, lists).get(family, {})  # type: ignore[call-overload]  # a family's name
    return [
        str(each).partition(" -m comment")[0].replace("NFQA-default-", "").replace(" -m owner ! --uid-owner 999", "")
        for table in found.values()
        for chain in table.chains.values()
        for each in chain
        if each.tag.endswith(":app") and not any(match.name == "connmark" for match in each.matches)
    ]


DESTINATION = {
    "hooks": ["output"],
    "all": True,
    "dst": ["1.2.3.4", "2001:db8::4"],
    "interface": ["eth0", "wg*"],
    "not_tcp_ports": [22],
}


def test_what_goes_to_one_address_but_not_to_one_port() -> None:
    """The queue library's example, in either backend."""
    there = "-m iprange --dst-range 1.2.3.4-1.2.3.4"
    for lists in (False, True):
        assert selected(DESTINATION, lists) == [
            f"-A OUTPUT -o eth0 -p tcp -m multiport ! --ports 22 {there}",
            f"-A OUTPUT -o wg+ -p tcp -m multiport ! --ports 22 {there}",
            f"-A OUTPUT -o eth0 ! -p tcp {there}",
            f"-A OUTPUT -o wg+ ! -p tcp {there}",
        ]
    assert selected(DESTINATION, family="inet6")[0].endswith("--dst-range 2001:db8::4-2001:db8::4")


TAKE = {"hooks": ["output"], "udp_ports": [53]}

UDP = "-A OUTPUT -p udp -m multiport --ports 53"


@pytest.mark.parametrize(
    ("rule", "one_each", "in_lists"),
    [
        (
            {**TAKE, "dst": ["10.0.0.0/8", "192.0.2.1"], "not_src": ["127.0.0.0/8"]},
            [
                f"{UDP} -m iprange --dst-range 10.0.0.0-10.255.255.255 -m iprange ! --src-range 127.0.0.0-127.255.255.255",
                f"{UDP} -m iprange --dst-range 192.0.2.1-192.0.2.1 -m iprange ! --src-range 127.0.0.0-127.255.255.255",
            ],
            [
                f"{UDP} -m iprange --dst-range 10.0.0.0-10.255.255.255,192.0.2.1-192.0.2.1 "
                "-m iprange ! --src-range 127.0.0.0-127.255.255.255"
            ],
        ),
        ({**TAKE, "dst": "fd00::/8"}, [], []),
        ({"hooks": ["output"], "udp_ports": ["50:60"], "not_udp_ports": [53, "58:99"]}, *2 * ([f"{UDP[:-2]}50:52,54:57"],)),
        ({"hooks": ["output"], "protocol": ["gre", 50, "icmpv6"]}, *2 * (["-A OUTPUT -p 47", "-A OUTPUT -p 50"],)),
        ({"hooks": ["input"], "protocol": "tcp", "not_tcp_ports": [22]}, *2 * (["-A INPUT -p tcp -m multiport ! --ports 22"],)),
        ({**TAKE, "uid": [33, "1000:1999"]}, *2 * ([f"{UDP} -m owner --uid-owner 33", f"{UDP} -m owner --uid-owner 1000-1999"],)),
        ({**TAKE, "not_uid": [0, 33]}, *2 * ([f"{UDP} -m owner ! --uid-owner 0 -m owner ! --uid-owner 33"],)),
        ({**TAKE, "gid": "7", "not_gid": "9-10"}, *2 * ([f"{UDP} -m owner --gid-owner 7 -m owner ! --gid-owner 9-10"],)),
        (
            {**TAKE, "cgroup": ["nginx.service", "/user.slice"]},
            *2 * ([f"{UDP} -m cgroup --path system.slice/nginx.service", f"{UDP} -m cgroup --path user.slice"],),
        ),
        (
            {**TAKE, "set": "blocked", "not_set": ["known src"]},
            *2 * ([f"{UDP} -m set --match-set blocked dst -m set ! --match-set known src"],),
        ),
        ({**TAKE, "not_interface": "veth*"}, *2 * (["-A OUTPUT ! -o veth+ -p udp -m multiport --ports 53"],)),
        (
            {**TAKE, "hooks": ["forward"], "not_interface": ["lo"]},
            *2 * (["-A FORWARD ! -i lo ! -o lo -p udp -m multiport --ports 53"],),
        ),
    ],
)  # fmt: skip
def test_selections(rule: dict[str, Any], one_each: list[str], in_lists: list[str]) -> None:
    assert selected(rule) == one_each
    assert selected(rule, lists=True) == in_lists


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({**TAKE, "not_interface": ["lo", "eth*"]}, "several interfaces in not_interface"),
        ({"hooks": ["output"], "all": True, "not_tcp_ports": [1], "not_udp_ports": [1]}, "not_tcp_ports beside not_udp_ports"),
    ],
)
def test_what_only_lists_can_say_is_refused_elsewhere(rule: dict[str, Any], said: str) -> None:
    assert selected(rule, lists=True)
    with pytest.raises(RuleError, match=rf"rules\.app: {said}.* need.* backend = \"owned\""):
        selected(rule)


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"hooks": ["input"], "udp_ports": [1], "uid": 5}, "uid cannot be matched by the kernel in hook input; allowed: output"),
        ({"hooks": ["forward"], "udp_ports": [1], "cgroup": "x.slice"}, "cgroup cannot be matched by the kernel in hook forward"),
        ({"udp_ports": [1], "not_tcp_ports": [22]}, "the rule takes no TCP; allowed: with all"),
        ({"udp_ports": [1], "interface": "a*b"}, "'a\\*b' is not a valid interface"),
        ({"udp_ports": [1], "interface": "lo", "not_interface": "eth0"}, "allowed: one of them"),
        ({"udp_ports": [1], "protocol": "tcp"}, "allowed: without tcp_ports"),
        ({"protocol": "tls"}, "'tls' is not a valid protocol"),
        ({"udp_ports": [1], "set": "no such set"}, "is not a valid set"),
        ({"hooks": ["output"], "udp_ports": [1], "uid": "9:1"}, "'9:1' is not a valid user"),
        ({"udp_ports": [1], "dst": "10.0.0.1/8"}, "did you mean '10.0.0.0/8'"),
    ],
)
def test_selections_that_make_no_sense(rule: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        config_of(rules={"app": {"queue": "main", **rule}})


def test_another_applications_ports_leave_a_rule_as_it_is() -> None:
    """So its counters stay: `diff` touches no rule that is the same."""
    first = {"queue": "main", "tcp_ports": [80]}
    for lists in (False, True):
        before, after = (
            plan(config_of(rules={"app": first, "other": {"queue": "main", "tcp_ports": ports}}), UID, lists)
            for ports in ([443], [443, 8443])
        )
        kept = [str(rule) for rule in before["inet"]["mangle"].rules if not rule.tag.endswith(":other")]
        assert kept == [str(rule) for rule in after["inet"]["mangle"].rules if not rule.tag.endswith(":other")]


@pytest.mark.parametrize(("role", "entering", "leaves"), [("server", "--sports", "--dports"), ("client", "--dports", "--sports")])
def test_a_role_of_what_is_forwarded_is_that_of_the_container_behind_the_interface(role: str, entering: str, leaves: str) -> None:
    rule = {"hooks": ["forward"], "interface": "veth1", "tcp_ports": [8080], "udp_ports": [53], "role": role, "bridge": True}
    assert selected(rule) == [
        f"-A FORWARD {match.format(side)} -m multiport {ports} {port}" if "physdev" not in match
        else f"-A FORWARD -p {protocol} -m multiport {ports} {port} {match}"
        for ports, side in ((entering, "in"), (leaves, "out"))
        for protocol, port in (("tcp", 8080), ("udp", 53))
        for match in (f"-{side[0]} veth1 -p {protocol}", f"-m physdev --physdev-{side} veth1 --physdev-is-bridged")
    ]  # fmt: skip
    # Without an interface there is no side of the container.
    without = {"hooks": ["forward"], "tcp_ports": [8080], "role": role}
    assert selected(without) == ["-A FORWARD -p tcp -m multiport --ports 8080"]
