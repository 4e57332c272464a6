"""Rates of machines that nobody here has measured: datasheets, and how much of them is assumed.

A rate is a datasheet's number times a share of it. The shares are assumptions, chosen below what
good programs reach; a plan marks whatever comes from here as "stated, not measured".
"""

from __future__ import annotations

from knnext.planning.rates import DTYPES, NAMES, Machine, Rate, Rates

#: Of a datasheet's number, what work of this kind is assumed to reach.
SHARES = {
    "forward": 0.4,
    "search_flops": 0.6,
    "search_bytes": 0.85,
    "codes_flops": 0.5,
    "codes_bytes": 0.85,
    "encode": 0.5,
    "memory_read": 0.85,
    "host_to_device": 0.85,
    "checksum": 1.0,
    "disk_write": 0.8,
    "disk_read": 0.8,
    "network": 0.8,
    "link": 0.8,
    "latency": 1.0,
    "faiss_train": 0.4,
    "faiss_add": 0.4,
    "faiss_scan": 0.5,
}

_H200 = "NVIDIA H200 SXM datasheet"
_A100 = "NVIDIA A100 80GB SXM datasheet"
_EPYC = "AMD EPYC 9554 datasheet (64 cores, 3.1 GHz, 12 x DDR5-4800)"
_DISK = "Samsung PM9A3 U.2 announcement: one NVMe drive"
_HDR = "DGX datasheet: a ConnectX port a GPU"
_WIRE = "assumed: a message of a collective in one building"

# Numbers of one EPYC 9554: 32 float32 operations a core and cycle by two 256-bit FMA units.
_CYCLES = 64 * 3.1e9
_CPU_FLOPS = 32 * _CYCLES
_CPU_MEMORY = 12 * 4.8e9 * 8

_CPU_PEAKS = {
    "forward": (_CPU_FLOPS, _EPYC),
    "search_flops": (_CPU_FLOPS, _EPYC),
    "search_bytes": (_CPU_MEMORY, _EPYC),
    # Four times the multiply-adds by VNNI; half of that is assumed above.
    "codes_flops": (4 * _CPU_FLOPS, _EPYC),
    "codes_bytes": (_CPU_MEMORY, _EPYC),
    "encode": (_CPU_MEMORY / 4, f"{_EPYC}: float32 numbers that memory gives"),
    "memory_read": (_CPU_MEMORY, _EPYC),
    "checksum": (1.5e9, "assumed: zlib's CRC-32 on a core"),
    "disk_write": (3.5e9, _DISK),
    "disk_read": (6.5e9, _DISK),
    "network": (25e9, "a 200 Gb/s port a node"),
    "link": (_CPU_MEMORY / 2, f"{_EPYC}: through memory"),
    "latency": (20e-6, _WIRE),
    "faiss_train": (_CPU_FLOPS, _EPYC),
    "faiss_add": (_CPU_FLOPS, _EPYC),
    "faiss_scan": (_CYCLES, f"{_EPYC}: a byte of code a core and cycle"),
}
_OF_H200 = {
    "forward": (989e12, f"{_H200}: bfloat16, dense"),
    "search_flops": (989e12, f"{_H200}: bfloat16, dense"),
    "search_flops.float32": (67e12, f"{_H200}: float32"),
    "search_bytes": (4.8e12, _H200),
    "codes_flops": (1979e12, f"{_H200}: int8, dense"),
    "codes_bytes": (4.8e12, _H200),
    "host_to_device": (64e9, f"{_H200}: PCIe 5.0 x16, one way"),
    "network": (50e9, f"{_HDR}, 400 Gb/s"),
    "link": (450e9, f"{_H200}: NVLink, one way"),
}
_OF_A100 = {
    "forward": (312e12, f"{_A100}: bfloat16, dense"),
    "search_flops": (312e12, f"{_A100}: bfloat16, dense"),
    "search_flops.float32": (19.5e12, f"{_A100}: float32"),
    "search_bytes": (2.039e12, _A100),
    "codes_flops": (624e12, f"{_A100}: int8, dense"),
    "codes_bytes": (2.039e12, _A100),
    "host_to_device": (32e9, f"{_A100}: PCIe 4.0 x16, one way"),
    "network": (25e9, f"{_HDR}, 200 Gb/s"),
    "link": (300e9, f"{_A100}: NVLink, one way"),
}


def _rates(machine: Machine, peaks: dict[str, tuple[float, str]]) -> Rates:
    found = {}
    for name in NAMES:
        kind = name.partition(".")[0]
        if name not in peaks and kind not in peaks:
            continue  # no such part, as of copies to a GPU
        peak, source = peaks.get(name, peaks.get(kind, (0.0, "")))
        value = peak * SHARES[kind]
        share = f", {SHARES[kind]:.0%} of it assumed" if SHARES[kind] < 1 else ""
        found[name] = Rate(value, f"stated, not measured: {source}{share}", measured=False)
    return Rates(machine, found)


#: By the name that `--rates` takes. Machines with GPUs have eight of them, 2 TB and two EPYCs.
STATED: dict[str, Rates] = {
    "h200": _rates(
        Machine("H200 node, as stated", 128, 2 * 10**12, "NVIDIA H200", 8, 141 * 10**9),
        _CPU_PEAKS | _OF_H200,
    ),
    "a100": _rates(
        Machine("A100 node, as stated", 128, 2 * 10**12, "NVIDIA A100 80GB", 8, 80 * 10**9),
        _CPU_PEAKS | _OF_A100,
    ),
    "cpu": _rates(Machine("64-core node, as stated", 64, 768 * 10**9), _CPU_PEAKS),
}

assert all(f"search_flops.{dtype}" in STATED["cpu"].rates for dtype in DTYPES)
