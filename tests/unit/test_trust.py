"""The code policy: what may run, and each thing that may not."""

from __future__ import annotations

import json
import pickle
import subprocess
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from edge_agent.errors import PolicyError, SettingsError, VerificationError
from edge_agent.package import trust
from edge_agent.package.trust import Rule, TrustDecision
from tests.support.packages import CONFIG, GENAI_CONFIG, MLMODEL, add_manifest, make_package, manifest_of

SHIPPED = trust.WRAPPER
TRANSFORMERS_MLMODEL = """\
flavors:
  python_function:
    loader_module: mlflow.transformers
    python_version: 3.11.7
  transformers:
    components: [tokenizer]
    model_binary: model
    task: text-generation
    tokenizer_type: PreTrainedTokenizerFast
    pipeline_model_type: Phi3ForCausalLM
"""
TRANSFORMERS_FILES: dict[str, bytes | str | None] = {
    "MLmodel": TRANSFORMERS_MLMODEL,
    "genai_pyfunc.py": None,
    GENAI_CONFIG: None,
    "model/config.json": "{}",
    "model/model.safetensors": b"\x80\x02 any bytes",
    "components/tokenizer/tokenizer.json": '{"a": "\\u00e9"}',
}


def decide(
    folder: Path, changes: Mapping[str, bytes | str | None] | None = None, **policy: Any
) -> TrustDecision:
    make_package(folder, SHIPPED, changes)
    return trust.decide(folder, manifest_of(folder, "phi"), registered_name="phi", **policy)


def config_with(place: str, value: object) -> str:
    """The good genai_config.json with one key more; `place` is dotted with `/`."""
    document: Any = json.loads(json.dumps(CONFIG))
    node = document
    *path, last = place.split("/")
    for part in path:
        node = node.setdefault(part, {})
    node[last] = value
    return json.dumps(document)


def test_the_shipped_wrapper_may_run(tmp_path: Path) -> None:
    decision = decide(tmp_path)
    assert decision.rule == Rule.SHIPPED_WRAPPER
    assert not decision.signed
    assert not decision.unsigned_code


def test_a_transformers_package_without_code_may_run(tmp_path: Path) -> None:
    assert decide(tmp_path, TRANSFORMERS_FILES).rule == Rule.NO_CODE


def test_a_wrapper_that_differs_by_one_byte_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"code that nobody signed: genai_pyfunc\.py"):
        decide(tmp_path, {"genai_pyfunc.py": SHIPPED.read_bytes() + b"\n"})


def test_other_code_runs_when_the_operator_allows_it(tmp_path: Path) -> None:
    decision = decide(tmp_path, {"genai_pyfunc.py": "print()"}, allow_unsigned_code=True)
    assert decision.rule == Rule.UNSIGNED_CODE_ALLOWED
    assert decision.unsigned_code
    assert not trust.still_holds(decision)
    assert trust.still_holds(decision, allow_unsigned_code=True)


def test_a_package_of_another_name_is_refused(tmp_path: Path) -> None:
    make_package(tmp_path, SHIPPED)
    with pytest.raises(PolicyError, match="made for 'phi', not for 'other'"):
        trust.decide(tmp_path, manifest_of(tmp_path, "phi"), registered_name="other")


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("helper.py", "x = 1"),
        ("artifacts/model/HELPER.PY", "x = 1"),
        ("artifacts/ext.so", b"\x7fELF"),
        ("artifacts/ext.so.1", b"anything"),
        ("artifacts/site.pth", "import os"),
        ("artifacts/python_model.pkl", b""),
        ("artifacts/noname", pickle.dumps([1])),
        ("artifacts/run", "#!/bin/sh\n"),
        ("artifacts/lib", b"\x7fELF\x02\x01\x01\x00"),
        ("artifacts/code.zip", b"PK"),
    ],
)
def test_any_other_code_is_refused(tmp_path: Path, path: str, content: bytes | str) -> None:
    with pytest.raises(PolicyError, match=Path(path).name):
        decide(tmp_path, {path: content})


@pytest.mark.parametrize("path", ["__pycache__/genai_pyfunc.cpython-311.pyc", "x.pyc", "__pycache__/x.txt"])
def test_compiled_python_is_refused_even_where_code_is_allowed(tmp_path: Path, path: str) -> None:
    with pytest.raises(PolicyError, match="compiled Python"):
        decide(tmp_path, {path: b""}, allow_unsigned_code=True)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("    streamable: true", "    data: artifacts", "python_function.data"),
        ("    streamable: true", "    predict_fn: eval", "python_function.predict_fn"),
        ("    streamable: true", "    predict_stream_fn: eval", "python_function.predict_stream_fn"),
        ("    streamable: true", "    code: ../..", "python_function.code"),
        ("    streamable: true", "    python_model: x.pkl", "python_function.python_model"),
        ("mlflow.pyfunc.loaders.code_model", "os.path", "loader_module 'os.path'"),
        ("mlflow.pyfunc.loaders.code_model", "[1]", "loader_module"),
        ("path: artifacts/model", "path: /etc", "'/etc' is not relative"),
        ("path: artifacts/model", "path: artifacts/../..", "is not relative"),
        ("path: artifacts/model", "path: elsewhere", "'elsewhere' is not in the package"),
        ("genai_pyfunc.py", "gone.py", "'gone.py' is not in the package"),
        ("genai_pyfunc.py", "requirements.txt", "'requirements.txt' is not in the package"),
        ("mlflow_version: 3.17.2", "a: &x [1]\nb: *x", "anchors or aliases"),
        ("mlflow_version: 3.17.2", "a: !!python/object:os.system {}", "not YAML"),
        ("mlflow_version: 3.17.2", "metadata: {x: [{trust_remote_code: true}]}", "trust_remote_code"),
        (
            "mlflow_version: 3.17.2",
            "saved_input_example_info: {artifact_path: ../../x}",
            "saved_input_example_info.artifact_path",
        ),
        ("flavors:", "flavours:", "flavors"),
        ("mlflow_version: 3.17.2", "x: " + "[" * 5000, "not YAML"),
    ],
)
def test_a_hostile_mlmodel_is_refused(tmp_path: Path, old: str, new: str, reason: str) -> None:
    assert old in MLMODEL
    with pytest.raises(PolicyError) as caught:
        decide(tmp_path, {"MLmodel": MLMODEL.replace(old, new)}, allow_unsigned_code=True)
    assert reason in str(caught.value)


def test_a_package_without_mlmodel_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="no MLmodel"):
        decide(tmp_path, {"MLmodel": None})


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("model/decoder/session_options/enable_profiling", "/tmp/x"),
        ("model/decoder/session_options/custom_ops_library", "x.so"),
        ("model/decoder/session_options/session.optimized_model_filepath", "/tmp/x"),
        ("model/decoder/session_options/ep.context_file_path", "/tmp/x"),
        ("model/draft/session_options/custom_ops_library", "x.so"),
        ("model/embedding/session_options/enable_profiling", "x"),
        ("model/decoder/pipeline", [{"a": {"session_options": {"custom_ops_library": "x"}}}]),
        ("model/decoder/pipeline", {"a": {"session_options": {"custom_ops_library": "x"}}}),
        ("model/decoder/session_options/provider_options", [{"QNN": {"backend_path": "x.so"}}]),
        ("model/decoder/session_options/provider_options", [{"cpu": {"a": "b"}}]),
        ("model/decoder/run_options", {"x": "y"}),
        ("model/vision", {"filename": "x"}),
        ("model/decoder/unknown", 1),
        ("unknown", {}),
        ("model/context_length", (1 << 24) + 1),
        ("model/decoder/num_hidden_layers", 1025),
        ("model/decoder/num_key_value_heads", (1 << 31) - 1),
        ("model/decoder/head_size", 10**400),
        ("model/draft/head_size", 1e300),
    ],
)
def test_a_hostile_genai_option_is_refused_with_its_name(tmp_path: Path, place: str, value: object) -> None:
    with pytest.raises(PolicyError) as caught:
        decide(tmp_path, {GENAI_CONFIG: config_with(place, value)}, allow_unsigned_code=True)
    assert GENAI_CONFIG in str(caught.value)
    assert place.split("/")[-1] in str(caught.value) or "pipeline" in place


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (config_with("model/decoder/filename", "../x.onnx"), "filename"),
        (config_with("model/tokenizer_dir", "/etc"), "tokenizer_dir"),
        ('{"model": {}, "model": {"decoder": {}}}', "twice"),
        ('{"mod\\u0065l": {}}', "escaped"),
        ('{"search": {"top_p": NaN}}', "NaN"),
        ("{}//", "not JSON"),
        ("[]", "not an object"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_genai_config_that_two_readers_could_read_differently_is_refused(
    tmp_path: Path, content: str, reason: str
) -> None:
    with pytest.raises(PolicyError, match=reason):
        decide(tmp_path, {GENAI_CONFIG: content})


def test_a_second_genai_config_deeper_down_is_checked_too(tmp_path: Path) -> None:
    hostile = config_with("model/decoder/session_options/custom_ops_library", "x.so")
    with pytest.raises(PolicyError, match="adapters/GenAI_Config"):
        decide(tmp_path, {"artifacts/adapters/GenAI_Config.json": hostile})


@pytest.mark.parametrize(
    "changes",
    [
        {"model/config.json": '{"auto_map": {"AutoModel": "x--y.Z"}}'},
        {"model/config.json": '{"a": [{"auto\\u005fmap": 1}]}'},
        {"components/tokenizer/tokenizer_config.json": '{"auto_map": {"AutoTokenizer": ["x--y.Z", null]}}'},
        {"model/config.json": '{"attn_implementation": "someone/kernel"}'},
        {"model/config.json": '{"_attn_implementation": {"text_config": "someone/kernel:f"}}'},
        {"model/generation_config.json": '{"custom_generate": "someone/decoding"}'},
        {"model/config.json": '{"custom_pipelines": {"x": {"impl": "x.Y"}}}'},
        {"model/model.safetensors.index.json": '{"weight_map": {"a": "../../../etc/model.safetensors"}}'},
        {"model/adapter_config.json": '{"base_model_name_or_path": "/etc"}'},
        {"components/tokenizer/chat_template.jinja": "{# #}" * 300_000},
        {"model/custom_generate/generate.py": "x = 1"},
        {"model/pytorch_model.pt": b"weights"},
        {"components/tokenizer/vocab.pkl": b"words"},
        {"MLmodel": TRANSFORMERS_MLMODEL + "    peft_adaptor: model\n"},
        {"MLmodel": TRANSFORMERS_MLMODEL + "    pipeline: {trust_remote_code: true}\n"},
        {"MLmodel": TRANSFORMERS_MLMODEL + "metadata: {trust_remote_code: true}\n"},
        {
            "MLmodel": TRANSFORMERS_MLMODEL.replace(
                "    python_version", "    code: model\n    python_version"
            )
        },
        {"model/pytorch_model.bin": b"weights"},
        {"model/custom.py": "x = 1"},
        {"MLmodel": TRANSFORMERS_MLMODEL.replace("model_binary: model", "source_model_name: x/y")},
        {"MLmodel": TRANSFORMERS_MLMODEL + "    local_base_model_path: /etc\n"},
        {"MLmodel": TRANSFORMERS_MLMODEL + "    code: model\n"},
        {"components/tokenizer/tokenizer.json": None},
    ],
)
def test_a_transformers_package_that_brings_code_is_refused(
    tmp_path: Path, changes: dict[str, bytes | str | None]
) -> None:
    with pytest.raises(PolicyError):
        decide(tmp_path, {**TRANSFORMERS_FILES, **changes})


def test_weights_in_several_files_and_an_ordinary_attention_may_run(tmp_path: Path) -> None:
    changes: dict[str, bytes | str | None] = {
        "model/config.json": '{"_attn_implementation": "sdpa", "_attn_implementation_autoset": true}',
        "model/model.safetensors": None,
        "model/model-00001-of-00001.safetensors": b"bytes",
        "model/model.safetensors.index.json": json.dumps(
            {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
        ),
    }
    assert decide(tmp_path, {**TRANSFORMERS_FILES, **changes}).rule == Rule.NO_CODE


def test_a_classical_model_is_refused_by_its_name(tmp_path: Path) -> None:
    document = MLMODEL.replace("mlflow.pyfunc.loaders.code_model", "mlflow.sklearn")
    with pytest.raises(PolicyError, match=r"'mlflow\.sklearn' .* language models"):
        decide(tmp_path, {"MLmodel": document}, allow_unsigned_code=True)


def test_the_pickle_loader_needs_permission(tmp_path: Path) -> None:
    changes: dict[str, bytes | str | None] = {
        "MLmodel": MLMODEL.replace("loaders.code_model", "model").replace(
            "model_code_path: genai_pyfunc.py", "python_model: python_model.pkl"
        ),
        "python_model.pkl": pickle.dumps(1),
        "genai_pyfunc.py": None,
    }
    with pytest.raises(PolicyError, match=r"python_model\.pkl"):
        decide(tmp_path / "a", changes)
    assert decide(tmp_path / "b", changes, allow_unsigned_code=True).unsigned_code


def test_a_code_file_of_any_size_takes_no_memory_for_itself(tmp_path: Path) -> None:
    code = tmp_path / "model.py"
    with code.open("wb") as stream:
        stream.truncate(64 << 20)
    tracemalloc.start()
    try:
        assert not trust.is_shipped(code)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


# --- Signatures ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two EC key pairs: `one.pem`, `one.pub`, `two.pem`, `two.pub`."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("one", "two"):
        key, public = folder / f"{name}.pem", folder / f"{name}.pub"
        make = ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(key)]
        subprocess.run(make, check=True, capture_output=True)
        derive = ["openssl", "ec", "-in", str(key), "-pubout", "-out", str(public)]
        subprocess.run(derive, check=True, capture_output=True)
    return folder


def sign(folder: Path, key: Path) -> None:
    from model_signing import signing

    signing.Config().use_elliptic_key_signer(private_key=key).sign(folder, folder / "model.sig")


def judge(folder: Path, *public_keys: Path) -> TrustDecision:
    return trust.decide(
        folder,
        manifest_of(folder, "phi"),
        registered_name="phi",
        public_keys=tuple(str(key) for key in public_keys),
    )


def test_a_package_signed_by_one_of_the_keys_may_run_other_code(tmp_path: Path, keys: Path) -> None:
    make_package(tmp_path, SHIPPED, {"genai_pyfunc.py": "print()"})
    add_manifest(tmp_path, "phi")
    sign(tmp_path, keys / "one.pem")
    decision = judge(tmp_path, keys / "two.pub", keys / "one.pub")
    assert decision.rule == Rule.SIGNED_CODE
    assert decision.signed
    assert trust.still_holds(decision, public_keys=[str(keys / "one.pub")])
    assert not trust.still_holds(decision, public_keys=[str(keys / "two.pub")])
    assert not trust.still_holds(decision)


def test_a_package_signed_without_a_manifest_verifies(tmp_path: Path, keys: Path) -> None:
    make_package(tmp_path, SHIPPED)
    sign(tmp_path, keys / "one.pem")
    assert judge(tmp_path, keys / "one.pub").rule == Rule.SHIPPED_WRAPPER


def test_with_keys_an_unsigned_package_is_refused(tmp_path: Path, keys: Path) -> None:
    make_package(tmp_path, SHIPPED)
    with pytest.raises(PolicyError, match="not signed"):
        judge(tmp_path, keys / "one.pub")


def test_a_signature_by_another_key_is_refused(tmp_path: Path, keys: Path) -> None:
    make_package(tmp_path, SHIPPED)
    sign(tmp_path, keys / "two.pem")
    with pytest.raises(VerificationError, match="matches no configured key"):
        judge(tmp_path, keys / "one.pub")


@pytest.mark.parametrize("path", ["requirements.txt", "artifacts/model/model.onnx.data"])
def test_a_file_changed_after_signing_is_refused(tmp_path: Path, keys: Path, path: str) -> None:
    make_package(tmp_path, SHIPPED)
    sign(tmp_path, keys / "one.pem")
    (tmp_path / path).write_bytes(b"changed")
    with pytest.raises(VerificationError):
        judge(tmp_path, keys / "one.pub")


@pytest.mark.parametrize("path", ["extra.txt", "manifest.json", ".gitignore"])
def test_a_file_added_after_signing_is_refused(tmp_path: Path, keys: Path, path: str) -> None:
    make_package(tmp_path, SHIPPED)
    sign(tmp_path, keys / "one.pem")
    (tmp_path / path).write_text("{}")
    with pytest.raises(PolicyError, match="does not cover"):
        judge(tmp_path, keys / "one.pub")


def test_a_key_that_cannot_be_read_is_an_error_of_the_settings(tmp_path: Path) -> None:
    make_package(tmp_path, SHIPPED)
    (tmp_path / "model.sig").write_text("{}")
    with pytest.raises((SettingsError, VerificationError)):
        judge(tmp_path, tmp_path / "gone.pub")
