"""The files that the settings name: are they there, does the service's user get at them, who else does?

What root can read says nothing about the daemon: its user is asked, by a process of that user.
"""

from __future__ import annotations

import json
import os
import pwd
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from edge_agent.doctor.finding import Finding, fail, failed, ok, warn
from edge_agent.environment import (
    CREDENTIAL_STORE,
    CREDENTIALS,
    SERVICE_CREDENTIALS,
    credential_path,
    read_credential,
)
from edge_agent.errors import SettingsError
from edge_agent.settings import SYSTEM_CONFIG, Settings

_TIMEOUT_S = 20.0
_HIDDEN = tuple(Path(folder) for folder in ("/home", "/root", "/run/user", "/tmp", "/var/tmp"))
"""The unit's ProtectHome= and PrivateTmp= show the daemon empty folders in their place."""
_ASK = """
import json, os, sys
uid, gid, groups, wanted = json.load(sys.stdin)
os.setgroups(groups)
os.setresgid(gid, gid, gid)
os.setresuid(uid, uid, uid)
json.dump([path for path, mode in wanted if not os.access(path, mode)], sys.stdout)
"""


def check(settings: Settings, config: Path | None, unit: Mapping[str, str]) -> Iterator[Finding]:
    """Looks at the files.

    Args:
        config: the settings file, None where there is none.
        unit: the service as systemd knows it; empty where it is none.
    """
    if config not in (None, SYSTEM_CONFIG):
        unit = {}  # the service has other settings
    named = named_files(settings)
    for key, path in named.items():
        yield from _check_file(key, path, secret=key in ("mqtt.password_file", "mqtt.key_file"))
    yield from _check_credentials()
    if unit.get("LoadState") == "loaded":
        for key, path in named.items():
            if any(path.is_relative_to(folder) for folder in _HIDDEN):  # root's shell sees it
                yield fail(
                    "settings.files",
                    f"{path} ({key}) is in a folder that the service does not see",
                    "put it into /etc/edge-agent",
                )
    if os.geteuid() == 0 and (user := _service_user(settings, unit)) is not None:
        yield from _check_access(settings, config, user)


def named_files(settings: Settings) -> dict[str, Path]:
    """By key; a key without a value is left out."""
    mqtt = settings.mqtt
    files = {
        "mqtt.password_file": mqtt.password_file,
        "mqtt.ca_file": mqtt.ca_file,
        "mqtt.cert_file": mqtt.cert_file,
        "mqtt.key_file": mqtt.key_file,
        **{f"trust.public_keys[{number}]": file for number, file in enumerate(settings.trust.public_keys)},
    }
    return {key: Path(file) for key, file in files.items() if file}


def with_stored_credentials(settings: Settings) -> Settings:
    """A stopped service has no credentials, which is no fault: then those are taken that its next start gets."""
    mqtt = settings.mqtt
    changed = {
        key: str(CREDENTIAL_STORE / Path(file).name)
        for key, file in (("key_file", mqtt.key_file), ("password_file", mqtt.password_file))
        if file and Path(file).parent == SERVICE_CREDENTIALS and not SERVICE_CREDENTIALS.exists()
    }
    return settings.model_copy(update={"mqtt": mqtt.model_copy(update=changed)}) if changed else settings


def _check_file(key: str, path: Path, *, secret: bool) -> Iterator[Finding]:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
    except PermissionError:
        if os.geteuid() == 0:  # a file system that not even root reads
            yield fail("settings.files", f"{path} ({key}) cannot be read", "see its file system")
        else:
            yield warn("settings.files", f"{path} ({key}) is not yours to read", "run doctor as root")
    except OSError as error:
        yield fail("settings.files", f"{path} ({key}): {error.strerror}", f"bring the file, or correct {key}")
    else:
        if secret and mode & 0o004:
            yield warn("settings.files", f"{path} ({key}) can be read by everybody", f"chmod o= {path}")


def _check_credentials() -> Iterator[Finding]:
    """What systemd hands to the daemon, as far as this process may look."""
    for name in CREDENTIALS:
        path = credential_path(name)
        if path is None:
            continue
        try:
            empty = name != "mqtt-key" and not read_credential(path)
        except SettingsError as error:
            yield failed("settings.files", error, f"write {path} again")
            continue
        if empty:
            yield warn("settings.files", f"{path} is empty", "write the secret into it, or remove it")
        if path.stat().st_mode & 0o077 and path.parent.stat().st_mode & 0o011:
            yield warn("settings.files", f"{path} is open to others than its owner", f"chmod 0600 {path}")


def _service_user(settings: Settings, unit: Mapping[str, str]) -> pwd.struct_passwd | None:
    """Whom the daemon runs as, where that is not root: the unit says it, else whose the state directory is."""
    try:
        name = unit.get("User")
        user = pwd.getpwnam(name) if name else pwd.getpwuid(settings.state_dir.stat().st_uid)
    except (OSError, KeyError):
        return None
    return user if user.pw_uid else None


def _check_access(settings: Settings, config: Path | None, user: pwd.struct_passwd) -> Iterator[Finding]:
    """Whether the daemon's user reads what the settings name, and writes where its state is."""
    wanted = dict.fromkeys(named_files(settings).values(), os.R_OK)
    if config is not None:
        wanted[config.absolute()] = os.R_OK
    wanted[settings.state_dir] = os.R_OK | os.W_OK | os.X_OK
    # What systemd hands over, the user gets; what is not there is a finding already.
    asked = {
        path: mode
        for path, mode in wanted.items()
        if path.exists() and path.parent not in (CREDENTIAL_STORE, SERVICE_CREDENTIALS)
    }
    question = [
        *(user.pw_uid, user.pw_gid, os.getgrouplist(user.pw_name, user.pw_gid)),
        [[str(path), mode] for path, mode in asked.items()],
    ]
    result = subprocess.run(
        [sys.executable, "-I", "-c", _ASK],
        input=json.dumps(question),
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=True,
        cwd="/",
    )
    refused = [Path(path) for path in json.loads(result.stdout)]
    for path in refused:
        if path == settings.state_dir:
            remedy = f"chown -R {user.pw_name}: {path}; chmod 0700 {path}"
        else:
            remedy = f"chgrp {user.pw_name} {path}; chmod g+r {path}; its folders need x for that user, too"
        deed = "write to" if path == settings.state_dir else "read"
        yield fail("settings.access", f"the service's user {user.pw_name} cannot {deed} {path}", remedy)
    if not refused:
        yield ok(
            "settings.access",
            f"the service's user {user.pw_name} can read what is configured and write to {settings.state_dir}",
        )
