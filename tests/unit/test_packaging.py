"""What is packaged agrees with the agent: the default file, the manual, the licences, the two units."""

from __future__ import annotations

import re
import subprocess
import sys
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from packaged import manifest

import nfq_agent
from nfq_agent.config.file import load
from nfq_agent.config.model import Model
from nfq_agent.config.models import Agent, LogConfig, QueueConfig
from nfq_agent.config.proxy import ProxyConfig
from nfq_agent.config.rule import RuleConfig
from nfq_agent.rules.plan import plan

TOP = Path(__file__).resolve().parent.parent.parent
MANUAL = (TOP / "packaging/man/nfq-agent.toml.5").read_text()


def test_the_shipped_file_is_what_holds_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nfq_agent.config.file.DEFAULT_PATH", tmp_path / "nfq-agent.toml")
    shipped, without = load(TOP / "packaging/nfq-agent.toml"), load(None)
    assert (shipped.agent, shipped.log, shipped.queue) == (without.agent, without.log, without.queue)
    # The file writes out what a rule's table and role are when they are left out.
    assert plan(shipped, 1) == plan(without, 1)


@pytest.mark.parametrize(
    ("table", "model"),
    [("agent", Agent), ("log", LogConfig), ("queue.NAME", QueueConfig), ("rules.NAME", RuleConfig), ("proxy.NAME", ProxyConfig)],
)
def test_the_manual_has_every_key(table: str, model: type[Model]) -> None:
    (section,) = re.findall(rf"^\.SH \[{re.escape(table)}\]\n(.*?)(?=^\.SH )", MANUAL, re.MULTILINE | re.DOTALL)
    heads = " ".join(re.findall(r"^\.TP\n\.BR? (.*)$", section, re.MULTILINE))
    keys = {field.alias or name for name, field in model.model_fields.items()}
    assert keys <= set(re.findall(r"\w+", heads))


def manifests(with_names: bool = False) -> list[dict[str, Any]]:
    """The Kubernetes manifest. with_names: with what the names of pods take."""
    return list(yaml.safe_load_all(manifest(with_names)))


@pytest.mark.parametrize("with_names", [False, True])
def test_the_manifests_fit_the_schemas_of_kubernetes(with_names: bool) -> None:
    version = kubernetes_validate.latest_version()
    found = manifests(with_names)
    assert [each["kind"] for each in found] == ["ConfigMap", "DaemonSet"]
    for each in found:
        # strict: a key that the schema does not know is an error.
        kubernetes_validate.validate(each, version, strict=True)


@pytest.mark.parametrize(("key", "value"), [("capabilties", {}), ("runAsUser", "root")])
def test_a_wrong_key_in_a_manifest_is_found(key: str, value: object) -> None:
    _, daemon_set = manifests()
    daemon_set["spec"]["template"]["spec"]["containers"][0]["securityContext"][key] = value
    with pytest.raises(kubernetes_validate.ValidationError, match=key):
        kubernetes_validate.validate(daemon_set, kubernetes_validate.latest_version(), strict=True)


def test_the_agent_takes_the_configuration_of_the_manifest(tmp_path: Path) -> None:
    config_map, daemon_set = manifests()
    file = tmp_path / "nfq-agent.toml"
    file.write_text(config_map["data"]["nfq-agent.toml"])
    assert load(file).tap
    pod = daemon_set["spec"]["template"]["spec"]
    volumes = {each["name"] for each in pod["volumes"]}
    assert {each["name"] for each in pod["containers"][0]["volumeMounts"]} == volumes == {"config", "run"}


def test_the_manifest_gives_two_capabilities_and_a_third_for_names_alone() -> None:
    for with_names, more, volumes in ((False, [], 2), (True, ["SYS_PTRACE"], 4)):
        pod = manifests(with_names)[1]["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        context = container["securityContext"]
        assert context["capabilities"] == {"drop": ["ALL"], "add": ["NET_ADMIN", "NET_RAW", *more]}
        assert (context["runAsUser"], context["readOnlyRootFilesystem"]) == (61000, True)
        assert context["allowPrivilegeEscalation"] is False
        assert ("hostPID" in pod, len(pod["volumes"]), len(container["volumeMounts"])) == (with_names, volumes, volumes)


def test_every_requirement_has_its_licence_named() -> None:
    text = (TOP / "packaging/requirements.txt").read_text()
    named = (TOP / "packaging/debian/copyright").read_text()
    required = {name.replace("-", "_") for name in re.findall(r"^([\w-]+)==", text, re.MULTILINE)}
    left_out = tuple(re.findall(r'"\$lib"/(\w+)\*', (TOP / "packaging/stage").read_text()))
    assert len(left_out) == 3
    listed = set(re.findall(r"[\w/]+", " ".join(re.findall(r"^Files: (.*)$", named, re.MULTILINE))))
    assert {name for name in required if not name.startswith(left_out)} <= listed
    assert not [name for name in listed if name.startswith(left_out)]


@pytest.mark.parametrize("unit", ["nfq-agent", "nfq-agent-rules"])
def test_the_two_units_differ_in_the_instance_only(unit: str) -> None:
    one = (TOP / f"systemd/{unit}.service").read_text().splitlines()
    each = (TOP / f"systemd/{unit}@.service").read_text().splitlines()
    plain = [
        re.sub(
            r"/%i\.(sock|lock)$",
            r"/default.\1",
            re.sub(r" --instance %i| --config /etc/nfq-agent/%i\.toml| \(instance %i\)|@%i", "", line),
        )
        for line in each
    ]
    assert [line for line in plain if not line.startswith("#")] == [line for line in one if not line.startswith("#")]


def version() -> str:
    """The version of pyproject.toml."""
    (found,) = re.findall(r'^version = "(.*)"$', (TOP / "pyproject.toml").read_text(), re.MULTILINE)
    return str(found)


def test_the_agent_is_at_the_version() -> None:
    assert nfq_agent.__version__ == version()
    shown = subprocess.run([sys.executable, "-m", "nfq_agent", "--version"], capture_output=True, text=True, check=True).stdout
    assert shown == f"nfq-agent {version()}\n"


def test_a_tag_is_at_the_version() -> None:
    tags = subprocess.run(["git", "tag", "--points-at", "HEAD", "v*"], cwd=TOP, capture_output=True, text=True).stdout.split()
    assert set(tags) <= {f"v{version()}"}


def test_the_changelogs_are_at_the_version() -> None:
    released = r"^## (\d+\.\d+\.\d+) - (\d{4}-\d\d-\d\d)$"
    ours = re.findall(released, (TOP / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert ours[0][0] == version()
    debian = (TOP / "packaging/debian/changelog").read_text()
    dates = [parsedate_to_datetime(date).date().isoformat() for date in re.findall(r"^ -- .*?>  (.*)$", debian, re.MULTILINE)]
    assert list(zip(re.findall(r"^nfq-agent \((.*?)\)", debian, re.MULTILINE), dates, strict=True)) == ours
    rpm = (TOP / "packaging/rpm/changelog.yaml").read_text()
    assert re.findall(r"^- semver: (.*)\n  date: (.*?)T", rpm, re.MULTILINE) == ours


def test_the_maintainer_is_one() -> None:
    files = ("debian/control", "debian/changelog", "rpm/nfpm.yaml", "rpm/changelog.yaml")
    named = {
        name
        for file in files
        for name in re.findall(
            r"^(?:Maintainer: |maintainer: |  packager: | -- )(.*?>)", (TOP / "packaging" / file).read_text(), re.MULTILINE
        )
    }
    ((address,),) = [re.findall(r"<(.*)>", each) for each in named]
    assert f'email = "{address}"' in (TOP / "pyproject.toml").read_text()
