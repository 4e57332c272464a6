from typing import Any

class ThresholdSample:
    sample: int
    rank: int
    capacity: int
    expected: float

class SearchPlan:
    kernel: str
    because: str
    query_tile: int
    key_tile: int
    dim_tile: int
    queries_per_pass: int
    num_passes: int
    threshold: ThresholdSample
    workspace_bytes: int
    bytes_read: int
    flop: float
    def __init__(
        self,
        *,
        queries: int,
        entries: int,
        dim: int,
        k: int,
        element_bytes: int = 2,
        capability: tuple[int, int] = (0, 0),
        num_units: int = 1,
        sm90: str | None = None,
        aligned: bool = True,
    ) -> None: ...

def build_info() -> dict[str, Any]: ...
def cpu_isa() -> str: ...
def best_cpu_isa() -> str: ...
def usable_cpu_isas() -> list[str]: ...
def caller() -> int: ...
def raise_out_of_memory(message: str) -> None: ...
def plan_threshold(num_keys: int, k: int) -> ThresholdSample: ...
def scan_crossovers() -> list[dict[str, Any]]: ...
def plan_cuda(
    *,
    queries: int,
    entries: int,
    dim: int,
    k: int,
    element_bytes: int = 2,
    capability: tuple[int, int] = (9, 0),
    num_units: int = 132,
    merge_columns: int = 0,
    key_norms: bool = True,
    sm90: str | None = None,
    aligned: bool = True,
) -> dict[str, Any]: ...
