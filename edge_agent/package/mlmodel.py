"""Reads `MLmodel`, the file that tells MLflow how to load a package, and checks it against an allow-list.

MLflow follows this file wherever it points: to a module to import, to folders for `sys.path`, to files outside the
package. So a package is refused if a key of `python_function` is not on the list. This module does not import
MLflow. Source: `mlflow.pyfunc.load_model` and `mlflow.transformers` of 3.17.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edge_agent.errors import ManifestError, PolicyError
from edge_agent.package import plain_yaml
from edge_agent.package.manifest import check_path

FILE_NAME = "MLmodel"
CODE_LOADER = "mlflow.pyfunc.loaders.code_model"
TRANSFORMERS_LOADER = "mlflow.transformers"
PICKLE_LOADER = "mlflow.pyfunc.model"

GOLDEN_TOKENS = 64
"""The limit of an answer to a golden prompt that names none."""
MAX_GOLDEN_TOKENS = 1024

MAX_BYTES = 1 << 20

_COMMON_KEYS = frozenset(("config", "env", "loader_module", "python_version", "streamable", "task"))
_ARTIFACT_KEYS = frozenset(("artifacts",))
_LOADER_KEYS: Mapping[str, frozenset[str]] = {
    # MLflow writes `cloudpickle_version` for every PythonModel; its code loader never unpickles.
    CODE_LOADER: _COMMON_KEYS | _ARTIFACT_KEYS | {"model_code_path", "code", "cloudpickle_version"},
    PICKLE_LOADER: _COMMON_KEYS
    | _ARTIFACT_KEYS
    | {"python_model", "cloudpickle_version", "python_model_compression", "code"},
    TRANSFORMERS_LOADER: _COMMON_KEYS,
}
"""`code` is a folder for `sys.path`: its files count as other code, for which rule 4 of `trust.py` applies."""

_TRANSFORMERS_KEYS = frozenset(
    (
        *("code", "components", "framework", "inference_task", "instance_type", "model_binary"),
        "pipeline_model_type",
        *("feature_extractor_type", "image_processor_type", "processor_type", "tokenizer_type"),
        *("prompt_template", "source_model_name", "task", "torch_dtype", "transformers_version"),
    )
)
_EXAMPLE_PATHS = ("artifact_path", "serving_input_path")


@dataclass(frozen=True, kw_only=True)
class MLmodel:
    """The file, parsed.

    Attributes:
        loader: the `loader_module`, one of the three above.
        code_file: the models-from-code file, a name in the package's root; empty if there is none.
        document: the whole file.
    """

    loader: str
    code_file: str
    document: Mapping[str, Any]

    @property
    def pyfunc(self) -> Mapping[str, Any]:
        return self.flavor("python_function")

    def flavor(self, name: str) -> Mapping[str, Any]:
        """One flavor's keys.

        Raises:
            PolicyError: the flavor is missing, or is not a mapping.
        """
        return _mapping(_mapping(self.document.get("flavors"), "flavors").get(name), f"flavor {name}")

    @property
    def created_at(self) -> float:
        """When MLflow made the package, in seconds since the epoch; 0 where the file does not say, or says no time."""
        said = self.document.get("utc_time_created")
        try:
            at = said if isinstance(said, datetime) else datetime.fromisoformat(str(said))
            return max(0.0, (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp())
        except (ValueError, OverflowError):
            return 0.0

    @property
    def golden(self) -> Any:
        """The golden prompts from the package's metadata, unchecked; None if it has none."""
        metadata = self.document.get("metadata")
        return metadata.get("edge_agent.golden") if isinstance(metadata, Mapping) else None


def read(tree: Path) -> MLmodel:
    """Parses the package's MLmodel.

    Raises:
        PolicyError: the file is missing or not plain YAML, or its loader is not allowed.
    """
    path = tree / FILE_NAME
    if not path.is_file():
        raise PolicyError("the package has no MLmodel file: it is not an MLflow model")
    if path.stat().st_size > MAX_BYTES:
        raise PolicyError(f"MLmodel has more than {MAX_BYTES} bytes")
    return parse(path.read_bytes())


def parse(data: bytes) -> MLmodel:
    """Parses the file's bytes.

    Raises:
        PolicyError: the file is not plain YAML, or its loader is not allowed.
    """
    document = _mapping(plain_yaml.load(data, FILE_NAME), FILE_NAME)
    flavors = _mapping(document.get("flavors"), "flavors of MLmodel")
    pyfunc = _mapping(flavors.get("python_function"), "flavor python_function of MLmodel")
    loader = pyfunc.get("loader_module")
    if not isinstance(loader, str) or loader not in _LOADER_KEYS:
        raise PolicyError(
            f"MLmodel: python_function.loader_module {loader!r} is not allowed",
            remedy="only language models run here: from `edge-agent publish`, PythonModels, or the transformers flavor",
        )
    code_path = pyfunc.get("model_code_path", "")
    if not isinstance(code_path, str):
        raise PolicyError("MLmodel: python_function.model_code_path is not text")
    # MLflow loads the last part from the package's root, and ignores the packager's folders before it.
    return MLmodel(loader=loader, code_file=code_path.rsplit("/", 1)[-1], document=document)


def check(model: MLmodel, paths: Set[str]) -> None:
    """Checks the file against the allow-lists.

    Args:
        paths: every file of the package.

    Raises:
        PolicyError: a key is not allowed; the message names it and its place.
    """
    pyfunc = model.pyfunc
    for key in pyfunc:
        if key not in _LOADER_KEYS[model.loader]:
            raise PolicyError(f"MLmodel: python_function.{key} is not allowed")
    if model.loader == CODE_LOADER and (not model.code_file.endswith(".py") or model.code_file not in paths):
        raise PolicyError(
            f"MLmodel: python_function.model_code_path {model.code_file!r} is not in the package"
        )
    if model.loader == PICKLE_LOADER:
        _inside(pyfunc.get("python_model"), "python_function.python_model", paths)
    if (code := pyfunc.get("code")) is not None:
        _inside(code, "python_function.code", paths)
        if code in paths:  # Python would also import from a zip archive on sys.path, whatever its name
            raise PolicyError(f"MLmodel: python_function.code {code!r} is a file, not a folder")
    for name, artifact in _mapping(pyfunc.get("artifacts", {}), "python_function.artifacts").items():
        place = f"python_function.artifacts.{name}"
        _inside(_mapping(artifact, place).get("path"), f"{place}.path", paths)
    _refuse_remote_code(model.document)
    example = model.document.get("saved_input_example_info")
    if example is not None:
        for key in _EXAMPLE_PATHS:
            if (path := _mapping(example, "saved_input_example_info").get(key)) is not None:
                _inside(path, f"saved_input_example_info.{key}", paths)
    if model.loader == TRANSFORMERS_LOADER:
        _check_transformers(model.flavor("transformers"), paths)


def _check_transformers(flavor: Mapping[str, Any], paths: Set[str]) -> None:
    components = flavor.get("components") or []
    if not isinstance(components, list) or not all(isinstance(name, str) for name in components):
        raise PolicyError("MLmodel: transformers.components is not a list of names")
    # The weights and every component must be in the package: for a bare name MLflow would ask the network.
    for key in flavor:
        if key not in _TRANSFORMERS_KEYS:
            raise PolicyError(f"MLmodel: transformers.{key} is not allowed")
    if flavor.get("code"):
        raise PolicyError("MLmodel: transformers.code is not allowed")
    _inside(flavor.get("model_binary"), "transformers.model_binary", paths)
    if "processor_type" in flavor:
        components = [*components, "processor"]
    for name in components:
        _inside(f"components/{name}", f"transformers.components {name!r}", paths)


def _refuse_remote_code(document: Mapping[str, Any]) -> None:
    waiting: list[Any] = [document]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping):
            for key in ("trust_remote_code", "auto_map"):
                if value.get(key):
                    raise PolicyError(f"MLmodel: {key} is not allowed")
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)


def _inside(path: object, place: str, paths: Set[str]) -> None:
    """Checks that the path is a file or a folder of the package."""
    try:
        text = check_path(path)
    except ManifestError as error:
        raise PolicyError(f"MLmodel: {place}: {error.message}") from error
    if text not in paths and not any(known.startswith(f"{text}/") for known in paths):
        raise PolicyError(f"MLmodel: {place}: {text!r} is not in the package")


def _mapping(value: object, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise PolicyError(f"MLmodel: {what} is not a mapping")
    return value
