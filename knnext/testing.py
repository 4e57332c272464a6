"""How results of knnext are compared: the tolerances, each with its reason, and top-k with ties.

Used by the project's own tests; of use to whoever tests code built on the ops.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from knnext import reference

INF = float("inf")


@dataclass(frozen=True)
class Tolerance:
    """``|got - want| <= absolute + relative * scale``; each use says what its scale is."""

    relative: float
    absolute: float
    reason: str


TOLERANCES: dict[str, Tolerance] = {
    "expanded": Tolerance(
        1e-6,
        1e-30,
        "knn_search; scale |q|^2 + |x|^2 (l2) or sum |q x| (ip). Products are exact to half a "
        "float32 ulp (6e-8) and summed in blocks; a block's walk of roundings stays below 1e-6",
    ),
    "tensor_core": Tolerance(
        2e-5,
        1e-30,
        "knn_search on CUDA from float16 and bfloat16; scale as above, times D / 1024 where D is "
        "more than that. The units cut every product of a block, and the sum, at 24 bits (blocks "
        "of 8 on sm_8x) or 25 (of 16 from sm_90 on) below the largest of them: D / 8 such blocks, "
        "cut all one way, are below 2e-5 of the scale at D = 1024, and grow with D",
    ),
    "direct": Tolerance(
        2e-6,
        1e-30,
        "rescore, refine; scale sum (q - x)^2 or sum |q x|: float32 sums of D positive terms over "
        "at least four lanes, no cancellation",
    ),
    "sqnorm": Tolerance(1e-6, 1e-30, "key_sqnorms; scale |x|^2: a sum of positive terms"),
    "gradient": Tolerance(
        1e-5, 1e-6, "float32 sums of m or Q terms in whatever order; scale is the gradient's max"
    ),
    "probability": Tolerance(
        1e-5,
        1e-7,
        "knn_softmax in float32; scale is the value: exp amplifies the rounding of its argument, "
        "which for |d / T| up to about 100 is 100 * 6e-8",
    ),
    "log_probability": Tolerance(
        1e-5, 2e-5, "log-space mixing in float32; scale is the value; same cause as probability"
    ),
    "float64": Tolerance(1e-10, 1e-12, "float64 against float64, order of summation aside"),
}


def tensor_core_tolerance(dim: int) -> float:
    """The relative tolerance of ``"tensor_core"`` for products over ``dim`` elements."""
    return TOLERANCES["tensor_core"].relative * max(1.0, dim / 1024)


def assert_close(got: Tensor, want: Tensor, kind: str, scale: Tensor | float | None = None) -> None:
    """Elementwise within ``TOLERANCES[kind]``; infinities and NaN must agree exactly.

    ``scale`` broadcasts against ``want``; where None, it is ``|want|``.
    """
    tolerance = TOLERANCES[kind]
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, wanted {tuple(want.shape)}"
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    scale = (
        want.abs() if scale is None else torch.as_tensor(scale, dtype=torch.float64, device="cpu")
    )
    allowed = tolerance.absolute + tolerance.relative * scale.expand_as(want)
    error = (got - want).abs()
    same = (got == want) | (got.isnan() & want.isnan())
    finite = got.isfinite() & want.isfinite()
    right = same | (finite & (error <= allowed))
    if not right.all():
        worst = torch.where(right, 0.0, (error / allowed).nan_to_num(nan=INF)).argmax()
        at = tuple(int(i) for i in torch.unravel_index(worst, want.shape))
        raise AssertionError(
            f"{int((~right).sum())} of {right.numel()} values are off by more than {kind} allows "
            f"({tolerance.reason}); worst at {at}: got {got[at].item():.9g}, wanted "
            f"{want[at].item():.9g}, allowed error {allowed[at].item():.3g}"
        )


def true_distances(queries: Tensor, keys: Tensor, metric: str = "l2") -> tuple[Tensor, Tensor]:
    """((Q, N) distances in float64, (Q, N) scales of their float32 error); NaN stays NaN."""
    q, x = queries.double().cpu(), keys.double().cpu()
    if metric == "l2":
        scale = q.square().sum(1)[:, None] + x.square().sum(1)
        return torch.cdist(q, x, compute_mode="donot_use_mm_for_euclid_dist").square(), scale
    return -(q @ x.T), q.abs() @ x.abs().T


def assert_search(
    got: tuple[Tensor, Tensor],
    queries: Tensor,
    keys: Tensor,
    k: int,
    metric: str = "l2",
    *,
    index_offset: int = 0,
    kind: str = "expanded",
) -> None:
    """Checks a search against all distances in float64, ties and near-ties allowed for.

    - every row is in order of (distance, index), without repeats, padding last;
    - every distance is right for its index;
    - no key was left out that is nearer than the farthest returned, tolerance aside.
    """
    distances, indices = got[0].cpu(), got[1].cpu()
    num_queries, num_keys = queries.shape[0], keys.shape[0]
    assert distances.dtype == torch.float32 and indices.dtype == torch.int64
    assert distances.shape == indices.shape == (num_queries, k)
    assert_order(distances, indices)
    want, scale = true_distances(queries, keys, metric)
    want = want.masked_fill(~(want < INF), INF)
    tolerance = TOLERANCES[kind]
    if kind == "direct" and metric == "l2":
        scale = want.nan_to_num(posinf=0.0)
    relative = tolerance.relative
    if kind == "tensor_core":
        relative = tensor_core_tolerance(queries.shape[1])
    slack = tolerance.absolute + relative * scale.nan_to_num(nan=0.0, posinf=0.0)
    found = indices >= 0
    for q in range(num_queries):
        rows = indices[q][found[q]] - index_offset
        assert rows.numel() == min(k, int((want[q] < INF).sum())), f"query {q}: too few or many"
        assert rows.unique().numel() == rows.numel(), f"query {q}: an index comes twice"
        error = (distances[q][found[q]].double() - want[q][rows]).abs()
        assert (error <= slack[q][rows]).all(), f"query {q}: a distance is off by {error.max():g}"
        if 0 < rows.numel() < num_keys:
            farthest = (want[q][rows] - slack[q][rows]).max()
            left_out = torch.ones(num_keys, dtype=torch.bool, device="cpu")
            left_out[rows] = False
            nearest = (want[q] + slack[q])[left_out].min()
            assert farthest <= nearest, f"query {q}: a nearer key was left out"


def assert_order(distances: Tensor, indices: Tensor) -> None:
    """Rows in order of (distance, index); padding is (+inf, -1) and comes last; no NaN."""
    padding = indices < 0
    assert (indices[padding] == -1).all(), "padding has an index other than -1"
    assert (distances[padding] == INF).all(), "padding has a distance other than +inf"
    assert not distances.isnan().any(), "a distance is NaN"
    assert not (padding[:, :-1] & ~padding[:, 1:]).any(), "padding comes before a neighbor"
    d0, d1, i0, i1 = distances[:, :-1], distances[:, 1:], indices[:, :-1], indices[:, 1:]
    assert ((d0 < d1) | ((d0 == d1) & (i0 <= i1)) | padding[:, 1:]).all(), "not in order"


def assert_equal_results(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    """The same bits: both tensors, with the order."""
    assert torch.equal(got[1].cpu(), want[1].cpu()), "indices differ"
    assert torch.equal(got[0].cpu(), want[0].cpu().to(got[0].dtype)), "distances differ"


def assert_topk_close(
    got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], slack: Tensor | float
) -> None:
    """Two results of one search, by kernels that round differently.

    Distances agree within ``slack`` rank by rank. An index may differ only where its distance lies
    within twice the slack of another rank that could take its place, or of the k-th.
    """
    assert_order(*got)
    d0, d1 = got[0].double().cpu(), want[0].double().cpu()
    i0, i1 = got[1].cpu(), want[1].cpu()
    padding = i1 < 0
    assert torch.equal(i0 < 0, padding), "a different number of neighbors"
    allowed = torch.as_tensor(slack, dtype=torch.float64, device="cpu").expand_as(d1)
    error = (d0 - d1).masked_fill(padding, 0.0).abs()
    assert (error <= allowed).all(), f"distances differ by {error.max():g}"
    for row in (i0 != i1).any(1).nonzero().flatten().tolist():
        n = int((~padding[row]).sum())
        by_index = dict(zip(i1[row, :n].tolist(), d1[row, :n].tolist(), strict=True))
        edge = float(d1[row, n - 1])
        for rank, index in enumerate(i0[row, :n].tolist()):
            room = 2 * float(allowed[row, rank])
            truth = by_index.get(index, edge)
            assert abs(float(d0[row, rank]) - truth) <= room, f"row {row}: index {index} is wrong"


def reference_search(
    queries: Tensor, keys: Tensor, k: int, metric: str = "l2", **kwargs: object
) -> tuple[Tensor, Tensor]:
    """The oracle in float64."""
    return reference.knn_search(
        queries,
        keys,
        k,
        metric,
        compute_dtype=torch.float64,
        **kwargs,  # type: ignore[arg-type]
    )
