"""How large a FAISS index will be, from its factory string alone: before anything is trained.

The bytes are those that FAISS writes for an index, but for some hundred of headers. A factory
string is read part by part as FAISS reads it: transforms (``OPQ16_64``, ``PCA64``), lists
(``IVF4096``, ``IVF65536_HNSW32``), a graph (``HNSW32``), codes (``Flat``, ``PQ64``, ``SQ8``),
refining (``RFlat``). What is not among these has no size here, and None says so.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

ID_BYTES = 8  # of a row in inverted lists
_FLOAT = 4
_KNOWN = "Flat, PQ64, SQ8, IVF4096,PQ64, HNSW32 and OPQ or PCA before them"


@dataclass(frozen=True)
class FaissSize:
    """Of an index by its rows.

    Attributes:
        row_bytes: of one row: its code, its id, its links.
        fixed_bytes: of what was trained: centroids, codebooks, matrices.
        lists: inverted lists; 0 where there are none.
        code_bytes: of one row's code, which a search reads.
        dim: width of the vectors behind the transforms.
        graph: whether rows are linked (HNSW), whose building no formula here gives.
        product: whether a vector is multiplied by a matrix before it is coded.
        rotation: whether that matrix is learned in rounds with the codes (OPQ).
    """

    row_bytes: float
    fixed_bytes: int
    lists: int
    code_bytes: int
    dim: int
    graph: bool = False
    product: bool = False
    rotation: bool = False

    def index_bytes(self, rows: int) -> int:
        """Of the finished index, in a file or in memory."""
        return self.fixed_bytes + round(rows * self.row_bytes)

    def build_bytes(self, rows: int, segments: int = 1) -> int:
        """Of the disk at the end of a build: the index, and the segments it was joined from."""
        return 2 * self.index_bytes(rows) + segments * self.fixed_bytes


def faiss_size(factory: str, dim: int) -> FaissSize | None:
    """None for parts that are not known here."""
    size = FaissSize(0.0, 0, 0, 0, dim)
    coded = False
    spelled = re.sub(r"(^|,)HNSW(\d*)(?:[,_]|$)", _spell_graph, factory)
    for part in spelled.rstrip(",").split(","):
        for pattern, read in _PARTS:
            match = re.fullmatch(pattern, part.strip())
            if match is None:
                continue
            found = read(size, match)
            if found is None:
                return None
            size, coded = found, coded or read not in (_transform, _inverted, _graph)
            break
        else:
            return None
    # FAISS's own default behind a graph; lists want codes named.
    return size if coded else _flat(size, None) if size.graph else None


def _spell_graph(match: re.Match[str]) -> str:
    """FAISS also writes ``HNSW32_SQ8``, and ``HNSW`` alone for 32 links."""
    return f"{match[1]}HNSW{match[2] or 32},"


def check_factory(factory: str, dim: int) -> FaissSize:
    """ValueError where the size is not known."""
    found = faiss_size(factory, dim)
    if found is None:
        raise ValueError(
            f"the size of an index of factory {factory!r} (dim {dim:,}) is not known before it is "
            f"built; known are {_KNOWN}"
        )
    return found


Match = re.Match[str]


def _transform(size: FaissSize, match: Match) -> FaissSize | None:
    kind, first, second = match["kind"], match["first"], match["second"]
    if size.lists or size.graph or (kind != "L2norm" and not first):
        return None
    if kind == "L2norm":
        return size
    # OPQ's first number is of subspaces, its second the width; of the others the width is first.
    wide = second if kind == "OPQ" else first
    after = int(wide) if wide else size.dim
    if kind == "Pad":
        return replace(size, dim=max(after, size.dim))
    matrix = _FLOAT * (size.dim * after + after)
    if kind.startswith("PCA"):  # with all directions, of which it uses the first
        matrix += _FLOAT * (size.dim * size.dim + 2 * size.dim)
    return replace(
        size,
        dim=after,
        fixed_bytes=size.fixed_bytes + matrix,
        product=True,
        rotation=size.rotation or kind == "OPQ",
    )


def _inverted(size: FaissSize, match: Match) -> FaissSize:
    lists = int(match["lists"])
    links = _link_bytes(int(match["links"] or 32)) if match["graph"] else 0.0
    fixed = size.fixed_bytes + round(lists * (_FLOAT * size.dim + links + 8))
    return replace(size, lists=lists, fixed_bytes=fixed, row_bytes=size.row_bytes + ID_BYTES)


def _graph(size: FaissSize, match: Match) -> FaissSize | None:
    if size.lists:
        return None
    links = _link_bytes(int(match["links"]))
    return replace(size, graph=True, row_bytes=size.row_bytes + links)


def _link_bytes(links: int) -> float:
    """Twice as many at the lowest level; of ``links`` rows one has a level more, and so on."""
    above = links / (links - 1) if links > 1 else float(links)
    return 4 * (2 * links + above) + 4 + 8  # a row's level, and where its links begin


def _flat(size: FaissSize, _: Match | None) -> FaissSize:
    return _coded(size, _FLOAT * size.dim, 0)


def _product(size: FaissSize, match: Match) -> FaissSize | None:
    count, bits = int(match["count"]), int(match["bits"] or 8)
    if not count or size.dim % count or not 1 <= bits <= 24:
        return None
    code, fixed = -(-count * bits // 8), _FLOAT * size.dim << bits
    if match["fast"]:  # codes of 32 rows are kept together, in each list
        fixed += 16 * code * max(1, size.lists)
    return _coded(size, code, fixed)


def _scalar(size: FaissSize, match: Match) -> FaissSize:
    kind = match["kind"]
    if kind in ("fp16", "bf16"):
        return _coded(size, 2 * size.dim, 0)
    bits = int(kind.partition("_")[0])
    return _coded(size, -(-bits * size.dim // 8), 2 * _FLOAT * size.dim)


def _refine(size: FaissSize, _: Match) -> FaissSize:
    return replace(size, row_bytes=size.row_bytes + _FLOAT * size.dim)


def _coded(size: FaissSize, code_bytes: int, fixed: int) -> FaissSize:
    return replace(
        size,
        row_bytes=size.row_bytes + code_bytes,
        code_bytes=code_bytes,
        fixed_bytes=size.fixed_bytes + fixed,
    )


_PARTS: tuple[tuple[str, Callable[[FaissSize, Match], FaissSize | None]], ...] = (
    (r"(?P<kind>OPQ|PCAW?R?|RR|Pad|L2norm)(?P<first>\d*)_?(?P<second>\d*)", _transform),
    (r"IVF(?P<lists>\d+)(?P<graph>_HNSW(?P<links>\d*))?", _inverted),
    (r"HNSW(?P<links>\d+)", _graph),
    (r"Flat", _flat),
    (r"PQ(?P<count>\d+)(x(?P<bits>\d+))?(?P<fast>fsr?)?(np)?", _product),
    (r"SQ(?P<kind>4|6|8|8_direct|fp16|bf16)", _scalar),
    (r"RFlat|Refine\(Flat\)", _refine),
)  # fmt: skip
