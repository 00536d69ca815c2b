"""Landlock: files, TCP, signals and abstract sockets that a process gives up for good.

Owns the three system calls and what each version of them (ABI) can do. Asks for as much as this kernel knows, and
says what that was. Paths that do not exist are left out.

    abi() → restrict(read, write, …)

Source: the kernel's Documentation/userspace-api/landlock.rst and include/uapi/linux/landlock.h. The numbers of the
calls are the same on all architectures.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from collections.abc import Iterable
from pathlib import Path

MOVE_ABI = 2
"""Before it, no file can be moved or linked from one folder to another."""
TCP_ABI = 4
SCOPE_ABI = 6
"""Of signals and abstract sockets."""

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH = 1

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_REMOVE_DIR, _REMOVE_FILE = 1 << 4, 1 << 5
_MAKE_CHAR, _MAKE_DIR, _MAKE_REG, _MAKE_SOCK = 1 << 6, 1 << 7, 1 << 8, 1 << 9
_MAKE_FIFO, _MAKE_BLOCK, _MAKE_SYM = 1 << 10, 1 << 11, 1 << 12
_REFER, _TRUNCATE, _IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15

_FILE_RIGHTS_BY_ABI = ((1, (1 << 13) - 1), (2, _REFER), (3, _TRUNCATE), (5, _IOCTL_DEV))
_READ = _READ_FILE | _READ_DIR
_WRITE = (
    _READ | _WRITE_FILE | _TRUNCATE | _REFER | _REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_REG | _MAKE_SYM
)
"""Ordinary files and folders: no sockets, no FIFOs, no devices."""
_OF_A_FILE = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
"""A rule for a file, not a folder, can give these only."""
_TCP_BIND_AND_CONNECT = 0b11
_ABSTRACT_SOCKETS_AND_SIGNALS = 0b11


def abi() -> int:
    """The version of Landlock that this kernel has switched on; 0 for none."""
    try:
        return _call(_CREATE_RULESET, None, 0, _CREATE_RULESET_VERSION)
    except OSError:
        return 0


def restrict(
    *,
    files: bool = True,
    read: Iterable[Path] = (),
    write: Iterable[Path] = (),
    run: Iterable[Path] = (),
    tcp: bool = True,
    scope: bool = True,
) -> None:
    """Restricts this thread, and all that it starts. It must not be able to gain privileges any more.

    Args:
        files: forbid all files but `read`, `write` and `run`, and what is below them.
        run: programs and their libraries; they may be read as well.
        tcp: forbid TCP connections and servers, where this kernel can.
        scope: forbid signals to processes outside, and connections to abstract sockets there, where this kernel can.

    Raises:
        OSError: the kernel has no Landlock, or not for this process.
    """
    known = abi()
    rights = sum(right for since, right in _FILE_RIGHTS_BY_ABI if known >= since)
    if not files:  # every ruleset forbids moves between folders, unless it says that it does not
        rights &= _REFER
    ports = _TCP_BIND_AND_CONNECT if tcp and known >= TCP_ABI else 0
    scoped = _ABSTRACT_SOCKETS_AND_SIGNALS if scope and known >= SCOPE_ABI else 0
    if not (files or ports or scoped):
        return
    fields = [rights, *([ports] if known >= TCP_ABI else []), *([scoped] if known >= SCOPE_ABI else [])]
    attributes = struct.pack(f"={len(fields)}Q", *fields)
    ruleset = _call(_CREATE_RULESET, attributes, len(attributes), 0)
    try:
        if not files and rights:
            _allow(ruleset, Path("/"), rights)
        if files:
            for paths, wanted in ((read, _READ), (write, _WRITE), (run, _READ | _EXECUTE)):
                for path in paths:
                    _allow(ruleset, path, wanted & rights)
        _call(_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: Path, rights: int) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # what this process cannot find it cannot read either
    try:
        if not stat.S_ISDIR(os.fstat(place).st_mode):
            rights &= _OF_A_FILE
        _call(_ADD_RULE, ruleset, _RULE_PATH_BENEATH, struct.pack("=Qi", rights, place), 0)
    finally:
        os.close(place)


def _call(number: int, *arguments: int | bytes | None) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    passed = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]
    result: int = libc.syscall(ctypes.c_long(number), *passed)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
