"""The manifest through kubectl --dry-run=client, which asks a server only which kinds there are.

Its schemas are checked by tests/unit/test_packaging.py: this kubectl has none of its own.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytestmark = pytest.mark.kernel

TOP = Path(__file__).resolve().parent.parent.parent
MANIFEST = TOP / "packaging/kubernetes/nfq-agent.yaml"


def _kind(name: str, kind: str) -> dict[str, object]:
    return {"name": name, "singularName": "", "namespaced": True, "kind": kind, "verbs": ["create", "get", "list"]}


# What a server answers about the kinds that it has (kubernetes.io, "The Kubernetes API", discovery).
_APPS = {"groupVersion": "apps/v1", "version": "v1"}
_ANSWERS: dict[str, dict[str, object]] = {
    "/api": {"kind": "APIVersions", "versions": ["v1"]},
    "/apis": {
        "kind": "APIGroupList",
        "apiVersion": "v1",
        "groups": [{"name": "apps", "versions": [_APPS], "preferredVersion": _APPS}],
    },
    "/api/v1": {"kind": "APIResourceList", "groupVersion": "v1", "resources": [_kind("configmaps", "ConfigMap")]},
    "/apis/apps/v1": {"kind": "APIResourceList", "groupVersion": "apps/v1", "resources": [_kind("daemonsets", "DaemonSet")]},
}


class _Kinds(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        answer = _ANSWERS.get(self.path.partition("?")[0])
        body = json.dumps(answer or {}).encode()
        self.send_response(404 if answer is None else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the tests' output is theirs."""


@pytest.fixture
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Kinds) as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{made.server_port}"
        made.shutdown()
        thread.join()


def kubectl(server: str, manifest: Path, home: Path) -> subprocess.CompletedProcess[str]:
    """`kubectl create --dry-run=client`. The program is unpacked by tests/run, or that of this host."""
    unpacked = TOP / "build/unpacked/kubernetes-client/usr/bin/kubectl"
    program = str(unpacked) if unpacked.exists() else shutil.which("kubectl")
    if program is None:
        pytest.skip("kubectl is not unpacked (tests/run --kernel does it)")
    command = [program, f"--server={server}", "create", "--dry-run=client", "--validate=false", "--output=json"]
    return subprocess.run(
        [*command, f"--filename={manifest}"], env={"HOME": str(home)}, capture_output=True, text=True, timeout=120
    )


def test_kubectl_takes_the_manifest(server: str, tmp_path: Path) -> None:
    done = kubectl(server, MANIFEST, tmp_path)
    assert done.returncode == 0, done.stderr
    decoder = json.JSONDecoder()
    found, rest = [], done.stdout.strip()
    while rest:
        each, end = decoder.raw_decode(rest)
        found.append((each["kind"], each["metadata"]["name"]))
        rest = rest[end:].lstrip()
    assert found == [("ConfigMap", "nfq-agent"), ("DaemonSet", "nfq-agent")]


@pytest.mark.parametrize(
    ("right", "wrong"), [("kind: DaemonSet", "kind: DemonSet"), ("metadata:\n  name", "metadata:\n name: [")]
)
def test_kubectl_refuses_a_wrong_one(server: str, tmp_path: Path, right: str, wrong: str) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text(MANIFEST.read_text().replace(right, wrong))
    assert kubectl(server, broken, tmp_path).returncode != 0
