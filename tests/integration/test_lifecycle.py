"""What a model's life costs on the way from one version to the next, with real runners."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from edge_agent.cache.record import VersionRecord
from edge_agent.cache.store import Store
from edge_agent.errors import CannotRun, EdgeAgentError, MemoryShort
from edge_agent.package.manifest import MANIFEST_NAME
from edge_agent.publishing.package import build_package
from edge_agent.runner.process import RunnerProcess, child_environment
from edge_agent.serving.learned import Learned
from edge_agent.serving.lifecycle import ModelLifecycle
from edge_agent.serving.loading import Loading
from edge_agent.serving.memory_budget import MemoryBudget
from edge_agent.serving.threads import ThreadChoice
from edge_agent.settings.model import ModelSettings
from tests.support.committed import commit, make_record
from tests.support.packages import manifest_of

_PLENTY = 1 << 40


@dataclass
class Host:
    """One model with an active version, and a candidate of an architecture that nobody knows.

    Attributes:
        available_bytes: of memory.
        runners: how many were started.
    """

    lifecycle: ModelLifecycle
    candidate: VersionRecord
    available_bytes: int = _PLENTY
    runners: int = 0

    def refusal(self, *, asked_for: bool = False) -> EdgeAgentError:
        """What the candidate is refused with."""
        with pytest.raises(EdgeAgentError) as caught:
            self.lifecycle.adopt(self.candidate.key, asked_for=asked_for)
        return caught.value


@pytest.fixture
def host(tmp_path: Path, sample_model: Path) -> Iterator[Host]:
    store = Store(tmp_path / "state")
    store.create()
    active = commit(store, 1)
    tree = store.staging_root / "assistant-2" / "tree"
    build_package(sample_model, tree, name="sample", signature="chat", options={})
    (tree / MANIFEST_NAME).unlink()
    config = tree / "artifacts" / "onnx" / "genai_config.json"
    text = config.read_text()
    config.unlink()
    config.write_text(text.replace('"type": "phi3"', '"type": "nonsense"'))
    candidate = make_record(manifest_of(tree, "sample"), 2)
    with store.lock():
        store.commit(candidate, tree)
    store.change_state("assistant", lambda state: state.switched(active.key))
    learned = Learned(store.learned_file)

    def start_runner() -> RunnerProcess:
        made.runners += 1
        return RunnerProcess(model="assistant", environment=child_environment(tmp_path / "state"))

    loading = Loading(
        settings=ModelSettings(uri="models:/phi@prod", preload=False),
        threads=ThreadChoice(1, learned=learned),
        budget=MemoryBudget(0, learned=learned, available=lambda: made.available_bytes),
        verify=True,
        public_keys=(),
        allow_unsigned_code=False,
        memory_limit_bytes=0,
    )
    lifecycle = ModelLifecycle("assistant", loading=loading, store=store, start_runner=start_runner)
    made = Host(lifecycle, candidate)
    yield made
    lifecycle.close()


def test_a_version_that_cannot_run_here_is_not_tried_at_each_poll(host: Host) -> None:
    first = host.refusal()
    assert isinstance(first, CannotRun)
    again = host.refusal()
    assert (type(again), str(again), host.runners) == (CannotRun, str(first), 1)
    assert host.lifecycle.state.candidate is None
    host.refusal(asked_for=True)
    assert host.runners == 2, "an operator wants to know"


def test_a_version_that_was_too_large_is_tried_again_when_there_is_more_memory(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for percent in (90, 90, 95):
        host.available_bytes = host.candidate.total_bytes * percent // 100
        assert isinstance(host.refusal(), MemoryShort)
    assert sum("candidate starts" in message for message in caplog.messages) == 1
    host.available_bytes = _PLENTY
    assert isinstance(host.refusal(), CannotRun)
    assert host.runners == 1
