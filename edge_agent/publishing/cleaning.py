"""Copies of a folder's configurations without what no device reads, and the lines that tell the publisher so."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_agent.errors import PolicyError, PublishError
from edge_agent.package import transformers_options
from edge_agent.package.transformers_options import TOKENIZER, Cleaned

_MAX_SHOWN, _MAX_SHOWN_CHARACTERS = 16, 80


@dataclass(frozen=True, kw_only=True)
class Rewritten:
    """What differs from the folder.

    Attributes:
        files: path in the package → content, for each configuration that had to be changed.
        limits: what was left out, one sentence a file.
    """

    files: Mapping[str, bytes]
    limits: tuple[str, ...]


def rewrite(
    files: Mapping[str, Path],
    is_configuration: Callable[[str], bool],
    clean: Callable[[str, dict[str, Any]], Cleaned],
) -> Rewritten:
    """Cleans each configuration, and checks each `tokenizer.json`.

    Args:
        files: path in the package → path on this machine.
        is_configuration: says of a file's name whether `clean` knows it.
        clean: gives what a device reads of it.

    Raises:
        PublishError: devices would refuse one; the message names the file and the key.
    """
    changed: dict[str, bytes] = {}
    limits: list[str] = []
    for target, path in files.items():
        if not is_configuration(path.name) and path.name != TOKENIZER:
            continue
        try:
            if path.name == TOKENIZER:
                transformers_options.check_tokenizer(transformers_options.read_bytes(path, path.name))
                continue
            document = transformers_options.read(path)
            cleaned = clean(path.name, document)
        except OSError as error:
            raise PublishError(f"{path} cannot be read: {error.strerror}") from error
        except PolicyError as error:
            raise PublishError(
                f"devices would refuse {path}: {error.message}", remedy=error.remedy
            ) from error
        if cleaned.dropped:
            keys = ", ".join(map(_shown, sorted(set(cleaned.dropped))[:_MAX_SHOWN]))
            limits.append(f"left out of {path.name}, because no device reads it: {keys}")
        if cleaned.document != document:
            changed[target] = json.dumps(cleaned.document, indent=2, ensure_ascii=False).encode() + b"\n"
    return Rewritten(files=changed, limits=tuple(limits))


def _shown(key: str) -> str:
    """A key for a terminal, which its file may not write to."""
    key = key[:_MAX_SHOWN_CHARACTERS]
    return key if key.isprintable() else repr(key)
