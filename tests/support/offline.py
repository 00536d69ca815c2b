"""A network namespace with a loopback interface and nothing else.

    python -m tests.support.offline [--join PID] COMMAND…

Becomes COMMAND in a new one, or in the one of another process. Needs root, or a kernel that lets users make user
namespaces (`unshare -rn true` shows it).
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import sys
from pathlib import Path

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1


def inside(command: list[str], *, of: int | None = None) -> list[str]:
    """A command that runs another one in a new namespace, or in that of process `of`."""
    join = [] if of is None else ["--join", str(of)]
    return [sys.executable, __file__, *join, *command]


def _call(name: str, *arguments: int) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) != 0:
        error = os.strerror(ctypes.get_errno())
        sys.exit(f"no network namespace can be had here ({error}): be root, or allow user namespaces")


def _enter_new() -> None:
    user, group = os.geteuid(), os.getegid()
    if user == 0:
        _call("unshare", _CLONE_NEWNET)
    else:
        _call("unshare", _CLONE_NEWUSER | _CLONE_NEWNET)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    _raise_loopback()


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


def main() -> None:
    arguments = sys.argv[1:]
    if arguments[0] == "--join":
        _join(int(arguments[1]))
        arguments = arguments[2:]
    else:
        _enter_new()
    os.execvp(arguments[0], arguments)


if __name__ == "__main__":
    main()
