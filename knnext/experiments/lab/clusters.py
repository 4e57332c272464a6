"""Few rows in place of a datastore's many: k-means of its keys, over all of them or by word.

FAISS's k-means samples 256 points a centroid. What is said of a clustering here (its assignment,
its mean squared distance) is always computed on points that are then counted, never on a sample
and divided by the whole.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from knnext.datastore.rows import LazyRows
from knnext.index import faiss_library

#: (n, D) keys in memory, or those of a datastore, which are read chunk by chunk.
Keys: TypeAlias = Tensor | LazyRows

POINTS_PER_CENTROID = 256  # FAISS's own cap
_CHUNK_ROWS = 1 << 16


def kmeans(
    keys: Tensor, count: int, *, seed: int, iterations: int = 20, spherical: bool = False
) -> Tensor:
    """(count, D) float32 centroids of (n, D) keys.

    Args:
        seed: of the first centroids, and of FAISS's sample where there are more than 256 keys a
            centroid.
        spherical: centroids are kept at length 1, nearest by inner product; give keys of length 1.
    """
    if not 1 <= count <= len(keys):
        raise ValueError(f"count must be from 1 to the {len(keys)} keys, got {count}")
    options = {
        "niter": iterations,
        "seed": seed + 1,  # the published run had seed 1
        "spherical": spherical,
        "min_points_per_centroid": 1,
        "max_points_per_centroid": POINTS_PER_CENTROID,
        "gpu": faiss_library.num_gpus() > 0,
    }
    clustering = faiss_library.load().Kmeans(keys.shape[1], count, **options)
    clustering.train(faiss_library.as_float32(keys))
    return torch.from_numpy(clustering.centroids.copy())


def assign(keys: Keys, centroids: Tensor, *, normalized: bool = False) -> tuple[Tensor, Tensor]:
    """(n,) int64 nearest centroid of each key by exact l2, and (n,) float32 squared distances.

    `normalized`: keys are brought to length 1 first.
    """
    index = faiss_library.load().IndexFlatL2(centroids.shape[1])
    index.add(faiss_library.as_float32(centroids))
    parts = []
    for begin in range(0, len(keys), _CHUNK_ROWS):
        chunk = keys[begin : begin + _CHUNK_ROWS]
        chunk = unit(chunk) if normalized else chunk
        parts.append(index.search(faiss_library.as_float32(chunk), 1))
    distances = torch.cat([torch.from_numpy(d[:, 0]) for d, _ in parts])
    return torch.cat([torch.from_numpy(i[:, 0]) for _, i in parts]), distances.clamp_min(0)


def word_means(keys: Keys, words: Tensor) -> tuple[Tensor, Tensor]:
    """((W, D), (W,)): the mean key of each word that occurs, and the words, ascending."""
    found, group = words.unique(return_inverse=True)
    return _means(keys, group, len(found)), found


def random_keys(keys: Keys, words: Tensor, count: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """((R, D), (R,)): `count` random keys of each word, all where it has fewer, and their words."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(words), generator=generator, device="cpu")
    order = order[words[order].sort(stable=True).indices]
    sizes = words.bincount()
    place = torch.arange(len(words), device="cpu") - (sizes.cumsum(0) - sizes)[words[order]]
    chosen = order[place < count]
    return keys[chosen].float(), words[chosen]


def word_kmeans(
    keys: Keys, words: Tensor, count: int, *, seed: int, iterations: int = 10
) -> tuple[Tensor, Tensor]:
    """((R, D), (R,)): `count` means of each word by Lloyd's iterations over all words at once.

    A word with fewer keys has a centroid for each, and a centroid that loses all its keys goes.
    """
    centroids, owners = random_keys(keys, words, count, seed=seed)
    for _ in range(iterations):
        nearest, _ = _nearest_of_word(keys, words, centroids, owners)
        used, nearest = nearest.unique(return_inverse=True)
        centroids, owners = _means(keys, nearest, len(used)), owners[used]
    return centroids, owners


def adaptive_word_kmeans(
    keys: Keys,
    words: Tensor,
    total: int,
    *,
    seed: int,
    iterations: int = 8,
    tick: Callable[[], None] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """((R, D), (R,)): one mean a word at first; then the word whose keys lie farthest from their
    centroids, in mean square, gets one more, until there are `total`.

    (In the published code this mean was the sum over FAISS's sample divided by the number of all
    keys, so frequent words, up to 2,000 times too low, never got a third.)

    Args:
        tick: called for each centroid that is added.
    """
    found, sizes = words.unique(return_counts=True)
    members = words.argsort(stable=True).split(sizes.tolist())
    clusterings = [mean_square(keys[rows], 1, seed, iterations) for rows in members]
    queue = [(-square, number) for number, (square, _) in enumerate(clusterings) if square > 0]
    heapq.heapify(queue)
    for _ in range(total - len(found)):
        if not queue:  # every key is a centroid
            break
        _, number = heapq.heappop(queue)
        count = len(clusterings[number][1]) + 1
        square, centroids = mean_square(keys[members[number]], count, seed, iterations)
        clusterings[number] = (square, centroids)
        if square > 0 and count < len(members[number]):
            heapq.heappush(queue, (-square, number))
        tick()
    owners = torch.tensor([len(c) for _, c in clusterings], dtype=torch.int64, device="cpu")
    return torch.cat([c for _, c in clusterings]), found.repeat_interleave(owners)


def mean_square(keys: Tensor, count: int, seed: int, iterations: int) -> tuple[float, Tensor]:
    """(mean squared distance to the nearest centroid, centroids) of k-means with `count` centroids.

    At most 256 keys a centroid are used, for both: the sum is divided by the keys that it is of.
    """
    limit = POINTS_PER_CENTROID * count
    if len(keys) > limit:
        generator = torch.Generator().manual_seed(seed)
        keys = keys[torch.randperm(len(keys), generator=generator, device="cpu")[:limit]]
    keys = keys.float()
    if count == 1:
        centroids = keys.mean(0, keepdim=True)
    else:
        centroids = kmeans(keys, count, seed=seed, iterations=iterations)
    squares = torch.cdist(keys, centroids).amin(1).square()
    return float(squares.double().sum()) / len(keys), centroids


def _nearest_of_word(
    keys: Keys, words: Tensor, centroids: Tensor, owners: Tensor
) -> tuple[Tensor, Tensor]:
    """(n,) nearest centroid among those of each key's own word, and squared distances.

    `owners` ascends, as `random_keys` leaves it.
    """
    sizes = owners.bincount(minlength=int(words.max()) + 1)
    first = sizes.cumsum(0) - sizes
    best = torch.full((len(words),), torch.inf, dtype=torch.float32, device="cpu")
    nearest = torch.zeros(len(words), dtype=torch.int64, device="cpu")
    for begin in range(0, len(words), _CHUNK_ROWS):
        part = slice(begin, begin + _CHUNK_ROWS)
        chunk, own = keys[part].float(), words[part]
        for place in range(int(sizes.max())):
            row = first[own] + place
            there = place < sizes[own]
            square = (chunk - centroids[row.clamp_max(len(centroids) - 1)]).square().sum(1)
            closer = there & (square < best[part])
            best[part] = torch.where(closer, square, best[part])
            nearest[part] = torch.where(closer, row, nearest[part])
    return nearest, best


def _means(keys: Keys, group: Tensor, count: int) -> Tensor:
    sums = torch.zeros(count, keys.shape[1], dtype=torch.float64, device="cpu")
    for begin in range(0, len(group), _CHUNK_ROWS):
        part = slice(begin, begin + _CHUNK_ROWS)
        sums.index_add_(0, group[part], keys[part].double())
    return (sums / group.bincount(minlength=count)[:, None]).float()


def unit(keys: Tensor) -> Tensor:
    """(n, D) float32 keys at length 1."""
    return torch.nn.functional.normalize(keys.float(), dim=1)
