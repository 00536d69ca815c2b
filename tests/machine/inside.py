"""What a machine's Python does there, as root, for `cuts`: `python inside.py COMMAND ARGUMENT…`.

records FOLDER       the files of an installed version that are not what their wheels had
damage JOURNAL       damages an index of a journal, and none of its rows, so that its next open rebuilds it
"""

from __future__ import annotations

import base64
import csv
import hashlib
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path


def damaged_files(folder: Path) -> Iterator[str]:
    """By the RECORD of each package. Source: the specification *Recording installed projects*."""
    for record in folder.glob("lib/python3*/site-packages/*.dist-info/RECORD"):
        packages = record.parents[1]
        with record.open(newline="") as file:
            for name, digest, _ in csv.reader(file):
                if digest and not _matches(packages / name, digest):
                    yield f"{folder.name}: {name}"


def _matches(path: Path, digest: str) -> bool:
    algorithm, _, wanted = digest.partition("=")
    try:
        found = hashlib.new(algorithm, path.read_bytes()).digest()
    except OSError:
        return False
    return base64.urlsafe_b64encode(found).rstrip(b"=").decode() == wanted


def damage_index(journal: Path) -> str:
    """Overwrites the first page of an index."""
    db = sqlite3.connect(journal)
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    (page,) = db.execute("SELECT rootpage FROM sqlite_master WHERE name='prompts_state'").fetchone()
    (size,) = db.execute("PRAGMA page_size").fetchone()
    (rows,) = db.execute("SELECT count(*) FROM prompts").fetchone()
    db.close()
    with journal.open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xaa" * size)
    return f"page {page} of {journal.name}, {rows} rows"


if __name__ == "__main__":
    if sys.argv[1] == "records":
        print("\n".join(damaged_files(Path(sys.argv[2]))))
    else:
        print(damage_index(Path(sys.argv[2])))
