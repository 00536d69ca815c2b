"""What an int4 build keeps of the original: perplexity, and how often it would say the same next token.

Both are taken on `reference.txt`, a fixed English text written for this, in windows of `WINDOW_TOKENS`; the original
is the Hugging Face folder in float32, which sees the same windows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

TEXT = Path(__file__).with_name("reference.txt")
WINDOW_TOKENS = 512

Logits = list[npt.NDArray[np.float32]]
"""For each window: [tokens, vocabulary] float32."""


def measure(hf: Path, builds: Mapping[str, Path]) -> dict[str, Any]:
    """The figures of each build, and the original's perplexity.

    Args:
        hf: the original.
        builds: name → ONNX folder.
    """
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(hf)(TEXT.read_text("utf-8"))["input_ids"]
    windows = [tokens[start : start + WINDOW_TOKENS] for start in range(0, len(tokens) - 1, WINDOW_TOKENS)]
    original = _hugging_face(hf, windows)
    report: dict[str, Any] = {
        "tokens": sum(len(window) - 1 for window in windows),
        "original": {"perplexity": _perplexity(original, windows), "bytes": _size(hf)},
        "builds": {},
    }
    for name, folder in builds.items():
        logits = _onnx(folder, windows)
        report["builds"][name] = {
            "perplexity": _perplexity(logits, windows),
            "same_next_token": _same(original, logits),
            "kl": _divergence(original, logits),
            "bytes": _size(folder),
        }
    return report


def table(report: Mapping[str, Any]) -> str:
    """The figures as Markdown, for docs/models.md."""
    original = report["original"]
    lines = [
        f"| build | perplexity ({report['tokens']} tokens) | × original | same next token | KL (nats) | MB |",
        "|---|---|---|---|---|---|",
        f"| original, float32 | {original['perplexity']:.1f} | 1 | 1 | 0 | {original['bytes'] / 1e6:.0f} |",
    ]
    lines += [
        f"| {name} | {each['perplexity']:.1f} | {each['perplexity'] / original['perplexity']:.2f} "
        f"| {each['same_next_token']:.2f} | {each['kl']:.3f} | {each['bytes'] / 1e6:.0f} |"
        for name, each in report["builds"].items()
    ]
    return "\n".join(lines)


def _hugging_face(folder: Path, windows: list[list[int]]) -> Logits:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return [model(torch.tensor([window])).logits[0].numpy() for window in windows]


def _onnx(folder: Path, windows: list[list[int]]) -> Logits:
    """Each window in one run with an empty past, straight through onnxruntime: genai gives the last logits only."""
    import onnxruntime

    decoder = json.loads((folder / "genai_config.json").read_text("utf-8"))["model"]["decoder"]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(folder / decoder["filename"], options, ["CPUExecutionProvider"])
    past = np.zeros((1, decoder["num_key_value_heads"], 0, decoder["head_size"]), dtype=np.float32)
    found = []
    for window in windows:
        ids = np.array([window], dtype=np.int64)
        feed = {
            entry.name: past for entry in session.get_inputs() if entry.name.startswith("past_key_values.")
        }
        feed |= {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        found.append(session.run(["logits"], feed)[0][0].astype(np.float32))
    return found


def _log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    normalised: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return normalised


def _perplexity(logits: Logits, windows: list[list[int]]) -> float:
    surprise, count = 0.0, 0
    for window, given in zip(windows, logits, strict=True):
        probabilities = _log_softmax(given[:-1])
        surprise -= float(probabilities[np.arange(len(window) - 1), window[1:]].sum())
        count += len(window) - 1
    return float(np.exp(surprise / count))


def _same(original: Logits, other: Logits) -> float:
    same = [(a.argmax(-1) == b.argmax(-1)) for a, b in zip(original, other, strict=True)]
    return float(np.concatenate(same).mean())


def _divergence(original: Logits, other: Logits) -> float:
    """Mean Kullback-Leibler divergence of the next token's distribution from the original's, in nats."""
    found = []
    for a, b in zip(original, other, strict=True):
        p, q = _log_softmax(a), _log_softmax(b)
        found.append((np.exp(p) * (p - q)).sum(-1))
    return float(np.concatenate(found).mean())


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
