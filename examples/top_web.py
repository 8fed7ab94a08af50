"""The verb `top` in a browser, by textual-serve: the same screen and the same keys, one for each page that is opened.

    python3 -m venv ~/top-web && ~/top-web/bin/pip install textual-serve
    ~/top-web/bin/python /usr/share/doc/nfq-agent/examples/top_web.py        # http://localhost:8000

It has to run as a user who may run `nfq-agent top`: root, or a member of the group nfq-agent-flows. It asks for no password:
every user of this host can open the page and see the flows. From another host: `ssh -L 8000:localhost:8000 HOST`.
"""

from __future__ import annotations

import sys
import time

# The agent of the package. Its folder is last in the path: the libraries in it are older than those that textual needs.
sys.path.append("/usr/lib/nfq-agent")

from textual import events  # type: ignore[import-not-found]  # not of this project's own environment
from textual.app import App, ComposeResult  # type: ignore[import-not-found]  # likewise
from textual.widgets import Static  # type: ignore[import-not-found]  # likewise
from textual_serve.server import Server  # type: ignore[import-not-found]  # likewise

from nfq_agent.cli.flow_records import EVERY, Questions
from nfq_agent.cli.live_flows import LiveFlows, View
from nfq_agent.cli.top import Screen
from nfq_agent.service.control import ControlError

NAMED = {"pageup": "page-up", "pagedown": "page-down"}
HELD = ("up", "down", "home", "enter", "escape", "backspace")


class Top(App[None]):  # type: ignore[misc]  # mypy does not know its base
    """The screen of `top`."""

    def __init__(self, instance: str) -> None:
        super().__init__()
        self.questions = Questions(instance, None)
        self.flows = Screen(instance, LiveFlows(), View())
        self.wrong = ""

    def compose(self) -> ComposeResult:
        yield Static(id="flows")

    def on_mount(self) -> None:
        self.look()
        self.set_interval(EVERY, self.look)

    def on_resize(self) -> None:
        self.draw()

    def on_key(self, event: events.Key) -> None:
        key = NAMED.get(event.key, event.key)
        pressed = key if key in HELD or key in NAMED.values() else event.character
        if pressed:
            self.flows.press(pressed)
        if self.flows.ended:
            self.exit()
        else:
            self.draw()

    def look(self) -> None:
        """Ask the agent, which answers at once."""
        try:
            self.flows.live.add(self.questions.ask(), time.monotonic())
            self.flows.missed = self.questions.missed
            self.flows.unshown = self.questions.unshown_flows if self.questions.unshown else ""
            self.wrong = ""
        except ControlError as error:
            self.wrong = str(error)
        self.draw()

    def draw(self) -> None:
        shown = self.wrong or self.flows.draw(self.size.width, self.size.height, time.monotonic())
        self.query_one("#flows", Static).update(shown)


if __name__ == "__main__":
    instance = sys.argv[1] if len(sys.argv) > 1 else "default"
    if "--one" in sys.argv:
        Top(instance).run()
    else:
        Server(f"{sys.executable} {sys.argv[0]} {instance} --one", host="localhost", title="nfq-agent top").serve()
