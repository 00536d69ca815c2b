"""llama.cpp as a peer: the C library inside the wheel `xllamacpp`, called by its own interface.

The wheel's Python interface is a server, which has no logits of a prompt and no way to quantize. Its library exports
the functions of llama.h that have both. The release is pinned in .ci/locks/llama-cpp.txt, because a structure's layout
is part of what is called; only the first field of a context's parameters is written here. Source: llama.h, ggml.h.

    python -m tools.real_model.llama_cpp GGUF OUT.npy < windows.json     the logits of each window, one below the other
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_ROOMY_BYTES = 1024
"""Larger than any of llama.h's structures of parameters: they travel in memory, and the callee reads what it knows."""


class _Parameters(ctypes.Structure):
    """`llama_model_params` or `llama_context_params`; the first field of the latter is `n_ctx`."""

    _fields_ = (("n_ctx", ctypes.c_uint32), ("rest", ctypes.c_uint8 * _ROOMY_BYTES))


class _Batch(ctypes.Structure):
    """`llama_batch`."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "llama_backend_init": (None,),
    "llama_log_set": (None, ctypes.c_void_p, ctypes.c_void_p),
    "llama_model_default_params": (_Parameters,),
    "llama_context_default_params": (_Parameters,),
    "llama_model_load_from_file": (ctypes.c_void_p, ctypes.c_char_p, _Parameters),
    "llama_init_from_model": (ctypes.c_void_p, ctypes.c_void_p, _Parameters),
    "llama_set_n_threads": (None, ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32),
    "llama_model_get_vocab": (ctypes.c_void_p, ctypes.c_void_p),
    "llama_vocab_n_tokens": (ctypes.c_int32, ctypes.c_void_p),
    "llama_n_batch": (ctypes.c_uint32, ctypes.c_void_p),
    "llama_batch_init": (_Batch, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32),
    "llama_decode": (ctypes.c_int32, ctypes.c_void_p, _Batch),
    "llama_get_logits": (ctypes.POINTER(ctypes.c_float), ctypes.c_void_p),
    "llama_get_memory": (ctypes.c_void_p, ctypes.c_void_p),
    "llama_memory_clear": (None, ctypes.c_void_p, ctypes.c_bool),
    "ggml_quantize_chunk": (
        ctypes.c_size_t,
        *(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *(ctypes.c_int64,) * 3, ctypes.c_void_p),
    ),
}
"""Name → type of the result, and of the arguments."""


@cache
def _library() -> ctypes.CDLL:
    import xllamacpp  # type: ignore[import-not-found]

    library = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    for name, (result, *arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.llama_log_set(ctypes.cast(_SILENT, ctypes.c_void_p), None)
    library.llama_backend_init()
    return library


_SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(
    lambda level, text, data: None
)
"""llama.cpp writes a hundred lines at each load."""


def quantize(weights: npt.NDArray[np.float32], ggml_type: int, row_bytes: int) -> npt.NDArray[np.uint8]:
    """A matrix in one of ggml's formats, rounded as `llama-quantize` does without an importance matrix.

    Args:
        weights: [rows, columns].
        ggml_type: number of the format in ggml.h.
        row_bytes: what a row takes in it.
    """
    source = np.ascontiguousarray(weights, dtype=np.float32)
    rows, columns = source.shape
    target = np.empty((rows, row_bytes), dtype=np.uint8)
    written = _library().ggml_quantize_chunk(
        ggml_type, source.ctypes.data, target.ctypes.data, 0, rows, columns, None
    )
    if written != target.nbytes:
        raise ValueError(f"{written} bytes in format {ggml_type}, and {target.nbytes} were expected")
    return target


class Llama:
    """A model of llama.cpp with one sequence of tokens in its memory."""

    def __init__(self, gguf: Path, *, threads: int, context_tokens: int) -> None:
        """Loads the file.

        Raises:
            RuntimeError: llama.cpp does not take it.
        """
        self._library = _library()
        parameters = self._library.llama_context_default_params()
        parameters.n_ctx = context_tokens
        model = self._library.llama_model_load_from_file(
            str(gguf).encode(), self._library.llama_model_default_params()
        )
        self._context = self._library.llama_init_from_model(model, parameters) if model else None
        if not self._context:
            raise RuntimeError(f"llama.cpp does not load {gguf}")
        self._library.llama_set_n_threads(self._context, threads, threads)
        self._vocabulary = self._library.llama_vocab_n_tokens(self._library.llama_model_get_vocab(model))
        self._room = self._library.llama_n_batch(self._context)
        self._batch = self._library.llama_batch_init(self._room, 0, 1)
        self._tokens = 0

    def clear(self) -> None:
        """Forgets what was fed."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        self._tokens = 0

    def feed(self, tokens: Sequence[int], *, all_logits: bool = False) -> npt.NDArray[np.float32]:
        """Goes on with these tokens.

        Returns:
            The logits behind the last one, or behind each: [1 or tokens, vocabulary].
        """
        if len(tokens) > self._room:
            raise ValueError(f"{len(tokens)} tokens, and a batch has {self._room}")
        batch = self._batch
        batch.n_tokens = len(tokens)
        for at, token in enumerate(tokens):
            batch.token[at], batch.pos[at] = token, self._tokens + at
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, 0
            batch.logits[at] = all_logits or at == len(tokens) - 1
        if code := self._library.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode gives {code}")
        self._tokens += len(tokens)
        shape = (len(tokens) if all_logits else 1, self._vocabulary)
        return np.ctypeslib.as_array(self._library.llama_get_logits(self._context), shape).copy()


def main(gguf: Path, out: Path) -> None:
    windows: list[list[int]] = json.load(sys.stdin)
    # Its threads spin while they wait for each other: on a busy machine one is the fastest.
    model = Llama(gguf, threads=1, context_tokens=max(512, *map(len, windows)))
    found = []
    for window in windows:
        model.clear()
        found.append(model.feed(window, all_logits=True))
    np.save(out, np.concatenate(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
