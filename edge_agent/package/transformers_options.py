"""Checks the JSON files of a Hugging Face folder, the options of transformers, against allow-lists of keys.

transformers hands whatever stands in these files to the classes it builds, and some of those open what they get:
`{"tokenizer_class": "BertTokenizer", "vocab": "/path"}` makes a vocabulary of any file of the host. So

- a text that is a path out of the package is refused wherever it stands, and its key is named;
- a key that is not on the list is left out: `publish` packages a copy without it and says so, and a device gives the
  library a copy without it, never the file itself;
- a number, true, false or null names nothing, so an architecture's sizes are kept under any key;
- a tokenizer is what `tokenizer.json` says, and nothing else. Only classes that are no more than their defaults for
  it are taken.

Pure, but for `read` and `check`. Source: transformers 5.23, the configurations and tokenizers of its causal language
models, and `PreTrainedTokenizerBase.from_pretrained`.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from edge_agent.errors import PolicyError

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
SPECIAL_TOKENS, ADDED_TOKENS = "special_tokens_map.json", "added_tokens.json"
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
TEMPLATE, TEMPLATES = "chat_template.jinja", "additional_chat_templates"
TOKENIZER_FOLDER = PurePosixPath("components/tokenizer")

MAX_JSON_BYTES = 64 << 20
MAX_CONFIG_BYTES = 16 << 20
"""Of a file that is read key by key, here and where a version arrives."""
MAX_TEMPLATE_BYTES = 1 << 20
MAX_PATH_CHARACTERS = 4096
"""A longer text is no path: the system opens none. Chat templates and tables are not read as paths."""
_MAX_DEPTH, _MAX_SHOWN = 32, 120

_NOTES = frozenset(("_name_or_path", "name_or_path", "auto_map", "_commit_hash"))
"""Where `save_pretrained` and the hub write a model's origin. Left out without a word, whatever it is."""

TOKENIZER_CLASSES = frozenset(
    (
        *("TokenizersBackend", "PreTrainedTokenizer", "PythonBackend"),
        *("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "CohereTokenizer"),
        *("GPT2Tokenizer", "GPTNeoXTokenizer", "CodeGenTokenizer", "Qwen2Tokenizer", "Qwen3_5Tokenizer"),
        *("BloomTokenizer", "XGLMTokenizer", "OlmoTokenizer"),
    )
)
"""Without the suffix `Fast`. Each reads as `tokenizer.json` says, with defaults for the named tokens."""

_TOKENS = frozenset(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_TOKEN_FIELDS = frozenset(("__type", "content", "lstrip", "normalized", "rstrip", "single_word", "special"))
_TOKEN_TABLES = frozenset(
    (
        *("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens"),
        "added_tokens_decoder",
    )
)
_TOKENIZER_KEYS = frozenset(
    (
        *("backend", "tokenizer_class", "model_max_length", "padding_side", "truncation_side"),
        *("clean_up_tokenization_spaces", "split_special_tokens", "spaces_between_special_tokens"),
        *("add_prefix_space", "add_bos_token", "add_eos_token", "add_dummy_prefix_space", "do_lower_case"),
        *("errors", "legacy", "use_default_system_prompt", "fix_mistral_regex", "trim_offsets"),
        *("is_local", "local_files_only", "use_fast", "model_input_names", "chat_template"),
    )
)
_CONFIG_TEXTS = frozenset(
    (
        *("model_type", "architectures", "dtype", "torch_dtype", "tokenizer_class", "transformers_version"),
        *("problem_type", "init_method", "architecture", "languages", "default_language"),
        *("activation", "activation_fn", "activation_function", "act_fn", "afn", "classifier_activation"),
        *("conv_activation", "ff_activation", "hidden_act", "hidden_activation", "hidden_mamba_act"),
        *("mamba_hidden_act", "mlp_hidden_act", "nemo_activation", "projector_hidden_act", "ffn_act_fn"),
        *("summary_activation", "summary_type", "type", "rope_type", "attn_type", "attn_impl"),
        *(
            "attention_type",
            "attention_types",
            "attention_layers",
            "attn_layers",
            "block_types",
            "layer_type",
        ),
        *("layer_types", "layers_block_type", "mlp_layer_types", "mtp_layer_types", "mtp_layers_block_type"),
        *("mtp_mlp_layer_types", "indexer_types", "hybrid_override_pattern", "mtp_hybrid_override_pattern"),
        *("sliding_window_pattern", "index_topk_pattern", "gating", "output_gate_type", "conv_glu_type"),
        *("expert_selection_fn", "scoring_func", "topk_method", "shared_expert_combination_strategy"),
        *("moe_layers_enum", "norm_type", "layer_norm_type", "position_embedding_type", "logit_scale"),
        *("mamba_d_head", "mamba_dt_rank", "mamba_ssm_cache_dtype", "time_step_rank"),
        *("time_step_init_scheme", "patching_mode", "pooling", "vision_feature_select_strategy"),
        "use_bidirectional_attention",
    )
)
"""Keys whose value may be text, or a list of texts: the name of something that the library itself has."""
_CONFIG_OBJECTS = frozenset(
    (
        *("rope_parameters", "rope_scaling", "text_config", "attn_config", "ffn_config", "ffn_act_fn"),
        *(
            "linear_attn_config",
            "sparse_attention_config",
            "per_layer_config",
            "mtp_config",
            "compress_rates",
        ),
        *(
            "ssm_cfg",
            "mamba_config",
            "moe_config",
            "decoder",
            "decoder_config",
            "encoder_config",
            "vq_config",
        ),
        *("audio_config", "audio_encoder", "audio_encoder_config", "depth_decoder_config", "global_config"),
        *("patcher_config", "text_encoder", "vision_config", "whisper_config", "model_args"),
        # The attention of one kind of layer, each with its own rotary embedding.
        *("full_attention", "sliding_attention", "chunked_attention", "linear_attention", "main", "compress"),
    )
)
_CONFIG_LABELS = frozenset(("id2label", "label2id", "vocabulary_map", "task_specific_params"))
"""Tables with keys of any kind, of which a language model reads nothing."""
_GENERATION_KEYS = frozenset(
    (
        *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id"),
        *("forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "stop_strings"),
        *("max_length", "max_new_tokens", "min_length", "min_new_tokens", "max_time", "early_stopping"),
        *("do_sample", "temperature", "top_k", "top_p", "top_h", "min_p", "typical_p", "penalty_alpha"),
        *("epsilon_cutoff", "eta_cutoff", "repetition_penalty", "encoder_repetition_penalty"),
        *("length_penalty", "exponential_decay_length_penalty", "no_repeat_ngram_size"),
        *("encoder_no_repeat_ngram_size", "diversity_penalty", "guidance_scale", "renormalize_logits"),
        *("remove_invalid_values", "token_healing", "low_memory", "use_cache", "prefill_chunk_size"),
        *("num_beams", "num_beam_groups", "num_return_sequences", "prompt_lookup_num_tokens"),
        *("max_matching_ngram_size", "num_assistant_tokens", "num_assistant_tokens_schedule"),
        *("assistant_confidence_threshold", "is_assistant", "output_attentions", "output_hidden_states"),
        *("output_logits", "output_scores", "return_dict_in_generate", "chat_format", "max_window_size"),
        *("transformers_version", "_from_model_config"),
    )
)


_REMOTE_KEYS = ("auto_map", "custom_pipelines", "custom_generate")
"""Keys that make transformers load code from elsewhere, in whatever file of a package they stand."""


def check(tree: Path, paths: Set[str], *, model_folder: str) -> None:
    """Checks a package of the transformers flavor. A file that the library does not read is allowed.

    Args:
        tree: the package's folder.
        paths: its files.
        model_folder: where its weights are.

    Raises:
        PolicyError: a file makes the library load something else: a module, another model, a file outside; or the
            package has no `tokenizer.json`. The message names the file and the key.
    """
    has_own_folder = any(PurePosixPath(path).is_relative_to(TOKENIZER_FOLDER) for path in paths)
    tokenizer = PurePosixPath(TOKENIZER_FOLDER if has_own_folder else model_folder) / TOKENIZER
    if str(tokenizer) not in paths:
        raise PolicyError(
            f"the package has no {str(tokenizer)!r}, the only form of a tokenizer that is read here"
        )
    for path in sorted(paths):
        name = PurePosixPath(path.casefold())
        if name.name == "adapter_config.json":
            raise PolicyError(f"{path!r} names a base model that is not in the package")
        if name.suffix == ".jinja" and (tree / path).stat().st_size > MAX_TEMPLATE_BYTES:
            raise PolicyError(f"{path!r} has more than {MAX_TEMPLATE_BYTES} bytes")
        if name.suffix == ".json" and name.name != TOKENIZER:
            _check_json(tree / path, path, paths)


@dataclass(frozen=True, kw_only=True)
class Cleaned:
    """What is left of a file.

    Attributes:
        dropped: keys that were left out and are no notes; those of an inner object have a dot.
    """

    document: dict[str, Any]
    dropped: tuple[str, ...]


def clean(name: str, document: Mapping[str, Any], *, any_tokenizer: bool = False) -> Cleaned:
    """The part of a file that the library may see.

    Args:
        name: the file's name: one of those with an allow-list here.
        any_tokenizer: `tokenizer_class` may be any: it is for another library.

    Raises:
        PolicyError: a text in it leads out of the package, or the tokenizer is not of a kind that is taken; the
            message names the key.
    """
    refuse_paths(document)
    if name == TOKENIZER_CONFIG and not any_tokenizer:
        tokenizer_class(document)
    dropped: list[str] = []
    cleaned = _CLEANERS[name](document, dropped)
    return Cleaned(document=cleaned, dropped=tuple(dropped))


def has_list(name: str) -> bool:
    """True for the name of a file that `clean` knows."""
    return name in _CLEANERS


def read(file: Path, path: str = "") -> dict[str, Any]:
    """Reads one of these files.

    Args:
        path: its place in the package, for messages.

    Raises:
        PolicyError: it is no file of bounded size, or not a JSON object.
    """
    path = path or file.name
    document = _parsed(read_bytes(file, path, MAX_CONFIG_BYTES), path)
    if not isinstance(document, dict):
        raise PolicyError(f"{path!r} is not a JSON object")
    return document


def _parsed(data: bytes, path: str) -> object:
    try:
        document: object = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise PolicyError(f"{path!r} is not JSON") from error
    return document


def read_bytes(file: Path, path: str, limit_bytes: int = MAX_JSON_BYTES) -> bytes:
    """A file's content.

    Raises:
        PolicyError: it is no regular file of bounded size.
    """
    status = file.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise PolicyError(f"{path!r} is not a regular file")
    if status.st_size > limit_bytes:
        raise PolicyError(f"{path!r} has more than {limit_bytes} bytes")
    return file.read_bytes()


def refuse_paths(document: object) -> None:
    """Refuses a text that leads out of the package, at any depth.

    Raises:
        PolicyError: there is one; the message names its key, not the text.
    """
    for place, text in _texts(document, "", 0):
        if is_path_outside(text) and place.rpartition(".")[2] not in _NOTES:
            raise PolicyError(
                f"{place[:_MAX_SHOWN]!r} is a path that leads out of the package",
                remedy="take the key out of the file",
            )


def is_path_outside(text: str) -> bool:
    """True for an absolute path, one in somebody's home, and one with `..` as a component."""
    if len(text) > MAX_PATH_CHARACTERS:
        return False
    parts = text.split("/")
    return ".." in parts or (len(parts) > 1 and parts[0] in ("", "~"))


def tokenizer_class(config: Mapping[str, Any]) -> str:
    """The class that `tokenizer_config.json` names, without `Fast`; empty if it names none.

    Raises:
        PolicyError: it reads more than `tokenizer.json`.
    """
    given = config.get("tokenizer_class")
    if given is None:
        return ""
    name = given.removesuffix("Fast") if isinstance(given, str) else ""
    if name not in TOKENIZER_CLASSES:
        raise PolicyError(
            f"tokenizer_class {str(given)[:_MAX_SHOWN]!r} is not allowed: only those read from {TOKENIZER} alone are",
            remedy="save the tokenizer as transformers.PreTrainedTokenizerFast",
        )
    return name


def check_tokenizer(data: bytes) -> None:
    """Checks that `tokenizer.json` brings its vocabulary: some classes of the library open one that is a text.

    Raises:
        PolicyError: it does not.
    """
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return  # no library takes it
    model = document.get("model") if isinstance(document, dict) else None
    for key in ("vocab", "merges"):
        if isinstance(model, dict) and not isinstance(model.get(key, []), list | dict):
            raise PolicyError(f"{f'model.{key}'!r} is not a table")


def weight_files(index: Mapping[str, Any], path: str, names: Set[str]) -> dict[str, str]:
    """tensor → file of `model.safetensors.index.json`.

    Args:
        path: its place in the package, for messages.
        names: of the files beside it.

    Raises:
        PolicyError: it names a file that is not beside it.
    """
    mapping = index.get("weight_map")
    if not isinstance(mapping, dict) or not all(
        isinstance(name, str) and name in names for name in mapping.values()
    ):
        raise PolicyError(f"{path!r}: 'weight_map' names weights that are not in the package")
    return mapping


def _check_json(file: Path, path: str, paths: Set[str]) -> None:
    place = PurePosixPath(path)
    name = place.name.casefold()
    data = read_bytes(file, path, MAX_CONFIG_BYTES if has_list(name) else MAX_JSON_BYTES)
    words = (*_REMOTE_KEYS, "attn_implementation", "\\u")
    if not has_list(name) and not any(word.encode() in data for word in words):
        return
    document = _parsed(data, path)
    for key, value in _pairs(document):
        if key in _REMOTE_KEYS and value:
            raise PolicyError(
                f"{path!r} has {key}, which loads code from elsewhere",
                remedy="publish it without that key; transformers has its own classes for most models",
            )
        if key in ("attn_implementation", "_attn_implementation") and "/" in json.dumps(value):
            raise PolicyError(f"{path!r} has {key}, which loads a kernel from elsewhere")
    if not has_list(name):
        return
    if not isinstance(document, dict):
        raise PolicyError(f"{path!r} is not a JSON object")
    try:
        clean(name, document)
    except PolicyError as error:
        raise PolicyError(f"{path!r}: {error.message}", remedy=error.remedy) from error
    if name == INDEX:
        beside = {other.name for other in map(PurePosixPath, paths) if other.parent == place.parent}
        weight_files(document, path, beside)


def _pairs(document: object) -> Iterator[tuple[str, object]]:
    """Every key with its value, at any depth."""
    waiting = [document]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield from value.items()
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)


def _texts(value: object, place: str, depth: int) -> Iterator[tuple[str, str]]:
    """Every text with the dotted name of its place."""
    if depth > _MAX_DEPTH:
        raise PolicyError(f"{place[:_MAX_SHOWN]!r} is nested too deeply")
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _texts(item, f"{place}.{key}" if place else str(key), depth + 1)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item, place, depth + 1)


def _config(document: Mapping[str, Any], dropped: list[str], inside: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in document.items():
        if _is_plain(value) or (key in _CONFIG_TEXTS and _is_text(value)) or key in _CONFIG_LABELS:
            found[key] = value
        elif key in _CONFIG_OBJECTS and isinstance(value, dict):
            found[key] = _config(value, dropped, f"{inside}{key}.")
        elif key not in _NOTES:
            dropped.append(f"{inside}{key}")
    return found


def _generation_config(document: Mapping[str, Any], dropped: list[str]) -> dict[str, Any]:
    return _kept(document, dropped, lambda key, value: key in _GENERATION_KEYS and _is_text(value))


def _tokenizer_config(document: Mapping[str, Any], dropped: list[str]) -> dict[str, Any]:
    def is_allowed(key: str, value: object) -> bool:
        return key in _TOKENIZER_KEYS or _is_token(key, value)

    return {key: _tokens(value) for key, value in _kept(document, dropped, is_allowed).items()}


def _special_tokens(document: Mapping[str, Any], dropped: list[str]) -> dict[str, Any]:
    return {key: _tokens(value) for key, value in _kept(document, dropped, _is_token).items()}


def _added_tokens(document: Mapping[str, Any], dropped: list[str]) -> dict[str, Any]:
    """token → id: the keys are texts of tokens."""
    return {key: value for key, value in document.items() if isinstance(value, int)}


def _index(document: Mapping[str, Any], dropped: list[str]) -> dict[str, Any]:
    sizes = _object(document.get("metadata") or {}, "metadata")
    return {
        "metadata": {key: value for key, value in sizes.items() if _is_plain(value)},
        "weight_map": document.get("weight_map"),
    }


_CLEANERS: Mapping[str, Callable[[Mapping[str, Any], list[str]], dict[str, Any]]] = {
    CONFIG: _config,
    GENERATION_CONFIG: _generation_config,
    TOKENIZER_CONFIG: _tokenizer_config,
    SPECIAL_TOKENS: _special_tokens,
    ADDED_TOKENS: _added_tokens,
    INDEX: _index,
}


def _kept(
    document: Mapping[str, Any],
    dropped: list[str],
    is_allowed: Callable[[str, object], bool],
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in document.items():
        if is_allowed(key, value):
            found[key] = value
        elif key not in _NOTES:
            dropped.append(key)
    return found


def _is_plain(value: object) -> bool:
    """True for what names nothing: a number, true, false, null, or lists of them."""
    if isinstance(value, list):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, int | float)


def _is_text(value: object) -> bool:
    """True for a text, or lists of texts and numbers."""
    if isinstance(value, list):
        return all(_is_text(item) for item in value)
    return isinstance(value, str) or _is_plain(value)


def _is_token(key: str, value: object) -> bool:
    """True for a token under its name, or a list or table of them: a model may have kinds of its own."""
    if key in _TOKENS or key.endswith("_token"):
        return value is None or isinstance(value, str | dict)
    return key in _TOKEN_TABLES and isinstance(value, list | dict | None)


def _tokens(value: object) -> object:
    """A token, or a list or table of tokens, without foreign fields."""
    if isinstance(value, list):
        return [_tokens(item) for item in value]
    if isinstance(value, dict):
        if "content" in value:
            return _token(value)
        return {key: _tokens(item) for key, item in value.items()}
    return value


def _token(value: object) -> object:
    if not isinstance(value, dict):
        return value
    return {key: item for key, item in value.items() if key in _TOKEN_FIELDS}


def _object(value: object, place: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise PolicyError(f"{place!r} is not an object")
    return value
