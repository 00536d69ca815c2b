"""The files that the settings name: whether they exist, and who can read them.

Root can read everything, so a process of the service's user finds out what the daemon can read.
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
"""The unit's ProtectHome= and PrivateTmp= hide these from the daemon."""
_SECRET = frozenset(
    ("mqtt.password_file", "mqtt.key_file", "registry.key_file", "http.token_file", "http.key_file")
)
_ASK = """
import json, os, sys
uid, gid, groups, wanted = json.load(sys.stdin)
os.setgroups(groups)
os.setresgid(gid, gid, gid)
os.setresuid(uid, uid, uid)
json.dump([path for path, mode in wanted if not os.access(path, mode)], sys.stdout)
"""


def check(settings: Settings, config: Path | None, unit: Mapping[str, str]) -> Iterator[Finding]:
    """Checks the files.

    Args:
        config: the settings file; None if there is none.
        unit: the service's properties from systemd; empty if there is no service.
    """
    if config not in (None, SYSTEM_CONFIG):
        unit = {}  # the service uses another settings file
    named = named_files(settings)
    for key, path in {**named, **_gateway_files(settings)}.items():
        yield from _check_file(key, path, secret=key in _SECRET)
    yield from _check_credentials()
    if unit.get("LoadState") == "loaded":
        inhibit_file = {"link.inhibit_file": Path(settings.link.inhibit_file or "/run")}
        for key, path in {**named, **inhibit_file}.items():
            if any(path.is_relative_to(folder) for folder in _HIDDEN):  # though root's shell sees it
                yield fail(
                    "settings.files",
                    f"{path} ({key}) is in a folder that is hidden from the service",
                    "use a file below /run" if key in inhibit_file else "move it to /etc/edge-agent",
                )
    if os.geteuid() == 0 and (user := _service_user(settings, unit)) is not None:
        yield from _check_access(settings, config, user)


def named_files(settings: Settings) -> dict[str, Path]:
    """The configured files that the daemon reads, by key; keys without a value are left out."""
    mqtt = settings.mqtt
    files = {
        "mqtt.password_file": mqtt.password_file,
        "mqtt.ca_file": mqtt.ca_file,
        "mqtt.cert_file": mqtt.cert_file,
        "mqtt.key_file": mqtt.key_file,
        "registry.ca_file": settings.registry.ca_file,
        "registry.cert_file": settings.registry.cert_file,
        "registry.key_file": settings.registry.key_file,
        "cache.mirror_ca_file": settings.cache.mirror_ca_file,
        **{f"trust.public_keys[{number}]": file for number, file in enumerate(settings.trust.public_keys)},
    }
    return {key: Path(file) for key, file in files.items() if file}


def _gateway_files(settings: Settings) -> dict[str, Path]:
    """The files that the OpenAI interface reads. It is a separate service with its own user, and only it can see its
    credentials."""
    http = settings.http
    files = {
        "http.token_file": http.token_file,
        "http.cert_file": http.cert_file,
        "http.key_file": http.key_file,
    }
    return {
        key: Path(file)
        for key, file in files.items()
        if file and not Path(file).is_relative_to(SERVICE_CREDENTIALS.parent)
    }


def with_stored_credentials(settings: Settings) -> Settings:
    """Reads credentials from the store while the service is stopped: systemd provides them only while it runs."""
    if SERVICE_CREDENTIALS.exists():
        return settings
    sections = {
        name: section.model_copy(
            update={
                key: str(CREDENTIAL_STORE / Path(file).name)
                for key in ("key_file", "password_file")
                if (file := getattr(section, key, "")) and Path(file).parent == SERVICE_CREDENTIALS
            }
        )
        for name, section in (("mqtt", settings.mqtt), ("registry", settings.registry))
    }
    return settings.model_copy(update=sections)


def _check_file(key: str, path: Path, *, secret: bool) -> Iterator[Finding]:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
    except PermissionError:
        if os.geteuid() == 0:  # a file system that even root cannot read, such as NFS
            yield fail("settings.files", f"{path} ({key}) cannot be read", "check its file system")
        else:
            yield warn("settings.files", f"{path} ({key}): permission denied", "run doctor as root")
    except OSError as error:
        yield fail(
            "settings.files", f"{path} ({key}): {error.strerror}", f"create the file, or correct {key}"
        )
    else:
        if secret and mode & 0o004:
            yield warn("settings.files", f"{path} ({key}): every user can read it", f"chmod o= {path}")


def _check_credentials() -> Iterator[Finding]:
    """The credentials that systemd gives to the daemon, as far as this process can read them."""
    for name in CREDENTIALS:
        path = credential_path(name)
        if path is None:
            continue
        try:
            empty = name not in ("mqtt-key", "registry-key") and not read_credential(path)
        except SettingsError as error:
            yield failed("settings.files", error, f"write {path} again")
            continue
        if empty:
            yield warn("settings.files", f"{path} is empty", "write the secret into it, or remove it")
        if path.stat().st_mode & 0o077 and path.parent.stat().st_mode & 0o011:
            yield warn(
                "settings.files", f"{path} is open to users other than its owner", f"chmod 0600 {path}"
            )


def _service_user(settings: Settings, unit: Mapping[str, str]) -> pwd.struct_passwd | None:
    """The daemon's user, from the unit or else the owner of the state directory; None if that is root."""
    try:
        name = unit.get("User")
        user = pwd.getpwnam(name) if name else pwd.getpwuid(settings.state_dir.stat().st_uid)
    except (OSError, KeyError):
        return None
    return user if user.pw_uid else None


def _check_access(settings: Settings, config: Path | None, user: pwd.struct_passwd) -> Iterator[Finding]:
    """Checks that the daemon's user can read the configured files and write to the state directory."""
    wanted = dict.fromkeys(named_files(settings).values(), os.R_OK)
    if config is not None:
        wanted[config.absolute()] = os.R_OK
    wanted[settings.state_dir] = os.R_OK | os.W_OK | os.X_OK
    # systemd makes credentials readable for the user; a missing file is already a finding.
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
            remedy = f"chgrp {user.pw_name} {path}; chmod g+r {path}; that user also needs x on its folders"
        action = "write to" if path == settings.state_dir else "read"
        yield fail("settings.access", f"the service's user {user.pw_name} cannot {action} {path}", remedy)
    if not refused:
        yield ok(
            "settings.access",
            f"the service's user {user.pw_name} can read the configured files and write to {settings.state_dir}",
        )
