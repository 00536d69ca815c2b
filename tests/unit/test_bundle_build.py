"""What goes into a bundle for devices: wheels for the device, all of them, and a list of materials."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.support.wheels import make_wheel

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / ".ci"))

import bundle  # noqa: E402
import sbom  # noqa: E402
from wheels import Target, Wheel, dependencies, locked  # noqa: E402

ARM = Target(arch="aarch64", python="3.13")


@pytest.fixture
def wheels(tmp_path: Path) -> list[Wheel]:
    """An agent that needs `codec`, on ARM `neon` too, and `signer` with its extra."""
    needs = ["codec>=2", "neon; platform_machine == 'aarch64'", "sse; platform_machine == 'x86_64'"]
    needs += ["signer; extra == 'signing'", "shim; python_version < '3.12'"]
    made = [
        make_wheel(tmp_path, "edge_agent", "1.0", {}, requires=needs, license_expression="Apache-2.0"),
        make_wheel(tmp_path, "codec", "2.1", {}, license_expression="MIT OR Apache-2.0"),
        make_wheel(tmp_path, "neon", "1.0", {}, requires=["codec"]),
        make_wheel(tmp_path, "signer", "3", {}, license_expression="not a licence that anybody knows"),
    ]
    return [Wheel(path) for path in made]


def test_markers_are_judged_for_the_device_and_not_for_this_host(wheels: list[Wheel]) -> None:
    needs = dependencies(Requirement("edge-agent[signing]"), wheels, ARM)
    assert needs == {
        "edge-agent": {"codec", "neon", "signer"},
        "codec": set(),
        "neon": {"codec"},
        "signer": set(),
    }


def test_a_wheel_that_is_missing_or_too_old_is_named(wheels: list[Wheel], tmp_path: Path) -> None:
    with pytest.raises(LookupError, match="edge-agent needs sse"):
        dependencies(Requirement("edge-agent"), wheels, Target(arch="x86_64", python="3.13"))
    old = Wheel(make_wheel(tmp_path, "codec", "1.9", {}))
    with pytest.raises(LookupError, match=r"codec>=2, there is 1\.9"):
        dependencies(Requirement("edge-agent"), [wheels[0], old, *wheels[2:]], ARM)


def test_the_list_of_materials_is_valid_and_the_same_each_time(wheels: list[Wheel]) -> None:
    """`sbom.make` holds its result against the schema."""
    own, *others = wheels
    needs = dependencies(Requirement("edge-agent[signing]"), wheels, ARM)
    text = sbom.make(own, others, needs, arch="aarch64", made_at_s=1_767_225_600)
    assert text == sbom.make(own, others, needs, arch="aarch64", made_at_s=1_767_225_600)
    document = json.loads(text)
    assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", "1.6")
    assert document["metadata"]["component"]["name"] == "edge-agent"
    digests = {component["name"]: component["hashes"][0]["content"] for component in document["components"]}
    assert digests == {wheel.name: wheel.sha256 for wheel in others}
    edges = {entry["ref"]: entry.get("dependsOn", []) for entry in document["dependencies"]}
    assert edges[wheels[2].path.name] == [wheels[1].path.name]


@pytest.mark.parametrize("arch", ["x86_64", "aarch64"])
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
def test_the_lock_has_each_package_once_for_every_device(arch: str, python: str) -> None:
    names = [requirement.name for requirement, _ in locked(bundle.LOCK, Target(arch=arch, python=python))]
    assert len(names) == len(set(names))
    assert {"onnxruntime-genai", "mlflow-skinny", "model-signing", "sqlalchemy", "pip"} <= set(names)


def test_the_same_content_makes_the_same_bundle(tmp_path: Path) -> None:
    archives = []
    for number in (1, 2):
        stage = tmp_path / str(number) / "edge-agent-1.0"
        (stage / "wheels").mkdir(parents=True)
        (stage / "wheels" / "a.whl").write_bytes(b"wheel")
        bundle.write_files(stage, "1.0", "x86_64")
        bundle.pack(stage, tmp_path / f"{number}.tar.gz", made_at_s=1_767_225_600)
        archives.append((tmp_path / f"{number}.tar.gz").read_bytes())
    assert archives[0] == archives[1]
