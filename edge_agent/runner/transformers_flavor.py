"""MLflow's transformers flavor, served with the agent's own contract.

Owns one loaded model and its tokenizer, read as data: what `checkpoint.py` shows of the package's folder, safetensors
weights, classes that transformers itself has, never a hub, never code from the package. MLflow's own wrapper for this
flavor is not used: offline it fails on `stop`, raises on `n`, `stream` and `temperature=0`, and cannot stream.

    load           MLmodel → config → weights and tokenizer; what this cannot serve is refused with its reason
    stream         options, tokens, budget → `generate` in a thread → tokens → text → stop → deltas and one `End`

A prompt is run in slices, and between any two layers the thread looks whether the answer is still wanted: a cancel ends
the longest prefill within a layer of one slice. Slices have a fixed length, because a length that followed the measured
speed would let the speed decide between two tokens that are nearly equally likely.
"""

from __future__ import annotations

import inspect
import itertools
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.generation.streamers import BaseStreamer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

from edge_agent.errors import BadRequest, CannotRun, PromptTooLong, RunnerError
from edge_agent.package.mlmodel import MLmodel
from edge_agent.package.transformers_options import TOKENIZER_FOLDER
from edge_agent.runner import bounds, checkpoint
from edge_agent.runner.decoder import Decoder
from edge_agent.runner.model import DEFAULT_MAX_TOKENS, End, Model, refuse_tools
from edge_agent.runner.prompts import Prompts
from edge_agent.runner.stop import StopFilter
from edge_agent.runner.worker import Job, Worker

TASKS = frozenset({"text-generation", "llm/v1/chat", "llm/v1/completions"})
SLICE_TOKENS = 256
"""Of a prompt, run at once."""
_LEAST_TEMPERATURE = 1e-5  # logits are divided by it

_LOCAL: Mapping[str, Any] = {"local_files_only": True, "trust_remote_code": False}


@dataclass(frozen=True, kw_only=True)
class _Defaults:
    """What holds where a request says nothing. The package's values are input.

    Attributes:
        context_tokens: prompt and new tokens together, at most.
        max_tokens: new ones, for a request that names none; 0 for as many as `max_length` leaves, else 256.
        max_length: the package's own cap on prompt and new tokens together; 0 for none.
    """

    context_tokens: int
    max_tokens: int
    max_length: int = 0
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None


def load(
    folder: Path,
    package: MLmodel,
    *,
    context_tokens: int,
    max_tokens: int,
    threads: int,
    repetition_penalty: float,
) -> Model:
    """Loads the package.

    Args:
        package: its MLmodel.
        context_tokens, max_tokens, threads, repetition_penalty: see `loader.load`.

    Raises:
        CannotRun: this version of transformers does not know the architecture.
        PolicyError: a file of the package leads out of it.
        RunnerError: it is no language model of this flavor, or its weights are not those of its architecture.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if threads:
        torch.set_num_threads(threads)
    flavor = package.flavor("transformers")
    if (task := flavor.get("task")) not in TASKS:
        raise RunnerError(
            f"the model's task is {task!r}", remedy="this agent serves language models: text-generation"
        )
    weights, tokenizer_folder = folder / str(flavor.get("model_binary")), folder / TOKENIZER_FOLDER
    with checkpoint.opened(weights, tokenizer_folder if tokenizer_folder.is_dir() else weights) as shown:
        model = _load_weights(shown)
        tokenizer = _load_tokenizer(shown)
    longest = getattr(model.config, "max_position_embeddings", None) or context_tokens
    given = {"max_tokens": max_tokens, "repetition_penalty": repetition_penalty}
    options = {"max_tokens": 0, **_package_options(package.pyfunc.get("config"))}
    options |= {name: value for name, value in given.items() if value}
    return TransformersModel(
        model,
        tokenizer,
        defaults=_Defaults(context_tokens=min(context_tokens, longest), **options),
        golden=package.golden,
    )


class TransformersModel(Model):
    """One loaded model; one prompt at a time.

    Args:
        model, tokenizer: transformers' own, on the CPU.
    """

    def __init__(self, model: Any, tokenizer: Any, *, defaults: _Defaults, golden: Any = None) -> None:
        self.flavor = f"transformers {transformers.__version__} (torch {torch.__version__})"
        self.golden = golden
        self._model = model
        self._tokenizer = tokenizer
        self._defaults = defaults
        self._prompts = Prompts(tokenizer)
        self.signature = "chat" if self._prompts.has_template else "prompt"
        self._worker = Worker()
        # A recurrent state, or a cache of the architecture's own, is not made for a prompt that comes in parts.
        self._in_slices = not model._is_stateful and model._supports_default_dynamic_cache()
        self._base = _clean_generation_config(model, tokenizer)
        self._eos = frozenset(self._base["eos_token_id"])
        model.generation_config = transformers.GenerationConfig(**self._base)

    def stream(self, document: dict[str, Any]) -> Generator[str | End, None, None]:
        """See `Model.stream`.

        Raises:
            BadRequest: an option that this flavor does not have, or the chat template refuses the messages.
            PromptTooLong: prompt and new tokens are more than the context.
        """
        started_s = time.perf_counter()
        if (document.get("response_format") or {"type": "text"}).get("type") != "text":
            raise BadRequest("response_format is not served by the transformers flavor")
        refuse_tools(document, "not served by the transformers flavor")
        chat = "messages" in document
        with bounds.computing():
            prompt = (
                self._prompts.chat(document["messages"]) if chat else self._prompts.raw(document["prompt"])
            )
        max_new = self._budget(len(prompt), document.get("max_tokens"))
        sampling = self._sampling(document)
        stop = document.get("stop") or ()
        stops = StopFilter([stop] if isinstance(stop, str) else stop)
        decoder = Decoder(self._tokenizer, self._prompts.control_ids)

        def generate(job: Job) -> None:
            if (seed := document.get("seed")) is not None:
                torch.manual_seed(int(seed) & 0x7FFF_FFFF_FFFF_FFFF)
            ids = torch.tensor([prompt])
            config = transformers.GenerationConfig(
                **self._base,
                **sampling,
                max_new_tokens=max_new,
                prefill_chunk_size=slice_tokens(len(prompt)) if self._in_slices else None,
            )
            with _before_each_layer(self._model, job.check):
                self._model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=config,
                    streamer=_Tokens(job.put),
                )

        new_tokens, finish_reason, first_s = 0, "length", 0.0
        tokens = self._worker.stream(generate)
        try:
            for token in tokens:
                if token is None:
                    yield ""
                    continue
                first_s = first_s or time.perf_counter()
                if token in self._eos:
                    finish_reason = "stop"
                    break
                new_tokens += 1
                yield stops.push(decoder.push(token))
                if stops.found:
                    finish_reason = "stop"
                    break
        finally:
            tokens.close()
        if rest := stops.flush():
            yield rest
        yield _end(finish_reason, len(prompt), new_tokens, started_s=started_s, first_s=first_s)

    def stopped(self, timeout_s: float) -> bool:
        """See `Model.stopped`."""
        return self._worker.ended(timeout_s)

    def _budget(self, prompt_tokens: int, max_tokens: int | None) -> int:
        """How many new tokens a request gets, at least 1; the context is checked before anything is computed."""
        limit, wanted = self._defaults.context_tokens, max_tokens or 1
        if prompt_tokens + wanted > limit:
            parts = f"{prompt_tokens} of the prompt and {wanted} new"
            raise PromptTooLong(f"{parts} are more than the context of {limit} tokens")
        max_length = self._defaults.max_length
        left = min(limit, max_length or limit) - prompt_tokens
        if left < 1:
            raise PromptTooLong(f"{prompt_tokens} tokens leave nothing of the package's max_length")
        open_end = left if max_length else DEFAULT_MAX_TOKENS
        return min(left, max_tokens or self._defaults.max_tokens or open_end)

    def _sampling(self, document: Mapping[str, Any]) -> dict[str, Any]:
        defaults = self._defaults
        chosen: dict[str, Any] = {"do_sample": False}
        penalty = document.get("repetition_penalty")
        penalty = defaults.repetition_penalty if penalty is None else penalty
        if penalty is not None:
            chosen["repetition_penalty"] = float(penalty)
        temperature = document.get("temperature")
        temperature = defaults.temperature if temperature is None else temperature
        if temperature:
            top_p, top_k = document.get("top_p"), document.get("top_k")
            top_p = defaults.top_p if top_p is None else top_p
            top_k = defaults.top_k if top_k is None else top_k
            # Without a value of ours the library takes its own: 50 for top_k.
            chosen |= {"do_sample": True, "temperature": max(float(temperature), _LEAST_TEMPERATURE)}
            chosen |= {"top_p": 1.0 if top_p is None else float(top_p), "top_k": int(top_k or 0)}
        return chosen


def slice_tokens(prompt_tokens: int) -> int | None:
    """How many tokens of a prompt are run at once; None for all.

    The last slice has at least two: one token alone takes another path through the arithmetic.
    """
    if prompt_tokens <= SLICE_TOKENS:
        return None
    return next(size for size in itertools.count(SLICE_TOKENS) if prompt_tokens % size != 1)


@contextmanager
def _before_each_layer(model: Any, check: Callable[[], None]) -> Iterator[None]:
    """Calls `check` before each part of the model computes; what it raises ends a forward pass in the middle."""

    def call(*_: object) -> None:
        check()

    hooks = [module.register_forward_pre_hook(call) for module in model.modules()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Tokens(BaseStreamer):  # type: ignore[misc]
    """Hands each new token to `put`; the first thing that `generate` pushes is the prompt."""

    def __init__(self, put: Callable[[Any], None]) -> None:
        self._put = put
        self._is_prompt = True

    def put(self, value: Any) -> None:
        if self._is_prompt:
            self._is_prompt = False
            return
        for token in value.reshape(-1).tolist():
            self._put(token)

    def end(self) -> None:
        """Nothing is held back here."""


def _load_weights(shown: checkpoint.Checkpoint) -> Any:
    config = transformers.AutoConfig.from_pretrained(shown.model, **_LOCAL)
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise CannotRun(
            f"transformers {transformers.__version__} has no language model of the type {config.model_type!r}"
        )
    if shown.quantized:
        raise CannotRun(
            "the weights are quantized in a form that needs more libraries than transformers and torch",
            remedy="publish the weights as they were before, in float16 or bfloat16",
        )
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        shown.model, config=config, use_safetensors=True, dtype="auto", output_loading_info=True, **_LOCAL
    )
    if missing := sorted(map(str, loading["missing_keys"])):
        # The library would go on with random numbers in their place.
        raise RunnerError(
            f"the weights lack {len(missing)} tensors of this architecture, {missing[0]!r} first"
        )
    return model.eval()


def _load_tokenizer(shown: checkpoint.Checkpoint) -> Any:
    """The tokenizer that `tokenizer.json` describes.

    Not `AutoTokenizer`: the classes that it chooses from build a tokenizer of their own from parts of that file, and
    open a part that is a text instead of a table. Of the package's class only the names of tokens are taken that no
    configuration gives.
    """
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(shown.tokenizer, **_LOCAL)
    for name, text in _class_tokens(shown.tokenizer_class).items():
        if getattr(tokenizer, name) is None and tokenizer.backend_tokenizer.token_to_id(text) is not None:
            setattr(tokenizer, name, text)
    return tokenizer


def _class_tokens(name: str) -> dict[str, str]:
    """Named tokens, such as `eos_token`, that a class of the library has where no configuration gives any."""
    kind = tokenizer_class_from_name(name) if name else None
    if kind is None or not issubclass(kind, transformers.PreTrainedTokenizerFast):
        return {}
    parameters = inspect.signature(kind.__init__).parameters
    named = {key: parameters[key].default for key in kind.SPECIAL_TOKENS_ATTRIBUTES if key in parameters}
    return {key: text for key, text in named.items() if isinstance(text, str)}


def _clean_generation_config(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Of the package's `generation_config.json` only which tokens end an answer: the rest is options, and files.

    The file may name another end than the tokenizer, and the model was trained on the tokenizer's.
    """
    given = model.generation_config
    ends = given.eos_token_id if isinstance(given.eos_token_id, list | tuple) else [given.eos_token_id]
    ends = list(dict.fromkeys(int(end) for end in (*ends, tokenizer.eos_token_id) if end is not None))
    pad = next((t for t in (given.pad_token_id, tokenizer.pad_token_id, *ends) if t is not None), 0)
    return {"eos_token_id": ends, "pad_token_id": pad, "bos_token_id": given.bos_token_id}


def _package_options(config: object) -> dict[str, Any]:
    """Generation defaults of the package's `model_config`. What is unknown or no number is left out."""
    found: dict[str, Any] = {}
    if not isinstance(config, Mapping):
        return found
    for key, least, most in (
        ("max_new_tokens", 1, 1 << 20),
        ("temperature", 0.0, 100.0),
        ("top_p", 0.0, 1.0),
        ("top_k", 0, 1 << 20),
        ("repetition_penalty", 0.01, 100.0),
        ("max_length", 1, 1 << 30),
    ):
        value = config.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most:
            found[key] = value
    if config.get("do_sample") is False:
        found.pop("temperature", None)
    if "max_new_tokens" in found:  # the library's name
        found["max_tokens"] = int(found.pop("max_new_tokens"))
    return found


def _end(finish_reason: str, prompt: int, new: int, *, started_s: float, first_s: float) -> End:
    ended_s = time.perf_counter()
    first_s = first_s or ended_s
    return End(
        finish_reason=finish_reason,
        usage={
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "cached_tokens": 0,
        },
        timings={
            "first_token_ms": (first_s - started_s) * 1000,
            "prefill_ms": (first_s - started_s) * 1000,
            "decode_ms": (ended_s - first_s) * 1000,
            "total_ms": (ended_s - started_s) * 1000,
        },
    )
