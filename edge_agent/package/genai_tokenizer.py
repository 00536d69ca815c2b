"""Checks the tokenizer's files of an onnxruntime-genai folder, which the library and the wrapper read in place.

The library joins the folder with `tiktoken_file` of `tokenizer_config.json` and opens that, be it a pipe or
`/dev/zero`; `tokenizer_module.json` has names of its own. Both are refused, and so is a text that leads out of the
package, under any key. What the library does not know it does not read, so another key is no harm on a device;
`publish` leaves it out.
Source: onnxruntime-genai 0.18, traced while it opened a folder (onnxruntime-extensions, `tokenizer_jsconfig.hpp`).
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path, PurePosixPath
from typing import Any

from edge_agent.errors import PolicyError
from edge_agent.package import genai_options, transformers_options
from edge_agent.package.transformers_options import (
    ADDED_TOKENS,
    GENERATION_CONFIG,
    MAX_CONFIG_BYTES,
    MAX_JSON_BYTES,
    MAX_TEMPLATE_BYTES,
    SPECIAL_TOKENS,
    TEMPLATE,
    TOKENIZER,
    TOKENIZER_CONFIG,
    Cleaned,
)

CONFIGURATIONS = frozenset(
    (TOKENIZER_CONFIG, SPECIAL_TOKENS, ADDED_TOKENS, GENERATION_CONFIG, "chat_template.json")
)
"""What is read as JSON beside `genai_config.json` and `tokenizer.json`."""
_FILE_KEYS = frozenset({"tiktoken_file"})
_MODULE = "tokenizer_module.json"


def check(tree: Path, folder: PurePosixPath, paths: Set[str]) -> None:
    """Checks the files in one folder with a `genai_config.json`, and in the folders below it.

    Args:
        tree: the package.
        folder: in it.
        paths: every file of the package.

    Raises:
        PolicyError: a file makes the library open another one, or is too large; the message names file and key.
    """
    for path in sorted(paths):
        place = PurePosixPath(path)
        if not place.is_relative_to(folder):
            continue
        _check_size(tree / path, path)
        if place.name == _MODULE:
            raise PolicyError(f"{path!r} is not allowed: a tokenizer is read from {TOKENIZER} alone")
        if place.name in CONFIGURATIONS:
            check_document(read(tree / path, path), path)


def check_document(document: Mapping[str, Any], path: str) -> None:
    """Checks the content of one configuration.

    Raises:
        PolicyError: it names a file.
    """
    for key in sorted(_FILE_KEYS & document.keys()):
        raise PolicyError(f"{path!r}: {key!r} is not allowed: a tokenizer is read from {TOKENIZER} alone")
    try:
        transformers_options.refuse_paths(document)
    except PolicyError as error:
        raise PolicyError(f"{path!r}: {error.message}", remedy=error.remedy) from error


def clean(name: str, document: Mapping[str, Any]) -> Cleaned:
    """What `publish` packages of a configuration.

    Raises:
        PolicyError: it names a file.
    """
    check_document(document, name)
    if not transformers_options.has_list(name):
        return Cleaned(document=dict(document), dropped=())
    return transformers_options.clean(name, document, any_tokenizer=True)


def read(file: Path, path: str) -> dict[str, Any]:
    """Reads a configuration so that the library's own reader sees the same keys.

    Raises:
        PolicyError: it is no regular file of bounded size, or no plain JSON object.
    """
    document = genai_options.parse(transformers_options.read_bytes(file, path, MAX_CONFIG_BYTES), path)
    if not isinstance(document, dict):
        raise PolicyError(f"{path!r} is not a JSON object")
    return document


def _check_size(file: Path, path: str) -> None:
    limits = {TOKENIZER: MAX_JSON_BYTES, TEMPLATE: MAX_TEMPLATE_BYTES}
    limit = limits.get(PurePosixPath(path).name)
    if limit and file.lstat().st_size > limit:
        raise PolicyError(f"{path!r} has more than {limit} bytes")
