"""The `edge-agent` command.

Owns the words of the command line and its exit codes: 0 done, 1 failed, 2 usage, 3 daemon not running,
4 no model ready, 5 timed out, 78 settings invalid. Results go to stdout, with `--json` as one document and
nothing else; logs, progress and errors go to stderr. Contract: docs/cli.md.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

import edge_agent
from edge_agent import settings as settings_module
from edge_agent import terminal
from edge_agent.errors import (
    DaemonNotRunning,
    DeadlineExceeded,
    EdgeAgentError,
    NoModel,
    SettingsError,
    UnknownModel,
)
from edge_agent.models import durable
from edge_agent.owner import acting_as_owner_of
from edge_agent.settings import Settings
from edge_agent.transport import control

if TYPE_CHECKING:
    from edge_agent.doctor import Finding
    from edge_agent.models.store import Store

FAILED, NOT_RUNNING, NO_MODEL, TIMED_OUT, INVALID_SETTINGS = 1, 3, 4, 5, 78

_EXIT_CODES: dict[str, int] = {
    SettingsError.code: INVALID_SETTINGS,
    DaemonNotRunning.code: NOT_RUNNING,
    NoModel.code: NO_MODEL,
    UnknownModel.code: NO_MODEL,
    DeadlineExceeded.code: TIMED_OUT,
}


@dataclass(frozen=True, kw_only=True)
class Invocation:
    """What the options before the command say; settings are read when a command needs them."""

    config: Path | None

    def settings(self) -> Settings:
        return settings_module.load(self.config)


class DaemonError(EdgeAgentError):
    """An error that the daemon reported over the control socket; it keeps the daemon's code."""

    def __init__(self, event: Mapping[str, Any]) -> None:
        super().__init__(str(event.get("message")), remedy=str(event.get("remedy") or ""))
        self.reported_code = str(event.get("code"))


class _Command(click.Command):
    """Keeps examples in `--help` as they are written, and turns this project's errors into exit codes."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except EdgeAgentError as error:
            _fail(error)
        except TimeoutError:
            click.echo("edge-agent: timed out", err=True)
            sys.exit(TIMED_OUT)
        except KeyboardInterrupt:
            sys.exit(130)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(FAILED)


class _Group(click.Group):
    command_class = _Command
    group_class = type


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--config", type=click.Path(path_type=Path), metavar="FILE", help="Settings file (TOML).")
@click.version_option(edge_agent.__version__, prog_name="edge-agent")
@click.pass_context
def main(context: click.Context, config: Path | None) -> None:
    """Keeps registered MLflow language models on this device and answers prompts over MQTT.

    \b
    Examples:
      edge-agent demo --once
      edge-agent --config /etc/edge-agent/config.toml run
      edge-agent probe "What is the capital of Nepal?"
    """
    context.obj = Invocation(config=config)


@main.command()
@click.pass_obj
def run(invocation: Invocation) -> None:
    """Run the daemon in the foreground, as systemd does.

    \b
    Example:
      edge-agent --config ./config.toml run
    """
    from edge_agent import daemon, logs

    settings = invocation.settings()
    logs.configure(settings.log_format, journal=settings_module.logs_to_journal())
    if invocation.config is None and settings_module.find_config() is None:
        click.echo(
            "edge-agent: no settings file was found; see docs/settings.md for where it is looked for",
            err=True,
        )
    sys.exit(daemon.run(settings))


@main.command()
@click.argument("text", required=False)
@click.option("--model", metavar="NAME", help="A [models.NAME] of the settings; the first one by default.")
@click.option(
    "--timeout", "timeout_s", type=click.FloatRange(min=0.001), metavar="S", help="Seconds to wait."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.option("--direct", is_flag=True, help="Load the model here, without a daemon.")
@click.pass_obj
def probe(
    invocation: Invocation,
    text: str | None,
    model: str | None,
    timeout_s: float | None,
    as_json: bool,
    direct: bool,
) -> None:
    """Send one prompt through the running daemon and stream the answer.

    TEXT is read from standard input when it is -.

    \b
    Examples:
      edge-agent probe "What is the capital of Japan?"
      echo "What is 2 plus 3?" | edge-agent probe - --json
      edge-agent probe --direct "Hello"
    """
    settings = invocation.settings()
    question = _question(text, settings.limits.payload_bytes)

    def show(delta: str) -> None:
        if not as_json:
            click.echo(delta, nl=False)
            sys.stdout.flush()

    from edge_agent import probe as probing

    ask = probing.ask_direct if direct else probing.ask_daemon
    whoever = acting_as_owner_of(settings.state_dir) if direct else contextlib.nullcontext()
    shown = False

    def show_text(delta: str) -> None:
        nonlocal shown
        shown = True
        show(delta)

    try:
        with whoever:
            result = ask(settings, question, model=model, timeout_s=timeout_s, on_text=show_text)
    except EdgeAgentError:
        if shown and not as_json:
            click.echo()
        raise
    if as_json:
        click.echo(json.dumps(result, ensure_ascii=False))
    else:
        click.echo(f"\n\n{terminal.answer_line(result)}")


@main.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.option("--watch", is_flag=True, help="Again every second, until interrupted.")
@click.pass_obj
def status(invocation: Invocation, as_json: bool, watch: bool) -> None:
    """Show state, models, queue, cache, registry and broker.

    With the daemon down, shows what the disk says and exits with 3.

    \b
    Examples:
      edge-agent status
      edge-agent status --json | jq .state
    """
    settings = invocation.settings()
    while True:
        try:
            document, code = _events_result(settings, "status")["status"], 0
        except DaemonNotRunning:
            with acting_as_owner_of(settings.state_dir):
                document, code = _status_on_disk(settings), NOT_RUNNING
        if watch and not as_json:
            click.clear()
        if as_json:
            click.echo(json.dumps(document, ensure_ascii=False))
        else:
            if code:
                click.echo("edge-agent: the daemon is not running; this is what the disk says", err=True)
            terminal.print_status(document)
        if not watch:
            sys.exit(code)
        time.sleep(1.0)


@main.group(cls=_Group)
def models() -> None:
    """See and change what is in the cache.

    \b
    Examples:
      edge-agent models list
      edge-agent models pull assistant
    """


@models.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_obj
def models_list(invocation: Invocation, as_json: bool) -> None:
    """List the versions in the cache.

    \b
    Example:
      edge-agent models list --json
    """
    store = _store(invocation.settings())
    state = store.state()
    records = [(record, state.model(record.name).role(record.key)) for record in store.versions()]
    if as_json:
        keys = ("name", "version", "digest", "bytes", "state")
        click.echo(
            json.dumps(
                [
                    dict(zip(keys, (r.name, r.version, r.digest, r.total_bytes, role), strict=True))
                    for r, role in records
                ]
            )
        )
    elif records:
        terminal.print_table(
            ("NAME", "VERSION", "STATE", "SIZE", "DIGEST"),
            [
                (r.name, r.version, role, terminal.human_bytes(r.total_bytes), r.digest[:12])
                for r, role in records
            ],
        )
    else:
        click.echo("no versions yet; `edge-agent models pull` brings them")


@models.command("show")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_obj
def models_show(invocation: Invocation, name: str, as_json: bool) -> None:
    """Show one model: its versions, where they came from and why they may run.

    \b
    Example:
      edge-agent models show assistant
    """
    settings = invocation.settings()
    store = _store(settings)
    state = store.state().model(name)
    records = store.versions(name)
    if name not in settings.models and not records:
        raise EdgeAgentError(f"no model is called {name!r} here", remedy="see `edge-agent models list`")
    versions = [
        {
            "version": record.version,
            "digest": record.digest,
            "bytes": record.total_bytes,
            "files": len(record.files),
            "state": state.role(record.key),
            "registered_name": record.registered_name,
            "registry_uri": record.registry_uri,
            "run_id": record.run_id,
            "trust": record.trust.reason,
        }
        for record in records
    ]
    document = {
        "name": name,
        "uri": settings.models[name].uri if name in settings.models else None,
        "active": state.active,
        "previous": state.previous,
        "quarantined": dict(state.quarantined),
        "versions": versions,
    }
    if as_json:
        click.echo(json.dumps(document))
        return
    click.echo(f"model   {name}\nuri     {document['uri']}\nactive  {state.active}")
    for version in versions:
        click.echo(f"\nversion {version['version']}   {version['state']}")
        for key in ("digest", "bytes", "files", "registered_name", "registry_uri", "run_id", "trust"):
            click.echo(f"  {key:<16}{version[key]}")


@models.command("pull")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_obj
def models_pull(invocation: Invocation, name: str | None, as_json: bool) -> None:
    """Ask the registry now and bring NAME, or every model, up to date.

    Goes through the running daemon, or works by itself when there is none.

    \b
    Examples:
      edge-agent models pull
      edge-agent models pull assistant --json
    """
    settings = invocation.settings()
    if name is not None and name not in settings.models:
        raise UnknownModel(
            f"no model is called {name!r} here", remedy="add a [models.NAME] table to the settings"
        )
    results = _operate(settings, "pull", name=name)
    if as_json:
        click.echo(json.dumps(results[0] if len(results) == 1 else results))
        return
    for result in results:
        click.echo(
            f"{result['name']} version {result['version']}: {terminal.human_bytes(result['bytes_fetched'])} fetched, "
            f"{terminal.human_bytes(result['bytes_reused'])} already here"
        )
        if result["instead"]:
            click.echo(f"  {result['instead']}")


def _version_command(do: str, summary: str, example: str) -> None:
    """The commands that take NAME VERSION and change what runs."""

    @models.command(do, help=f"{summary}\n\n\b\nExample:\n  {example}")
    @click.argument("name")
    @click.argument("version", type=click.IntRange(min=1))
    @click.option("--json", "as_json", is_flag=True, help="One JSON document.")
    @click.pass_obj
    def command(invocation: Invocation, name: str, version: int, as_json: bool) -> None:
        _show_operation(_operate(invocation.settings(), do, name=name, version=version), as_json)


def _name_command(do: str, summary: str, example: str) -> None:
    """The commands that take NAME and change what runs."""

    @models.command(do, help=f"{summary}\n\n\b\nExample:\n  {example}")
    @click.argument("name")
    @click.option("--json", "as_json", is_flag=True, help="One JSON document.")
    @click.pass_obj
    def command(invocation: Invocation, name: str, as_json: bool) -> None:
        _show_operation(_operate(invocation.settings(), do, name=name), as_json)


_version_command(
    "activate",
    "Make a cached VERSION active, through the gate, and pin it; quarantine does not hold it back.",
    "edge-agent models activate assistant 6",
)
_version_command(
    "pin", "Fix the VERSION that runs, whatever the registry says.", "edge-agent models pin assistant 6"
)
_version_command("rm", "Remove a cached VERSION that is not in use.", "edge-agent models rm assistant 5")
_name_command(
    "rollback", "Make the previous version active again, and pin it.", "edge-agent models rollback assistant"
)
_name_command("unpin", "Let a model follow its reference again.", "edge-agent models unpin assistant")


@models.command("prune")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_obj
def models_prune(invocation: Invocation, as_json: bool) -> None:
    """Remove every version that nothing needs, and what crashes left.

    \b
    Example:
      edge-agent models prune
    """
    document = _operate(invocation.settings(), "prune")
    if as_json:
        click.echo(json.dumps(document))
    else:
        click.echo(
            f"{len(document['removed'])} versions removed, {terminal.human_bytes(document['bytes_freed'])} freed"
        )


@models.command("export")
@click.argument("name")
@click.argument("version", type=click.IntRange(min=1))
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_obj
def models_export(invocation: Invocation, name: str, version: int, file: Path, as_json: bool) -> None:
    """Write a cached VERSION into one FILE, for a device without a network.

    Every byte is verified on its way. FILE is there when all of it is, and not before; one that is there is
    replaced. Any tar program lists it.

    \b
    Example:
      edge-agent models export assistant 6 /media/stick/phi3-mini-6.tar
    """
    settings = invocation.settings()
    if file.is_dir():
        raise EdgeAgentError(f"{file} is a folder", remedy="name a file in it")
    with _file_errors("write", file), durable.replacing(file) as descriptor:
        document = _operate(
            settings, "export", name=name, version=version, file=descriptor, doing="exporting"
        )
    if as_json:
        click.echo(json.dumps(document))
    else:
        click.echo(f"{name} version {version}: {terminal.human_bytes(document['bytes'])} in {file}")


@models.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--model", "name", metavar="NAME", help="The [models.NAME] that takes it, where several could.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_obj
def models_import(invocation: Invocation, file: Path, name: str | None, as_json: bool) -> None:
    """Bring the version in FILE, made by `models export`, into the cache.

    It is verified and judged as a version from the registry, and goes through the same gate; then it is
    active, unless another one is pinned or asked for by its number. It goes to the model whose uri has the
    registered name that is in the file. No registry is needed; where there is one, its word at the next check
    counts again.

    \b
    Example:
      edge-agent models import /media/stick/phi3-mini-6.tar
    """
    settings = invocation.settings()
    with _file_errors("read", file):
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        document = _operate(settings, "import", name=name, file=descriptor, doing="importing")
    finally:
        os.close(descriptor)
    if as_json:
        click.echo(json.dumps(document))
        return
    pinned = f"; the model is pinned to {document['pinned']}" if document["pinned"] else ""
    click.echo(
        f"{document['name']} version {document['version']}: {terminal.human_bytes(document['bytes_fetched'])} "
        f"imported, {terminal.human_bytes(document['bytes_reused'])} already here; {document['state']}{pinned}"
    )


@models.command("verify")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_obj
def models_verify(invocation: Invocation, as_json: bool) -> None:
    """Read every byte in the cache again and compare it with what was verified.

    Damaged files are set aside and fetched again, only they. Exit 1 when damage remains.

    \b
    Example:
      edge-agent models verify
    """
    document = _operate(invocation.settings(), "verify")
    if as_json:
        click.echo(json.dumps(document))
    else:
        for kind in ("damaged", "repaired"):
            for entry in document[kind]:
                click.echo(f"{kind:<9}{entry['name']} {entry['version']}  {entry['path']}  {entry['reason']}")
        for name, problem in document.get("problems", {}).items():
            click.echo(f"{name} was not fetched again: {problem}", err=True)
        repaired, damaged = len(document["repaired"]), len(document["damaged"])
        click.echo(f"{document['checked']} files checked, {repaired} repaired, {damaged} damaged")
    sys.exit(FAILED if document["damaged"] else 0)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--name", required=True, help="Registered model's name; made when it is not there.")
@click.option(
    "--registry", metavar="URI", help="http(s)://… or sqlite:///…; the settings' registry by default."
)
@click.option("--alias", help="Moved to the new version, as the last step.")
@click.option(
    "--flavor",
    type=click.Choice(["onnx", "transformers"]),
    default="onnx",
    show_default=True,
    help="What DIR is: the model builder's, or a Hugging Face folder with safetensors weights.",
)
@click.option("--signature", type=click.Choice(["chat", "prompt"]), default="chat", show_default=True)
@click.option(
    "--option", "options", multiple=True, metavar="K=V", help="Generation default; may be repeated."
)
@click.option(
    "--golden",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="JSON list of prompts that devices try first.",
)
@click.option(
    "--sign-key", type=click.Path(path_type=Path), metavar="PEM", help="Private key to sign the package with."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_obj
def publish(
    invocation: Invocation,
    folder: Path,
    name: str,
    registry: str | None,
    alias: str | None,
    flavor: Any,
    signature: Any,
    options: tuple[str, ...],
    golden: Path | None,
    sign_key: Path | None,
    as_json: bool,
) -> None:
    """Package a folder made by the onnxruntime-genai model builder, or a Hugging Face folder, and register it.

    \b
    Examples:
      edge-agent publish ./phi3-int4 --name phi3-mini --alias prod --registry http://localhost:5000
      edge-agent publish ./phi3-int4 --name phi3-mini --registry sqlite:////srv/registry.db \\
          --signature prompt --option max_length=300 --option temperature=0.2
      edge-agent publish ./phi3-hf --name phi3-hf --alias prod --flavor transformers
    """
    from edge_agent import publishing
    from edge_agent.models import build_advice

    uri = registry or invocation.settings().registry.uri
    if not uri:
        raise click.UsageError("give --registry URI, or set registry.uri in the settings")
    with terminal.progress_bar() as report:
        published = publishing.publish_folder(
            folder,
            name=name,
            registry_uri=uri,
            alias=alias,
            flavor=flavor,
            signature=signature,
            options=dict(_key_value(option) for option in options),
            golden=golden,
            sign_key=sign_key,
            progress=report,
        )
    if as_json:
        click.echo(
            json.dumps(
                {
                    "name": name,
                    "version": published.version,
                    "digest": published.digest,
                    "run_id": published.run_id,
                    "alias": alias,
                }
            )
        )
    else:
        click.echo(f"{name} version {published.version} registered{f', alias {alias}' if alias else ''}")
        click.echo(f"digest {published.digest}")
    for line in build_advice.of_folder(folder):
        click.echo(f"edge-agent: {folder.name}: {line} (docs/models.md)", err=True)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.option(
    "--bundle",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Also write a support bundle (tar.gz), without prompts and secrets.",
)
@click.pass_obj
def doctor(invocation: Invocation, as_json: bool, bundle: Path | None) -> None:
    """Check this device: host, settings, daemon, broker, registry, cache, models.

    Each line says ok, warn or fail, and what to do. Exit 1 when anything failed. Works with the daemon up and
    down; as root it sees most.

    \b
    Examples:
      sudo edge-agent doctor
      edge-agent doctor --json | jq '.findings[] | select(.level != "ok")'
      sudo edge-agent doctor --bundle support.tar.gz
    """
    from edge_agent import doctor as doctors

    found = []
    has_file = (invocation.config or settings_module.find_config()) is not None
    for finding in doctors.diagnose(invocation.settings, has_file=has_file):
        found.append(finding)
        if not as_json:
            terminal.print_finding(finding.level, finding.check, finding.message, finding.remedy)
    failures = sum(finding.level is doctors.Level.FAIL for finding in found)
    if as_json:
        findings = [asdict(finding) for finding in found]
        click.echo(
            json.dumps({"ok": not failures, "agent_version": edge_agent.__version__, "findings": findings})
        )
    else:
        warnings = sum(finding.level is doctors.Level.WARN for finding in found)
        click.echo(f"\n{len(found)} checks, {warnings} to look at, {failures} failed")
    if bundle is not None:
        _write_bundle(invocation, bundle, found)
    sys.exit(FAILED if failures else 0)


@main.command()
@click.option("--once", is_flag=True, help="Ask one question, print the answer, stop everything.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document; implies --once.")
@click.option("--question", default="What is the capital of Spain?", show_default=True, help="What to ask.")
def demo(once: bool, as_json: bool, question: str) -> None:
    """Run everything on this machine with nothing configured.

    An embedded registry, a mosquitto of its own on a free port, the sample model published, pulled and
    answering over MQTT.

    \b
    Examples:
      edge-agent demo
      edge-agent demo --once --json
    """
    from edge_agent.demo import run_demo
    from edge_agent.private_broker import end_in_order

    end_in_order()
    result = run_demo(question, stay=not (once or as_json), quiet=as_json)
    if as_json:
        click.echo(json.dumps(result, ensure_ascii=False))


def _write_bundle(invocation: Invocation, path: Path, findings: Sequence[Finding]) -> None:
    from edge_agent.doctor import support_bundle

    settings = None
    with contextlib.suppress(SettingsError):  # it is one of the findings
        settings = invocation.settings()
    members = support_bundle.write(path, findings, settings)
    click.echo(f"{path}: {', '.join(members)}; read it before you send it", err=True)


@main.command()
@click.option("--model", metavar="NAME", help="A [models.NAME] of the settings; the first one by default.")
@click.option(
    "--launches", type=click.IntRange(1, 100), default=3, show_default=True, help="Starts of each side."
)
@click.option(
    "--tokens", type=click.IntRange(2, 1024), default=64, show_default=True, help="New tokens of each answer."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_obj
def bench(invocation: Invocation, model: str | None, launches: int, tokens: int, as_json: bool) -> None:
    """Measure the active version: first token, decode, several prompts at once, memory.

    The bare library, MLflow, the agent's runner and the whole agent over MQTT, one after the other, so that
    each layer's price is seen. Needs mosquitto for the last one. Takes minutes with a large model.

    \b
    Examples:
      edge-agent bench
      edge-agent bench --model assistant --launches 5 --json
    """
    from edge_agent.bench import report, run_bench
    from edge_agent.private_broker import end_in_order

    end_in_order()

    def say(line: str) -> None:
        click.echo(f"bench: {line}", err=True)

    result = run_bench(invocation.settings(), model=model, launches=launches, tokens=tokens, say=say)
    if as_json:
        click.echo(json.dumps(result))
    else:
        report.print_report(result)


# --- Shared by the commands ----------------------------------------------------------------------------


def _fail(error: EdgeAgentError) -> NoReturn:
    click.echo(f"edge-agent: {error.message}", err=True)
    if error.remedy:
        click.echo(f"            {error.remedy}", err=True)
    code = error.reported_code if isinstance(error, DaemonError) else error.code
    sys.exit(_EXIT_CODES.get(code, FAILED))


def _question(text: str | None, limit_bytes: int) -> str:
    if text == "-":
        data = sys.stdin.buffer.read(limit_bytes + 1)
        if len(data) > limit_bytes:
            raise click.UsageError(f"standard input has more than {limit_bytes} bytes (limits.payload_bytes)")
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise click.UsageError("standard input is not UTF-8") from error
    if not text or not text.strip():
        raise click.UsageError("give TEXT, or - to read it from standard input")
    return text


def _key_value(option: str) -> tuple[str, str]:
    key, separator, value = option.partition("=")
    if not separator or not key:
        raise click.UsageError(f"--option {option!r} is not K=V")
    return key, value


def _store(settings: Settings) -> Store:
    from edge_agent.models.store import Store

    return Store(settings.state_dir)


def _events_result(settings: Settings, op: str, **fields: Any) -> dict[str, Any]:
    """The `done` event of an operation that has no others."""
    for event in control.call(settings_module.find_control_socket(settings), op, timeout_s=30.0, **fields):
        if event.get("event") == "done":
            return event
        if event.get("event") == "error":
            raise DaemonError(event)
    raise EdgeAgentError("the daemon closed the connection without an answer")


def _operate(
    settings: Settings,
    do: str,
    *,
    name: str | None = None,
    version: int | None = None,
    file: int | None = None,
    doing: str = "fetching",
) -> Any:
    """One operation on the cache: through the running daemon, or by itself when there is none."""
    with terminal.progress_bar() as report:

        def on_event(event: Mapping[str, Any]) -> None:
            if event.get("event") == "progress":
                report(doing, event["bytes"], event["total_bytes"])

        try:
            return _through_daemon(settings, on_event, do=do, name=name, version=version, file=file)
        except DaemonNotRunning:
            from edge_agent.models import operations

            with acting_as_owner_of(settings.state_dir):
                local, lifecycles = operations.without_daemon(settings)
                try:
                    return operations.run_operation(
                        local, do, name=name, version=version, file=file, on_event=on_event
                    )
                finally:
                    for lifecycle in lifecycles.values():
                        lifecycle.close()


def _through_daemon(settings: Settings, on_event: Any, **fields: Any) -> Any:
    for event in control.call(settings_module.find_control_socket(settings), "models", **fields):
        if event.get("event") == "progress":
            on_event(event["progress"])
        elif event.get("event") == "done":
            return event["result"]
        elif event.get("event") == "error":
            raise DaemonError(event)
    raise EdgeAgentError("the daemon closed the connection without an answer")


@contextmanager
def _file_errors(action: str, file: Path) -> Iterator[None]:
    """The operating system's errors about a file that the command line names."""
    try:
        yield
    except OSError as error:
        raise EdgeAgentError(f"cannot {action} {file}: {error.strerror or error}") from error


def _show_operation(document: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(document))
    elif "bytes_freed" in document:
        click.echo(f"{terminal.human_bytes(document['bytes_freed'])} freed")
    else:
        pinned = f", pinned to {document['pinned']}" if document.get("pinned") else ""
        click.echo(f"{document['name']}: version {document['version']} is active{pinned}")


def _status_on_disk(settings: Settings) -> dict[str, Any]:
    """The status document as far as the disk knows it."""
    store = _store(settings)
    state = store.state()
    entries = []
    for name, model in settings.models.items():
        known = state.model(name)
        record = store.record(name, known.active) if known.active else None
        entries.append(
            {
                "name": name,
                "uri": model.uri,
                "version": record.version if record else None,
                "digest": record.digest if record else None,
                "flavor": None,
                "state": "idle" if record else "absent",
                "reason": known.instead,
                "tokens_per_s": None,
                "previous": known.previous,
                "candidate": known.candidate,
                "pinned": known.pinned,
                "quarantined": dict(known.quarantined),
            }
        )
    return {
        "state": "offline",
        "time": int(time.time()),
        "boot_id": None,
        "seq": 0,
        "agent_version": edge_agent.__version__,
        "queue_depth": 0,
        "models": entries,
        "cache": {
            "bytes": store.used_bytes(),
            "quota_bytes": settings.cache.quota_bytes,
            "free_bytes": store.free_bytes(),
        },
        "registry": {"uri": settings.registry.uri, "reachable": None, "last_check": None},
        "broker": {"host": settings.mqtt.host, "port": settings.mqtt.port, "connected": False},
    }
