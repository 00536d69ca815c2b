"""Prometheus' text format, for a device without the OpenAI interface: a file for node_exporter, or a pipe.

Pure but for `write`, which replaces the file in one step: node_exporter never reads half of one.
Source: https://prometheus.io/docs/instrumenting/exposition_formats/ (text format 0.0.4).
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from edge_agent.metrics.families import FAMILIES, Document, Family, Labels

_IN_LABELS = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})
_IN_HELP = str.maketrans({"\\": r"\\", "\n": r"\n"})


def text(document: Document) -> str:
    """The document's metrics.

    Args:
        document: the daemon's; empty where it does not answer.
    """
    return "".join(f"{line}\n" for family in FAMILIES for line in _lines(family, document))


def write(file: Path, content: str) -> None:
    """Replaces a file, readable for everybody.

    Raises:
        OSError: it cannot be written; the former one is still there.
    """
    descriptor, temporary = tempfile.mkstemp(
        dir=file.parent, prefix=f".{file.name}."
    )  # the scraper reads *.prom
    try:
        with open(descriptor, "w", encoding="utf-8") as made:
            made.write(content)
            os.fchmod(made.fileno(), 0o644)
        Path(temporary).replace(file)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        raise


def _lines(family: Family, document: Document) -> Iterator[str]:
    samples = list(family.samples(document))
    if not samples:
        return
    yield f"# HELP {family.full_name} {family.help.translate(_IN_HELP)}"
    yield f"# TYPE {family.full_name} {'gauge' if family.kind == 'info' else family.kind}"
    for sample in samples:
        yield f"{sample.name}{_labels(sample.labels)} {sample.value!r}"


def _labels(labels: Labels) -> str:
    pairs = ",".join(f'{name}="{value.translate(_IN_LABELS)}"' for name, value in labels.items())
    return f"{{{pairs}}}" if pairs else ""
