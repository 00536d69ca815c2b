"""The address of a registry: what is one, and what a person is told to write instead."""

from __future__ import annotations

import pytest

from edge_agent.package.registry_uri import has_credentials, problem_of


@pytest.mark.parametrize(
    "uri",
    [
        "http://mlflow.example:5000",
        "HTTPS://mlflow.example/behind/a/path",
        "http://[::1]:5000/",
        "http://10.0.0.1",
        "sqlite:////srv/registry.db",
        "sqlite:///relative.db?timeout=5",
    ],
)
def test_what_is_supported_has_no_problem(uri: str) -> None:
    assert problem_of(uri) == ""


@pytest.mark.parametrize(
    ("uri", "problem"),
    [
        (
            "127.0.0.1:5051",
            "'127.0.0.1:5051' has no scheme: write http://127.0.0.1:5051 or https://127.0.0.1:5051",
        ),
        ("localhost:5000", "write http://localhost:5000 or"),
        ("mlflow.example/path", "write http://mlflow.example/path or"),
        ("[::1]:5000", "write http://[::1]:5000 or"),
        ("/srv/registry.db", "'/srv/registry.db' has no scheme: write sqlite:////srv/registry.db"),
        ("https//mlflow.example", "has no scheme: write http://HOST:PORT, https://HOST or sqlite"),
        (" http://mlflow.example", "has no scheme: write http://HOST"),
        ("", "has no scheme: write http://HOST"),
        ("//mlflow.example:5000", "has no scheme"),
        ("http:/mlflow.example", "names no host: write http://HOST:PORT"),
        ("http://", "names no host"),
        ("http://:5000", "names no host"),
        ("https://mlflow.example:5o00", "names no host: write https://HOST:PORT"),
        ("http://mlflow.example:70000", "names no host"),
        ("http://two words", "names no host"),
        ("sqlite://registry.db", "names no file: write sqlite:////FOLDER/FILE"),
        ("sqlite:///", "names no file"),
        ("file:///srv/mlruns", "'file:///srv/mlruns' is not supported: write http://HOST"),
        ("databricks", "'databricks' is not supported"),
        ("databricks-uc://profile", "is not supported"),
        ("s3://bucket/x", "is not supported"),
        ("postgresql+psycopg2://host/mlflow", "is a database: write the address of the MLflow server"),
    ],
)
def test_what_is_not_supported_says_what_to_write(uri: str, problem: str) -> None:
    assert problem in problem_of(uri)


@pytest.mark.parametrize(
    "uri", ["ftp://me:secret@host/x", "me:secret@host:5000", "http:/me:secret@host", "http://me:secret@:5000"]
)
def test_credentials_are_seen_and_never_repeated(uri: str) -> None:
    assert has_credentials(uri)
    assert problem_of(uri)
    assert "secret" not in problem_of(uri)
