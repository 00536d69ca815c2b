"""What a sync can still do behind its walls, and what not. Its own tests show that it brings versions all the same."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from edge_agent.cache.store import Store
from edge_agent.host.confinement import Wall
from edge_agent.sync.protocol import RegistryJob, SyncJob, TrustJob
from edge_agent.sync.tls import NO_FILES, TlsFiles
from edge_agent.sync.walls import around_question, around_sync

pytestmark = pytest.mark.attack

ROOT = Path(__file__).parents[2]
REMOTE = "https://mlflow.example:5000"

PROGRAM = """
import json, os, socket, subprocess, sys
from pathlib import Path
from edge_agent.host.confinement import confine
from edge_agent.sync.protocol import SyncJob
from edge_agent.sync.walls import around_sync
job = SyncJob.parse(sys.argv[1].encode())
state, scratch, port = Path(job.state_dir), Path(sys.argv[2]), int(sys.argv[3])
walls = confine(around_sync(job, scratch=scratch, keep=1))
models = state / "models"

def in_another_program(code):
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)

ACTIONS = {
    "write staging": lambda: (models / "staging" / "part").write_text("x"),
    "move into blobs": lambda: (models / "staging" / "part").rename(models / "blobs" / "sha256" / "part"),
    "link a blob": lambda: os.link(models / "blobs" / "sha256" / "part", models / "versions" / "part"),
    "make it read-only": lambda: (models / "blobs" / "sha256" / "part").chmod(0o400),
    "connect": lambda: socket.create_connection(("127.0.0.1", port), 10),
    "read a key": lambda: Path(job.trust.public_keys[0]).read_text(),
    "run python": lambda: in_another_program("import json"),
    "write its own": lambda: (scratch / "x").write_text("x"),
    "read the journal": lambda: (state / "journal.db").read_text(),
    "write the journal": lambda: (state / "journal.db").open("r+").write("x"),
    "read a secret": lambda: (state.parent / "mqtt-password").read_text(),
    "read it in another program": lambda: in_another_program(f"open({str(state / 'journal.db')!r}).read()"),
    "run another program": lambda: subprocess.run(["/bin/true"], check=True),
    "signal the daemon": lambda: os.kill(os.getppid(), 23),
    "serve": lambda: socket.create_server(("127.0.0.1", 0)),
    "look into the daemon": lambda: Path(f"/proc/{os.getppid()}/environ").read_bytes(),
}
found = {}
for name, act in ACTIONS.items():
    try:
        act()
        found[name] = "done"
    except (OSError, subprocess.CalledProcessError) as error:
        found[name] = type(error).__name__
print(json.dumps({"found": found, "stand": walls.stand}))
"""


def test_a_sync_writes_the_cache_and_nothing_else(tmp_path: Path) -> None:
    state, scratch, key = tmp_path / "state", tmp_path / "scratch", tmp_path / "key.pem"
    Store(state).create()
    scratch.mkdir()
    for file in (state / "journal.db", tmp_path / "mqtt-password", key):
        file.write_text("content")
    job = SyncJob(
        state_dir=str(state),
        registry=RegistryJob(uri=REMOTE),
        name="assistant",
        ref="models:/phi@prod",
        trust=TrustJob(public_keys=(str(key),)),
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        result = subprocess.run(
            [sys.executable, "-c", PROGRAM, job.encode().decode(), str(scratch), str(server.getsockname()[1])],
            capture_output=True, text=True, timeout=60, check=False, cwd=ROOT,
        )  # fmt: skip
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert set(document["stand"]) == set(Wall) - {Wall.TCP}
    done = {name for name, outcome in document["found"].items() if outcome == "done"}
    assert done == {
        "write staging", "move into blobs", "link a blob", "make it read-only", "connect", "read a key",
        "run python", "write its own",
    }, document["found"]  # fmt: skip


@pytest.mark.parametrize(
    ("uri", "whole_disk", "written"),
    [
        (REMOTE, False, ()),
        ("http://127.0.0.1:5000", True, ()),
        ("sqlite:////srv/registry/mlflow.db?x=1", True, (Path("/srv/registry"),)),
    ],
)
def test_only_a_registry_of_this_device_may_name_its_folders(
    uri: str, whole_disk: bool, written: tuple[Path, ...]
) -> None:
    scratch = Path("/srv/scratch")
    question = around_question(uri, tls=NO_FILES, scratch=scratch)
    assert (Path("/") in question.read, question.write) == (whole_disk, (scratch, *written))
    job = SyncJob(state_dir="/srv/state", registry=RegistryJob(uri=uri), name="a", ref="models:/a@b")
    sync = around_sync(job, scratch=None, keep=os.dup(1))
    assert (Path("/") in sync.read, sync.write) == (whole_disk, (Path("/srv/state/models"), *written))
    os.close(sync.keep[0])


def test_what_variables_name_may_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/srv/ca.pem")
    monkeypatch.setenv("HOME", "/srv/home")
    tls = TlsFiles(ca_file="/srv/own.pem", cert_file="/srv/cert.pem", key_file="/srv/key.pem")
    read = around_question(REMOTE, tls=tls, scratch=Path("/srv/scratch")).read
    named = ("ca", "own", "cert", "key")
    assert {*(Path(f"/srv/{name}.pem") for name in named), Path("/srv/home/.aws")} <= set(read)
    assert Path("/srv/home") not in read
