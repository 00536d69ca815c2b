"""Checks of the source folder, the options and the golden prompts, before anything is copied.

It reads files and writes none. It refuses at once what a device would refuse later, when nobody is watching.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from edge_agent import named_file, printable
from edge_agent.errors import ContentError, PublishError
from edge_agent.package import genai_files, genai_options
from edge_agent.package import manifest as manifests
from edge_agent.package.manifest import MAX_FILES
from edge_agent.package.mlmodel import MAX_GOLDEN_TOKENS
from edge_agent.publishing import kinds

MAX_GOLDEN = 32
MAX_GOLDEN_BYTES = 1 << 20
GOLDEN_FIELDS = ("prompt", "messages", "expect", "max_tokens")
_GOLDEN_FORM = 'write [{"prompt": "…", "expect": "…"}]; `edge-agent publish --help` has an example'
_NOT_SENT = re.compile(r"[#?%:]|(?:^|/) ")
"""Of a path. MLflow 3.17 puts it into an address as it stands, and decodes it once more in its listing: the file gets
another name, or its folder can no longer be listed (tried with a server)."""
_REBUILD = "make the folder with python -m onnxruntime_genai.models.builder"


def _whole(least: int, most: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            raise ValueError(f"must be from {least} to {most}")
        return value

    return read


def _real(least: float, most: float) -> Callable[[str], float]:
    def read(text: str) -> float:
        value = float(text)
        if not least <= value <= most:
            raise ValueError(f"must be from {least:g} to {most:g}")
        return value

    return read


OPTIONS: Mapping[str, Callable[[str], int | float]] = {
    "max_length": _whole(2, 1 << 20),
    "max_tokens": _whole(1, 1 << 20),
    "temperature": _real(0, 100),
    "top_p": _real(0, 1),
    "top_k": _whole(0, 1 << 20),
    "repetition_penalty": _real(0.01, 100),
}
"""Generation defaults that a package may have. `max_length` counts prompt and new tokens, `max_tokens` only new
ones."""


def check_options(options: Mapping[str, object]) -> dict[str, int | float]:
    """Converts option values, which come from a command line as text.

    Raises:
        PublishError: a name is unknown or a value is out of range.
    """
    checked = {}
    for name, value in options.items():
        if name not in OPTIONS:
            raise PublishError(f"option {name!r} is unknown", remedy=f"choose from {', '.join(OPTIONS)}")
        try:
            checked[name] = OPTIONS[name](str(value).strip())
        except ValueError as error:
            reason = str(error) if str(error).startswith("must") else "is not a number"
            raise PublishError(f"option {name}={value} {reason}") from error
    return checked


def check_folder(folder: Path) -> list[Path]:
    """Checks a folder made by the model builder.

    Returns:
        The folder's files, relative to it and sorted.

    Raises:
        PublishError: something is missing, or a device would refuse it; the message names the file.
    """
    kinds.check(folder, "onnx")
    files = list_files(folder)
    config_file = folder / genai_options.FILE_NAME
    try:
        genai_options.check(config_file, genai_options.FILE_NAME)
    except ContentError as error:
        raise PublishError(f"devices would refuse {config_file}: {error.message}") from error
    for name in sorted(genai_options.graphs(config_file, genai_options.FILE_NAME)):
        path = folder / name
        if not path.is_file():
            raise PublishError(f"{config_file} names {name!r}, which does not exist", remedy=_REBUILD)
        if path.stat().st_size == 0:
            raise PublishError(f"{path} is empty", remedy=_REBUILD)
    try:
        genai_files.check_graphs(folder, {path.as_posix() for path in files})
    except ContentError as error:
        raise PublishError(f"devices would refuse {folder}: {error.message}") from error
    return files


def list_files(folder: Path) -> list[Path]:
    """Every file of a folder, relative to it and sorted.

    Raises:
        PublishError: it is not a folder, or contains something that is neither a file nor a folder.
    """
    if not folder.is_dir():
        raise PublishError(f"{folder} is not a folder")
    return sorted(_files(folder))


def check_paths(files: Mapping[str, Path]) -> None:
    """Checks what the files will be called in the package, and how many there are.

    Args:
        files: path in the package → path on this machine.

    Raises:
        PublishError: a device would refuse it, or a registry would give a file another name.
    """
    if len(files) > MAX_FILES:
        raise PublishError(
            f"the folder has {len(files)} files, a package has at most {MAX_FILES}",
            remedy="move what the model does not need out of it",
        )
    if len({parent for path in files for parent in PurePosixPath(path).parents}) > MAX_FILES:
        raise PublishError(f"the folder has more than {MAX_FILES} folders, and devices list them one by one")
    for target, path in files.items():
        if _NOT_SENT.search(target):
            raise PublishError(
                f"{printable.line(str(path))}: MLflow does not keep a name with '#', '?', '%' or ':' in it, "
                "or with a space at its beginning",
                remedy="rename it",
            )
        try:
            manifests.check_path(target)
        except ContentError as error:
            raise PublishError(
                f"{printable.line(str(path))}: devices refuse its name: {error.message}", remedy="rename it"
            ) from error
    try:
        manifests.check_paths(files)
    except ContentError as error:
        raise PublishError(f"devices refuse the folder: {error.message}", remedy="rename one") from error


def context_of(folder: Path) -> int:
    """The longest context of a model builder's folder, in tokens."""
    model = json.loads((folder / genai_options.FILE_NAME).read_bytes()).get("model", {})
    return int(model.get("context_length", 0))


def check_length(context_tokens: int, options: Mapping[str, int | float]) -> None:
    """Refuses a `max_length` beyond the model's context.

    Args:
        context_tokens: the model's context; 0 if it is not known.

    Raises:
        PublishError: `max_length` is larger.
    """
    if 0 < context_tokens < options.get("max_length", 0):
        raise PublishError(
            f"option max_length={options['max_length']} exceeds the model's context of {context_tokens}"
        )


def read_golden(golden: Path | Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """Golden prompts: a list of `{prompt or messages, expect: regex, max_tokens}`; `max_tokens` is optional.

    Raises:
        PublishError: the file or an entry does not have this form; the message has the entry's number.
    """
    if golden is None:
        return []
    content = _read_json(golden) if isinstance(golden, Path) else golden
    if not isinstance(content, list | tuple) or not 0 < len(content) <= MAX_GOLDEN:
        raise PublishError(f"golden prompts must be a list of 1 to {MAX_GOLDEN} entries", remedy=_GOLDEN_FORM)
    return [_golden_entry(entry, f"golden prompt {number}") for number, entry in enumerate(content, 1)]


def _golden_entry(entry: object, what: str) -> dict[str, Any]:
    if not isinstance(entry, Mapping):
        raise PublishError(f"{what} is not an object", remedy=_GOLDEN_FORM)
    if unknown := sorted(set(entry) - set(GOLDEN_FIELDS)):
        raise PublishError(
            f"{what} has an unknown field {unknown[0]!r}", remedy=f"choose from {', '.join(GOLDEN_FIELDS)}"
        )
    if ("prompt" in entry) == ("messages" in entry):
        raise PublishError(f"{what} needs either prompt or messages")
    if not isinstance(entry.get("prompt", ""), str) or not isinstance(entry.get("messages", []), list):
        raise PublishError(f"{what}: prompt must be text, messages a list")
    expect = entry.get("expect")
    if not isinstance(expect, str) or not expect:
        raise PublishError(f"{what} has no expect, a regular expression that the answer must match")
    try:
        re.compile(expect)
    except re.error as error:
        raise PublishError(f"{what}: expect is not a regular expression: {error}") from error
    max_tokens = entry.get("max_tokens", 1)
    whole = isinstance(max_tokens, int) and not isinstance(max_tokens, bool)
    if not whole or not 1 <= max_tokens <= MAX_GOLDEN_TOKENS:
        raise PublishError(f"{what}: max_tokens must be an integer from 1 to {MAX_GOLDEN_TOKENS}")
    return dict(entry)


def _read_json(file: Path) -> Any:
    try:
        return json.loads(named_file.read(file, MAX_GOLDEN_BYTES))
    except OSError as error:
        raise PublishError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise PublishError(f"{file} is not JSON") from error


def _files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        if path.is_symlink():
            raise PublishError(
                f"{path} is a symbolic link", remedy="copy the folder with the files themselves: cp -rL"
            )
        if path.is_file():
            yield path.relative_to(folder)
        elif not path.is_dir():
            raise PublishError(f"{path} is neither a file nor a folder")
