"""The command line: every verb and flag is documented, has an example, and loads quickly."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from nfq_agent.cli.app import two_dashes
from nfq_agent.cli.verbs import app

ROOT = Path(__file__).parents[2]
COMMAND = typer.main.get_command(app)
VERBS = dict(COMMAND.commands)  # type: ignore[attr-defined]  # it is a group
# What the library adds.
OF_THE_LIBRARY = {"--install-completion", "--show-completion"}
FLAGS = {
    option
    for verb in (COMMAND, *VERBS.values())
    for parameter in verb.params
    for option in (*parameter.opts, *parameter.secondary_opts)
    if option.startswith("-")
} - OF_THE_LIBRARY


def words(path: str) -> str:
    """The text of a page, without the marks of roff; of the manual, as the packages ship it."""
    page = ROOT / path
    text = filled(page) if page.suffix == ".8" else page.read_text()
    return re.sub(r"\\\\?([-f])", r"\1", text).replace("\\", "")


@cache
def filled(page: Path) -> str:
    """The manual with its verbs, by the program that the packages use."""
    done = subprocess.run([sys.executable, ROOT / "packaging/man/fill", page], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("page", ["packaging/man/nfq-agent.8", "README.md", "docs/verbs.md"])
def test_every_verb_is_named(page: str) -> None:
    text = words(page)
    assert not [verb for verb in VERBS if not re.search(rf"(`|^\.B ){re.escape(verb)}(`|$| )", text, re.MULTILINE)]


@pytest.mark.parametrize("page", ["packaging/man/nfq-agent.8", "docs/verbs.md"])
def test_every_flag_is_named(page: str) -> None:
    text = words(page)
    assert not [flag for flag in sorted(FLAGS - {"--help", "-h", "-V"}) if flag not in text]


def test_the_readme_names_every_flag_with_two_dashes() -> None:
    text = words("README.md")
    assert not [flag for flag in sorted(FLAGS) if flag.startswith("--") and flag not in text]


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_help_has_an_example_that_parses(verb: str) -> None:
    example = (VERBS[verb].epilog or "").removeprefix("Example: ")
    program, name, *rest = shlex.split(example)
    assert (program, name) == ("nfq-agent", verb)
    VERBS[verb].make_context(verb, two_dashes(rest))


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_help_fits_80_columns_and_brackets_what_is_optional_once(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = CliRunner().invoke(app, [verb, "--help"]).output
    (usage,) = [line.strip() for line in text.splitlines() if "Usage: " in line]
    assert re.fullmatch(rf"Usage: \S+ {verb} \[OPTIONS\]( \{{[^\[\]{{}}]+\}}| \[[^\[\]]+\](\.\.\.)?)*", usage)
    assert not [line for line in text.splitlines() if len(line) > 80 or "[[" in line]
    # The types and ranges of the code.
    assert re.findall(r"<(?:str|int|float|path|file|list.*?)>|list\[|x[<>]=?\d|\d<=?x", text) == []


@pytest.mark.parametrize("page", ["packaging/man/nfq-agent.8", "README.md", "docs/verbs.md"])
@pytest.mark.parametrize(
    ("option", "named"), [("--config", "--config"), ("--json", "--json"), ("--copymode", "flags|--queue-num")]
)
def test_pages_name_the_verbs_that_take_an_option(page: str, option: str, named: str) -> None:
    taking = {verb for verb, command in VERBS.items() if any(option in parameter.opts for parameter in command.params)}
    text = re.sub(r"\s+", " ", re.sub(r"^\.BR? |^\|.*$|`", "", words(page), flags=re.MULTILINE))
    said = [found[1] for clause in re.split(r"[.;] ", text) if (found := re.search(rf"(.*)\btakes? (?:{named})\b", clause))]
    if not said:
        # In place of a sentence the page has a table.
        said = [" ".join(re.findall(r"^\| `([a-z-]+)`.*the flags below", words(page), re.MULTILINE))]
    verbs = {verb for verb in VERBS if re.search(rf"(?<![\w-]){verb}(?![\w-])", said[0])}
    assert (set(VERBS) - verbs if re.search(r"\b(?:All|Every verb) but\b", said[0]) else verbs) == taking


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (
            ["run", "-queue-num", "100", "-copymode", "packet", "-log-5tuple", "-af-family", "inet"],
            ["run", "--queue-num", "100", "--copymode", "packet", "--log-5tuple", "--af-family", "inet"],
        ),
        (["run", "-queue-num=7", "-log-5tuple=true"], ["run", "--queue-num=7", "--log-5tuple"]),
        (["run", "-log-5tuple=false"], ["run"]),
        (["run", "--log-5tuple=T", "--log-5tuple=0"], ["run", "--log-5tuple"]),
        (["run", "-log-5tuple=maybe"], ["run", "--log-5tuple=maybe"]),
        (["run", "--queue-num", "7", "-c", "x.toml"], ["run", "--queue-num", "7", "-c", "x.toml"]),
        (["check", "-cqueue-num", "-", "--"], ["check", "-cqueue-num", "-", "--"]),
    ],
)
def test_flags_with_one_dash(given: list[str], meant: list[str]) -> None:
    assert two_dashes(given) == meant


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("explan", "No such command 'explan'. Did you mean 'explain', 'plan', 'replay'? see `nfq-agent --help`"),
        ("--foo", "No such option: --foo; see `nfq-agent --help`"),
        ("apply --confirm 0", "Invalid value for '--confirm': allowed: at least 1; see `nfq-agent apply --help`"),
        ("replay", "Missing argument 'FILE'; see `nfq-agent replay --help`"),
        ("chaos maybe", "Invalid value for 'on|off': 'maybe' is not one of 'on', 'off'; see `nfq-agent chaos --help`"),
        ("export json --idle x", "Invalid value for '--idle': 'x' is not a valid duration; "
         'allowed: "0", or a number with us, ms, s, m or h, as in "5s"; see `nfq-agent export --help`'),
        ("export xml", "Invalid value for 'ipfix|json': 'xml' is not a known format; allowed: ipfix, json; "
         "see `nfq-agent export --help`"),
        ("top --for x", "Invalid value for '--for': 'x' is not a valid duration; "
         'allowed: "0", or a number with us, ms, s, m or h, as in "5s"; see `nfq-agent top --help`'),
    ],
)  # fmt: skip
def test_wrong_usage_is_one_line_that_names_the_verb(given: str, said: str) -> None:
    done = subprocess.run([sys.executable, "-m", "nfq_agent", *given.split()], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"nfq-agent: {said}\n")


@pytest.mark.parametrize("name", ["", "Bad Name", "../x", "thirteen-long"])
@pytest.mark.parametrize("verb", ["status", "top", "metrics", "export json", "rules", "confirm", "check"])
def test_a_name_that_no_instance_can_have_is_refused(verb: str, name: str) -> None:
    argv = [sys.executable, "-m", "nfq_agent", *verb.split(), "--instance", name]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    said = f"command line: agent.instance: {name!r} is not valid; allowed: 1 to 12 small letters, digits and hyphens\n"
    assert (done.returncode, done.stdout, done.stderr) == (78, "", said)


def test_a_folder_is_no_configuration_and_its_rights_are_left_alone(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    argv = [sys.executable, "-m", "nfq_agent", "check", "--config", str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (78, f"{tmp_path}: is a folder; allowed: a readable TOML file\n")


@pytest.mark.parametrize("verb", ["elements", "elements dpi", "doctor", "--help", "explain tcp 10.0.0.1:443"])
def test_a_reader_that_closes_its_pipe_is_no_failure(verb: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    argv = [sys.executable, "-m", "nfq_agent", *verb.split()]
    try:
        done = subprocess.run(argv, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("typed", "completed"), [("st", "status"), ("plan --j", "--json")])
def test_completion_loads_the_command_line_alone(typed: str, completed: str) -> None:
    code = (
        "import atexit, runpy, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr)); "
        "sys.argv = ['nfq-agent']; runpy.run_module('nfq_agent', run_name='__main__')"
    )
    line = f"nfq-agent {typed}"
    environment = {"_NFQ_AGENT_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == [completed], done.stderr
    loaded = set(done.stderr.split())
    ours = {name for name in loaded if name.startswith("nfq_agent")}
    verbs = (".verbs", ".explain_verb", ".export_verb", ".learn_verb")
    command = {f"nfq_agent.cli{each}" for each in ("", ".app", ".flags", *verbs)}
    assert ours <= {"nfq_agent", "nfq_agent.__main__"} | command
    # The library of the command line itself loads pydantic.
    assert not {"rich", "asyncio", "iptc"} & loaded


@pytest.mark.parametrize(
    ("words", "parsed", "told"),
    [
        (["run"], False, (None, None)),
        (["run", "--instance", "a", "--config", "a.toml"], False, ("a", "a.toml")),
        (["run", "-c", "a.toml", "--instance", "a"], False, ("a", "a.toml")),
        (["run", "--log-5tuple"], True, (None, None)),
        (["run", "--config=a.toml"], True, (None, "a.toml")),
        (["run", "--instance", "a", "--instance", "b"], True, ("b", None)),
    ],
)
def test_what_the_units_run_needs_no_parser(words: list[str], parsed: bool, told: tuple[str | None, str | None]) -> None:
    code = (
        "import gc, sys; import nfq_agent.__main__ as main; import nfq_agent.cli.serve as serve; "
        "serve.run = lambda flags: print('typer' in sys.modules, gc.isenabled(), flags.instance, flags.config) or 3; "
        f"sys.argv = ['nfq-agent', *{words}]; main.main()"
    )
    environment = {name: value for name, value in os.environ.items() if name != "QUEUE_NUM"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout == f"{parsed} {parsed} {told[0]} {told[1]}\n"


def test_a_start_and_a_status_load_only_what_they_need() -> None:
    """Of a start with 10,000 ports a third was code that it does not use."""
    code = (
        "import sys; import nfq_agent.__main__ as main; import nfq_agent.cli.running as running; "
        "running.status_object = lambda name: {'loaded': sorted(sys.modules)}; "
        "sys.argv = ['nfq-agent', 'status', '--json', '--instance', 'a']; main.main()"
    )
    loaded = set(
        json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout)["loaded"]
    )
    assert not {"typer", "nfq_agent.host.xtables.backend", "nfq_agent.service.supervisor"} & loaded
    code = (
        "import sys; from nfq_agent.cli import serve; from nfq_agent.config.models import Config; "
        "import nfq_agent.service.supervisor, nfq_agent.host.xtables.backend; serve.loading.checked(Config()); "
        "print(*sys.modules)"
    )
    loaded = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout.split())
    assert "nfq_agent.service.queue_worker" in loaded
    assert not {"typer", "http.client", "nfq_agent.policy_options", "nfq_agent.rules.kernel_policy"} & loaded
    # `doctor`, the conditions of policies, and what serves proxies and interfaces: loaded when they are asked for.
    later = {"cli.doctor", "match", "service.proxy_worker", "service.taps", "service.inlines"}
    assert not {f"nfq_agent.{name}" for name in later} & loaded


def test_the_version_is_printed() -> None:
    done = subprocess.run([sys.executable, "-m", "nfq_agent", "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"nfq-agent \d+\.\d+\S*\n", done.stdout)


@pytest.mark.parametrize("verb", [["elements"], ["--help"], ["--version"]])
def test_a_full_disk_behind_standard_output_is_named(verb: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "nfq_agent", *verb], stdout=full, stderr=subprocess.PIPE, text=True)
    said = "standard output cannot be written: No space left on device; free some space there, or write elsewhere"
    assert (done.returncode, done.stderr) == (1, f"nfq-agent: {said}\n")


def test_a_full_disk_behind_standard_error_keeps_the_exit_code() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "nfq_agent", "check", "--config", "/nonexistent"], stdout=subprocess.PIPE, stderr=full
        )
    assert (done.returncode, done.stdout) == (78, b"")


def test_an_export_that_is_stopped_without_a_reader_says_so() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    export = subprocess.Popen(
        [sys.executable, "-m", "nfq_agent", "export", "json"], stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    deadline = time.monotonic() + 60
    while not catches(export.pid, signal.SIGTERM) and time.monotonic() < deadline:
        time.sleep(0.02)
    export.terminate()
    _, said = export.communicate(timeout=60)
    assert (export.returncode, said) == (1, "nfq-agent: no process reads the standard output any more\n")


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process handles this signal (SigCgt of proc(5))."""
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt:"))
    return bool(int(line.split()[1], 16) >> number - 1 & 1)
