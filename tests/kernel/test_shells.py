"""Completion in bash, zsh and fish: keys typed on a terminal (tmux), with the scripts and the table of the packages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from agent import until
from namespace import ROOT, Namespace
from screens import Terminal

SCRIPTS = ROOT / "packaging" / "shells"
CONFIG = """
[queue.egress]
num = 7
elements = ["allow"]
[queue.extra]
num = 8
[element.allow]
type = "policy"
rule = [{ action = "drop", name = "shop", unit = "payments.service" }]
[rules.egress]
queue = "egress"
tcp_ports = [443]
"""
# Starts the command as the package does.
PROGRAM = """#!{python} -B
import importlib.util, sys
spec = importlib.util.spec_from_file_location("nfq_agent.cli.completion_table", {table!r})
sys.modules["nfq_agent.cli.completion_table"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from nfq_agent.__main__ import main
main()
"""
STARTS = {
    "bash": ("bash", "--noprofile", "--rcfile", "HOME/bashrc", "-i"),
    "zsh": ("zsh", "-i"),
    "fish": ("fish", "-i"),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with the command in bin/, and what each shell reads when it starts."""
    folder = tmp_path_factory.mktemp("home")
    table = folder / "completion_table.py"
    table.write_text(
        subprocess.run([sys.executable, ROOT / "packaging" / "completions"], capture_output=True, text=True, check=True).stdout
    )
    (folder / "bin").mkdir()
    command = folder / "bin" / "nfq-agent"
    command.write_text(PROGRAM.format(python=sys.executable, table=str(table)))
    command.chmod(0o755)
    (folder / "bashrc").write_text(f"PS1='> '\nsource {SCRIPTS}/nfq-agent.bash\n")
    (folder / ".zshrc").write_text(f"fpath=({SCRIPTS} $fpath)\nautoload -U compinit\ncompinit -u -D\nPS1='> '\n")
    (folder / ".config" / "fish").mkdir(parents=True)
    (folder / ".config" / "fish" / "config.fish").write_text(
        f"source {SCRIPTS}/nfq-agent.fish\nfunction fish_prompt; echo '> '; end\nset -g fish_greeting\n"
        "set -g fish_autosuggestion_enabled 0\n"
    )
    (folder / "captures").mkdir()
    (folder / "captures" / "week.pcapng").touch()
    return folder


@pytest.fixture
def shell(request: pytest.FixtureRequest, netns: Namespace, home: Path, tmp_path: Path) -> Iterator[Terminal]:
    """A shell at its prompt, in a host with a configuration."""
    name = request.param
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed (package {name})")
    netns.run("mkdir", "-p", "/etc/nfq-agent")
    netns.run("tee", "/etc/nfq-agent/nfq-agent.toml", input=CONFIG)
    made = Terminal(netns, tmp_path / "tmux")
    argv = [word.replace("HOME", str(home)) for word in STARTS[name]]
    path = f"PATH={home}/bin:{os.environ['PATH']}"
    try:
        made.start(f"cd {home} && exec env HOME={home} ZDOTDIR={home} {path} {' '.join(argv)}", 100, 30)
        until(lambda: made.text.strip().endswith(">"), "the prompt")
        yield made
    finally:
        made.end()


def line(screen: Terminal) -> str:
    """The line that is typed."""
    return next((each for each in reversed(screen.text.splitlines()) if each.startswith(">")), "").removeprefix(">").strip()


def answered(screen: Terminal, typed: str, expected: str) -> None:
    """Type a line and press TAB; wait until the line is the expected one, then empty it."""
    screen.type(typed)
    until(lambda: typed.rstrip() in screen.text, "what is typed is shown")
    screen.press("Tab")
    until(lambda: line(screen) == expected.rstrip(), f"{typed!r} becomes {expected!r}")
    screen.press("C-u")
    until(lambda: line(screen) == "", "an empty line")


@pytest.mark.parametrize("shell", STARTS, indirect=True)
def test_a_word_is_completed(shell: Terminal) -> None:
    for typed, expected in (
        ("nfq-agent stat", "nfq-agent status"),
        ("nfq-agent run --copym", "nfq-agent run --copymode"),
        ("nfq-agent run --copymode p", "nfq-agent run --copymode packet"),
        ("nfq-agent chaos on eg", "nfq-agent chaos on egress"),
        ("nfq-agent chaos on egress dro", "nfq-agent chaos on egress drop="),
        ("nfq-agent top 'verdict = wou", "nfq-agent top 'verdict = would-drop'"),
        # More than one operator may follow: the quotation mark stays open.
        ("nfq-agent top 'verd", "nfq-agent top 'verdict"),
        ("nfq-agent trace 'unit = pay", "nfq-agent trace 'unit = payments.service'"),
        ("nfq-agent explain tcp 10.0.0.1:443 --unit pay", "nfq-agent explain tcp 10.0.0.1:443 --unit payments.service"),
        ("nfq-agent replay captures/we", "nfq-agent replay captures/week.pcapng"),
        ("nfq-agent check --config captures/we", "nfq-agent check --config captures/week.pcapng"),
    ):
        answered(shell, typed, expected)


@pytest.mark.parametrize("shell", STARTS, indirect=True)
def test_several_answers_are_listed(shell: Terminal) -> None:
    shell.type("nfq-agent chaos on e")
    until(lambda: line(shell) == "nfq-agent chaos on e", "what is typed is shown")
    shell.press("Tab", "Tab")
    until(lambda: {"egress", "extra"} < {*shell.text.split()}, "both queues")
