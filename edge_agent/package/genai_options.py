"""Checks `genai_config.json`, the options of onnxruntime-genai, against an allow-list at every level.

The file can make the library write to any path (`enable_profiling`), load a shared library
(`custom_ops_library`, execution providers) or write the model elsewhere (`session.optimized_model_filepath`).
So a package is refused if it has a key that is not on the list; the message names the key and its place. The list
covers text models only: this agent's prompts have no audio and no images.
Source: the configuration reader of onnxruntime-genai 0.18 (`src/config.cpp`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edge_agent.errors import ManifestError, PolicyError
from edge_agent.package.manifest import check_path

FILE_NAME = "genai_config.json"

_MAX_BYTES = 1 << 20
_MAX_ITEMS = 10_000

_MOST = {
    "context_length": 1 << 24,
    "num_hidden_layers": 1024,
    "num_key_value_heads": 1024,
    "head_size": 4096,
}
"""Several times what the largest models have. Memory is planned by them, so a wrong one would unload other models."""

_VALUE = "value"  # text, number or boolean
_NAMES = "names"  # an object with any keys and text values, such as a graph's input names
_LIST = "list"  # a list of plain values
_PATH = "path"  # a file in the package
_EMPTY = "empty"  # an empty list or object: the CPU needs no options


def _values(keys: str) -> dict[str, Any]:
    return dict.fromkeys(keys.split(), _VALUE)


_SESSION_OPTIONS: dict[str, Any] = {
    **_values("log_id intra_op_num_threads inter_op_num_threads log_severity_level log_verbosity_level"),
    **_values("enable_cpu_mem_arena enable_mem_pattern graph_optimization_level"),
    **_values("session.intra_op.allow_spinning session.inter_op.allow_spinning session.force_spinning_stop"),
    **_values("session.dynamic_block_base session.prepack.enable_parallel session.set_denormal_as_zero"),
    **_values("session.use_env_allocators session.use_device_allocator_for_initializers"),
    **_values("session.disable_quant_qdq session.enable_quant_qdq_cleanup session.qdqisint8allowed"),
    **_values("session.qdq_matmulnbits_accuracy_level session.disable_aot_function_inlining"),
    **_values("session.x64quantprecision session.disable_cpu_ep_fallback"),
    **_values("optimization.enable_gelu_approximation optimization.enable_cast_chain_elimination"),
    **_values("mlas.enable_gemm_fastmath_arm64_bfloat16 mlas.use_lut_gemm"),
    "provider_options": [{"cpu": _EMPTY, "CPU": _EMPTY}],
}
_RUN_OPTIONS = _values("memory.enable_memory_arena_shrinkage disable_synchronize_execution_providers")
_SHARED_INITIALIZERS = [{**_values("name offset length data_type"), "data_file": _PATH, "shape": _LIST}]
_GRAPH: dict[str, Any] = {
    "filename": _PATH,
    "session_options": _SESSION_OPTIONS,
    "run_options": _RUN_OPTIONS,
    "inputs": _NAMES,
    "outputs": _NAMES,
}
_STAGE: dict[str, Any] = {
    **_GRAPH,
    **_values("run_on_prompt run_on_token_gen is_lm_head inherit_session_options reset_session_idx"),
    "inputs": _LIST,
    "outputs": _LIST,
    "output_names_forwarder": _NAMES,
}
_ANY_NAME = "*"
_DECODER: dict[str, Any] = {
    **_GRAPH,
    **_values("hidden_size num_attention_heads num_hidden_layers num_key_value_heads head_size"),
    **_values("state_update_capacity conv_cache_size ple_token_pad_id"),
    "layer_types": _LIST,
    "shared_initializers": _SHARED_INITIALIZERS,
    "sliding_window": {
        **_values("window_size pad_value alignment slide_key_value_cache slide_inputs cache_slack"),
        "layers": _LIST,
    },
    "pipeline": [{_ANY_NAME: _STAGE}],
    "state_groups": [
        {"kind": _VALUE, "layer_ids": _LIST, "state_update": _values("enabled capacity key_head_count")}
    ],
}
_MODEL: dict[str, Any] = {
    **_values("type vocab_size context_length pad_token_id eos_token_id bos_token_id decoder_start_token_id"),
    **_values("sep_token_id bot_token_id eot_token_id bor_token_id eor_token_id"),
    "eos_token_id": (_VALUE, _LIST),
    "tokenizer_dir": _PATH,
    "decoder": _DECODER,
    "draft": _DECODER,
    "encoder": {
        **_GRAPH,
        **_values("hidden_size num_attention_heads num_hidden_layers num_key_value_heads head_size"),
    },
    "embedding": _GRAPH,
    "mtp": {
        **_GRAPH,
        **_values("num_hidden_layers num_key_value_heads head_size main_hidden_states"),
        "shared_initializers": _SHARED_INITIALIZERS,
    },
}
_ROOT: dict[str, Any] = {
    "model": _MODEL,
    "search": {
        **_values("min_length max_length batch_size num_beams num_return_sequences top_k top_p temperature"),
        **_values("repetition_penalty length_penalty no_repeat_ngram_size diversity_penalty random_seed"),
        **_values("chunk_size do_sample past_present_share_buffer early_stopping"),
    },
    "speculative": _values("max_draft_tokens ngram_size ngram_chained_lookup min_adaptive_k cooldown"),
    "engine": {
        "static_batching": _values("max_batch_size"),
        "dynamic_batching": _values(
            "block_size num_blocks gpu_utilization_factor max_batch_size max_scheduled_tokens"
        ),
    },
}


def check(file: Path, path: str) -> None:
    """Checks one `genai_config.json` against the allow-list.

    Args:
        path: its place in the package, for messages.

    Raises:
        PolicyError: a key is not allowed, a size is more than any model has, or the file is not plain JSON.
    """
    data = _read(file, path)
    # The library has its own JSON reader. Without escapes and repeated keys, both readers see the same keys.
    if b"\\" in data:
        raise PolicyError(f"{path!r} has escaped characters")
    document = parse(data, path)
    try:
        _check(document, _ROOT, "")
    except PolicyError as error:
        raise PolicyError(f"{path!r}: {error.message}") from error


def graphs(file: Path, path: str) -> frozenset[str]:
    """The graphs that a `genai_config.json` names, relative to its folder.

    Raises:
        PolicyError: it is too long, or not plain JSON.
    """
    return frozenset(_file_names(parse(_read(file, path), path)))


def _read(file: Path, path: str) -> bytes:
    with file.open("rb") as stream:
        data = stream.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise PolicyError(f"{path!r} has more than {_MAX_BYTES} bytes")
    return data


def _file_names(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            if key == "filename" and isinstance(item, str) and item:
                yield item
            else:
                yield from _file_names(item)
    elif isinstance(value, list):
        for item in value:
            yield from _file_names(item)


def parse(data: bytes, path: str) -> object:
    """Parses JSON that another reader will read as well: without repeated keys, both see the same.

    Raises:
        PolicyError: it is not plain JSON.
    """
    try:
        document: object = json.loads(
            data.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_constant
        )
    except PolicyError as error:
        raise PolicyError(f"{path!r}: {error.message}") from error
    except (ValueError, RecursionError) as error:
        raise PolicyError(f"{path!r} is not JSON ({type(error).__name__})") from error
    return document


def _check(value: object, rule: Any, place: str) -> None:
    if isinstance(rule, tuple):
        rule = rule[isinstance(value, list)]
    if isinstance(rule, dict):
        _check_object(value, rule, place)
    elif isinstance(rule, list):
        # The library also accepts an object for `pipeline` and other lists.
        for number, item in enumerate(_items(value, place)):
            _check(item, rule[0], f"{place}[{number}]")
    elif rule == _NAMES:
        for name, text in _object(value, place).items():
            if not isinstance(text, str):
                raise PolicyError(f"{place}.{name} is not text")
    elif rule == _LIST:
        for item in _items(value, place):
            _plain(item, place)
    elif rule == _EMPTY:
        if value not in ({}, []):
            raise PolicyError(f"{place} is not allowed")
    else:
        _plain(value, place)
        if rule == _PATH and value != "":
            try:
                check_path(value)
            except ManifestError as error:
                raise PolicyError(f"{place}: {error.message}") from error


def _check_object(value: object, rules: Mapping[str, Any], place: str) -> None:
    for key, item in _object(value, place).items():
        where = f"{place}.{key}" if place else key
        if key not in rules and _ANY_NAME not in rules:
            raise PolicyError(f"{where} is not allowed")
        _check(item, rules.get(key, rules.get(_ANY_NAME)), where)
        if key in rules and (most := _MOST.get(key)) and isinstance(item, int | float) and item > most:
            raise PolicyError(f"{where} is {_number(item)}, at most {most} is allowed")


def _items(value: object, place: str) -> list[Any]:
    items = [value] if isinstance(value, dict) else value
    if not isinstance(items, list) or len(items) > _MAX_ITEMS:
        raise PolicyError(f"{place} is not a list of at most {_MAX_ITEMS} items")
    return items


def _object(value: object, place: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise PolicyError(f"{place or 'the file'} is not an object")
    return value


def _plain(value: object, place: str) -> None:
    if value is not None and not isinstance(value, str | int | float):
        raise PolicyError(f"{place} is not a plain value")


def _number(value: float) -> str:
    return str(value) if value < 1 << 63 else "far too large"


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise PolicyError("a key appears twice")
    return found


def _no_constant(name: str) -> float:
    raise PolicyError(f"{name} is not a number")
