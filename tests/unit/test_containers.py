"""The container behind an interface: names from a runtime's socket, groups of processes, and what a worker is told."""

from __future__ import annotations

import json
import os
import select
import socket
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import UnixStreamServer
from threading import Thread

import pytest
from runtime_contract import keeps_the_contract

from nfq_agent.capture.owners import InterfaceOwners, told
from nfq_agent.host import container_runtime, containers
from nfq_agent.host.container_runtime import RuntimeSocket
from nfq_agent.host.containers import Containers
from nfq_agent.host.links import Link
from nfq_agent.owner import Owners
from nfq_agent.packet import Hook, Packet
from nfq_agent.policy_rule import policy_rule
from nfq_agent.service.container_names import Behind, ContainerNames
from nfq_agent.service.container_search import ContainerSearch
from nfq_agent.service.forwarded_owners import ForwardedOwners

WEB, POD, OTHER, HOLDER = "1" * 64, "2" * 64, "3" * 64, "0" * 64
# As `podman system service` answers (4.3), and dockerd; shortened.
LISTED = [
    {"Id": WEB, "Names": ["/web"], "Labels": None},
    {
        "Id": POD,
        "Names": ["/k8s_app_shop"],
        "Labels": {"io.kubernetes.pod.namespace": "shop", "io.kubernetes.pod.name": "cart-0", "app": "cart"},
    },
    # Of a pod that `podman kube play` makes.
    {"Id": HOLDER, "Names": ["/98b1daf1d31d-infra"], "Labels": {}},
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
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    # It answers at once, and on a loaded machine later.
    monkeypatch.setattr(container_runtime, "_PATIENCE", 60.0)
    with Engine(str(tmp_path / "engine.sock"), Answering) as server:
        server.asked = []
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def runtime(server: Engine, said: list[str], clock: list[float] | None = None) -> RuntimeSocket:
    return RuntimeSocket(str(server.server_address), said.append, lambda: (clock or [100.0])[0])


def test_a_runtime_tells_names_and_pods(engine: Engine) -> None:
    said: list[str] = []
    assert runtime(engine, said).names() == {WEB[:12]: "web", POD[:12]: "shop/cart-0"}
    assert (engine.asked, said) == (["/containers/json"], [])


def test_the_fake_keeps_the_contract_that_docker_and_podman_keep(engine: Engine) -> None:
    """For those two: tests/booted/test_container_names.py."""
    keeps_the_contract(str(engine.server_address), {WEB: "web", POD: "shop/cart-0"})


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
    # Each pause is twice as long as the one before, up to a minute.
    for number, seconds in enumerate((1, 2, 4, 8, 16, 32, 60, 60), 1):
        clock[0] += seconds - 0.1
        assert (asked.names(), len(engine.asked)) == ({}, number)
        clock[0] += 0.2
        assert (asked.names(), len(engine.asked)) == ({}, number + 1)
    clock[0] += 61
    engine.status, engine.body = 200, Engine.body
    assert asked.names()[WEB[:12]] == "web"
    assert len(said) == 1


def test_a_runtime_that_does_not_answer_is_not_waited_for(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "silent"))
        silent.listen()
        said: list[str] = []
        clock = [100.0]
        asked = RuntimeSocket(str(tmp_path / "silent"), said.append, lambda: clock[0])
        assert [asked.names(), asked.names(), said] == [{}, {}, []]
        clock[0] += 21
        assert asked.names() == {}
        assert len(said) == 1
        assert "no answer within 20 s" in said[0]


def test_an_answer_that_comes_late_is_read_by_a_later_call(tmp_path: Path) -> None:
    """Podman's service is started by the question, and takes longer than the supervisor waits."""
    with socket.socket(socket.AF_UNIX) as slow:
        slow.bind(str(tmp_path / "slow"))
        slow.listen()
        said: list[str] = []
        asked = RuntimeSocket(str(tmp_path / "slow"), said.append)
        assert asked.names() == {}
        connection, _ = slow.accept()
        with connection:
            assert connection.recv(1000).startswith(b"GET /containers/json ")
            connection.sendall(b"HTTP/1.0 200 OK\r\n")
            assert asked.names() == {}
            connection.sendall(b"\r\n" + Engine.body)
            assert asked.names() == {}
        assert asked.names() == {WEB[:12]: "web", POD[:12]: "shop/cart-0"}
        # The next one is a question of its own.
        assert asked.names() == {}
        slow.accept()[0].close()
        assert said == []
        assert asked.names() == {}
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
    assert [found.by_namespace(1.0), found.by_namespace(1.1), found.by_namespace(9.0)] == [{7: "web"}] * 3
    assert len(engine.asked) == 1
    # On a node of Kubernetes the logs name the pod; a runtime that is asked knows better.
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / f"cart-0_shop_app-{WEB}.log").touch()
    (logs / "other.log").touch()
    assert Containers(root=root, logs=logs).by_namespace() == {7: "shop/cart-0"}


def test_a_pod_has_the_name_of_a_container_that_does_more_than_hold_its_namespace(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The holder's control group comes first; it has neither a name nor, on a node of Kubernetes, a log."""
    root = tmp_path / "groups"
    for each in (HOLDER, WEB):
        group = root / f"libpod_parent/libpod-{each}"
        group.mkdir(parents=True)
        (group / "cgroup.procs").write_text("7\n")
    monkeypatch.setattr(containers, "_namespace_of", lambda _: 4)
    none = tmp_path / "none"
    assert Containers(root=root, logs=none).by_namespace() == {4: HOLDER[:12]}
    found = Containers([runtime(engine, [])], root, logs=none)
    assert [found.by_namespace(1.0), found.by_namespace(9.0)] == [{4: "web"}] * 2
    # It is not asked again for a name that it does not tell.
    assert len(engine.asked) == 1
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / f"cart-0_shop_app-{WEB}.log").touch()
    assert Containers(root=root, logs=logs).by_namespace() == {4: "shop/cart-0"}


@pytest.mark.parametrize(
    ("text", "error", "may", "said"),
    [
        ("7\n", PermissionError, False, "allowed: CAP_SYS_PTRACE (the drop-in containers.conf of the unit)"),
        # Where processes of others are hidden, they seem not to be there.
        ("7\n", FileNotFoundError, False, "allowed: CAP_SYS_PTRACE"),
        ("7\n", FileNotFoundError, True, ""),
        ("7\n", ProcessLookupError, False, ""),
        ("0\n", None, True, "a PID namespace that is not seen from here; allowed: the processes of the host"),
    ],
)
def test_what_keeps_containers_from_being_known_is_said_once(  # fixtures
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, error: type[OSError] | None, may: bool, said: str
) -> None:
    group = tmp_path / f"docker-{WEB}.scope"
    group.mkdir()
    (group / "cgroup.procs").write_text(text)
    monkeypatch.setattr(containers, "has_capability", lambda _: may)

    def fails(*_: object) -> int:
        assert error is not None
        raise error(1, "no", "/proc/7/ns/net")

    monkeypatch.setattr(os, "open", fails)
    heard: list[str] = []
    found = Containers(root=tmp_path, warn=heard.append)
    assert [found.by_namespace(1.0), found.by_namespace(9.0)] == [{}, {}]
    assert len(heard) == bool(said)
    assert said in "".join(heard)


def test_a_group_that_goes_while_it_is_looked_at_is_not_what_keeps_them_from_being_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(containers, "has_capability", lambda _: False)
    # The first of two, by their paths, is removed between the listing and the look: it has no file any more.
    (tmp_path / f"docker-{WEB}.scope").mkdir()
    group = tmp_path / f"docker-{OTHER}.scope"
    group.mkdir()
    (group / "cgroup.procs").write_text("0\n")
    heard: list[str] = []
    assert Containers(root=tmp_path, warn=heard.append).by_namespace() == {}
    assert len(heard) == 1
    assert "they are in a PID namespace that is not seen from here" in heard[0]


def test_a_hidden_process_is_named_before_one_of_another_pid_namespace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "has_capability", lambda _: False)
    # The containers of another host, as of a test run beside this one, may stand before ours by their paths.
    for name, text in (("a", "0\n"), ("b", "2147483647\n")):
        group = tmp_path / name / f"docker-{WEB}.scope"
        group.mkdir(parents=True)
        (group / "cgroup.procs").write_text(text)
    heard: list[str] = []
    assert Containers(root=tmp_path, warn=heard.append).by_namespace() == {}
    assert len(heard) == 1
    assert "not known: /proc/2147483647/ns/net: No such file or directory; allowed: CAP_SYS_PTRACE" in heard[0]


def test_a_worker_knows_the_container_of_a_packet_by_its_interface() -> None:
    owners = InterfaceOwners()
    word, *rest = told(3, "shop/cart 0").split(" ")
    assert (word, len(rest)) == ("container", 2)
    owners.name(*rest)
    assert owners.known(Packet(b"", indev=3)) == owners.names(Packet(b"", outdev=3)) == {"container": "shop/cart 0"}
    assert owners.names(Packet(b"", indev=4)) == {}
    owners.gone("3")
    assert owners.names(Packet(b"", indev=3)) == {}


def test_a_forwarded_flow_has_the_containers_at_both_ends() -> None:
    names = ContainerNames()
    owners = ForwardedOwners(names, Owners())
    assert owners.names(Packet(b"", hook=Hook.FORWARD, indev=3)) == {}
    names.write(Behind({3: "web", 4: "db"}))
    between = Packet(b"", hook=Hook.FORWARD, indev=3, outdev=4)
    assert owners.names(between) == owners.known(between) == {"container": "web", "container_to": "db"}
    assert owners.names(Packet(b"", hook=Hook.FORWARD, indev=9, outdev=4)) == {"container": "db"}
    # The ports of a bridge, not the bridge.
    assert owners.names(Packet(b"", hook=Hook.FORWARD, indev=9, outdev=9, physindev=4, physoutdev=3)) == {
        "container": "db",
        "container_to": "web",
    }
    assert owners.names(Packet(b"", hook=Hook.PREROUTING, indev=3)) == {"container": "web"}
    # A socket of the host has it.
    assert owners.names(Packet(b"", hook=Hook.INPUT, indev=3)) == owners.known(Packet(b"", hook=Hook.INPUT, indev=3)) == {}
    rule = policy_rule(1, None, "drop", (), [("container", ("db",))], False)
    assert rule.belongs({"container": "web", "container_to": "db"})
    assert not rule.belongs({"container": "web"})
    names.write(Behind())
    assert owners.names(between) == {}
    with pytest.raises(ValueError, match="do not fit"):
        names.write(Behind(dict.fromkeys(range(1100), "x" * 1000)))


def test_names_that_are_being_written_are_not_read() -> None:
    names = ContainerNames()
    reader, told = os.pipe()
    writer = os.fork()
    if writer == 0:
        os.close(told)
        # Until the test has seen enough of it: the end of the pipe can be read then.
        while not select.select([reader], [], [], 0)[0]:
            for number in range(150):
                names.write(Behind(dict.fromkeys(range(number % 50), str(number))))
        os._exit(0)
    os.close(reader)
    seen: set[str] = set()
    until = time.monotonic() + 60
    try:
        while len(seen) < 40 and time.monotonic() < until:
            found = names.read().links
            # All of one writing.
            assert len(set(found.values())) <= 1
            assert all(len(found) == int(number) % 50 for number in found.values())
            seen |= set(found.values())
    finally:
        os.close(told)
        os.waitpid(writer, 0)
    assert len(seen) == 40
    assert names.read().links == dict.fromkeys(range(49), "149")


def link(index: int, netns: int | None) -> Link:
    return Link(index, f"veth{index}", "veth", 1500, True, "", 2, netns, 0, False)


def test_a_runtime_that_answers_late_names_what_was_known_by_its_id(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Podman does, whose service is started by the first question."""
    (tmp_path / f"docker-{WEB}.scope").mkdir()
    (tmp_path / f"docker-{WEB}.scope" / "cgroup.procs").write_text("7\n")
    monkeypatch.setattr(containers, "_namespace_of", lambda _: 4)
    clock, now = [100.0], iter(range(100))

    class Known(Containers):
        def by_namespace(self, _: float | None = None) -> dict[int, str]:
            return super().by_namespace(next(now))

    engine.status = 500
    search = ContainerSearch(Known([runtime(engine, [], clock)], tmp_path, logs=tmp_path / "none"))
    search.seen(link(3, 4))
    assert search.found() == {3: WEB[:12]}
    assert search.later() == {}
    engine.status = 200
    clock[0] += 1.1
    assert search.later() == {3: "web"}
    assert search.named == {3: "web"}
    before = len(engine.asked)
    assert [search.later() for _ in range(3)] == [{}] * 3
    assert len(engine.asked) == before


def test_a_container_is_looked_for_until_it_is_found_but_not_for_ever() -> None:
    known: dict[int, str] = {}
    asked = []

    class Known(Containers):
        def by_namespace(self, now: float | None = None) -> dict[int, str]:
            asked.append(now)
            return known

    search = ContainerSearch(Known(root=Path("/none")))
    search.seen(link(3, None))
    search.seen(link(4, 7))
    assert search.found() == {}
    assert len(asked) == 1
    known[7] = "web"
    assert search.later() == {4: "web"}
    assert search.later() == {}
    assert search.named == {4: "web"}
    # The other end has moved to its namespace.
    known[8] = "db"
    search.seen(link(3, 8))
    assert search.found() == {3: "db"}
    search.gone(4)
    assert search.named == {3: "db"}
    search.seen(link(5, 9))
    before = len(asked)
    assert [search.later() for _ in range(70)] == [{}] * 70
    assert len(asked) - before == 59
