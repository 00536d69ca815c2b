"""The process's environment: variables, systemd's folders, and credentials.

Only this module reads `os.environ` in the daemon and the command. Secrets are never settings: they are files or
systemd credentials, and are read when they are needed.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from edge_agent import named_file
from edge_agent.errors import SettingsError, settings_error

SERVICE_CREDENTIALS = Path("/run/credentials/edge-agent.service")
CREDENTIAL_STORE = Path("/etc/credstore")
REGISTRY_CREDENTIALS = (
    "mlflow-tracking-username",
    "mlflow-tracking-password",
    "mlflow-tracking-token",
    "aws-access-key-id",
    "aws-secret-access-key",
)
"""Names of systemd credentials. The sync process gets each as the variable of the same name."""
CREDENTIALS = ("mqtt-password", "mqtt-key", "registry-key", *REGISTRY_CREDENTIALS)
"""All credentials in the daemon's unit."""

_MAX_CREDENTIAL_BYTES = 65_535  # what MQTT has room for
_FIRST_PASSED, _MAX_PASSED = 3, 16


def credential_path(name: str) -> Path | None:
    """The file of a systemd credential; None if the service has none of that name.

    An operator's command has no `$CREDENTIALS_DIRECTORY`. If it has permission, it reads the running service's
    credentials, or else those that the service will get when it starts.
    """
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    folders = [Path(directory)] if directory else [SERVICE_CREDENTIALS, CREDENTIAL_STORE]
    return next((path for folder in folders if os.access(path := folder / name, os.R_OK)), None)


def registry_credentials() -> dict[str, str]:
    """The registry's credentials from systemd, as variables for MLflow.

    Raises:
        SettingsError: a file cannot be read.
    """
    found = {}
    for name in REGISTRY_CREDENTIALS:
        if path := credential_path(name):
            found[name.upper().replace("-", "_")] = read_credential(path)
    return found


def take_credentials_along() -> None:
    """Copies the registry's credentials into this process's environment before it loses the right to read them."""
    os.environ.update(registry_credentials())


def known_secrets() -> list[str]:
    """Every secret of the registry that this process has or can read, to keep them out of texts for others."""
    variables = [
        value
        for key, value in os.environ.items()
        if re.search("TOKEN|PASSWORD|SECRET|CREDENTIAL|KEY", key) and not Path(value).is_absolute()
    ]
    files = []
    for name in REGISTRY_CREDENTIALS:
        with contextlib.suppress(SettingsError):  # an unreadable secret cannot get into a text
            if path := credential_path(name):
                files.append(read_credential(path))
    return [*variables, *files]


def read_credential(path: Path) -> str:
    """Reads a secret from its file: one line, without the line end.

    Raises:
        SettingsError: the file cannot be read, is not text, or is far too long.
    """
    try:
        return named_file.read(path, _MAX_CREDENTIAL_BYTES).decode("utf-8").rstrip("\r\n")
    except OSError as error:
        raise settings_error(f"credential {path} cannot be read: {error.strerror}", error) from error
    except UnicodeDecodeError:  # its message quotes a byte of the secret
        raise SettingsError(f"credential {path} is not UTF-8") from None


def unreadable(*files: str) -> str:
    """The first of these files that cannot be opened, and why, which OpenSSL does not say; empty for none."""
    for file in files:
        try:
            with open(file, "rb"):
                pass
        except OSError as error:
            return f"{file}: {error.strerror}"
    return ""


def inherited_environment(*names: str, prefixes: tuple[str, ...] = ()) -> dict[str, str]:
    """The variables from an allow-list, for a child process. A child never gets the whole environment."""
    return {
        key: value
        for key, value in os.environ.items()
        if key in names or (prefixes and key.startswith(prefixes))
    }


def search_path() -> str:
    """The folders in which programs are searched, `$PATH`."""
    return os.environ.get("PATH", os.defpath)


def wants_no_colour() -> bool:
    """Whether whoever reads the output wants no colours, or has a terminal without them."""
    return bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"


def logs_to_journal() -> bool:
    """True if stderr is systemd's journal. Source: systemd.exec(5), `$JOURNAL_STREAM`."""
    status = os.fstat(2)
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def service_manager() -> tuple[str | None, float | None]:
    """The arguments for `sd_notify.Notifier`: `$NOTIFY_SOCKET`, and the watchdog's interval in seconds.

    The interval is None if there is no watchdog, or if it is for another process (`$WATCHDOG_PID`).
    Source: sd_notify(3), sd_watchdog_enabled(3).
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    interval_us = os.environ.get("WATCHDOG_USEC", "")
    pid = os.environ.get("WATCHDOG_PID", "")
    ours = interval_us.isdecimal() and int(interval_us) > 0 and pid in ("", str(os.getpid()))
    return address if address.startswith(("/", "@")) else None, int(interval_us) / 1e6 if ours else None


def is_a_service() -> bool:
    """True where systemd has started this very process, and not a shell or a terminal that systemd has started.

    Source: systemd.exec(5), `$SYSTEMD_EXEC_PID`.
    """
    return os.environ.get("SYSTEMD_EXEC_PID") == str(os.getpid())


def passed_sockets() -> list[int]:
    """The descriptors of the sockets that the service manager has opened for this process; none without one.

    Source: sd_listen_fds(3).
    """
    pid, number = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not number.isdecimal():
        return []
    return list(range(_FIRST_PASSED, _FIRST_PASSED + min(int(number), _MAX_PASSED)))


def directory(variable: str) -> Path | None:
    """The first directory in a variable; systemd separates several with colons."""
    value = os.environ.get(variable, "").split(":")[0]
    return Path(value) if value else None


def named_paths() -> list[Path]:
    """Files and folders that variables name: certificates, configurations, credentials of an artifact store."""
    other = ("HOME", "PATH", "TMPDIR", "PWD", "OLDPWD")
    return [Path(value) for key, value in os.environ.items() if value.startswith("/") and key not in other]


def names(prefix: str) -> list[str]:
    """The names of the variables that begin with `prefix`."""
    return [variable for variable in os.environ if variable.startswith(prefix)]
