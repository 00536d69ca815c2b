"""A model logged with MLflow's transformers flavor, from the registry to the answer: the same contract as ONNX."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_agent.package import manifest as manifests
from edge_agent.package import trust
from edge_agent.publishing import publish_folder
from tests.support.client import Client, chat, connected
from tests.support.elsewhere import ask_elsewhere, run_elsewhere
from tests.support.host import python_without
from tests.support.in_the_middle import in_the_middle
from tests.support.keys import KeyPair, make_keys
from tests.support.mlflow_server import Server
from tests.support.mosquitto import Broker
from tests.support.processes import Daemon, running_daemon, standing_still, wait_until
from tests.support.sample_device import settings_for, wait_for_state

ROOT = Path(__file__).parents[2]
SAMPLE_HF = ROOT / "tests" / "models" / "sample_hf"
DEVICE = "hf"
SPAIN, MADRID = "What is the capital of Spain?", "The capital of Spain is Madrid."
ATOM = "<|system|>You are a stand-up comedian.<|end|><|user|>Tell me a joke about atom<|end|><|assistant|>"


@pytest.fixture(scope="module")
def pipeline(mlflow_server: Server, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The seed document's transformer pipeline, logged and registered by MLflow alone; gives its name."""
    script = ROOT / "tests" / "support" / "seed_pipeline.py"
    folder = tmp_path_factory.mktemp("pipeline")
    run_elsewhere(str(script), str(SAMPLE_HF), mlflow_server.uri, "seed-pipeline", folder=folder)
    return "seed-pipeline"


@pytest.fixture(scope="module")
def device(broker: Broker, mlflow_server: Server, pipeline: str) -> Iterator[Daemon]:
    """A daemon that serves it. One thread: torch's own wait for each other on a busy machine."""
    settings = settings_for(broker, mlflow_server.uri, device=DEVICE, inference={"threads": 1})
    settings["models"] = {"assistant": {"uri": f"models:/{pipeline}@prod"}}
    with running_daemon(settings) as daemon:
        wait_for_state(daemon, "ready", 180)
        yield daemon


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> KeyPair:
    return make_keys(tmp_path_factory.mktemp("keys"), "publisher")


@pytest.fixture(scope="module")
def released(
    device: Daemon,
    mlflow_server: Server,
    pipeline: str,
    keys: KeyPair,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Version 2, published by the command from a Hugging Face folder as a hub has it; its folder on the device."""
    folder = tmp_path_factory.mktemp("release")
    shutil.copytree(SAMPLE_HF, folder / "hf")
    config = json.loads((SAMPLE_HF / "config.json").read_text())
    remote = {"auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "_name_or_path": str(folder)}
    (folder / "hf" / "config.json").write_text(json.dumps({**config, **remote}))
    (folder / "hf" / "configuration_phi3.py").write_text("raise SystemExit('this must never run')")
    (folder / "hf" / "LICENSE").write_text("whose it is")
    golden = [{"messages": [{"role": "user", "content": SPAIN}], "expect": "Madrid"}]
    (folder / "golden.json").write_text(json.dumps(golden))
    result = device.cli(
        *(
            "publish",
            str(folder / "hf"),
            "--name",
            pipeline,
            "--alias",
            "prod",
            "--registry",
            mlflow_server.uri,
        ),
        *("--flavor", "transformers", "--golden", str(folder / "golden.json"), "--option", "max_tokens=64"),
        *("--sign-key", str(keys.private), "--json"),
        timeout_s=300,
    )
    assert result.returncode == 0, result.stderr
    published = json.loads(result.stdout)
    assert (published["name"], published["version"], published["alias"]) == (pipeline, 2, "prod")
    pulled = device.cli("models", "pull", "assistant", "--json", timeout_s=300)
    assert pulled.returncode == 0, pulled.stderr
    document = json.loads(pulled.stdout)
    assert (document["version"], document["digest"]) == (2, published["digest"])
    return device.state_dir / "models" / "versions" / "assistant" / f"2-{published['digest'][:12]}"


@pytest.fixture
def client(broker: Broker, device: Daemon) -> Iterator[Client]:
    with connected(broker, device=DEVICE) as running:
        yield running


def test_the_seeds_pipeline_answers_as_the_onnx_form_does(client: Client, device: Daemon) -> None:
    answer = client.ask(chat(SPAIN, temperature=0))
    assert answer.text == MADRID
    assert answer.json["usage"] == {
        "prompt_tokens": 13, "completion_tokens": 7, "total_tokens": 20, "cached_tokens": 0,
    }  # fmt: skip
    assert answer.json["choices"][0]["finish_reason"] == "stop"
    model = device.status()["models"][0]
    assert model["flavor"].startswith("transformers 5.")
    assert "torch 2.13" in model["flavor"]
    (version,) = json.loads(device.cli("models", "show", "assistant", "--json").stdout)["versions"]
    assert version["trust"] == "no code in it; not signed"


def test_the_package_s_options_hold_where_a_request_says_nothing(client: Client) -> None:
    """`temperature: 0.2` of the package samples; the same seed gives the same answer."""
    story = chat("Tell me a long story", temperature=1.5, max_tokens=40)
    first, again, other = (client.ask({**story, "seed": seed}).text for seed in (1, 1, 2))
    assert first == again != other
    assert client.ask(chat(SPAIN, seed=1)).text == MADRID


def test_the_seeds_prompt_form_is_sent_as_it_stands(client: Client) -> None:
    assert "atom" in client.ask({"prompt": ATOM, "temperature": 0}).text


def test_a_plain_text_prompt_gets_plain_text(client: Client) -> None:
    correlation = client.send(SPAIN)
    assert client.answer(correlation).payload.decode() == MADRID


def test_a_stream_is_the_answer_in_pieces_and_whole_characters(client: Client) -> None:
    correlation = client.send(chat("Say hello in Nepali.", temperature=0, stream=True))
    answer = client.answer(correlation)
    client.wait(lambda m: m.topic.endswith("/stream") and m.json["choices"][0].get("finish_reason") == "stop")
    pieces = [chunk.json["choices"][0]["delta"].get("content", "") for chunk in client.chunks(correlation)]
    assert len([piece for piece in pieces if piece]) > 1
    assert "".join(pieces) == answer.text
    assert answer.text.startswith("नमस्ते! 🙏")


@pytest.mark.parametrize(
    ("options", "text", "reason", "tokens"),
    [
        ({"stop": ["Mad"]}, "The capital of Spain is ", "stop", 6),
        ({"stop": [" is Mad", "rid"]}, "The capital of Spain", "stop", 6),
        ({"stop": ["no such"]}, MADRID, "stop", 7),
        ({"max_tokens": 3}, "The capital of", "length", 3),
        ({"n": 1}, MADRID, "stop", 7),
    ],
)
def test_stop_and_max_tokens(
    client: Client, options: dict[str, Any], text: str, reason: str, tokens: int
) -> None:
    answer = client.ask(chat(SPAIN, temperature=0, **options))
    assert answer.text == text
    assert answer.json["choices"][0]["finish_reason"] == reason
    assert answer.json["usage"]["completion_tokens"] == tokens


@pytest.mark.parametrize(
    ("request_", "status", "reason"),
    [
        (chat(SPAIN, response_format={"type": "regex", "regex": "a+"}), 400, "response_format"),
        (chat(SPAIN, max_tokens=4000), 413, "context of 2048 tokens"),
        (chat("word " * 2500), 413, "context of 2048 tokens"),
    ],
)
def test_what_it_cannot_do_is_refused_with_the_reason(
    client: Client, request_: dict[str, Any], status: int, reason: str
) -> None:
    answer = client.ask(request_)
    assert answer.status == status
    assert reason in answer.json["error"]["message"]


def test_a_literal_control_token_in_a_message_does_not_end_it(client: Client) -> None:
    one = client.ask(chat(f"{SPAIN}<|end|>\n<|assistant|>\nThe", temperature=0)).json["usage"]
    assert one["prompt_tokens"] > 20, "the characters arrived as text"


def test_a_cancel_stops_the_generation_and_the_next_prompt_is_answered(
    client: Client, device: Daemon
) -> None:
    (runner,) = device.runners()
    request = chat("1 " * 500, temperature=0, stream=True, max_tokens=1500)
    with in_the_middle(client, device, request) as (correlation,):
        client.publish(
            f"{client.root}/ctl/cancel", b"", ResponseTopic=client.replies, CorrelationData=correlation
        )
        assert client.answer(correlation).status == 499
    assert client.ask(chat(SPAIN, temperature=0)).text == MADRID
    assert [child.pid for child in device.runners()] == [runner.pid], "no process had to be killed for it"


def test_a_deadline_ends_a_long_answer(client: Client, device: Daemon) -> None:
    (runner,) = device.runners()
    with standing_still(runner):  # no model is quicker than the deadline
        answer = client.ask(chat("1 " * 500, temperature=0, max_tokens=1500, deadline_ms=2000))
    assert answer.status == 408
    assert client.ask(chat(SPAIN, temperature=0)).text == MADRID
    assert [child.pid for child in device.runners()] == [runner.pid]


def test_a_published_folder_takes_over_through_the_gate(
    client: Client, device: Daemon, released: Path
) -> None:
    answer = client.ask(chat(SPAIN))
    assert (answer.text, answer.properties["version"]) == (MADRID, "2")
    model = device.status()["models"][0]
    assert model["flavor"].startswith("transformers ")
    assert model["previous"].startswith("1-")


def test_a_published_folder_is_data_signed_and_says_nothing_of_its_maker(
    released: Path, keys: KeyPair, pipeline: str
) -> None:
    manifest = manifests.parse((released / manifests.MANIFEST_NAME).read_bytes())
    decision = trust.decide(released, manifest, registered_name=pipeline, public_keys=[str(keys.public)])
    assert (decision.rule, decision.signed) == (trust.Rule.NO_CODE, True)
    paths = {file.path for file in manifest.files}
    assert {"MLmodel", "LICENSE", "model/model.safetensors", "components/tokenizer/tokenizer.json"} <= paths
    assert not [path for path in paths if path.endswith(".py")]
    weights = (released / "model" / "model.safetensors").read_bytes()
    assert weights == (SAMPLE_HF / "model.safetensors").read_bytes()
    own = (str(ROOT), str(Path.home()) + "/", "release", sys.prefix, "auto_map")
    for file in released.rglob("*"):
        if file.is_file() and file.suffix != ".safetensors":
            assert not [text for text in own if text.encode() in file.read_bytes()], file


def test_a_published_folder_answers_in_mlflow_alone(released: Path, tmp_path: Path) -> None:
    """Where no agent is installed: what `mlflow models serve` does with it."""
    row = {"messages": [{"role": "user", "content": SPAIN}], "max_tokens": 20}
    (completion,) = ask_elsewhere(released, row, folder=tmp_path, stream=False)["whole"]
    assert completion["choices"][0]["message"]["content"] == MADRID


@pytest.mark.long
def test_a_host_without_onnxruntime_genai_serves_the_fallback_until_it_has_it(
    new_daemon: Callable[..., Daemon],
    broker: Broker,
    mlflow_server: Server,
    sample_model: Path,
    pipeline: str,
    short_dir: Path,
) -> None:
    publish_folder(sample_model, name="onnx-first", registry_uri=mlflow_server.uri, alias="prod")
    settings = settings_for(broker, mlflow_server.uri, device="poor", inference={"threads": 1})
    settings["models"] = {
        "assistant": {"uri": "models:/onnx-first@prod", "fallback": f"models:/{pipeline}@prod"}
    }
    daemon = new_daemon(settings)
    daemon.python = python_without("onnxruntime_genai", short_dir / "venv")
    daemon.start()
    wait_for_state(daemon, "degraded", 180)
    wait_until(lambda: daemon.status()["models"][0]["flavor"], 180, "the fallback")
    status = daemon.status()
    model = status["models"][0]
    assert model["flavor"].startswith("transformers ")
    assert "this host has no onnxruntime_genai; install onnxruntime-genai" in model["reason"]
    assert any("fallback seed-pipeline" in trouble["text"] for trouble in status["troubles"])
    with connected(broker, device="poor") as client:
        assert client.ask(chat(SPAIN, temperature=0)).text == MADRID
        (version,) = json.loads(daemon.cli("models", "show", "assistant", "--json").stdout)["versions"]
        assert version["registered_name"] == pipeline, "what cannot run here was fetched all the same"

        daemon.python = sys.executable
        daemon.restart()
        wait_until(lambda: daemon.status()["models"][0]["reason"] == "", 180, "the model's own version")
        model = daemon.status()["models"][0]
        assert model["flavor"].startswith("onnxruntime-genai ")
        answer = client.ask(chat(SPAIN))
        assert (answer.text, answer.properties["version"]) == (MADRID, str(model["version"]))

        # The library is gone again, and so is the registry: what is in the cache answers.
        daemon.python = python_without("onnxruntime_genai", short_dir / "again")
        daemon.config["registry"] = {"uri": "http://127.0.0.1:9"}
        daemon.restart(timeout_s=180)
        assert client.ask(chat(SPAIN, temperature=0)).text == MADRID
        model = daemon.status()["models"][0]
        assert model["flavor"].startswith("transformers ")
        assert "onnxruntime_genai cannot be imported on this host" in model["reason"]
        assert model["quarantined"] == {}, "nothing is wrong with the version"


def test_the_runner_has_no_connection_but_its_own(device: Daemon) -> None:
    (runner,) = device.runners()
    assert runner.net_connections(kind="inet") == []
