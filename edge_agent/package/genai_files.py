"""Checks the folders of a package that onnxruntime-genai opens: options, tokenizer, graphs.

Used when a package arrives, and again before the library opens it: an earlier agent may have taken it.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from pathlib import Path, PurePosixPath

from edge_agent.package import genai_options, genai_tokenizer, onnx_bounds


def check(tree: Path, paths: Set[str]) -> None:
    """Checks what the library reads beside the graphs, in each folder with a `genai_config.json`.

    Args:
        tree: the package.
        paths: its files.

    Raises:
        PolicyError: the message names the file and the key.
    """
    for config in _configs(paths):
        genai_options.check(tree / config, str(config))
        genai_tokenizer.check(tree, config.parent, paths)


def check_graphs(tree: Path, paths: Set[str]) -> None:
    """Checks each graph that the library would load.

    Raises:
        PolicyError: it allocates or loops without measure.
    """
    graphs = {path for path in paths if path.casefold().endswith(".onnx")}
    for config in _configs(paths):
        named = genai_options.graphs(tree / config, str(config))
        graphs |= {path for name in named if (path := str(config.parent / name)) in paths}
    package_bytes = sum((tree / path).lstat().st_size for path in paths)
    for path in sorted(graphs):
        onnx_bounds.check(tree / path, path, package_bytes=package_bytes)


def of_folder(tree: Path) -> frozenset[str]:
    """The files of a package on disk."""
    return frozenset(path.relative_to(tree).as_posix() for path in tree.rglob("*") if not path.is_dir())


def _configs(paths: Set[str]) -> Iterator[PurePosixPath]:
    for path in map(PurePosixPath, sorted(paths)):
        if path.name.casefold() == genai_options.FILE_NAME:
            yield path
