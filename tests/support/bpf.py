"""Runs a seccomp program as the kernel does, for any architecture. Source: linux/filter.h, linux/seccomp.h."""

from __future__ import annotations

import errno
import struct
from collections.abc import Sequence

from edge_agent.host.seccomp import Instruction

_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000


def verdict(program: Sequence[Instruction], *, audit: int, number: int, arguments: Sequence[int] = ()) -> str:
    """`allowed`, or the name of the error that the call fails with."""
    filled = [*arguments, *[0] * (6 - len(arguments))]
    data = struct.pack("<IIQ6Q", number & 0xFFFFFFFF, audit, 0, *(each & (1 << 64) - 1 for each in filled))
    accumulator = position = 0
    while True:
        code, if_true, if_false, value = program[position]
        position += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, value)
        elif code == 0x54:
            accumulator &= value
        elif code == 0x06:
            return "allowed" if value == _ALLOW else errno.errorcode[value & ~_ERRNO]
        else:
            holds = {
                0x15: accumulator == value,
                0x25: accumulator > value,
                0x35: accumulator >= value,
                0x45: bool(accumulator & value),
            }[code]
            position += if_true if holds else if_false
