"""The wrapper class of the Phi-3 walk-through, logged with plain MLflow: as models-from-code and pickled.

The class is the one of docs/walkthrough.md. Refused by default, served where the operator allows it or a trusted key
signed it; through a real sync and a real runner.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from edge_agent.errors import PolicyError
from edge_agent.package.trust import Rule
from edge_agent.runner.process import RunnerProcess, child_environment
from edge_agent.runner.protocol import Done, Load
from edge_agent.sync.protocol import TrustJob
from tests.support.device import Device
from tests.support.elsewhere import run_elsewhere
from tests.support.keys import KeyPair, make_keys, sign
from tests.support.packages import add_manifest, copy_package

PAGE = Path(__file__).parents[2] / "docs" / "walkthrough.md"
ATOM = "<|system|>You are a stand-up comedian.<|end|><|user|>Tell me a joke about atom<|end|><|assistant|>"
PROGRAM = """
import sys, cloudpickle, mlflow, phi3_model
from mlflow.models import infer_signature
cloudpickle.register_pickle_by_value(phi3_model)
example = {"prompt": sys.argv[2]}
for folder, model in (("code", "phi3_model.py"), ("pickle", phi3_model.Phi3Model())):
    mlflow.pyfunc.save_model(
        folder,
        python_model=model,
        artifacts={"phi3-mini-onnx": sys.argv[1]},
        input_example=example,
        signature=infer_signature(example, ["Run"]),
        pip_requirements=["onnxruntime_genai", "numpy"],
    )
"""


@pytest.fixture(scope="module")
def packages(sample_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`code/` and `pickle/`, as MLflow alone makes them."""
    folder = tmp_path_factory.mktemp("seed")
    (block,) = re.findall(r"^```python\n(# phi3_model\.py\n.*?)^```$", PAGE.read_text(), re.M | re.S)
    (folder / "phi3_model.py").write_text(block)
    run_elsewhere("-c", PROGRAM, str(sample_model), ATOM, folder=folder)
    return folder


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> KeyPair:
    return make_keys(tmp_path_factory.mktemp("keys"), "trusted")


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Device:
    for name in ("HTTP_REQUEST_MAX_RETRIES", "HTTP_REQUEST_TIMEOUT", "ENABLE_ARTIFACTS_PROGRESS_BAR"):
        monkeypatch.setenv(f"MLFLOW_{name}", "1")  # a sync sets them; they are put back afterwards
    return Device(f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path, artifacts=tmp_path / "artifacts")


@contextmanager
def loaded(device: Device, work: Path) -> Iterator[RunnerProcess]:
    (record,) = device.store.versions()
    runner = RunnerProcess(model="assistant", environment=child_environment(work))
    try:
        folder = str(device.store.folder(record))
        answer = runner.load(
            Load(folder=folder, context_tokens=2048, max_tokens=256, threads=1), timeout_s=120
        )
        assert answer.flavor.startswith("mlflow.pyfunc ")
        assert answer.signature == "prompt"
        yield runner
    finally:
        runner.stop()


@pytest.mark.parametrize(("form", "file"), [("code", "phi3_model.py"), ("pickle", "python_model.pkl")])
def test_it_is_refused_by_default_and_served_where_it_is_allowed(
    packages: Path, device: Device, tmp_path: Path, form: str, file: str
) -> None:
    device.register(packages / form)
    with pytest.raises(PolicyError, match=rf"code that nobody signed: {file}.*trust\.allow_unsigned_code"):
        device.sync()
    assert device.has_nothing_final()
    device.sync(device.job(policy=TrustJob(allow_unsigned_code=True)))
    (record,) = device.store.versions()
    assert record.trust.rule == Rule.UNSIGNED_CODE_ALLOWED
    with loaded(device, tmp_path) as runner:
        *deltas, done = runner.generate("1", {"prompt": ATOM, "stop": ["whole"]}, timeout_s=120)
        assert "".join(delta.text for delta in deltas if not isinstance(delta, Done)) == "An atom booked a "
        assert isinstance(done, Done)
        assert (done.finish_reason, done.usage["completion_tokens"]) == ("stop", 0)


@pytest.mark.parametrize("form", ["code", "pickle"])
def test_a_trusted_signature_is_as_good(
    packages: Path, device: Device, tmp_path: Path, keys: KeyPair, form: str
) -> None:
    package = copy_package(packages / form, tmp_path / "signed")
    tag = add_manifest(package, device.model)
    sign(package, keys.private)
    device.register(package, tag=tag)
    device.sync(device.job(policy=TrustJob(public_keys=(str(keys.public),))))
    (record,) = device.store.versions()
    assert record.trust.rule == Rule.SIGNED_CODE
    with loaded(device, tmp_path) as runner:
        deltas = runner.generate("1", {"prompt": ATOM}, timeout_s=120)
        assert "atom" in "".join(delta.text for delta in deltas if not isinstance(delta, Done))
