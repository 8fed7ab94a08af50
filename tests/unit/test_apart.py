"""A configuration that a process of its own checks: the same values and faults; where elements are named it is checked here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

# Reads a file as a start does, and then in the process itself.
_READ = """
import json, sys
from pathlib import Path
from nfq_agent.cli import apart, loading
from nfq_agent.cli.flags import Flags
from nfq_agent.config.models import ConfigError
where = []
try:
    wait = lambda: where.append("waited")
    config = loading.configuration(Flags(Path(sys.argv[1])), lambda *read: apart.check_apart(*read, wait))
    said = {"values": repr(config), "table": config.table, "changed": [str(each) for each in config.changed_files()]}
except ConfigError as error:
    said = {"faults": error.faults}
loaded = "pydantic" in sys.modules
if "faults" in said:
    try:
        loading.configuration(Flags(Path(sys.argv[1])))
    except ConfigError as error:
        said["same"] = error.faults == said["faults"]
else:
    here = loading.configuration(Flags(Path(sys.argv[1])))
    said["same"] = (repr(here), here.table) == (said["values"], said["table"]) and here == config
print(json.dumps({**said, "loaded": loaded, "waited": bool(where)}))
"""
# What an agent does that starts again and finds faults in its files.
_SERVED_BEFORE = """
import json, sys
from pathlib import Path
from types import SimpleNamespace
from nfq_agent.cli import serve
from nfq_agent.cli.flags import Flags
from nfq_agent.config.models import ConfigError
store = SimpleNamespace(inherited=True, noted=lambda name: {"queue": {"main": {"num": 7}}})
config = serve.served_before(Flags(Path(sys.argv[1])), store, ConfigError([]))
print(json.dumps({"num": config.queue["main"].num, "remark": config.remark != "", "loaded": "pydantic" in sys.modules}))
"""
_RULES = '[rules.app]\nqueue = "main"\ntcp_ports = [80, "8000:8010"]\nsrc = ["10.0.0.0/8"]\nmark = "0x1/0xf"\n'
_SERVED = f"[agent]\nreload_on_change = true\n[queue.main]\nnum = 7\n{_RULES}[proxy.web]\nlisten = ['[::1]:15002']\n"


def read(tmp_path: Path, text: str, before: str = "") -> dict[str, object]:
    path = tmp_path / "nfq-agent.toml"
    path.write_text(text)
    done = subprocess.run([sys.executable, "-c", before + _READ, str(path)], check=True, capture_output=True, text=True)
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_a_configuration_without_elements_is_checked_apart(tmp_path: Path) -> None:
    found = read(tmp_path, _SERVED)
    assert "num=7" in str(found["values"])
    assert "15002" in str(found["values"])
    assert (found["loaded"], found["waited"], found["same"], found["changed"]) == (False, True, True, [])


@pytest.mark.parametrize(
    "text",
    [
        "[queue.main]\nnumber = 7\n",
        "[queue.main]\nnum = 7\nbalance = '1:2'\n",
        "[rules.app]\nqueue = 'nothing'\ntcp_ports = [80]\n",
        "[queue.main]\nnum = 'x'\n[inline.edge]\ninterfaces = []\nfail_open = false\nrole = 'server'\n",
        "[proxy.web]\nlisten = []\n[log]\nlevel = 'loud'\n",
        "[queue.main]\nelements = 7\n",
        "queue = 7\n",
    ],
)
def test_its_faults_are_the_same(tmp_path: Path, text: str) -> None:
    found = read(tmp_path, text)
    assert found["faults"]
    assert found["same"]


def test_elements_are_checked_here(tmp_path: Path) -> None:
    found = read(tmp_path, f'[queue.main]\nelements = ["log"]\n{_RULES}')
    assert (found["loaded"], found["waited"], found["same"]) == (True, False, True)


def test_what_served_before_is_checked_apart(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _SERVED_BEFORE, str(tmp_path / "x.toml")], check=True, capture_output=True, text=True
    )
    assert json.loads(done.stdout) == {"num": 7, "remark": True, "loaded": False}


def test_where_the_process_is_killed_it_is_checked_here(tmp_path: Path) -> None:
    killed = (
        "import os, signal\nfrom nfq_agent.cli import apart\nmain = os.getpid()\nreal = apart.check\n"
        "def check(*read):\n"
        "    if os.getpid() != main: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(*read)\n"
        "apart.check = check\n"
    )
    found = read(tmp_path, _SERVED, killed)
    assert (found["loaded"], found["same"]) == (True, True)


def test_where_no_process_can_be_made_it_is_checked_here(tmp_path: Path) -> None:
    refused = "import os\ndef fork(): raise OSError(11, 'no')\nos.fork = fork\n"
    found = read(tmp_path, _SERVED, refused)
    assert (found["loaded"], found["waited"], found["same"]) == (True, False, True)
