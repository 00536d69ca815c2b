"""A scripted host, and models that live on it, in a folder that costs no disk; at the end no runner is left."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from edge_agent.cache import fsck
from edge_agent.cache.store import Store
from edge_agent.errors import StoreError
from tests.support.packages import WEIGHTS
from tests.support.scripted_runner import Life, ScriptedHost

NewLife = Callable[..., Life]


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A folder in memory, if there is one: a life syncs some hundred files, which takes seconds on a busy disk.

    What outlives a power cut is shown elsewhere.
    """
    memory = "/dev/shm"
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.fixture
def host() -> ScriptedHost:
    return ScriptedHost()


@pytest.fixture
def new_life(tmp_path: Path, host: ScriptedHost) -> Iterator[NewLife]:
    lives: list[Life] = []

    def new(**options: Any) -> Life:
        lives.append(Life(tmp_path, host, **options))
        return lives[-1]

    yield new
    for life in lives:
        life.lifecycle.close()
    assert host.running() == []


@pytest.fixture
def life(new_life: NewLife) -> Life:
    return new_life()


@pytest.fixture
def stuck_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    """No blob can be set aside: as with a bad inode, which cannot be renamed either."""

    def refuse(store: Store, damaged: object) -> NoReturn:
        raise StoreError("cannot set aside a blob: Structure needs cleaning")

    monkeypatch.setattr(fsck, "set_aside", refuse)


def damage(life: Life, version: int) -> None:
    weights = life.store.folder(life.records[version]) / WEIGHTS
    weights.chmod(0o644)
    weights.write_bytes(b"x" * weights.stat().st_size)
