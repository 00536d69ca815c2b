"""The mirrors: whether each answers, and gives a blob that this device knows.

A process of its own asks (`mirror_process.py`): what it needs is heavy, and it has walls around it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from edge_agent.cache.store import Store
from edge_agent.doctor.finding import Finding, ok, warn
from edge_agent.documents import page
from edge_agent.package.manifest import ManifestFile
from edge_agent.runner.scratch import scratch_folder
from edge_agent.settings import Settings

_TIMEOUT_S = 30.0
"""Of one mirror; importing what is needed takes a part of it from a slow SD card."""
_MAX_ANSWER_BYTES = 64 << 10
_UNKNOWN = ManifestFile(path="", size_bytes=0, sha256="0" * 64)


def check(settings: Settings) -> Iterator[Finding]:
    """Asks each mirror for the smallest blob that is in the cache; yields nothing without mirrors."""
    urls = settings.cache.mirrors
    if not urls:
        return
    known = [file for record in Store(settings.state_dir).versions() for file in record.files]
    answers = _ask(settings, min(known, key=lambda file: file.size_bytes, default=_UNKNOWN))
    for url, answer in zip(urls, answers, strict=True):
        if answer == "has":
            yield ok("mirrors.reach", f"{url} answers, and gives a blob that is in the cache")
        elif answer == "lacks":
            yield ok("mirrors.reach", f"{url} answers, and does not have what is in the cache here")
        else:
            yield warn(
                "mirrors.reach",
                f"{url}: {answer}",
                f"check cache.mirrors and what serves it, see {page('mirrors.md')};"
                " the registry brings what it does not",
            )


def _ask(settings: Settings, file: ManifestFile) -> list[str]:
    """For each mirror `has`, `lacks`, or what is wrong with it."""
    cache = settings.cache
    question = {
        "mirrors": cache.mirrors,
        "ca_file": cache.mirror_ca_file,
        "sha256": file.sha256,
        "bytes": file.size_bytes,
    }
    try:
        with scratch_folder() as scratch:
            result = subprocess.run(
                [sys.executable, "-m", "edge_agent.doctor.mirror_process"],
                input=json.dumps(question),
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_TIMEOUT_S * len(cache.mirrors),
                check=False,
                cwd=scratch or "/",
            )
        answers: Any = json.loads(result.stdout[:_MAX_ANSWER_BYTES])
        if isinstance(answers, list) and len(answers) == len(cache.mirrors):
            return [str(answer)[:300] for answer in answers]
        reason = "the answer is malformed"
    except subprocess.TimeoutExpired:
        reason = "no answer in time"
    except ValueError:
        reason = (result.stderr.strip().splitlines() or ["no answer"])[-1][:300]
    return [reason] * len(cache.mirrors)
