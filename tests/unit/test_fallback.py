"""The rules of a fallback: which error asks for it, what the state keeps, what a version needs of a host."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from edge_agent.cache import record, state
from edge_agent.cache.record import VersionRecord
from edge_agent.cache.state import CacheState, ModelState
from edge_agent.errors import (
    CacheBusy,
    CannotRun,
    EdgeAgentError,
    LoadFailed,
    ManifestError,
    PolicyError,
    RegistryRefused,
    RunnerError,
    SettingsError,
    StoreError,
    TransportError,
    UnknownReference,
    VerificationError,
)
from edge_agent.package.needs import GENAI, TRANSFORMERS, Needs, needs_of
from edge_agent.package.trust import TrustDecision
from edge_agent.runner import capability
from edge_agent.serving.verdicts import GateFailed
from edge_agent.updates import choice
from edge_agent.updates.rollout import NotInRollout
from tests.support.committed import fault
from tests.support.packages import CONFIG, GENAI_CONFIG, MLMODEL, make_package, manifest_of

OWN, OTHER = "3-aaaaaaaaaaaa", "9-bbbbbbbbbbbb"
SAMPLE_CONFIG = Path(capability.__file__).parents[1] / "demo" / "sample_model" / "genai_config.json"


@pytest.mark.parametrize(
    "error",
    [
        CannotRun,
        LoadFailed,
        RunnerError,
        GateFailed,
        PolicyError,
        ManifestError,
        VerificationError,
        StoreError,
    ],
)
def test_a_version_that_cannot_run_asks_for_the_fallback(error: type[EdgeAgentError]) -> None:
    assert choice.needs_fallback(error("x"))


@pytest.mark.parametrize(
    "error", [TransportError, RegistryRefused, UnknownReference, NotInRollout, CacheBusy, SettingsError]
)
def test_a_version_that_nobody_looked_at_does_not(error: type[EdgeAgentError]) -> None:
    assert not choice.needs_fallback(error("x"))


def test_the_state_says_why_the_fallback_runs_until_the_models_own_version_does() -> None:
    model = ModelState().switched(OTHER, instead="no library")
    assert (model.active, model.instead) == (OTHER, "no library")
    kept = state.parse(CacheState(models={"assistant": model}).encode()).model("assistant")
    assert kept == model
    assert model.switched(OWN) == ModelState(active=OWN, previous=OTHER)
    back = ModelState(active=OWN).stepped_back(None, to=OTHER, instead="gone")
    assert (back.active, back.previous, back.quarantined, back.instead) == (OTHER, OWN, {}, "gone")
    assert ModelState(active=OTHER, previous=OWN, instead="x").stepped_back(fault("crashes")).instead == ""


def test_a_state_of_an_earlier_release_has_no_fallback_in_it() -> None:
    document = json.loads(CacheState(models={"assistant": ModelState(active=OWN)}).encode())
    del document["models"]["assistant"]["instead"]
    assert state.parse(json.dumps(document).encode()).model("assistant").instead == ""


@pytest.fixture
def own(tmp_path: Path) -> VersionRecord:
    package = make_package(tmp_path / "package", Path(capability.__file__))
    return VersionRecord(
        name="assistant",
        version=3,
        manifest=manifest_of(package, "own"),
        attached=(),
        registry_uri="http://registry",
        source="",
        run_id="",
        trust=TrustDecision(rule="no_code", signed_by="", unsigned_code=False, reason="x"),
        created_at=1.0,
    )


def test_a_record_says_by_which_reference_its_version_came(own: VersionRecord) -> None:
    fallback = replace(own, fallback=True)
    assert record.parse(fallback.encode()).fallback
    document = json.loads(own.encode())
    del document["fallback"]
    assert not record.parse(json.dumps(document).encode()).fallback, "of an earlier release"


def test_a_state_that_is_rebuilt_prefers_the_models_own_versions(own: VersionRecord) -> None:
    other = replace(own, version=9, fallback=True)
    rebuilt = state.rebuild([other, own], reason="x").model("assistant")
    assert (rebuilt.active, rebuilt.previous, rebuilt.instead) == (own.key, other.key, "")
    alone = state.rebuild([other], reason="x").model("assistant")
    assert alone.active == other.key
    assert alone.instead


def test_what_a_version_needs_is_read_from_its_small_files() -> None:
    files = {"MLmodel": MLMODEL.encode(), GENAI_CONFIG: json.dumps(CONFIG).encode(), "w": b"12345"}
    sizes = {path: len(data) for path, data in files.items()}
    needs = needs_of(sizes, files.__getitem__)
    assert needs == Needs(library=GENAI, architecture="phi3", weight_bytes=sum(sizes.values()))


def test_other_code_says_nothing_of_its_needs() -> None:
    document = MLMODEL.replace("model_code_path: genai_pyfunc.py", "model_code_path: own.py").encode()
    assert needs_of({"MLmodel": len(document)}, lambda path: document).library == ""


def test_the_transformers_flavor_names_its_configuration() -> None:
    document = b"""\
flavors:
  python_function: {loader_module: mlflow.transformers}
  transformers: {model_binary: model}
"""
    files = {"MLmodel": document, "model/config.json": b'{"model_type": "phi3"}'}
    needs = needs_of({path: len(data) for path, data in files.items()}, files.__getitem__)
    assert (needs.library, needs.architecture) == (TRANSFORMERS, "phi3")


@pytest.mark.parametrize(
    "config", ["no JSON", "[]", '{"model": {"type": 3}}', '{"model": {"type": "../phi3"}}']
)
def test_what_is_no_name_of_an_architecture_is_told_to_no_library(config: str) -> None:
    files = {"MLmodel": MLMODEL.encode(), GENAI_CONFIG: config.encode()}
    sizes = {path: len(data) for path, data in files.items()}
    assert needs_of(sizes, files.__getitem__).architecture == ""


def test_a_package_that_nobody_has_judged_makes_the_library_write_nothing(tmp_path: Path) -> None:
    config = json.loads(SAMPLE_CONFIG.read_text())
    config["model"]["decoder"]["session_options"]["enable_profiling"] = str(tmp_path / "written")
    files = {"MLmodel": MLMODEL.encode(), GENAI_CONFIG: json.dumps(config).encode()}
    sizes = {path: len(data) for path, data in files.items()}
    state_dir = tmp_path / "state"
    state_dir.mkdir()
    assert capability.problem(needs_of(sizes, files.__getitem__), state_dir=state_dir) == ""
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


@pytest.mark.parametrize(
    ("kind", "bytes_", "problem"),
    [
        ("phi3", 1, ""),
        ("nonsense", 1, "Unsupported model_type in config.json: nonsense"),
        ("phi3", 1 << 60, "this host's memory"),
    ],
)
def test_the_library_itself_says_which_architectures_it_knows(
    tmp_path: Path, kind: str, bytes_: int, problem: str
) -> None:
    config = json.loads(SAMPLE_CONFIG.read_text())
    config["model"]["type"] = kind
    files = {"MLmodel": MLMODEL.encode(), GENAI_CONFIG: json.dumps(config).encode()}
    sizes = {path: len(data) for path, data in files.items()} | {"weights": bytes_}
    found = capability.problem(needs_of(sizes, files.__getitem__), state_dir=tmp_path)
    assert problem in found
    assert bool(problem) == bool(found)


def test_both_flavors_of_this_host_are_seen_without_loading_them() -> None:
    assert {flavor.library: flavor.problem for flavor in capability.flavors()} == {
        GENAI: "",
        TRANSFORMERS: "",
    }
    assert all(flavor.version for flavor in capability.flavors())
