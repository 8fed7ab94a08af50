"""A policy by country on a confined worker: the database is read before confinement, and again when it changes."""

from __future__ import annotations

from pathlib import Path

import pytest
from agent import Agent, until
from mmdb import write_database
from namespace import Namespace, join

pytestmark = pytest.mark.kernel
CONFIG = """
[agent]
drift_check = "200ms"

[queue.q]
num = 9
elements = ["places"]

[element.places]
type = "policy"
geo = "places.mmdb"
default = "drop"
rule = [{ action = "accept", dst_country = "DE" }, { action = "accept", src_asn = 64500 }]

[rules.r]
queue = "q"
hooks = ["output", "input"]
tcp_ports = [8080]
"""
SERVERS = {"10.203.0.1": "10.203.0.0/24", "fd00:203::1": "fd00:203::/64"}


def reached(host: Namespace, address: str) -> bool:
    return host.run("nc", "-z", "-w", "1", address, "8080", check=False).returncode == 0


def write(folder: Path, country: str, asn: int) -> None:
    """The database with all addresses of the servers in one country, as an updater replaces it."""
    record = {"country": {"iso_code": country}, "asn": f"AS{asn}"}
    new = write_database(folder / "new", dict.fromkeys(SERVERS.values(), record))
    new.rename(folder / "places.mmdb")


def test_a_database_is_read_before_the_worker_confines_itself_and_when_it_changes(tmp_path: Path) -> None:
    with Namespace() as server, Namespace() as host:
        join(server, host)
        for address in SERVERS:
            server.start("nc", "-lk", address, "8080")
        write(tmp_path, "DE", 64500)
        agent = Agent(host, tmp_path, CONFIG).ready()
        for address in SERVERS:
            until(lambda: reached(host, address), "the server is reached")  # noqa: B023  # called before the next turn of the loop
        write(tmp_path, "FR", 64501)
        until(lambda: not reached(host, "10.203.0.1"), "the changed database is in force")
        assert not reached(host, "fd00:203::1")
        (tmp_path / "places.mmdb").write_text("broken")
        until(lambda: "places.mmdb: not a usable database" in agent.log, "the broken one is refused")
        assert not reached(host, "10.203.0.1")
        refused = agent.verb("check", check=False)
        assert refused.returncode == 78
        assert f"{tmp_path}/places.mmdb: not a usable database" in refused.stdout + refused.stderr
        write(tmp_path, "DE", 64500)
        until(lambda: reached(host, "fd00:203::1"), "the good one is in force")
        said = agent.verb("explain", "tcp", "192.0.2.1:8080").stdout
        assert "dst_country is not known" in " ".join(said.split())
        assert agent.stop() == 0
