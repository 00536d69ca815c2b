"""A GGUF file's tokenizer: the library gives the tokens that llama.cpp's rules give, and Hugging Face's too."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from edge_agent.errors import PublishError
from edge_agent.publishing import gguf
from edge_agent.publishing.gguf import tokenizer
from edge_agent.publishing.gguf.reader import GgufFile
from edge_agent.wrapper.genai_pyfunc import TokenizerFiles
from tests.support import gguf_models as models
from tests.support.gguf_files import Q4_0, File

TEXTS = (
    "hello the inner  x 12 times 1234, don't I'LL",
    "größe €—👍 温度\n\n\n\ttabs \r\n end  ",
    "<|im_start|>user\nhello<|im_end|>\nhe",
    "  x",
)
"""Not among them, for the library reads neither a normalizer nor a split of digits: decomposed letters, and several
spaces before a digit."""


def converted(file: File, folder: Path) -> Path:
    out = folder / "onnx"
    out.mkdir()
    gguf.convert(file.write(folder / "model.gguf"), out)
    return out


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime_genai

    return onnxruntime_genai


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe", "qwen2"])
def test_the_library_reads_each_way_to_split_as_hugging_face_does(
    pre: str, tmp_path: Path, library: Any
) -> None:
    import tokenizers

    file = models.small_model(Q4_0)
    file.metadata["tokenizer.ggml.pre"] = pre
    file.metadata["tokenizer.ggml.add_bos_token"] = False
    folder = converted(file, tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ours = library.Tokenizer(str(folder))
    for text in TEXTS:
        ids = ours.encode(text).tolist()
        assert ids == theirs.encode(text).ids, text
        assert ours.decode(ours.encode(text)) == theirs.decode(ids)
    split = [piece for piece, _ in theirs.pre_tokenizer.pre_tokenize_str("12 the")]
    assert split == (["1", "2", "Ġthe"] if pre in ("smollm", "qwen2") else ["12", "Ġthe"])


def pieces(scores: dict[str, float]) -> dict[str, object]:
    """A SentencePiece tokenizer of those pieces, 256 bytes and filling."""
    special = ["<unk>", "<s>", "</s>"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *scores]
    filling = [f"[unused{number}]" for number in range(models.VOCABULARY - len(tokens))]
    types = [2, 3, 3, *(6 for _ in range(256)), *(1 for _ in scores), *(5 for _ in filling)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*tokens, *filling],
        "tokenizer.ggml.scores": [0.0] * 259 + list(scores.values()) + [-1e4] * len(filling),
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


SCORES = {
    **{piece: -100.0 - number for number, piece in enumerate("▁abcdehlorstw")},
    "he": -1.0,
    "ll": -2.0,
    "▁w": -3.0,
    "or": -4.0,
    "hell": -5.0,
    "hello": -6.0,
    "▁hello": -7.0,
    "▁▁": -8.0,
    "ld": -9.0,
    "▁wor": -10.0,
    "▁world": -11.0,
}
"""As training gives them: each piece can be reached by merges. (The library takes a whole word that is a piece.)"""


def merged(text: str) -> list[str]:
    """llama.cpp's rule: of all neighbours that together are a piece, those of the highest score are joined first."""
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = [(-SCORES.get(a + b, -1e9), at) for at, (a, b) in enumerate(itertools.pairwise(parts))]
        if not pairs or min(pairs)[0] >= 1e9:
            break
        at = min(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [
        each
        for part in parts
        for each in ([part] if part in SCORES else [f"<0x{b:02X}>" for b in part.encode()])
    ]


def test_sentence_pieces_are_merged_by_their_scores(tmp_path: Path, library: Any) -> None:
    import tokenizers

    file = models.small_model(Q4_0)
    for key in [key for key in file.metadata if key.startswith("tokenizer.")]:
        del file.metadata[key]
    file.metadata |= pieces(SCORES)
    folder = converted(file, tmp_path)
    ours = library.Tokenizer(str(folder))
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in ("hello world", "hello  world hell", "wold held", "shell ö€", "a"):
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert [theirs.id_to_token(number) for number in ids] == merged(text)
        assert [each for each in ours.encode(text).tolist() if each != 1] == ids
        assert theirs.decode(ids) == text
    assert TokenizerFiles.read(folder).end_ids == {2}


def runs(letters: str) -> list[str]:
    """Each of so many a and then so many b is two others in as many ways as it has places between letters."""
    first, second = tuple(letters)
    return [first * a + second * b for a in range(128) for b in range(129 - a) if a + b]


@pytest.mark.parametrize(
    "keys",
    [
        {"model": "llama", "tokens": sorted({*runs("ab"), *runs("ac")})},
        {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "b"], "merges": ["a b"] * ((1 << 20) + 1)},
    ],
    ids=lambda keys: str(keys["model"]),
)
def test_merges_without_number_are_refused_before_they_are_written(keys: dict[str, Any]) -> None:
    """A file of half a MB would be millions of merges, and gigabytes."""
    count = len(keys["tokens"])
    keys = {"scores": [0.0] * count, "token_type": [3] + [1] * (count - 1), "eos_token_id": 0, **keys}
    metadata = {f"tokenizer.ggml.{key}": content for key, content in keys.items()}
    with pytest.raises(PublishError, match="has more than 1048576 merges"):
        tokenizer.read(GgufFile(path=Path("m.gguf"), metadata=metadata, tensors={}), count)


def test_a_llama_3_tokenizer_begins_with_its_bos_token(tmp_path: Path) -> None:
    file = models.small_model(Q4_0)
    file.metadata["tokenizer.ggml.pre"] = "llama-bpe"
    document = json.loads((converted(file, tmp_path) / "tokenizer.json").read_text())
    assert document["model"]["ignore_merges"] is True
    assert document["post_processor"]["single"][0] == {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}


def test_a_turn_ends_where_the_file_forgot_to_say_so(tmp_path: Path) -> None:
    file = models.small_model(Q4_0)
    file.metadata["tokenizer.ggml.eos_token_id"] = 0
    folder = converted(file, tmp_path)
    config = json.loads((folder / "genai_config.json").read_text())
    assert config["model"]["eos_token_id"] == [0, 2], "<|endoftext|>, and <|im_end|> as llama.cpp has it"
    assert (folder / "chat_template.jinja").read_text() == models.TEMPLATE


NORMAL, CONTROL, USER_DEFINED = 1, 3, 4


@pytest.mark.parametrize("kind", [NORMAL, CONTROL, USER_DEFINED])
def test_tokens_that_llama_cpp_knows_end_an_answer_whatever_their_type(
    kind: int, tmp_path: Path, library: Any
) -> None:
    """Qwen 2.5 has two of them and names one; converters have typed others as plain text."""
    file = models.small_model(Q4_0)
    tokens, types = (file.metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type"))
    assert isinstance(tokens, list)
    assert isinstance(types, list)
    texts = ["<|end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<end_of_turn>", "<end_of_utterance>"]
    texts += ["<EOT>", "<｜end▁of▁sentence｜>"]
    first = len(tokens) - len(texts)
    tokens[first:] = texts
    types[:] = [*(kind for _ in models.SPECIAL), *types[len(models.SPECIAL) : first], *(kind for _ in texts)]
    types[tokens.index("<|im_start|>")] = CONTROL
    folder = converted(file, tmp_path)
    config = json.loads((folder / "genai_config.json").read_text())
    assert config["model"]["eos_token_id"] == [2, 0, *range(first, len(tokens))]
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    assert {each["id"] for each in added if each["special"]} == {0, 1, 2, *range(first, len(tokens))}
    encoded = library.Tokenizer(str(folder)).encode("he<|im_end|>" + "".join(texts)).tolist()
    assert encoded[-1 - len(texts) :] == [2, *range(first, len(tokens))]
