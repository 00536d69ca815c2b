"""`edge-agent bench`: how fast the active model runs on this device, and what each layer of the agent costs.

    check trust and digests, as before each load → the bare library makes the prompts
    → for each launch measure: bare, bare with its own threads, pyfunc, runner, MQTT, and a peer, with one slot and
    with four → medians → ratios

Each side is loaded alone and in new processes, so memory for one copy of the model is enough, and drifts of the
host affect all sides alike. The benchmark does not touch the running daemon or its cache: the MQTT side runs a
daemon of its own with links to the same blobs. This process imports no model library.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import edge_agent
from edge_agent.bench import peers, report, sides
from edge_agent.bench.line_child import BenchError, LineChild
from edge_agent.bench.measurements import (
    PEER_AT_ONCE,
    Measured,
    PeerTogether,
    Prompts,
    Together,
    measure,
    measure_peer_together,
    measure_together,
)
from edge_agent.bench.sides import MqttSide, Side, Subject
from edge_agent.cache.record import VersionRecord
from edge_agent.cache.store import Store
from edge_agent.cache.verify import check_files
from edge_agent.errors import ContentError, NoModel, UnknownModel
from edge_agent.host import cpus, identity, memory
from edge_agent.package import genai_options, onnx_graph, trust
from edge_agent.private_broker import BrokerMissing
from edge_agent.runner.process import child_environment
from edge_agent.serving.learned import Learned
from edge_agent.serving.threads import ThreadChoice
from edge_agent.settings import Settings

_LEAST_BANDWIDTH_BYTES, _MOST_BANDWIDTH_BYTES = 64 << 20, 1 << 30


def run_bench(
    settings: Settings,
    *,
    model: str | None,
    launches: int,
    tokens: int,
    say: Callable[[str], None],
    peer: Path | None = None,
) -> dict[str, Any]:
    """Measures the active version of a model.

    Args:
        model: a configured name; None for the default model.
        launches: how often each side is started.
        tokens: new tokens in each answer.
        say: called with a line for each step.
        peer: a GGUF file that llama.cpp runs beside it, with the same threads and prompts; None for nobody.

    Returns:
        The document that `report` describes.

    Raises:
        NoModel: no version of this model is in the cache.
        PolicyError, VerificationError: the version may not run, or is damaged.
        EdgeAgentError: the version is not an ONNX package, or a side does not run; the peer is not installed.
    """
    if peer is not None:
        peers.check(peer, child_environment(settings.state_dir))
    store = Store(settings.state_dir)
    record = _active(settings, store, model)
    policy = settings.trust
    trust.hold(record.trust, public_keys=policy.public_keys, allow_unsigned_code=policy.allow_unsigned_code)
    with store.lease(record) as folder:
        say("digests")
        check_files(folder, record)
        subject = _subject(settings, store, record, folder)
        measured, together, of_peer, notes = _measure(
            subject, peer, launches=launches, tokens=tokens, say=say
        )
        say("memory bandwidth")
        roofline = {"bandwidth_bytes_per_s": _bandwidth(subject), "model_bytes": _bytes_a_token(subject)}
    head = {
        "model": record.name,
        "version": record.version,
        "digest": record.digest,
        "host": identity.of_host(),
        "agent_version": edge_agent.__version__,
        "threads": subject.threads,
        "context_tokens": subject.context_tokens,
        "launches": launches,
        "tokens": tokens,
    }
    against = peers.described(peer) if peer else None
    return report.document(head, measured, together, roofline, notes, against, of_peer)


def _measure(
    subject: Subject, peer: Path | None, *, launches: int, tokens: int, say: Callable[[str], None]
) -> tuple[dict[str, Measured], Together | None, PeerTogether | None, list[str]]:
    say("prompts")
    with sides.bare(subject, subject.threads) as side:
        prompts = Prompts.made_by(side, context_tokens=subject.context_tokens, new_tokens=tokens)
    starts = _starts(subject, peer)
    measured = {name: Measured() for name in starts}
    together, of_peer, notes = Together(), PeerTogether(), list[str]()
    for launch in range(launches):
        turn = f"launch {launch + 1} of {launches}"
        for name in list(starts):
            say(f"{turn}: {report.SIDE_NAMES[name]}")
            try:
                with starts[name]() as side_now:
                    measure(side_now, prompts, tokens, measured[name])
                    if isinstance(side_now, MqttSide):
                        measure_together(side_now, prompts, tokens, together)
            except BrokerMissing as error:
                del starts[name], measured[name]
                notes.append(f"the agent over MQTT was not measured: {error}")
        if peer is not None:
            say(f"{turn}: {report.SIDE_NAMES[report.LLAMA_CPP]}, {PEER_AT_ONCE} at once")
            with peers.llama_cpp(subject, peer, slots=PEER_AT_ONCE) as with_slots:
                measure_peer_together(with_slots, prompts, tokens, of_peer)
    if report.MQTT in measured and not together.http_ms:
        notes.append("the OpenAI interface was not measured: the extra `http` is not installed")
    return measured, together if report.MQTT in measured else None, of_peer if peer else None, notes


def _starts(subject: Subject, peer: Path | None) -> dict[str, Callable[[], AbstractContextManager[Side]]]:
    """Each side by its name, in the order of a launch."""
    starts: dict[str, Callable[[], AbstractContextManager[Side]]] = {
        report.BARE: lambda: sides.bare(subject, subject.threads),
        report.BARE_DEFAULT: lambda: sides.bare(subject, 0),
        report.PYFUNC: lambda: sides.pyfunc(subject),
        report.RUNNER: lambda: sides.runner(subject),
        report.MQTT: lambda: sides.mqtt(subject),
    }
    if peer is not None:
        starts[report.LLAMA_CPP] = lambda: peers.llama_cpp(subject, peer)
    return starts


def _active(settings: Settings, store: Store, model: str | None) -> VersionRecord:
    name = model or settings.default_model
    if name is None:
        raise NoModel("no model is configured", remedy="add a [models.NAME] table to the settings")
    if name not in settings.models:
        raise UnknownModel(f"no model is called {name!r} here; there are {', '.join(settings.models)}")
    key = store.state().model(name).active
    record = store.record(name, key) if key else None
    if record is None:
        raise NoModel(f"model {name!r} has no active version", remedy="run `edge-agent models pull`")
    return record


def _subject(settings: Settings, store: Store, record: VersionRecord, folder: Path) -> Subject:
    options = [file.path for file in record.files if Path(file.path).name == genai_options.FILE_NAME]
    if len(options) != 1:
        raise BenchError(f"version {record.version} of {record.name} is not an onnxruntime-genai model")
    choice = ThreadChoice(settings.inference.threads, learned=Learned(store.learned_file))
    return Subject(
        settings=settings,
        store=store,
        record=record,
        folder=folder,
        onnx=(folder / options[0]).parent,
        threads=choice.candidates(record.digest)[0],
    )


def _bandwidth(subject: Subject) -> float:
    """What this memory gives to all CPUs that the process may use; to the model's threads, if that is more."""
    size = min(_MOST_BANDWIDTH_BYTES, max(_LEAST_BANDWIDTH_BYTES, memory.available_bytes() // 4))
    counts = {subject.threads, max(cpus.thread_counts())}
    return max(_bandwidth_of(threads, size, subject) for threads in counts)


def _bandwidth_of(threads: int, size_bytes: int, subject: Subject) -> float:
    arguments = (str(size_bytes), str(threads))
    with LineChild("edge_agent.bench.bandwidth", *arguments, environment=subject.environment) as child:
        return round(float(child.read(timeout_s=sides.LOAD_TIMEOUT_S)["bytes_per_s"]))


def _bytes_a_token(subject: Subject) -> int:
    """Bytes of weights that decoding one token reads: all but the embeddings, of which it reads one row, unless they
    are the last matrix as well."""
    graphs = list(subject.onnx.glob("*.onnx"))
    total = sum(file.stat().st_size for file in (*graphs, *subject.onnx.glob("*.onnx.data")))
    try:
        read = [onnx_graph.read(graph) for graph in graphs]
        tables = sum(graph.embedding_bytes for graph in read if not graph.embedding_shared)
    except ContentError:
        tables = 0
    return max(1, total - tables)
