"""The transformers adapter while it answers: slices of a prompt, a stop in the middle of one, whole characters."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers

from edge_agent.errors import BadRequest, CannotRun
from edge_agent.publishing.package import build_package
from edge_agent.runner import checkpoint, loader, transformers_flavor
from edge_agent.runner.model import End
from edge_agent.runner.transformers_flavor import SLICE_TOKENS, TransformersModel, slice_tokens

SAMPLE_HF = Path(__file__).parents[1] / "models" / "sample_hf"
LIMIT_S = 60.0
NEPAL = {"messages": [{"role": "user", "content": "Say hello in Nepali."}], "temperature": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """In float32, where slices of other lengths differ in the last digits only."""
    folder = tmp_path_factory.mktemp("flavor") / "package"
    package = build_package(
        SAMPLE_HF, folder, name="sample", flavor="transformers", signature="chat", options={}
    )
    loaded: Any = loader.load(package.folder, context_tokens=2048, max_tokens=32, threads=1)
    loaded._model.float()
    return loaded


def words(count: int, **options: Any) -> dict[str, Any]:
    return {"prompt": "capital " * count, "temperature": 0, "max_tokens": 4, **options}


def ask(model: Any, document: dict[str, Any]) -> tuple[str, End]:
    *texts, end = model.stream(document)
    return "".join(texts), end


@contextlib.contextmanager
def watched(model: Any) -> Iterator[list[int]]:
    """The number of tokens in each forward pass from now on."""
    passes: list[int] = []

    def note(_: object, arguments: tuple[Any, ...]) -> None:
        passes.append(arguments[0].shape[1])

    hook = model._model.get_input_embeddings().register_forward_pre_hook(note)
    try:
        yield passes
    finally:
        hook.remove()


def test_tools_are_refused_by_name(model: Any) -> None:
    for document in ({**NEPAL, "tools": [{}]}, {"messages": [{"role": "tool", "content": "x"}]}):
        with pytest.raises(BadRequest, match=r"tools.*: not served by the transformers flavor"):
            ask(model, document)


def test_no_slice_has_one_token_and_none_is_much_longer_than_it_should_be() -> None:
    for prompt_tokens in range(1, 40 * SLICE_TOKENS):
        size = slice_tokens(prompt_tokens) or prompt_tokens
        assert size < SLICE_TOKENS + 4
        assert prompt_tokens == 1 or (prompt_tokens % size or size) > 1


@pytest.mark.parametrize("count", [1, 15, 16, 17, 63, 64, 65, 129])
def test_a_prompt_is_run_in_slices_and_every_token_of_it_once(
    model: Any, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers_flavor, "SLICE_TOKENS", 16)
    with watched(model) as passes:
        _, end = ask(model, words(count))
    prompt, new = end.usage["prompt_tokens"], end.usage["completion_tokens"]
    slices = passes[: -(-prompt // 16)]
    while sum(slices) > prompt:
        slices.pop()
    assert sum(slices) == prompt
    assert max(slices) < 16 + 4
    assert len(passes) <= len(slices) + new


def test_slices_change_no_answer(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = []
    for size in (1 << 20, SLICE_TOKENS, 37, 16):
        monkeypatch.setattr(transformers_flavor, "SLICE_TOKENS", size)
        answers.append([ask(model, words(count, max_tokens=12))[0] for count in (17, 65, 300)])
    assert answers[0][0]
    assert all(other == answers[0] for other in answers)


@pytest.mark.parametrize("at_layer", [0, 1, 7])
def test_a_closed_stream_ends_a_prompt_before_its_next_layer(
    model: Any, at_layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each layer of each slice is counted; the stream is closed while one of them waits to be run."""
    monkeypatch.setattr(transformers_flavor, "SLICE_TOKENS", 64)
    reached, closed, begun = threading.Event(), threading.Event(), []

    def note(*_: object) -> None:
        begun.append(True)
        if len(begun) > at_layer:
            reached.set()
            assert closed.wait(LIMIT_S)

    layers = model._model.model.layers
    with contextlib.ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_hook(note).remove)
        stream = model.stream(words(1500))
        while not reached.is_set():
            assert next(stream) == ""
        stream.close()
        assert not model.stopped(0)
        closed.set()
        assert model.stopped(LIMIT_S)
    assert len(begun) == at_layer + 1 < len(layers) * 2 + 1
    assert ask(model, NEPAL)[0].startswith("नमस्ते! 🙏"), "the next prompt is answered as ever"


def test_an_answer_leaves_nothing_behind_in_the_model(model: Any) -> None:
    ask(model, words(3))
    assert not [module for module in model._model.modules() if module._forward_pre_hooks]


def test_a_model_with_a_recurrent_state_gets_its_prompt_in_one_piece(model: Any) -> None:
    config = transformers.MambaConfig(
        vocab_size=len(model._tokenizer), hidden_size=16, state_size=4, num_hidden_layers=2
    )
    recurrent = TransformersModel(
        transformers.MambaForCausalLM(config).eval(), model._tokenizer, defaults=model._defaults
    )
    with watched(recurrent) as passes:
        _, end = ask(recurrent, words(SLICE_TOKENS + 10))
    assert passes[0] == end.usage["prompt_tokens"] > SLICE_TOKENS


@pytest.mark.parametrize(
    ("configured", "of_tokenizer", "ends"),
    [
        (7, 4, [7, 4]),
        ([4, 0], 4, [4, 0]),
        (None, 4, [4]),
        ([7, 0], 4, [7, 0, 4]),
        (7, None, [7]),
        (None, None, []),
    ],
)
def test_an_answer_ends_at_the_end_tokens_of_the_package_and_of_the_tokenizer(
    configured: Any, of_tokenizer: int | None, ends: list[int]
) -> None:
    given = transformers.GenerationConfig(eos_token_id=configured)
    config = transformers_flavor._clean_generation_config(
        SimpleNamespace(generation_config=given),
        SimpleNamespace(eos_token_id=of_tokenizer, pad_token_id=None),
    )
    assert config["eos_token_id"] == ends


def test_an_answer_cut_within_a_character_ends_before_it(model: Any) -> None:
    whole, _ = ask(model, NEPAL)
    parts = [ask(model, {**NEPAL, "max_tokens": most})[0] for most in range(1, 16)]
    assert all(whole.startswith(part) for part in parts)
    assert len(set(parts)) < len(parts), "some cuts were within a character"


def tokenizer_of(folder: Path, **changes: Any) -> Any:
    shutil.copytree(SAMPLE_HF, folder)
    file = folder / "tokenizer_config.json"
    document = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in document.items() if value is not None}))
    with checkpoint.opened(folder, folder) as shown:
        return transformers_flavor._load_tokenizer(shown)


def test_a_tokenizers_class_gives_only_tokens_that_no_configuration_names(tmp_path: Path) -> None:
    plain = tokenizer_of(tmp_path / "a")
    named = tokenizer_of(tmp_path / "b", tokenizer_class="GPT2TokenizerFast", eos_token=None)
    foreign = tokenizer_of(tmp_path / "c", tokenizer_class="GemmaTokenizer", eos_token=None)
    assert (plain.eos_token, named.eos_token, named.unk_token) == (
        "<|end|>",
        "<|endoftext|>",
        "<|endoftext|>",
    )
    assert foreign.eos_token is None, "its <eos> is no word of this vocabulary"
    text = "What is 12 times 12?"
    assert plain(text)["input_ids"] == named(text)["input_ids"] == foreign(text)["input_ids"]
    assert len(plain) == len(named) == len(foreign), "no token is added"


def test_the_folder_that_the_library_sees_is_gone_after_a_load(tmp_path: Path) -> None:
    with checkpoint.opened(SAMPLE_HF, SAMPLE_HF) as shown:
        seen = {path.name for path in shown.model.parent.rglob("*") if path.is_file()}
    assert seen == {path.name for path in SAMPLE_HF.iterdir()}
    assert not shown.model.parent.exists()


def test_a_host_without_room_for_temporary_files_is_not_the_packages_doing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(**_: Any) -> None:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "TemporaryDirectory", refuse)
    with (
        pytest.raises(CannotRun, match="no folder for temporary files"),
        checkpoint.opened(SAMPLE_HF, SAMPLE_HF),
    ):
        pass
