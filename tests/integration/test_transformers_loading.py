"""What the transformers adapter refuses to load, and what it never does. One process with torch for all of it."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import clean_environment

ROOT = Path(__file__).parents[2]
SAMPLE_HF = ROOT / "tests" / "models" / "sample_hf"
MLMODEL = """\
flavors:
  python_function: {loader_module: mlflow.transformers, python_version: 3.11.7}
  transformers: {components: [tokenizer], model_binary: model, task: text-generation}
"""

# Loads each folder and asks it something; every look at the network is written down, and fails.
PROGRAM = """
import json, sys
looked = []
def hook(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        looked.append(f"{event} {arguments[-2:]}")
        raise PermissionError("no network here")
sys.addaudithook(hook)
from pathlib import Path
from edge_agent.runner import bounds, loader, prompts
bounds.limit_memory(4 << 30)
results = {}
for folder in map(Path, sys.argv[1:]):
    prompts.TEMPLATE_TIMEOUT_S = 1.0 if folder.name == "a-template-without-end" else 60.0
    try:
        with bounds.panics_caught():
            model = loader.load(folder, context_tokens=64, max_tokens=8, threads=1)
            text, tokens = model.ask(
                {"messages": [{"role": "user", "content": "What is the capital of Spain?"}]}
            )
        results[folder.name] = [model.signature, text, tokens]
    except Exception as error:
        results[folder.name] = f"{type(error).__name__}: {error}"
print(json.dumps({"results": results, "looked": looked, "planted": "planted" in sys.modules}))
"""


def edit_json(name: str, **changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return edit


def write(name: str, text: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / name).write_text(text)

    return edit


def keep_all(folder: Path) -> None:
    """Changes nothing."""


def cut_weights(folder: Path) -> None:
    weights = folder / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])


def backtracking(folder: Path) -> None:
    """A pre-tokenizer for which the tokenizers library panics."""
    file = folder / "components/tokenizer/tokenizer.json"
    document = json.loads(file.read_text())
    pattern = {"Regex": "(\\w+)+$"}
    document["pre_tokenizer"] = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    file.write_text(json.dumps(document))
    template = "{{ 'a' * 40 + '!' }}{{ messages[0]['content'] }}"
    (folder / "components/tokenizer/chat_template.jinja").write_text(template)


CASES: dict[str, tuple[Callable[[Path], None], str]] = {
    "another-architecture": (
        edit_json("model/config.json", model_type="vit"),
        "has no language model of the",
    ),
    "an-unknown-type": (edit_json("model/config.json", model_type="nonsense"), "nonsense"),
    "more-layers-than-weights": (edit_json("model/config.json", num_hidden_layers=5), "the weights lack"),
    "quantized": (
        edit_json("model/config.json", quantization_config={"quant_method": "awq", "bits": 4}),
        "quantized",
    ),
    "weights-cut-off": (cut_weights, "SafetensorError"),
    "no-weights": (lambda folder: (folder / "model/model.safetensors").unlink(), "OSError"),
    "remote-code": (
        edit_json("model/config.json", model_type="own", auto_map={"AutoConfig": "planted.Config"}),
        "ValueError",
    ),
    "a-hub": (
        edit_json(
            "components/tokenizer/tokenizer_config.json", auto_map={"AutoTokenizer": ["a/b--x.Y", None]}
        ),
        "Madrid",
    ),
    "another-task": (
        write("MLmodel", MLMODEL.replace("text-generation", "text-classification")),
        "task is 'text-classification'",
    ),
    "a-template-without-end": (
        write(
            "components/tokenizer/chat_template.jinja",
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        ),
        "takes more than 1 s",
    ),
    "a-template-that-reaches-out": (
        write(
            "components/tokenizer/chat_template.jinja", "{{ messages.__class__.__mro__[1].__subclasses__() }}"
        ),
        "the chat template refuses",
    ),
    "a-template-that-counts-too-far": (
        write("components/tokenizer/chat_template.jinja", "{% for i in range(10**12) %}{% endfor %}"),
        "the chat template refuses",
    ),
    "a-template-that-doubles": (
        write(
            "components/tokenizer/chat_template.jinja",
            "{% set it = namespace(x='aaaaaaaa') %}"
            "{% for i in range(60) %}{% set it.x = it.x + it.x %}{% endfor %}{{ it.x }}",
        ),
        "BadRequest: the chat template",  # refuses, or takes too long: whichever bound comes first
    ),
    "a-pattern-that-backtracks": (backtracking, "Panic: the model gave up"),
    "no-template": (
        lambda folder: (folder / "components/tokenizer/chat_template.jinja").unlink(),
        "no chat template: send it a prompt",
    ),
}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("packages")
    for name, (edit, _) in {"good": (keep_all, ""), **CASES}.items():
        package = folder / name
        (package / "components").mkdir(parents=True)
        (package / "MLmodel").write_text(MLMODEL)
        shutil.copytree(SAMPLE_HF, package / "model")
        shutil.copytree(SAMPLE_HF, package / "components" / "tokenizer")
        (package / "model" / "planted.py").write_text("from transformers import PretrainedConfig as Config\n")
        edit(package)
    environment = clean_environment({"HOME": str(folder), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)})
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, *(str(folder / name) for name in ("good", *CASES))],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder,
        env=environment,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    document: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return document


def test_a_plain_hugging_face_folder_answers(outcome: dict[str, Any]) -> None:
    assert outcome["results"]["good"] == ["chat", "The capital of Spain is Madrid.", 7]


@pytest.mark.parametrize("name", CASES)
def test_it_ends_as_it_must(outcome: dict[str, Any], name: str) -> None:
    assert CASES[name][1] in str(outcome["results"][name])


def test_nothing_looked_for_a_hub_and_no_code_of_a_package_ran(outcome: dict[str, Any]) -> None:
    assert outcome["looked"] == []
    assert outcome["planted"] is False
