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
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import platformdirs
import pydantic_settings
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from edge_agent import environment
from edge_agent.errors import SettingsError
from edge_agent.host.daily_windows import Window, zone_of
from edge_agent.http_settings import HttpSettings
from edge_agent.package import registry_uri
from edge_agent.package.reference import MODEL_NAME, ModelRef
from edge_agent.topics import can_be_published

APPLICATION = "edge-agent"
ENV_PREFIX = "EDGE_AGENT_"
SYSTEM_CONFIG = Path("/etc/edge-agent/config.toml")
SYSTEM_CONTROL_SOCKET = Path("/run/edge-agent/control.sock")
_MAX_SOCKET_PATH_BYTES = 107  # sockaddr_un has 108 with the final NUL
_MAX_CONFIG_BYTES = 1 << 20

_MIRROR = re.compile(r"(https?://[A-Za-z0-9.\[\]:_-]+(/[^?#@\\\s]*)?|file:///[^?#\\\s]*)")

Bytes = Annotated[int, Field(ge=0, le=1 << 50)]
Seconds = Annotated[float, Field(gt=0, le=10 * 365 * 86_400)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RegistrySettings(_Section):
    """The MLflow registry. Without a `uri` the agent uses its cache only."""

    uri: str = Field(default="", description="MLflow registry: http(s)://… or sqlite:///…; empty for none")
    poll_interval_s: Seconds = Field(default=300, ge=1, description="seconds between two checks, jittered")
    timeout_s: Seconds = Field(default=30, description="seconds for one request, or for one stalled read")
    ca_file: str = Field(
        default="", description="PEM; the authorities of an https registry that is not public"
    )
    cert_file: str = Field(default="", description="PEM, this device's certificate")
    key_file: str = Field(default="", description="PEM, its key")

    @field_validator("uri")
    @classmethod
    def _address(cls, uri: str) -> str:
        if registry_uri.has_credentials(uri):
            raise ValueError(
                "must not contain credentials; use MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
        if uri and (problem := registry_uri.problem_of(uri)):
            raise ValueError(problem)
        return uri

    @model_validator(mode="after")
    def _tls(self) -> RegistrySettings:
        if bool(self.cert_file) != bool(self.key_file):
            raise ValueError("cert_file and key_file go together")
        if (self.ca_file or self.cert_file) and not self.uri.lower().startswith("https://"):
            raise ValueError("ca_file and cert_file need an https uri")
        return self


class SandboxSettings(_Section):
    """What a model may do beyond what every model may: see docs/security.md."""

    network: bool = Field(default=False, description="true: its code may connect to anything")
    read: tuple[Path, ...] = Field(
        default=(), max_length=256, description="files and folders that its code may read, absolute"
    )

    @field_validator("read")
    @classmethod
    def _plain_paths(cls, paths: tuple[Path, ...]) -> tuple[Path, ...]:
        for path in paths:
            if not path.is_absolute() or ".." in path.parts:
                raise ValueError(f"{str(path)!r} must be absolute, without '..'")
        return paths


class ModelSettings(_Section):
    """One model that this device serves."""

    uri: str = Field(description="models:/NAME@ALIAS or models:/NAME/VERSION")
    fallback: str = Field(default="", description="models:/…, served while no version of `uri` can run here")
    context_tokens: int = Field(
        default=2048, ge=16, le=1 << 20, description="tokens of prompt and answer together"
    )
    max_tokens: int = Field(
        default=256,
        ge=1,
        le=1 << 20,
        description="tokens of an answer, for requests without max_tokens; not set: the package's own comes first",
    )
    repetition_penalty: float = Field(
        default=1,
        ge=0.01,
        le=100,
        description="for requests without one; 1 is off; not set: the package's own comes first",
    )
    system: str = Field(default="", max_length=32_768, description="system prompt for requests without one")
    preload: bool = Field(default=True, description="load at start; READY waits for it")
    min_tokens_per_s: float = Field(
        default=0, ge=0, le=1e6, description="slower new versions are reported; 0: none"
    )
    idle_unload_s: float = Field(
        default=0, ge=0, le=10 * 365 * 86_400, description="unload when idle; 0: never"
    )
    sandbox: SandboxSettings = SandboxSettings()

    @field_validator("uri", "fallback")
    @classmethod
    def _reference(cls, uri: str) -> str:
        if uri:
            try:
                ModelRef.parse(uri)
            except SettingsError as error:
                raise ValueError(str(error)) from error
        return uri

    @property
    def generation(self) -> dict[str, float]:
        """What the settings themselves say of `max_tokens` and `repetition_penalty`. What they leave out, the
        package may say."""
        return {
            name: getattr(self, name)
            for name in ("max_tokens", "repetition_penalty")
            if name in self.model_fields_set
        }

    @model_validator(mode="after")
    def _has_uri(self) -> ModelSettings:
        if not self.uri:
            raise ValueError("uri is empty")
        if self.fallback == self.uri:
            raise ValueError("fallback is the same as uri")
        return self

    @cached_property
    def ref(self) -> ModelRef:
        """What the device follows, unless MQTT or an operator says otherwise."""
        return ModelRef.parse(self.uri)

    @cached_property
    def fallback_ref(self) -> ModelRef | None:
        """What it serves while no version of `ref` can run here; None for nothing."""
        return ModelRef.parse(self.fallback) if self.fallback else None


class CacheSettings(_Section):
    """Limits of the cache."""

    quota_bytes: Bytes = Field(default=20_000_000_000, ge=1, description="all blobs together")
    min_free_bytes: Bytes = Field(default=500_000_000, description="left free on the file system")
    max_bytes_per_s: Bytes = Field(default=0, description="download cap; 0: none")
    verify_on_load: bool = Field(default=True, description="check every digest before each load")
    mirrors: tuple[str, ...] = Field(
        default=(),
        max_length=8,
        description="places to try first: http(s)://…/ or file:///…/ with sha256/ in it",
    )
    mirror_patience_s: float = Field(
        default=0, ge=0, le=86_400, description="wait so long for mirrors to get what they do not have"
    )
    mirror_ca_file: str = Field(
        default="", description="PEM; authorities of https mirrors beside the public ones"
    )

    @field_validator("mirrors")
    @classmethod
    def _plain_mirrors(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            if not _MIRROR.fullmatch(url) or not url.isascii() or "/../" in f"{url}/":
                raise ValueError(
                    f"{url[:200]!r} must be http(s)://HOST/… or file:///…, without user, query and '..'"
                )
        return tuple(dict.fromkeys(url.rstrip("/") + "/" for url in urls))


class LinkSettings(_Section):
    """When the line may be used for downloads, and when another version may take over."""

    bytes_per_day: Bytes = Field(default=0, description="of downloads; 0: no bound")
    windows: tuple[str, ...] = Field(
        default=(), max_length=32, description="HH:MM-HH:MM; downloads only then"
    )
    timezone: str = Field(default="", description="IANA name, or UTC; empty: the host's own")
    activate_windows: tuple[str, ...] = Field(
        default=(), max_length=32, description="another version takes over only then"
    )
    inhibit_file: str = Field(default="", description="while this file exists, no other version takes over")

    @field_validator("windows", "activate_windows")
    @classmethod
    def _times(cls, windows: tuple[str, ...]) -> tuple[str, ...]:
        for window in windows:
            Window.parse(window)
        return windows

    @field_validator("timezone")
    @classmethod
    def _known_zone(cls, name: str) -> str:
        zone_of(name)
        return name

    @field_validator("inhibit_file")
    @classmethod
    def _absolute(cls, file: str) -> str:
        if file and (not file.startswith("/") or "\0" in file):
            raise ValueError("must be an absolute path")
        return file


class MqttSettings(_Section):
    """The broker."""

    host: str = Field(default="localhost", min_length=1, max_length=255)
    port: int = Field(default=1883, ge=1, le=65_535)
    username: str = Field(default="", max_length=1024)
    password_file: str = Field(default="", description="or the systemd credential mqtt-password")
    ca_file: str = Field(default="", description="PEM; set it to use TLS")
    cert_file: str = Field(default="", description="PEM, this device's certificate")
    key_file: str = Field(default="", description="PEM, its key")
    prefix: str = Field(default="edge", description="first part of every topic")
    protocol: Literal["auto", "5", "3.1.1"] = Field(default="auto", description="auto: 5, else 3.1.1")
    session_expiry_s: int = Field(default=86_400, ge=0, le=0xFFFF_FFFE)
    keepalive_s: int = Field(default=30, ge=5, le=3600)
    reply_prefixes: tuple[str, ...] = Field(default=("replies/",), description="where answers may go")
    answer_ttl_s: Seconds = Field(
        default=86_400, description="an answer that cannot be delivered is kept this long"
    )

    @field_validator("prefix")
    @classmethod
    def _plain_prefix(cls, prefix: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}(/[A-Za-z0-9_.-]{1,64}){0,2}", prefix):
            raise ValueError("must be one to three topic levels of letters, digits, '_', '.', '-'")
        return prefix

    @field_validator("reply_prefixes")
    @classmethod
    def _plain_reply_prefixes(cls, prefixes: tuple[str, ...]) -> tuple[str, ...]:
        for prefix in prefixes:
            if not can_be_published(prefix) or len(prefix) > 200:
                raise ValueError(
                    f"{prefix!r} must begin a topic, without wildcards and control characters, and not with '$'"
                )
        return prefixes

    @model_validator(mode="after")
    def _pairs(self) -> MqttSettings:
        if bool(self.cert_file) != bool(self.key_file):
            raise ValueError("cert_file and key_file go together")
        if self.cert_file and not self.ca_file:
            raise ValueError("cert_file needs ca_file")
        return self


class LimitSettings(_Section):
    """Limits for clients."""

    queue_depth: int = Field(default=32, ge=1, le=100_000, description="prompts waiting and running")
    payload_bytes: int = Field(default=102_400, ge=256, le=1 << 24, description="size of one request")
    deadline_s: Seconds = Field(default=120, description="for prompts without a deadline")
    max_deadline_s: Seconds = Field(
        default=3600, description="the longest deadline that a client may ask for"
    )


class TrustSettings(_Section):
    """Which packages may run."""

    public_keys: tuple[str, ...] = Field(
        default=(), description="PEM files; with one, every package must be signed"
    )
    allow_unsigned_code: bool = Field(
        default=False, description="true: model code that nobody signed may run, behind the walls"
    )
    unconfined_code: bool = Field(
        default=False, description="true: model code may run where this host cannot build the walls"
    )


class InferenceSettings(_Section):
    """How models run."""

    threads: int = Field(
        default=0,
        ge=0,
        le=1024,
        description="threads for one operation; 0: measured once for each model, and remembered",
    )
    memory_limit_bytes: Bytes = Field(
        default=0, description="all runners together; 0: the limits of the host and its cgroup"
    )
    drain_s: Seconds = Field(default=20, description="time for running prompts at SIGTERM")
    parallel: int = Field(default=4, ge=1, le=16, description="prompts that one model answers at once")
    share_prefixes: bool = Field(
        default=False,
        description="true: clients share the beginnings of prompts, and can tell what others asked",
    )
    kv_bytes: Bytes = Field(
        default=512 << 20, description="keys and values that a model keeps; always at least one context"
    )


class Settings(BaseSettings):
    """All settings, frozen. Build them with `load`."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
        nested_model_default_partial_update=True,
    )

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

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Variables override the file, whose content arrives as `init_settings`."""
        return env_settings, init_settings

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
        return (_default_state_dir() if path == Path() else path.expanduser()).absolute()

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
        path = path.expanduser().absolute()
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
    content = _read_toml(path) if path else {}
    _refuse_unknown_variables()
    if nested := [key for key in ("device_id", "state_dir", "control_socket") if content.get(key) is None]:
        # Validators fill in these three, and pydantic runs them only for keys that are present.
        content = {**{key: "" if key == "device_id" else Path() for key in nested}, **content}
    try:
        return Settings(**content)
    except ValidationError as error:
        raise SettingsError(_describe(error, path)) from error
    except pydantic_settings.SettingsError as error:
        raise SettingsError(f"environment: {error}") from error


def find_config() -> Path | None:
    """`$CONFIGURATION_DIRECTORY/config.toml`, else the user's file, else the system's; None if there is none."""
    directory = environment.directory("CONFIGURATION_DIRECTORY")
    if directory:
        candidates = [directory / "config.toml"]
    elif os.geteuid() == 0:
        candidates = [SYSTEM_CONFIG]
    else:
        candidates = [platformdirs.user_config_path(APPLICATION) / "config.toml", SYSTEM_CONFIG]
    return next((path for path in candidates if path.is_file()), None)


def find_control_socket(settings: Settings) -> Path:
    """The socket on which a command reaches the daemon: the configured one, else the system service's."""
    if not settings.control_socket.exists() and SYSTEM_CONTROL_SOCKET.exists():
        return SYSTEM_CONTROL_SOCKET
    return settings.control_socket


def _default_state_dir() -> Path:
    directory = environment.directory("STATE_DIRECTORY")
    if directory:
        return directory
    if os.geteuid() == 0:
        return Path("/var/lib") / APPLICATION
    return platformdirs.user_state_path(APPLICATION)


def _host_name() -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "-", socket.gethostname())[:64] or "device"


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
        if len(data) > _MAX_CONFIG_BYTES:
            raise SettingsError(f"{path} has more than {_MAX_CONFIG_BYTES} bytes")
        return tomllib.loads(data.decode("utf-8"))
    except OSError as error:
        raise SettingsError(f"settings file {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"settings file {path} is not TOML: {error}") from error


def _refuse_unknown_variables() -> None:
    """Refuses misspelt variables, which pydantic-settings would ignore."""
    for variable in environment.names(ENV_PREFIX):
        key = variable.removeprefix(ENV_PREFIX).lower().split("__")[0]
        if key not in Settings.model_fields:
            raise SettingsError(f"variable {variable} does not name a setting: {key!r} is unknown")


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
