"""What figures were measured on, as a phrase: the CPU, what of it such libraries use, and how busy it was."""

from __future__ import annotations

import os
from pathlib import Path

_INSTRUCTIONS = {
    "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX VNNI",
    "avx2": "AVX2",
    "asimddp": "dot product",
}
"""Flag in /proc/cpuinfo → its name; the first that is there is told."""


def described(cpuinfo: str | None = None) -> str:
    """Such as `AMD EPYC (AVX-512 VNNI), 2 CPUs, load average 0.1 when it began`.

    Args:
        cpuinfo: the content of /proc/cpuinfo; None reads it.
    """
    text = Path("/proc/cpuinfo").read_text() if cpuinfo is None else cpuinfo
    fields = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())
    }
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    known = next((name for flag, name in _INSTRUCTIONS.items() if flag in flags), "")
    count = len(os.sched_getaffinity(0))
    return (
        fields.get("model name", "unnamed CPU")
        + (f" ({known})" if known else "")
        + f", {count} CPU{'s' if count > 1 else ''}, load average {os.getloadavg()[0]:.1f} when it began"
    )
