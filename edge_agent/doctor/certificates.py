"""TLS with the broker, this device's side: do its files load, as the daemon loads them, and how long do they hold?

Source: RFC 5280 §4.1.2.5 (Validity).
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from edge_agent.doctor.finding import Finding, fail, ok, warn
from edge_agent.errors import SettingsError
from edge_agent.settings import MqttSettings
from edge_agent.transport.credentials import tls_context

Period = tuple[datetime, datetime]
"""From when until when a certificate is valid."""

_SOON = timedelta(days=30)
_MAX_FILE_BYTES = 4 << 20


def check(mqtt: MqttSettings) -> Iterator[Finding]:
    """Looks at `mqtt.ca_file`, `mqtt.cert_file` and `mqtt.key_file`; nothing to say without TLS."""
    if not mqtt.ca_file:
        return
    now = datetime.now(UTC)
    try:
        tls_context(mqtt)
    except SettingsError as error:
        if not isinstance(error.__cause__, PermissionError | FileNotFoundError):  # `settings.files` has those
            yield _unusable(mqtt, error)
    yield from _check_dates(
        "mqtt.ca_file", mqtt.ca_file, _of_any, now, "bring the authority's new certificate"
    )
    if mqtt.cert_file:
        renew = "have a new certificate made for this device; the daemon takes it at its next start"
        yield from _check_dates("mqtt.cert_file", mqtt.cert_file, _of_all, now, renew)


def _of_all(periods: Sequence[Period], now: datetime) -> Period:
    """Of a chain, each certificate has to hold."""
    return max(begins for begins, _ in periods), min(ends for _, ends in periods)


def _of_any(periods: Sequence[Period], now: datetime) -> Period:
    """Authorities may be many, old and future ones too: the one that holds longest counts."""
    begun = [period for period in periods if period[0] <= now]
    return max(begun or periods, key=lambda period: period[1])


def _unusable(mqtt: MqttSettings, error: SettingsError) -> Finding:
    cause = error.__cause__
    reason = cause.reason if isinstance(cause, ssl.SSLError) else ""
    if reason == "KEY_VALUES_MISMATCH":
        return fail(
            "settings.tls",
            f"the key {mqtt.key_file} is not that of the certificate {mqtt.cert_file}",
            "bring the two files that were made together",
        )
    return fail(
        "settings.tls",
        error.message,
        "each file must be PEM; the key without a passphrase: nobody is there to type it",
    )


def _check_dates(
    key: str, file: str, valid: Callable[[Sequence[Period], datetime], Period], now: datetime, remedy: str
) -> Iterator[Finding]:
    # Here: whatever keeps this library from loading must not keep doctor from the other checks.
    from cryptography import x509

    try:
        with Path(file).open("rb") as opened:
            found = x509.load_pem_x509_certificates(opened.read(_MAX_FILE_BYTES))
    except (OSError, ValueError):
        return  # a finding already
    begins, ends = valid([(each.not_valid_before_utc, each.not_valid_after_utc) for each in found], now)
    line = f"{file} ({key})"
    if ends <= now:
        yield fail("settings.tls", f"{line} ended on {ends.date()}", remedy)
    elif begins > now:
        yield fail(
            "settings.tls", f"{line} is valid from {begins.date()} on", "set the clock, or bring another"
        )
    elif ends - now < _SOON:
        yield warn("settings.tls", f"{line} ends on {ends.date()}", remedy)
    else:
        yield ok("settings.tls", f"{line} is valid until {ends.date()}")
