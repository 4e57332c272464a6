"""encode_keys and KeyCodes: errors that hold, the same bits on every path, and the op's manners."""

from __future__ import annotations

import copy
import io
import pickle
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

import knnext
from knnext import KeyCodes, _host, reference
from knnext.testing import assert_equal_results
from tests.ops.bad_arguments import assert_refused, refusal
from tests.ops.mixing_cases import ROOT, run_python, threads
from tests.ops.test_codes import TRAPS

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
OPS = torch.ops.knnext
Q, X, CENTER = torch.randn(4, 6), torch.randn(50, 6), torch.zeros(6)
CODES, STATS = OPS.encode_keys(X, CENTER)


def assert_certified(keys: Tensor, codes: KeyCodes) -> None:
    """Every finite row lies within its error of what its codes say; the norm is theirs."""
    assert codes.codes.dtype == torch.int8 and codes.stats.dtype == torch.float32
    assert codes.codes.shape == keys.shape and codes.stats.shape == (len(keys), 3)
    assert int(codes.codes.min()) >= -127
    finite = keys.isfinite().all(1)
    never = torch.tensor([0.0, 0.0, INF])
    assert torch.equal(codes.stats[~finite], never.expand(int((~finite).sum()), 3))
    assert (codes.codes[~finite] == 0).all()
    scale, error, norm = codes.stats[finite].double().T
    exact = reference.rotate(keys[finite].double() - codes.center.double())
    coded = scale[:, None] * codes.codes[finite].double()
    assert ((exact - coded).square().sum(1).sqrt() <= error).all()
    torch.testing.assert_close(norm, coded.square().sum(1).sqrt(), rtol=1e-7, atol=0)


@pytest.mark.parametrize("name", TRAPS)
def test_errors_are_certain(name: str) -> None:
    for dim in (1, 2, 3, 7, 64, 65, 576, 1600):
        keys = TRAPS[name](60, dim)
        for center in (None, keys[5].float().nan_to_num(), torch.full((dim,), 1e3)):
            assert_certified(keys, knnext.encode_keys(keys, center))


def test_errors_are_no_larger_than_eight_bits_ask() -> None:
    for dtype in DTYPES:
        keys = (torch.randn(500, 576) * torch.rand(576) + 5 + 40 * torch.eye(1, 576)).to(dtype)
        codes = knnext.encode_keys(keys)
        scale, error, norm = codes.stats.double().T
        assert (error <= 0.012 * norm).all()
        assert (codes.codes.int().abs().amax(1) == 127).all()
        left = reference.rotate(keys.double() - codes.center.double())
        left -= scale[:, None] * codes.codes.double()
        assert (error <= 1.002 * left.square().sum(1).sqrt()).all()


def test_the_ends_of_what_is_coded() -> None:
    for power in (-150, -149, -127, -126, -101, -100, -99, -51, -50, -49, 49, 50, 51, 60, 127):
        keys = torch.tensor([1.0, -0.75, 0.01]).repeat(3, 3) * torch.tensor(2.0**power)
        codes = knnext.encode_keys(keys.float(), torch.zeros(9))
        assert_certified(keys.float(), codes)
        if 2 < abs(power) < 49:
            assert (codes.stats[:, 0] > 0).all()
    for bad in (NAN, INF):
        codes = knnext.encode_keys(torch.ones(2, 4), torch.tensor([0, bad, 0, 0]))
        assert codes.stats.tolist() == [[0, INF, 0]] * 2 and (codes.codes == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_within_one_code(dtype: torch.dtype) -> None:
    for dim in (1, 2, 5, 64, 65, 576):
        keys = (torch.randn(200, dim) + 2).to(dtype)
        center = torch.randn(dim)
        codes, stats = OPS.encode_keys(keys, center)
        want, of_want = reference.encode_keys(keys, center)
        assert (codes.int() - want.int()).abs().max() <= 1
        torch.testing.assert_close(stats[:, 0], of_want[:, 0], rtol=1e-5, atol=0)
        torch.testing.assert_close(stats[:, 2], of_want[:, 2], rtol=1e-2, atol=0)
        assert ((stats - of_want)[:, 1] <= 0.02 * of_want[:, 1] + 1e-5 * stats[:, 2]).all()
        assert_certified(keys, KeyCodes(want, of_want, center))


def test_rotation_of_the_reference_is_orthogonal_and_spreads() -> None:
    for dim in (1, 2, 3, 6, 8, 100, 129):
        matrix = reference.rotate(torch.eye(dim, dtype=torch.float64))
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(dim, dtype=torch.float64))
        if dim > 6:
            assert matrix.abs().max() < 0.9
    assert reference.rotate(torch.zeros(0, 6)).shape == (0, 6)


SAME_BITS = """
import torch
from tests.ops.test_codes_encode import every_code
torch.save(every_code(), {to!r})
"""


def every_code() -> list[Tensor]:
    torch.manual_seed(3)
    out: list[Tensor] = []
    for dim in (1, 3, 8, 31, 33, 64, 576, 1600):
        for dtype in DTYPES:
            keys = (torch.randn(70, dim) + 1).to(dtype)
            out += OPS.encode_keys(keys, torch.randn(dim))
    return out


def test_the_same_bits_whatever_path_and_threads(tmp_path: Path) -> None:
    want = every_code()
    for count in (1, 2, 5):
        with threads(count):
            assert all(map(torch.equal, every_code(), want))
    for path in _host.usable_cpu_isas():
        file = str(tmp_path / path)
        run_python(SAME_BITS.format(to=file), KNNEXT_CPU_ISA=path)
        assert all(map(torch.equal, torch.load(file), want)), path


# KeyCodes


def parts_of(codes: KeyCodes) -> tuple[Tensor, Tensor, Tensor]:
    return codes.codes, codes.stats, codes.center


def assert_equal_codes(got: KeyCodes, want: KeyCodes) -> None:
    assert all(map(torch.equal, parts_of(got), parts_of(want)))


def test_key_codes_are_cut_and_joined_like_the_keys() -> None:
    keys = torch.randn(100, 9)
    codes = knnext.encode_keys(keys)
    assert (len(codes), codes.dim, codes.device) == (100, 9, torch.device("cpu"))
    assert codes.nbytes == 100 * (9 + 12) + 9 * 4
    held = torch.rand(100) < 0.5
    for rows in (slice(10, 50), slice(None, None, 7), torch.tensor([4, 4, 99, -1]), held):
        assert_equal_codes(codes[rows], knnext.encode_keys(keys[rows], codes.center))
        assert_equal_results(
            knnext.knn_search(keys[:3], keys[rows], 2, codes=codes[rows]),
            knnext.knn_search(keys[:3], keys[rows], 2),
        )
    assert_equal_codes(KeyCodes.cat([codes[:0], codes[:30], codes[30:]]), codes)
    for rows in (3, (1, 2), [0], "a", torch.tensor(3), torch.zeros(2, 2, dtype=torch.int64)):
        with pytest.raises(TypeError, match="take a slice or a tensor of rows"):
            codes[rows]  # type: ignore[index]
    with pytest.raises(ValueError, match="needs at least one part"):
        KeyCodes.cat([])
    with pytest.raises(ValueError, match="one center; these were made with several"):
        KeyCodes.cat([codes, knnext.encode_keys(keys, keys[0])])
    with pytest.raises(AttributeError):
        codes.codes = keys  # type: ignore[misc]


def test_key_codes_move_and_keep() -> None:
    codes = knnext.encode_keys(torch.randn(20, 5))
    assert_equal_codes(codes.to("cpu"), codes)
    assert codes.to("meta").device.type == "meta"
    for wish in (torch.float16, torch.float32, torch.int8):
        with pytest.raises(TypeError, match=re.escape("give to() a device alone")):
            codes.to(wish)
    assert_equal_codes(pickle.loads(pickle.dumps(codes)), codes)
    assert_equal_codes(copy.deepcopy(codes), codes)
    file = io.BytesIO()
    torch.save(codes, file)
    file.seek(0)
    assert_equal_codes(torch.load(file, weights_only=False), codes)


def test_the_mean_of_finite_rows_is_the_center() -> None:
    keys = torch.randn(300, 7) + 50
    keys[3, 2], keys[9] = NAN, INF
    codes = knnext.encode_keys(keys)
    held = keys[keys.isfinite().all(1)]
    torch.testing.assert_close(codes.center, held.double().mean(0).float())
    half = knnext.encode_keys(torch.full((500, 3), 65504.0).half())
    assert (half.center == 65504).all()
    for empty in (keys[:0], keys[9:10]):
        assert (knnext.encode_keys(empty).center == 0).all()


# The ops

N32 = torch.zeros(50)
BAD_KEYS = {
    "dtype": (X.double(), CENTER, "keys must be a float16, bfloat16 or float32 tensor of shape (N"),
    "rank": (X[0], CENTER, "keys must be a float16, bfloat16 or float32 tensor of shape (N, D)"),
    "no dimension": (X[:, :0], CENTER[:0], "keys must have D >= 1"),
    "center dtype": (
        X,
        CENTER.half(),
        "center must be a float32 tensor of shape (6,), got a float",
    ),
    "center length": (
        X,
        CENTER[1:],
        "center must be a float32 tensor of shape (6,), got a float32",
    ),
    "center rank": (X, CENTER[None], "center must be a float32 tensor of shape (6,)"),
}
GOOD: dict[str, Any] = {
    "queries": Q, "keys": X, "codes": CODES, "code_stats": STATS, "center": CENTER, "k": 3,
}  # fmt: skip
BAD_SEARCH = {
    "queries dtype": ({"queries": Q.double()}, "queries must be a float16, bfloat16 or float32"),
    "keys dtype": ({"keys": X.half()}, "keys must be a float32 tensor of shape (N, 6), got a"),
    "codes rows": ({"codes": CODES[1:]}, "codes must be an int8 tensor of shape (50, 6), got an"),
    "codes width": ({"codes": CODES[:, 1:]}, "codes must be an int8 tensor of shape (50, 6)"),
    "codes dtype": ({"codes": CODES.int()}, "codes must be an int8 tensor of shape (50, 6)"),
    "stats shape": ({"code_stats": STATS[:, :2]}, "code_stats must be a float32 tensor of shape"),
    "stats dtype": ({"code_stats": STATS.half()}, "of shape (50, 3), got a float16 tensor"),
    "center": ({"center": CENTER[1:]}, "center must be a float32 tensor of shape (6,)"),
    "k": ({"k": 0}, "k must be at least 1, got 0"),
    "metric": ({"metric": "cosine"}, 'metric must be "l2" or "ip", got "cosine"'),
    "norms": ({"key_sqnorms": N32[1:]}, "key_sqnorms must be a float32 tensor of shape (50,)"),
    "offset": ({"index_offset": -1}, "index_offset must be at least 0, got -1"),
    "one init": ({"init_distances": torch.zeros(4, 2)}, "got init_distances alone"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_KEYS)
def test_bad_keys_are_refused_alike_by_real_and_fake_tensors(name: str) -> None:
    keys, center, match = BAD_KEYS[name]
    assert_refused(OPS.encode_keys, match, keys, center)
    assert refusal(knnext.encode_keys, keys, center) == refusal(OPS.encode_keys, keys, center)
    if not name.startswith("center"):
        assert match in refusal(knnext.encode_keys, keys)


@pytest.mark.parametrize("name", BAD_SEARCH)
def test_bad_arguments_are_refused_alike_by_real_and_fake_tensors(name: str) -> None:
    wrong, match = BAD_SEARCH[name]
    assert_refused(OPS.knn_search_codes, match, **{**GOOD, **wrong})
    real = refusal(OPS.knn_search_codes, **{**GOOD, **wrong})
    assert real.startswith("knnext::knn_search_codes: ")


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    keys = X.to(dtype)
    torch.library.opcheck(OPS.encode_keys, (keys, CENTER))
    torch.library.opcheck(OPS.encode_keys, (keys.clone().requires_grad_(), CENTER))
    given = (Q.to(dtype), keys, *OPS.encode_keys(keys, CENTER), CENTER, 7)
    for kwargs in (
        {},
        {"metric": "ip", "refine": True, "index_offset": 3},
        {
            "key_sqnorms": N32,
            "init_distances": torch.zeros(4, 2),
            "init_indices": torch.zeros(4, 2, dtype=torch.int64),
        },
    ):
        torch.library.opcheck(OPS.knn_search_codes, given, kwargs)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic: bool) -> None:
    def step(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        codes = knnext.encode_keys(2 * keys)
        distances, indices = knnext.knn_search(queries, 2 * keys, 3, codes=codes)
        return distances + 1, indices

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows, num_keys in ((4, 50), (5, 31)):
        queries, keys = torch.randn(rows, 6), torch.randn(num_keys, 6)
        assert_equal_results(compiled(queries, keys), step(queries, keys))


def test_vmap() -> None:
    queries, keys = torch.randn(3, 4, 6), torch.randn(3, 50, 6)
    centers = torch.randn(3, 6)
    codes = knnext.encode_keys(keys[0])
    got = vmap(lambda q: knnext.knn_search(q, keys[0], 3, codes=codes))(queries)
    for i in range(3):
        assert_equal_results(
            (got[0][i], got[1][i]), knnext.knn_search(queries[i], keys[0], 3, codes=codes)
        )
    for in_dims, args in (((0, None), (keys, centers[0])), ((0, 0), (keys, centers)),
                          ((None, 0), (keys[0], centers))):  # fmt: skip
        every = vmap(OPS.encode_keys, in_dims=in_dims)(*args)
        for i in range(3):
            one = [a if d is None else a[i] for a, d in zip(args, in_dims, strict=True)]
            assert all(map(torch.equal, (every[0][i], every[1][i]), OPS.encode_keys(*one)))

    def each(q: Tensor, x: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
        return OPS.knn_search_codes(q, x, *OPS.encode_keys(x, center), center, 3)

    distances, indices = vmap(each)(queries, keys, centers)
    for i in range(3):
        want = knnext.knn_search(queries[i], keys[i], 3)
        assert_equal_results((distances[i], indices[i]), want)


def test_no_gradient_no_warning_and_no_derivative_forward() -> None:
    queries, keys = Q.clone().requires_grad_(), X.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        codes = knnext.encode_keys(keys, CENTER)
        assert not codes.stats.requires_grad
        distances, indices = knnext.knn_search(queries, keys, 3, codes=codes)
        assert not distances.requires_grad
        knnext.rescore(queries, keys, indices).sum().backward()
    with pytest.raises(RuntimeError, match="knnext::encode_keys: no derivative goes through"):
        jvp(lambda x: OPS.encode_keys(x, CENTER)[1], (X,), (X,))
    for op in (jvp, lambda f, x, v: grad(lambda q: f(q).sum())(*x)):
        with pytest.raises(RuntimeError, match="knnext::knn_search_codes: no derivative goes"):
            op(lambda q: OPS.knn_search_codes(q, X, CODES, STATS, CENTER, 3)[0], (Q,), (Q,))


def test_arguments_are_left_alone() -> None:
    given = [Q, X, CODES, STATS, CENTER]
    copies = [t.clone() for t in given]
    OPS.knn_search_codes(*given, 5, "ip", refine=True)
    OPS.encode_keys(X, CENTER)
    assert all(map(torch.equal, given, copies))


FALLBACK = """
import os, sys, warnings
os.chdir({folder!r})
sys.path.insert(0, "")
warnings.simplefilter("ignore")
import torch, knnext
assert knnext.ops.REPORT.fallbacks and knnext.__file__.startswith({folder!r})
torch.manual_seed(0)
keys = torch.randn(300, 6) + 2
codes = knnext.encode_keys(keys)
found = knnext.knn_search(keys[:9], keys, 5, codes=codes, refine=True)
empty = knnext.encode_keys(keys[:0])
errors = []
for bad in (lambda: knnext.encode_keys(keys.double()), lambda: knnext.encode_keys(keys, keys),
            lambda: knnext.knn_search(keys, keys, 3, codes=codes[1:])):
    try:
        bad()
    except RuntimeError as error:
        errors.append(str(error))
torch.save([keys, codes.codes, codes.stats, codes.center, *found, *[empty.codes, empty.stats],
            errors], "out")
"""


def test_without_the_library(tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("lib", "*.so", "__pycache__")
    shutil.copytree(ROOT / "knnext", tmp_path / "knnext", ignore=ignored)
    run_python(FALLBACK.format(folder=str(tmp_path)))
    keys, codes, stats, center, *found, no_codes, no_stats, errors = torch.load(tmp_path / "out")
    want = knnext.encode_keys(keys)
    assert torch.equal(center, want.center) and (codes.int() - want.codes.int()).abs().max() <= 1
    assert_certified(keys, KeyCodes(codes, stats, center))
    assert torch.equal(found[1], knnext.knn_search(keys[:9], keys, 5, refine=True)[1])
    assert no_codes.shape == (0, 6) and no_stats.shape == (0, 3)
    assert errors == [
        refusal(knnext.encode_keys, keys.double()),
        refusal(knnext.encode_keys, keys, keys),
        refusal(knnext.knn_search, keys, keys, 3, codes=want[1:]),
    ]


MEASURE = """
import resource, sys, torch, knnext
num_queries, num_keys, dim, k = map(int, sys.argv[1:])
keys = torch.randn(num_keys, dim).half()
codes = knnext.encode_keys(keys, torch.zeros(dim))
queries = torch.randn(num_queries, dim).half()
knnext.knn_search(queries[:1], keys[:8], 1, codes=codes[:8])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
knnext.knn_search(queries, keys, k, codes=codes)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) * 1024 - num_queries * k * 12)
"""


@pytest.mark.parametrize(
    ("num_queries", "num_keys", "dim", "k"),
    [
        (1500, 5000, 32, 1024),
        pytest.param(600, 100_000, 64, 8, marks=pytest.mark.slow),
        pytest.param(2, 300_000, 16, 70_000, marks=pytest.mark.slow),
    ],
)
def test_memory_stays_within_the_contract(
    num_queries: int, num_keys: int, dim: int, k: int
) -> None:
    sizes = [str(n) for n in (num_queries, num_keys, dim, k)]
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, *sizes], capture_output=True, text=True, check=True
    )
    assert int(run.stdout) <= (256 << 20) + num_queries * max(128 << 10, 64 * k)
