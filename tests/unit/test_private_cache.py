"""The benchmark's own cache: one version, links and no copies, one benchmark at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_agent.bench.line_child import BenchError
from edge_agent.bench.private_cache import private_cache
from edge_agent.cache import fsck
from edge_agent.cache.record import VersionRecord
from edge_agent.cache.store import Store
from edge_agent.package import trust
from edge_agent.package.trust import TrustDecision
from tests.support.packages import WEIGHTS, make_package, manifest_of


def committed(store: Store) -> VersionRecord:
    store.create()
    tree = store.staging_root / "assistant-1" / "tree"
    make_package(tree, trust.WRAPPER)
    record = VersionRecord(
        name="assistant",
        version=1,
        manifest=manifest_of(tree, "phi"),
        attached=(),
        registry_uri="sqlite:///x",
        source="file:///x",
        run_id="",
        trust=TrustDecision(rule=trust.Rule.NO_CODE, signed_by="", unsigned_code=False, reason="a test"),
        created_at=1_000.0,
    )
    with store.lock():
        store.commit(record, tree)
    return record


def test_the_version_is_active_there_and_costs_no_space(tmp_path: Path) -> None:
    store = Store(tmp_path)
    record = committed(store)
    with private_cache(store, record) as place:
        own = Store(place)
        assert own.state().model("assistant").active == record.key
        assert fsck.verify(own).damaged == ()
        assert (own.folder(record) / WEIGHTS).samefile(store.folder(record) / WEIGHTS)
    assert not place.exists()
    assert fsck.verify(store).damaged == ()


def test_a_second_benchmark_is_refused_and_takes_nothing_from_the_first(tmp_path: Path) -> None:
    """It removed the first one's cache on its way out."""
    store = Store(tmp_path)
    record = committed(store)
    with private_cache(store, record) as place:
        with pytest.raises(BenchError, match="another benchmark"), private_cache(store, record):
            pass
        assert Store(place).versions() == [record]


def test_what_a_killed_benchmark_left_is_removed_first(tmp_path: Path) -> None:
    store = Store(tmp_path)
    record = committed(store)
    left = tmp_path / "bench" / "models" / "left"
    left.parent.mkdir(parents=True)
    left.touch()
    with private_cache(store, record):
        assert not left.exists()
