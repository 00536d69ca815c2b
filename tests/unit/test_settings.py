"""Settings: defaults, the order of sources, errors that name their key, and a page that lists them all."""

import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from edge_agent import environment, settings
from edge_agent.errors import EdgeAgentError, PublishError, SettingsError
from edge_agent.fleet.survey import read_list
from edge_agent.package import trust
from edge_agent.package.trust import Rule, TrustDecision
from edge_agent.publishing import source
from edge_agent.runner import process as runner_process
from edge_agent.settings import Settings
from edge_agent.settings.model import ModelSettings, SandboxSettings
from edge_agent.settings.mqtt import MqttSettings
from edge_agent.settings.registry import RegistrySettings
from edge_agent.sync import process as sync_process
from edge_agent.sync.tls import TlsFiles
from edge_agent.transport.credentials import read_password, tls_context
from tests.support.processes import to_toml

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"


def load(folder: Path, **content: Any) -> Settings:
    file = folder / "config.toml"
    file.write_text(to_toml(content))
    return settings.load(file)


def test_the_first_model_is_the_default_one(tmp_path: Path) -> None:
    loaded = load(tmp_path, models={"b": {"uri": "models:/b@prod"}, "a": {"uri": "models:/a/3"}})
    assert loaded.default_model == "b"
    assert loaded.models["a"].ref.version == 3


def test_the_environment_is_stronger_than_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_AGENT_MQTT__HOST", "from-environment")
    loaded = load(tmp_path, mqtt={"host": "from-file", "port": 1884})
    assert (loaded.mqtt.host, loaded.mqtt.port) == ("from-environment", 1884)


@pytest.mark.parametrize(
    ("variables", "path", "value"),
    [
        ({"mqtt__port": "1885"}, ("mqtt", "port"), 1885),
        ({"MQTT": '{"port": 1885}'}, ("mqtt", "port"), 1885),
        ({"MQTT": '{"port": 1885}', "MQTT__PORT": "1886"}, ("mqtt", "port"), 1886),
        ({"MQTT__REPLY_PREFIXES": '["a/", "b/"]'}, ("mqtt", "reply_prefixes"), ("a/", "b/")),
        ({"MODELS__A__CONTEXT_TOKENS": "64"}, ("models", "a", "context_tokens"), 64),
        ({"MODELS__B__URI": "models:/b@prod"}, ("models", "b", "uri"), "models:/b@prod"),
        ({"MODELS": '{"B": {"uri": "models:/b@prod"}}'}, ("models", "B", "uri"), "models:/b@prod"),
        ({"MODELS__A__SANDBOX__READ": '["/data"]'}, ("models", "a", "sandbox", "read"), (Path("/data"),)),
        ({"INFERENCE__SHARE_PREFIXES": "true"}, ("inference", "share_prefixes"), True),
        ({"DEVICE_ID": "other"}, ("device_id",), "other"),
    ],
)
def test_a_variable_sets_any_key_and_leaves_the_others(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    path: tuple[str, ...],
    value: object,
) -> None:
    file = {"device_id": "dev", "mqtt": {"host": "broker"}, "models": {"a": {"uri": "models:/a/3"}}}
    for name, text in variables.items():
        monkeypatch.setenv(f"EDGE_AGENT_{name}", text)
    loaded: Any = load(tmp_path, **file)
    assert (loaded.mqtt.host, loaded.models["a"].uri) == ("broker", "models:/a/3")
    for key in path:
        loaded = loaded[key] if isinstance(loaded, dict) else getattr(loaded, key)
    assert loaded == value


@pytest.mark.parametrize(
    ("variable", "text", "named"),
    [
        ("EDGE_AGENT_MQT__PORT", "1", "EDGE_AGENT_MQT__PORT"),
        ("EDGE_AGENT_MQTT__SURPRISE", "1", "mqtt.surprise"),
        ("EDGE_AGENT_MQTT__PORT", "x", "mqtt.port"),
        ("EDGE_AGENT_MQTT__REPLY_PREFIXES", "a/", "mqtt"),
        ("EDGE_AGENT_MODELS", "{", "models"),
        ("EDGE_AGENT_MQTT", "1", "mqtt"),
    ],
)
def test_a_wrong_variable_is_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, text: str, named: str
) -> None:
    monkeypatch.setenv(variable, text)
    with pytest.raises(SettingsError, match=named):
        load(tmp_path, mqtt={"host": "broker"})


def test_systemds_directories_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATE_DIRECTORY", f"{tmp_path}/state:{tmp_path}/other")
    monkeypatch.setenv("RUNTIME_DIRECTORY", f"{tmp_path}/run")
    loaded = load(tmp_path)
    assert loaded.state_dir == tmp_path / "state"
    assert loaded.control_socket == tmp_path / "run" / "control.sock"


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ({"surprise": 1}, "surprise"),
        ({"mqtt": {"surprise": 1}}, "mqtt.surprise"),
        ({"mqtt": {"port": "x"}}, "mqtt.port"),
        ({"mqtt": {"prefix": "a/+"}}, "mqtt.prefix"),
        ({"mqtt": {"prefix": "a/b/c/d"}}, "mqtt.prefix"),
        ({"mqtt": {"reply_prefixes": ["#"]}}, "mqtt.reply_prefixes"),
        ({"mqtt": {"reply_prefixes": ["replies/\ufffe"]}}, "mqtt.reply_prefixes"),
        ({"mqtt": {"cert_file": "x"}}, "mqtt"),
        ({"registry": {"uri": "http://user:secret@host"}}, "registry.uri"),
        ({"registry": {"uri": "HTTP://user:secret@host"}}, "registry.uri"),
        ({"registry": {"uri": "postgresql+psycopg2://user:secret@host"}}, "registry.uri"),
        ({"registry": {"uri": "user:secret@host:5000"}}, "registry.uri: must not contain credentials"),
        (
            {"registry": {"uri": "127.0.0.1:5051"}},
            "registry.uri: '127.0.0.1:5051' has no scheme: write http://127.0.0.1:5051",
        ),
        ({"registry": {"uri": "databricks"}}, "registry.uri"),
        ({"registry": {"poll_interval_s": 0}}, "registry.poll_interval_s"),
        ({"models": {"a/b": {"uri": "models:/a@b"}}}, "models"),
        ({"models": {"a": {"uri": "models:/a/latest"}}}, "models.a.uri"),
        ({"models": {"a": {}}}, "models.a.uri"),
        ({"models": {"a": {"uri": "models:/a@b", "max_tokens": 0}}}, "models.a.max_tokens"),
        *(
            (
                {"models": {"a": {"uri": "models:/a@b", "repetition_penalty": bad}}},
                "models.a.repetition_penalty",
            )
            for bad in (-1, 0, 0.001, 101, float("nan"), "high")
        ),
        *(
            (
                {"state_dir": "/srv/agent", "models": {"a": {"uri": "models:/a@b", "sandbox": sandbox}}},
                "models.a.sandbox",
            )
            for sandbox in (
                {"read": ["relative"]},
                {"read": ["/srv/x/../agent"]},
                {"read": ["/srv/agent/models/blobs"]},
                {"read": ["/srv/agent"]},
                {"read": ["/srv"]},
                {"read": ["/"]},
                {"surprise": 1},
                {"network": "maybe"},
            )
        ),
        ({"link": {"windows": ["22-05"]}}, "link.windows"),
        ({"link": {"windows": ["22:00-05:00"] * 33}}, "link.windows"),
        ({"link": {"activate_windows": ["05:00-05:00"]}}, "link.activate_windows"),
        ({"link": {"timezone": "Mars/Olympus"}}, "link.timezone"),
        ({"link": {"bytes_per_day": -1}}, "link.bytes_per_day"),
        ({"link": {"inhibit_file": "in-use"}}, "link.inhibit_file"),
        ({"device_id": "with space"}, "device_id"),
        *(
            ({"http": {key: bad}}, f"http.{key}" if key != "cert_file" else "http")
            for key, bad in (
                ("listen", "8080"),
                ("listen", "example.test:8080"),
                ("listen", "127.0.0.1:0"),
                ("listen", "127.0.0.1:65536"),
                ("listen", "::1:8080"),
                ("listen", "[::1:8080"),
                ("socket", "http.sock"),
                ("socket", "/" + "x" * 120),
                ("allowed_hosts", ["http://box.lan"]),
                ("allowed_hosts", ["box.lan:8080"]),
                ("allowed_hosts", ["*"]),
                ("cert_file", "x"),
                ("surprise", 1),
            )
        ),
        ({"control_socket": "/" + "x" * 120}, "control_socket"),
        ({"cache": {"quota_bytes": -1}}, "cache.quota_bytes"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, content: dict[str, Any], key: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load(tmp_path, **content)
    assert key in caught.value.message
    assert "secret" not in caught.value.message


def test_an_operators_file_names_the_broker_and_the_registry_only(tmp_path: Path) -> None:
    loaded = load(tmp_path, fleet={}, mqtt={"host": "broker"}, registry={"uri": "http://registry:5000"})
    assert loaded.mqtt.host == "broker"
    assert loaded.models == {}
    with pytest.raises(SettingsError, match=r"fleet\.waves: unknown key"):
        load(tmp_path, fleet={"waves": 3})


@pytest.mark.parametrize(
    "named",
    [{}, {"max_tokens": 256}, {"repetition_penalty": 1.0}, {"max_tokens": 80, "repetition_penalty": 1.2}],
)
def test_only_what_the_settings_name_comes_before_the_package(
    tmp_path: Path, named: dict[str, float]
) -> None:
    model = load(tmp_path, models={"a": {"uri": "models:/a@b", **named}}).models["a"]
    assert model.generation == named
    assert (model.max_tokens, model.repetition_penalty) == (
        named.get("max_tokens", 256),
        named.get("repetition_penalty", 1),
    )


def test_a_file_that_is_not_there_or_not_toml_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be read"):
        settings.load(tmp_path / "missing.toml")
    (tmp_path / "bad.toml").write_bytes(b"[mqtt\n\xff")
    with pytest.raises(SettingsError, match="not TOML"):
        settings.load(tmp_path / "bad.toml")


def test_the_page_lists_every_setting_with_its_default() -> None:
    page = PAGE.read_text("utf-8")
    missing = [key for key, default in keys() if f"| `{key}` | `{default}` |" not in page]
    assert missing == [], "docs/settings.md is behind the code"


def keys() -> list[tuple[str, str]]:
    """Every key as it stands in the file, with its default as TOML has it."""
    found: list[tuple[str, str]] = []
    for name, field in Settings.model_fields.items():
        section = field.default
        if name == "models":
            found += [
                (f"models.NAME.{key}", _default(ModelSettings, key))
                for key in ModelSettings.model_fields
                if key != "sandbox"
            ]
            found += [
                (f"models.NAME.sandbox.{key}", _default(SandboxSettings, key))
                for key in SandboxSettings.model_fields
            ]
        elif isinstance(section, BaseModel):
            found += [(f"{name}.{key}", _default(type(section), key)) for key in type(section).model_fields]
        else:
            found.append((name, _default(Settings, name)))
    return found


def _default(model: type[BaseModel], key: str) -> str:
    field = model.model_fields[key]
    if field.is_required():
        return "required"
    value = field.default
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Path):
        return '""'
    if isinstance(value, tuple):
        return str(list(value)).replace("'", '"')
    return f'"{value}"' if isinstance(value, str) else str(value)


@pytest.mark.parametrize(
    ("registry", "said"),
    [
        ({"uri": "https://r", "cert_file": "x"}, "go together"),
        ({"uri": "https://r", "key_file": "x"}, "go together"),
        ({"uri": "http://r", "ca_file": "x"}, "need an https uri"),
        ({"uri": "sqlite:///r", "cert_file": "x", "key_file": "y"}, "need an https uri"),
        ({"ca_file": "x"}, "need an https uri"),
    ],
)
def test_the_registrys_certificates_need_each_other_and_https(registry: dict[str, str], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        RegistrySettings.model_validate(registry)


def test_the_registrys_credentials_come_from_systemd_and_reach_the_sync_process_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mlflow-tracking-token").write_text("a token\n")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert sync_process.child_environment()["MLFLOW_TRACKING_TOKEN"] == "a token"
    assert "a token" not in runner_process.child_environment(tmp_path).values()
    (tmp_path / "mlflow-tracking-token").write_bytes(b"\xff")
    with pytest.raises(SettingsError, match="mlflow-tracking-token"):
        environment.registry_credentials()


# --- Files that the settings name -----------------------------------------------------------------------


def endless(folder: Path) -> Path:
    """A file without an end. Whoever reads more of it than this process has memory for gets a MemoryError."""
    file = folder / "endless"
    file.symlink_to("/dev/zero")
    return file


@pytest.fixture
def little_memory() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_AS)
    used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used_bytes + (256 << 20), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.usefixtures("little_memory")
def test_no_more_of_a_file_is_read_than_it_may_have(tmp_path: Path) -> None:
    file = endless(tmp_path)
    with pytest.raises(SettingsError, match=r"endless cannot be read: it has more than 1048576 bytes"):
        settings.load(file)
    with pytest.raises(SettingsError, match=r"mqtt\.password_file: .*endless cannot be read: it has more"):
        read_password(MqttSettings(password_file=str(file)), None)
    with pytest.raises(PublishError, match=r"endless cannot be read: it has more than 1048576 bytes"):
        source.read_golden(file)
    with pytest.raises(EdgeAgentError, match=r"endless cannot be read: it has more than \d+ bytes"):
        read_list(file)
    decision = TrustDecision(rule=Rule.NO_CODE, signed_by="", unsigned_code=False, reason="")
    with pytest.raises(SettingsError, match=r"endless cannot be read: it has more than 1048576 bytes"):
        trust.still_holds(decision, public_keys=[str(file)])


@pytest.mark.parametrize(
    "url", ["https://fleet:s3cret@mirror.test/models/", "https://mirror.test/models/?token=s3cret"]
)
def test_a_mirrors_password_is_not_quoted(tmp_path: Path, url: str) -> None:
    with pytest.raises(
        SettingsError, match=r"cache\.mirrors: 'https://mirror\.test/models/' must be"
    ) as caught:
        load(tmp_path, cache={"mirrors": [url]})
    assert "s3cret" not in str(caught.value)


def test_a_password_is_never_cut(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("x" * 65_535)
    assert read_password(MqttSettings(password_file=str(file)), None) == "x" * 65_535
    file.write_text("x" * 65_536)
    with pytest.raises(SettingsError, match="has more than 65535 bytes"):
        read_password(MqttSettings(password_file=str(file)), None)


def test_a_secret_that_is_no_text_is_not_quoted(tmp_path: Path) -> None:
    (tmp_path / "password").write_bytes(b"\xfe\xff")
    with pytest.raises(SettingsError) as caught:
        read_password(MqttSettings(password_file=str(tmp_path / "password")), None)
    assert str(caught.value) == f"mqtt.password_file: credential {tmp_path / 'password'} is not UTF-8"


def test_a_file_that_is_missing_is_named_once_and_without_a_number(tmp_path: Path) -> None:
    there, gone = tmp_path / "there.pem", tmp_path / "gone.pem"
    there.write_text("")
    mqtt = MqttSettings(ca_file=str(gone), cert_file=str(there), key_file=str(gone))
    pair = TlsFiles(cert_file=str(there), key_file=str(gone))
    for look, said in (
        (
            lambda: read_password(MqttSettings(password_file=str(gone)), None),
            "mqtt.password_file: credential {}",
        ),
        (lambda: tls_context(mqtt), "mqtt.ca_file: cannot be loaded: {}"),
        (pair.check, "registry.cert_file, registry.key_file: cannot be loaded: {}"),
    ):
        with pytest.raises(SettingsError) as caught:
            look()
        message = str(caught.value)
        assert message.startswith(said.format(gone))
        assert message.count(str(gone)) == 1
        assert message.endswith("No such file or directory")
        assert "Errno" not in message
