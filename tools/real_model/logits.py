"""Logits for each position of a text: Hugging Face's in float32, an ONNX folder's, and llama.cpp's.

The text is `reference.txt`, written for this, in windows of `WINDOW_TOKENS`. Each window begins with an empty past.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

TEXT = Path(__file__).with_name("reference.txt")
WINDOW_TOKENS = 512
_PEER_TIMEOUT_S = 300


def windows(hf: Path) -> list[list[int]]:
    """The text's tokens.

    Args:
        hf: a folder with the tokenizer.
    """
    tokens = text_tokens(hf)
    return [tokens[start : start + WINDOW_TOKENS] for start in range(0, len(tokens) - 1, WINDOW_TOKENS)]


def text_tokens(hf: Path) -> list[int]:
    """The same in one piece."""
    from transformers import AutoTokenizer

    tokens: list[int] = AutoTokenizer.from_pretrained(hf)(TEXT.read_text("utf-8"))["input_ids"]
    return tokens


def of_hugging_face(folder: Path, windows: list[list[int]]) -> list[npt.NDArray[np.float32]]:
    """In float32, whatever the file has."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return [model(torch.tensor([window])).logits[0].numpy() for window in windows]


def of_onnx(folder: Path, windows: list[list[int]]) -> list[npt.NDArray[np.float32]]:
    """Each window in one run, straight through onnxruntime: genai gives the last logits only.

    Raises:
        RuntimeError: onnxruntime does not take the folder.
    """
    from onnxruntime.capi import onnxruntime_pybind11_state as errors

    refusals = (errors.Fail, errors.InvalidArgument, errors.InvalidGraph, errors.NotImplemented)
    try:
        return _of_onnx(folder, windows)
    except (*refusals, errors.RuntimeException) as error:
        raise RuntimeError(str(error)) from error


def _of_onnx(folder: Path, windows: list[list[int]]) -> list[npt.NDArray[np.float32]]:
    import onnxruntime

    decoder = json.loads((folder / "genai_config.json").read_text("utf-8"))["model"]["decoder"]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(folder / decoder["filename"], options, ["CPUExecutionProvider"])
    past = np.zeros((1, decoder["num_key_value_heads"], 0, decoder["head_size"]), dtype=np.float32)
    pasts = {entry.name: past for entry in session.get_inputs() if entry.name.startswith("past_key_values.")}

    def run(window: list[int]) -> Any:
        ids = np.array([window], dtype=np.int64)
        feed = {**pasts, "input_ids": ids, "attention_mask": np.ones_like(ids)}
        return session.run(["logits"], feed)[0][0].astype(np.float32)

    return [run(window) for window in windows]


def of_llama_cpp(gguf: Path, windows: list[list[int]]) -> list[npt.NDArray[np.float32]]:
    """In a process of its own, for it is C that is called by its memory layout.

    Raises:
        subprocess.SubprocessError: that process failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "logits.npy"
        program = [sys.executable, "-m", "tools.real_model.llama_cpp", str(gguf), str(out)]
        subprocess.run(
            program,
            input=json.dumps(windows),
            text=True,
            check=True,
            timeout=_PEER_TIMEOUT_S,
            capture_output=True,
        )
        rows = np.load(out)
    return list(np.split(rows, np.cumsum([len(window) for window in windows])[:-1]))
