"""The filter of system calls that a confined process has: what it may not ask of the kernel.

Owns the tables (x86_64 and aarch64) and the BPF program made of them; `install` is the only impure part. A deny-list:
numeric libraries differ in what they call, so what is not named here is allowed, but for two kinds: calls of another
architecture or of x32 are refused, and calls that are newer than these tables do not exist (ENOSYS). What is refused
fails with EPERM, as where an administrator forbids it. A process is not killed: libraries try things, and go on
without (thread affinity, for example).

The filter supplies what Landlock lacks: on every kernel no new processes, no programs, no sockets, signals to oneself
only, and nothing that changes a file's mode, owner, times, attributes or length by its path.

Sources: the kernel's Documentation/userspace-api/seccomp_filter.rst; numbers from asm/unistd_64.h and
asm-generic/unistd.h; seccomp(2), clone(2), fcntl(2).
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum


class Network(StrEnum):
    """Which sockets a process may make. A connected pair of its own, as asyncio needs it, it always may."""

    NONE = "none"
    INTERNET = "internet"
    INTERNET_AND_UNIX = "internet_and_unix"
    SERVER = "server"
    """Unix sockets as a client; and it accepts connections on the sockets, of any kind, that it has already."""

    @property
    def internet(self) -> bool:
        """It may connect to anything in a network."""
        return self in (Network.INTERNET, Network.INTERNET_AND_UNIX)


@dataclass(frozen=True, kw_only=True)
class Calls:
    """What a process may ask of the kernel that most need not.

    Attributes:
        programs: start programs, which have the same filter, and end them.
        modes: change the mode and the times of files.
        locks: lock whole files and folders.
    """

    network: Network = Network.NONE
    programs: bool = False
    modes: bool = False
    locks: bool = False


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How the kernel names one architecture.

    Attributes:
        audit: AUDIT_ARCH_*.
        column: of the tables below.
        call: number of seccomp(2).
    """

    audit: int
    column: int
    call: int


ARCHITECTURES: Mapping[str, Architecture] = {
    "x86_64": Architecture(audit=0xC000003E, column=0, call=317),
    "aarch64": Architecture(audit=0xC00000B7, column=1, call=277),
}
X32_BIT = 0x40000000
NEWEST = 462
"""mseal, Linux 6.10: the newest call that was looked at. Numbers are the same on both from 424 on."""

Numbers = tuple[int | None, int | None]

REFUSED: Mapping[str, Mapping[str, Numbers]] = {
    "other processes": {
        "ptrace": (101, 117),
        "process_vm_readv": (310, 270),
        "process_vm_writev": (311, 271),
        "process_madvise": (440, 440),
        "process_mrelease": (448, 448),
        "kcmp": (312, 272),
        "pidfd_open": (434, 434),
        "pidfd_getfd": (438, 438),
        "pidfd_send_signal": (424, 424),
        "tkill": (200, 130),
        "rt_sigqueueinfo": (129, 138),
        "rt_tgsigqueueinfo": (297, 240),
        "move_pages": (279, 239),
        "migrate_pages": (256, 238),
        "sched_setaffinity": (203, 122),
        "sched_setparam": (142, 118),
        "sched_setscheduler": (144, 119),
        "sched_setattr": (314, 274),
        "setpriority": (141, 140),
        "ioprio_set": (251, 30),
        "perf_event_open": (298, 241),
    },
    "programs and processes": {
        "execve": (59, 221),
        "execveat": (322, 281),
        "fork": (57, None),
        "vfork": (58, None),
        "setsid": (112, 157),
        "setpgid": (109, 154),
        "memfd_create": (319, 279),
        "memfd_secret": (447, 447),
    },
    "large surfaces of the kernel": {
        "io_uring_setup": (425, 425),
        "io_uring_enter": (426, 426),
        "io_uring_register": (427, 427),
        "userfaultfd": (323, 282),
        "bpf": (321, 280),
        "seccomp": (317, 277),
        "keyctl": (250, 219),
        "add_key": (248, 217),
        "request_key": (249, 218),
        "modify_ldt": (154, None),
        "personality": (135, 92),
        "uselib": (134, None),
    },
    "namespaces and mounts": {
        "unshare": (272, 97),
        "setns": (308, 268),
        "mount": (165, 40),
        "umount2": (166, 39),
        "pivot_root": (155, 41),
        "chroot": (161, 51),
        "open_tree": (428, 428),
        "move_mount": (429, 429),
        "fsopen": (430, 430),
        "fsconfig": (431, 431),
        "fsmount": (432, 432),
        "fspick": (433, 433),
        "mount_setattr": (442, 442),
        "statmount": (457, 457),
        "listmount": (458, 458),
    },
    "the system": {
        "kexec_load": (246, 104),
        "kexec_file_load": (320, 294),
        "init_module": (175, 105),
        "finit_module": (313, 273),
        "delete_module": (176, 106),
        "reboot": (169, 142),
        "syslog": (103, 116),
        "acct": (163, 89),
        "swapon": (167, 224),
        "swapoff": (168, 225),
        "quotactl": (179, 60),
        "quotactl_fd": (443, 443),
        "settimeofday": (164, 170),
        "clock_settime": (227, 112),
        "adjtimex": (159, 171),
        "clock_adjtime": (305, 266),
        "sethostname": (170, 161),
        "setdomainname": (171, 162),
        "iopl": (172, None),
        "ioperm": (173, None),
        "vhangup": (153, 58),
    },
    "another user": {
        "setuid": (105, 146),
        "setgid": (106, 144),
        "setreuid": (113, 145),
        "setregid": (114, 143),
        "setresuid": (117, 147),
        "setresgid": (119, 149),
        "setgroups": (116, 159),
        "setfsuid": (122, 151),
        "setfsgid": (123, 152),
        "capset": (126, 91),
    },
    "what Landlock does not guard of files": {
        "flock": (73, 32),  # for which a reader's descriptor is enough
        "chmod": (90, None),
        "fchmod": (91, 52),
        "fchmodat": (268, 53),
        "fchmodat2": (452, 452),
        "chown": (92, None),
        "fchown": (93, 55),
        "lchown": (94, None),
        "fchownat": (260, 54),
        "setxattr": (188, 5),
        "lsetxattr": (189, 6),
        "fsetxattr": (190, 7),
        "removexattr": (197, 14),
        "lremovexattr": (198, 15),
        "fremovexattr": (199, 16),
        "utime": (132, None),
        "utimes": (235, None),
        "futimesat": (261, None),
        "utimensat": (280, 88),
        "truncate": (76, 45),  # Landlock guards it from ABI 3 on
        "name_to_handle_at": (303, 264),
        "open_by_handle_at": (304, 265),
        "inotify_init": (253, None),
        "inotify_init1": (294, 26),
        "inotify_add_watch": (254, 27),
        "fanotify_init": (300, 262),
        "fanotify_mark": (301, 263),
        "lookup_dcookie": (212, 18),
    },
    "memory and messages that processes of one user share": {
        "shmget": (29, 194),
        "shmat": (30, 196),
        "shmctl": (31, 195),
        "semget": (64, 190),
        "semop": (65, 193),
        "semctl": (66, 191),
        "semtimedop": (220, 192),
        "msgget": (68, 186),
        "msgsnd": (69, 189),
        "msgrcv": (70, 188),
        "msgctl": (71, 187),
        "mq_open": (240, 180),
        "mq_unlink": (241, 181),
        "mq_timedsend": (242, 182),
        "mq_timedreceive": (243, 183),
        "mq_notify": (244, 184),
    },
}
"""Calls that fail with EPERM whatever their arguments are."""

_PROGRAMS = frozenset(("execve", "fork", "vfork", "setsid", "setpgid"))
_MODES = frozenset(("chmod", "fchmod", "fchmodat", "utime", "utimes", "futimesat", "utimensat"))
_LOCKS = frozenset(("flock",))
"""Of those, what `Calls` gives back."""

MISSING: Mapping[str, Numbers] = {"clone3": (435, 435), "openat2": (437, 437)}
"""Their arguments are in memory, where no filter can read them. Without them, libraries use the older calls."""

NETWORKING: Mapping[str, Numbers] = {
    "connect": (42, 203),
    "bind": (49, 200),
    "listen": (50, 201),
    "accept": (43, 202),
    "accept4": (288, 242),
}
_REFUSED_NETWORKING: Mapping[Network, Iterable[str]] = {
    Network.NONE: NETWORKING.keys(),
    Network.INTERNET: ("listen", "accept", "accept4"),
    Network.INTERNET_AND_UNIX: ("listen", "accept", "accept4"),
    Network.SERVER: ("bind",),
}
_CHECKED: Mapping[str, Numbers] = {
    "clone": (56, 220),
    "kill": (62, 129),
    "tgkill": (234, 131),
    "prlimit64": (302, 261),
    "prctl": (157, 167),
    "fcntl": (72, 25),
    "ioctl": (16, 29),
    "open": (2, None),
    "openat": (257, 56),
    "socket": (41, 198),
    "socketpair": (53, 199),
    "setsockopt": (54, 208),
}
"""Calls that depend on their arguments."""

# Flags and commands: linux/sched.h, linux/prctl.h, linux/fcntl.h, asm-generic/ioctls.h, linux/fs.h, linux/socket.h.
_CLONE_THREAD = 0x00010000
_CLONE_NEW = 0x7E020080  # every CLONE_NEW*
_REFUSED_PRCTL = {
    "PR_SET_DUMPABLE": 4,
    "PR_SET_SECCOMP": 22,
    "PR_SET_MM": 35,
    "PR_SCHED_CORE": 62,
    "PR_SET_PTRACER": 0x59616D61,
}
_REFUSED_FCNTL = {
    "F_SETOWN": 8,
    "F_SETSIG": 10,
    "F_SETOWN_EX": 15,
    "F_SETLEASE": 1024,  # whoever opens or links such a file waits
    "F_NOTIFY": 1026,
    "F_SETDELEG": 1040,
}
_REFUSED_IOCTL = {
    "TIOCSTI": 0x5412,
    "TIOCLINUX": 0x541C,
    "FIOSETOWN": 0x8901,
    "SIOCSPGRP": 0x8902,
    "FS_IOC_SETFLAGS": 0x40086602,
    "FS_IOC_SETVERSION": 0x40087602,
    "EXT4_IOC_SETVERSION": 0x40086604,
    "FS_IOC_FSSETXATTR": 0x401C5820,
    "FS_IOC_ENABLE_VERITY": 0x40806685,
    "FS_IOC_SET_ENCRYPTION_POLICY": 0x800C6613,
    # These make and remove folders of a folder that is only read.
    "BTRFS_IOC_SNAP_CREATE": 0x50009401,
    "BTRFS_IOC_SUBVOL_CREATE": 0x5000940E,
    "BTRFS_IOC_SNAP_DESTROY": 0x5000940F,
    "BTRFS_IOC_SNAP_CREATE_V2": 0x50009417,
    "BTRFS_IOC_SUBVOL_CREATE_V2": 0x50009418,
    "BTRFS_IOC_SNAP_DESTROY_V2": 0x5000943F,
}
_O_ACCMODE, _O_TRUNC = 3, 0x200
_AF_UNIX, _AF_INET, _AF_INET6 = 1, 2, 10
_SOCK_STREAM, _SOCK_DGRAM, _SOCK_KIND = 1, 2, 0xF
_SOL_SOCKET, _SO_LINGER = 1, 13

_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_LOAD, _AND, _RETURN = 0x20, 0x54, 0x06
_EQUAL, _GREATER, _GREATER_OR_EQUAL, _ANY_BIT = 0x15, 0x25, 0x35, 0x45
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data

Instruction = tuple[int, int, int, int]
"""struct sock_filter: code, jump if true, jump if false, value."""

_REFUSE: Instruction = (_RETURN, 0, 0, _ERRNO | errno.EPERM)
_NO_SUCH_CALL: Instruction = (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)
_PERMIT: Instruction = (_RETURN, 0, 0, _ALLOW)


def of_this_host() -> Architecture | None:
    """None where there is no table for this machine."""
    return ARCHITECTURES.get(platform.machine())


def program(architecture: Architecture, *, pid: int, calls: Calls) -> list[Instruction]:
    """The filter.

    Args:
        pid: of the process that will have it; the only one that it may signal.
    """
    found: list[Instruction] = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, architecture.audit),
        _REFUSE,
        (_LOAD, 0, 0, _NUMBER),
        *_when(_GREATER_OR_EQUAL, X32_BIT, _REFUSE),
        *_when(_GREATER, NEWEST, _NO_SUCH_CALL),
    ]
    column = architecture.column
    for numbers in MISSING.values():
        found += _when(_EQUAL, numbers[column], _NO_SUCH_CALL)
    parts = ((calls.programs, _PROGRAMS), (calls.modes, _MODES), (calls.locks, _LOCKS))
    given_back = frozenset[str]().union(*(names for given, names in parts if given))
    refused = [
        numbers for group in REFUSED.values() for name, numbers in group.items() if name not in given_back
    ]
    refused += [NETWORKING[name] for name in _REFUSED_NETWORKING[calls.network]]
    for number in sorted(each[column] or 0 for each in refused if each[column] is not None):
        found += _when(_EQUAL, number, _REFUSE)
    for name, block in _argument_checks(pid, calls).items():
        found += _when(_EQUAL, _CHECKED[name][column], *block)
    return [*found, _PERMIT]


def install(architecture: Architecture, calls: Calls) -> None:
    """Puts the filter over this process for good. It must not be able to gain privileges any more.

    Raises:
        OSError: the kernel takes no filters, or not from here.
    """
    steps = program(architecture, pid=os.getpid(), calls=calls)
    code = b"".join(struct.pack("=HBBI", *step) for step in steps)
    memory = ctypes.create_string_buffer(code, len(code))

    class Program(ctypes.Structure):
        """struct sock_fprog."""

        _fields_ = (("length", ctypes.c_ushort), ("steps", ctypes.c_void_p))

    described = Program(len(steps), ctypes.addressof(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    mode = ctypes.c_ulong(_SECCOMP_MODE_FILTER)
    if libc.prctl(_PR_SET_SECCOMP, mode, ctypes.byref(described), ctypes.c_ulong(0), ctypes.c_ulong(0)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _argument_checks(pid: int, calls: Calls) -> dict[str, list[Instruction]]:
    """What is run for a call that depends on its arguments; each block decides."""
    families: dict[Network, tuple[int, ...]] = {
        Network.NONE: (),
        Network.INTERNET: (_AF_INET, _AF_INET6),
        Network.INTERNET_AND_UNIX: (_AF_INET, _AF_INET6, _AF_UNIX),
        Network.SERVER: (_AF_UNIX,),
    }
    own = [*_when(_EQUAL, pid, _PERMIT), _REFUSE]
    checks = {
        "clone": [
            _argument(0),
            *_when(_ANY_BIT, _CLONE_NEW, _REFUSE),
            *_when(_ANY_BIT, _CLONE_THREAD, _PERMIT),
            _REFUSE,
        ],
        "kill": [_argument(0), *own],
        "tgkill": [_argument(0), *own],
        "prlimit64": [_argument(0), *_when(_EQUAL, 0, _PERMIT), *own],
        "prctl": [_argument(0), *_none_of(_REFUSED_PRCTL.values())],
        "fcntl": [_argument(1), *_none_of(_REFUSED_FCNTL.values())],
        "ioctl": [_argument(1), *_none_of(_REFUSED_IOCTL.values())],
        "open": [_argument(1), *_no_hidden_truncation()],
        "openat": [_argument(2), *_no_hidden_truncation()],
        "socket": [_REFUSE],
        "socketpair": [
            _argument(0),
            (_EQUAL, 1, 0, _AF_UNIX),
            _REFUSE,
            _argument(1),
            (_AND, 0, 0, _SOCK_KIND),
            # Not a pair of datagram sockets: these can be sent from to any address.
            *_when(_EQUAL, _SOCK_STREAM, _PERMIT),
            _REFUSE,
        ],
        # Whoever closes such a socket waits: also the daemon, to which it was sent.
        "setsockopt": [
            _argument(1),
            *_when(_EQUAL, _SOL_SOCKET, _argument(2), *_none_of([_SO_LINGER])),
            _PERMIT,
        ],
    }
    if calls.programs:  # Landlock keeps signals inside, where it can
        checks["kill"] = [_PERMIT]
        checks["clone"] = [_argument(0), *_when(_ANY_BIT, _CLONE_NEW, _REFUSE), _PERMIT]
    if families[calls.network]:
        kinds = [step for kind in (_SOCK_STREAM, _SOCK_DGRAM) for step in _when(_EQUAL, kind, _PERMIT)]
        of_kind = [_argument(1), (_AND, 0, 0, _SOCK_KIND), *kinds, _REFUSE]
        allowed = [step for family in families[calls.network] for step in _when(_EQUAL, family, *of_kind)]
        checks["socket"] = [_argument(0), *allowed, _REFUSE]
    return checks


def _no_hidden_truncation() -> list[Instruction]:
    """Refuses to truncate a file without opening it for writing: before ABI 3, Landlock does not see that."""
    only_truncated = [*_when(_EQUAL, _O_TRUNC, _REFUSE), *_when(_EQUAL, _O_TRUNC | _O_ACCMODE, _REFUSE)]
    return [(_AND, 0, 0, _O_TRUNC | _O_ACCMODE), *only_truncated, _PERMIT]


def _none_of(values: Iterable[int]) -> list[Instruction]:
    return [*(step for value in values for step in _when(_EQUAL, value, _REFUSE)), _PERMIT]


def _argument(index: int) -> Instruction:
    """Loads an argument's lower half. The kernel reads no more of those that are looked at here."""
    return (_LOAD, 0, 0, _ARGUMENTS + 8 * index)


def _when(test: int, value: int | None, *block: Instruction) -> list[Instruction]:
    """Runs the block, which decides, if the test holds; else goes on behind it. Without a value, nothing."""
    return [] if value is None else [(test, 0, len(block), value), *block]
