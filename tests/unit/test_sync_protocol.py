"""What the daemon and a sync say to each other: each side treats the other's bytes as input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge_agent.errors import (
    CannotRun,
    EdgeAgentError,
    NoModel,
    Quarantined,
    SettingsError,
    SyncStopped,
    TransportError,
)
from edge_agent.sync import protocol
from edge_agent.sync.process import run_sync
from edge_agent.sync.protocol import CacheJob, LinkJob, Outline, RegistryJob, SyncJob, SyncResult, TrustJob

JOB = SyncJob(
    state_dir="/var/lib/edge-agent",
    registry=RegistryJob(uri="https://registry", timeout_s=7.5),
    name="assistant",
    ref="models:/phi@prod",
    trust=TrustJob(public_keys=("a.pub", "b.pub"), allow_unsigned_code=True),
    cache=CacheJob(quota_bytes=10, min_free_bytes=1, max_bytes_per_s=3),
    link=LinkJob(allowed_bytes=5, since_s=1.5, until_s=2.5, ahead_bytes=1),
    version_file=7,
    fallback=True,
    check_host=True,
    running="1-abc",
    quarantined=("2-def", "3-aaa"),
    outline=True,
)
RESULT = SyncResult(
    name="assistant",
    version=3,
    digest="d" * 64,
    key="3-dddddddddddd",
    bytes=10,
    bytes_fetched=4,
    bytes_mirrored=3,
    bytes_reused=6,
    new=True,
)


HELD = protocol.held(version=3, digest="d" * 64, missing_bytes=5, fetched_bytes=2, mirrored_bytes=1)


def sent(event: protocol.Event) -> dict[str, Any]:
    """An event as the other side reads it."""
    line = protocol.encode(event)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert len(line) <= protocol.MAX_LINE_BYTES
    document: dict[str, Any] = json.loads(line)
    return document


def test_a_job_survives_the_way() -> None:
    assert SyncJob.parse(JOB.encode()) == JOB


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"null",
        b"{}",
        b"\xff",
        b"[" * 100_000,
        json.dumps({"state_dir": "/", "registry": {"uri": "x"}, "name": "a", "ref": "b", "more": 1}).encode(),
        json.dumps({"state_dir": "/", "registry": {"url": "x"}, "name": "a", "ref": "b"}).encode(),
        json.dumps(
            {"state_dir": "/", "registry": {"uri": "x"}, "name": "a", "ref": "b", "trust": 3}
        ).encode(),
    ],
)
def test_what_is_no_job_is_refused(data: bytes) -> None:
    with pytest.raises(SettingsError, match="not understood"):
        SyncJob.parse(data)


def test_a_job_over_the_bound_is_refused_unread() -> None:
    with pytest.raises(SettingsError, match="262144 bytes"):
        SyncJob.parse(b" " * (protocol.MAX_JOB_BYTES + 1))


def test_a_result_survives_the_way() -> None:
    assert protocol.outcome_of(sent(protocol.done(RESULT))) == RESULT


OUTLINE = Outline(version=3, digest="", missing_bytes=1, needed_bytes=2, total_bytes=3)


def test_an_outline_survives_the_way() -> None:
    assert protocol.outcome_of(sent(protocol.outlined(OUTLINE))) == OUTLINE
    with pytest.raises(EdgeAgentError, match="no needed_bytes, or"):
        protocol.outcome_of({**sent(protocol.outlined(OUTLINE)), "needed_bytes": None})


@pytest.mark.parametrize("wrong", [{"version": "3"}, {"new": 1}, {"bytes": True}, {"key": None}])
def test_a_last_event_with_a_wrong_field_is_an_error_that_names_it(wrong: dict[str, object]) -> None:
    with pytest.raises(EdgeAgentError, match=f"no {next(iter(wrong))}, or"):
        protocol.outcome_of({**sent(protocol.done(RESULT)), **wrong})


@pytest.mark.parametrize(
    "event",
    [
        protocol.resolved(version=3, rollout=""),
        protocol.progress(have_bytes=3, total_bytes=2, bytes_per_s=1.6, eta_s=None),
        protocol.quarantined("3-dddddddddddd"),
        protocol.fetching(""),
        protocol.verifying("d"),
        HELD,
        {"event": "unheard of"},
        {},
    ],
)
def test_any_other_event_is_not_the_last(event: protocol.Event) -> None:
    assert protocol.outcome_of(sent(event)) is None


PROGRESS = protocol.progress(have_bytes=3, total_bytes=9, bytes_per_s=1.6, eta_s=4.0)


@pytest.mark.parametrize(
    ("event", "wrong"),
    [
        *(
            (protocol.resolved(version=3, rollout=""), {"version": value})
            for value in ("3", 3.0, True, None, [3])
        ),
        (protocol.resolved(version=3, rollout=""), {"rollout": 50}),
        (protocol.resolved(version=3, rollout=""), {"rollout_from": 2}),
        (protocol.fetching(""), {"digest": None}),
        (protocol.verifying("d"), {"digest": 5}),
        *((PROGRESS, {name: "1"}) for name in ("bytes", "total_bytes", "bytes_per_s", "eta_s")),
        (PROGRESS, {"bytes": 1.5}),
        (protocol.quarantined("3-dddddddddddd"), {"key": {}}),
        *(
            (HELD, {name: 1.5})
            for name in ("version", "digest", "missing_bytes", "fetched_bytes", "mirrored_bytes")
        ),
    ],
)
def test_an_event_with_a_wrong_or_missing_field_is_an_error_that_names_it(
    event: protocol.Event, wrong: dict[str, object]
) -> None:
    (name,) = wrong
    rest = {key: value for key, value in event.items() if key != name}
    for broken in ({**event, **wrong}, rest):
        with pytest.raises(EdgeAgentError, match=f"no {name}, or"):
            protocol.outcome_of(broken)


def test_progress_never_shows_more_than_all_of_it() -> None:
    event = protocol.progress(have_bytes=30, total_bytes=20, bytes_per_s=1.6, eta_s=0.04)
    assert (event["bytes"], event["total_bytes"], event["bytes_per_s"], event["eta_s"]) == (20, 20, 2, 0.0)


@pytest.mark.parametrize("kind", [CannotRun, Quarantined, SettingsError, TransportError])
def test_an_error_keeps_its_kind_and_its_remedy(kind: type[EdgeAgentError]) -> None:
    error = protocol.outcome_of(sent(protocol.failed(kind("why", remedy="what to do"))))
    assert (type(error), str(error)) == (kind, "why; what to do")


@pytest.mark.parametrize("code", [NoModel.code, SyncStopped.code, "runner_failed", "no such code", None])
def test_an_error_that_no_sync_has_is_the_root_s(code: str | None) -> None:
    assert type(protocol.outcome_of({"event": "error", "code": code, "message": "x"})) is EdgeAgentError


def test_an_error_is_cut_to_what_fits_a_line() -> None:
    long = "é\n" * 100_000
    error = protocol.outcome_of(sent(protocol.failed(TransportError(long, remedy=long))))
    assert isinstance(error, TransportError)
    assert error.message == long[:2_000]


def test_a_sync_that_cannot_be_started_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("sys.executable", str(tmp_path / "missing"))
    with pytest.raises(FileNotFoundError):
        run_sync(replace(JOB, version_file=None), timeout_s=1)
    assert list(tmp_path.iterdir()) == []
