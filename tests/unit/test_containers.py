"""The container behind an interface: names from a runtime's socket, groups of processes, and what a worker is told."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import UnixStreamServer
from threading import Thread

import pytest

from nfq_agent.capture.owners import InterfaceOwners, told
from nfq_agent.host import containers
from nfq_agent.host.containers import Containers, Runtime
from nfq_agent.packet import Packet

WEB, POD, OTHER = "1" * 64, "2" * 64, "3" * 64
# As `podman system service` answers (4.3), and dockerd; shortened.
LISTED = [
    {"Id": WEB, "Names": ["/web"], "Labels": None},
    {
        "Id": POD,
        "Names": ["/k8s_app_shop"],
        "Labels": {"io.kubernetes.pod.namespace": "shop", "io.kubernetes.pod.name": "cart-0", "app": "cart"},
    },
]


class Answering(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Engine)
        server.asked.append(self.path)
        self.send_response(server.status)
        self.end_headers()
        self.wfile.write(server.body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a client of a Unix socket has no address."""


class Engine(UnixStreamServer):
    """A runtime's socket."""

    status = 200
    body = json.dumps(LISTED).encode()
    asked: list[str]


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    with Engine(str(tmp_path / "engine.sock"), Answering) as server:
        server.asked = []
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def runtime(server: Engine, said: list[str], clock: list[float] | None = None) -> Runtime:
    return Runtime(str(server.server_address), said.append, lambda: (clock or [100.0])[0])


def test_a_runtime_tells_names_and_pods(engine: Engine) -> None:
    said: list[str] = []
    assert runtime(engine, said).names() == {WEB[:12]: "web", POD[:12]: "shop/cart-0"}
    assert (engine.asked, said) == (["/containers/json"], [])


@pytest.mark.parametrize(
    ("status", "body"),
    [(500, b"[]"), (200, b"no json"), (200, b'[{"Id": 7}]'), (200, b'{"message": "x"}'), (200, b'[{"Id":"1","Names":[]}]')],
)
def test_a_runtime_that_fails_is_said_once_and_left_alone_for_a_while(engine: Engine, status: int, body: bytes) -> None:
    engine.status, engine.body = status, body
    said: list[str] = []
    clock = [100.0]
    asked = runtime(engine, said, clock)
    assert [asked.names() for _ in range(3)] == [{}, {}, {}]
    assert (len(engine.asked), len(said)) == (1, 1)
    assert "does not name containers" in said[0]
    clock[0] += 61
    engine.status, engine.body = 200, Engine.body
    assert asked.names()[WEB[:12]] == "web"
    assert len(said) == 1


def test_a_runtime_that_does_not_answer_is_not_waited_for(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "silent"))
        silent.listen()
        said: list[str] = []
        assert Runtime(str(tmp_path / "silent"), said.append).names() == {}
        assert len(said) == 1


def test_containers_are_found_by_their_groups(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "groups"
    for path, text in [
        (f"machine.slice/libpod-{WEB}.scope/container", f"{os.getpid()}\n"),
        (f"system.slice/docker-{OTHER}.scope", "0\n"),
        (f"kubepods.slice/cri-containerd-{POD}.scope", ""),
        ("system.slice/ssh.service", "1\n"),
        (f"gone.slice/docker-{OTHER}.scope", "4194305\n"),
    ]:
        (root / path).mkdir(parents=True)
        (root / path / "cgroup.procs").write_text(text)
    # This process is in this very namespace, to which it has no number.
    assert Containers(root=root).by_namespace() == {}
    monkeypatch.setattr(containers, "namespace_id", lambda _: 7)
    assert Containers(root=root).by_namespace() == {7: WEB[:12]}
    found = Containers([runtime(engine, [])], root)
    assert [found.by_namespace(), found.by_namespace()] == [{7: "web"}, {7: "web"}]
    assert len(engine.asked) == 1


def test_a_worker_knows_the_container_of_a_packet_by_its_interface() -> None:
    owners = InterfaceOwners()
    word, *rest = told(3, "shop/cart 0").split(" ")
    assert (word, len(rest)) == ("container", 2)
    owners.name(*rest)
    assert owners.known(Packet(b"", indev=3)) == owners.names(Packet(b"", outdev=3)) == {"container": "shop/cart 0"}
    assert owners.names(Packet(b"", indev=4)) == {}
    owners.gone("3")
    assert owners.names(Packet(b"", indev=3)) == {}
