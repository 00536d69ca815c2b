"""Runs a program as on a kernel that lacks something: `python -m tests.support.old_kernel LACKS COMMAND ARGUMENT…`.

LACKS is `landlock` (its calls do not exist) or `seccomp` (no filter can be installed). The program inherits a filter
that does it: nothing in the program is changed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys

from edge_agent.host import landlock, seccomp
from edge_agent.host.seccomp import Instruction

_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_PRCTL = {"x86_64": 157, "aarch64": 167}


def steps(lacks: str) -> list[Instruction]:
    refuse = (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)
    allow = (_RETURN, 0, 0, _ALLOW)
    if lacks == "landlock":
        return [(_LOAD, 0, 0, 0), (_EQUAL, 0, 1, landlock._CREATE_RULESET), refuse, allow]
    prctl = _PRCTL[os.uname().machine]
    option = [(_LOAD, 0, 0, 16), (_EQUAL, 0, 1, seccomp._PR_SET_SECCOMP), refuse]
    return [(_LOAD, 0, 0, 0), (_EQUAL, 0, len(option), prctl), *option, allow]


def become_old(lacks: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    code = b"".join(struct.pack("=HBBI", *step) for step in steps(lacks))
    memory = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("=HxxxxxxQ", len(code) // 8, ctypes.addressof(memory))
    assert libc.prctl(38, *map(ctypes.c_ulong, (1, 0, 0, 0))) == 0
    assert libc.prctl(seccomp._PR_SET_SECCOMP, ctypes.c_ulong(2), program, *map(ctypes.c_ulong, (0, 0))) == 0


if __name__ == "__main__":
    become_old(sys.argv[1])
    os.execv(sys.argv[2], sys.argv[2:])
