"""Rules without root: what is possible, and what the messages say where it is not."""

from __future__ import annotations

import os
import textwrap

import pytest
from namespace import Namespace
from reachable import python, reachable
from rule_texts import baseline, many, ours, rules
from saved_rules import other_table, saved

from nfq_agent.host.xtables import python_iptables
from nfq_agent.host.xtables.backend import choose
from nfq_agent.host.xtables.legacy import LegacyHost
from nfq_agent.rules.model import FAMILIES, RuleError

pytestmark = pytest.mark.kernel


def as_nobody(netns: Namespace, body: str, before: str = "") -> str:
    """The output of a Python program that runs as nobody with the two capabilities that rules need."""
    reachable(netns)
    capabilities = "+net_admin,+net_raw"
    command = [
        *("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs"),
        *(f"--inh-caps=-all,{capabilities}", f"--ambient-caps=-all,{capabilities}", f"--bounding-set=-all,{capabilities}"),
        *python("-c", '"$0"'),
    ]
    return netns.run("sh", "-ec", f"{before}\nexec {' '.join(command)}", textwrap.dedent(body)).stdout


LIFE = """
    from nfq_agent.host.{module} import {kind}
    from nfq_agent.rules.diff import diff
    from rule_texts import baseline
    host = {kind}("a"{lock})
    for family in ("inet", "inet6"):
        assert host.apply(family, baseline()).changes
        assert not host.apply(family, baseline()).changes
        assert not diff(baseline(), host.read(family))
        assert host.instances(family) == {{"a"}}
    print(host.present("inet"))
    for family in ("inet", "inet6"):
        host.apply(family, {{}})
"""


@pytest.mark.parametrize(
    ("before", "lock"),
    [
        ("install -m 0640 -g nogroup /dev/null /run/xtables.lock", ""),
        ("install -m 0600 /dev/null /run/xtables.lock; exec 7</run/xtables.lock", ", lock=7"),
    ],
    ids=["readable lock", "inherited lock"],
)
def test_rules_without_root(netns: Namespace, before: str, lock: str) -> None:
    netns.run("iptables-legacy-restore", input=many(200))
    was = saved(netns)
    # Which tables are present is root's to know.
    assert as_nobody(netns, LIFE.format(module="xtables.legacy", kind="LegacyHost", lock=lock), before) == "None\n"
    assert saved(netns) == was
    assert ours(saved(netns, "ip6tables-legacy")) == []


def test_without_root_or_lock_the_message_says_what_to_do(netns: Namespace) -> None:
    body = """
        from nfq_agent.host.xtables.legacy import LegacyHost
        from nfq_agent.rules.model import RuleError
        from rule_texts import baseline
        try:
            LegacyHost("a").apply("inet", baseline())
        except RuleError as error:
            print(error)
    """
    said = as_nobody(netns, body, "install -m 0600 /dev/null /run/xtables.lock")
    assert "/run/xtables.lock cannot be opened: Permission denied; run as root, or let the agent's user read it" in said
    assert ours(saved(netns)) == []


def test_without_root_stale_rules_of_any_table_go(netns: Namespace) -> None:
    netns.call(LegacyHost("a").apply, "inet", rules(*other_table()))
    body = """
        from nfq_agent.host.xtables.legacy import LegacyHost
        LegacyHost("a").apply("inet", {})
    """
    as_nobody(netns, body, "install -m 0640 -g nogroup /dev/null /run/xtables.lock")
    assert ours(saved(netns)) == []


def test_without_capabilities_the_message_says_what_to_do(netns: Namespace) -> None:
    def powerless() -> None:
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        LegacyHost("a").apply("inet", baseline())

    netns.shell("install -m 0644 /dev/null /run/xtables.lock")
    with pytest.raises(RuleError, match=r"CAP_NET_ADMIN is missing: without it no rule can be changed; run as root"):
        netns.call(powerless)


def test_auto_is_legacy_where_the_kernel_has_it(netns: Namespace) -> None:
    assert netns.call(lambda: choose("auto", "a").name) == "legacy"
    assert netns.call(lambda: choose("owned", "a").name) == "owned"


def test_auto_is_owned_elsewhere_and_says_so(netns: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(python_iptables, "NAMES_FILES", dict.fromkeys(FAMILIES, "/proc/net/none_such"))

    def chosen() -> tuple[str, str]:
        host = choose("auto", "a")
        return host.name, host.notice

    name, text = netns.call(chosen)
    assert name == "owned"
    assert "the kernel has no legacy xtables" in text
    with pytest.raises(RuleError, match="backend legacy cannot be used: the kernel has no legacy xtables"):
        netns.call(choose, "legacy", "a")


def test_the_facts_for_the_doctor(netns: Namespace) -> None:
    facts = netns.call(python_iptables.probe)
    assert (facts.ipv4, facts.ipv6, facts.problem) == (True, True, None)
    assert facts.libxtables.startswith("libxtables.so.12")
    assert saved(netns) == []
