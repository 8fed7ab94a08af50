"""The manual names every key of the configuration and of every built-in element."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nfq_agent.config.capture import InlineConfig, TapConfig
from nfq_agent.config.model import Model
from nfq_agent.config.models import Agent, LogConfig, QueueConfig
from nfq_agent.config.proxy import ProxyConfig
from nfq_agent.config.rule import RuleConfig
from nfq_agent.elements import PACKET_ELEMENTS, STREAM_ELEMENTS, packet_element, stream_element

PAGE = Path(__file__).parents[2] / "packaging" / "man" / "nfq-agent.toml.5"
# Set by the agent, not by a file.
INTERNAL = {"generation"}


def section(heading: str) -> set[str]:
    """The keys that stand at the heads of paragraphs of a section."""
    text = PAGE.read_text().replace("\\-", "-")
    start = re.search(rf"^\.S[HS] {re.escape(heading)}$", text, re.MULTILINE)
    assert start is not None, heading
    rest = text[start.end() :]
    end = re.search(r"^\.S[HS] ", rest, re.MULTILINE)
    heads = re.findall(r"^\.TP\n\.BR? (.*)$", rest[: end.start()] if end else rest, re.MULTILINE)
    return {word for head in heads for word in re.findall(r"[a-z_0-9]+", re.sub(r"\([^)]*\)", " ", head.replace("\\(dq", "")))}


@pytest.mark.parametrize(
    ("heading", "model"),
    [
        ("[agent]", Agent), ("[log]", LogConfig), ("[queue.NAME]", QueueConfig), ("[rules.NAME]", RuleConfig),
        ("[proxy.NAME]", ProxyConfig), ("[tap.NAME]", TapConfig), ("[inline.NAME]", InlineConfig),
    ],
)  # fmt: skip
def test_every_key_of_a_table(heading: str, model: type[Model]) -> None:
    keys = {field.alias or name for name, field in model.model_fields.items()}
    # The keys that a tap and an inline link share are described at the tap.
    common = section("[tap.NAME]") if heading == "[inline.NAME]" else set()
    assert keys - section(heading) - common == set()


@pytest.mark.parametrize("name", [*PACKET_ELEMENTS, *STREAM_ELEMENTS])
def test_every_key_of_an_element(name: str) -> None:
    cls = packet_element(name) if name in PACKET_ELEMENTS else stream_element(name)
    keys = {field.alias or key for key, field in cls.Options.model_fields.items()} - INTERNAL
    assert keys - section(name) == set()
