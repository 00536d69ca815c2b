"""Lets root's commands act as the service's user, so that the files they create belong to the service.

If root owned a lock, a version or the journal in the state directory, the daemon could not write them at its next
start. Files that root has already opened stay usable; child processes cannot become root again.
"""

from __future__ import annotations

import os
import pwd
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edge_agent import environment


@contextmanager
def acting_as_owner_of(state_dir: Path) -> Iterator[None]:
    """Switches root to the owner of the state directory for the block; does nothing for other users.

    The registry's credentials, which only root can read, are copied into the environment first. Do not use this in a
    process with threads: all of them would switch.
    """
    owner = _other_owner(state_dir) if os.geteuid() == 0 else None
    if owner is None:
        yield
        return
    environment.take_credentials_along()
    groups = os.getgroups()
    group_id, owner_groups = _groups_of(owner)
    os.setgroups(owner_groups)
    os.setresgid(group_id, group_id, 0)
    os.setresuid(owner.st_uid, owner.st_uid, 0)  # child processes do not inherit the saved 0
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)
        os.setresgid(0, 0, 0)
        os.setgroups(groups)


def _other_owner(state_dir: Path) -> os.stat_result | None:
    try:
        status = state_dir.stat()
    except OSError:
        return None  # it does not exist yet, or a later error says more
    return status if status.st_uid else None


def _groups_of(owner: os.stat_result) -> tuple[int, list[int]]:
    """The owner's primary group and all groups. If this host does not know the user (a container's volume), the
    state directory's group."""
    try:
        user = pwd.getpwuid(owner.st_uid)
    except KeyError:
        return owner.st_gid, [owner.st_gid]
    return user.pw_gid, os.getgrouplist(user.pw_name, user.pw_gid)
