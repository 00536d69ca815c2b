"""How much memory a version's runner will take, before anybody has measured it.

    weights × LOAD_FACTOR + keys and values of the context + what the runner takes without a model

An estimate only causes warnings and smaller contexts. A load is refused only if the weights alone do not fit.
Source of the factors: docs/models.md.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_agent.cache.record import VersionRecord
from edge_agent.package import genai_options

RUNNER_BYTES = 200 << 20
LOAD_FACTOR = 1.2
"""Some weights are in memory twice: as they are in the file, and as the CPU's kernels want them."""
KV_ELEMENT_BYTES = 4
"""The model builder's int4 for CPUs keeps keys and values as float32."""
LEAST_CONTEXT_TOKENS = 256
_STEP_TOKENS = 64
_MAX_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """One version's memory.

    Attributes:
        weights_bytes: the size of its files.
        kv_bytes_per_token: keys and values of all layers; 0 when the package does not say.
        model_tokens: the longest context that the model supports; 0 when the package does not say.
    """

    weights_bytes: int
    kv_bytes_per_token: int = 0
    model_tokens: int = 0

    def needed_bytes(self, context_tokens: int) -> int:
        """The estimate for a context."""
        tokens = min(context_tokens, self.model_tokens) if self.model_tokens else context_tokens
        return int(self.weights_bytes * LOAD_FACTOR) + tokens * self.kv_bytes_per_token + RUNNER_BYTES

    def context_that_fits(self, free_bytes: int, wanted_tokens: int) -> int:
        """The largest context within `free_bytes`, at most `wanted_tokens`, and never less than
        `LEAST_CONTEXT_TOKENS` (or than what is wanted)."""
        least = min(LEAST_CONTEXT_TOKENS, wanted_tokens)
        if not self.kv_bytes_per_token:
            return wanted_tokens
        left = free_bytes - self.needed_bytes(0)
        fitting = max(0, left) // self.kv_bytes_per_token // _STEP_TOKENS * _STEP_TOKENS
        return min(wanted_tokens, max(least, fitting))


def footprint_of(record: VersionRecord, folder: Path) -> Footprint:
    """Reads a committed version's footprint, as far as its options say it.

    Args:
        folder: of the version, verified.
    """
    paths = [file.path for file in record.files if Path(file.path).name == genai_options.FILE_NAME]
    return footprint_of_files(record.total_bytes, folder / paths[0] if paths else None)


def footprint_of_files(weights_bytes: int, options: Path | None) -> Footprint:
    """The footprint of a model's files, as far as its options say it.

    Args:
        options: its `genai_config.json`; None where it has none.
    """
    model = _model(options) if options else {}
    decoder = model.get("decoder") if isinstance(model.get("decoder"), dict) else {}
    sizes = [_positive(decoder, key) for key in ("num_hidden_layers", "num_key_value_heads", "head_size")]
    layers, heads, size = sizes
    return Footprint(
        weights_bytes=weights_bytes,
        kv_bytes_per_token=2 * layers * heads * size * KV_ELEMENT_BYTES,
        model_tokens=_positive(model, "context_length"),
    )


def _model(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            model = json.loads(stream.read(_MAX_CONFIG_BYTES + 1))["model"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}  # the load says what is wrong with it
    return model if isinstance(model, dict) else {}


def _positive(fields: Any, key: str) -> int:
    value = fields.get(key) if isinstance(fields, dict) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31 else 0
