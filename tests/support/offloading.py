"""A configuration with a policy and the offload element."""

from __future__ import annotations

from pathlib import Path

from nfq_agent.config.file import load
from nfq_agent.config.models import Config

CONFIG = """
[queue.q]
num = 110
elements = ["allow", "offload"]
{queue}
[element.allow]
type = "policy"
default = "accept"
rule = [{{ action = "drop", dport = [{denied}] }}]
[element.offload]
mark = "0x4e000000/0xff000000"
[rules.r]
queue = "q"
tcp_ports = [8080, 8081]
{rule}
"""


def config(folder: Path, denied: str = "9", queue: str = "", rule: str = "", more: str = "") -> Config:
    """Load it: with a denied port, and with lines added to the queue, to the rule and at the end."""
    path = folder / "c.toml"
    path.write_text(CONFIG.format(denied=denied, queue=queue, rule=rule) + more)
    return load(path)
