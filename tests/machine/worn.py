"""A worn device, step by step: a disk that is slow, full or read-only, little memory, a clock that is years off.

Each step makes the device bad, sees that the agent starts and answers, or says why it does not, mends it, and sees that
it answers again. Each gives the line that is printed, or raises MachineError.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from tests.machine.console import MachineError
from tests.machine.device import NAME, PAYLOAD, QUESTIONS, Slot, settings
from tests.machine.life import expect
from tests.machine.machine import Hardware, Machine
from tests.machine.models import reference
from tests.machine.outside import Outside
from tests.machine.place import Place
from tests.machine.served import ServedDisk
from tests.support.client import connected
from tests.support.mosquitto import running_broker

SLOW_BYTES_PER_S = 2_000_000
CARD_LATENCY_S = 0.05
LITTLE_MB = 512
_HOG_MB = LITTLE_MB + 200
_STORM_MB = 200
"""In swap, before a storm is one."""
_ANSWER_S = 900.0
_READY_S = 1800.0


class Worn:
    """The steps, in their order."""

    def __init__(self, place: Place, hardware: Hardware) -> None:
        self._place = place
        self._hardware = hardware
        self._stack = ExitStack()
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="ea-")))
        broker = self._stack.enter_context(running_broker(self._folder, persistence=True))
        self._outside = Outside(self._stack.enter_context(connected(broker, device=NAME)))
        self._settings = settings(broker.port)
        self._right = str(reference(QUESTIONS[:1])[0]["text"])
        self._slot = Slot()

    def steps(self) -> list[tuple[str, Callable[[], str]]]:
        return [
            ("a sound device", self.sound),
            ("/tmp full", self.full_tmp),
            ("disk 99 % full", self.full_disk),
            ("clock at 1970, then corrected", self.wrong_clock),
            ("root file system read-only", self.read_only),
            (f"memory of {LITTLE_MB} MB", self.little_memory),
            (f"memory of {LITTLE_MB} MB, swap storm", self.swap_storm),
            (f"disk with {SLOW_BYTES_PER_S // 1_000_000} MB/s", self.slow_disk),
            (f"disk that takes {CARD_LATENCY_S * 1000:.0f} ms for each write", self.slow_card),
        ]

    def close(self) -> None:
        self._slot.close()
        self._stack.close()

    def trouble(self) -> str:
        try:
            return self._slot.device.journal(60)
        except MachineError as error:
            return str(error)

    # --- Steps that share a boot --------------------------------------------------------------------------

    def sound(self) -> str:
        self._place.copy(self._place.installed)
        self._start(self._hardware, f"file={self._place.disk},cache=unsafe")
        return self._answers()

    def full_tmp(self) -> str:
        device = self._slot.device
        device.run("mount -t tmpfs -o size=64k tmpfs /tmp && dd if=/dev/zero of=/tmp/filler; true")
        try:
            self._restart()
            said = self._answers()
        finally:
            device.run("umount -l /tmp")
        self._restart()
        return f"{said}; mended: {self._answers()}"

    def full_disk(self) -> str:
        device = self._slot.device
        free = int(device.run("df --output=avail -B1 / | tail -n 1").text)
        size = int(device.run("df --output=size -B1 / | tail -n 1").text)
        device.run(f"fallocate -l {free - size // 100} /var/filler")
        try:
            self._restart()
            said = self._answers()
            device.run("dd if=/dev/zero of=/var/filler2 bs=64k; true", timeout_s=900)
            kept = self._outcome()
            refused = device.run(f"edge-agent models import {PAYLOAD}/second.model 2>&1", check=False)
            expect(refused.code == 1 and "space" in refused.text, refused.text)
        finally:
            device.run("rm -f /var/filler /var/filler2")
        device.wait(lambda: self._outcome() == self._right, _ANSWER_S, "an answer with space again")
        device.run(f"edge-agent models import {PAYLOAD}/second.model", timeout_s=900)
        device.run("edge-agent models rollback assistant", timeout_s=900)
        return f"99 %: {said}; 100 %: {kept}; import: {_last(refused.text)}; with space again both work"

    def wrong_clock(self) -> str:
        """systemd does not boot with a clock before its own release, so the clock is put back afterwards."""
        device = self._slot.device
        device.run("date -s @86400")
        self._restart()
        said = self._answers()
        sent = self._outside.send(QUESTIONS[0])
        device.run("date -s '2031-05-06 07:08:09'")
        text = self._outside.answer(sent)
        expect(text == self._right, text)
        self._answers()
        self._restart()
        return f"in 1970: {said}; in 2031, before and after a restart: {self._answers()}"

    def read_only(self) -> str:
        """As `errors=remount-ro` leaves it, below an agent that runs; then at its start."""
        device = self._slot.device
        device.run("sync; echo u > /proc/sysrq-trigger")
        device.wait(
            lambda: " ro," in device.run("grep ' / ext4 ' /proc/mounts").text,
            60,
            "a file system to read only",
        )
        outcome = self._outcome()
        said = self._outside.status().get("troubles", [])
        device.run("systemctl restart edge-agent", check=False, timeout_s=900)
        restarted = f"{device.unit('ActiveState')}, {_last(device.journal(5))}"
        device.run("mount -o remount,rw /")
        self._restart()
        return (
            f"running: {outcome}, {[each['code'] for each in said]}; restarted: {restarted}; "
            f"to write again: {self._answers()}"
        )

    # --- Steps with a machine of their own ----------------------------------------------------------------

    def little_memory(self) -> str:
        self._place.copy(self._place.installed)
        hardware = dataclasses.replace(self._hardware, memory_mb=LITTLE_MB)
        self._start(hardware, f"file={self._place.disk},cache=unsafe")
        said = self._answers()
        return f"{said}; {self._memory()}"

    def swap_storm(self) -> str:
        device = self._slot.device
        device.run("fallocate -l 1G /var/swap && chmod 600 /var/swap && mkswap /var/swap && swapon /var/swap")
        # Each round writes to every page of more memory than there is.
        hog = f"b = bytearray({_HOG_MB} << 20)\nwhile True:\n for at in range(0, len(b), 4096): b[at] ^= 1"
        device.run(f"setsid python3 -c '{hog}' >/dev/null 2>&1 </dev/null & echo $! >/run/hog")
        device.wait(lambda: self._swapped_mb() >= _STORM_MB, _ANSWER_S, "a storm", self._memory)
        before = self._swapped_mb(ever=True)
        outcome = self._outcome()
        moved = self._swapped_mb(ever=True) - before
        expect(moved > 0, "nothing was swapped")
        expect(device.run("kill -0 $(cat /run/hog)", check=False).code == 0, "the storm ended by itself")
        device.run("kill -9 $(cat /run/hog)", timeout_s=900)
        return (
            f"in it, with {moved} MB written to swap and read from it meanwhile: {outcome}; "
            f"afterwards: {self._answers()}"
        )

    def slow_disk(self) -> str:
        with self._served("--rate", str(SLOW_BYTES_PER_S)):
            return self._answers()

    def slow_card(self) -> str:
        with self._served("--latency", str(CARD_LATENCY_S)):
            return self._answers()

    # --- Shared -----------------------------------------------------------------------------------------

    def _start(self, hardware: Hardware, drive: str) -> None:
        stick = f"file={self._place.payload()},readonly=on"
        self._outside.forget()
        self._slot.start(Machine(hardware, self._place.image, drive, self._place.work, more=[stick]))
        if self._slot.device.configure(self._settings):
            self._restart()

    @contextlib.contextmanager
    def _served(self, *arguments: str) -> Iterator[None]:
        """A machine on a disk of that kind."""
        self._place.copy(self._place.installed)
        disk = ServedDisk(self._place.disk, self._folder / "disk", self._folder / "disk.log", arguments)
        try:
            self._start(self._hardware, disk.drive)
            yield
        finally:
            self._slot.close()
            disk.cut()

    def _restart(self) -> None:
        self._outside.forget()
        self._slot.device.run("systemctl restart edge-agent", check=False, timeout_s=1800)

    def _answers(self) -> str:
        """A client outside gets the right answer."""
        device = self._slot.device
        status = self._outside.wait_ready(_READY_S, seen=device.journal)
        said = self._outcome()
        expect(said == self._right, said)
        codes = [each["code"] for each in status.get("troubles", [])]
        return f"{status['state']}, answers{f', says {codes}' if codes else ''}"

    def _outcome(self) -> str:
        """The answer's text, or the reason for none."""
        (said,) = self._outside.ask(QUESTIONS[:1])
        return said

    def _swapped_mb(self, *, ever: bool = False) -> int:
        """What is in swap; or what was written to it and read from it since the boot."""
        if ever:
            pages = self._slot.device.run(
                "grep -E '^pswp(in|out) ' /proc/vmstat", timeout_s=_ANSWER_S
            ).text.split()
            return sum(map(int, pages[1::2])) * 4096 >> 20
        said = self._slot.device.run(
            "grep -E '^Swap(Total|Free)' /proc/meminfo", timeout_s=_ANSWER_S
        ).text.split()
        return (int(said[1]) - int(said[4])) >> 10

    def _memory(self) -> str:
        said = self._slot.device.run("grep -E '^(MemAvailable|SwapFree)' /proc/meminfo").text
        return ", ".join(" ".join(line.split()) for line in said.splitlines())


def _last(text: str) -> str:
    lines: Sequence[str] = text.strip().splitlines() or [""]
    return lines[-1].strip()
