"""The arithmetic of what a build keeps, and the table that shows it beside its speed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tools.real_model import machine, quality, speed
from tools.real_model.building import made
from tools.real_model.gguf_builds import format_of
from tools.real_model.table import table

WINDOWS = [[0, 1, 2], [2, 0]]


def logits(*rows: list[float]) -> npt.NDArray[np.float32]:
    return np.array(rows, dtype=np.float32)


def of(probabilities: list[list[float]]) -> npt.NDArray[np.float32]:
    """Logits of these probabilities; a constant in front changes nothing."""
    return logits(*(list(np.log(row) + 7.0) for row in probabilities))


ORIGINAL = [of([[0.2, 0.5, 0.3], [0.25, 0.25, 0.5], [0.1, 0.1, 0.8]]), of([[0.8, 0.1, 0.1], [0.6, 0.2, 0.2]])]


def test_perplexity_is_the_inverse_of_the_geometric_mean_of_what_each_token_was_given() -> None:
    # 1 was given 0.5, 2 was given 0.5, and in the other window 0 was given 0.8: what stands last is not scored.
    assert quality.perplexity(ORIGINAL, WINDOWS) == pytest.approx((0.5 * 0.5 * 0.8) ** (-1 / 3))


def test_a_model_that_knows_nothing_has_the_vocabulary_as_its_perplexity() -> None:
    assert quality.perplexity([np.zeros((200, 50), np.float32)], [[7] * 200]) == pytest.approx(50)


def test_a_text_without_a_second_token_has_no_perplexity() -> None:
    with pytest.raises(ValueError, match="two tokens"):
        quality.perplexity([logits([1, 2])], [[0]])


def test_each_window_has_logits_of_its_own() -> None:
    with pytest.raises(ValueError, match="shorter"):
        quality.perplexity(ORIGINAL[:1], WINDOWS)


def test_large_logits_do_not_overflow() -> None:
    assert quality.perplexity([logits([3e4, 0], [0, 3e4])], [[0, 0]]) == pytest.approx(1)


def test_the_same_next_token_is_counted_at_every_position() -> None:
    other = [ORIGINAL[0][[0, 0, 2]], ORIGINAL[1]]  # the second position says 1 instead of 2
    assert quality.same_next_token(ORIGINAL, other) == pytest.approx(4 / 5)
    assert quality.same_next_token(ORIGINAL, ORIGINAL) == 1


def test_divergence_is_the_mean_over_positions_and_seen_from_the_original() -> None:
    a, b = [of([[0.5, 0.5], [0.9, 0.1]])], [of([[0.25, 0.75], [0.9, 0.1]])]
    there = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    back = 0.25 * np.log(0.25 / 0.5) + 0.75 * np.log(0.75 / 0.5)
    assert quality.divergence(a, b) == pytest.approx(there / 2, rel=1e-5)
    assert quality.divergence(b, a) == pytest.approx(back / 2, rel=1e-5)
    assert there != pytest.approx(back, rel=1e-3)
    assert quality.divergence(a, a) == 0


def test_more_positions_than_are_taken_at_a_time_give_the_same_figures() -> None:
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(2, 150, 9)).astype(np.float32)
    tokens = [int(token) for token in rng.integers(0, 9, 150)]
    p = np.exp(rows.astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    kept = quality.compare([rows[0]], [rows[1]], [tokens])
    assert kept.perplexity == pytest.approx(np.exp(-np.log(p[1][np.arange(149), tokens[1:]]).mean()))
    assert kept.divergence == pytest.approx((p[0] * np.log(p[0] / p[1])).sum(-1).mean())
    assert kept.same_next_token == (rows[0].argmax(-1) == rows[1].argmax(-1)).mean()


def test_medians_are_over_launches_and_a_side_without_any_is_left_out() -> None:
    found = {"a": [{"peak_mb": 3.0}, {"peak_mb": 9.0}, {"peak_mb": 4.0}], "b": []}
    assert speed.summed_up(found) == {"a": {"peak_mb": 4.0, "launches": 3.0}}


def report(*launches: int) -> dict[str, Any]:
    """Of one build for each number of launches, and one that was not measured."""
    figures = {"peak_mb": 231.4}
    for length in speed.PROMPT_TOKENS:
        figures |= {
            f"first_token_ms_{length}": length * 1.5,
            f"decode_tokens_per_s_{length}": 100 - length / 32,
        }
    build = {"perplexity": 42.0, "same_next_token": 0.761, "divergence": 0.1659, "bytes": 117_152_561}
    measured = {
        f"build {at}": {**build, "speed": figures | {"launches": float(count)}}
        for at, count in enumerate(launches)
    }
    return {
        "tokens": 1542,
        "original": {"perplexity": 40.0, "bytes": 541_614_977},
        "builds": {**measured, "unmeasured": build},
        "threads": 2,
        "machine": "a CPU",
    }


def test_the_table_has_quality_and_speed_in_one_line_and_says_how_it_was_measured() -> None:
    assert table(report(5)) == (
        "| build | perplexity (1,542 tokens) | × original | same next token | KL (nats) | MB "
        "| first token 32 / 256 / 1,024 (ms) | decode after 32 / 256 / 1,024 (tokens/s) | peak MB |\n"
        "|---|---|---|---|---|---|---|---|---|\n"
        "| original, float32 | 40.0 | 1 | 1 | 0 | 542 | – | – | – |\n"
        "| build 0 | 42.0 | 1.050 | 0.76 | 0.166 | 117 | 48 / 384 / 1,536 | 99 / 92 / 68 | 231 |\n"
        "| unmeasured | 42.0 | 1.050 | 0.76 | 0.166 | 117 | – | – | – |\n"
        "\n"
        "Speed and memory: the bare libraries with 2 threads each, a process for each launch, all builds in turns;\n"
        "medians of 5 launches. a CPU."
    )


def test_a_table_says_where_a_build_had_fewer_launches_and_that_a_thread_was_alone() -> None:
    last = table({**report(5, 4, 5), "threads": 1}).splitlines()[-2:]
    assert "with 1 thread each" in last[0]
    assert last[1] == "medians of 4 to 5 launches. a CPU."


def test_a_table_of_quality_alone_says_nothing_of_launches() -> None:
    alone = report()
    del alone["threads"], alone["machine"]
    assert table(alone).splitlines()[-1].startswith("| unmeasured |")


@pytest.mark.parametrize(
    ("cpuinfo", "said"),
    [
        ("model name\t: AMD EPYC\nflags\t\t: fpu avx2 avx512_vnni\n", "AMD EPYC (AVX-512 VNNI), "),
        ("model name\t: Old\nflags\t\t: fpu\n", "Old, "),
        ("processor\t: 0\nFeatures\t: fp asimd asimddp\n", "unnamed CPU (dot product), "),
        ("", "unnamed CPU, "),
    ],
)
def test_the_machine_is_named_with_what_such_libraries_use_of_it(cpuinfo: str, said: str) -> None:
    phrase = machine.described(cpuinfo)
    assert phrase.startswith(said)
    assert re.search(r", \d+ CPUs?, load average \d+\.\d when it began$", phrase)


@pytest.mark.parametrize(
    ("build", "tensor", "columns", "name"),
    [
        ("Q4_0", "blk.0.ffn_down.weight", 1536, "Q4_0"),
        ("Q4_0", "token_embd.weight", 576, "Q8_0"),
        ("Q4_K_M", "token_embd.weight", 2048, "Q6_K"),
        ("Q4_K_M", "blk.0.attn_q.weight", 576, "Q5_0"),
        ("Q4_K_M", "blk.0.attn_v.weight", 576, "Q8_0"),
        ("Q4_K_M", "blk.2.ffn_down.weight", 1536, "Q6_K"),
        ("Q4_K_M", "blk.4.ffn_down.weight", 1536, "Q4_K"),
        ("Q4_K_M", "blk.5.ffn_down.weight", 1536, "Q6_K"),
        ("Q4_K_M", "blk.29.ffn_down.weight", 1536, "Q6_K"),
    ],
)
def test_a_matrix_has_the_format_that_llama_cpp_gives_it(
    build: str, tensor: str, columns: int, name: str
) -> None:
    assert format_of(build, tensor, columns, 30) == name


def test_a_folder_is_made_once_and_again_when_its_recipe_has_changed(tmp_path: Path) -> None:
    folder, calls = tmp_path / "made", list[str]()

    def make(place: Path) -> None:
        calls.append(place.name)
        (place / "file").write_text(f"{len(calls)}")

    assert [made(folder, recipe, make) for recipe in ("a", "a", "b", "b")] == [folder] * 4
    assert (len(calls), (folder / "file").read_text()) == (2, "2")


def test_a_folder_that_could_not_be_made_is_not_there(tmp_path: Path) -> None:
    def fail(place: Path) -> None:
        (place / "half").touch()
        raise OSError("full")

    made(tmp_path / "made", "a", lambda place: None)
    with pytest.raises(OSError, match="full"):
        made(tmp_path / "made", "b", fail)
    assert not (tmp_path / "made").exists()
    assert made(tmp_path / "made", "b", lambda place: (place / "whole").touch()).is_dir()
    assert [file.name for file in (tmp_path / "made").iterdir()] == ["whole"]
