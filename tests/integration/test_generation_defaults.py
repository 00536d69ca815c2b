"""What a request leaves open: the device's settings decide, then the package. In the agent's own runner."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest

from edge_agent.publishing.package import build_package
from edge_agent.runner.process import RunnerProcess, child_environment
from edge_agent.runner.protocol import Delta, Done, Load

SAMPLE_HF = Path(__file__).parents[1] / "models" / "sample_hf"
STORY = "Tell me a long story"
DEFAULT_MAX_TOKENS = 256

Flavor = Literal["onnx", "transformers"]


@pytest.fixture(scope="module", params=["onnx", pytest.param("transformers", marks=pytest.mark.long)])
def flavor(request: pytest.FixtureRequest) -> Flavor:
    chosen: Flavor = request.param
    return chosen


def package(flavor: Flavor, sample_model: Path, folder: Path, **options: str) -> Path:
    source = sample_model if flavor == "onnx" else SAMPLE_HF
    return build_package(source, folder / "package", name="sample", flavor=flavor, options=options).folder


@contextmanager
def device(folder: Path, state: Path, **settings: Any) -> Iterator[RunnerProcess]:
    """A runner that was told what the settings say; what they leave open is 0."""
    runner = RunnerProcess(model="assistant", environment=child_environment(state))
    try:
        load = {"max_tokens": 0, "context_tokens": 2048, "threads": 1, **settings}
        runner.load(Load(folder=str(folder), **load), timeout_s=120)
        yield runner
    finally:
        runner.stop()


@pytest.fixture(scope="module")
def plain(
    flavor: Flavor, sample_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunnerProcess]:
    """A device whose settings and package say nothing."""
    folder = tmp_path_factory.mktemp("plain")
    with device(package(flavor, sample_model, folder), folder) as runner:
        yield runner


def ask(runner: RunnerProcess, **options: Any) -> tuple[str, int, str]:
    """(text, new tokens, finish_reason)"""
    document = {"messages": [{"role": "user", "content": STORY}], "temperature": 0.0, **options}
    texts: list[str] = []
    for frame in runner.generate("x", document, timeout_s=120):
        if isinstance(frame, Done):
            return "".join(texts), frame.usage["completion_tokens"], frame.finish_reason
        assert isinstance(frame, Delta)
        texts.append(frame.text)
    raise AssertionError("no end")


def test_the_request_is_stronger_than_the_settings_and_these_than_the_package(
    plain: RunnerProcess, flavor: Flavor, sample_model: Path, tmp_path: Path
) -> None:
    expected = {
        penalty: ask(plain, repetition_penalty=penalty, max_tokens=24)[0] for penalty in (1.0, 2.0, 3.0)
    }
    assert len(set(expected.values())) == 3, "the penalties can be told apart"
    assert ask(plain, max_tokens=24)[0] == expected[1.0]
    folder = package(flavor, sample_model, tmp_path, max_tokens="20", repetition_penalty="2.0")
    with device(folder, tmp_path) as runner:
        assert ask(runner)[1:] == (20, "length")
        assert ask(runner, max_tokens=24)[0] == expected[2.0]
        assert ask(runner, max_tokens=24, repetition_penalty=1.0)[0] == expected[1.0]
    with device(folder, tmp_path, max_tokens=22, repetition_penalty=3.0) as runner:
        assert ask(runner)[1:] == (22, "length")
        assert ask(runner, max_tokens=24)[0] == expected[3.0]
        assert ask(runner, max_tokens=24, repetition_penalty=1.0)[0] == expected[1.0]


def test_where_nobody_names_a_limit_it_is_256_tokens_or_what_max_length_leaves(
    plain: RunnerProcess, flavor: Flavor, sample_model: Path, tmp_path: Path
) -> None:
    endless = {"messages": [{"role": "user", "content": "1 " * 500}]}
    assert ask(plain, **endless)[1:] == (DEFAULT_MAX_TOKENS, "length")
    with device(package(flavor, sample_model, tmp_path, max_length="1500"), tmp_path) as runner:
        assert ask(runner, **endless)[1] > DEFAULT_MAX_TOKENS
