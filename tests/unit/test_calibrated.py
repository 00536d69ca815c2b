"""Rounding that makes up for its errors: what it is worth, and how it is stored."""

from __future__ import annotations

import pytest
import torch

from tools import calibrated
from tools.calibrated import Rounded, rounded, second_moments, spread, stored

BLOCK = 16


def random(*sizes: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def moments_of(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.T @ inputs / len(inputs)


def loss(weights: torch.Tensor, matrix: Rounded, moments: torch.Tensor) -> float:
    """Mean square error of the products with such inputs."""
    error = weights - matrix.weights
    return float((error @ moments * error).sum())


@pytest.mark.parametrize("columns", [64, 192])
def test_with_inputs_that_go_together_it_loses_much_less_than_rounding_each_weight(columns: int) -> None:
    weights = random(24, columns)
    together = moments_of(
        random(400, 12, seed=2) @ random(12, columns, seed=3) + 0.3 * random(400, columns, seed=4)
    )
    each = rounded(weights, torch.diag(together.diagonal()), block_size=BLOCK)
    assert (
        loss(weights, rounded(weights, together, block_size=BLOCK), together)
        < loss(weights, each, together) / 2
    )


def test_inputs_that_do_not_go_together_leave_the_nearest_codes() -> None:
    weights = random(5, 48)
    found = rounded(weights, torch.diag(torch.rand(48) + 0.5), block_size=BLOCK)
    blocks = weights.unflatten(1, (-1, BLOCK))
    nearest = (blocks / found.scales[..., None] + found.zeros[..., None]).round().clamp(0, 15)
    assert torch.equal(found.codes, nearest)
    assert loss(weights, found, torch.eye(48)) < 0.01 * float((weights**2).sum())


@pytest.mark.parametrize("value", [0.0, 0.5, -2.0])
def test_a_block_of_one_value_keeps_it(value: float) -> None:
    weights = torch.full((2, 32), value)
    found = rounded(weights, torch.eye(32), block_size=BLOCK)
    assert torch.allclose(found.weights, weights, atol=1e-6)
    assert torch.isfinite(found.scales).all()


def test_two_codes_and_two_zero_points_of_a_row_share_a_byte() -> None:
    codes = torch.arange(12.0).reshape(1, 3, 4)
    matrix = Rounded(codes=codes, scales=torch.ones(1, 3), zeros=torch.tensor([[1.0, 2.0, 3.0]]))
    packed, scales, zeros = stored(matrix)
    assert packed.tolist() == [[[0x10, 0x32], [0x54, 0x76], [0x98, 0xBA]]]
    assert scales.tolist() == [[1, 1, 1]]
    assert zeros.tolist() == [[0x21, 0x03]]


def test_second_moments_are_those_of_a_matrixs_inputs_over_all_windows() -> None:
    class Model(torch.nn.Module):  # type: ignore[misc]  # torch has no types here
        def __init__(self) -> None:
            super().__init__()
            self.table, self.matrix = torch.nn.Embedding(9, 4), torch.nn.Linear(4, 3, bias=False)

        def forward(self, tokens: torch.Tensor, use_cache: bool) -> torch.Tensor:
            assert not use_cache
            found: torch.Tensor = self.matrix(self.table(tokens))
            return found

    model = Model()
    with torch.inference_mode():
        found = second_moments(model, {"matrix": model.matrix}, [[1, 2, 3], [4, 5, 6]])
        expected = moments_of(model.table(torch.tensor([1, 2, 3, 4, 5, 6])))
    assert torch.allclose(found["matrix"], expected, atol=1e-6)


def test_windows_are_spread_over_the_whole_text_and_a_short_one_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(calibrated, "WINDOW_TOKENS", 3)
    monkeypatch.setattr(calibrated, "WINDOWS", 2)
    assert spread(range(20)) == [[0, 1, 2], [10, 11, 12]]
    assert spread(range(5)) == [[0, 1, 2]]
    with pytest.raises(ValueError, match="2 tokens, and 3"):
        spread(range(2))
