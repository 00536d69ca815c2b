"""Locks on files and folders: taken at once, waited for within a bound, or shared."""

from __future__ import annotations

import multiprocessing
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from edge_agent.cache.locks import Lock
from tests.support.clock import ScriptedClock


def test_one_has_the_lock_and_a_second_is_told_at_once(tmp_path: Path) -> None:
    with Lock.of_folder(tmp_path) as first, Lock.of_folder(tmp_path) as second:
        assert first.try_exclusive()
        assert not second.try_exclusive()
    with Lock.of_folder(tmp_path) as third:
        assert third.try_exclusive()


def test_a_lock_is_waited_for_until_it_is_free(tmp_path: Path) -> None:
    first = Lock.of_folder(tmp_path)
    assert first.try_exclusive()
    time, closed = ScriptedClock(), list[float]()

    def let_go() -> None:
        if time.now_s > 3 and not closed:
            closed.append(time.now_s)
            first.close()

    time.on_sleep = let_go
    with Lock.of_folder(tmp_path) as second:
        assert second.wait_exclusive(10, clock=time.clock)
    assert closed == [time.now_s], "it was taken as soon as it was free"


def test_the_wait_for_a_lock_ends_at_its_bound(tmp_path: Path) -> None:
    time = ScriptedClock()
    with Lock.of_folder(tmp_path) as first, Lock.of_folder(tmp_path) as second:
        assert first.try_exclusive()
        assert not second.wait_exclusive(10, clock=time.clock)
    assert 10 <= time.now_s < 10.1


def test_no_wait_is_one_try(tmp_path: Path) -> None:
    time = ScriptedClock()
    with Lock.of_folder(tmp_path) as first, Lock.of_folder(tmp_path) as second:
        assert second.wait_exclusive(0, clock=time.clock)
        assert not first.wait_exclusive(0, clock=time.clock)
    assert time.slept == []


def test_those_who_share_a_lock_keep_one_out_who_wants_it_alone(tmp_path: Path) -> None:
    with Lock.of_folder(tmp_path) as alone:
        with Lock.of_folder(tmp_path) as first, Lock.of_folder(tmp_path) as second:
            assert first.wait_shared(0)
            assert second.wait_shared(0)
            assert not alone.try_exclusive()
        assert alone.try_exclusive()


def test_the_wait_to_share_a_lock_ends_at_its_bound_or_when_it_is_free(tmp_path: Path) -> None:
    time = ScriptedClock()
    with Lock.of_folder(tmp_path) as second:
        with Lock.of_folder(tmp_path) as first:
            assert first.try_exclusive()
            assert not second.wait_shared(10, clock=time.clock)
        assert 10 <= time.now_s < 10.1
        assert second.wait_shared(0, clock=time.clock)


def hold(folder: Path, ready: Connection) -> None:
    with Lock.of_folder(folder) as lock:
        ready.send(lock.try_exclusive())
        signal.pause()


def test_the_lock_of_a_process_that_was_killed_is_free(tmp_path: Path) -> None:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path, there))
    process.start()
    with Lock.of_folder(tmp_path) as lock:
        assert here.recv() is True
        assert not lock.try_exclusive()
        process.kill()
        process.join(60)
        assert lock.try_exclusive()


def test_a_folder_that_was_made_again_is_not_the_one_that_is_locked(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with Lock.of_folder(folder) as lock:
        assert lock.is_of(folder)
        folder.rmdir()
        assert not lock.is_of(folder)
        folder.mkdir()
        assert not lock.is_of(folder)


def test_a_file_is_no_folder_to_lock(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name, kind in (("file", NotADirectoryError), ("gone", FileNotFoundError)):
        with pytest.raises(kind):
            Lock.of_folder(tmp_path / name)
