"""How the agent proves to the broker who it is, and the broker to the agent: the password and TLS."""

from __future__ import annotations

import ssl
from pathlib import Path

from edge_agent import environment
from edge_agent.errors import SettingsError, settings_error
from edge_agent.settings.mqtt import MqttSettings


class _ClosingSocket(ssl.SSLSocket):
    """Closes when its handshake fails: paho forgets such a socket without closing it."""

    def do_handshake(self, block: bool = False) -> None:
        try:
            super().do_handshake(block)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise  # not over yet
        except BaseException:
            self.close()
            raise


def read_password(settings: MqttSettings, credential: Path | None) -> str | None:
    """The broker's password: `mqtt.password_file`, else the systemd credential `mqtt-password`.

    Raises:
        SettingsError: the file cannot be read, is no text, or is far too long.
    """
    path = Path(settings.password_file) if settings.password_file else credential
    if path is None:
        return None
    try:
        return environment.read_credential(path)
    except SettingsError as error:
        raise type(error)(f"mqtt.password_file: {error.message}", remedy=error.remedy) from error


def tls_context(settings: MqttSettings) -> ssl.SSLContext | None:
    """TLS where `mqtt.ca_file` is set. The broker's certificate and name are always verified; a socket whose
    handshake fails is closed.

    Raises:
        SettingsError: a file cannot be loaded; its key is named.
    """
    if not settings.ca_file:
        return None
    key, files = "mqtt.ca_file", [settings.ca_file]
    try:
        context = ssl.create_default_context(cafile=settings.ca_file)
        context.sslsocket_class = _ClosingSocket
        if settings.cert_file:
            key, files = "mqtt.cert_file, mqtt.key_file", [settings.cert_file, settings.key_file]
            context.load_cert_chain(settings.cert_file, settings.key_file, password=lambda: "")
    except OSError as error:
        reason = environment.unreadable(*files) or error
        raise settings_error(f"{key}: cannot be loaded: {reason}", error) from error
    return context
