"""The filter of system calls, run instruction by instruction: for both architectures, on any."""

from __future__ import annotations

import ctypes
import fcntl
import socket
from pathlib import Path

import pytest

from edge_agent.host import seccomp
from edge_agent.host.seccomp import ARCHITECTURES, MISSING, NETWORKING, REFUSED, Calls, Network, program
from tests.support.bpf import verdict

PID = 4711
KINDS = [(name, network) for name in ARCHITECTURES for network in Network]
ALLOWED = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "mmap": (9, 222), "mprotect": (10, 226),
    "munmap": (11, 215), "brk": (12, 214), "futex": (202, 98), "exit_group": (231, 94), "getdents64": (217, 61),
    "pread64": (17, 67), "pwrite64": (18, 68), "readlinkat": (267, 78), "newfstatat": (262, 79),
    "rt_sigaction": (13, 134), "sendto": (44, 206), "recvfrom": (45, 207), "ftruncate": (77, 46),
    "sched_getaffinity": (204, 123), "getrandom": (318, 278), "unlinkat": (263, 35), "rseq": (334, 293),
    "set_robust_list": (273, 99), "madvise": (28, 233), "wait4": (61, 260), "ppoll": (271, 73),
}  # fmt: skip


class Filter:
    def __init__(self, machine: str, network: Network = Network.NONE, **more: bool) -> None:
        self.architecture = ARCHITECTURES[machine]
        self.program = program(self.architecture, pid=PID, calls=Calls(network=network, **more))

    def number(self, name: str) -> int | None:
        tables = (*REFUSED.values(), MISSING, NETWORKING, seccomp._CHECKED, ALLOWED)
        return next(table[name] for table in tables if name in table)[self.architecture.column]

    def __call__(self, name: str, *arguments: int) -> str:
        number = self.number(name)
        assert number is not None, f"{name} is not a call of this architecture"
        return verdict(self.program, audit=self.architecture.audit, number=number, arguments=arguments)


@pytest.fixture(params=list(ARCHITECTURES))
def asked(request: pytest.FixtureRequest) -> Filter:
    return Filter(request.param)


@pytest.mark.parametrize(("machine", "network"), KINDS)
def test_it_fits_the_kernel(machine: str, network: Network) -> None:
    steps = Filter(machine, network).program
    assert len(steps) <= 4096, "BPF_MAXINSNS"
    assert all(step[1] <= 255 and step[2] <= 255 for step in steps)


@pytest.mark.parametrize(("machine", "network"), KINDS)
def test_what_models_need_is_allowed(machine: str, network: Network) -> None:
    asked = Filter(machine, network)
    assert {name: asked(name) for name in ALLOWED} == dict.fromkeys(ALLOWED, "allowed")


@pytest.mark.parametrize(("machine", "network"), KINDS)
def test_every_refused_call_is_refused_whatever_its_arguments(machine: str, network: Network) -> None:
    asked = Filter(machine, network)
    names = [name for group in REFUSED.values() for name in group if asked.number(name) is not None]
    assert len(names) > 90
    for arguments in ((), (PID, PID), (1, 1, 1)):
        assert {name: asked(name, *arguments) for name in names} == dict.fromkeys(names, "EPERM")


@pytest.mark.parametrize("machine", list(ARCHITECTURES))
def test_programs_modes_and_locks_are_given_back_alone(machine: str) -> None:
    none, both = Filter(machine), Filter(machine, programs=True, modes=True, locks=True)
    names = [name for group in REFUSED.values() for name in group if none.number(name) is not None]
    given = {name for name in names if both(name) == "allowed"}
    assert given | {"chmod", "utime", "utimes", "futimesat", "fork", "vfork"} == {
        *("execve", "fork", "vfork", "setsid", "setpgid"),
        *("chmod", "fchmod", "fchmodat", "utime", "utimes", "futimesat", "utimensat"),
        "flock",
    }
    assert Filter(machine, programs=True, modes=True)("flock") == "EPERM"
    assert [both("clone", 17), both("clone", 17 | 1 << 28), both("kill", 1)] == [
        "allowed",
        "EPERM",
        "allowed",
    ]
    assert both("socket", 2, 1) == "EPERM"


def test_calls_whose_arguments_cannot_be_read_do_not_exist(asked: Filter) -> None:
    assert {name: asked(name) for name in MISSING} == {"clone3": "ENOSYS", "openat2": "ENOSYS"}


def test_calls_that_are_newer_than_the_filter_do_not_exist(asked: Filter) -> None:
    for number in (seccomp.NEWEST + 1, 466, 500, seccomp.X32_BIT - 1):
        assert verdict(asked.program, audit=asked.architecture.audit, number=number) == "ENOSYS"
    assert verdict(asked.program, audit=asked.architecture.audit, number=seccomp.NEWEST) == "allowed"


def test_a_call_of_another_architecture_or_of_x32_is_refused(asked: Filter) -> None:
    others = {0x40000003, 0x40000028, *(each.audit for each in ARCHITECTURES.values())}
    for audit in others - {asked.architecture.audit}:
        assert verdict(asked.program, audit=audit, number=0) == "EPERM"
    for number in (seccomp.X32_BIT, seccomp.X32_BIT | 0, 0xFFFFFFFF):
        assert verdict(asked.program, audit=asked.architecture.audit, number=number) == "EPERM"


def test_threads_are_allowed_and_processes_and_namespaces_are_not(asked: Filter) -> None:
    thread = 0x3D0F00  # what pthread_create asks for
    assert asked("clone", thread) == "allowed"
    assert asked("clone", 17) == "EPERM", "fork"
    assert asked("clone", 0x4111) == "EPERM", "vfork"
    for namespace in (0x80, 0x20000, *(1 << bit for bit in range(25, 31))):
        assert asked("clone", thread | namespace) == "EPERM"


def test_a_process_signals_itself_only(asked: Filter) -> None:
    for name in ("kill", "tgkill"):
        assert [asked(name, pid, 9) for pid in (PID, PID + 1, 0, -1, 1)] == ["allowed", *["EPERM"] * 4]
    assert [asked("prlimit64", pid) for pid in (0, PID, PID + 1)] == ["allowed", "allowed", "EPERM"]


def test_a_file_is_truncated_by_writers_only(asked: Filter) -> None:
    calls = [("openat", (0, 0))] + ([("open", (0,))] if asked.number("open") is not None else [])
    for name, before in calls:
        found = {flags: asked(name, *before, flags) for flags in (0o0, 0o1, 0o2, 0o1001, 0o1002, 0o101, 0o3)}
        assert set(found.values()) == {"allowed"}
        assert [asked(name, *before, flags) for flags in (0o1000, 0o1003, 0o2001000)] == ["EPERM"] * 3


def test_dangerous_commands_of_common_calls_are_refused(asked: Filter) -> None:
    assert {asked("prctl", each) for each in seccomp._REFUSED_PRCTL.values()} == {"EPERM"}
    assert {asked("fcntl", 3, each) for each in seccomp._REFUSED_FCNTL.values()} == {"EPERM"}
    assert {asked("ioctl", 3, each) for each in seccomp._REFUSED_IOCTL.values()} == {"EPERM"}
    assert asked("fcntl", 3, fcntl.F_SETLEASE) == "EPERM"
    set_version, make_subvolume, clone = 0x40087602, 0x5000940E, 0x40049409
    assert [asked("ioctl", 3, each) for each in (set_version, make_subvolume, clone)] == [
        "EPERM", "EPERM", "allowed"
    ]  # fmt: skip
    assert asked("prctl", 15) == asked("fcntl", 3, 1030) == asked("ioctl", 3, 0x5401) == "allowed"
    assert asked("ioctl", 3, 1 << 32 | 0x5412) == "EPERM", "the kernel reads the lower half only"


@pytest.mark.parametrize(("machine", "network"), KINDS)
def test_no_socket_is_made_that_holds_up_whoever_closes_it(machine: str, network: Network) -> None:
    asked = Filter(machine, network)
    assert asked("setsockopt", 3, socket.SOL_SOCKET, socket.SO_LINGER) == "EPERM"
    assert asked("setsockopt", 3, 1 << 32 | socket.SOL_SOCKET, 1 << 32 | socket.SO_LINGER) == "EPERM"
    others = [(1, 9), (socket.IPPROTO_TCP, 1), (socket.IPPROTO_TCP, 13)]  # SO_KEEPALIVE, TCP_NODELAY, …
    assert {asked("setsockopt", 3, *other) for other in others} == {"allowed"}


@pytest.mark.parametrize("machine", list(ARCHITECTURES))
def test_sockets_are_those_that_were_asked_for(machine: str) -> None:
    families = {"unix": 1, "inet": 2, "inet6": 10, "netlink": 16, "packet": 17, "vsock": 40, "alg": 38}
    stream = int(socket.SOCK_STREAM) | 0o2004000  # non-blocking, closed at exec
    found = {}
    for network in Network:
        asked = Filter(machine, network)
        found[network] = {
            name for name, family in families.items() if asked("socket", family, stream) == "allowed"
        }
        assert asked("socket", 2, 3) == "EPERM", "raw"
        serves = network is Network.SERVER
        assert {asked(name) for name in ("listen", "accept", "accept4")} == {"allowed" if serves else "EPERM"}
        assert asked("connect") == ("EPERM" if network is Network.NONE else "allowed")
        assert asked("bind") == ("allowed" if network.internet else "EPERM")
        assert asked("socketpair", 1, stream) == "allowed", "asyncio has one"
        assert {asked("socketpair", 1, 2), asked("socketpair", 1, 5), asked("socketpair", 2, 1)} == {"EPERM"}
    assert found == {
        Network.NONE: set(),
        Network.INTERNET: {"inet", "inet6"},
        Network.INTERNET_AND_UNIX: {"unix", "inet", "inet6"},
        Network.SERVER: {"unix"},
    }


# --- The tables, held against libseccomp's ---------------------------------------------------------------

TABLES = (*REFUSED.values(), MISSING, NETWORKING, seccomp._CHECKED, ALLOWED)
YOUNG = {"fchmodat2": 452, "statmount": 457, "listmount": 458}
"""Younger than the oldest libseccomp that has to do (2.5.4, Debian 12); from linux/scripts/syscall.tbl."""


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    """What systemd makes its filters with: it is wherever systemd-analyze is, which other tests need."""
    found = [*Path(__file__).parents[2].glob(".tools/systemd/root/**/libseccomp.so.2"), "libseccomp.so.2"]
    loaded = ctypes.CDLL(str(found[0]))
    loaded.seccomp_syscall_resolve_name_arch.argtypes = [ctypes.c_uint32, ctypes.c_char_p]
    return loaded


@pytest.mark.parametrize("machine", list(ARCHITECTURES))
def test_each_number_is_the_kernels(machine: str, library: ctypes.CDLL) -> None:
    audit, column = ARCHITECTURES[machine].audit, ARCHITECTURES[machine].column
    written = {name: numbers[column] for table in TABLES for name, numbers in table.items()}
    assert len(written) > 150
    wrong = {}
    for name, number in written.items():
        known = library.seccomp_syscall_resolve_name_arch(audit, name.encode())
        if known == -1:  # it has not heard of this call
            known = YOUNG[name]
        if number != (known if known >= 0 else None):  # below: there is no such call on this architecture
            wrong[name] = (number, known)
    assert wrong == {}


@pytest.mark.parametrize("machine", list(ARCHITECTURES))
def test_an_architecture_is_what_the_kernel_calls_it(machine: str, library: ctypes.CDLL) -> None:
    architecture = ARCHITECTURES[machine]
    known = library.seccomp_arch_resolve_name(machine.encode()) & 0xFFFFFFFF  # SCMP_ARCH_* is AUDIT_ARCH_*
    assert known == architecture.audit
    assert architecture.call == REFUSED["large surfaces of the kernel"]["seccomp"][architecture.column]
