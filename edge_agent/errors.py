"""The error tree: every error that a person, a script or an MQTT client can meet.

Each error has a stable `code`, says what happened and where, and, if something can be done, what to do next
(`remedy`). Foreign exceptions are wrapped where they appear, with `raise … from`.

Families: `PromptError` is the table of errors in the MQTT contract; `ContentError` is for bad content in a package,
`TransportError` for a failed connection to the registry; the others are named after the part they belong to. `error_of`
turns a code that crossed a process boundary into its class again. What an error quotes, from a registry, a package or
a client, is written without control characters: see `printable.py`.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, TypeVar

from edge_agent import printable

MAX_MESSAGE_CHARACTERS = 4000
"""What an error quotes may be of any length; the rest is cut off."""


class EdgeAgentError(Exception):
    """Root of the tree.

    Args:
        message: what happened and where, in one sentence without a full stop.
        remedy: what the reader can do about it; empty if there is nothing.
    """

    code: ClassVar[str] = "internal"

    def __init__(self, message: str, *, remedy: str = "") -> None:
        long = len(message) > MAX_MESSAGE_CHARACTERS
        self.message = printable.text(f"{message[:MAX_MESSAGE_CHARACTERS]}…" if long else message)
        self.remedy = printable.text(remedy)
        super().__init__(self.message)

    def __str__(self) -> str:
        return f"{self.message}; {self.remedy}" if self.remedy else self.message


_DISK_REMEDIES = {
    errno.ENOSPC: "free some space on the agent's disk",
    errno.EDQUOT: "free some space, or raise the disk quota of the agent's user",
    errno.EROFS: "mount it read-write; if the kernel made it read-only, `dmesg` says why",
    errno.EIO: "look at `dmesg`: the disk fails",
    errno.EACCES: "run as the user that owns state_dir, or give it its files back with chown",
}


def disk_remedy(error: OSError) -> str:
    """What to do about a refusal of the file system, under `state_dir` as a rule; empty if nothing is known."""
    return _DISK_REMEDIES.get(error.errno or 0, "")


_Error = TypeVar("_Error", bound=EdgeAgentError)


def by_code(*families: type[_Error]) -> dict[str, type[_Error]]:
    """Every error of these families that has a code of its own, by that code."""
    return {kind.code: kind for family in families for kind in _tree(family) if "code" in vars(kind)}


def error_of(
    code: object,
    message: object,
    *,
    remedy: object = "",
    among: Iterable[type[_Error]],
    otherwise: type[_Error],
) -> _Error:
    """The error that another process reported by its code.

    Args:
        code, message, remedy: as they came, of any type.
        among: the families that this process may report.
        otherwise: what a code of no such family becomes.
    """
    return by_code(*among).get(str(code), otherwise)(str(message), remedy=str(remedy))


def _tree(kind: type[_Error]) -> Iterator[type[_Error]]:
    """The class and everything below it."""
    yield kind
    for below in kind.__subclasses__():
        yield from _tree(below)


class SettingsError(EdgeAgentError):
    """A setting is missing, unknown or out of range. The message names the key."""

    code = "settings_invalid"


class SettingsUnreadable(SettingsError):
    """A file of the settings cannot be read at the moment, though nothing says that it will stay so. A service that
    ends over it is started again."""

    code = "settings_unreadable"


_PASSES = frozenset(
    (
        errno.EIO,
        errno.ENFILE,
        errno.EMFILE,
        errno.ENOMEM,
        errno.EINTR,
        errno.EAGAIN,
        errno.ESTALE,
        errno.ETIMEDOUT,
    )
)


def settings_error(message: str, error: OSError, *, remedy: str = "") -> SettingsError:
    """The error of a file that the settings are in, or name: wrong settings, or a host that fails for the moment."""
    of_openssl = hasattr(error, "library")  # its numbers are other ones: 116 is a key of another certificate
    if error.errno in _PASSES and not of_openssl:
        return SettingsUnreadable(message, remedy=disk_remedy(error))
    return SettingsError(message, remedy=remedy)


# --- Prompts: the table of the MQTT contract -----------------------------------------------------------


class PromptError(EdgeAgentError):
    """An error that is the answer to a prompt.

    Attributes:
        status: the HTTP-like number in the MQTT contract.
        retry_after_ms: how long to wait before asking again; None if waiting does not help.
    """

    status: ClassVar[int] = 500

    def __init__(self, message: str, *, remedy: str = "", retry_after_ms: int | None = None) -> None:
        super().__init__(message, remedy=remedy)
        self.retry_after_ms = retry_after_ms


class BadRequest(PromptError):
    """A request that cannot be read, or a field of it that breaks its rule.

    Attributes:
        param: the field, where it is one of the request's own.
    """

    code, status = "bad_request", 400

    def __init__(self, message: str, *, param: str | None = None, **more: Any) -> None:
        super().__init__(message, **more)
        self.param = param


class UnknownModel(PromptError):
    code, status = "unknown_model", 404


class DeadlineExceeded(PromptError):
    code, status = "deadline_exceeded", 408


class IdReused(PromptError):
    code, status = "id_reused", 409


class PromptTooLong(PromptError):
    code, status = "prompt_too_long", 413


class AnswerTooLarge(PromptError):
    code, status = "answer_too_large", 413


class QueueFull(PromptError):
    code, status = "queue_full", 429


class Cancelled(PromptError):
    code, status = "cancelled", 499


class ModelFailed(PromptError):
    code, status = "model_failed", 500


class NoModel(PromptError):
    code, status = "no_model", 503


class JournalUnavailable(PromptError):
    code, status = "journal_unavailable", 503


# --- Packages and the cache ----------------------------------------------------------------------------


class ContentError(EdgeAgentError):
    """A package's content breaks a rule, so nothing of it is used. Trying again does not help."""

    code = "content_invalid"


class ManifestError(ContentError):
    """The manifest, or a path in it, breaks a rule."""

    code = "manifest_invalid"


class VerificationError(ContentError):
    """The size or sha256 of a file is not the expected one."""

    code = "verification_failed"


class PolicyError(ContentError):
    """The package contains code, or options that amount to code, that may not run on this device."""

    code = "code_refused"


class Quarantined(ContentError):
    """The version failed on this device before. It is tried again only by an operator, or with a new digest."""

    code = "quarantined"


class PackageReplayed(ContentError):
    """A signed package is older than what was active here, under a higher number: it was registered anew."""

    code = "package_replayed"


class TransportError(EdgeAgentError):
    """The registry could not be reached, or closed the connection. Trying again later may help."""

    code = "registry_unreachable"


class RegistryRefused(EdgeAgentError):
    """The registry answers, and does not let this device in (HTTP 401 or 403). Asking again does not help."""

    code = "registry_refused"


class SyncStopped(EdgeAgentError):
    """A check or a trial was stopped for something more urgent, or with the agent. The next one goes on."""

    code = "sync_stopped"


class AgentStopping(SyncStopped):
    """What is under way ends with the agent."""

    def __init__(self) -> None:
        super().__init__("the agent is stopping")


class VersionHeld(EdgeAgentError):
    """A version waits, to be fetched or to take over. That is a state, not a failure."""


class LinkHeld(VersionHeld):
    """A download waits for the line: for a window of `[link]`, or for the next day's bytes. Nothing is wrong."""

    code = "link_held"


class ActivationHeld(VersionHeld):
    """A version is here, and waits for the time at which it may take over: see `[link]`. Nothing is wrong."""

    code = "activation_held"


class Pinned(VersionHeld):
    """An operator pinned another version on the device: it takes none meanwhile."""

    code = "pinned"


class UnknownReference(EdgeAgentError):
    """The registry has no such model, alias or version."""

    code = "unknown_reference"


class StoreError(EdgeAgentError):
    """An operation on the cache's folder failed: no space, no hard links, no permission."""

    code = "cache_failed"


class CacheFull(StoreError):
    """The quota, the minimum of free space or the disk has no room for it."""

    code = "cache_full"


class CacheBusy(StoreError):
    """Another process holds the cache's lock."""

    code = "cache_busy"


class RunnerError(EdgeAgentError):
    """A runner did not start, did not load its model, or broke the protocol."""

    code = "runner_failed"


class LoadFailed(RunnerError):
    """The model itself does not load; the runner reported that and ended."""

    code = "load_failed"


class MemoryShort(EdgeAgentError):
    """A model's weights alone need more memory than there is. That is not a fault of the version."""

    code = "memory_short"


class CannotRun(RunnerError):
    """This host lacks something that the version needs: a library, support for its architecture, or memory."""

    code = "cannot_run"


class Unconfined(CannotRun):
    """This host cannot build the walls that code from elsewhere must have around it."""

    code = "unconfined"


class RunnerCrashed(RunnerError):
    """A runner crashed: it ended with a signal that only a fault of its own causes."""

    code = "runner_crashed"


class PublishError(EdgeAgentError):
    """A folder cannot be packaged or registered."""

    code = "publish_failed"


class BrokerUnreachable(EdgeAgentError):
    """The connection to the broker failed, or the broker refused it."""

    code = "broker_unreachable"


class BrokerRefused(EdgeAgentError):
    """The broker's rules do not let this identity read or write a topic."""

    code = "broker_refused"


class DaemonRunning(EdgeAgentError):
    """Another daemon uses this state directory or this control socket."""

    code = "daemon_running"


class ControlSocketError(EdgeAgentError):
    """The control socket cannot be created."""

    code = "control_socket_failed"


class DaemonNotRunning(EdgeAgentError):
    """Nothing answers on the control socket."""

    code = "daemon_not_running"
