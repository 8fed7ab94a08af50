"""Rules of others that rewrite our mark bits in front of our jump, as doctor finds them."""

from __future__ import annotations

import pytest

from nfq_agent.rules.rewriting import in_front

JUMP = "nfq-agent:default:jump"
OURS = f'-A OUTPUT -m comment --comment "{JUMP}" -j NFQA-default-OUTPUT'
MASK = 0xFF000000


def found(*rules: str, mask: int = MASK) -> list[int]:
    return [bits for _, bits in in_front("*mangle\n" + "\n".join(rules) + "\nCOMMIT\n", "mangle", "OUTPUT", JUMP, mask)]


@pytest.mark.parametrize(
    ("rule", "bits"),
    [
        ("-A OUTPUT -j CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xffffffff", MASK),
        ("-A OUTPUT -j CONNMARK --restore-mark", MASK),
        ("-A OUTPUT -j CONNMARK --restore-mark --nfmask 0xff0000 --ctmask 0xff0000", 0),
        ("-A OUTPUT -j CONNMARK --save-mark --nfmask 0xffffffff --ctmask 0xffffffff", 0),
        ("-A OUTPUT -p tcp -j MARK --set-xmark 0x1/0xffffffff", MASK),
        ("-A OUTPUT -p tcp -j MARK --set-xmark 0x1000000/0x0", 0x1000000),
        ("-A OUTPUT -p tcp -j MARK --set-xmark 0x10/0xff", 0),
        ("-A OUTPUT -j MARK --and-mark 0xffff", MASK),
        ("-A OUTPUT -j MARK --or-mark 0x4000000", 0x4000000),
        ("-A OUTPUT -j HMARK --hmark-tuple src --hmark-mod 0x10 --hmark-offset 0x64", MASK),
        ("-A OUTPUT -j SET --map-set marks dst --map-mark", MASK),
        ("-A OUTPUT -j SET --map-set marks dst --map-prio", 0),
        ("-A OUTPUT -j ACCEPT", 0),
        ("-A INPUT -j MARK --set-xmark 0x1/0xffffffff", 0),
    ],
)
def test_what_a_rule_rewrites(rule: str, bits: int) -> None:
    assert found(rule, OURS) == ([bits] if bits else [])
    assert found(OURS, rule) == []
    # Where no jump of ours is yet, it may come to stand in front.
    assert found(rule) == ([bits] if bits else [])


def test_chains_that_are_jumped_to_are_followed_once() -> None:
    vpn = ("-A vpn -j vpn", "-A vpn -j MARK --set-xmark 0x51820/0xffffffff")
    assert found("-A OUTPUT -j vpn", "-A OUTPUT -g vpn", OURS, *vpn) == [MASK]
    assert found(OURS, "-A OUTPUT -j vpn", *vpn) == []
