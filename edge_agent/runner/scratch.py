"""A private temporary folder for one child: the only place where it may write. The daemon makes and removes it.

A folder's name says whose it is: those of a daemon that was killed are removed by the next one. What a child left is
removed whatever it made of it: with a few open files however deep it is, following no link, whatever modes its folders
have, and within a time.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from edge_agent.host.clock import CLOCK, Clock

log = logging.getLogger(__name__)

PREFIX = "edge-agent-scratch-"
REMOVAL_S = 3.0
"""How long one look at what children left may take: whoever removes it has prompts waiting."""

_NOBODY = 0
"""In place of a process number: what could not be removed, and is tried again."""
_MOST_PROCESSES = 1 << 22  # PID_MAX_LIMIT


def make_scratch() -> Path | None:
    """An empty folder that only this user may enter. None if the disk takes none: most models need none."""
    try:
        _remove_orphans(Path(tempfile.gettempdir()))
        return Path(tempfile.mkdtemp(prefix=f"{_of_this_host()}{os.getpid()}-"))
    except OSError as error:
        log.warning("no temporary folder code=disk_failed reason=%r", str(error))
        return None


def remove_scratch(folder: Path | None, *, clock: Clock = CLOCK) -> None:
    """Removes it with all that the child left in it. Raises nothing.

    What cannot be removed within `REMOVAL_S` is logged, and the next `make_scratch` goes on with it.
    """
    if folder is not None:
        _remove(folder, _limit(clock))


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path | None]:
    """As `make_scratch`; the folder is removed when the block ends."""
    folder = make_scratch()
    try:
        yield folder
    finally:
        remove_scratch(folder)


def _of_this_host() -> str:
    """Process numbers mean something within their namespace only, and containers may share a folder."""
    return f"{PREFIX}{Path('/proc/self/ns/pid').stat().st_ino}-"


def _remove_orphans(folder: Path) -> None:
    is_late = _limit(CLOCK)
    for path in folder.glob(f"{_of_this_host()}*"):
        with contextlib.suppress(OSError):  # somebody else has just removed it
            if path.lstat().st_uid == os.geteuid() and not _lives(_owner(path)):
                _remove(path, is_late)


def _owner(folder: Path) -> int | None:
    """The process that made it. None if its name says nothing of the kind: whoever shares /tmp chooses names."""
    number = folder.name.removeprefix(_of_this_host()).partition("-")[0]
    return int(number) if number.isdecimal() and int(number) <= _MOST_PROCESSES else None


def _lives(pid: int | None) -> bool:
    if pid is None or pid == _NOBODY:
        return pid is None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


# --- Removing what a child left ---------------------------------------------------------------------------------


class _OutOfTime(Exception):
    """The rest has to wait."""


def _limit(clock: Clock) -> Callable[[], bool]:
    until_s = clock.now_s() + REMOVAL_S
    return lambda: clock.now_s() >= until_s


def _remove(folder: Path, is_late: Callable[[], bool]) -> None:
    try:
        with _opened(os.fspath(folder)) as top:
            while _clear(top, top, is_late):
                pass
        folder.rmdir()
    except FileNotFoundError:
        return  # somebody else has just removed it
    except Exception as error:  # noqa: BLE001 - whatever a child left there, its owner goes on
        reason = f"not within {REMOVAL_S:.0f} s" if isinstance(error, _OutOfTime) else str(error)
        log.warning("temporary folder stays code=disk_failed folder=%s reason=%r", _given_up(folder), reason)


def _given_up(folder: Path) -> Path:
    """Gives the folder to nobody, so that it does not stay for as long as its maker lives. Where it is now."""
    nobodys = folder.with_name(f"{_of_this_host()}{_NOBODY}-{uuid.uuid4().hex}")
    try:
        return folder if _owner(folder) == _NOBODY else folder.rename(nobodys)
    except OSError:
        return folder


def _clear(folder: int, top: int, is_late: Callable[[], bool]) -> int:
    """Removes what is in a folder, but for the folders in it, which move up to `top`; of `top`, those as well.

    So no folder is ever deeper than one below `top`, and depth costs neither stack, nor open files, nor long paths.

    Returns:
        How much was removed or moved. None of it is to be had if that is 0.

    Raises:
        _OutOfTime: `is_late` said so.
    """
    done = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_late():
                raise _OutOfTime
            with contextlib.suppress(OSError):  # it stays, and so does `top`
                if not entry.is_dir(follow_symlinks=False):
                    os.unlink(entry.name, dir_fd=folder)
                elif folder != top:
                    _move_up(entry.name, folder, top)
                else:
                    with _opened(entry.name, top) as inner:
                        done += _clear(inner, top, is_late)
                    os.rmdir(entry.name, dir_fd=top)
                done += 1
    return done


def _move_up(name: str, folder: int, top: int) -> None:
    with _opened(name, folder):  # a folder that may not be written to cannot be moved
        os.rename(name, uuid.uuid4().hex, src_dir_fd=folder, dst_dir_fd=top)


@contextlib.contextmanager
def _opened(name: str, within: int | None = None) -> Iterator[int]:
    """A folder as a descriptor, made accessible first, whatever its mode was. Follows no link.

    Raises:
        OSError: it is gone, no folder, or not to be had.
    """
    place = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=within)
    try:
        with contextlib.suppress(OSError):  # by its descriptor: chmod with a name may follow a link
            os.chmod(f"/proc/self/fd/{place}", 0o700)  # noqa: PTH101
        reading = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=place)
    finally:
        os.close(place)
    try:
        yield reading
    finally:
        os.close(reading)
