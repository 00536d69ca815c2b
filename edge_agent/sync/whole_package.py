"""Files of a store that MLflow's client reaches by itself and gives whole only: Azure, Google Cloud, and others."""

from __future__ import annotations

import errno
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_agent.cache import durable
from edge_agent.cache.disk import store_error, store_errors
from edge_agent.errors import EdgeAgentError, VerificationError
from edge_agent.package.manifest import MAX_MANIFEST_BYTES, check_path
from edge_agent.sync.files import Listed, Stream, walk
from edge_agent.sync.pace import CHUNK_BYTES

if TYPE_CHECKING:
    from edge_agent.sync.registry import Registry


class WholePackage:
    """Each file whole, through a folder in staging.

    MLflow's clients of these stores have no resume and no bound: the one call that all of them share takes a
    remote path and a local one, and no offset. So files that are whole are kept over an interruption, and the one
    that was interrupted comes again. Here it may not grow over its listed size, and what it takes is in the cache's
    own file system, where the quota counts it.

    Args:
        scratch: that folder, to be made.
        dropped: told how many bytes of a file came before its download failed.
    """

    whole_files = True
    over_line = True

    def __init__(
        self, repository: Any, registry: Registry, scratch: Path, *, dropped: Callable[[int], None]
    ) -> None:
        self._repository = repository
        self._dropped = dropped
        self._registry = registry
        self._scratch = scratch
        self._sizes_bytes: dict[str, int] = {}

    def listing(self) -> list[Listed]:
        with self._registry.errors():
            found = walk(self._repository)
        self._sizes_bytes = {file.path: file.size_bytes for file in found}
        return found

    @contextmanager
    def open(self, path: str, *, offset: int = 0, etag: str = "") -> Iterator[Stream]:
        target = self._scratch / "file"
        try:
            with store_errors("write", self._scratch):
                durable.remove_tree(self._scratch)  # of a process that died
                durable.make_folder(self._scratch)
            self._download(check_path(path), target)
            with target.open("rb") as file:
                durable.unlink(target)  # the open file is enough, and goes with the process
                yield Stream(start=0, etag="", chunks=iter(lambda: file.read(CHUNK_BYTES), b""))
        finally:
            durable.remove_tree(self._scratch)

    def _download(self, path: str, target: Path) -> None:
        limit_bytes = self._sizes_bytes.get(path, MAX_MANIFEST_BYTES)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
        try:
            with self._registry.errors():
                self._repository._download_file(path, str(target))
        except EdgeAgentError as error:
            with suppress(OSError):
                self._dropped(target.stat().st_size)
            cause = error.__cause__
            number = cause.errno if isinstance(cause, OSError) else None
            if number == errno.EFBIG:
                raise VerificationError(f"{path!r} has more than the listed {limit_bytes} bytes") from error
            if isinstance(cause, OSError) and number in (errno.ENOSPC, errno.EDQUOT):
                raise store_error("write", target, cause) from cause
            raise
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
