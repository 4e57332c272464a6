"""The CUDA kernels of the mixing ops on the host emulator, against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from knnext import reference
from tests.emulator import ops
from tests.emulator.build import call, compiler_found, load

pytestmark = pytest.mark.skipif(not compiler_found(), reason="no C++ compiler to build it with")
INF, NAN = float("inf"), float("nan")
# Sums in float32 of up to 16,384 terms against float64.
CLOSE = {"rtol": 3e-6, "atol": 3e-6}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def small_shared_memory() -> object:
    """sm_86 and sm_89 give a block 99 KB, and not 163 or 227."""
    call(load().emulate_set_shared_limit, 99 * 1024)
    yield
    call(load().emulate_set_shared_limit, 227 * 1024)


def neighbors(
    rows: int, k: int, vocab_size: int, distinct: int | None = None, scale: float = 30.0
) -> tuple[Tensor, Tensor]:
    """Ascending distances, tokens of which a few come often, and some padding."""
    distances = (torch.rand(rows, k) * scale).sort(1).values + 100
    pool = torch.randint(0, vocab_size, (distinct or max(1, k // 4),))
    tokens = pool[(torch.rand(rows, k) ** 2 * len(pool)).long()]
    tokens[:, k - k // 8 :] = -1
    distances[:, k - k // 8 :] = INF
    return distances, tokens


def softmax_64(distances: Tensor, tokens: Tensor, temperature: float | Tensor, v: int) -> Tensor:
    return reference.knn_softmax(distances.double(), tokens, temperature, v).float()


def interpolate_64(logits: Tensor, distances: Tensor, *rest: float | Tensor) -> Tensor:
    mixed = reference.knn_interpolate(logits.double(), distances.double(), *rest)
    return mixed.float()


SHAPES = [
    # rows, k, vocab_size
    (3, 1, 1),
    (3, 1, 7),
    (2, 64, 7),
    (2, 65, 33_344),
    (2, 127, 33),
    (2, 129, 50_257),
    (2, 1024, 33_344),
    (2, 1025, 5003),
    (1, 2048, 1001),
    (1, 2049, 1001),
]


@pytest.mark.parametrize(("rows", "k", "vocab_size"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_softmax(rows: int, k: int, vocab_size: int, dtype: torch.dtype) -> None:
    distances, tokens = neighbors(rows, k, vocab_size)
    got = ops.knn_softmax(distances, tokens.to(dtype), 2.5, vocab_size)
    torch.testing.assert_close(got, softmax_64(distances, tokens, 2.5, vocab_size), **CLOSE)


@pytest.mark.parametrize(
    ("rows", "k", "vocab_size", "dtype"),
    [
        (*shape, dtype)
        for shape in SHAPES
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        # The others take the same path there as in a smaller vocabulary.
        if shape[2] < 10_000 or dtype in (torch.float16, torch.float32)
    ],
)
def test_interpolate(rows: int, k: int, vocab_size: int, dtype: torch.dtype) -> None:
    distances, tokens = neighbors(rows, k, vocab_size)
    logits = (torch.randn(rows, vocab_size) * 4).to(dtype)
    got = ops.knn_interpolate(logits, distances, tokens, 2.5, 0.3)
    expected = interpolate_64(logits, distances, tokens, 2.5, 0.3)
    torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("k", [1, 7, 64, 65, 1024, 1025, 2049])
def test_target(k: int) -> None:
    distances, tokens = neighbors(4, k, 50)
    targets = torch.stack([tokens[0, 0], tokens[1, -1], torch.tensor(51), torch.tensor(-1)])
    got = ops.knn_target_log_prob(distances, tokens, targets, 3.0)
    expected = reference.knn_target_log_prob(distances.double(), tokens, targets, 3.0).float()
    torch.testing.assert_close(got, expected, **CLOSE)
    narrow = ops.knn_target_log_prob(distances, tokens.int(), targets.int(), 3.0)
    assert torch.equal(narrow, got)


@pytest.mark.parametrize("distinct", [1, 2, 16_384])
def test_largest_k(distinct: int) -> None:
    k, vocab_size = 16_384, 1003
    distances, tokens = neighbors(1, k, vocab_size, distinct)
    got = ops.knn_softmax(distances, tokens, 4.0, vocab_size)
    torch.testing.assert_close(got, softmax_64(distances, tokens, 4.0, vocab_size), **CLOSE)


@pytest.mark.parametrize(("k", "vocab_size"), [(16_384, 300_000), (1025, 1 << 22)])
def test_words_of_64_bits(k: int, vocab_size: int) -> None:
    distances, tokens = neighbors(1, k, vocab_size)
    got = ops.knn_softmax(distances, tokens, 4.0, vocab_size)
    torch.testing.assert_close(got, softmax_64(distances, tokens, 4.0, vocab_size), **CLOSE)


@pytest.mark.slow
def test_words_of_64_bits_without_room(small_shared_memory: object) -> None:
    k, vocab_size = 16_384, 300_000
    distances, tokens = neighbors(1, k, vocab_size)
    logits = torch.randn(1, vocab_size).half()
    got = ops.knn_interpolate(logits, distances, tokens, 4.0, 0.5)
    expected = interpolate_64(logits, distances, tokens, 4.0, 0.5)
    torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.slow
def test_row_longer_than_shared_memory(small_shared_memory: object) -> None:
    call(load().emulate_set_shared_limit, 16 * 1024)
    distances, tokens = neighbors(65, 100, 8003)  # more rows than are split
    logits = (torch.randn(65, 8003) * 4).half()
    got = ops.knn_interpolate(logits, distances, tokens, 4.0, 0.5)
    expected = interpolate_64(logits, distances, tokens, 4.0, 0.5)
    torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("skew", [0, 1, 3])
def test_few_long_rows_are_split(skew: int) -> None:
    distances, tokens = neighbors(5, 90, 9001)
    tokens[1], distances[2, 4] = -1, NAN
    tokens[0, :4] = torch.tensor([0, 2047, 2048, 9000])  # ends of pieces
    lmbda = torch.tensor([0.3, 0.3, 0.3, 0.0, 1.0])
    logits = torch.randn(5, 9013)[:, skew : skew + 9001]
    runs = [
        ops.knn_interpolate(logits, distances, tokens, 4.0, lmbda, seed=seed, skew=skew)
        for seed in (1, 2)
    ]
    assert torch.equal(runs[0].nan_to_num(), runs[1].nan_to_num())
    expected = interpolate_64(logits, distances, tokens, 4.0, lmbda)
    torch.testing.assert_close(runs[0], expected, equal_nan=True, **CLOSE)
    assert runs[0][2].isnan().all()


@pytest.mark.slow
def test_many_long_rows_are_not_split() -> None:
    """One row more than are split, each of more logits than may be kept."""
    rows, vocab_size = 65, 25_700  # 201 KB of float64
    distances, tokens = neighbors(rows, 6, vocab_size)
    tokens[64, :3] = torch.tensor([0, 2048, vocab_size - 1])
    logits = torch.randn(rows, vocab_size, dtype=torch.float64)
    got = ops.knn_interpolate(logits, distances, tokens, 4.0, 0.5)
    expected = interpolate_64(logits, distances, tokens, 4.0, 0.5)
    torch.testing.assert_close(got, expected, **CLOSE)


def test_a_split_row_with_many_neighbors() -> None:
    distances, tokens = neighbors(1, 2049, 33_345)
    logits = torch.full((1, 33_345), -INF)
    logits[0, 20_000:] = torch.randn(13_345)  # whole pieces of nothing
    got = ops.knn_interpolate(logits, distances, tokens, 4.0, 0.5)
    expected = interpolate_64(logits, distances, tokens, 4.0, 0.5)
    torch.testing.assert_close(got, expected, **CLOSE)
    logits[0, 30] = NAN  # among pieces of nothing
    got = ops.knn_interpolate(logits, distances, tokens, 4.0, 0.5)
    assert got.isnan().all()


@pytest.mark.slow
def test_many_rows_take_smaller_blocks() -> None:
    distances, tokens = neighbors(512, 5, 19)
    got = ops.knn_softmax(distances, tokens, 4.0, 19)
    torch.testing.assert_close(got, softmax_64(distances, tokens, 4.0, 19), **CLOSE)
    distances, tokens, logits = distances[:256], tokens[:256], torch.randn(256, 19)
    got = ops.knn_interpolate(logits, distances, tokens, 4.0, 0.5)
    expected = interpolate_64(logits, distances, tokens, 4.0, 0.5)
    torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("vocab_size", [1, 2, 3, 5, 9, 15, 17, 31, 63])
@pytest.mark.parametrize("skew", [0, 1, 2, 3])
def test_rows_that_begin_anywhere(vocab_size: int, skew: int) -> None:
    distances, tokens = neighbors(5, 9, vocab_size)
    expected = softmax_64(distances, tokens, 2.0, vocab_size)
    got = ops.knn_softmax(distances, tokens, 2.0, vocab_size, skew=skew)
    torch.testing.assert_close(got, expected, **CLOSE)
    # Views whose rows lie further apart than they are long, from an odd element on.
    wide = torch.randn(5, vocab_size + 13).half()
    logits = wide[:, skew : skew + vocab_size]
    got = ops.knn_interpolate(logits, distances, tokens, 2.0, 0.6, skew=skew)
    expected = interpolate_64(logits, distances, tokens, 2.0, 0.6)
    torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.slow
def test_any_order_of_threads_gives_the_same_bits() -> None:
    distances, tokens = neighbors(2, 700, 3001, distinct=40)
    logits = torch.randn(2, 3001).half()
    targets = tokens[:, 3].contiguous()
    for seed in (0, 1, 2, 3, 4):
        softmax = ops.knn_softmax(distances, tokens, 2.0, 3001, seed=seed)
        mixed = ops.knn_interpolate(logits, distances, tokens, 2.0, 0.4, seed=seed)
        target = ops.knn_target_log_prob(distances, tokens, targets, 2.0, seed=seed)
        if seed == 0:
            first = softmax, mixed, target
        for one, other in zip(first, (softmax, mixed, target), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_parameters_by_row(dtype: torch.dtype) -> None:
    distances, tokens = neighbors(3, 20, 11)
    logits = torch.randn(3, 11)
    temperature = torch.tensor([0.5, 2.0, 64.0], dtype=dtype)
    lmbda = torch.tensor([0.0, 0.25, 1.0], dtype=dtype)
    got = ops.knn_interpolate(logits, distances, tokens, temperature, lmbda)
    expected = interpolate_64(logits, distances, tokens, temperature, lmbda)
    torch.testing.assert_close(got, expected, **CLOSE)
    scalar = torch.tensor(2.0, dtype=dtype)
    got = ops.knn_softmax(distances, tokens, scalar, 11)
    torch.testing.assert_close(got, softmax_64(distances, tokens, 2.0, 11), **CLOSE)


def test_strided_neighbors() -> None:
    distances, tokens = neighbors(4, 40, 30)
    got = ops.knn_softmax(distances[::2, 5:17], tokens.int()[::2, 5:17], 3.0, 30)
    expected = softmax_64(distances[::2, 5:17], tokens[::2, 5:17], 3.0, 30)
    torch.testing.assert_close(got, expected, **CLOSE)


def test_rows_without_a_neighbor() -> None:
    distances, tokens = torch.rand(3, 4), torch.full((3, 4), -1)
    distances[2], tokens[2] = INF, 5  # at an infinite distance: no neighbor either
    logits = torch.randn(3, 9)
    assert (ops.knn_softmax(distances, tokens, 1.0, 9) == 0).all()
    for lmbda in (0.0, 0.5, 1.0):
        got = ops.knn_interpolate(logits, distances, tokens, 1.0, lmbda)
        torch.testing.assert_close(got, logits.log_softmax(1), **CLOSE)
    targets = torch.tensor([0, -1, 5])
    assert (ops.knn_target_log_prob(distances, tokens, targets, 1.0) == -INF).all()


@pytest.mark.parametrize("k", [0, 3])
def test_no_rows_and_no_neighbors(k: int) -> None:
    empty, none = torch.empty(0, k), torch.empty(0, k, dtype=torch.int64)
    assert ops.knn_softmax(empty, none, 1.0, 5).shape == (0, 5)
    got = ops.knn_softmax(torch.empty(2, 0), torch.empty(2, 0, dtype=torch.int64), 1.0, 5)
    assert (got == 0).all()


def test_lmbda_at_its_ends() -> None:
    distances, tokens = neighbors(2, 30, 50, distinct=6)
    logits = torch.randn(2, 50)
    got = ops.knn_interpolate(logits, distances, tokens, 2.0, 0.0)
    torch.testing.assert_close(got, logits.log_softmax(1), **CLOSE)
    got = ops.knn_interpolate(logits, distances, tokens, 2.0, 1.0)
    log_p = softmax_64(distances, tokens, 2.0, 50).log()
    torch.testing.assert_close(got, log_p, **CLOSE)
    assert torch.equal(got == -INF, log_p == -INF)


def test_what_float32_would_lose_keeps_its_logarithm() -> None:
    distances = torch.tensor([[1e6, 1e6 + 0.5, 1e6 + 4000.0, 1e6 + 4000.0]])
    tokens = torch.tensor([[3, 1, 2, 2]])
    got = ops.knn_interpolate(torch.randn(1, 5), distances, tokens, 1.0, 1.0)
    expected = interpolate_64(torch.randn(1, 5), distances, tokens, 1.0, 1.0)
    torch.testing.assert_close(got, expected, **CLOSE)
    got = ops.knn_target_log_prob(distances, tokens, torch.tensor([2]), 1.0)
    torch.testing.assert_close(got, expected[:, 2], **CLOSE)
    assert got < -3999


@pytest.mark.parametrize("bad", [NAN, -INF])
def test_nan_reaches_the_whole_row_and_no_other(bad: float) -> None:
    distances, tokens = neighbors(3, 300, 40)
    distances[1, 7] = bad
    good = [0, 2]
    for got in (
        ops.knn_softmax(distances, tokens, 1.0, 40),
        ops.knn_interpolate(torch.randn(3, 40), distances, tokens, 1.0, 0.5),
        ops.knn_target_log_prob(distances, tokens, tokens[:, 0].contiguous(), 1.0)[:, None],
    ):
        assert got[1].isnan().all() and not got[good].isnan().any()


@pytest.mark.parametrize("temperature", [0.0, -1.0, NAN])
def test_a_temperature_that_is_none_gives_nan(temperature: float) -> None:
    distances, tokens = neighbors(3, 20, 40)
    t = torch.tensor([1.0, temperature, 1.0])
    got = ops.knn_softmax(distances, tokens, t, 40)
    assert got[1].isnan().all() and not got[[0, 2]].isnan().any()


@pytest.mark.parametrize("lmbda", [-0.1, 1.1, NAN])
def test_a_weight_that_is_none_gives_nan(lmbda: float) -> None:
    distances, tokens = neighbors(3, 20, 40)
    weights = torch.tensor([0.5, lmbda, 0.5])
    got = ops.knn_interpolate(torch.randn(3, 40), distances, tokens, 1.0, weights)
    assert got[1].isnan().all() and not got[[0, 2]].isnan().any()


def test_logits_of_minus_infinity_and_nan() -> None:
    distances, tokens = neighbors(4, 8, 40)
    logits = torch.randn(4, 40)
    logits[0, ::2] = -INF
    logits[1] = -INF
    logits[2, 13] = NAN
    got = ops.knn_interpolate(logits, distances, tokens, 1.0, 0.5)
    expected = interpolate_64(logits, distances, tokens, 1.0, 0.5)
    torch.testing.assert_close(got, expected, equal_nan=True, **CLOSE)


@pytest.mark.parametrize("token", [-2, 40, 1 << 33])
def test_tokens_out_of_range_stop_the_kernel(token: int) -> None:
    distances, tokens = neighbors(2, 20, 40)
    tokens[1, 4] = token
    with pytest.raises(RuntimeError, match="a token is not in"):
        ops.knn_softmax(distances, tokens, 1.0, 40)
    with pytest.raises(RuntimeError, match="a token is not in"):
        ops.knn_interpolate(torch.randn(2, 40), distances, tokens, 1.0, 0.5)
