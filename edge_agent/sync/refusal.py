"""A registry that does not let this device in: how that is recognised, and what to say of it.

A refusal is an answer: nobody retries it, and the registry counts as reached. It comes as MLflow's own error, as a
plain HTTP status of a file, or from a gateway before the registry that has words of its own.
"""

from __future__ import annotations

import re

from edge_agent.errors import RegistryRefused

STATUSES = frozenset((401, 403))
_CREDENTIALS = (
    "write /etc/credstore/mlflow-tracking-token, or mlflow-tracking-username and mlflow-tracking-password, and restart "
    "the service; without systemd set MLFLOW_TRACKING_TOKEN, or the other two"
)


def refused(uri: str, *, words: str = "") -> RegistryRefused:
    """
    Args:
        words: what was answered, where it was not MLflow that answered.
    """
    answer = f": what stands before it answered {words}" if words else ""
    return RegistryRefused(f"registry {uri} refuses this device{answer}", remedy=_CREDENTIALS)


def is_refusal(error: OSError) -> bool:
    """True for what `requests` raises of an answer with one of the two statuses."""
    return getattr(getattr(error, "response", None), "status_code", None) in STATUSES


def refuses(uri: str) -> bool:
    """Asks the registry once more, for the status alone.

    MLflow's error for an answer that is JSON, and not MLflow's, keeps the body and forgets the status.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    try:
        response = http_request(
            get_default_host_creds(uri),
            "/api/2.0/mlflow/registered-models/get",
            "GET",
            max_retries=0,
            raise_on_status=False,
        )
    except (MlflowException, OSError):
        return False
    response.close()
    return response.status_code in STATUSES


def reason_of(error: BaseException) -> str:
    """What the system said first: HTTP libraries put three times its length before it."""
    first = error
    while (before := first.__cause__ or first.__context__) is not None:
        first = before
    if isinstance(first, TimeoutError):
        return "timed out"
    return first.strerror if isinstance(first, OSError) and first.strerror else first_line(error)


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its name; see `short`."""
    return short(str(error)) or type(error).__name__


def short(text: str) -> str:
    """Its first line, without the queries of addresses: an artifact store's may be a signature that lets anybody in."""
    line = (text.splitlines() or [""])[0]
    return re.sub(r"(https?://[^\s?]+)\?[^\s'\"]+", r"\1?…", line)[:300]
