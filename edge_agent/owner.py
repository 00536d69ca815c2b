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

from edge_agent import settings
from edge_agent.errors import StoreError


@contextmanager
def acting_as_owner_of(state_dir: Path) -> Iterator[None]:
    """Root becomes the owner of the state directory for the block; anybody else stays who they are.

    The registry's credentials, which only root can read, are taken along in the environment. Not for a process
    with threads: they would all change.

    Raises:
        StoreError: the owner is no user of this host.
    """
    owner = _other_owner(state_dir) if os.geteuid() == 0 else None
    if owner is None:
        yield
        return
    settings.take_credentials_along()
    groups = os.getgroups()
    os.initgroups(owner.pw_name, owner.pw_gid)
    os.setresgid(owner.pw_gid, owner.pw_gid, 0)
    os.setresuid(owner.pw_uid, owner.pw_uid, 0)  # the saved 0 is lost to every process that is started
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)
        os.setresgid(0, 0, 0)
        os.setgroups(groups)


def _other_owner(state_dir: Path) -> pwd.struct_passwd | None:
    try:
        user_id = state_dir.stat().st_uid
    except OSError:
        return None  # it will be made, or the error will say more
    return _user(user_id, state_dir) if user_id else None


def _user(user_id: int, state_dir: Path) -> pwd.struct_passwd:
    """Root cannot become somebody who has no name and no groups here, and must not write in their place.

    Raises:
        StoreError: there is no such user.
    """
    try:
        return pwd.getpwuid(user_id)
    except KeyError as error:
        raise StoreError(
            f"{state_dir} belongs to #{user_id}, who could not read what root puts there",
            remedy=f"start the daemon, or use `sudo -u '#{user_id}' edge-agent …`",
        ) from error
