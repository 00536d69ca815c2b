"""Manifests: the path rules, and that what is written is what is read."""

from __future__ import annotations

import json
from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.errors import ManifestError
from edge_agent.package import manifest as manifests
from edge_agent.package.manifest import ManifestFile, check_path, check_paths

DIGEST = "0" * 64
PARTS = st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


@given(st.lists(PARTS, min_size=1, max_size=5).map("/".join))
def test_an_accepted_path_stays_inside_the_package(path: str) -> None:
    try:
        check_path(path)
    except ManifestError:
        return
    pure = PurePosixPath(path)
    assert not pure.is_absolute()
    assert ".." not in pure.parts
    assert str(pure) == path
    assert "\\" not in path
    assert not any(ord(character) < 32 for character in path)


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/etc/passwd",
        "../MLmodel",
        "a/../../b",
        "a//b",
        "./a",
        "a/.",
        "a/",
        "a\\b",
        "a\nb",
        "a\0b",
        "a\x7fb",
        "x" * 256,
        "/".join(["x" * 200] * 3),
        "\ud800",
    ],
)
def test_a_hostile_path_is_refused(path: str) -> None:
    with pytest.raises(ManifestError):
        check_path(path)


@pytest.mark.parametrize("paths", [["MLmodel", "mlmodel"], ["a", "a/b"], ["straße", "STRASSE"], ["A/x", "a"]])
def test_paths_that_collide_are_refused(paths: list[str]) -> None:
    with pytest.raises(ManifestError):
        check_paths(paths)


@given(st.sets(st.from_regex(r"[a-z]{1,8}", fullmatch=True), min_size=1, max_size=8), st.integers(0, 1 << 40))
def test_an_encoded_manifest_is_read_back_equal(names: set[str], size: int) -> None:
    made = manifests.make("m", (ManifestFile(path=n, size_bytes=size, sha256=DIGEST) for n in names))
    assert manifests.parse(made.encode()) == made


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"name": ""},
        {"files": []},
        {"files": {}},
        {"extra": 1},
        {"files": [{"path": "a", "size": -1, "sha256": DIGEST}]},
        {"files": [{"path": "a", "size": True, "sha256": DIGEST}]},
        {"files": [{"path": "a", "size": 1, "sha256": "A" * 64}]},
        {"files": [{"path": "../a", "size": 1, "sha256": DIGEST}]},
        {"files": [{"path": "a", "size": 1}]},
    ],
)
def test_a_manifest_that_breaks_a_rule_is_refused(change: dict[str, object]) -> None:
    document = {"format": 1, "name": "m", "files": [{"path": "a", "size": 1, "sha256": DIGEST}], **change}
    with pytest.raises(ManifestError):
        manifests.parse(json.dumps(document).encode())


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b" " * (1 << 21)])
def test_what_is_no_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(ManifestError):
        manifests.parse(data)
