"""From a GGUF file to a Hugging Face folder with float32 weights."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint


def convert(gguf: Path, folder: Path) -> None:
    """Writes model and tokenizer.

    Args:
        gguf: the file; its weights are dequantised.
        folder: empty.
    """
    place, name = str(gguf.parent), gguf.name
    config = AutoConfig.from_pretrained(place, gguf_file=name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # `from_pretrained(gguf_file=…)` would do the same, with a library more (accelerate).
    weights = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if set(missing) - {"lm_head.weight"} or unexpected:  # the head is the embedding, tied
        raise ValueError(f"weights missing: {missing}; not understood: {unexpected}")
    model.tie_weights()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(place, gguf_file=name).save_pretrained(folder)
