"""The steps of a device's life in an emulated machine. Each gives the line that is printed, or raises MachineError."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.machine import tokens
from tests.machine.agreement import agreement
from tests.machine.console import MachineError
from tests.machine.device import CURRENT, NAME, PAYLOAD, QUESTIONS, STATE, Device, Slot, settings
from tests.machine.instructions import kernels
from tests.machine.machine import Hardware, Machine
from tests.machine.models import reference
from tests.machine.outside import Outside
from tests.machine.place import Place
from tests.support.client import connected
from tests.support.mosquitto import running_broker

FEATURES = ("asimddp", "i8mm", "bf16", "sve", "avx", "avx2", "fma", "avx512f", "avx_vnni")
PLAIN = {"aarch64": "cortex-a72", "x86_64": "Nehalem"}
"""A CPU without the instructions that the fast kernels need: a Raspberry Pi 4's, and one without AVX."""


class Life:
    """The steps, in their order.

    Args:
        hardware: of the machine; other CPUs are tried by themselves.
    """

    def __init__(self, place: Place, hardware: Hardware) -> None:
        self._place = place
        self._hardware = hardware
        self._stack = ExitStack()
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="ea-")))
        self._broker = self._stack.enter_context(running_broker(folder, persistence=True))
        self._outside = Outside(self._stack.enter_context(connected(self._broker, device=NAME)))
        self._slot = Slot()
        self._expected = reference(QUESTIONS)

    def installation(self) -> list[tuple[str, Callable[[], str]]]:
        """What comes first, once for the same bundles."""
        return [
            ("packages", self.configure),
            ("boot", self.boot),
            ("install without a network", self.install),
            ("settings, broker", self.connect),
            ("import of the model", self.import_model),
            ("doctor", self.doctor),
            ("kept for later runs", self.keep),
        ]

    def steps(self) -> list[tuple[str, Callable[[], str]]]:
        """What follows on a device that is installed."""
        plain = PLAIN[self._hardware.arch]
        return [
            (f"answers from outside, -cpu {plain}", lambda: self.answer_on(plain)),
            ("boot again", self.boot_installed),
            (f"answers from outside, -cpu {self._hardware.cpu}", self.answer),
            ("upgrade while prompts run", self.upgrade),
            ("going back", self.go_back),
            ("reboot", self.reboot),
            ("uninstall", self.uninstall),
        ]

    def close(self) -> None:
        self._slot.close()
        self._stack.close()

    def trouble(self) -> str:
        """What the machine said last."""
        try:
            said = f"--- kernel\n{self._slot.machine.kernel_log[-2000:]}"
            return f"{said}\n--- journal\n{self._slot.device.journal(60)}"
        except MachineError as error:
            return str(error)

    # --- Installation -----------------------------------------------------------------------------------

    def configure(self) -> str:
        self._place.configure(self._hardware)
        return "as debootstrap left them, or by the machine itself"

    def boot(self) -> str:
        self._place.copy(self._place.image.disk)
        device = self._start(self._hardware)
        return system(device)

    def install(self) -> str:
        device = self._slot.device
        device.network("down")
        device.unpack_payload()
        ensurepip = device.run("python3 -c 'import ensurepip'", check=False).code == 0
        steps = device.install(self._place.bundle)
        enabled = device.run("systemctl is-enabled edge-agent").text.strip()
        expect(enabled == "enabled" and device.unit("ActiveState") == "active", enabled)
        version = device.run("edge-agent --version").text.strip()
        device.network("up")
        python = device.run("python3 --version").text.strip()
        return (
            f"{version} on {python}, ensurepip here: {ensurepip}; unit enabled and active: {'; '.join(steps)}"
        )

    def connect(self) -> str:
        device = self._slot.device
        device.configure(settings(self._broker.port))
        device.run("systemctl restart edge-agent", timeout_s=600)
        device.wait(lambda: bool(self._outside.status()), 600, "a status", device.journal)
        return "connected to a broker outside of the machine"

    def import_model(self) -> str:
        said = self._slot.device.run(
            f"edge-agent models import {PAYLOAD}/sample.model", timeout_s=600
        ).text.strip()
        self._wait_ready()
        return said.splitlines()[-1]

    def doctor(self) -> str:
        findings = self._slot.device.doctor()
        warnings = [f"{each['check']}: {each['message']}" for each in findings if each["level"] == "warn"]
        return f"{sum(each['level'] == 'ok' for each in findings)} ok, none failed; to look at: {warnings}"

    def keep(self) -> str:
        self._slot.switch_off()
        self._place.keep_installed()
        return f"{self._place.installed.name}"

    # --- Answers ----------------------------------------------------------------------------------------

    def boot_installed(self) -> str:
        self._place.copy(self._place.installed)
        return system(self._start(self._hardware))

    def answer_on(self, cpu: str) -> str:
        self._place.copy(self._place.installed)
        self._start(dataclasses.replace(self._hardware, cpu=cpu))
        said = self.answer()
        self._slot.close()
        return said

    def answer(self) -> str:
        """The same tokens as on this host, by the library alone and by the agent; what of the CPU they took."""
        device = self._slot.device
        device.run("systemctl stop edge-agent", timeout_s=600)
        # The disk is an earlier run's, whose broker had another port.
        device.configure(settings(self._broker.port))
        device.write("/root/tokens.py", Path(tokens.__file__).read_text())
        found, instructions = self._translated()
        agreed = agreement(found, self._expected)
        device.run("systemctl start edge-agent", timeout_s=900)
        self._wait_ready()
        answers = self._outside.ask()
        expect(answers == [each["text"] for each in self._expected], f"over MQTT: {answers}")
        return (
            f"{len(answers)} answers over MQTT; beside {os.uname().machine}, {agreed}; "
            f"CPU has {' '.join(self._features()) or 'none of the fast ones'}; "
            f"instructions of the kernels taken: {instructions}"
        )

    def _features(self) -> list[str]:
        """As the kernel says it, which is where onnxruntime looks on aarch64."""
        words = set(self._slot.device.run("grep -m 1 -E '^(Features|flags)' /proc/cpuinfo").text.split())
        return [name for name in FEATURES if name in words]

    def _translated(self) -> tuple[list[dict[str, Any]], dict[str, int]]:
        """What the library alone answers, and which instructions of kernels it ran.

        qemu writes code down when it translates it, once for each page of memory: without the pages that hold the
        library by now, all of it is translated again. No daemon runs meanwhile, which would hold them.
        """
        machine = self._slot.machine
        command = (f"{CURRENT}/bin/python", "/root/tokens.py", f"{PAYLOAD}/sample_model", *QUESTIONS)
        machine.run("sync; echo 3 > /proc/sys/vm/drop_caches")
        machine.monitor("log in_asm")
        said = machine.run(*command, timeout_s=1800).text
        machine.monitor("log none")
        with machine.instructions.open(errors="replace") as lines:
            return json.loads(said.splitlines()[-1]), kernels(lines, machine.hardware.arch)

    # --- Versions ---------------------------------------------------------------------------------------

    def upgrade(self) -> str:
        device, before = self._slot.device, self._slot.device.current()
        sent = [self._outside.send(question) for question in QUESTIONS * 4]
        self._outside.forget()
        device.install(self._place.newer)
        self._wait_ready()
        sent += [self._outside.send(question) for question in QUESTIONS]
        answers = [self._outside.answer(each) for each in sent]
        expect(answers == [each["text"] for each in self._expected] * 5, str(answers))
        repeated = sum(len(self._outside.answers(each)) - 1 for each in sent)
        expect(repeated == 0, f"{repeated} answers came twice")
        expect(device.current() == self._place.version(self._place.newer), device.current())
        return f"{before} → {device.current()}; {len(answers)} prompts, each answered once"

    def go_back(self) -> str:
        device, before = self._slot.device, self._slot.device.current()
        self._outside.forget()
        device.use(self._place.version(self._place.bundle))
        self._wait_ready()
        self._expect_answers()
        return f"{before} → {device.current()}, answers again"

    def reboot(self) -> str:
        self._outside.forget()
        self._slot.machine.reboot()
        self._wait_ready()
        self._expect_answers()
        return f"{system(self._slot.device)}; service active by itself, answers"

    def uninstall(self) -> str:
        device = self._slot.device
        device.run(f"{CURRENT}/install.sh uninstall --purge", timeout_s=600)
        places = (
            f"{STATE}/journal.db",
            "/etc/edge-agent",
            "/opt/edge-agent",
            "/etc/systemd/system/edge-agent*",
        )
        left = device.run(f"ls -d {' '.join(places)} 2>/dev/null", check=False).text.split()
        user = device.run("id edge-agent", check=False).code == 0
        expect(not left and not user, f"left: {left}, user: {user}")
        self._slot.switch_off()
        return "with --purge nothing stays"

    # --- Shared -----------------------------------------------------------------------------------------

    def _wait_ready(self) -> None:
        self._outside.wait_ready(seen=lambda: self._slot.device.journal(60))

    def _start(self, hardware: Hardware) -> Device:
        disk = f"file={self._place.disk},cache=unsafe"
        stick = f"file={self._place.payload()},readonly=on"
        self._outside.forget()
        self._slot.start(Machine(hardware, self._place.image, disk, self._place.work, more=[stick]))
        return self._slot.device

    def _expect_answers(self) -> None:
        answers = self._outside.ask()
        expect(answers == [each["text"] for each in self._expected], str(answers))


def system(device: Device) -> str:
    state = device.run("systemctl is-system-running --wait", check=False, timeout_s=600).text.strip()
    kernel = device.run("uname -rm").text.strip()
    return f"{state}; Linux {kernel}; {device.run('systemctl --version').text.splitlines()[0]}"


def expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise MachineError(otherwise)
