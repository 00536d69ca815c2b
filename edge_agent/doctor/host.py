"""The host: processor, clock, libraries, DNS.

Source: proc(5) /proc/cpuinfo; adjtimex(2); onnxruntime's int4 kernels (MLAS) for the processor's features.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import ipaddress
import os
import platform
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

from edge_agent.doctor.finding import Finding, fail, ok, unfinished, warn
from edge_agent.package.needs import TRANSFORMERS
from edge_agent.runner import capability
from edge_agent.runner.process import child_environment
from edge_agent.settings import Settings

_LIBRARY_TIMEOUT_S = 60.0
_NAME_TIMEOUT_S = 5.0
_RELEASED_S = 1_767_225_600.0  # 2026-01-01: this program did not exist before, so an earlier clock is wrong
_TIME_ERROR = 5
_TIMEX_BYTES = 512  # struct timex has 208 on 64 bit; nothing in it is read
_FEATURES = {
    "x86_64": (("avx2",), ("avx512_vnni", "avx_vnni", "avx512f")),
    "aarch64": (("asimddp",), ("i8mm", "bf16")),
}
"""The instructions that int4 kernels need to be fast, and those that make them faster."""


def check_processor() -> Iterator[Finding]:
    machine = platform.machine()
    if machine not in _FEATURES:
        yield fail("host.cpu", f"processor {machine}", "the libraries are built for x86_64 and aarch64 only")
        return
    flags = _cpu_flags()
    needed, better = _FEATURES[machine]
    found = [flag for flag in (*needed, *better) if flag in flags]
    if missing := [flag for flag in needed if flag not in flags]:
        yield warn(
            "host.cpu",
            f"{machine} without {', '.join(missing)}: int4 models run slowly",
            "use a smaller model, or a device with these instructions",
        )
    else:
        yield ok(
            "host.cpu", f"{machine}, {len(os.sched_getaffinity(0))} CPUs for this process, {' '.join(found)}"
        )


def check_clock() -> Iterator[Finding]:
    now_s = time.time()
    shown = datetime.fromtimestamp(now_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    if now_s < _RELEASED_S:
        yield fail("host.clock", f"the clock says {shown}", "set it: certificates and deadlines depend on it")
    elif not _clock_synchronised():
        yield warn("host.clock", f"{shown}, not synchronised", "install systemd-timesyncd or chrony")
    else:
        yield ok("host.clock", f"{shown}, synchronised")


def check_libraries(settings: Settings) -> Iterator[Finding]:
    """Loads a runner's libraries in a process with a runner's environment, behind a runner's walls."""
    program = (
        "from edge_agent.host.confinement import Confinement, confine; confine(Confinement()); "
        "import onnxruntime_genai, mlflow.pyfunc"
    )
    try:
        result = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_LIBRARY_TIMEOUT_S,
            check=False,
            cwd="/",
            env={**child_environment(settings.state_dir), "PYTHONDONTWRITEBYTECODE": "1"},
        )
    except subprocess.TimeoutExpired:
        yield unfinished("host.libraries", _LIBRARY_TIMEOUT_S)
    else:
        yield _loaded(result)
    yield from _extras(settings)


def _loaded(result: subprocess.CompletedProcess[str]) -> Finding:
    if result.returncode == 0:
        names = ("onnxruntime-genai", "mlflow-skinny", "paho-mqtt")
        return ok("host.libraries", ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names))
    problem = (result.stderr.strip().splitlines() or ["no message"])[-1]
    line = f"the inference libraries do not load: {problem[:300]}"
    transformers = next(flavor for flavor in capability.flavors() if flavor.library == TRANSFORMERS)
    if transformers.problem:
        return fail("host.libraries", line, "install the agent again")
    has = f"transformers {transformers.version} is installed, so models of that flavor run"
    return warn("host.libraries", f"{line}; {has}", "install onnxruntime-genai for ONNX models")


def _extras(settings: Settings) -> Iterator[Finding]:
    """What the settings need and is not installed."""
    wanted = []
    if settings.trust.public_keys:
        wanted.append(("model_signing", "trust.public_keys", "signing"))
    if settings.registry.uri.startswith("sqlite:"):
        wanted.append(("sqlalchemy", "a sqlite:/// registry", "local-registry"))
    for module, reason, extra in wanted:
        if importlib.util.find_spec(module) is None:
            yield fail(
                "host.libraries",
                f"{reason} needs {module}, which is not installed",
                f"install edge-agent[{extra}]",
            )


def check_names(settings: Settings) -> Iterator[Finding]:
    """Looks up each name in the settings once; an address needs no name server."""
    keys: dict[str, list[str]] = {settings.mqtt.host: ["mqtt.host"]}
    if settings.registry.uri.startswith(("http://", "https://")):
        keys.setdefault(urlsplit(settings.registry.uri).hostname or "", []).append("registry.uri")
    names = {name: of for name, of in keys.items() if not _is_address(name)}
    if not names:
        yield ok("host.dns", "not needed: the settings have addresses only")
    for name, of in names.items():
        address = _resolve(name)
        if address:
            yield ok("host.dns", f"{name} is {address}")
        else:
            yield fail(
                "host.dns",
                f"{name} ({', '.join(of)}) has no address",
                "check the name, /etc/resolv.conf and the network",
            )


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _cpu_flags() -> set[str]:
    lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
    return {
        flag
        for line in lines
        if line.startswith(("flags", "Features"))
        for flag in line.partition(":")[2].split()
    }


def _clock_synchronised() -> bool:
    """Whether the kernel calls the clock synchronised; true if it cannot be asked."""
    try:
        state: int = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES))
    except (OSError, AttributeError):
        return True
    return state != _TIME_ERROR


def _resolve(name: str) -> str:
    """The first address, or empty. A dead name server blocks for long, so a thread of its own waits for it."""
    found: list[str] = []

    def ask() -> None:
        try:
            found.append(str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0]))
        except OSError:
            return

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_NAME_TIMEOUT_S)
    return found[0] if found else ""
