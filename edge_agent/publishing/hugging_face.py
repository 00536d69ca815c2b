"""A Hugging Face folder as a package of MLflow's transformers flavor.

It chooses the files that go into the package, leaves out of their configurations what no device reads
(`package/transformers_options.py`), and writes the MLmodel that names them. It neither loads nor rewrites
the weights: MLflow's `save_model` would hold them in memory, write them again, and put this machine's path into the
package. It refuses pickled weights and everything else that devices refuse.

`auto_map` in a configuration names Python files by the model's author. The package does not contain them, so it
does not contain the key either: transformers has its own classes for the architectures that devices load.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_agent import named_file
from edge_agent.errors import PublishError
from edge_agent.package import transformers_options
from edge_agent.publishing import cleaning, kinds
from edge_agent.publishing.kinds import HF_CONFIG

MODEL_FOLDER, TOKENIZER_FOLDER = "model", "components/tokenizer"
REQUIREMENTS = ("mlflow==3.17.*", "transformers>=5.0,<6", "torch>=2.6", "safetensors>=0.4")

_MODEL_FILES = (HF_CONFIG, "generation_config.json")
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt"),
    *("chat_template.jinja", "chat_template.json"),
)
_LICENSES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "NOTICE.md")
_FLAVOR_OPTIONS = {"max_tokens": "max_new_tokens"}
_MAX_JSON_BYTES = 64 << 20
_SAVE = "save it again with transformers: model.save_pretrained(DIR)"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A folder that can be packaged.

    Attributes:
        files: path in the package → path on this machine.
        rewritten: the configurations that must be changed.
        architecture: the model's class in transformers.
        context_tokens: the model's longest context; 0 if its configuration does not say.
    """

    files: Mapping[str, Path]
    rewritten: cleaning.Rewritten
    architecture: str
    context_tokens: int


def check_checkpoint(folder: Path, files: Sequence[Path]) -> Checkpoint:
    """Checks a folder made by `save_pretrained`, or downloaded from a hub.

    Args:
        files: the folder's files, relative to it.

    Raises:
        PublishError: something is missing, or a device would refuse it; the message names the file.
    """
    kinds.check(folder, "transformers")
    names = {path.name for path in files if path.parent == Path()}
    config = _read_object(folder / HF_CONFIG)
    if "adapter_config.json" in names:
        raise PublishError(f"{folder} holds an adapter", remedy="merge it into its base model first")
    if config.get("quantization_config"):
        raise PublishError(
            f"{folder / HF_CONFIG} has a quantization_config, which needs libraries that devices do not have",
            remedy="publish the weights in float16 or bfloat16, or as ONNX for onnxruntime-genai",
        )
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        raise PublishError(f"{folder / HF_CONFIG} names no architecture", remedy=_SAVE)
    if transformers_options.TOKENIZER not in names:
        raise PublishError(
            f"{folder} has no tokenizer that devices read: no {transformers_options.TOKENIZER}",
            remedy="transformers.AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) writes it",
        )
    chosen = {f"{MODEL_FOLDER}/{name}": folder / name for name in (*_MODEL_FILES, *_weights(folder, names))}
    chosen |= {f"{TOKENIZER_FOLDER}/{name}": folder / name for name in _TOKENIZER_FILES}
    chosen |= {name: folder / name for name in _LICENSES}
    chosen = {target: path for target, path in chosen.items() if path.name in names}
    context_tokens = config.get("max_position_embeddings")
    rewritten = cleaning.rewrite(chosen, transformers_options.has_list, transformers_options.clean)
    return Checkpoint(
        files=chosen,
        rewritten=rewritten,
        architecture=architectures[0],
        context_tokens=context_tokens if isinstance(context_tokens, int) else 0,
    )


def save(
    destination: Path,
    checkpoint: Checkpoint,
    *,
    signature: Any,
    chat: bool,
    options: Mapping[str, int | float],
    metadata: Mapping[str, Any] | None,
) -> None:
    """Writes MLmodel and the environment files into a new folder.

    Args:
        signature: MLflow's `ModelSignature`.
        chat: whether an MLflow server offers the model as llm/v1/chat; devices do so in any case.
    """
    import mlflow.pyfunc
    from mlflow.models import Model

    destination.mkdir(parents=True)
    config = {_FLAVOR_OPTIONS.get(name, name): value for name, value in options.items()}
    if config.get("temperature"):
        config["do_sample"] = True
    else:
        config.pop("temperature", None)  # transformers refuses 0, and is greedy without a temperature
    if not chat:
        config["return_full_text"] = False  # otherwise an MLflow server repeats the prompt in its answer
    python_version = platform.python_version()
    model = Model(
        signature=signature, metadata={**(metadata or {}), **({"task": "llm/v1/chat"} if chat else {})}
    )
    mlflow.pyfunc.add_to_model(
        model,
        loader_module="mlflow.transformers",
        conda_env="conda.yaml",
        python_env="python_env.yaml",
        model_config=config or None,
    )
    model.flavors["python_function"]["python_version"] = python_version
    model.add_flavor(
        "transformers",
        components=["tokenizer"],
        instance_type="TextGenerationPipeline",
        model_binary=MODEL_FOLDER,
        pipeline_model_type=checkpoint.architecture,
        task="text-generation",
        tokenizer_type="AutoTokenizer",
        transformers_version=_transformers_version(),
        **({"inference_task": "llm/v1/chat"} if chat else {}),
    )
    model.save(str(destination / "MLmodel"))
    lines = "".join(f"- {requirement}\n" for requirement in REQUIREMENTS)
    (destination / "requirements.txt").write_text("\n".join(REQUIREMENTS) + "\n")
    (destination / "python_env.yaml").write_text(
        f"python: {python_version}\nbuild_dependencies: []\ndependencies:\n- -r requirements.txt\n"
    )
    (destination / "conda.yaml").write_text(
        f"name: mlflow-env\nchannels:\n- conda-forge\ndependencies:\n- python={python_version}\n- pip\n- pip:\n"
        + "".join(f"  {line}\n" for line in lines.splitlines())
    )


def _weights(folder: Path, names: set[str]) -> list[str]:
    """The safetensors files, and their index if there are several."""
    index = "model.safetensors.index.json"
    if index in names:
        mapping = _read_object(folder / index).get("weight_map")
        parts = sorted({str(name) for name in mapping.values()}) if isinstance(mapping, dict) else []
        if missing := [name for name in parts if name not in names]:
            raise PublishError(f"{folder / index} names {missing[0]!r}, which does not exist")
        found = [index, *parts]
    else:
        found = [name for name in ("model.safetensors",) if name in names]
    if not found:
        raise PublishError(f"{folder} has no safetensors weights", remedy=_SAVE)
    return found


def _read_object(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(named_file.read(path, _MAX_JSON_BYTES))
    except OSError as error:
        raise PublishError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise PublishError(f"{path} is not JSON") from error
    if not isinstance(document, dict):
        raise PublishError(f"{path} is not a JSON object")
    return document


def _transformers_version() -> str:
    import importlib.metadata

    return importlib.metadata.version("transformers")
