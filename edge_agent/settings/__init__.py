"""Settings: read once, checked whole, frozen.

They come from a TOML file and from `EDGE_AGENT_*` variables, which override it (`EDGE_AGENT_MQTT__HOST` is
`mqtt.host`). Unknown keys are errors, and every error names its key. Secrets are never settings: `environment.py`
reads them when they are needed. Source: the table in docs/settings.md.
"""

from __future__ import annotations

import os
import re
import socket
import tomllib
from pathlib import Path
from typing import Any, Literal

import platformdirs
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from edge_agent import environment, named_file
from edge_agent.documents import page
from edge_agent.errors import SettingsError, settings_error
from edge_agent.package.reference import MODEL_NAME
from edge_agent.settings.cache import CacheSettings
from edge_agent.settings.home_assistant import HomeAssistantSettings
from edge_agent.settings.http import HttpSettings
from edge_agent.settings.limits import InferenceSettings, LimitSettings, TrustSettings
from edge_agent.settings.link import LinkSettings
from edge_agent.settings.model import ModelSettings
from edge_agent.settings.mqtt import MqttSettings
from edge_agent.settings.registry import RegistrySettings
from edge_agent.settings.section import Section
from edge_agent.settings.variables import ENV_PREFIX, from_variables, over

APPLICATION = "edge-agent"
SYSTEM_CONFIG = Path("/etc/edge-agent/config.toml")
SYSTEM_CONTROL_SOCKET = Path("/run/edge-agent/control.sock")
_MAX_SOCKET_PATH_BYTES = 107  # sockaddr_un has 108 with the final NUL
_MAX_CONFIG_BYTES = 1 << 20
_NO_HOME = "the user has no home ($HOME)"
_FIRST_SETTINGS = """write {file} with these lines, each with a value of yours:
  [registry]
  uri = "http://mlflow.example:5000"
  [models.assistant]
  uri = "models:/phi3-mini@prod"
  [mqtt]
  host = "broker.example"
then `edge-agent doctor` checks them; {page} has all keys. `edge-agent demo` shows it all without any settings"""


class Settings(BaseModel):
    """All settings, frozen. Build them with `load`."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    device_id: str = Field(default="", description="default: the host name, made valid")
    state_dir: Path = Field(default=Path(), description="default: $STATE_DIRECTORY, else platformdirs")
    control_socket: Path = Field(
        default=Path(), description="default: $RUNTIME_DIRECTORY/control.sock, else in state_dir"
    )
    log_format: Literal["text", "json"] = Field(default="text", description="key=value lines, or JSON lines")
    registry: RegistrySettings = RegistrySettings()
    models: dict[str, ModelSettings] = Field(default_factory=dict, max_length=64)
    cache: CacheSettings = CacheSettings()
    link: LinkSettings = LinkSettings()
    mqtt: MqttSettings = MqttSettings()
    http: HttpSettings = HttpSettings()
    limits: LimitSettings = LimitSettings()
    trust: TrustSettings = TrustSettings()
    inference: InferenceSettings = InferenceSettings()
    homeassistant: HomeAssistantSettings = HomeAssistantSettings()
    fleet: Section = Section()  # an operator's file may say with it what it is; it has no keys

    @field_validator("device_id")
    @classmethod
    def _device(cls, device_id: str) -> str:
        device_id = device_id or _host_name()
        if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", device_id):
            raise ValueError("must be 1 to 64 letters, digits, '_', '.', '-'")
        return device_id

    @field_validator("state_dir")
    @classmethod
    def _state(cls, path: Path) -> Path:
        return (_default_state_dir() if path == Path() else _at_home(path)).absolute()

    @field_validator("models")
    @classmethod
    def _names(cls, models: dict[str, ModelSettings]) -> dict[str, ModelSettings]:
        for name in models:
            if not MODEL_NAME.fullmatch(name):
                raise ValueError(f"name {name!r} must be 1 to 64 letters, digits, '_', '.', '-'")
        return models

    @model_validator(mode="after")
    def _socket(self) -> Settings:
        path = self.control_socket
        if path == Path():
            runtime = environment.directory("RUNTIME_DIRECTORY")
            path = (runtime or self.state_dir) / "control.sock"
        path = _at_home(path).absolute()
        if len(os.fsencode(path)) > _MAX_SOCKET_PATH_BYTES:
            raise ValueError(
                f"control_socket {str(path)!r} has more than {_MAX_SOCKET_PATH_BYTES} bytes; set a shorter path"
            )
        object.__setattr__(self, "control_socket", path)  # derived from state_dir; frozen from here on
        return self

    @model_validator(mode="after")
    def _sandboxes(self) -> Settings:
        for name, model in self.models.items():
            for path in model.sandbox.read:
                if path.is_relative_to(self.state_dir) or self.state_dir.is_relative_to(path):
                    key = f"models.{name}.sandbox.read"
                    raise ValueError(f"{key}: {str(path)!r} overlaps state_dir, where prompts and models are")
        return self

    @property
    def default_model(self) -> str | None:
        """The first model's name."""
        return next(iter(self.models), None)


def load(config: Path | None = None) -> Settings:
    """Reads and checks all settings.

    Args:
        config: a TOML file that must exist; None looks in the usual places and does without if there is none.

    Raises:
        SettingsError: the file cannot be read, or keys are unknown or invalid; the message names each.
    """
    path = config or find_config()
    content = over(_read_toml(path) if path else {}, from_variables(Settings))
    try:
        return Settings.model_validate(content)
    except ValidationError as error:
        raise SettingsError(_describe(error, path)) from error


def find_config() -> Path | None:
    """`$CONFIGURATION_DIRECTORY/config.toml`, else the user's file, else the system's; None if there is none.

    One that this user may not look at is given, too: reading it says so.
    """
    return next((path for path in config_candidates() if _sees(path) is not False), None)


def config_candidates() -> list[Path]:
    """Where a settings file is looked for, the first that is there counts."""
    directory = environment.directory("CONFIGURATION_DIRECTORY")
    if directory:
        return [directory / "config.toml"]
    if os.geteuid() == 0:
        return [SYSTEM_CONFIG]
    try:
        return [platformdirs.user_config_path(APPLICATION) / "config.toml", SYSTEM_CONFIG]
    except RuntimeError:  # the user has no home
        return [SYSTEM_CONFIG]


def load_for_daemon(config: Path | None = None) -> Settings:
    """As `load`, for a daemon: without any settings there is nothing that it could do.

    Raises:
        SettingsError: there are none, or what `load` says.
    """
    if missing := missing_settings(config):
        file = config_candidates()[0]
        raise SettingsError(missing, remedy=_FIRST_SETTINGS.format(file=file, page=page("settings.md")))
    return load(config)


def missing_settings(config: Path | None) -> str:
    """Where settings were looked for and not found, for people; empty if there are any."""
    if config is not None or find_config() is not None or environment.names(ENV_PREFIX):
        return ""
    places = " and no ".join(map(str, config_candidates()))
    return f"there are no settings: no {places}, and no {ENV_PREFIX}* variable"


def find_control_socket(settings: Settings) -> Path:
    """The socket on which a command reaches the daemon: the configured one, else the system service's.

    One that this user may not look at is given where no other is there: connecting to it says so.
    """
    places = (settings.control_socket, SYSTEM_CONTROL_SOCKET)
    seen = {path: _sees(path) for path in places}
    for wanted in (True, None):
        for path in places:
            if seen[path] is wanted:
                return path
    return settings.control_socket


def _sees(path: Path) -> bool | None:
    """Whether something is there; None where this user may not know."""
    try:
        path.stat()
    except PermissionError:
        return None
    except OSError:
        return False
    return True


def _default_state_dir() -> Path:
    directory = environment.directory("STATE_DIRECTORY")
    if directory:
        return directory
    if os.geteuid() == 0:
        return Path("/var/lib") / APPLICATION
    try:
        return platformdirs.user_state_path(APPLICATION)
    except RuntimeError as error:
        raise ValueError(f"{_NO_HOME}: set it to a folder of the agent's own") from error


def _at_home(path: Path) -> Path:
    """With the user's home in place of `~`."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError(f"{str(path)!r}: {_NO_HOME}") from error


def _host_name() -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "-", socket.gethostname())[:64] or "device"


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(named_file.read(path, _MAX_CONFIG_BYTES).decode("utf-8"))
    except OSError as error:
        denied = isinstance(error, PermissionError)
        raise settings_error(
            f"settings file {path} cannot be read: {error.strerror}",
            error,
            remedy="use sudo, or let this user read it" if denied else "",
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"settings file {path} is not TOML: {error}") from error


def _describe(error: ValidationError, path: Path | None) -> str:
    """One line for all errors, each with its key as written in the file, and without values."""
    lines = []
    for detail in error.errors(include_url=False, include_input=False):
        key = ".".join(str(part) for part in detail["loc"]) or "settings"
        message = (
            "unknown key"
            if detail["type"] == "extra_forbidden"
            else detail["msg"].removeprefix("Value error, ")
        )
        lines.append(f"{key}: {message}")
    return f"{path or 'no settings file'} and EDGE_AGENT_* variables: " + "; ".join(lines)
