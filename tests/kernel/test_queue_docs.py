"""What the library's pages say is so: the reference, the first lines of the guide, and what an import brings along."""

from __future__ import annotations

import re
import socket
import subprocess
import sys

import pytest
from namespace import ROOT, Namespace
from queued import until


def test_the_reference_is_made_from_the_docstrings() -> None:
    made = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "make-queue-api")], capture_output=True, text=True, check=True
    ).stdout
    assert made == (ROOT / "docs" / "queue-api.md").read_text(), "run docs/make-queue-api > docs/queue-api.md"
    # Each public name of the queue has its words.
    assert "**`run(" in made
    assert "**`configure(" in made


def test_a_queue_alone_brings_no_foreign_package_but_its_own() -> None:
    script = (
        "import sys; from nfq_agent import Queue, Verdict\n"
        "print(sorted({'pydantic', 'typer', 'rich', 'iptc', 'sdnotify', 'netfilterqueue'} & set(sys.modules)))\n"
        "import nfq_agent; print(all(hasattr(nfq_agent, name) for name in nfq_agent.__all__), hasattr(nfq_agent, 'Quue'))"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert said == "['netfilterqueue']\nTrue False\n"


@pytest.mark.kernel
def test_packets_in_ten_lines(netns: Namespace) -> None:
    """The guide's first program, word for word."""
    guide = (ROOT / "docs" / "queue.md").read_text()
    program = guide.split("```python\n")[1].split("```")[0]
    assert len(program.splitlines()) <= 10
    rule = re.search(r"`iptables (-t mangle .*?)`", guide)
    assert rule is not None
    netns.shell(f"iptables-legacy {rule[1]}")
    netns.start(sys.executable, "-c", program)
    until(lambda: re.match(r" +5 ", netns.shell("cat /proc/net/netfilter/nfnetlink_queue")))

    def ports() -> list[bool]:
        reached = []
        for port in (23, 24):
            with socket.create_server(("127.0.0.1", port)), socket.socket() as client:
                client.settimeout(0.5)
                reached.append(client.connect_ex(("127.0.0.1", port)) == 0)
        return reached

    assert netns.call(ports) == [False, True]
