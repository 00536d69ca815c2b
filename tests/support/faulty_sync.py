"""Cuts the power at every point of a scenario, starts again, and looks at what is left.

    python -m tests.support.faulty_sync FOLDER [--scenario NAME …] [--fault FAULT …] [--kill-every N]
    python -m tests.support.faulty_sync FOLDER --trace FILE

The first form prints one JSON object: for each scenario its points, for each fault how many were tried, how many
different folders they left, and what went wrong. One run of the scenario goes past all points; at each one the
folder is copied as the fault would leave it there, looked at, started from, and looked at again. What equals the
folder of an earlier point is not started from twice; that it has what was reported done by then, and after the
last point, too, is looked at all the same. What was started again after a kill has its power cut at its end: then
it must have what it reported, though it found half of it done. At every Nth point a process is really killed,
too: it must leave the folder that was copied there. A full disk is a run of its own for each point.

The second form runs `update` once, with a real registry, undisturbed; for strace. The calls as `Power` numbers
them are written to FILE.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import hashlib
import json
import logging
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edge_agent.cache import fsck, marks, record
from edge_agent.cache.store import Store
from edge_agent.errors import EdgeAgentError, StoreError
from edge_agent.sync import fetch, pace, registry
from tests.support.power import Fault, Medium, Power, Torn
from tests.support.power_scenarios import CHUNK_BYTES, NAME, Reported, Scenario, Scenarios
from tests.support.state_folder import copy_state, mark

SCENARIOS = ("update", "first", "plain", "repair", "shared", "import")
_RUN_LIMIT_S = 60
_PR_SET_PDEATHSIG = 1
_NOT_FIRED, _BROKEN = 4, 5


class Wrong(Exception):
    """Something that must not be, after a cut or after the start that follows it."""


@dataclass
class Findings:
    """Of one fault in one scenario.

    Attributes:
        expected: points where it can happen.
        tried: points where it did.
        states: different folders that it left.
    """

    expected: int = 0
    tried: int = 0
    states: int = 0
    wrong: list[str] = field(default_factory=list)


class Trial:
    """One scenario with its state before, and what an undisturbed run makes of it."""

    def __init__(self, scenario: Scenario, folder: Path) -> None:
        self.scenario = scenario
        self._folder = folder
        self._base = folder / "before"
        self._base.mkdir()
        scenario.prepare(self._base)
        self._before = _contents(self._base)
        self._promised = _promised(self._base)
        state = folder / "undisturbed"
        self.calls = self._run(state, copy=True).calls
        self._promised |= _promised(state)
        self._after = _contents(state)
        self._active = Store(state).state().model(NAME).active
        self._active_before = Store(self._base).state().model(NAME).active
        self._damaged_before = {damage.key for damage in fsck.verify(Store(self._base)).damaged}
        _check_verified(Store(state))

    def try_all(self, faults: list[Fault], *, kill_every: int) -> dict[Fault, Findings]:
        """Each fault at each point where it can happen."""
        found = {fault: Findings() for fault in faults}
        for fault, findings in found.items():
            findings.expected = sum(fault is not Fault.TEAR or call.name == "write" for call in self.calls)
        self._cut_everywhere(
            {fault: one for fault, one in found.items() if fault is not Fault.FULL}, kill_every
        )
        if Fault.FULL in found:
            for at in range(len(self.calls)):
                found[Fault.FULL].states += 1
                self._noting(found[Fault.FULL], Fault.FULL, at, lambda at=at: self._fill_disk(at))  # type: ignore[misc]
        return found

    # --- A cut: one run past all points ------------------------------------------------------------------

    def _cut_everywhere(self, found: dict[Fault, Findings], kill_every: int) -> None:
        state, left, seen = self._folder / "running", self._folder / "left", set[str]()
        reported, kept = Reported(), set[tuple[str, str]]()
        copy_state(self._base, state)
        medium = Medium(state)
        power = Power(state, medium=medium, watch=lambda at, call, torn: watch(at, torn))

        def watch(at: int, torn: Torn | None) -> None:
            for fault, findings in found.items():
                if fault is Fault.TEAR and torn is None:
                    continue
                shutil.rmtree(left, ignore_errors=True)
                self._leave(left, state, medium, fault, at, torn)
                if fault is Fault.KILL and kill_every and at % kill_every == 0:
                    self._noting(findings, fault, at, lambda: self._compare_with_killed(at, left), count=0)
                state_mark = mark(left)
                if (state_mark, repr(reported)) not in kept:
                    kept.add((state_mark, repr(reported)))
                    self._noting(findings, fault, at, lambda: self._check_reported(left, reported), count=0)
                if state_mark in seen:
                    findings.tried += 1
                    continue
                seen.add(state_mark)
                findings.states += 1
                goes_on = closing(medium.carried_to(left)) if fault is Fault.KILL else nullcontext()
                with goes_on as carried:
                    self._noting(findings, fault, at, functools.partial(self._start_again, left, carried))

        with power.installed():
            self.scenario.run(state, reported)
        for fault in found.keys() & {Fault.DROP}:
            shutil.rmtree(left)
            medium.write(left)
            self._noting(found[fault], fault, -1, lambda: self._check_end(left, reported), count=0)
        medium.close()
        if power.calls != self.calls:
            raise Wrong("a second run of the scenario makes other calls")

    def _leave(
        self, left: Path, state: Path, medium: Medium, fault: Fault, at: int, torn: Torn | None
    ) -> None:
        """Makes the folder that the fault leaves at this point."""
        if fault in (Fault.DROP, Fault.MIX):
            medium.write(left, seed=at if fault is Fault.MIX else None)
            return
        copy_state(state, left)
        if torn and fault is Fault.TEAR:
            with (left / self.calls[at].path).open("r+b") as file:
                file.seek(torn.offset)
                file.write(torn.data)

    def _compare_with_killed(self, at: int, left: Path) -> None:
        """The same point, with a process that dies there."""
        state = self._folder / "killed"

        def run() -> int:
            self._run(state, at=at, fault=Fault.KILL)
            return _NOT_FIRED

        copy_state(self._base, state)
        status = _forked(run)
        if status != -signal.SIGKILL:
            raise Wrong(f"the point did not fire: status {status}")
        self._check_same(_contents(state), _contents(left), "as a killed process leaves it")

    def _start_again(self, left: Path, medium: Medium | None = None) -> None:
        """Checks, starts, checks; with a medium, also what that holds at the end."""
        self._check_after_cut(left)
        reported = Reported()
        self._run(left, medium=medium, reported=reported)
        self._check_after_start(left)
        if medium:
            cut = self._folder / "cut"
            shutil.rmtree(cut, ignore_errors=True)
            medium.write(cut)
            self._check_end(cut, reported)

    # --- A full disk -------------------------------------------------------------------------------------

    def _fill_disk(self, at: int) -> None:
        state = self._folder / "full"
        copy_state(self._base, state)
        power = Power(state, at=at, fault=Fault.FULL)
        try:
            with power.installed():
                self.scenario.run(state, Reported())
        except StoreError:
            pass
        if len(power.calls) <= at:
            raise Wrong("the point did not fire")
        if _staged_bytes(state) > _staged_bytes(self._base):
            raise Wrong("a full disk was not freed")
        self._start_again(state)

    # --- Both --------------------------------------------------------------------------------------------

    def _run(
        self,
        state: Path,
        *,
        copy: bool = False,
        at: int = -1,
        fault: Fault | None = None,
        medium: Medium | None = None,
        reported: Reported | None = None,
    ) -> Power:
        if copy:
            copy_state(self._base, state)
        power = Power(state, at=at, fault=fault, medium=medium)
        with power.installed():
            self.scenario.run(state, reported or Reported())
        return power

    def _noting(
        self, findings: Findings, fault: Fault, at: int, check: Callable[[], None], *, count: int = 1
    ) -> None:
        findings.tried += count
        try:
            check()
        except (Wrong, EdgeAgentError, OSError) as error:
            where = f"at {at} ({self.calls[at]})" if at >= 0 else "after the last call"
            findings.wrong.append(f"{self.scenario.name} {fault} {where}: {error}")

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
        _marks(store)
        active = _active(store, state)
        if active not in (self._active_before, self._active):
            raise Wrong(f"version {active} is active")
        if active and active not in keys:
            raise Wrong(f"version {active} is active and not committed")

    def _check_reported(self, state: Path, reported: Reported) -> None:
        """What was said before the cut is so after it, with no start in between that could make up for it."""
        store = Store(state)
        records = {record.key: record for record in store.versions(NAME)}
        for key in reported.committed:
            if key not in records:
                raise Wrong(f"version {key} was reported committed, and its record is not there")
            if damaged := fsck.verify(store, [records[key]]).damaged:
                raise Wrong(f"version {key} was reported committed, and is damaged: {damaged[0]}")
        active = _active(store, state)
        if reported.active not in (None, active):
            raise Wrong(f"version {reported.active} was reported active, and {active} is")
        if reported.mark > max((mark.version for mark in _marks(store)), default=0):
            raise Wrong(f"the mark of version {reported.mark} was lost")

    def _check_end(self, state: Path, reported: Reported) -> None:
        """The power is cut when all is done: that is the state to stay in."""
        self._check_reported(state, reported)
        if reported.active != self._active:
            raise Wrong(f"the scenario reported version {reported.active} active")
        _check_verified(Store(state))

    def _check_after_start(self, state: Path) -> None:
        """All is as if nothing had happened."""
        store = Store(state)
        _check_verified(store)
        if store.state().model(NAME).active != self._active:
            raise Wrong(f"version {store.state().model(NAME).active} is active after the start")
        self._check_same(_contents(state), self._after, "after the start")

    def _check_same(self, found: dict[str, str], wanted: dict[str, str], when: str) -> None:
        for path in sorted(found.keys() | wanted.keys()):
            if _has_times(path) and path in found and path in wanted:
                continue
            if found.get(path) != wanted.get(path):
                what = "is missing" if path not in found else "differs" if path in wanted else "is left"
                raise Wrong(f"{path} {what} {when}")


def _active(store: Store, state: Path) -> str | None:
    """What `state.json` says; a damaged one is set aside, and those are no calls of the run that was cut."""
    with Power(state).installed():
        current = store.state()
    if current.rebuilt:
        raise Wrong(f"state.json was lost: {current.rebuilt}")
    return current.model(NAME).active


def _marks(store: Store) -> tuple[marks.Mark, ...]:
    """What `marks.json` says: it is there whole, or not at all."""
    try:
        return marks.parse(store.marks_file.read_bytes())
    except FileNotFoundError:
        return ()


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


def _has_times(path: str) -> bool:
    """A record or a state: two runs at different times write different ones."""
    return path.removesuffix(".tmp").endswith(".json")


def _forked(action: Callable[[], int]) -> int:
    """Runs it in a child; gives its exit status, negative for a signal."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = _BROKEN
        try:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            signal.alarm(_RUN_LIMIT_S)
            status = action()
        except BaseException:  # noqa: BLE001 - the child's top
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _steady() -> None:
    """The same calls in each run; and a record that was read is not read again: reading it is pure."""
    logging.disable()
    fetch._NOTE_INTERVAL_S = 0.0  # a note after each chunk
    for module in (pace, registry, fetch):
        vars(module)["CHUNK_BYTES"] = CHUNK_BYTES
    vars(record)["parse"] = functools.lru_cache(64)(record.parse)


def _try_scenario(folder: Path, name: str, faults: list[Fault], kill_every: int) -> dict[str, Any]:
    _steady()
    place = folder / name
    place.mkdir()
    scenario = next(scenario for scenario in Scenarios(place).all() if scenario.name == name)
    trial = Trial(scenario, place)
    found = trial.try_all(faults, kill_every=kill_every)
    return {
        "points": len(trial.calls),
        "faults": {fault: asdict(findings) for fault, findings in found.items()},
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
    with power.installed():
        scenario.run(state, Reported())
    file.write_text(json.dumps([[call.name, call.path] for call in power.calls]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scenario", action="append")
    parser.add_argument("--fault", action="append", type=Fault)
    parser.add_argument("--kill-every", type=int, default=1)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--trace", type=Path)
    given = parser.parse_args()
    folder = given.folder.resolve()
    folder.mkdir(exist_ok=True)
    if given.trace:
        logging.disable()
        _traced(folder, given.trace)
        return
    names, faults = given.scenario or SCENARIOS, given.fault or list(Fault)
    with ProcessPoolExecutor(given.workers) as pool:
        tasks = {name: pool.submit(_try_scenario, folder, name, faults, given.kill_every) for name in names}
        print(json.dumps({name: task.result() for name, task in tasks.items()}))


if __name__ == "__main__":
    main()
