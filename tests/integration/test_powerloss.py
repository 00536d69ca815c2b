"""Power loss: the power is cut at every call that changes the cache; afterwards all that has a final name is
verified, and the next start brings the update to its end.

What the default run leaves out, `./build.sh powerloss` takes: see `tests/support/power.py` for the faults.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.support.faulty_sync import SCENARIOS
from tests.support.power import EVERYTHING, Call, Fault

_LIMIT_S = 1_800
_CREATES = re.compile(r"O_CREAT|O_TRUNC")
_CHANGES = (
    *("open", "openat", "openat2", "creat", "write", "writev", "pwrite64", "pwritev", "pwritev2"),
    *("ftruncate", "truncate", "fallocate", "copy_file_range", "sendfile", "splice"),
    *("fsync", "fdatasync", "sync_file_range", "syncfs", "sync", "msync"),
    *("rename", "renameat", "renameat2", "link", "linkat", "symlink", "symlinkat"),
    *("unlink", "unlinkat", "rmdir", "mkdir", "mkdirat", "mknod", "mknodat"),
    *("chmod", "fchmod", "fchmodat", "chown", "fchown", "lchown", "fchownat"),
    *("utime", "utimes", "utimensat", "futimesat", "setxattr", "fsetxattr", "lsetxattr"),
)
_ONE_NAME = {
    "openat": "open",
    "openat2": "open",
    "creat": "open",
    "linkat": "link",
    "mkdirat": "mkdir",
    "renameat": "rename",
    "renameat2": "rename",
    "unlinkat": "unlink",
    "fchmodat": "chmod",
    "utimensat": "utime",
}


def run(folder: Path, *arguments: str, before: tuple[str, ...] = ()) -> str:
    """`tests.support.faulty_sync` in a process of its own; gives what it printed."""
    done = subprocess.run(
        [*before, sys.executable, "-m", "tests.support.faulty_sync", str(folder), *arguments],
        capture_output=True,
        text=True,
        timeout=_LIMIT_S,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4_000:]
    return done.stdout


def test_a_cut_at_every_point_leaves_only_verified_files_and_the_next_start_finishes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = try_all_points(tmp_path, SCENARIOS, (Fault.KILL, Fault.TEAR, Fault.DROP))
    show_and_check(found, capsys)


def test_a_full_disk_or_a_half_forgetful_one_at_every_point_does_no_harm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scenarios = SCENARIOS if EVERYTHING in os.environ else ("update",)
    found = try_all_points(tmp_path, scenarios, (Fault.MIX, Fault.FULL))
    show_and_check(found, capsys)


def try_all_points(tmp_path: Path, scenarios: tuple[str, ...], faults: tuple[Fault, ...]) -> dict[str, Any]:
    chosen = [argument for fault in faults for argument in ("--fault", fault)]
    chosen += [argument for name in scenarios for argument in ("--scenario", name)]
    chosen += ["--kill-every", "1" if EVERYTHING in os.environ else "20"]
    in_memory = Path("/dev/shm")  # thousands of small folders: the disk would be most of the time
    place = in_memory if os.access(in_memory, os.W_OK) else tmp_path
    with tempfile.TemporaryDirectory(dir=place) as folder:
        found: dict[str, Any] = json.loads(run(Path(folder) / "points", *chosen))
    assert set(found) == set(scenarios)
    assert all(set(scenario["faults"]) == set(faults) for scenario in found.values())
    return found


def show_and_check(found: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Every point was tried, and none left anything wrong."""
    wrong = []
    with capsys.disabled():
        for name, scenario in found.items():
            counts = {f: f"{r['tried']} in {r['states']} states" for f, r in scenario["faults"].items()}
            print(f"\n{name}: {scenario['points']} points, tried {counts}", end="")
    for name, scenario in found.items():
        assert scenario["points"] > 50
        for fault, result in scenario["faults"].items():
            assert result["tried"] == result["expected"] > 0, (name, fault)
            assert result["states"] > 5, (name, fault)
            wrong += result["wrong"]
    assert not wrong, f"{len(wrong)} points are wrong:\n" + "\n".join(wrong[:20])


def test_strace_sees_no_change_of_the_cache_that_is_not_a_point(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strace = shutil.which("strace")
    assert strace, "strace is not here; `./build.sh test` fetches it into .tools"
    log, calls = tmp_path / "strace.log", tmp_path / "calls.json"
    selected = ",".join(f"?{name}" for name in _CHANGES)
    command = (strace, "-f", "-y", "-qq", "-s", "0", "-e", "signal=none", "-e", f"trace={selected}")
    try:
        run(tmp_path / "run", "--trace", str(calls), before=(*command, "-o", str(log)))
    except AssertionError as error:
        raise AssertionError(f"strace could not trace a process of its own here: {error}") from error
    numbered = [Call(name, path) for name, path in json.loads(calls.read_text())]
    traced = list(_changes(log, tmp_path / "run" / "traced" / "state"))
    with capsys.disabled():
        print(f"\nstrace: {len(traced)} calls, {len(numbered)} points", end="")
    assert Counter(traced) == Counter(numbered)
    assert traced == numbered


def _changes(log: Path, state: Path) -> list[Call]:
    """The calls in strace's log that change something in the state folder, or try to, in their order."""
    found = []
    for line in _joined(log):
        match = re.match(r"\d+ +(\w+)\((.*)\) += ", line)
        assert match, f"strace wrote a line that is not understood: {line}"
        name, arguments = match.groups()
        name = "rmdir" if name == "unlinkat" and "AT_REMOVEDIR" in arguments else name
        if name in ("open", "openat", "openat2") and not _CREATES.search(arguments):
            continue
        paths = re.findall(r'"([^"]+)"', arguments) or re.findall(r"\d+<(/[^>]*)>", arguments)
        syncs = name == "fsync"  # its names; that it has one itself is from before
        inside = [p for p in map(Path, paths) if state in p.parents or (syncs and p == state)]
        if inside:
            path = inside[-1].relative_to(state).as_posix()
            found.append(Call(_ONE_NAME.get(name, name), path))
    return found


def _joined(log: Path) -> list[str]:
    """Lines of the log, with calls that another thread interrupted put together again."""
    begun: dict[str, str] = {}
    lines = []
    for line in log.read_text().splitlines():
        process = line.split(" ", 1)[0]
        if "<unfinished ...>" in line:
            begun[process] = line.split("<unfinished ...>")[0]
        elif (resumed := re.search(r"<\.\.\. \w+ resumed>(.*)", line)) and process in begun:
            lines.append(begun.pop(process) + resumed[1])
        elif "+++ " not in line:
            lines.append(line)
    return lines
