"""What transformers gets to see of a package: a private folder, made for one load.

The library opens what it finds in a folder, and follows what stands there. So it never gets the package's own: `opened`
makes a folder with the weights, `tokenizer.json` and the chat template as they are, and the JSON files that name
something after `package/transformers_options.py` has cleaned them. Nothing else of the package is in it.
"""

from __future__ import annotations

import contextlib
import json
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_agent.errors import CannotRun, PolicyError
from edge_agent.package import transformers_options as options

_END_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""All that is read of `generation_config.json`: the rest is options, and the agent has its own."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The folder.

    Attributes:
        model: config.json, generation_config.json and the weights.
        tokenizer: tokenizer.json, its configuration and its templates.
        tokenizer_class: that the package names, without `Fast`; empty for none.
        quantized: its weights need another reader than this folder has room for.
    """

    model: Path
    tokenizer: Path
    tokenizer_class: str
    quantized: bool


@contextlib.contextmanager
def opened(model: Path, tokenizer: Path) -> Iterator[Checkpoint]:
    """Makes the folder, and removes it when the block ends: what is loaded by then needs it no more.

    Args:
        model, tokenizer: the package's folders; the same one where the tokenizer lies beside the weights.

    Raises:
        PolicyError: a file leads out of the package; see `transformers_options`.
        CannotRun: no folder can be made here.
    """
    with contextlib.ExitStack() as stack:
        try:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edge-agent-")))
        except OSError as error:
            raise CannotRun(
                f"this host has no folder for temporary files ({error.strerror})",
                remedy="give the runner a TMPDIR that it may write to",
            ) from error
        view = Checkpoint(
            model=place / "model",
            tokenizer=place / "tokenizer",
            tokenizer_class=_tokenizer_class(tokenizer),
            quantized=_is_there(model / options.CONFIG)
            and bool(options.read(model / options.CONFIG).get("quantization_config")),
        )
        view.model.mkdir()
        view.tokenizer.mkdir()
        _show_model(model, view.model)
        _show_tokenizer(tokenizer, view.tokenizer)
        yield view


def _show_model(source: Path, target: Path) -> None:
    _write(target / options.CONFIG, _cleaned(source / options.CONFIG))
    generation = _cleaned(source / options.GENERATION_CONFIG)
    _write(
        target / options.GENERATION_CONFIG,
        {key: generation[key] for key in _END_TOKENS if _is_tokens(generation.get(key))},
    )
    index = source / options.INDEX
    if not _is_there(index):
        _link(source / options.WEIGHTS, target)
        return
    document = _cleaned(index)
    files = set(options.weight_files(document, index.name, {path.name for path in source.iterdir()}).values())
    _write(target / options.INDEX, document)
    for name in files:
        _link(source / name, target)


def _show_tokenizer(source: Path, target: Path) -> None:
    if not _is_there(source / options.TOKENIZER):
        raise PolicyError(f"the package has no {options.TOKENIZER!r}")
    _link(source / options.TOKENIZER, target)
    for name in (options.TOKENIZER_CONFIG, options.SPECIAL_TOKENS, options.ADDED_TOKENS):
        if _is_there(source / name):
            _write(target / name, _cleaned(source / name))
    _link(source / options.TEMPLATE, target)
    templates = source / options.TEMPLATES
    if templates.is_dir():
        (target / options.TEMPLATES).mkdir()
        for template in sorted(templates.glob("*.jinja")):
            _link(template, target / options.TEMPLATES)


def _tokenizer_class(folder: Path) -> str:
    file = folder / options.TOKENIZER_CONFIG
    return options.tokenizer_class(options.read(file)) if _is_there(file) else ""


def _cleaned(file: Path) -> dict[str, Any]:
    """A file's content as the library may see it; empty if there is no such file."""
    if not _is_there(file):
        return {}
    try:
        return options.clean(file.name, options.read(file)).document
    except PolicyError as error:
        raise PolicyError(f"{file.name!r}: {error.message}", remedy=error.remedy) from error


def _is_tokens(value: object) -> bool:
    tokens = value if isinstance(value, list) else [value]
    return bool(tokens) and all(
        isinstance(token, int) and not isinstance(token, bool) and 0 <= token < 1 << 31 for token in tokens
    )


def _is_there(file: Path) -> bool:
    """True for a regular file, false if there is none.

    Raises:
        PolicyError: it is something else, such as a link or a pipe.
    """
    try:
        mode = file.lstat().st_mode
    except FileNotFoundError:
        return False
    if not stat.S_ISREG(mode):
        raise PolicyError(f"{file.name!r} is not a regular file")
    return True


def _link(file: Path, folder: Path) -> None:
    if _is_there(file):
        (folder / file.name).symlink_to(file.absolute())


def _write(file: Path, document: dict[str, Any]) -> None:
    file.write_text(json.dumps(document), encoding="utf-8")
