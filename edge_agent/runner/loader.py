"""Decides what runs a package on this host, and loads it: our wrapper, transformers, or somebody's pyfunc.

Imported by the runner only. Flow: MLmodel → which loader → the libraries it needs, or the reason why this host
lacks them → `Model`. A package's own code is loaded last, when bytecode is no longer trusted.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edge_agent.errors import BadRequest, CannotRun, PromptTooLong, by_code
from edge_agent.package import genai_files, mlmodel, trust
from edge_agent.package.mlmodel import TRANSFORMERS_LOADER, MLmodel
from edge_agent.runner import bounds
from edge_agent.runner.capability import UNKNOWN_ARCHITECTURE
from edge_agent.runner.model import (
    DEFAULT_MAX_TOKENS,
    OPTIONS,
    TOOL_OPTIONS,
    End,
    Lane,
    Model,
    ToolCall,
    refuse_tools,
)
from edge_agent.runner.prompts import TEMPLATE_REFUSES

__all__ = ["End", "Model", "load"]

_QUESTION_TOKENS = 256
"""What a first prompt may add to the system prompt, and still go on from what the warm-up has run."""
_NO_BYTECODE = "/nonexistent/edge-agent"


def load(
    folder: Path,
    *,
    context_tokens: int,
    max_tokens: int,
    threads: int,
    kv_bytes: int = 0,
    repetition_penalty: float = 0.0,
) -> Model:
    """Loads the package in `folder`.

    Args:
        context_tokens: prompt and answer together, at most.
        max_tokens: of an answer, when a request names none; 0 leaves it to the package.
        threads: for one operation; 0 leaves it to the library.
        kv_bytes: for the keys and values of running and remembered prompts together, where a package knows it.
        repetition_penalty: when a request names none; 0 leaves it to the package.

    Raises:
        CannotRun: this host lacks what runs it.
        PolicyError: a file of it leads out of the package.
        RunnerError: it is no language model.
        Exception: whatever MLflow, the package or the library raises; the runner reports it.
    """
    package = mlmodel.read(folder)
    if package.loader == TRANSFORMERS_LOADER:
        for library in ("torch", "transformers"):
            _need(library, package="edge-agent[transformers]")
        from edge_agent.runner import transformers_flavor

        sys.dont_write_bytecode = True
        return transformers_flavor.load(
            folder,
            package,
            context_tokens=context_tokens,
            max_tokens=max_tokens,
            threads=threads,
            repetition_penalty=repetition_penalty,
        )
    given = {"max_tokens": max_tokens, "threads": threads, "repetition_penalty": repetition_penalty}
    config = {
        "context_tokens": context_tokens,
        "kv_bytes": kv_bytes,
        **{key: value for key, value in given.items() if value},
    }
    with bounds.computing(bounds.LOAD_LIMIT_S):
        return _load_pyfunc(folder, package, config)


def import_libraries() -> None:
    """Imports what a package with our wrapper needs, before anything of it is read.

    Raises:
        CannotRun: this host lacks it.
    """
    import mlflow.pyfunc  # noqa: F401

    _need("onnxruntime_genai", package="onnxruntime-genai")


class WrapperModel(Model):
    """A package with this agent's own wrapper over onnxruntime-genai: it answers several prompts at once."""

    answers_several = True

    def __init__(
        self, pyfunc: Any, *, flavor: str, signature: str, golden: Any, max_tokens: int = DEFAULT_MAX_TOKENS
    ) -> None:
        self._pyfunc = pyfunc
        self._wrapper = pyfunc.unwrap_python_model()
        self._knows_owners = hasattr(self._wrapper, "share")
        self._knows_tools = hasattr(self._wrapper, "takes_tools")
        self._keeps: set[str] = set()
        self._runs: list[str] = []
        self.room_tokens = max_tokens + _QUESTION_TOKENS
        self.flavor = flavor
        self.signature = signature
        self.golden = golden

    def warm_up(self, system: str = "") -> str:
        """See `Model.warm_up`. What every chat here begins with is what owners may share."""
        refusal = super().warm_up(system)
        if self._knows_owners and self.signature == "chat":
            self._wrapper.share("" if refusal else system)
        return refusal

    def start(self, document: dict[str, Any], owner: str) -> Lane | None:
        """See `Model.start`."""
        # The wrapper checks every field itself: MLflow's schema would only cost a prompt some milliseconds.
        try:
            # It reads the prompt; the lane computes later.
            with bounds.panics_caught(), bounds.computing():
                opened = self._open(document, owner)
        except Exception as error:  # noqa: BLE001 - model code may raise anything; the others go on
            return Lane(_failing(error), lambda: None)
        return Lane(_steps(opened[0]), opened[0].close) if opened else None

    def _open(self, document: dict[str, Any], owner: str) -> list[Any]:
        """The wrapper's lane for a document; none where memory is short.

        One document each time: 0.1.0's wrapper makes a batch of several, which changes answers.
        """
        if not self._knows_tools:
            refuse_tools(
                document, "this package was published with a release that knows none: publish it again"
            )
        if self._knows_owners:
            return list(self._wrapper.predict_streams([_request(document)], owner))
        # 0.1.0's wrapper knows no owners: where another one's prompt may be kept, everything kept is forgotten.
        if self._keeps - {owner}:
            self._wrapper._engine.sessions.forget()
            self._keeps = set(self._runs)
        opened = list(self._wrapper.predict_streams([_request(document)]))
        if opened:
            self._keeps.add(owner)
            self._runs.append(owner)
            opened[0] = _Ending(opened[0], lambda: self._runs.remove(owner))
        return opened

    def stream(self, document: dict[str, Any]) -> Generator[str | End, None, None]:
        """See `Model.stream`. In a lane: `predict_stream` gives what MLflow's clients expect, and has no owner."""
        with bounds.computing():  # a template that never ends is found at once
            lane, *_ = self._open(document, "")
        try:
            for step in _steps(lane):
                yield from step or ("",)
        finally:
            lane.close()


class _Ending:
    """A wrapper's lane that says when it is closed, once."""

    def __init__(self, lane: Any, ended: Callable[[], None]) -> None:
        self._lane = lane
        self._ended: Callable[[], None] | None = ended

    def __iter__(self) -> Iterator[Any]:
        return iter(self._lane)

    def close(self) -> None:
        self._lane.close()
        if self._ended is not None:
            self._ended()
            self._ended = None


def _failing(error: Exception) -> Iterator[list[str | End]]:
    """The steps of a prompt that could not be read: whoever takes the first one hears why."""
    yield from ()
    raise error


def _steps(lane: Any) -> Iterator[list[str | End]]:
    with _own_refusals():
        for step in lane:
            yield [_item(item) for _, item in step]


@contextmanager
def _own_refusals() -> Iterator[None]:
    """The wrapper's refusals as the agent's own. That of 0.1.0 quotes the chat template, and with it the messages."""
    try:
        yield
    except ValueError as error:
        code = str(getattr(error, "code", ""))
        refusal = by_code(BadRequest, PromptTooLong).get(code)
        if refusal is None:
            raise
        message = str(error).removeprefix(f"{code}: ")
        quoted = message.startswith(TEMPLATE_REFUSES)
        raise refusal(TEMPLATE_REFUSES if quoted else message) from None


def _load_pyfunc(folder: Path, package: MLmodel, config: dict[str, Any]) -> Model:
    """A package whose code runs: our wrapper, or somebody else's.

    `suppress_warnings`: MLflow would compare `requirements.txt` with what is installed, follow its `-r` wherever it
    leads, and print its lines, which would reach the log.
    """
    import mlflow.pyfunc

    from edge_agent.runner import foreign_pyfunc

    code = folder / package.code_file
    ours = package.code_file != "" and trust.is_shipped(code)
    if ours:
        files = genai_files.of_folder(folder)
        genai_files.check(folder, files)
        genai_files.check_graphs(folder, files)
        _need("onnxruntime_genai", package="onnxruntime-genai")
    else:  # whatever else it needs, it finds by itself
        _import_quietly("onnxruntime_genai")
    # Both may import more of the libraries.
    signature = foreign_pyfunc.signature_of(mlflow.models.Model.load(str(folder)))
    flavor = f"onnxruntime-genai {importlib.metadata.version('onnxruntime-genai')}" if ours else ""
    _distrust_bytecode()
    own = package.pyfunc.get("config")
    if ours:
        try:
            pyfunc = mlflow.pyfunc.load_model(str(folder), model_config=config, suppress_warnings=True)
        except RuntimeError as error:
            if UNKNOWN_ARCHITECTURE in str(error):  # the library tells its faults apart by text only
                raise CannotRun(f"onnxruntime-genai: {' '.join(str(error).split())[:200]}") from error
            raise
        return WrapperModel(
            pyfunc,
            flavor=flavor,
            signature=signature.form,
            golden=package.golden,
            max_tokens=_max_tokens(config, own),
        )
    known = {key: value for key, value in config.items() if isinstance(own, dict) and key in own}
    pyfunc = mlflow.pyfunc.load_model(str(folder), model_config=known or None, suppress_warnings=True)
    return foreign_pyfunc.ForeignModel(
        pyfunc,
        flavor=f"mlflow.pyfunc {mlflow.__version__}",
        signature=signature,
        streams=bool(package.pyfunc.get("streamable")),
        golden=package.golden,
    )


def _max_tokens(config: dict[str, Any], own: object) -> int:
    """Of an answer to a request that names none: the settings', else the package's, else the wrapper's."""
    packages = own.get("max_tokens") if isinstance(own, dict) else None
    return config.get("max_tokens") or (packages if isinstance(packages, int) else 0) or DEFAULT_MAX_TOKENS


def _need(library: str, *, package: str) -> None:
    """Imports a library, with the bytecode that its installation made.

    Raises:
        CannotRun: it is not here, or does not work here.
    """
    try:
        importlib.import_module(library)
    except Exception as error:  # a native library may fail in its own ways
        reason = " ".join(str(error).split())[:200]
        raise CannotRun(
            f"{library} cannot be imported on this host ({reason})", remedy=f"install {package}"
        ) from error


def _import_quietly(library: str) -> None:
    try:
        importlib.import_module(library)
    except Exception:  # noqa: BLE001 - the package's own import says why, if it needs it
        return


def _distrust_bytecode() -> None:
    """From here on bytecode is neither read from where a package could have put it, nor written."""
    sys.pycache_prefix, sys.dont_write_bytecode = _NO_BYTECODE, True


def _request(document: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(row, params) as a wrapper takes them."""
    inputs = {name: document[name] for name in ("messages", "prompt", *TOOL_OPTIONS) if name in document}
    return inputs, {name: _param(document[name]) for name in OPTIONS if name in document}


def _param(value: Any) -> Any:
    """MLflow's params are scalars and lists: an object travels as JSON."""
    return json.dumps(value) if isinstance(value, dict) else value


def _item(item: Any) -> str | End:
    if isinstance(item, str):
        return item
    return End(
        finish_reason=item["finish_reason"],
        usage=dict(item["usage"]),
        timings=dict(item.get("timings", {})),
        tool_calls=tuple(ToolCall(**call) for call in item.get("tool_calls", ())),
    )
