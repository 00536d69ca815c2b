"""The sides of the benchmark count alike: a ratio of two of them says nothing else."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from edge_agent.bench.bare import Bare
from edge_agent.wrapper.genai_pyfunc import ARTIFACT, GenaiModel


@pytest.mark.parametrize("max_tokens", [64, 2])
def test_the_bare_library_counts_the_tokens_of_an_answer_as_the_wrapper_does(
    sample_model: Path, max_tokens: int
) -> None:
    text = "What is the capital of Spain?"
    wrapper = GenaiModel()
    wrapper.load_context(
        SimpleNamespace(model_config={"threads": 1}, artifacts={ARTIFACT: str(sample_model)})
    )
    question = [{"messages": [{"role": "user", "content": text}], "max_tokens": max_tokens}]
    *_, last = wrapper.predict_stream(None, question)
    assert isinstance(last, dict)
    bare = Bare(sample_model, 1).generate(text, max_tokens)
    assert last["choices"][0]["finish_reason"] == ("stop" if max_tokens == 64 else "length")
    assert {key: bare[key] for key in ("prompt_tokens", "completion_tokens")} == {
        key: last["usage"][key] for key in ("prompt_tokens", "completion_tokens")
    }
