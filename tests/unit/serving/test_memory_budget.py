"""The memory budget: estimate, learned peaks, who has to go, and what is refused."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_agent.cache.record import VersionRecord
from edge_agent.errors import MemoryShort, SyncStopped
from edge_agent.host import identity
from edge_agent.package.manifest import ManifestFile
from edge_agent.package.manifest import make as make_manifest
from edge_agent.package.trust import TrustDecision
from edge_agent.serving.footprint import LEAST_CONTEXT_TOKENS, RUNNER_BYTES, Footprint, footprint_of
from edge_agent.serving.learned import Learned
from edge_agent.serving.memory_budget import LIMIT_EXTRA_BYTES, LIMIT_FACTOR, MemoryBudget
from tests.support.packages import GENAI_CONFIG
from tests.support.processes import wait_until

MIB = 1 << 20
CONFIG = {
    "model": {
        "context_length": 4096,
        "decoder": {"num_hidden_layers": 16, "num_key_value_heads": 4, "head_size": 64},
    }
}
TRUST = TrustDecision(rule="none", signed_by="", unsigned_code=False, reason="test")
KV_BYTES = 2 * 16 * 4 * 64 * 4
CONTEXT = 2048


class Model:
    """Has a runner of a given size."""

    def __init__(self, name: str, size: int = 0, used_s: float = 0.0, *, busy: bool = False) -> None:
        self.name, self.size, self.used_s, self.busy = name, size, used_s, busy
        self.asked = threading.Event()

    def resident_bytes(self) -> int:
        return self.size

    def last_used_s(self) -> float:
        return self.used_s

    def give_up_memory(self) -> bool:
        self.asked.set()
        if self.busy or not self.size:
            return False
        self.size = 0
        return True


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    file = tmp_path / "version" / GENAI_CONFIG
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(CONFIG))
    return tmp_path / "version"


def version(weights_bytes: int = 100 * MIB) -> VersionRecord:
    files = [
        ManifestFile(path="artifacts/model/model.onnx.data", size_bytes=weights_bytes, sha256="0" * 64),
        ManifestFile(path=GENAI_CONFIG, size_bytes=1, sha256="1" * 64),
    ]
    return VersionRecord(
        name="assistant", version=1, manifest=make_manifest("phi", files), attached=(), registry_uri="",
        source="", run_id="", trust=TRUST, created_at=1.0,
    )  # fmt: skip


def budget(
    tmp_path: Path, *, limit: int = 0, free: Callable[[], int] | int = 1 << 40, total: int = 1 << 40
) -> MemoryBudget:
    available = free if callable(free) else lambda: free
    learned = Learned(tmp_path / "learned.json")
    return MemoryBudget(limit, learned=learned, available=available, total=lambda: total)


NEED = int((100 * MIB + 1) * 1.2) + CONTEXT * KV_BYTES + RUNNER_BYTES


def test_the_estimate_is_weights_keys_and_values_and_the_runner(folder: Path) -> None:
    footprint = footprint_of(version(), folder)
    assert footprint.kv_bytes_per_token == KV_BYTES
    assert footprint.needed_bytes(CONTEXT) == NEED
    assert footprint.needed_bytes(1 << 20) == footprint.needed_bytes(4096), "the model has no longer context"


def test_a_version_without_options_is_estimated_by_its_files(tmp_path: Path) -> None:
    assert footprint_of(version(), tmp_path / "nowhere") == Footprint(weights_bytes=100 * MIB + 1)


def test_a_model_that_fits_has_the_context_that_the_settings_want(tmp_path: Path, folder: Path) -> None:
    model, shared = Model("a"), budget(tmp_path, free=NEED)
    shared.join(model)
    with shared.admit(model, version(), folder, CONTEXT) as admission:
        assert (admission.context_tokens, admission.warning) == (CONTEXT, "")


def test_too_little_memory_makes_the_context_smaller_and_says_so(tmp_path: Path, folder: Path) -> None:
    model, shared = Model("a"), budget(tmp_path, free=NEED - 1000 * KV_BYTES)
    shared.join(model)
    with shared.admit(model, version(), folder, CONTEXT) as admission:
        assert LEAST_CONTEXT_TOKENS < admission.context_tokens <= CONTEXT - 1000
        assert f"context of {admission.context_tokens} tokens instead of 2048" in admission.warning


@pytest.mark.parametrize("free", [1 << 40, NEED], ids=["plenty", "little"])
def test_a_runner_is_limited_to_what_no_version_of_its_size_needs(
    tmp_path: Path, folder: Path, free: int
) -> None:
    model, shared = Model("a"), budget(tmp_path, free=free)
    shared.join(model)
    with shared.admit(model, version(), folder, CONTEXT) as admission:
        assert admission.limit_bytes == NEED * LIMIT_FACTOR + LIMIT_EXTRA_BYTES
        assert admission.is_short is (free == NEED), "then a refused allocation may be the host's doing"


def test_no_runner_may_map_more_than_the_host_has(tmp_path: Path, folder: Path) -> None:
    model, shared = Model("a"), budget(tmp_path, total=NEED * LIMIT_FACTOR)
    shared.join(model)
    with shared.admit(model, version(), folder, CONTEXT) as admission:
        assert admission.limit_bytes == NEED * LIMIT_FACTOR


def test_an_estimate_that_no_host_could_hold_unloads_nobody(tmp_path: Path, folder: Path) -> None:
    config = {
        "model": {"decoder": dict.fromkeys(("num_hidden_layers", "num_key_value_heads", "head_size"), 1024)}
    }
    (folder / GENAI_CONFIG).write_text(json.dumps(config))
    model, other = Model("a"), Model("b", 300 * MIB)
    shared = budget(tmp_path, free=lambda: 1000 * MIB - other.size)
    shared.join(model)
    shared.join(other)
    with shared.admit(model, version(), folder, CONTEXT) as admission:
        assert admission.context_tokens == LEAST_CONTEXT_TOKENS
    assert other.size == 300 * MIB
    with shared.admit(model, version(800 * MIB), folder, CONTEXT):
        assert other.size == 0, "its weights need the room"


def test_a_small_peak_makes_no_smaller_limit_and_a_large_one_a_larger(tmp_path: Path, folder: Path) -> None:
    model, shared = Model("a"), budget(tmp_path)
    shared.join(model)
    limits = []
    for peak in (10 * MIB, 10 * NEED):
        shared.note_peak(version(), context_tokens=CONTEXT, peak_bytes=peak)
        with shared.admit(model, version(), folder, CONTEXT) as admission:
            limits.append((admission.limit_bytes - LIMIT_EXTRA_BYTES) // LIMIT_FACTOR)
    assert limits == [NEED, 10 * NEED]


def test_an_estimate_alone_refuses_nothing(tmp_path: Path, folder: Path) -> None:
    model, shared = Model("a"), budget(tmp_path, free=101 * MIB)
    shared.join(model)
    with shared.admit(model, version(), folder, CONTEXT) as admission:
        assert admission.context_tokens == LEAST_CONTEXT_TOKENS
        assert admission.warning


def test_weights_that_do_not_fit_are_refused(tmp_path: Path, folder: Path) -> None:
    model, shared = Model("a"), budget(tmp_path, free=99 * MIB)
    shared.join(model)
    with (
        pytest.raises(MemoryShort, match="bytes of weights"),
        shared.admit(model, version(), folder, CONTEXT),
    ):
        raise AssertionError("it was admitted")
    with pytest.raises(MemoryShort):
        shared.check_weights(version())
    model.size = 2 * MIB
    shared.check_weights(version())  # what is loaded could go


def test_a_measured_peak_replaces_the_estimate(tmp_path: Path, folder: Path) -> None:
    shared = budget(tmp_path, free=150 * MIB)
    assert not shared.fits_beside(version(), folder, CONTEXT)
    shared.note_peak(version(), context_tokens=CONTEXT, peak_bytes=140 * MIB)
    assert shared.fits_beside(version(), folder, CONTEXT)
    assert not shared.fits_beside(version(), folder, CONTEXT // 2), "another context is another measurement"
    known = Learned(tmp_path / "learned.json").of(version().digest, identity.of_host())
    assert known.peaks == {CONTEXT: 140 * MIB}


def test_the_least_recently_used_model_goes_first_and_no_more_than_needed(
    tmp_path: Path, folder: Path
) -> None:
    new, old, older = Model("new"), Model("old", NEED, 20.0), Model("older", NEED, 10.0)
    shared = budget(tmp_path, limit=2 * NEED)
    for model in (new, old, older):
        shared.join(model)
    with shared.admit(new, version(), folder, CONTEXT) as admission:
        assert admission.context_tokens == CONTEXT
        assert (old.size, older.size) == (NEED, 0)


def test_a_load_waits_for_a_busy_model_to_give_up_its_memory(tmp_path: Path, folder: Path) -> None:
    new, busy = Model("new"), Model("busy", NEED, busy=True)
    shared = budget(tmp_path, limit=NEED)
    shared.join(new)
    shared.join(busy)

    def finish() -> None:
        assert busy.asked.wait(20)
        busy.busy = False

    finisher = threading.Thread(target=finish)
    finisher.start()
    with shared.admit(new, version(), folder, CONTEXT) as admission:
        assert admission.context_tokens == CONTEXT
        assert busy.size == 0
    finisher.join()


def test_a_load_waits_for_another_one_that_is_admitted(tmp_path: Path, folder: Path) -> None:
    first, second = Model("first"), Model("second")
    asking: list[threading.Thread] = []

    def free() -> int:
        asking.append(threading.current_thread())
        return 1 << 40

    shared = budget(tmp_path, limit=NEED, free=free)
    shared.join(first)
    shared.join(second)
    order: list[str] = []

    def load_second() -> None:
        with shared.admit(second, version(), folder, CONTEXT) as admission:
            order.append(f"second with {admission.context_tokens}")

    with shared.admit(first, version(), folder, CONTEXT):
        loader = threading.Thread(target=load_second)
        loader.start()
        # One that is admitted at once asks three times.
        wait_until(lambda: order or asking.count(loader) > 5, 60, "the second to ask again and again")
        assert order == []
        order.append("first")
    loader.join(60)
    assert order == ["first", f"second with {CONTEXT}"]


def test_a_closed_model_waits_no_longer(tmp_path: Path, folder: Path) -> None:
    new, busy = Model("new"), Model("busy", NEED, busy=True)
    shared = budget(tmp_path, limit=NEED)
    shared.join(new)
    shared.join(busy)

    def leave() -> None:
        assert busy.asked.wait(20)
        shared.leave(new)

    leaver = threading.Thread(target=leave)
    leaver.start()
    with (
        pytest.raises(SyncStopped, match="stopping"),
        shared.admit(new, version(), folder, CONTEXT),
    ):
        raise AssertionError("it was admitted")
    leaver.join()
