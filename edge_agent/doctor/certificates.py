"""This device's side of TLS: whether its files load as the daemon loads them, and when its certificates expire.

Source: RFC 5280 §4.1.2.5 (Validity).
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from edge_agent.doctor.finding import Finding, fail, ok, warn
from edge_agent.errors import SettingsError
from edge_agent.settings.http import HttpSettings
from edge_agent.settings.mqtt import MqttSettings
from edge_agent.settings.registry import RegistrySettings
from edge_agent.sync.tls import TlsFiles
from edge_agent.transport.credentials import tls_context

Period = tuple[datetime, datetime]
"""The first and the last moment at which a certificate is valid."""

_SOON = timedelta(days=30)
_MAX_FILE_BYTES = 4 << 20


def check(mqtt: MqttSettings) -> Iterator[Finding]:
    """Checks `mqtt.ca_file`, `mqtt.cert_file` and `mqtt.key_file`; yields nothing without TLS."""
    if mqtt.ca_file:
        yield from _check("mqtt", mqtt, lambda: tls_context(mqtt))


def check_registry(registry: RegistrySettings) -> Iterator[Finding]:
    """Checks `registry.ca_file`, `registry.cert_file` and `registry.key_file`; yields nothing without them."""
    yield from _check("registry", registry, TlsFiles.of(registry).check)


def check_http(http: HttpSettings) -> Iterator[Finding]:
    """Checks `http.cert_file`; its key may be a credential that only its own service sees."""
    if chain := _periods(http.cert_file) if http.cert_file else []:
        remedy = "issue a new certificate, then `systemctl restart edge-agent-http`"
        yield _check_dates("http.cert_file", http.cert_file, _of_all(chain), datetime.now(UTC), remedy)


def _check(
    section: str, settings: MqttSettings | RegistrySettings, load: Callable[[], object]
) -> Iterator[Finding]:
    now = datetime.now(UTC)
    try:
        load()
    except SettingsError as error:
        # `settings.files` reports missing and unreadable files already.
        if not isinstance(error.__cause__, PermissionError | FileNotFoundError):
            yield _unusable(settings, error)
    authorities = _periods(settings.ca_file) if settings.ca_file else []
    if authorities:
        remedy = "install the authority's new certificate"
        period = _of_any(authorities, now)
        yield _check_dates(f"{section}.ca_file", settings.ca_file, period, now, remedy)
    chain = _periods(settings.cert_file) if settings.cert_file else []
    if chain:
        remedy = "issue a new certificate for this device; the daemon loads it at its next start"
        yield _check_dates(f"{section}.cert_file", settings.cert_file, _of_all(chain), now, remedy)


def _of_all(periods: Sequence[Period]) -> Period:
    """The period of a chain: every certificate in it must be valid."""
    return max(begins for begins, _ in periods), min(ends for _, ends in periods)


def _of_any(periods: Sequence[Period], now: datetime) -> Period:
    """The period of several authorities, old and future ones among them: the one that lasts longest counts."""
    begun = [period for period in periods if period[0] <= now]
    return max(begun or periods, key=lambda period: period[1])


def _unusable(settings: MqttSettings | RegistrySettings, error: SettingsError) -> Finding:
    cause = error.__cause__
    reason = cause.reason if isinstance(cause, ssl.SSLError) else ""
    if reason == "KEY_VALUES_MISMATCH":
        return fail(
            "settings.tls",
            f"the key {settings.key_file} does not belong to the certificate {settings.cert_file}",
            "install the certificate and the key that were issued together",
        )
    return fail(
        "settings.tls",
        error.message,
        "each file must be PEM, and the key must have no passphrase: nobody is there to type it",
    )


def _periods(file: str) -> list[Period]:
    """The periods of the certificates in a file; none if it cannot be read, which is already a finding."""
    # Imported here, because a library that does not load must not stop the other checks.
    from cryptography import x509

    try:
        with Path(file).open("rb") as opened:
            found = x509.load_pem_x509_certificates(opened.read(_MAX_FILE_BYTES))
    except (OSError, ValueError):
        return []
    return [(each.not_valid_before_utc, each.not_valid_after_utc) for each in found]


def _check_dates(key: str, file: str, period: Period, now: datetime, remedy: str) -> Finding:
    begins, ends = period
    line = f"{file} ({key})"
    if ends <= now:
        return fail("settings.tls", f"{line} expired on {ends.date()}", remedy)
    if begins > now:
        return fail(
            "settings.tls",
            f"{line} is not valid before {begins.date()}",
            "set the clock, or install another certificate",
        )
    if ends - now < _SOON:
        return warn("settings.tls", f"{line} expires on {ends.date()}", remedy)
    return ok("settings.tls", f"{line} is valid until {ends.date()}")
