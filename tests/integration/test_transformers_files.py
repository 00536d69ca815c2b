"""Hugging Face folders whose JSON files name a file of the host, with the real library: none of them is read.

The policy refuses each of them. Apart from that, the adapter is tried alone, as with a version that an earlier agent
has taken: it refuses as well, or answers without having looked.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_agent.errors import PolicyError
from edge_agent.package import trust
from tests.support.packages import manifest_of
from tests.support.processes import clean_environment

pytestmark = pytest.mark.attack

ROOT = Path(__file__).parents[2]
SAMPLE_HF = ROOT / "tests" / "models" / "sample_hf"
SECRET = "correct-horse-battery-staple"
MLMODEL = """\
flavors:
  python_function: {loader_module: mlflow.transformers, python_version: 3.11.7}
  transformers: {components: [tokenizer], model_binary: model, task: text-generation}
"""
TOKENIZER = "components/tokenizer"

# Loads each folder and asks it something. Says whether the secret was opened, or is a word of the vocabulary.
PROGRAM = f"""
import json, os, sys
from pathlib import Path
opened = []
def hook(event, arguments):
    if event == "open" and "mqtt-password" in str(arguments[0]):
        opened.append(str(arguments[0]))
sys.addaudithook(hook)
from edge_agent.runner import loader
results = {{}}
for folder in map(Path, sys.argv[1:]):
    opened.clear()
    known = False
    try:
        model = loader.load(folder, context_tokens=64, max_tokens=8, threads=1)
        known = {SECRET!r} in model._tokenizer.get_vocab() or {SECRET!r} in str(model._tokenizer.chat_template)
        model.ask({{"messages": [{{"role": "user", "content": "What is the capital of Spain?"}}]}})
        outcome = "answered"
    except Exception as error:
        outcome = f"{{type(error).__name__}}: {{error}}"
    results[folder.name] = [outcome, bool(opened), known]
print(json.dumps(results), flush=True)
os._exit(0)  # torch's threads may still run, and abort the interpreter's own end
"""

Edit = Callable[[Path, str], None]
"""(the package's folder, the secret's path)."""


def change(name: str, **changes: Any) -> Edit:
    """Changes keys of a JSON file. `SECRET` in a value stands for the secret's path."""

    def edit(folder: Path, secret: str) -> None:
        file = folder / name
        document = json.loads(file.read_text()) if file.exists() else {}
        text = json.dumps({**document, **changes}).replace("SECRET", secret)
        file.write_text(text)

    return edit


def tokenizer(**changes: Any) -> Edit:
    """Changes keys of tokenizer_config.json, in a package without a tokenizer.json."""

    def edit(folder: Path, secret: str) -> None:
        (folder / TOKENIZER / "tokenizer.json").unlink()
        change(f"{TOKENIZER}/tokenizer_config.json", **changes)(folder, secret)

    return edit


def vocabulary_is_a_path(folder: Path, secret: str) -> None:
    """Some classes take the vocabulary out of tokenizer.json, and open one that is a text."""
    change(f"{TOKENIZER}/tokenizer_config.json", tokenizer_class="BertTokenizer")(folder, secret)
    file = folder / TOKENIZER / "tokenizer.json"
    document = json.loads(file.read_text())
    document["model"] = {
        "type": "WordPiece",
        "vocab": secret,
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
    }
    file.write_text(json.dumps(document))


def link(name: str) -> Edit:
    def edit(folder: Path, secret: str) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(secret)

    return edit


WORD_LISTS = (
    "BertTokenizer",
    "DistilBertTokenizer",
    "ElectraTokenizer",
    "LayoutLMTokenizer",
    "MPNetTokenizer",
)
CASES: dict[str, Edit] = {
    **{f"vocab-{kind}": tokenizer(tokenizer_class=kind, vocab="SECRET") for kind in WORD_LISTS},
    **{f"vocab-{kind}Fast": tokenizer(tokenizer_class=f"{kind}Fast", vocab="SECRET") for kind in WORD_LISTS},
    "init_inputs": tokenizer(tokenizer_class="BertTokenizer", init_inputs=["SECRET"]),
    "merges": tokenizer(tokenizer_class="GPT2Tokenizer", vocab="SECRET", merges="SECRET"),
    "a-name-in-the-current-folder": tokenizer(tokenizer_class="BertTokenizer", vocab="mqtt-password"),
    "special_tokens_map": lambda folder, secret: (
        tokenizer(tokenizer_class="BertTokenizer")(folder, secret),
        change(f"{TOKENIZER}/special_tokens_map.json", vocab="SECRET")(folder, secret),
    )[0],
    "vocabulary-in-tokenizer-json": vocabulary_is_a_path,
    "beside-a-tokenizer": change(f"{TOKENIZER}/tokenizer_config.json", vocab="SECRET"),
    "deep-inside": change(f"{TOKENIZER}/tokenizer_config.json", sp_model_kwargs={"a": [{"b": "SECRET"}]}),
    "up-and-down": change(f"{TOKENIZER}/tokenizer_config.json", tokenizer_file="x/../../SECRET"),
    "fast_tokenizer_files": change(
        f"{TOKENIZER}/tokenizer_config.json", fast_tokenizer_files=["../tokenizer.1.0.0.json"]
    ),
    "transformers_weights": change("model/config.json", transformers_weights="../model.safetensors"),
    "a-path-in-config": change("model/config.json", rope_parameters={"rope_type": "SECRET"}),
    "a-path-in-generation-config": change("model/generation_config.json", cache_config={"path": "SECRET"}),
    "weight_map": change("model/model.safetensors.index.json", weight_map={"a": "../model.safetensors"}),
    "a-link-to-a-template": link(f"{TOKENIZER}/chat_template.jinja"),
}
IGNORED: dict[str, Edit] = {
    "relative": change(
        f"{TOKENIZER}/tokenizer_config.json", vocab="mqtt-password", vocab_file="mqtt-password"
    ),
    "an-unknown-key": change(f"{TOKENIZER}/tokenizer_config.json", something="new", number=1),
    "where-it-came-from": change("model/config.json", _name_or_path="SECRET"),
    "a-file-that-nothing-reads": change("model/preprocessor_config.json", path="SECRET"),
    "unknown-text-in-config": change("model/config.json", transformers_weights="other.safetensors"),
}


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("packages")
    (place / "mqtt-password").write_text(f"[UNK]\n{SECRET}\n")
    for name, edit in {**CASES, **IGNORED}.items():
        package = place / name
        (package / "components").mkdir(parents=True)
        (package / "MLmodel").write_text(MLMODEL)
        shutil.copytree(SAMPLE_HF, package / "model")
        shutil.copytree(
            SAMPLE_HF, package / TOKENIZER, ignore=shutil.ignore_patterns("*config.json", "*.safetensors")
        )
        shutil.copy(SAMPLE_HF / "tokenizer_config.json", package / TOKENIZER)
        edit(package, str(place / "mqtt-password"))
    return place


@pytest.fixture(scope="module")
def outcome(packages: Path) -> dict[str, tuple[str, bool, bool]]:
    environment = clean_environment({"HOME": str(packages), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)})
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, *(str(packages / name) for name in (*CASES, *IGNORED))],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=packages,
        env=environment,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found: dict[str, tuple[str, bool, bool]] = json.loads(result.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", [*CASES, *IGNORED])
def test_no_file_of_the_host_is_read(outcome: dict[str, tuple[str, bool, bool]], name: str) -> None:
    _, opened, known = outcome[name]
    assert not opened
    assert not known


@pytest.mark.parametrize("name", CASES)
def test_the_adapter_refuses_what_leads_out_of_the_package(
    outcome: dict[str, tuple[str, bool, bool]], name: str
) -> None:
    assert outcome[name][0] != "answered"


@pytest.mark.parametrize("name", IGNORED)
def test_what_is_not_on_the_list_and_leads_nowhere_changes_nothing(
    outcome: dict[str, tuple[str, bool, bool]], name: str
) -> None:
    assert outcome[name][0] == "answered"


@pytest.mark.parametrize("name", CASES)
def test_the_policy_refuses_it(packages: Path, name: str) -> None:
    folder = packages / name
    with pytest.raises(PolicyError):
        trust.decide(folder, manifest_of(folder, "phi"), registered_name="phi")


@pytest.mark.parametrize("name", IGNORED)
def test_the_policy_lets_the_others_in(packages: Path, name: str) -> None:
    folder = packages / name
    assert not trust.decide(folder, manifest_of(folder, "phi"), registered_name="phi").unsigned_code
