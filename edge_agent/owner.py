"""Root's commands beside a stopped service work as the service's user: what they make must be the service's.

A lock, a version or a journal of root's own in the state directory is one that the daemon cannot write when it
starts again. Files that root has opened before stay usable; processes started meanwhile have no way back to root.
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
    """Root becomes the owner of the state directory for the block; anybody else stays who they are.

    The registry's credentials, which only root can read, are taken along in the environment. Not for a process
    with threads: they would all change.
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
    os.setresuid(owner.st_uid, owner.st_uid, 0)  # the saved 0 is lost to every process that is started
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
        return None  # it will be made, or the error will say more
    return status if status.st_uid else None


def _groups_of(owner: os.stat_result) -> tuple[int, list[int]]:
    """The owner's own group and all of their groups; of one who is no user of this host (a container's volume), the
    state directory's."""
    try:
        user = pwd.getpwuid(owner.st_uid)
    except KeyError:
        return owner.st_gid, [owner.st_gid]
    return user.pw_gid, os.getgrouplist(user.pw_name, user.pw_gid)
