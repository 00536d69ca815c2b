"""nginx with a configuration of docs/mirrors.md; only ports, places and the registry's address are others."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.support.processes import accepts, free_port, serving

DOCUMENT = Path(__file__).parents[2] / "docs" / "mirrors.md"
USER = "nobody"
"""Of nginx's workers, where this is root."""


def block(kind: str) -> str:
    """The one code block of docs/mirrors.md in this language."""
    (text,) = re.findall(rf"^```{kind}\n(.*?)^```$", DOCUMENT.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return str(text)


@contextlib.contextmanager
def nginx(folder: Path, kind: str, changes: Mapping[str, str], *, mount: Path | None = None) -> Iterator[str]:
    """A running nginx; yields where it listens, `http://127.0.0.1:PORT`.

    Args:
        folder: for its own files; others must be able to pass through it.
        changes: text of the block → what stands there in the test; each must be in it.
        mount: shown at `folder/root/blobs` as the unit's `BindReadOnlyPaths=` shows it; needs root.
    """
    port = free_port()
    server = re.sub(r"listen \d+;", f"listen 127.0.0.1:{port};", block(kind))
    for text, other in changes.items():
        assert text in server, text
        server = server.replace(text, other)
    for name in ("temporary", "root/blobs"):
        (folder / name).mkdir(parents=True)
    if os.geteuid() == 0:
        shutil.chown(folder / "temporary", USER)
    temporary = "\n".join(
        f"{kind}_temp_path {folder}/temporary;"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config = folder / "nginx.conf"
    config.write_text(
        f"{f'user {USER} nogroup;' if os.geteuid() == 0 else ''}\ndaemon off;\npid {folder}/pid;\nerror_log stderr;\n"
        f"events {{}}\nhttp {{\naccess_log off;\n{temporary}\n{server}\n}}\n"
    )
    program = shutil.which("nginx")
    assert program, "nginx is fetched by `./build.sh long-test`"
    command = [program, "-e", "stderr", "-p", str(folder), "-c", str(config)]
    if mount:
        target = folder / "root" / "blobs"
        shown = f'mount --bind -o ro "{mount}" "{target}" && exec "$@"'
        command = ["unshare", "--mount", "sh", "-c", shown, "sh", *command]
    with serving(command, folder / "nginx.log", ready=lambda: accepts(port), what="nginx"):
        yield f"http://127.0.0.1:{port}"
