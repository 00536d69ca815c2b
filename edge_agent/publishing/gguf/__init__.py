"""From a GGUF file to a folder for onnxruntime-genai, without a second rounding and without torch.

    reader.py        the file's metadata and table of tensors, bounded
    architecture.py  what the model is; refuses what is not known
    tokenizer.py     its tokenizer and chat template as Hugging Face's files
    formats.py       blocks of weights as codes, scales and minima
    matrix.py        rows of blocks, in another order where rotary positions need it
    graph.py         the decoder
    onnx_file.py     writes it

The folder is what the model builder would make, and goes the same way: nothing after this knows where it came from.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edge_agent.package import genai_options
from edge_agent.publishing.gguf import architecture, graph, reader
from edge_agent.publishing.gguf import tokenizer as tokenizers
from edge_agent.publishing.gguf.architecture import Architecture
from edge_agent.publishing.gguf.tokenizer import Tokenizer


def convert(path: Path, folder: Path, *, every_token: bool = False) -> None:
    """Writes the folder.

    Args:
        path: the GGUF file.
        folder: empty.
        every_token: logits of every token, to measure with; otherwise of the last one only.

    Raises:
        PublishError: the file is damaged, was changed meanwhile, or holds something that this conversion does not
            know.
    """
    with reader.opened(path) as file:
        sizes = architecture.read(file)
        tokenizer = tokenizers.read(file, sizes.vocabulary)
        tokenizer.write(folder, sizes.context_tokens)
        config = json.dumps(_options(sizes, tokenizer), indent=1)
        (folder / genai_options.FILE_NAME).write_text(config, "utf-8")
        graph.write(sizes, file.tensors, folder, every_token=every_token)


def _options(sizes: Architecture, tokenizer: Tokenizer) -> dict[str, Any]:
    """genai_config.json."""
    return {
        "model": {
            "type": sizes.name,
            "vocab_size": sizes.vocabulary,
            "context_length": sizes.context_tokens,
            **({} if tokenizer.bos is None else {"bos_token_id": tokenizer.bos}),
            "eos_token_id": list(tokenizer.ends),
            "pad_token_id": tokenizer.pad,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": graph.MODEL,
                "head_size": sizes.head_size,
                "hidden_size": sizes.hidden,
                "num_attention_heads": sizes.heads,
                "num_hidden_layers": sizes.layers,
                "num_key_value_heads": sizes.kv_heads,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": sizes.context_tokens,
            "past_present_share_buffer": True,
            "temperature": 1.0,
            "top_k": 50,
            "top_p": 1.0,
        },
    }
