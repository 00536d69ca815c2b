"""Packages that mean harm, through a real registry and a whole sync: refused with their reason, nothing of them
executed, nothing written but in staging."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from edge_agent.cache import fsck
from edge_agent.errors import ContentError, ManifestError, PolicyError, VerificationError
from edge_agent.package import trust
from edge_agent.sync.protocol import TrustJob
from tests.support.device import Changes, Device
from tests.support.keys import KeyPair, make_keys, sign
from tests.support.packages import CONFIG, GENAI_CONFIG, MLMODEL, WEIGHTS, add_manifest, make_package

pytestmark = pytest.mark.attack

CANARY = "canary"
RUN = f"open({CANARY!r}, 'w')\n"
"""Code that would leave a file in the current folder."""
PLANTED = "artifacts/planted"


class Bomb:
    """Unpickling one leaves the file, too."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (CANARY, "w")


@dataclass(frozen=True)
class Case:
    """One hostile package.

    Attributes:
        changes: to the files of a good one.
        reason: what the error has to say.
        stored: done to the package's folder in the registry, when it is there.
        manifest: whether one is made of what is in the package.
    """

    id: str
    reason: str
    changes: Changes = field(default_factory=dict)
    error: type[ContentError] = PolicyError
    stored: Callable[[Path], object] = lambda folder: None
    manifest: bool = True
    tag: str = ""


def mlmodel(old: str, new: str) -> str:
    assert old in MLMODEL
    return MLMODEL.replace(old, new)


def session_option(name: str, value: object) -> str:
    document = json.loads(json.dumps(CONFIG))
    document["model"]["decoder"]["session_options"][name] = value
    return json.dumps(document)


def manifest_with(path: str) -> bytes:
    entries = [{"path": name, "size": 1, "sha256": "0" * 64} for name in ("MLmodel", path)]
    return json.dumps({"format": 1, "name": "MODEL", "files": entries}).encode()


def replace_with_link(file: Path) -> None:
    file.unlink()
    file.symlink_to("/etc/passwd")


def add_100_000_files(folder: Path) -> None:
    many = folder / "artifacts" / "many"
    many.mkdir()
    for number in range(100_000):
        os.close(os.open(many / str(number), os.O_CREAT | os.O_WRONLY))


CASES = (
    *(
        Case(f"path {path}", "'", {"manifest.json": manifest_with(path)}, ManifestError, manifest=False)
        for path in ("../../escaped", "/escaped", "a/../../escaped", "..\\escaped", "a//b", "x\ny")
    ),
    Case(
        "case collision",
        "differ only in case",
        {"manifest.json": manifest_with("mlModel")},
        ManifestError,
        manifest=False,
    ),
    Case(
        "case collision, plain",
        "differ only in case",
        {"ReadMe": "", "README": ""},
        ManifestError,
        manifest=False,
    ),
    Case(
        "symlink to a file",
        "neither a file nor a folder",
        error=ManifestError,
        stored=lambda folder: (folder / PLANTED).symlink_to("/etc/passwd"),
    ),
    Case(
        "symlink to a folder",
        "neither a file nor a folder",
        error=ManifestError,
        stored=lambda folder: (folder / PLANTED).symlink_to("/etc"),
    ),
    Case(
        "symlink in the place of a file",
        "neither a file nor a folder",
        error=ManifestError,
        stored=lambda folder: replace_with_link(folder / WEIGHTS),
    ),
    Case(
        "a pipe",
        "neither a file nor a folder",
        error=ManifestError,
        stored=lambda folder: os.mkfifo(folder / PLANTED),
    ),
    Case("100,000 entries", "more than 2000 files", error=ManifestError, stored=add_100_000_files),
    Case(
        "another loader",
        "loader_module 'planted'",
        {"MLmodel": mlmodel("mlflow.pyfunc.loaders.code_model", "planted"), "planted.py": RUN},
    ),
    Case(
        "a folder for sys.path",
        "artifacts/lib/mlflow.py",
        {
            "MLmodel": mlmodel("    streamable: true", "    code: artifacts/lib"),
            "artifacts/lib/mlflow.py": RUN,
        },
    ),
    Case(
        "a folder for sys.path outside",
        "python_function.code",
        {"MLmodel": mlmodel("    streamable: true", "    code: ../../..")},
    ),
    Case(
        "a second MLmodel",
        "python_function.data",
        {
            "MLmodel": mlmodel("    streamable: true", "    data: artifacts/inner"),
            "artifacts/inner/MLmodel": MLMODEL.replace("mlflow.pyfunc.loaders.code_model", "planted"),
        },
    ),
    Case(
        "a pickled model",
        "python_model.pkl",
        {
            "MLmodel": mlmodel("loaders.code_model", "model").replace(
                "model_code_path: genai_pyfunc.py", "python_model: python_model.pkl"
            ),
            "python_model.pkl": pickle.dumps(Bomb()),
            "genai_pyfunc.py": None,
        },
    ),
    Case("a pickle without a name", "a pickle", {PLANTED: pickle.dumps(Bomb())}),
    Case("a changed wrapper", "code that nobody signed", {"genai_pyfunc.py": RUN}),
    Case("a planted module", "artifacts/planted.py", {"artifacts/planted.py": RUN}),
    Case("a library", "artifacts/planted.so", {"artifacts/planted.so": b"\x7fELF"}),
    Case("a .pth file", "planted.pth", {"planted.pth": f"import os; {RUN}"}),
    Case("compiled Python", "compiled Python", {"__pycache__/genai_pyfunc.cpython-311.pyc": b"x"}),
    *(
        Case(f"session option {name}", name, {GENAI_CONFIG: session_option(name, value)})
        for name, value in (
            ("enable_profiling", "/tmp/profile"),
            ("custom_ops_library", "artifacts/planted"),
            ("session.optimized_model_filepath", "/tmp/optimized.onnx"),
        )
    ),
    Case("an artifact of this host", "/etc", {"MLmodel": mlmodel("path: artifacts/model", "path: /etc")}),
    Case("a YAML object", "not YAML", {"MLmodel": f"{MLMODEL}x: !!python/object/apply:open [{CANARY}, w]\n"}),
    Case("another manifest", "not the published one", error=VerificationError, tag="0" * 64),
    Case(
        "other bytes than the manifest's",
        "model.onnx.data",
        error=VerificationError,
        stored=lambda folder: (folder / WEIGHTS).write_bytes(b"WEIGHTS " * 1000),
    ),
    Case(
        "a file that is gone",
        "has lost 'artifacts/model/model.onnx.data'",
        error=VerificationError,
        stored=lambda folder: (folder / WEIGHTS).unlink(),
    ),
)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("registry")


@pytest.fixture
def device(registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Device:
    for name in ("HTTP_REQUEST_MAX_RETRIES", "HTTP_REQUEST_TIMEOUT", "ENABLE_ARTIFACTS_PROGRESS_BAR"):
        monkeypatch.setenv(f"MLFLOW_{name}", "1")  # a sync sets them; they are put back afterwards
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return Device(f"sqlite:///{registry / 'mlflow.db'}", work, artifacts=registry / "artifacts")


def stored_package(registry: Path, model: str) -> Path:
    """The package's folder in the registry; the only one there is."""
    folders = [path.parent for path in (registry / "artifacts").rglob("MLmodel")]
    (folder,) = (path for path in folders if path.name == "package")
    return folder


def outside_of_staging(device: Device) -> set[Path]:
    kept = {
        device.store.root / "lock",
        device.store.damaged_root,
        device.store.blobs,
        device.store.blobs.parent,
    }
    kept |= {
        device.store.root.parent,
        device.store.root,
        device.store.versions_root,
        device.store.staging_root,
    }
    return {path for path in device.folder.rglob("*") if device.store.staging_root not in path.parents} - kept


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_it_is_refused_with_its_reason_and_leaves_nothing(case: Case, device: Device, registry: Path) -> None:
    shutil.rmtree(registry / "artifacts", ignore_errors=True)
    changes = {
        path: data.replace(b"MODEL", device.model.encode()) if isinstance(data, bytes) else data
        for path, data in case.changes.items()
    }
    device.publish(changes, manifest=case.manifest, tag=case.tag)
    case.stored(stored_package(registry, device.model))
    before = outside_of_staging(device)
    with pytest.raises(ContentError) as caught:
        device.sync()
    assert type(caught.value) is case.error
    assert case.reason in str(caught.value)
    assert outside_of_staging(device) == before
    assert device.has_nothing_final()
    assert not list(device.folder.rglob(CANARY))


def test_a_hard_link_out_of_the_package_is_copied_and_not_shared(device: Device, registry: Path) -> None:
    shutil.rmtree(registry / "artifacts", ignore_errors=True)
    device.publish({PLANTED: "mine"})
    stored = stored_package(registry, device.model)
    outside = registry / "outside"
    outside.write_text("mine")
    (stored / PLANTED).unlink()
    (stored / PLANTED).hardlink_to(outside)
    device.sync()
    outside.write_text("changed")
    (record,) = device.store.versions()
    assert (device.store.folder(record) / PLANTED).read_text() == "mine"
    assert fsck.verify(device.store).damaged == ()


def test_a_pattern_without_end_is_not_run_by_the_sync(device: Device) -> None:
    golden = '{edge_agent.golden: [{prompt: x, expect: "(a+)+$", max_tokens: 4}]}'
    device.publish({"MLmodel": mlmodel("mlflow_version: 3.17.2", f"metadata: {golden}")})
    assert device.sync().new  # it would never end


# --- Signatures ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[KeyPair, KeyPair]:
    folder = tmp_path_factory.mktemp("keys")
    return make_keys(folder, "trusted"), make_keys(folder, "other")


def trusting(pair: KeyPair) -> TrustJob:
    return TrustJob(public_keys=(str(pair.public),))


def signed_package(device: Device, key: Path, changes: Changes | None = None) -> tuple[Path, str]:
    package = make_package(device.folder / "signed", trust.WRAPPER, changes)
    tag = add_manifest(package, device.model)
    sign(package, key)
    return package, tag


def test_a_signature_by_another_key_is_refused(device: Device, keys: tuple[KeyPair, KeyPair]) -> None:
    trusted, other = keys
    package, tag = signed_package(device, other.private)
    device.register(package, tag=tag)
    with pytest.raises(VerificationError, match="matches no configured key"):
        device.sync(device.job(policy=trusting(trusted)))
    assert device.has_nothing_final()


def test_a_file_that_was_changed_with_its_manifest_is_refused(
    device: Device, keys: tuple[KeyPair, KeyPair]
) -> None:
    trusted, _ = keys
    package, _ = signed_package(device, trusted.private)
    (package / WEIGHTS).write_bytes(b"others " * 1000)
    signature = (package / "model.sig").read_bytes()
    (package / "model.sig").unlink()
    tag = add_manifest(package, device.model)
    (package / "model.sig").write_bytes(signature)
    device.register(package, tag=tag)
    with pytest.raises(VerificationError, match="matches no configured key"):
        device.sync(device.job(policy=trusting(trusted)))
    assert device.has_nothing_final()


def test_a_package_without_signature_is_refused_where_keys_are_set(
    device: Device, keys: tuple[KeyPair, KeyPair]
) -> None:
    device.publish()
    with pytest.raises(PolicyError, match="not signed"):
        device.sync(device.job(policy=trusting(keys[0])))
    assert device.has_nothing_final()


def test_a_package_signed_for_another_name_is_refused(device: Device, keys: tuple[KeyPair, KeyPair]) -> None:
    trusted, _ = keys
    package = make_package(device.folder / "signed", trust.WRAPPER)
    tag = add_manifest(package, "another")
    sign(package, trusted.private)
    device.register(package, tag=tag)
    with pytest.raises(ManifestError, match="'another'"):
        device.sync(device.job(policy=trusting(trusted)))
    assert device.has_nothing_final()


def test_a_package_signed_by_the_command_line_of_model_signing_verifies(
    device: Device, keys: tuple[KeyPair, KeyPair]
) -> None:
    trusted, _ = keys
    package = make_package(device.folder / "signed", trust.WRAPPER, {"genai_pyfunc.py": "print()"})
    command = [sys.executable, "-m", "model_signing", "sign", "key", str(package)]
    options = ["--private_key", str(trusted.private), "--signature", str(package / "model.sig")]
    subprocess.run([*command, *options], check=True, capture_output=True, timeout=120)
    device.register(package)
    assert device.sync(device.job(policy=trusting(trusted))).new
    (record,) = device.store.versions()
    assert record.trust.rule == trust.Rule.SIGNED_CODE
    assert record.trust.signed
