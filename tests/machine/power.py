"""Power cuts: a machine whose disk forgets what was not flushed, cut off again and again.

    boot → everything as promised? → an activity, and prompts from outside → SIGKILL to machine and disk → boot …

The boot after a cut is the one in which the next activity begins, on the same disk, which stays in the work folder with
the number of cuts that it has lived through: the same seed goes on from there. Each cut writes a mark to a second disk
without a flush, and one with; a cut after which the first is still there, or the second is not, has not been a power
cut, and the run fails. The machine is a `Rig`: emulated, or a container.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tests.machine import inside, models
from tests.machine.console import MachineError
from tests.machine.device import CURRENT, NAME, PAYLOAD, QUESTIONS, STATE, Device, settings
from tests.machine.disk import BLOCK_BYTES
from tests.machine.outside import Outside, Prompts
from tests.machine.place import Place
from tests.machine.rig import ACTIVITY_OVER, Loss, Rig, was_cut
from tests.machine.schedule import Activity, Cut, Moment, Reported, Seen, cuts, damage
from tests.machine.table import HEADER, Row, summary
from tests.support.client import connected
from tests.support.mlflow_server import Server, running_mlflow_server
from tests.support.mosquitto import running_broker

_INSIDE = "/root/inside.py"
_SCRATCH_BYTES = 256 * BLOCK_BYTES
_POLL_S = 0.001
_PATIENCE = 8
"""An activity may take so many times as long as it should, on a host that has more to do."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is asked for.

    Attributes:
        count: cuts in this run; `seed` has them.
        lying: the disk says that it has flushed, and has not. Outside of every promise: only a start is asked for.
    """

    seed: int
    count: int
    lying: bool = False


@dataclass(frozen=True, kw_only=True)
class _Cost:
    """What a cut took.

    Attributes:
        prompts: those that the broker had taken since the boot; `waiting` of them had no answer.
        reported: what must have outlived it.
    """

    loss: Loss
    prompts: int
    waiting: int
    reported: Reported


class PowerCuts:
    """One run of cuts. One thread, and one that sends prompts.

    Args:
        report: takes each line of the table.
        right: the answers that the versions of the model have to the first question.
    """

    def __init__(
        self, place: Place, rig: Rig, options: Options, *, right: Sequence[str], report: Callable[[str], None]
    ) -> None:
        self._place = place
        self._rig = rig
        self._options = options
        self._right = right
        self._report = report
        self._rows: list[Row] = []
        self._stack = ExitStack()
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="ea-")))
        self._broker = self._stack.enter_context(running_broker(self._folder, persistence=True))
        self._outside = Outside(self._stack.enter_context(connected(self._broker, device=NAME)))
        self._registry: Server = self._stack.enter_context(running_mlflow_server(self._folder))
        self._settings = settings(
            self._broker.port, host=rig.host, registry=f"http://{rig.host}:{self._registry.port}"
        )
        self._prompts = Prompts(self._outside, pause_s=rig.pace.prompts_s, answer_s=rig.pace.answer_s)
        self._scratch = self._folder / "scratch.raw"
        self._progress = place.work / "progress.json"

    def run(self) -> int:
        """Gives 1 as soon as a cut has done harm, else 0."""
        first = self._begin()
        models.publish(self._registry)
        self._report(HEADER)
        last: tuple[Cut, _Cost] | None = None
        for cut in cuts(self._options.seed, first, self._options.count + 1, self._rig.pace):
            began_s = time.monotonic()
            device = self._boot(cut)
            booted_s = time.monotonic() - began_s
            if last is None or self._options.lying:
                self._set_up(device)  # a disk that lies may have lost it with the last cut
            if last is None:
                self._outside.wait_ready(self._rig.pace.ready_s, seen=device.journal)
            elif not self._verdict(device, *last, booted_s):
                return 1
            if cut.number == first + self._options.count:
                break
            last = cut, self._cut(device, cut)
        self._rig.switch_off()
        for line in summary(self._rows):
            self._report(line)
        return 0

    def close(self) -> None:
        self._prompts.stop()
        self._stack.close()

    # --- One cut ----------------------------------------------------------------------------------------

    def _begin(self) -> int:
        """The disk of this seed, as it is after the cuts that it has had; the number of the next one."""
        with contextlib.suppress(FileNotFoundError):
            progress = json.loads(self._progress.read_text())
            if progress["seed"] == self._options.seed and progress["bundles"] == self._place.installed.name:
                return int(progress["cuts"])
        self._place.copy(self._place.installed)
        self._note(0)
        return 0

    def _note(self, done: int) -> None:
        noted = {"seed": self._options.seed, "bundles": self._place.installed.name, "cuts": done}
        self._progress.write_text(json.dumps(noted))

    def _boot(self, cut: Cut) -> Device:
        self._scratch.write_bytes(bytes(_SCRATCH_BYTES))
        arguments = ["--seed", f"{self._options.seed} disk {cut.number}", "--early", str(cut.early)]
        arguments += ["--latency", str(cut.latency_s), *(["--lies"] if self._options.lying else [])]
        return self._rig.boot(self._scratch, arguments)

    def _cut(self, device: Device, cut: Cut) -> _Cost:
        """Lets the activity begin, and ends the power."""
        self._rig.mark()
        self._prompts.start()
        if_done = self._begin_activity(device, cut.activity)
        self._wait_for(cut)
        self._outside.forget()
        loss = self._rig.cut()
        self._prompts.stop()
        self._note(cut.number + 1)
        mark = self._scratch.read_bytes()
        if not was_cut(mark):
            raise MachineError(
                f"this was no power cut: the disk has {mark[:4]!r}, {mark[BLOCK_BYTES:][:4]!r}"
            )
        return _Cost(
            loss=loss,
            prompts=self._prompts.count,
            waiting=self._prompts.waiting,
            reported=if_done if loss.over == 0 else Reported(),
        )

    def _wait_for(self, cut: Cut) -> None:
        """The seed's moment. Where what it comes after does not happen for long, it is then."""
        longest_s = _PATIENCE * self._rig.pace.longest_s[cut.activity]
        pause, deadline_s = threading.Event(), time.monotonic() + longest_s
        if cut.moment is Moment.WRITTEN:
            self._rig.stall_after(cut.count)
        with self._broker.log.open() as log:
            log.seek(0, os.SEEK_END)
            happened = 0
            while not self._has_come(cut, happened) and time.monotonic() < deadline_s:
                pause.wait(_POLL_S)
                happened += sum(moment is cut.moment for moment in steps(log))
        # Not a condition: whatever is going on then is what is cut off.
        pause.wait(cut.delay_s)

    def _has_come(self, cut: Cut, happened: int) -> bool:
        if cut.moment is Moment.WRITTEN:
            return self._rig.stalled()
        if cut.moment is Moment.OVER:
            return self._rig.over() is not None
        return cut.moment is Moment.BEGUN or happened >= cut.count

    def _begin_activity(self, device: Device, activity: Activity) -> Reported:
        """Gives what it will have done when it has reported its end."""
        if activity is Activity.UPDATE:
            other = self._remove_other(device)
            models.move_alias(self._registry, other)
            _background(device, "edge-agent models pull")
            return Reported(model=other)
        if activity is Activity.IMPORT:
            other = self._remove_other(device)
            _background(device, f"edge-agent models import {PAYLOAD}/{models.file(other)}")
            return Reported(model=other)
        if activity is Activity.JOURNAL:
            journal = f"{STATE}/journal.db"
            device.run("systemctl stop edge-agent", timeout_s=600)
            device.run(f"python3 {_INSIDE} damage {journal}")
            device.run(f"chown edge-agent: {journal}*")
            _background(device, "systemctl start edge-agent")
        elif activity is Activity.UPGRADE:
            current = device.current()
            bundles = (self._place.bundle, self._place.newer)
            (bundle,) = [each for each in bundles if self._place.version(each) != current]
            version = self._place.version(bundle)
            device.run(f"rm -rf /opt/edge-agent/{version}*", timeout_s=600)
            _background(device, device.start_install(bundle))
            return Reported(program=version)
        return Reported()

    def _remove_other(self, device: Device) -> int:
        """So that there is something to fetch: the version that is not active."""
        other = 3 - int(self._outside.status()["models"][0]["version"])
        device.run(f"edge-agent models rm assistant {other}", check=False)
        return other

    # --- What it left -----------------------------------------------------------------------------------

    def _verdict(self, device: Device, cut: Cut, cost: _Cost, boot_s: float) -> bool:
        """Looks at the device that has booted after a cut, and prints a row."""
        began_s = time.monotonic()
        seen = self._look(device, cut)
        ready_s = boot_s + time.monotonic() - began_s
        found = damage(seen, self._right, cost.reported)
        wrong = found
        if self._options.lying:  # only that it starts
            wrong = [] if seen.state == "ready" else ["the agent has not started"]
        repeated = sum(len(each.answers) - 1 for each in seen.prompts if each.answers)
        row = Row(
            cut=cut,
            loss=cost.loss,
            prompts=cost.prompts,
            waiting=cost.waiting,
            repeated=repeated,
            ready_s=ready_s,
            found=found,
        )
        self._rows.append(row)
        self._report(str(row))
        if wrong:
            self._report(device.journal(200))
        return not wrong

    def _look(self, device: Device, cut: Cut) -> Seen:
        seen = Seen()
        mounts = device.run("grep ' / ext4 ' /proc/mounts").text.split()
        seen.mounted = mounts[3] if len(mounts) > 3 else ""
        seen.complaints = self._rig.complaints()
        try:
            ready = self._outside.wait_ready(self._rig.pace.ready_s, seen=device.journal)
        except MachineError as error:
            seen.state = str(error)
            return seen
        seen.state = str(ready["state"])
        seen.prompts = self._prompts.take()
        (seen.answer,) = self._outside.ask(QUESTIONS[:1])
        verified = device.run("edge-agent models verify 2>&1", check=False)
        seen.verified = (verified.code, verified.text)
        seen.models = device.versions()
        seen.current = device.current()
        seen.versions = device.run(f"{CURRENT}/install.sh list", check=False).text.split()
        if cut.activity is Activity.UPGRADE:
            folders = [f"/opt/edge-agent/{version}" for version in seen.versions]
            lines = [
                device.run(f"python3 {_INSIDE} records {folder}", timeout_s=900).text.splitlines()
                for folder in folders
            ]
            seen.damaged = [name for found in lines for name in found if name]
        return seen

    def _set_up(self, device: Device) -> None:
        """The broker and the registry of this run, where the disk is from another one."""
        if device.configure(self._settings):
            device.write(_INSIDE, Path(inside.__file__).read_text())
            device.run("systemctl restart edge-agent", check=False, timeout_s=600)


def steps(lines: Iterable[str]) -> Iterator[Moment]:
    """What the device does, by the log of the broker."""
    for line in lines:
        if f"Received PUBACK from edge-agent-{NAME} " in line:
            yield Moment.TAKEN
        elif f"Received PUBLISH from edge-agent-{NAME} " in line:
            yield Moment.SAID


def _background(device: Device, command: str) -> None:
    """Begins what the power's end will find going on."""
    line = f"{command}; echo $? >{ACTIVITY_OVER}.new; mv {ACTIVITY_OVER}.new {ACTIVITY_OVER}"
    device.run(
        f"rm -f {ACTIVITY_OVER}; setsid sh -c {shlex.quote(line)} >/root/activity.log 2>&1 </dev/null & true"
    )
