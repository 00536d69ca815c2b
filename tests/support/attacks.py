"""What code from elsewhere might try on a device. An attack that does not raise has succeeded.

    python -m tests.support.attacks FOLDER < {"walls": […]}     what became of each attack, as JSON

Here each has a process of its own, behind chosen walls, and this process plays the daemon: it has a journal, a control
socket, an abstract socket and a TCP server (`staged`). `attacking_model.py` tries the same from inside a package.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import mmap
import os
import platform
import resource
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from edge_agent.host import confinement, landlock, memory, seccomp
from edge_agent.host.confinement import Confinement, Wall, confine

FILES, TCP, SIGNALS, SYSTEM_CALLS = Wall.FILES, Wall.TCP, Wall.SIGNALS, Wall.SYSTEM_CALLS
LANDLOCK = frozenset((FILES, TCP, SIGNALS))
"""Any of them makes a Landlock domain, from which no process outside can be attached to."""
NOBODY = 65534
ROOT = "only root may do this anyhow"

_NUMBERS = {
    name: numbers[seccomp.of_this_host().column]  # type: ignore[union-attr]
    for group in (*seccomp.REFUSED.values(), seccomp.MISSING)
    for name, numbers in group.items()
}
_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What an attack can aim at.

    Attributes:
        state: the daemon's folder, in which the journal and the cache are.
        package, other_package: the attacker's own and another model's, each with its `MLmodel`.
        scratch: where the attacker may write.
        control, datagrams: Unix sockets, for connections and for datagrams.
        abstract: name of an abstract socket.
        daemon: its process.
        port: TCP, on 127.0.0.1; something listens there.
        address: eight bytes of the daemon's memory.
    """

    state: Path
    journal: Path
    blob: Path
    package: Path
    other_package: Path
    credential: Path
    scratch: Path
    control: Path
    datagrams: Path
    abstract: str
    daemon: int
    port: int
    address: int

    def document(self) -> dict[str, str | int]:
        """For `of` in another process."""
        return {name: value if isinstance(value, int) else str(value) for name, value in vars(self).items()}

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Scene:
        """
        Args:
            document: what `document` gave.
        """
        paths = {each.name for each in fields(cls) if each.type == "Path"}
        values: dict[str, Any] = {
            name: Path(value) if name in paths else value for name, value in document.items()
        }
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class Attack:
    """One thing to try.

    Attributes:
        walls: each of them alone stops it.
        unless: why it may fail without walls; empty where it never does.
        ordinary: it is tried by an ordinary user, since root is not held.
    """

    run: Callable[[Scene], None]
    walls: frozenset[Wall]
    unless: str = ""
    ordinary: bool = False


ATTACKS: dict[str, Attack] = {}


def attack(
    *walls: Wall | frozenset[Wall], unless: str = "", ordinary: bool = False
) -> Callable[[Callable[[Scene], None]], Callable[[Scene], None]]:
    found = frozenset[Wall]().union(*(wall if isinstance(wall, frozenset) else {wall} for wall in walls))

    def enter(run: Callable[[Scene], None]) -> Callable[[Scene], None]:
        name = run.__name__.replace("_", " ")
        ATTACKS[name] = Attack(run=run, walls=found, unless=unless, ordinary=ordinary)
        return run

    return enter


def call(name: str, *arguments: int | bytes | None) -> int:
    """A system call by its number.

    Raises:
        OSError: the kernel refuses it.
    """
    passed = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]
    result: int = _LIBC.syscall(ctypes.c_long(_NUMBERS[name] or -1), *passed)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def reach(name: str, *arguments: int | bytes | None) -> None:
    """A system call with arguments that make no sense: one that the kernel looks at has got through."""
    try:
        call(name, *arguments)
    except OSError as error:
        if error.errno in (errno.EPERM, errno.ENOSYS):
            raise


# --- Files --------------------------------------------------------------------------------------------

GUARDS_LENGTH = (FILES, SYSTEM_CALLS) if landlock.abi() >= 3 else (SYSTEM_CALLS,)


@attack(FILES)
def read_the_journal(scene: Scene) -> None:
    scene.journal.read_bytes()


@attack(FILES)
def write_the_journal(scene: Scene) -> None:
    scene.journal.open("r+b").write(b"x")


@attack(FILES)
def lock_the_journal(scene: Scene) -> None:
    fcntl.lockf(scene.journal.open("r+b"), fcntl.LOCK_EX)


@attack(*GUARDS_LENGTH)
def truncate_the_journal(scene: Scene) -> None:
    os.truncate(scene.journal, 0)


@attack(FILES, SYSTEM_CALLS)
def truncate_the_journal_as_a_reader(scene: Scene) -> None:
    os.open(scene.journal, os.O_RDONLY | os.O_TRUNC)


@attack(*GUARDS_LENGTH)
def truncate_the_journal_with_no_access(scene: Scene) -> None:
    os.open(scene.journal, 3 | os.O_TRUNC)


@attack(FILES)
def read_a_credential(scene: Scene) -> None:
    scene.credential.read_bytes()


@attack(FILES)
def read_etc_passwd(scene: Scene) -> None:
    Path("/etc/passwd").read_bytes()


@attack(FILES)
def list_the_state_folder(scene: Scene) -> None:
    os.listdir(scene.state)  # noqa: PTH208


@attack(FILES)
def read_another_package(scene: Scene) -> None:
    (scene.other_package / "MLmodel").read_bytes()


@attack(FILES)
def read_through_a_link_of_its_own(scene: Scene) -> None:
    (scene.scratch / "link").symlink_to(scene.journal)
    (scene.scratch / "link").read_bytes()


@attack(FILES)
def write_its_own_package(scene: Scene) -> None:
    (scene.package / "MLmodel").write_bytes(b"x")


@attack(FILES)
def write_a_blob(scene: Scene) -> None:
    scene.blob.write_bytes(b"x")


@attack(FILES)
def remove_a_blob(scene: Scene) -> None:
    scene.blob.unlink()


@attack(FILES)
def link_a_blob_into_its_own_folder(scene: Scene) -> None:
    os.link(scene.blob, scene.scratch / "blob")


@attack(FILES)
def move_a_package_away(scene: Scene) -> None:
    scene.package.rename(scene.state / "gone")


@attack(FILES)
def write_outside(scene: Scene) -> None:
    (scene.state / "new").write_bytes(b"x")


@attack(FILES)
def make_a_folder_outside(scene: Scene) -> None:
    (scene.state / "new").mkdir()


@attack(FILES)
def make_a_link_outside(scene: Scene) -> None:
    (scene.state / "new").symlink_to("/etc/passwd")


@attack(FILES)
def make_a_fifo_in_its_own_folder(scene: Scene) -> None:
    os.mkfifo(scene.scratch / "fifo")


@attack(FILES)
def open_a_terminal(scene: Scene) -> None:
    os.open("/dev/ptmx", os.O_RDWR)


@attack(FILES)
def see_the_connections_of_the_host(scene: Scene) -> None:
    Path("/proc/net/unix").read_bytes()


@attack(FILES)
def make_itself_precious_when_memory_is_short(scene: Scene) -> None:
    Path("/proc/self/oom_score_adj").write_text("500")


@attack(SYSTEM_CALLS)
def change_a_mode(scene: Scene) -> None:
    scene.journal.chmod(0o666)


@attack(SYSTEM_CALLS)
def change_a_mode_the_new_way(scene: Scene) -> None:
    call("fchmodat2", -100, bytes(scene.journal), 0o666, 0)


@attack(SYSTEM_CALLS)
def change_an_owner(scene: Scene) -> None:
    os.chown(scene.journal, os.getuid(), os.getgid())


@attack(SYSTEM_CALLS, unless="the file system has no attributes")
def set_an_attribute(scene: Scene) -> None:
    os.setxattr(scene.journal, "user.x", b"x")


@attack(SYSTEM_CALLS)
def change_a_time(scene: Scene) -> None:
    os.utime(scene.journal, (0, 0))


@attack(SYSTEM_CALLS)
def watch_the_journal(scene: Scene) -> None:
    watch = call("inotify_init1", 0)
    call("inotify_add_watch", watch, bytes(scene.journal), 0x2)


@attack(SYSTEM_CALLS)
def keep_the_daemon_from_its_package(scene: Scene) -> None:
    fcntl.flock(os.open(scene.package, os.O_RDONLY), fcntl.LOCK_EX)


@attack(SYSTEM_CALLS)
def have_the_daemon_wait_for_a_lease(scene: Scene) -> None:
    fcntl.fcntl(os.open(scene.package / "MLmodel", os.O_RDONLY), fcntl.F_SETLEASE, fcntl.F_WRLCK)


@attack(SYSTEM_CALLS, unless="the file system has no such number")
def change_the_number_of_a_file(scene: Scene) -> None:
    descriptor = os.open(scene.package / "MLmodel", os.O_RDONLY)
    try:
        fcntl.ioctl(descriptor, 0x40087602, struct.pack("i", 7))  # FS_IOC_SETVERSION
    finally:
        os.close(descriptor)


@attack(Wall.DESCRIPTORS)
def use_an_open_file_of_the_daemon(scene: Scene) -> None:
    wanted = scene.journal.stat()
    for number in range(min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 1 << 20)):
        with suppress(OSError):
            if os.path.samestat(os.fstat(number), wanted):
                os.pread(number, 10, 0)
                return
    raise OSError(errno.EBADF, "the journal is not open here")


# --- Other processes ----------------------------------------------------------------------------------


@attack(FILES)
def read_the_environment_of_the_daemon(scene: Scene) -> None:
    Path(f"/proc/{scene.daemon}/environ").read_bytes()


@attack(LANDLOCK)
def read_the_memory_of_the_daemon(scene: Scene) -> None:
    descriptor = os.open(f"/proc/{scene.daemon}/mem", os.O_RDONLY)
    os.pread(descriptor, 8, scene.address)


@attack(LANDLOCK, SYSTEM_CALLS)
def trace_the_daemon(scene: Scene) -> None:
    call("ptrace", 0x4206, scene.daemon, 0, 0)  # PTRACE_SEIZE: it goes on


def _vector(address: int) -> bytes:
    return address.to_bytes(8, sys.byteorder) + (8).to_bytes(8, sys.byteorder)


@attack(LANDLOCK, SYSTEM_CALLS)
def read_the_memory_of_the_daemon_by_a_call(scene: Scene) -> None:
    own = ctypes.create_string_buffer(8)
    local = _vector(ctypes.addressof(own))
    call("process_vm_readv", scene.daemon, local, 1, _vector(scene.address), 1, 0)


@attack(LANDLOCK, SYSTEM_CALLS)
def write_the_memory_of_the_daemon(scene: Scene) -> None:
    own = ctypes.create_string_buffer(8)
    local = _vector(ctypes.addressof(own))
    call("process_vm_writev", scene.daemon, local, 1, _vector(scene.address), 1, 0)


@attack(SIGNALS, SYSTEM_CALLS)
def send_the_daemon_a_signal(scene: Scene) -> None:
    os.kill(scene.daemon, signal.SIGURG)


@attack(SIGNALS, SYSTEM_CALLS)
def send_the_daemon_a_signal_by_descriptor(scene: Scene) -> None:
    call("pidfd_send_signal", call("pidfd_open", scene.daemon, 0), signal.SIGURG, None, 0)


@attack(SYSTEM_CALLS)
def have_the_kernel_send_the_daemon_signals(scene: Scene) -> None:
    ours, _ = socket.socketpair()
    fcntl.fcntl(ours, fcntl.F_SETOWN, scene.daemon)


@attack(LANDLOCK, SYSTEM_CALLS)
def take_a_descriptor_of_the_daemon(scene: Scene) -> None:
    call("pidfd_getfd", call("pidfd_open", scene.daemon, 0), 0, 0)


@attack(SYSTEM_CALLS)
def limit_the_daemon(scene: Scene) -> None:
    resource.prlimit(scene.daemon, resource.RLIMIT_CORE, resource.prlimit(0, resource.RLIMIT_CORE))


@attack(SYSTEM_CALLS)
def slow_the_daemon_down(scene: Scene) -> None:
    os.setpriority(os.PRIO_PROCESS, scene.daemon, os.getpriority(os.PRIO_PROCESS, scene.daemon))


@attack(SYSTEM_CALLS)
def move_the_daemon_to_another_cpu(scene: Scene) -> None:
    os.sched_setaffinity(scene.daemon, os.sched_getaffinity(scene.daemon))


@attack(SYSTEM_CALLS)
def leave_its_group_so_that_it_is_not_killed_with_it(scene: Scene) -> None:
    os.setpgid(0, 0)


@attack(SYSTEM_CALLS)
def become_readable_again(scene: Scene) -> None:
    if _LIBC.prctl(4, *map(ctypes.c_ulong, (1, 0, 0, 0))) != 0:
        raise OSError(ctypes.get_errno(), "refused")


@attack(SYSTEM_CALLS)
def share_memory_with_other_processes(scene: Scene) -> None:
    call("shmget", 0, 4096, 0o600)


@attack(SYSTEM_CALLS)
def start_a_process(scene: Scene) -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


@attack(SYSTEM_CALLS)
def start_many_processes(scene: Scene) -> None:
    children = []
    for _ in range(50):
        child = os.fork()
        if child == 0:
            signal.pause()
        children.append(child)
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@attack(SYSTEM_CALLS, FILES)
def spawn_a_program(scene: Scene) -> None:
    child = os.posix_spawn("/bin/true", ["true"], {})
    _, status = os.waitpid(child, 0)
    if status:
        raise PermissionError(errno.EPERM, "the child could not run the program")


@attack(SYSTEM_CALLS, FILES)
def become_another_program(scene: Scene) -> None:
    os.execv("/bin/true", ["true"])


@attack(SYSTEM_CALLS)
def become_a_program_that_is_in_no_file(scene: Scene) -> None:
    program = call("memfd_create", b"x", 0)
    os.write(program, _smallest_program())
    os.execve(program, ["true"], {})


def _smallest_program() -> bytes:
    """A static ELF file that ends with 0: it needs no loader, which Landlock would refuse to run."""
    codes = {
        "x86_64": (62, bytes.fromhex("b83c00000031ff0f05")),  # exit(0)
        "aarch64": (183, bytes.fromhex("a80b8052000080d2010000d4")),
    }
    machine, code = codes[platform.machine()]
    base, start = 0x400000, 64 + 56
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", 2, machine, 1, base + start, 64, 0, 0, 64, 56, 1, 0, 0, 0
    )
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, start + len(code), start + len(code), 0x1000)
    return header + segment + code


# --- Sockets ------------------------------------------------------------------------------------------


@attack(TCP, SYSTEM_CALLS)
def connect_to_a_tcp_port(scene: Scene) -> None:
    socket.create_connection(("127.0.0.1", scene.port), 10)


@attack(TCP, SYSTEM_CALLS)
def serve_a_tcp_port(scene: Scene) -> None:
    socket.create_server(("127.0.0.1", 0))


@attack(SYSTEM_CALLS)
def send_a_datagram(scene: Scene) -> None:
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", 9))


@attack(SYSTEM_CALLS)
def ask_the_kernel_for_its_network(scene: Scene) -> None:
    socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)


@attack(SYSTEM_CALLS)
def make_whoever_closes_its_socket_wait(scene: Scene) -> None:
    ours, _ = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 20))


@attack(SYSTEM_CALLS)
def connect_to_the_control_socket(scene: Scene) -> None:
    socket.socket(socket.AF_UNIX).connect(str(scene.control))


@attack(SIGNALS, SYSTEM_CALLS)
def connect_to_an_abstract_socket(scene: Scene) -> None:
    socket.socket(socket.AF_UNIX).connect(f"\0{scene.abstract}")


@attack(SYSTEM_CALLS)
def write_to_a_socket_from_a_pair_of_its_own(scene: Scene) -> None:
    ours, _ = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    ours.sendto(b"x", str(scene.datagrams))


# --- The kernel ---------------------------------------------------------------------------------------


@attack(SYSTEM_CALLS, unless="the kernel's io_uring may be switched off")
def use_io_uring(scene: Scene) -> None:
    call("io_uring_setup", 1, bytes(120))


@attack(SYSTEM_CALLS, unless="vm.unprivileged_userfaultfd may be 0")
def use_userfaultfd(scene: Scene) -> None:
    call("userfaultfd", 0)


@attack(SYSTEM_CALLS, unless="user namespaces may be switched off")
def make_a_user_namespace(scene: Scene) -> None:
    call("unshare", 0x10000000)


@attack(SYSTEM_CALLS, FILES, unless=ROOT)
def mount_something(scene: Scene) -> None:
    folder = bytes(scene.scratch)
    if _LIBC.mount(b"none", folder, b"tmpfs", ctypes.c_ulong(0), None) != 0:
        raise OSError(ctypes.get_errno(), "refused")
    _LIBC.umount2(folder, 2)


@attack(SYSTEM_CALLS, unless=ROOT)
def change_the_root(scene: Scene) -> None:
    os.chroot(scene.scratch)


@attack(SYSTEM_CALLS)
def read_a_keyring(scene: Scene) -> None:
    reach("keyctl", 0, -4, 1, 0, 0)


@attack(SYSTEM_CALLS, unless=ROOT)
def load_a_program_into_the_kernel(scene: Scene) -> None:
    reach("bpf", 99, None, 0)


@attack(SYSTEM_CALLS, unless="kernel.perf_event_paranoid")
def use_performance_counters(scene: Scene) -> None:
    reach("perf_event_open", None, 0, -1, -1, 0)


@attack(SYSTEM_CALLS, unless=ROOT)
def load_a_module(scene: Scene) -> None:
    reach("finit_module", -1, b"", 0)


@attack(SYSTEM_CALLS)
def use_another_layout_of_memory(scene: Scene) -> None:
    call("personality", 0xFFFFFFFF)


# --- Too much of something ----------------------------------------------------------------------------


@attack(Wall.LIMITS)
def write_a_huge_file(scene: Scene) -> None:
    (scene.scratch / "huge").open("wb").truncate(confinement.FILE_BYTES + 1)


@attack(Wall.LIMITS)
def take_more_memory_than_there_is(scene: Scene) -> None:
    quarter = (memory.total_bytes() + confinement.MEMORY_MARGIN_BYTES) // 4
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    [mmap.mmap(-1, quarter, flags=flags) for _ in range(5)]


@attack(Wall.LIMITS, ordinary=True)
def start_many_threads(scene: Scene) -> None:
    done = threading.Event()
    threading.stack_size(64 << 10)
    try:
        for _ in range(_threads_of_this_host() + 2 * confinement.TASKS):
            threading.Thread(target=done.wait, daemon=True).start()
    except RuntimeError as error:  # can't start new thread
        raise OSError(errno.EAGAIN, "no more threads") from error
    finally:
        done.set()


def _threads_of_this_host() -> int:
    """What the limit of threads is counted from, without /proc. Source: sysinfo(2)."""
    found = ctypes.create_string_buffer(112)
    _LIBC.sysinfo(found)
    (threads,) = struct.unpack_from("=H", found, 80)
    return int(threads)


def outcome(chosen: Attack, scene: Scene) -> str:
    """Tries it in this process, which it may change, end, or make another program of.

    Returns:
        empty if it succeeded, else the error that it met.
    """
    try:
        chosen.run(scene)
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is no success
        return f"{type(error).__name__}: {error}"
    return ""


# --- The stage ----------------------------------------------------------------------------------------


@contextmanager
def staged(folder: Path) -> Iterator[Scene]:
    """A device's folders and sockets in an empty folder; this process is the daemon, and has the journal open."""
    for name in ("state/package", "state/other-package", "scratch"):
        (folder / name).mkdir(parents=True)
    state = folder / "state"
    for name in ("journal.db", "blob", "package/MLmodel", "other-package/MLmodel"):
        (state / name).write_bytes(b"secret content")
    (folder / "mqtt-password").write_bytes(b"secret")
    secret = ctypes.create_string_buffer(b"a secret")
    with (
        (state / "journal.db").open("rb") as journal,
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_UNIX) as control,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        scene = Scene(
            state=state,
            journal=Path(journal.name),
            blob=state / "blob",
            package=state / "package",
            other_package=state / "other-package",
            credential=folder / "mqtt-password",
            scratch=folder / "scratch",
            control=state / "control.sock",
            datagrams=state / "datagrams.sock",
            abstract=f"attacks-{os.getpid()}-{journal.fileno()}",
            daemon=os.getpid(),
            port=server.getsockname()[1],
            address=ctypes.addressof(secret),
        )
        control.bind(str(scene.control))
        control.listen()
        datagrams.bind(str(scene.datagrams))
        abstract.bind(f"\0{scene.abstract}")
        abstract.listen()
        yield scene


def _become_ordinary() -> None:
    """An ordinary user's process, which others of that user may look into."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        _LIBC.prctl(4, *map(ctypes.c_ulong, (1, 0, 0, 0)))


def _try(chosen: Attack, scene: Scene, walls: frozenset[Wall]) -> str:
    """What became of it in a process of its own: empty if it succeeded, else the error."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with suppress(BaseException):
            os.close(reading)
            if chosen.ordinary:
                _become_ordinary()
            _confine(scene, walls, keep=(writing,))
            os.write(writing, (outcome(chosen, scene) or "done").encode())
            os._exit(0)
        os._exit(1)
    os.close(writing)
    with open(reading, "rb") as answers:
        answer = answers.read().decode()
    _, status = os.waitpid(child, 0)
    if not answer and status == 0:
        answer = "done"  # it has become another program
    return "" if answer == "done" else answer or f"status {status}"


def _confine(scene: Scene, walls: frozenset[Wall], keep: tuple[int, ...]) -> None:
    for wall in set(Wall) - walls:
        confinement.BUILDERS[wall] = lambda _: None
    confine(Confinement(read=(scene.package,), write=(scene.scratch,), keep=keep))


def main() -> None:
    walls = frozenset(map(Wall, json.load(sys.stdin)["walls"]))
    memory.total_bytes()  # an ordinary user may not be allowed to import what it needs
    found: dict[str, str] = {}
    for number, (name, chosen) in enumerate(ATTACKS.items()):
        with staged(Path(sys.argv[1]) / str(number)) as scene:
            found[name] = _try(chosen, scene, walls)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
