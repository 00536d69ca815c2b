"""Runs a program as on a kernel that lacks something: `python -m tests.support.old_kernel LACKS COMMAND ARGUMENT…`.

LACKS is `landlock` (its calls do not exist), `landlock-N` (they are those of ABI N) or `seccomp` (no filter can be
installed). The program and all that it starts inherit a filter that does it: nothing in them is changed. It needs
edge_agent and nothing else, so that a device can run it, too.

For an ABI, the kernel hands each landlock_create_ruleset to a process beside the program, which answers as the old
kernel would, or lets the call go on. It ends when the last process that has the filter has ended. Source:
seccomp_unotify(2); what each ABI takes, and the errors, from landlock_create_ruleset(2).
"""

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import os
import select
import socket
import struct
import sys
from collections.abc import Sequence

from edge_agent.host import landlock, seccomp
from edge_agent.host.seccomp import Instruction

_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _ERRNO, _ASK = 0x7FFF0000, 0x00050000, 0x7FC00000
_PRCTL = {"x86_64": 157, "aarch64": 167}
_PR_SET_NO_NEW_PRIVS = 38
_SET_MODE_FILTER, _NEW_LISTENER = 1, 1 << 3
_RECEIVE, _SEND = 0xC0502100, 0xC0182101  # SECCOMP_IOCTL_NOTIF_*
_GO_ON = 1
_libc = ctypes.CDLL(None, use_errno=True)


def steps(lacks: str) -> list[Instruction]:
    answer = _ASK if lacks.startswith("landlock-") else _ERRNO | errno.ENOSYS
    refuse, allow = (_RETURN, 0, 0, answer), (_RETURN, 0, 0, _ALLOW)
    if lacks.startswith("landlock"):
        return [(_LOAD, 0, 0, 0), (_EQUAL, 0, 1, landlock._CREATE_RULESET), refuse, allow]
    prctl = _PRCTL[os.uname().machine]
    option = [(_LOAD, 0, 0, 16), (_EQUAL, 0, 1, seccomp._PR_SET_SECCOMP), refuse]
    return [(_LOAD, 0, 0, 0), (_EQUAL, 0, len(option), prctl), *option, allow]


def become_old(lacks: str) -> None:
    """Installs the filter around this process."""
    filter_ = steps(lacks)
    if not lacks.startswith("landlock-"):
        _install(filter_, 0)
        return
    ours, theirs = socket.socketpair()
    beside = os.fork()
    if beside == 0:
        os.setsid()
        if os.fork() == 0:
            ours.close()
            _answer(_received(theirs), int(lacks.removeprefix("landlock-")))
        os._exit(0)
    os.waitpid(beside, 0)
    theirs.close()
    listener = _install(filter_, _NEW_LISTENER)
    ours.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [listener]))])
    ours.close()
    os.close(listener)


def _install(filter_: Sequence[Instruction], flags: int) -> int:
    """Gives a descriptor with `_NEW_LISTENER`, else 0."""
    code = b"".join(struct.pack("=HBBI", *step) for step in filter_)
    memory = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("=HxxxxxxQ", len(code) // 8, ctypes.addressof(memory))
    assert _libc.prctl(_PR_SET_NO_NEW_PRIVS, *map(ctypes.c_ulong, (1, 0, 0, 0))) == 0
    architecture = seccomp.of_this_host()
    assert architecture is not None
    number = map(ctypes.c_long, (architecture.call, _SET_MODE_FILTER, flags))
    result: int = _libc.syscall(*number, program)
    assert result >= 0, os.strerror(ctypes.get_errno())
    return result


def _received(connection: socket.socket) -> int:
    _, ancillary, _, _ = connection.recvmsg(1, socket.CMSG_SPACE(4))
    connection.close()
    return int(array.array("i", ancillary[0][2])[0])


def _answer(listener: int, abi: int) -> None:
    """Answers until nobody is left who could ask."""
    for number in range(3):  # whoever reads the program's output does not wait for this process
        os.dup2(os.open(os.devnull, os.O_RDWR), number)
    waiting = select.poll()
    waiting.register(listener, select.POLLIN)
    while True:
        ((_, events),) = waiting.poll()
        if events & select.POLLHUP:
            return
        asked = bytearray(80)
        try:
            fcntl.ioctl(listener, _RECEIVE, asked)
            identity, pid = struct.unpack_from("=QI", asked)
            attributes, size, flags = struct.unpack_from("=QQQ", asked, 32)
            reply = (0, 0, 0)
            if flags == landlock._CREATE_RULESET_VERSION:
                reply = (abi, 0, 0)
            elif error := _refused(abi, size, _rights(pid, attributes)):
                reply = (0, -error, 0)
            else:
                reply = (0, 0, _GO_ON)
            fcntl.ioctl(listener, _SEND, bytearray(struct.pack("=QqiI", identity, *reply)))
        except OSError:
            continue  # whoever asked has ended


def _refused(abi: int, size: int, rights: int) -> int:
    """The error with which that kernel would answer; 0 for none."""
    known_size = 24 if abi >= landlock.SCOPE_ABI else 16 if abi >= landlock.TCP_ABI else 8
    known = sum(right for since, right in landlock._FILE_RIGHTS_BY_ABI if abi >= since)
    return errno.E2BIG if size > known_size else errno.EINVAL if rights & ~known else 0


def _rights(pid: int, address: int) -> int:
    """`handled_access_fs` of the ruleset. 0 where this process may not look into the other one."""
    try:
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
            memory.seek(address)
            return int.from_bytes(memory.read(8), sys.byteorder)
    except OSError:
        return 0


if __name__ == "__main__":
    become_old(sys.argv[1])
    os.execv(sys.argv[2], sys.argv[2:])
