"""The emulator's copies, mbarriers and warpgroup products: right where the kernel is, and no
mistake of a kernel's pipeline goes unseen."""

from __future__ import annotations

import pytest
import torch

from tests.emulator.build import call, compiler_found, load
from tests.emulator.search import integers

pytestmark = pytest.mark.skipif(not compiler_found(), reason="no C++ compiler to build it with")

# By the numbers of api_hopper.cpp: what is said of each, in every order of threads.
CERTAIN = {
    1: "threads have returned and the others wait for ever.*mbarrier_wait",
    5: "mbarrier|an operand changed|wait for ever",
    6: "more arrivals than it counts",
}
# Those that an order of threads and copies may hide.
RACES = {2: "no wait for the copy", 3: "the stage given back early", 4: "sums read too early"}


def product(
    rows: int, columns: int, dim: int, *, dtype: torch.dtype, seed: int = 1, mistake: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The emulated product of integer matrices and the right one, 64 x 16 with zeros around."""
    a, b = integers(rows, dim + 8, dtype=dtype), integers(columns, dim + 8, dtype=dtype)
    out = torch.full((64, 16), -7.0)
    sizes = (rows, columns, dim, 2 * (dim + 8))
    function = load().emulate_hopper_product
    call(function, seed, a, b, out, *sizes, dtype == torch.bfloat16, mistake)
    want = torch.zeros(64, 16)
    want[:rows, :columns] = a[:, :dim].float() @ b[:, :dim].float().T
    return out, want


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "columns", "dim"), [(64, 16, 64), (64, 16, 320), (50, 9, 200)])
def test_products_of_copied_tiles(rows: int, columns: int, dim: int, dtype: torch.dtype):
    for seed in range(4):
        got, want = product(rows, columns, dim, dtype=dtype, seed=seed)
        assert torch.equal(got, want)


@pytest.mark.parametrize("mistake", CERTAIN)
def test_a_mistake_in_the_pipeline_is_reported(mistake: int):
    for seed in range(8):
        with pytest.raises(RuntimeError, match=CERTAIN[mistake]):
            product(64, 16, 640, dtype=torch.float16, seed=seed, mistake=mistake)


@pytest.mark.parametrize("mistake", RACES)
def test_a_race_shows_under_most_seeds(mistake: int):
    seen = 0
    for seed in range(16):
        try:
            got, want = product(64, 16, 640, dtype=torch.float16, seed=seed, mistake=mistake)
        except RuntimeError as error:
            assert "an operand changed" in str(error) or "wait for ever" in str(error)
            seen += 1
        else:
            seen += not torch.equal(got, want)
    assert seen > 8, (RACES[mistake], seen)
