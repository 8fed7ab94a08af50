"""`room_for_known`: the rules that it makes, and where there is no room."""

from __future__ import annotations

from pathlib import Path

import pytest
from planned import UID

from nfq_agent.config.file import load
from nfq_agent.config.models import Config, ConfigError
from nfq_agent.rules.plan import plan


def rules_of(config: Config) -> list[str]:
    """The first two rules of IPv4 in table mangle."""
    return [str(rule) for chain in plan(config, UID)["inet"]["mangle"].chains.values() for rule in chain][:2]


def lines(text: str) -> list[str]:
    """`C-` stands for the beginning of our chains, `= NAME` for the comment."""
    text = text.replace("C-", "NFQA-default-").replace("= app", '-m comment --comment "nfq-agent:default:app"')
    return text.strip().splitlines()


def test_known_flows_have_a_queue_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "known.toml"
    path.write_text("""
[queue.main]
balance = "7:8"
room_for_known = 50
[rules.app]
queue = "main"
family = "inet"
hooks = ["input"]
tcp_ports = [80]
role = "server"
""")
    config = load(path)
    assert config.queue["main"].known_numbers == range(9, 11)
    assert rules_of(config) == lines("""
-A C-INPUT -p tcp -m multiport --dports 80 -m conntrack --ctstate ESTABLISHED = app -j NFQUEUE --queue-balance 9:10 --queue-bypass
-A C-INPUT -p tcp -m multiport --dports 80 = app -j NFQUEUE --queue-balance 7:8 --queue-bypass
""")


@pytest.mark.parametrize(
    ("queue", "rule", "said"),
    [
        ('balance = "7:8"\ncpu_fanout = true', "", "room_for_known beside cpu_fanout"),
        ("num = 65535", "", "room_for_known takes the queue numbers behind those of num or balance, up to 65536"),
        ("num = 99", "", "queue 100 is used by [queue.main]; room_for_known takes one number more for each, 100 here"),
        (
            "num = 7",
            'table = "raw"\nhooks = ["output"]',
            "comes before connection tracking, by which room_for_known of [queue.q]",
        ),
    ],
)
def test_where_there_is_no_room_for_known_flows(tmp_path: Path, queue: str, rule: str, said: str) -> None:
    path = tmp_path / "known.toml"
    path.write_text(f"""
[queue.main]
[queue.q]
{queue}
room_for_known = 50
[rules.app]
queue = "q"
tcp_ports = [80]
{rule}
""")
    with pytest.raises(ConfigError) as refused:
        load(path)
    assert said in str(refused.value)
