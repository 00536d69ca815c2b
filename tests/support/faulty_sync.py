"""Cuts the power at every point of a scenario, starts again, and looks at what is left.

    python -m tests.support.faulty_sync FOLDER [--scenario NAME …] [--fault FAULT …] [--workers N]
    python -m tests.support.faulty_sync FOLDER --trace FILE

The first form prints one JSON object: for each scenario its points, for each fault how many were tried and
what went wrong. A point is a fork of a process with one thread. The second form runs `update` once, with a
real registry, undisturbed; for strace. The calls as `Power` numbers them are written to FILE.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import hashlib
import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edge_agent.errors import StoreError, VerificationError
from edge_agent.models import fetch, fsck, registry
from edge_agent.models.store import Store
from tests.support.power import Call, Fault, Power
from tests.support.power_scenarios import CHUNK_BYTES, NAME, Scenario, Scenarios, copy_state

_RUN_LIMIT_S = 60
_PR_SET_PDEATHSIG = 1
_DONE, _STORE_ERROR, _NOT_FIRED, _BROKEN = 0, 3, 4, 5


class Wrong(Exception):
    """Something that must not be, after a cut or after the start that follows it."""


class Trial:
    """One scenario with its state before, and what an undisturbed run makes of it."""

    def __init__(self, scenario: Scenario, folder: Path) -> None:
        self.scenario = scenario
        self._base = folder / f"{scenario.name}-before"
        self._base.mkdir()
        scenario.prepare(self._base)
        self._before = _contents(self._base)
        self._promised = _promised(self._base)
        state = folder / f"{scenario.name}-undisturbed" / "state"
        state.parent.mkdir()
        copy_state(self._base, state)
        power = Power(state)
        power.install()
        scenario.run(state)
        self.calls: list[Call] = power.calls
        Power.uninstall()
        self._promised |= _promised(state)
        self._after = _contents(state)
        self._active = Store(state).state().model(NAME).active
        self._active_before = Store(self._base).state().model(NAME).active
        self._damaged_before = {damage.key for damage in fsck.verify(Store(self._base)).damaged}
        _check_verified(Store(state))

    def points(self, fault: Fault) -> Iterator[int]:
        for number, call in enumerate(self.calls):
            if fault is not Fault.TEAR or call.name == "write":
                yield number

    def run(self, fault: Fault, at: int, state: Path) -> None:
        """Disturbs one run, looks, starts again, looks again.

        Raises:
            Wrong: with what is wrong.
        """
        copy_state(self._base, state)
        status = _forked(lambda: self._disturbed(fault, at, state))
        if fault is Fault.FULL:
            if status not in (_DONE, _STORE_ERROR):
                raise Wrong(f"the run on a full disk ended with {status}")
            if _staged_bytes(state) > _staged_bytes(self._base):
                raise Wrong("a full disk was not freed")
        elif status != -signal.SIGKILL:
            raise Wrong(f"the point did not fire: status {status}")
        self._check_after_cut(state)
        Power(state).install()
        signal.alarm(_RUN_LIMIT_S)
        try:
            self.scenario.run(state)
        finally:
            signal.alarm(0)
        self._check_after_start(state)

    def _disturbed(self, fault: Fault, at: int, state: Path) -> int:
        power = Power(state, at=at, fault=fault)
        power.install()
        try:
            self.scenario.run(state)
        except StoreError:
            return _STORE_ERROR if len(power.calls) > at else _BROKEN
        return _DONE if len(power.calls) > at else _NOT_FIRED

    def _check_after_cut(self, state: Path) -> None:
        """Final names have verified bytes, and what was active is whole: all that was so before still is."""
        store = Store(state)
        for blob in store.blobs.glob("*"):
            path = blob.relative_to(state).as_posix()
            if _sha256(blob) != blob.name and self._before.get(path) != _sha256(blob):
                raise Wrong(f"blob {blob.name} has other bytes")
        for file in store.versions_root.glob("*/*/**/*"):
            path = file.relative_to(state).as_posix()
            if not file.is_file() or self._before.get(path) == _sha256(file):
                continue
            if _sha256(file) != self._promised.get(path):
                raise Wrong(f"{path} was not verified")
        for damage in fsck.verify(store).damaged:
            if damage.key not in self._damaged_before:
                raise Wrong(f"version {damage.key} is committed and damaged: {damage}")
        keys = {record.key for record in store.versions()}
        if unread := [file.name for file in store.record_files() if file.stem not in keys]:
            raise Wrong(f"record {unread[0]} cannot be read")
        current = store.state()
        if current.rebuilt:
            raise Wrong(f"state.json was lost: {current.rebuilt}")
        active = current.model(NAME).active
        if active not in (self._active_before, self._active):
            raise Wrong(f"version {active} is active")
        if active and active not in keys:
            raise Wrong(f"version {active} is active and not committed")

    def _check_after_start(self, state: Path) -> None:
        """All is as if nothing had happened."""
        store = Store(state)
        _check_verified(store)
        if store.state().model(NAME).active != self._active:
            raise Wrong(f"version {store.state().model(NAME).active} is active after the start")
        after = _contents(state)
        for path in sorted(after.keys() | self._after.keys()):
            if path.endswith(".json") and path in after and path in self._after:
                continue  # they have times in them
            if after.get(path) != self._after.get(path):
                what = "is missing" if path not in after else "differs" if path in self._after else "is left"
                raise Wrong(f"{path} {what}")


def _check_verified(store: Store) -> None:
    if damaged := fsck.verify(store).damaged:
        raise Wrong(f"damaged at the end: {damaged[0]}")


def _contents(state: Path) -> dict[str, str]:
    """Every file and folder below the state folder: sha256, or `folder`."""
    return {
        path.relative_to(state).as_posix(): "folder" if path.is_dir() else _sha256(path)
        for path in state.rglob("*")
        if not path.is_relative_to(state / "models" / "damaged")
    }


def _promised(state: Path) -> dict[str, str]:
    """Every file of every committed version, and the sha256 that it must have."""
    store = Store(state)
    return {
        (store.folder(record) / file.path).relative_to(state).as_posix(): file.sha256
        for record in store.versions()
        for file in record.files
    }


def _staged_bytes(state: Path) -> int:
    staged = (state / "models" / "staging").rglob("*")
    return sum(path.stat().st_size for path in staged if path.is_file() and path.stat().st_nlink == 1)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _forked(action: Any) -> int:
    """Runs it in a child; gives its exit status, negative for a signal."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = _BROKEN
        try:
            _die_with_parent()
            signal.alarm(_RUN_LIMIT_S)
            status = action()
        except BaseException:  # noqa: BLE001 - the child's top
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _work(trials: list[Trial], faults: list[Fault], folder: Path, worker: int, workers: int) -> int:
    """One worker's share of all points; its findings go to a file."""
    found: dict[str, dict[str, Any]] = {}
    number = 0
    for trial in trials:
        for fault in faults:
            tried, wrong = 0, []
            for at in trial.points(fault):
                number += 1
                if number % workers != worker:
                    continue
                tried += 1
                try:
                    trial.run(fault, at, folder / f"worker-{worker}" / "state")
                except (Wrong, StoreError, VerificationError) as error:
                    wrong.append(f"{trial.scenario.name} {fault} at {at} ({trial.calls[at]}): {error}")
            found[f"{trial.scenario.name} {fault}"] = {"tried": tried, "wrong": wrong}
    (folder / f"worker-{worker}.json").write_text(json.dumps(found))
    return _DONE


def _all_points(folder: Path, names: list[str], faults: list[Fault], workers: int) -> dict[str, Any]:
    fetch._NOTE_INTERVAL_S = 0.0  # a note after each chunk: the same points in each run
    for module in (registry, fetch):
        vars(module)["CHUNK_BYTES"] = CHUNK_BYTES
    trials = [Trial(scenario, folder) for scenario in Scenarios(folder).all() if scenario.name in names]
    gc.freeze()  # what is here stays shared with the forks
    children = []
    for worker in range(workers):
        (folder / f"worker-{worker}").mkdir()
        child = os.fork()
        if child == 0:
            status = _BROKEN
            try:
                _die_with_parent()
                status = _work(trials, faults, folder, worker, workers)
            except BaseException:  # noqa: BLE001 - the worker's top
                traceback.print_exc()
            finally:
                os._exit(status)
        children.append(child)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(statuses):
        raise SystemExit(f"a worker ended with {statuses}")
    found = [json.loads((folder / f"worker-{worker}.json").read_text()) for worker in range(workers)]
    return {
        trial.scenario.name: {
            "points": len(trial.calls),
            "faults": {
                fault: {
                    "expected": len(list(trial.points(fault))),
                    "tried": sum(part[f"{trial.scenario.name} {fault}"]["tried"] for part in found),
                    "wrong": [
                        line for part in found for line in part[f"{trial.scenario.name} {fault}"]["wrong"]
                    ],
                }
                for fault in faults
            },
        }
        for trial in trials
    }


def _traced(folder: Path, file: Path) -> None:
    """One undisturbed update in `FOLDER/traced/state`."""
    scenarios = Scenarios(folder, registry=True).all()
    scenario = next(scenario for scenario in scenarios if scenario.name == "update")
    before, state = folder / "before", folder / "traced" / "state"
    before.mkdir()
    state.parent.mkdir()
    scenario.prepare(before)
    before.rename(state)  # what happened before has another name in strace's log
    power = Power(state, really_sync=True)
    power.install()
    scenario.run(state)
    file.write_text(json.dumps([[call.name, call.path] for call in power.calls]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scenario", action="append")
    parser.add_argument("--fault", action="append", type=Fault)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--trace", type=Path)
    given = parser.parse_args()
    logging.disable()
    folder = given.folder.resolve()
    if given.trace:
        _traced(folder, given.trace)
        return
    names = given.scenario or ["update", "first", "plain", "repair", "shared", "import"]
    print(json.dumps(_all_points(folder, names, given.fault or list(Fault), given.workers)))


if __name__ == "__main__":
    main()
