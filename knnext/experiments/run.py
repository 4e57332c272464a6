"""Runs experiments in a folder: what is finished there is passed over, what was cut is taken up."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from knnext.experiments.catalog import NAMES, load
from knnext.experiments.lab import Lab
from knnext.experiments.lab.presets import Preset
from knnext.experiments.lab.results import Findings, load_result, make_result, plain, save_result
from knnext.output import check_outputs
from knnext.progress import format_duration
from knnext.report.plots import save_figure

Say = Callable[[str], None]
_log = logging.getLogger(__name__)


def run_experiment(
    name: str,
    preset: Preset,
    folder: str | Path,
    *,
    fresh: bool = False,
    lab: Lab | None = None,
    say: Say = _log.info,
) -> dict[str, Any]:
    """The result of one experiment, run where the folder does not hold it yet.

    `NAME.json` and `NAME.png` are written to the folder. A result of another preset there is
    refused, never overwritten, unless `fresh`.

    Args:
        name: see `knnext.experiments.NAMES`.
        preset: sizes, corpus and model.
        folder: for results; the shared artifacts lie in `cache` below it.
        fresh: run again; artifacts of the cache are reused all the same.
        lab: of the same preset and folder, to share what it holds in memory.
        say: takes lines for people; by default they go to the log.

    Raises:
        ValueError: an unknown name, or a folder that holds this experiment of another preset.
    """
    module, folder = load(name), Path(folder)
    path = folder / f"{name}.json"
    if path.exists() and not fresh:
        result = load_result(path)
        _check_same(result, preset, path)
        say(f"{name}: {path} holds it; --fresh runs it again")
        return result
    folder.mkdir(parents=True, exist_ok=True)
    check_outputs(path, folder / f"{name}.png")
    lab = lab or Lab(preset, folder, say)
    lab.seconds.clear()
    say(f"{name}: {module.DESCRIPTION.question}")
    start = time.perf_counter()
    findings: Findings = module.run(lab)
    spent = time.perf_counter() - start
    shared = sum(lab.seconds.values())
    seconds = {"all": spent, "shared steps": shared, **lab.seconds}
    result = plain(make_result(module.DESCRIPTION, findings, preset.to_dict(), seconds))
    draw(name, result, folder)
    save_result(path, result)
    say(f"  {result['agreement']}: {result['words']}")
    say(f"  {format_duration(spent)}; {path}")
    return result


def run_all(
    preset: Preset,
    folder: str | Path,
    *,
    names: Sequence[str] = NAMES,
    fresh: bool = False,
    say: Say = _log.info,
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """(results, failures) by name; an experiment that fails does not stop the others."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    check_outputs(*(folder / name for name in ("report.html", "report.md")))
    lab = Lab(preset, folder, say)
    results, failures = {}, {}
    for name in names:
        try:
            results[name] = run_experiment(name, preset, folder, fresh=fresh, lab=lab, say=say)
        except Exception as error:  # said at the end, with its name
            failures[name] = f"{type(error).__name__}: {error}"
            say(f"{name}: FAILED: {failures[name]}")
    return results, failures


def draw(name: str, result: dict[str, Any], folder: Path) -> Path:
    """`NAME.png` of a result, drawn from its JSON alone."""
    from knnext.experiments.lab.figures import new_figure

    figure, axes = new_figure()
    load(name).plot(result, axes)
    path = folder / f"{name}.png"
    save_figure(figure, path)
    return path


def _check_same(result: dict[str, Any], preset: Preset, path: Path) -> None:
    wanted, found = plain(preset.to_dict()), result["preset"]
    differing = [n for n in wanted if wanted[n] != found.get(n)]
    if differing:
        words = ", ".join(f"{n} {found.get(n)!r}, not {wanted[n]!r}" for n in differing)
        raise ValueError(
            f"{path} is of other settings ({words}); run with --fresh, or give another --out"
        )
