"""What was built, what was loaded and why, and which kernel a given search would run."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import time
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import knnext
from knnext.cli.plan import measure_rates
from knnext.errors import install
from knnext.ops import REPORT
from knnext.ops._cards import can_run, cuda_driver_version, visible_cards
from knnext.ops._library import COMPOSED, built_for, cuda_symbols
from knnext.ops._schemas import NAMES
from knnext.say import Say, binary_size

DTYPES = {"float16": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Search:
    """The search to plan for: (queries, dim) against (entries, dim) for k neighbors."""

    queries: int = 1024
    entries: int = 1_000_000
    dim: int = 1024
    k: int = 1024
    dtype: str = "float16"


#: Options that have not the name of their field.
_OPTIONS = {"dtype": "key_dtype"}


def run(args: argparse.Namespace, say: Say) -> dict[str, Any]:
    """The command. ``exit_code`` is not 0 where a check failed."""
    if args.model is not None and not args.rates:
        raise ValueError("--model is for --rates: there its forward pass is timed")
    given = {f.name: getattr(args, _OPTIONS.get(f.name, f.name)) for f in fields(Search)}
    chosen = {name: value for name, value in given.items() if value is not None}
    facts = doctor(Search(**{**asdict(Search()), **chosen}) if chosen else None)
    say(render(facts))
    if args.check:
        say("")
        facts["checks"] = check(say)
        facts["exit_code"] = int(not all(entry["ok"] for entry in facts["checks"]))
    if args.rates:
        say("")
        facts["rates"] = measure_rates(args, say)
    return facts


def check(say: Say) -> list[dict[str, Any]]:
    """Every op against the reference on the CPU and on each GPU; see knnext/cli/check.py."""
    from knnext.cli.check import run_checks

    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    start = time.perf_counter()
    results = run_checks([torch.device("cpu"), *gpus], say)
    failed = sum(not entry["ok"] for entry in results)
    where = f"on the CPU and {len(gpus)} GPU{'' if len(gpus) == 1 else 's'}"
    took = time.perf_counter() - start
    say(f"{len(results) - failed} of {len(results)} checks passed {where} in {took:.0f} s")
    if failed:
        say("please report this, with what `knnext doctor --check --json` prints")
    return results


def doctor(search: Search | None = None) -> dict[str, Any]:
    """Facts about this installation, as a dictionary of plain values (JSON without loss)."""
    facts = {
        "knnext": _build(),
        "torch": _torch(),
        "gpus": [_gpu(i) for i in range(torch.cuda.device_count())],
        "cpu": _cpu(),
        "faiss": _faiss(),
        "packages": {name: _version(name) for name in ("transformers", "tokenizers", "datasets")},
        "loaded": {"cpu": REPORT.cpu, "cuda": REPORT.cuda, "fallbacks": REPORT.fallbacks},
        "cuda_kernels": cuda_symbols(),
        "exact_search": _exact_search(),
        "cards": _cards(),
        "environment": _environment(),
    }
    if search is not None:
        facts["search"] = asdict(search)
        facts["plans"] = _plans(search)
    facts["advice"] = _advice(facts)
    return facts


def render(facts: dict[str, Any]) -> str:
    """The same facts for a terminal."""
    built, torch_, cpu = facts["knnext"], facts["torch"], facts["cpu"]
    loaded = facts["loaded"]
    on_cuda = facts["cuda_kernels"]
    cuda_build = (
        f"CUDA {built['cuda_version']} for {built['cuda_archs']}"
        if built.get("cuda_version")
        else "no CUDA library"
    )
    rows = [
        ("knnext", f"{built['version']}, built against torch {built.get('torch_version', '?')}"),
        ("built", f"{cuda_build}; vector paths {', '.join(built.get('vector_paths', []))}"),
        ("torch", f"{torch_['version']}, CUDA {torch_['cuda'] or 'none'}"),
        ("driver", torch_["driver"] or "no NVIDIA driver"),
        *(("gpu", _gpu_text(gpu)) for gpu in facts["gpus"]),
        *(("gpu", f"cannot run the CUDA kernels: {why}") for why in _unable(facts)),
        ("cpu", f"{cpu['processor']}, {cpu['threads']} threads, path {cpu['isa']}"),
        ("cpu ops", loaded["cpu"] or "compiled"),
        ("cuda ops", loaded["cuda"] or _cuda_ops(on_cuda)),
        ("exact search", facts["exact_search"]),
        ("stand-ins", ", ".join(loaded["fallbacks"]) or "none"),
        ("faiss", facts["faiss"]["text"]),
        *((name, text or "not installed") for name, text in facts["packages"].items()),
    ]
    lines = [f"{name:13} {text}" for name, text in rows]
    if "plans" in facts:
        s = facts["search"]
        lines += [
            "",
            f"search of {s['queries']:,} queries x {s['entries']:,} entries, dim {s['dim']:,}, "
            f"k {s['k']:,}, {s['dtype']}:",
        ]
        lines += [_render_plan(plan) for plan in facts["plans"]]
        codes = s["entries"] * (s["dim"] + 12)
        lines.append(f"  by codes, on the CPU: reads {binary_size(codes)}, and of keys likely rows")
    lines += ["", *(f"note: {text}" for text in facts["advice"])] if facts["advice"] else []
    return "\n".join(lines)


def _cuda_ops(compiled: list[str]) -> str:
    composed = (f"{name} by {of}" for name, (of, _) in COMPOSED.items())
    kernels = f"{len(compiled)} of {len(NAMES) - len(COMPOSED)} compiled and registered"
    return "; ".join([kernels, *composed])


def _exact_search() -> str:
    """Which way an `ExactIndex` goes on the CPU and on CUDA."""
    if "CPU knn_search_codes" in REPORT.fallbacks:
        return "over all keys: codes are of use to the compiled CPU ops alone"
    cpu = "on the CPU by eight-bit codes where a datastore has them (knnext index S --kind codes)"
    return f"{cpu}, else over all keys; on CUDA over all keys"


def _unable(facts: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(card["why_not"] for card in facts["cards"] if card["why_not"]))


def _cards() -> list[dict[str, Any]]:
    """What the driver tells of each card, and why the CUDA library cannot run there, or ""."""
    toolkit, archs = built_for()
    return [
        {
            "name": card.name,
            "capability": card.capability,
            "why_not": can_run(toolkit, archs, [card]) if toolkit else "",
        }
        for card in visible_cards()
    ]


def _environment() -> dict[str, str]:
    """What may change how the ops are built, found or run."""
    ours = ("KNNEXT_", "CUDA_", "NVIDIA_", "TORCH_CUDA", "PYTORCH_", "OMP_", "MKL_", "LD_")
    return {name: text for name, text in sorted(os.environ.items()) if name.startswith(ours)}


def _gpu_text(gpu: dict[str, Any]) -> str:
    return f"{gpu['name']}, sm_{gpu['capability']}, {gpu['memory_gib']} GiB"


def _build() -> dict[str, Any]:
    try:
        from knnext import _host
    except ImportError as error:
        return {"version": knnext.__version__, "error": f"knnext._host did not load: {error}"}
    info: dict[str, Any] = dict(_host.build_info())
    info["cuda_archs"] = info["cuda_archs"].replace(";", ", ")
    return info


def _torch() -> dict[str, Any]:
    driver = cuda_driver_version()
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "platform": platform.platform(),
        "driver": f"CUDA {driver // 1000}.{driver % 1000 // 10}" if driver else None,
        "python": platform.python_version(),
    }


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
    }


def _cpu() -> dict[str, Any]:
    try:
        from knnext import _host

        isa, best = _host.cpu_isa(), _host.best_cpu_isa()
    except (ImportError, RuntimeError) as error:
        isa, best = f"unknown ({error})", ""
    return {
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "isa": isa,
        "best_isa": best,
        "forced": os.environ.get("KNNEXT_CPU_ISA"),
    }


def _faiss() -> dict[str, Any]:
    if importlib.util.find_spec("faiss") is None:
        return {"version": None, "gpus": 0, "text": f"not installed ({install('faiss')})"}
    try:
        import faiss
    except (ImportError, RuntimeError) as error:  # its libraries do not load
        return {"version": None, "gpus": 0, "text": f"installed, but does not load: {error}"}

    gpus = faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0
    kind = "with GPU support" if hasattr(faiss, "StandardGpuResources") else "CPU build"
    text = f"{faiss.__version__}, {kind}, sees {gpus} GPU{'' if gpus == 1 else 's'}"
    return {"version": faiss.__version__, "gpus": gpus, "text": text}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _plans(search: Search) -> list[dict[str, Any]]:
    """The plan on the CPU, and on each GPU; where there is none, on an H200 for comparison."""
    try:
        from knnext._host import SearchPlan
    except ImportError:
        return []
    if search.dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {search.dtype!r}")
    problem: dict[str, Any] = {
        "queries": search.queries,
        "entries": search.entries,
        "dim": search.dim,
        "k": search.k,
        "element_bytes": DTYPES[search.dtype],
    }
    devices = [("cpu", (0, 0), torch.get_num_threads())]
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        devices.append((f"cuda:{i}", (p.major, p.minor), p.multi_processor_count))
    if len(devices) == 1:
        devices.append(("an H200, were there one", (9, 0), 132))
    plans = []
    for where, capability, units in devices:
        plan = SearchPlan(**problem, capability=capability, num_units=units)
        plans.append({"device": where, **_plan_facts(plan)})
    return plans


def _plan_facts(plan: Any) -> dict[str, Any]:
    threshold = plan.threshold
    return {
        "kernel": plan.kernel,
        "because": plan.because,
        "tiles": [plan.query_tile, plan.key_tile, plan.dim_tile],
        "passes": plan.num_passes,
        "queries_per_pass": plan.queries_per_pass,
        "sample": threshold.sample,
        "rank": threshold.rank,
        "capacity": threshold.capacity,
        "expected_candidates": threshold.expected,
        "workspace_bytes": plan.workspace_bytes,
        "bytes_read": plan.bytes_read,
        "flop": plan.flop,
    }


def _render_plan(plan: dict[str, Any]) -> str:
    tiles = " x ".join(f"{t:,}" for t in plan["tiles"])
    line = (
        f"  {plan['device']}: {plan['kernel']}, tiles {tiles}, "
        f"{plan['passes']} pass{'' if plan['passes'] == 1 else 'es'}, "
        f"workspace {binary_size(plan['workspace_bytes'])}, "
        f"reads {binary_size(plan['bytes_read'])}, {plan['flop'] / 1e12:,.3g} Tflop"
    )
    if plan["because"]:
        line += f"\n    choice: {plan['because']}"
    if plan["sample"]:
        line += (
            f"\n    threshold: the {plan['rank']:,}th of {plan['sample']:,} sampled keys, "
            f"about {plan['expected_candidates']:,.0f} candidates a query, "
            f"lists hold {plan['capacity']:,}"
        )
    return line


def _advice(facts: dict[str, Any]) -> list[str]:
    """What is likely not as its owner wishes, and what to do about it."""
    advice = []
    built = facts["knnext"]
    if facts["gpus"] and not built.get("cuda_version"):
        advice.append(
            "there is a GPU, but this build has no CUDA library: install nvcc, then "
            "KNNEXT_CUDA=1 pip install --no-build-isolation --force-reinstall ."
        )
    if facts["loaded"]["cpu"]:
        advice.append("the compiled CPU ops are missing; plain PyTorch runs in their place")
    elif any(f.startswith("CUDA") for f in facts["loaded"]["fallbacks"]) and facts["gpus"]:
        advice.append("some ops run on CUDA as plain PyTorch (see stand-ins)")
    if facts["gpus"] and facts["faiss"]["version"] and not facts["faiss"]["gpus"]:
        advice.append("FAISS sees no GPU: pip install faiss-gpu in place of faiss-cpu")
    return advice
