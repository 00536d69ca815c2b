"""What a real model's graph says of it."""

from __future__ import annotations

from pathlib import Path

from edge_agent.package import onnx_graph

PARAMETERS = 134_515_008
"""Of SmolLM2-135M, whose embeddings are its last matrix; the build shares them, too."""


def test_the_weights_of_a_real_model_are_counted_exactly(real_model: Path) -> None:
    assert onnx_graph.read(real_model / "model.onnx").weights == PARAMETERS
