"""The error tree: every error that a person, a script or an MQTT client can meet.

Each error has a stable `code`, says what happened and where, and, where there is something to do, what to
do next (`remedy`). Foreign exceptions are wrapped at the edge where they appear, with `raise … from`.

Families: `PromptError` is the table of errors in the MQTT contract; `ContentError` is bad content in a
package, `TransportError` a way to it that failed; the rest are named for the part they belong to.
"""

from __future__ import annotations

from typing import ClassVar


class EdgeAgentError(Exception):
    """Root of the tree.

    Args:
        message: what happened and where, one sentence without a full stop at the end.
        remedy: what the reader can do about it, or an empty string.
    """

    code: ClassVar[str] = "internal"

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}; {self.remedy}" if self.remedy else self.message


class SettingsError(EdgeAgentError):
    """A setting is missing, unknown or out of range. The key is named in the message."""

    code = "settings_invalid"


# --- Prompts: the table of the MQTT contract -----------------------------------------------------------


class PromptError(EdgeAgentError):
    """A prompt that gets an error for its answer.

    Attributes:
        status: HTTP-like number of the MQTT contract.
        retry_after_ms: how long to wait before asking again, where waiting helps.
    """

    status: ClassVar[int] = 500

    def __init__(self, message: str, *, remedy: str = "", retry_after_ms: int | None = None) -> None:
        super().__init__(message, remedy=remedy)
        self.retry_after_ms = retry_after_ms


class BadRequest(PromptError):
    code, status = "bad_request", 400


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


PROMPT_ERRORS: dict[str, type[PromptError]] = {
    kind.code: kind
    for kind in (
        BadRequest,
        UnknownModel,
        DeadlineExceeded,
        IdReused,
        PromptTooLong,
        AnswerTooLarge,
        QueueFull,
        Cancelled,
        ModelFailed,
        NoModel,
        JournalUnavailable,
    )
}
"""The table by code: what a runner reports by name becomes the same error again in the daemon."""


# --- Packages and the cache ----------------------------------------------------------------------------


class ContentError(EdgeAgentError):
    """A package's content breaks a rule: nothing of it is used. Trying again does not help."""

    code = "content_invalid"


class ManifestError(ContentError):
    """The manifest, or a path in it, breaks a rule."""

    code = "manifest_invalid"


class VerificationError(ContentError):
    """Bytes are not the bytes that were promised: size or sha256 differ."""

    code = "verification_failed"


class PolicyError(ContentError):
    """The package carries code, or options that amount to code, that this device does not run."""

    code = "code_refused"


class Quarantined(ContentError):
    """The version failed on this device before, and is not tried again until its digest or the operator changes."""

    code = "quarantined"


class TransportError(EdgeAgentError):
    """The registry could not be reached, or ended the conversation. Trying later may help."""

    code = "registry_unreachable"


class RegistryRefused(EdgeAgentError):
    """The registry answers, and does not let this device in (HTTP 401 or 403). Asking again does not help."""

    code = "registry_refused"


class SyncStopped(EdgeAgentError):
    """A check was ended for something more urgent; what it fetched is kept for the next one."""

    code = "sync_stopped"


class UnknownReference(EdgeAgentError):
    """The registry answers, and has no such model, alias or version."""

    code = "unknown_reference"


class StoreError(EdgeAgentError):
    """The cache's folder cannot do what is asked: no space, no hard links, no permission."""

    code = "cache_failed"


class CacheBusy(StoreError):
    """Another process holds the cache's lock."""

    code = "cache_busy"


class RunnerError(EdgeAgentError):
    """A runner did not start, did not load its model, or broke the protocol."""

    code = "runner_failed"


class LoadFailed(RunnerError):
    """The model itself does not load: the runner said so, and ended."""

    code = "load_failed"


class MemoryShort(EdgeAgentError):
    """A model's weights alone take more memory than there is: no fault of the model."""

    code = "memory_short"


class CannotRun(RunnerError):
    """This host lacks what a version needs: a library, an architecture in it, memory. Nothing is wrong with it."""

    code = "cannot_run"


class RunnerCrashed(RunnerError):
    """What a runner did ended it: a signal that nobody sends."""

    code = "runner_crashed"


class PublishError(EdgeAgentError):
    """A folder cannot be packaged or registered."""

    code = "publish_failed"


class DaemonRunning(EdgeAgentError):
    """Another daemon works in this state directory, or listens on this control socket."""

    code = "daemon_running"


class ControlSocketError(EdgeAgentError):
    """The control socket cannot be made."""

    code = "control_socket_failed"


class DaemonNotRunning(EdgeAgentError):
    """Nothing answers on the control socket."""

    code = "daemon_not_running"
