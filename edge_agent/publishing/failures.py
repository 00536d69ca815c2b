"""What a registry's failure means to a publisher: one sentence, without credentials, and what to do."""

from __future__ import annotations

import re

from edge_agent.errors import PublishError


def failed(registry_uri: str, step: str, error: Exception) -> PublishError:
    """An error of MLflow, or of a client below it, in a step that a person knows."""
    return PublishError(f"{shown(registry_uri)}: could not {step}: {_reason(error)}", remedy=_remedy(error))


def _remedy(error: Exception) -> str:
    text = str(error)
    if isinstance(error, ImportError):
        library = "edge-agent[s3]" if error.name == "boto3" else error.name
        return f"the registry keeps its files in a store that this host has no client for: install {library}"
    if "Unable to locate credentials" in text or "partial credentials" in text.lower():
        return "the store of the registry's files needs them: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    if "(AccessDenied)" in text or "(InvalidAccessKeyId)" in text or "(SignatureDoesNotMatch)" in text:
        return "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and what they may write"
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return (
            "if its authority is a private one, set MLFLOW_TRACKING_SERVER_CERT_PATH to that one's PEM file"
        )
    if "WRONG_VERSION_NUMBER" in text or "record layer failure" in text:
        return "what answers there does not speak TLS: is it http://?"
    if any(words in text for words in ("Max retries exceeded", "Connection", "Could not connect")):
        return "check that the server is running and that its address is right"
    if re.search(r"\b(401|403)\b|Unauthorized", text):
        return "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
    if "Response body" in text:  # not MLflow's own error
        return "see what answers there: it is not an MLflow server, or something stands before it"
    return ""


def _reason(error: Exception) -> str:
    """What the system said first: HTTP libraries put three times its length before it, and around it."""
    first: BaseException = error
    while (before := first.__cause__ or first.__context__) is not None:
        first = before
    if first is not error and isinstance(first, OSError) and first.strerror:
        return first.strerror
    return _one_line(error)


def _one_line(error: Exception) -> str:
    return re.sub(r"://[^/@\s]+@", "://", " ".join(str(error).split()))[:400]


def shown(uri: str) -> str:
    """A URL without credentials."""
    return re.sub(r"://[^/@]*@", "://", uri)
