"""Publishing for real: to an MLflow server over HTTP and to a SQLite file, and what a device gets from it."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from edge_agent.errors import PublishError, VerificationError
from edge_agent.package import manifest as manifests
from edge_agent.package import mlmodel, trust
from edge_agent.package.reference import MANIFEST_TAG
from edge_agent.publishing import hugging_face, publish_folder
from edge_agent.publishing import source as sources
from edge_agent.publishing.package import EXAMPLES, build_package
from edge_agent.publishing.register import Published
from tests.support.elsewhere import ask_elsewhere
from tests.support.mlflow_server import Server
from tests.support.processes import free_port

ROOT = Path(__file__).parents[2]
SPAIN = EXAMPLES["chat"]


def client(uri: str) -> Any:
    import mlflow

    return mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)


def download(uri: str, published: Published, target: Path) -> Path:
    """What the alias, or else the version number, leads to."""
    version = client(uri).get_model_version(published.name, str(published.version))
    if published.alias:
        version = client(uri).get_model_version_by_alias(published.name, published.alias)
    assert int(version.version) == published.version
    assert version.tags[MANIFEST_TAG] == published.digest
    target.mkdir()
    return Path(client(uri).download_artifacts(version.run_id, "model", str(target)))


def assert_whole(package: Path, published: Published) -> manifests.Manifest:
    """Every file is the one that the manifest lists, and there is no other."""
    data = (package / manifests.MANIFEST_NAME).read_bytes()
    manifest = manifests.parse(data)
    assert hashlib.sha256(data).hexdigest() == manifest.digest == published.digest
    assert manifest.name == published.name
    found = {path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file()}
    assert found - manifests.OUTSIDE_MANIFEST == {file.path for file in manifest.files}
    for file in manifest.files:
        content = (package / file.path).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (file.size_bytes, file.sha256)
    return manifest


def test_a_chat_package_published_over_http_answers_where_no_agent_is_installed(
    mlflow_server: Server, sample_model: Path, tmp_path: Path
) -> None:
    published = publish_folder(
        sample_model,
        name="http-chat",
        registry_uri=mlflow_server.uri,
        alias="prod",
        options={"max_length": "300"},
    )
    package = download(mlflow_server.uri, published, tmp_path / "got")
    manifest = assert_whole(package, published)
    assert trust.decide(package, manifest, registered_name="http-chat").rule == trust.Rule.SHIPPED_WRAPPER
    answer = ask_elsewhere(package, SPAIN, folder=tmp_path / "elsewhere")
    assert answer["whole"][0]["choices"][0]["message"]["content"] == "The capital of Spain is Madrid."
    assert answer["stream"] == "The capital of Spain is Madrid."
    assert answer["last"]["choices"][0]["finish_reason"] == "stop"


def test_mlflow_shows_a_person_what_a_version_is(mlflow_server: Server, sample_model: Path) -> None:
    published = publish_folder(
        sample_model,
        name="shown-to-a-person",
        registry_uri=mlflow_server.uri,
        golden=[{**SPAIN, "expect": "Madrid"}],
    )
    version = client(mlflow_server.uri).get_model_version(published.name, str(published.version))
    size = int(version.tags.pop("edge_agent.size_bytes"))
    assert version.tags.pop("edge_agent.requires_agent")
    assert version.tags == {
        "edge_agent.manifest_sha256": published.digest,
        "edge_agent.architecture": "phi3",
        "edge_agent.parameters": "1246336",
        "edge_agent.quantization": "int4",
        "edge_agent.block_size": "32",
        "edge_agent.context_tokens": "2048",
        "edge_agent.golden": "1 of 1",
    }
    assert size > sum(path.stat().st_size for path in sample_model.iterdir())
    assert version.description.startswith(
        "phi3, 1.25 million parameters, int4 in blocks of 32, context of 2,048"
    )
    assert "1 of 1 as expected" in version.description


def test_a_prompt_package_published_to_a_sqlite_file_answers_where_no_agent_is_installed(
    sample_model: Path, tmp_path: Path
) -> None:
    uri = f"sqlite:///{tmp_path / 'new' / 'registry.db'}"
    published = publish_folder(sample_model, name="joker", registry_uri=uri, alias="prod", signature="prompt")
    assert (tmp_path / "new" / "artifacts").is_dir()
    package = download(uri, published, tmp_path / "got")
    assert_whole(package, published)
    answer = ask_elsewhere(package, EXAMPLES["prompt"], folder=tmp_path / "elsewhere")
    assert "atom" in answer["whole"]
    assert answer["stream"] == answer["whole"]


def test_publishing_again_makes_the_next_version_and_moves_the_alias(
    mlflow_server: Server, sample_model: Path
) -> None:
    first = publish_folder(sample_model, name="twice", registry_uri=mlflow_server.uri, alias="prod")
    second = publish_folder(
        sample_model, name="twice", registry_uri=mlflow_server.uri, alias="prod", options={"max_tokens": "64"}
    )
    unpointed = publish_folder(sample_model, name="twice", registry_uri=mlflow_server.uri)
    assert [first.version, second.version, unpointed.version] == [1, 2, 3]
    assert unpointed.alias is None
    assert first.digest != second.digest
    assert client(mlflow_server.uri).get_model_version_by_alias("twice", "prod").version == "2"


def test_progress_is_told_in_bytes_up_to_the_end(sample_model: Path, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    publish_folder(
        sample_model,
        name="shown",
        registry_uri=f"sqlite:///{tmp_path / 'registry.db'}",
        alias="prod",
        progress=lambda step, done, total: calls.append((step, done, total)),
    )
    steps = [
        "checking",
        "copying",
        "trying in a runner",
        "hashing",
        "uploading",
        "registering",
        "moving the alias",
    ]
    assert list(dict.fromkeys(step for step, _, _ in calls)) == steps
    last = {step: (done, total) for step, done, total in calls}
    assert all(done == total for done, total in last.values())
    assert last["uploading"][1] > last["copying"][1] > 1_000_000


def test_a_registry_that_is_not_there_is_an_error_within_seconds(sample_model: Path, tmp_path: Path) -> None:
    package = build_package(sample_model, tmp_path / "package", name="lost", options={})
    from edge_agent.publishing.register import publish

    started_s = time.monotonic()
    with pytest.raises(PublishError, match="check that the server is running"):
        publish(package, registry_uri=f"http://127.0.0.1:{free_port()}", name="lost", alias="prod")
    assert time.monotonic() - started_s < 120


def test_an_upload_that_fails_leaves_the_alias_where_it_was(sample_model: Path, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'registry.db'}"
    publish_folder(sample_model, name="kept", registry_uri=uri, alias="prod")
    shutil.move(tmp_path / "artifacts", tmp_path / "away")
    (tmp_path / "artifacts").write_text("a file where a folder should be")
    with pytest.raises(PublishError, match="could not upload the files"):
        publish_folder(sample_model, name="kept", registry_uri=uri, alias="prod")
    assert client(uri).get_model_version_by_alias("kept", "prod").version == 1
    assert len(client(uri).search_model_versions("name = 'kept'")) == 1


def test_no_path_of_this_machine_is_in_a_package(
    sample_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a-folder-with-a-name"
    shutil.copytree(sample_model, folder)
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'secret-project'\nversion = '1'\n")
    (tmp_path / "uv.lock").write_text("version = 1\n")
    monkeypatch.chdir(tmp_path)
    package = build_package(folder, tmp_path / "package", name="clean", options={})
    assert not {"pyproject.toml", "uv.lock"} & {path.name for path in package.folder.iterdir()}
    machine = (str(tmp_path), "a-folder-with-a-name", str(ROOT), str(Path.home()) + "/", sys.prefix)
    for file in package.folder.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert not [part for part in machine if part.encode() in content], file


def test_a_signed_package_verifies_and_a_changed_one_does_not(sample_model: Path, tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = tmp_path / "key.pem", tmp_path / "key.pub"
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    public.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    package = build_package(sample_model, tmp_path / "package", name="signed", options={}, sign_key=private)
    decision = trust.decide(
        package.folder, package.manifest, registered_name="signed", public_keys=[str(public)]
    )
    assert decision.signed
    manifest_file = package.folder / manifests.MANIFEST_NAME
    manifest_file.write_bytes(manifest_file.read_bytes() + b" ")
    with pytest.raises(VerificationError):
        trust.check_signature(package.folder, package.manifest, [str(public)])


def test_a_key_that_cannot_sign_is_named(sample_model: Path, tmp_path: Path) -> None:
    with pytest.raises(PublishError, match=r"no-key\.pem is not a file"):
        build_package(
            sample_model, tmp_path / "a", name="signed", options={}, sign_key=tmp_path / "no-key.pem"
        )
    (tmp_path / "bad.pem").write_text("not a key")
    with pytest.raises(PublishError, match=r"bad\.pem failed"):
        build_package(sample_model, tmp_path / "b", name="signed", options={}, sign_key=tmp_path / "bad.pem")


@pytest.mark.parametrize("damage", ["model.onnx", "tokenizer.json"])
def test_a_folder_that_cannot_answer_is_refused(sample_model: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(sample_model, folder)
    (folder / damage).write_bytes((folder / damage).read_bytes()[:200])
    with pytest.raises(PublishError, match="the model cannot answer"):
        build_package(folder, tmp_path / "package", name="damaged", options={})


def test_golden_prompts_are_tried_and_travel_with_the_package(sample_model: Path, tmp_path: Path) -> None:
    golden = [
        {**SPAIN, "expect": "Madrid", "max_tokens": 32},
        {**EXAMPLES["prompt"], "expect": "(?i)atom"},
    ]
    file = tmp_path / "golden.json"
    file.write_text(json.dumps(golden))
    package = build_package(sample_model, tmp_path / "package", name="golden", options={}, golden=file)
    document = mlmodel.read(package.folder).document
    assert document["metadata"]["edge_agent.golden"] == golden
    wrong = [{**SPAIN, "expect": "Paris"}]
    with pytest.raises(
        PublishError, match="golden prompt 1 expects 'Paris' and the model answers 'The capital"
    ):
        build_package(sample_model, tmp_path / "wrong", name="golden", options={}, golden=wrong)


def test_the_source_folder_is_not_changed(sample_model: Path, tmp_path: Path) -> None:
    def content(folder: Path) -> dict[str, tuple[str, int]]:
        return {
            path.name: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
            for path in folder.iterdir()
        }

    before = content(sample_model)
    package = build_package(sample_model, tmp_path / "package", name="same", options={})
    assert content(sample_model) == before
    wrapper = (package.folder / "genai_pyfunc.py").read_bytes()
    assert wrapper == trust.WRAPPER.read_bytes()


@pytest.mark.parametrize(
    ("kind", "options", "config"),
    [
        ("chat", {}, None),
        ("chat", {"temperature": 0.0, "max_tokens": 5}, {"max_new_tokens": 5}),
        ("chat", {"temperature": 0.2}, {"temperature": 0.2, "do_sample": True}),
        ("prompt", {}, {"return_full_text": False}),
    ],
)
def test_options_of_the_transformers_flavor_are_those_of_its_library(
    tmp_path: Path, kind: str, options: dict[str, float], config: dict[str, Any] | None
) -> None:
    """MLflow alone hands them to the pipeline; a device reads the same ones."""
    from edge_agent.publishing.signature import seed_signature

    source = ROOT / "tests" / "models" / "sample_hf"
    checkpoint = hugging_face.check_checkpoint(source, sources.list_files(source))
    hugging_face.save(
        tmp_path / "package",
        checkpoint,
        signature=seed_signature(kind),
        chat=kind == "chat",
        options=options,
        metadata=None,
    )
    assert mlmodel.read(tmp_path / "package").pyfunc.get("config") == config


def test_publishing_is_imported_without_mlflow() -> None:
    code = (
        "import sys, edge_agent.publishing as p\n"
        "heavy = {'mlflow', 'onnxruntime_genai', 'pandas', 'model_signing'} & set(sys.modules)\n"
        "assert not heavy and p.publish_folder, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)


@pytest.mark.parametrize(
    ("flavor", "key"), [("transformers", "'vocab' is a path"), ("onnx", "'tiktoken_file' is not allowed")]
)
def test_a_tokenizer_that_names_a_file_of_this_machine_ends_the_command_with_1_and_its_key(
    sample_model: Path, tmp_path: Path, flavor: str, key: str
) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(sample_model if flavor == "onnx" else ROOT / "tests" / "models" / "sample_hf", folder)
    file = folder / "tokenizer_config.json"
    names = {"vocab": "/etc/hostname"} if flavor == "transformers" else {"tiktoken_file": "../hostname"}
    file.write_text(json.dumps({**json.loads(file.read_text()), **names}))
    command = [sys.executable, "-m", "edge_agent", "publish", str(folder), "--name", "x", "--flavor", flavor]
    ended = subprocess.run(
        [*command, "--registry", f"sqlite:///{tmp_path}/registry.db"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 1
    assert "devices would refuse" in ended.stderr
    assert key in ended.stderr
