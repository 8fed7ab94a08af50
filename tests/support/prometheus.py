"""A real Prometheus with the alert rules as shipped, in a namespace, and what it answers."""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from namespace import ROOT, Namespace

ALERTS = ROOT / "packaging" / "monitoring" / "alerts.yml"
_CONFIG = """
global: {scrape_interval: SECONDSs, scrape_timeout: SECONDSs, evaluation_interval: 1s}
rule_files: [alerts.yml]
scrape_configs:
  - job_name: nfq-agent
    static_configs: [{targets: TARGETS}]
"""


class Prometheus:
    """The alert rules are those shipped."""

    def __init__(
        self,
        namespace: Namespace,
        folder: Path,
        targets: Sequence[str] = ("127.0.0.1:9749",),
        seconds: int = 1,
        patient: bool = False,
    ) -> None:
        """seconds: between scrapes, and for one at most. A loaded machine takes some for three hosts. patient: also with the time
        that a fault has to last; without it an alert is raised at once.
        """
        self._namespace = namespace
        shipped = ALERTS.read_text()
        (folder / "alerts.yml").write_text(shipped if patient else shipped.replace("for: 1m", "for: 0s"))
        (folder / "prometheus.yml").write_text(
            _CONFIG.replace("TARGETS", json.dumps(list(targets))).replace("SECONDS", str(seconds))
        )
        with (folder / "prometheus.log").open("wb") as log:
            namespace.start(
                "prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
                "--web.listen-address=127.0.0.1:9090", stdout=log, stderr=log,
            )  # fmt: skip

    def ask(self, query: str) -> list[dict[str, Any]]:
        """The series that a query gives; none until the server has read its files."""
        url = "http://127.0.0.1:9090/api/v1/query?query=" + urllib.parse.quote(query)
        answer = self._namespace.run("curl", "-s", "--max-time", "5", url, check=False).stdout
        # Until then it answers "Service Unavailable".
        if not answer.startswith("{"):
            return []
        told = json.loads(answer)
        assert told["status"] == "success", told
        found: list[dict[str, Any]] = told["data"]["result"]
        return found

    def value(self, query: str) -> float:
        """The value of the first series of a query, or -1."""
        found = self.ask(query)
        return float(found[0]["value"][1]) if found else -1.0

    def firing(self) -> set[tuple[str, str]]:
        """The alerts that fire: target and name."""
        return {(each["metric"]["instance"], each["metric"]["alertname"]) for each in self.ask('ALERTS{alertstate="firing"}')}
