"""A process in a smaller world than the host's: no network, or little memory.

    python -m tests.support.namespaces offline COMMAND…
    python -m tests.support.namespaces join PID COMMAND…
    python -m tests.support.namespaces memory MEMINFO COMMAND…

Becomes COMMAND in a new network namespace with a loopback interface and nothing else; in that of another
process; or where `/proc/meminfo` is another file, as in a container with lxcfs. Needs root, or a kernel that lets
users make user namespaces (`unshare -rn true` shows it).
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import sys
from pathlib import Path

_CLONE_NEWNS, _CLONE_NEWUSER, _CLONE_NEWNET = 0x20000, 0x10000000, 0x40000000
_MS_BIND, _MS_REC, _MS_PRIVATE = 4096, 16384, 1 << 18
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1


def offline(command: list[str], *, beside: int | None = None) -> list[str]:
    """A command that runs another one without a network, or in the namespace of process `beside`."""
    how = ["offline"] if beside is None else ["join", str(beside)]
    return [sys.executable, __file__, *how, *command]


def little_memory(folder: Path, *, available_bytes: int) -> list[str]:
    """What comes before a command that is to see a host with so much memory."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    little = f"MemAvailable: {available_bytes // 1024} kB"
    meminfo = folder / "meminfo"
    meminfo.write_text(
        "\n".join(little if line.startswith("MemAvailable") else line for line in lines) + "\n"
    )
    return [sys.executable, __file__, "memory", str(meminfo)]


def _call(name: str, *arguments: int | bytes | None) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) != 0:
        error = os.strerror(ctypes.get_errno())
        sys.exit(f"{name}: no namespace can be had here ({error}): be root, or allow user namespaces")


def _enter_new(kind: int) -> None:
    user, group = os.geteuid(), os.getegid()
    if user == 0:
        _call("unshare", kind)
        return
    _call("unshare", _CLONE_NEWUSER | kind)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1")


def _join(process: int) -> None:
    for kind, flag in (("user", _CLONE_NEWUSER), ("net", _CLONE_NEWNET)):
        theirs = Path(f"/proc/{process}/ns/{kind}")
        if not theirs.samefile(f"/proc/self/ns/{kind}"):
            with theirs.open("rb") as file:
                _call("setns", file.fileno(), flag)


def _raise_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end:
        request = struct.pack("16sh14x", b"lo", 0)
        (flags,) = struct.unpack("16xh14x", fcntl.ioctl(end, _SIOCGIFFLAGS, request))
        fcntl.ioctl(end, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | _IFF_UP))


def _show_meminfo(file: str) -> None:
    _call("mount", None, b"/", None, _MS_REC | _MS_PRIVATE, None)
    _call("mount", os.fsencode(file), b"/proc/meminfo", None, _MS_BIND, None)


def main() -> None:
    how, *arguments = sys.argv[1:]
    if how == "offline":
        _enter_new(_CLONE_NEWNET)
        _raise_loopback()
    elif how == "join":
        _join(int(arguments.pop(0)))
    else:
        _enter_new(_CLONE_NEWNS)
        _show_meminfo(arguments.pop(0))
    os.execvp(arguments[0], arguments)


if __name__ == "__main__":
    main()
