"""The host emulator of CUDA blocks: what it must compute, and the mistakes it must catch."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.emulator.build import call, compiler_found, is_new, load

pytestmark = pytest.mark.skipif(not compiler_found(), reason="no C++ compiler to build it with")
SEEDS = (0, 1, 2, 3)


@pytest.mark.parametrize("seed", SEEDS)
def test_shuffles_and_shared_memory_sum_a_block(seed: int) -> None:
    x = torch.randint(-9, 9, (5, 128)).float()
    sums = torch.empty(5)
    call(load().emulate_sum, seed, x, sums, 5, 128, False)
    assert torch.equal(sums, x.sum(1))


def test_a_missing_barrier_shows() -> None:
    x = torch.ones(1, 128)
    sums = torch.empty(1)
    results = []
    for seed in range(1, 9):
        call(load().emulate_sum, seed, x, sums, 1, 128, True)
        results.append(sums.item())
    assert any(r != 128.0 for r in results)


@pytest.mark.parametrize("seed", SEEDS)
def test_async_copies_land_at_the_wait(seed: int) -> None:
    x, out = torch.randn(64, 4), torch.empty(64, 4)
    call(load().emulate_copy, seed, x, out, 64, False)
    assert torch.equal(out, x)
    call(load().emulate_copy, seed, x, out, 64, True)
    assert out.isnan().all()


@pytest.mark.parametrize(
    ("kind", "complaint"),
    [
        (0, "some threads of the block have returned"),
        (1, "31 wait in __syncwarp at api_self.cpp"),
        (2, "16 wait in __syncwarp at api_self.cpp"),
    ],
)
def test_threads_that_wait_for_ever_are_named(kind: int, complaint: str) -> None:
    for seed in SEEDS:
        with pytest.raises(RuntimeError, match=complaint):
            call(load().emulate_stuck, seed, kind)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mma_fragments_multiply(dtype: torch.dtype) -> None:
    a, b = torch.randn(16, 16).to(dtype), torch.randn(8, 16).to(dtype)
    d = torch.empty(16, 8)
    call(load().emulate_mma, 1, a, b, d, dtype == torch.bfloat16)
    torch.testing.assert_close(d, a.float() @ b.float().T)


@pytest.mark.parametrize("seed", SEEDS)
def test_votes_and_reductions(seed: int) -> None:
    x = torch.randint(-3, 4, (32,), dtype=torch.int32)
    out = torch.empty(32, 8, dtype=torch.int32)
    call(load().emulate_votes, seed, x, out)

    def bits(votes: torch.Tensor) -> int:
        return sum(1 << i for i, v in enumerate(votes.tolist()) if v)

    unsigned = x.long() % (1 << 32)
    for lane in range(32):
        up = lane - 3 if lane % 8 >= 3 else lane
        expected = [
            bits(x > 0),
            bits(x == x[lane]),
            int(x.sum()),
            int(x.min()),
            int(unsigned.max()),
            int(x[lane ^ 5]),
            int(x[up]),
            int((x > 0).sum()),
        ]
        got = [int(v) for v in out[lane]]
        assert [e % (1 << 32) for e in expected] == [g % (1 << 32) for g in got]


def test_half_conversions_agree_with_torch() -> None:
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    as_half, as_bf16 = torch.empty(1 << 16), torch.empty(1 << 16)
    back_half, back_bf16 = torch.empty_like(bits), torch.empty_like(bits)
    call(load().emulate_halves, bits, as_half, as_bf16, back_half, back_bf16, 1 << 16)
    same = {"rtol": 0, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(as_half, bits.view(torch.float16).float(), **same)
    torch.testing.assert_close(as_bf16, bits.view(torch.bfloat16).float(), **same)
    torch.testing.assert_close(back_half.view(torch.float16), as_bf16.half(), **same)
    torch.testing.assert_close(back_bf16.view(torch.bfloat16), as_half.bfloat16(), **same)


def test_what_is_older_than_anything_it_was_made_of_is_out_of_date(tmp_path: Path) -> None:
    output, source, header, door = (tmp_path / name for name in ("x.o", "x.cu", "x.h", "door"))
    for path in (output, source, header, door):
        path.touch()
        os.utime(path, (5, 5))
    os.utime(output, (6, 6))
    assert not is_new(output), "nobody knows what it was made of"
    Path(f"{output}.d").write_text(f"{output}: {source} \\\n {header}\n")
    assert is_new(output, door)
    for path in (source, header, door):
        os.utime(path, (7, 7))
        assert not is_new(output, door)
        os.utime(path, (5, 5))
    header.unlink()
    assert not is_new(output, door)
