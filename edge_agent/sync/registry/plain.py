"""What a reference means now, asked in one plain HTTP request.

Importing MLflow's client costs a device more than a second of CPU, and most checks find nothing new: so a sync asks
this way first, and imports MLflow only where something has to be fetched. The request goes through the same session as
all others (`http_session.py`), so its rules and bounds hold, and carries the credentials that MLflow would send.

    knows_how_to_ask → find → the version's number, source and tags, or why there is no answer

Refuses to guess: where MLflow would sign the request, or a plugin of MLflow has a part in it, MLflow has to ask.
Source: `mlflow.utils.rest_utils.http_request` and `mlflow.utils.credentials` of MLflow 3.17.
"""

from __future__ import annotations

import base64
import importlib.metadata
import json
import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import requests

from edge_agent import __version__, environment
from edge_agent.errors import EdgeAgentError, TransportError, UnknownReference
from edge_agent.package.reference import ModelRef, ModelVersion, version_number
from edge_agent.sync import refusal
from edge_agent.sync.http_session import RegistrySession

_API = "/api/2.0/mlflow"
_UNKNOWN = frozenset(("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"))
_REFUSALS = frozenset(("PERMISSION_DENIED", "UNAUTHENTICATED"))
_OF_MLFLOW_ONLY = ("MLFLOW_TRACKING_AUTH", "MLFLOW_TRACKING_AWS_SIGV4")
PLUGINS = "mlflow.request_header_provider"
_YES = frozenset(("true", "1"))


def knows_how_to_ask(uri: str) -> bool:
    """Whether a registry is asked over plain HTTP with credentials that this module knows how to send."""
    if urlsplit(uri).scheme.lower() not in ("http", "https"):
        return False
    variables = _variables()
    if any(variables.get(name, "").lower() not in ("", "false", "0") for name in _OF_MLFLOW_ONLY):
        return False
    home = environment.directory("HOME")
    if home is not None and os.access(home / ".mlflow" / "credentials", os.R_OK):
        return False
    return not importlib.metadata.entry_points(group=PLUGINS)


def find(ref: ModelRef, uri: str, session: RegistrySession) -> ModelVersion:
    """What the reference means now; its source as it was registered.

    Args:
        uri: the registry's, for which `knows_how_to_ask` is true.
        session: that registry's.

    Raises:
        UnknownReference: the registry has no such model, alias or version.
        RegistryRefused: it does not let this device in.
        ManifestError: the version has a number that no version can have.
        PolicyError: the registry leads to a place that it may not lead to.
        TransportError: it cannot be reached, or gives no answer that can be understood.
    """
    if ref.alias:
        answer = _get(session, uri, "registered-models/alias", {"name": ref.name, "alias": ref.alias})
    else:
        answer = _get(session, uri, "model-versions/get", {"name": ref.name, "version": str(ref.version)})
    document = _object(answer.content)
    if answer.status_code != 200:
        raise _failure(ref, uri, answer.status_code, document)
    try:
        found = _version(document["model_version"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TransportError(
            f"registry {uri} gave an answer that cannot be read: it has no model version",
            remedy="see what answers at registry.uri",
        ) from error
    if found.name != ref.name or ref.version not in (None, found.version):
        raise TransportError(f"the registry answered {ref} with another model or version")
    return found


def _get(session: RegistrySession, uri: str, endpoint: str, params: Mapping[str, str]) -> requests.Response:
    variables = _variables()
    try:
        return session.get(
            f"{uri.removesuffix('/')}{_API}/{endpoint}",
            params=params,
            headers={"User-Agent": f"edge-agent/{__version__}", **_authorization(variables)},
            verify=_verify(variables),
            cert=variables.get("MLFLOW_TRACKING_CLIENT_CERT_PATH") or None,
        )
    except EdgeAgentError:
        raise
    except Exception as error:  # of requests, urllib3 or http.client, by where the answer breaks off
        raise TransportError(f"registry {uri} cannot be reached: {refusal.reason_of(error)}") from error


def _failure(ref: ModelRef, uri: str, status: int, document: Mapping[str, Any]) -> EdgeAgentError:
    """What an answer with another status than 200 says."""
    code, words = str(document.get("error_code", "")), _words(status, document)
    if status in refusal.STATUSES or code in _REFUSALS:
        of_something_else = document and "error_code" not in document
        return refusal.refused(uri, words=words if of_something_else else "")
    if code in _UNKNOWN:
        return UnknownReference(
            f"the registry has no {ref}", remedy="check the name and the alias or version"
        )
    if code:
        return TransportError(f"registry {uri} answered with an error: {words}")
    return TransportError(
        f"registry {uri} is behind something else that answered: {words}", remedy="see what stands before it"
    )


def _variables() -> dict[str, str]:
    return environment.inherited_environment(prefixes=("MLFLOW_TRACKING_",))


def _authorization(variables: Mapping[str, str]) -> dict[str, str]:
    """A name and a password count before a token, as for MLflow."""
    user, password = (variables.get(f"MLFLOW_TRACKING_{name}") for name in ("USERNAME", "PASSWORD"))
    if user and password:
        both = base64.standard_b64encode(f"{user}:{password}".encode()).decode()
        return {"Authorization": f"Basic {both}"}
    token = variables.get("MLFLOW_TRACKING_TOKEN")
    return {"Authorization": f"Bearer {token}"} if token else {}


def _verify(variables: Mapping[str, str]) -> bool | str:
    if path := variables.get("MLFLOW_TRACKING_SERVER_CERT_PATH"):
        return path
    return variables.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() not in _YES


def _object(content: bytes) -> Mapping[str, Any]:
    """A JSON object; empty for anything else."""
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _version(found: Mapping[str, Any]) -> ModelVersion:
    """
    Raises:
        ManifestError: its number is none.
        KeyError, TypeError, ValueError: it has another form.
    """
    tags = {tag["key"]: tag.get("value", "") for tag in found.get("tags", ())}
    texts = (found["name"], found.get("run_id", ""), found["source"], *tags.keys(), *tags.values())
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a text is none")
    return ModelVersion(
        name=found["name"],
        version=version_number(found["version"]),
        run_id=found.get("run_id", ""),
        source=found["source"],
        tags=tags,
    )


def _words(status: int, document: Mapping[str, Any]) -> str:
    """What an error's answer says."""
    said = (str(status), str(document.get("error_code", "")), str(document.get("message", "")))
    return refusal.short(": ".join(filter(None, said)))
