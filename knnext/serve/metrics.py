"""What a server has done so far, in the text format that Prometheus reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from knnext.serve.engine import Engine


def metrics(engine: Engine | None, counts: Mapping[tuple[str, int], int]) -> str:
    """Counters end in ``_total`` and begin at 0 with the program; the others are of this moment.

    ``counts`` are the answers given, by path and status.
    """
    lines = _head("http_answers_total", "counter", "Answers begun, by path and status.")
    for (path, status), count in sorted(counts.items()):
        lines.append(f'knnext_http_answers_total{{path="{path}",status="{status}"}} {count}')
    if engine is not None:
        for name, value, about in (
            ("steps_total", engine.steps, "Passes of the model with one search for all in them."),
            ("searches_total", engine.mixer.searches, "Searches of the datastore."),
            ("prompt_tokens_total", engine.tokens_read, "Tokens of prompts that were read."),
            ("new_tokens_total", engine.tokens_written, "Tokens that were written."),
            ("texts_total", engine.texts_ended, "Texts that came to their end."),
            ("texts_waiting", engine.num_waiting, "Texts that wait."),
            ("texts_live", engine.num_live, "Texts that are being written."),
        ):
            lines += _head(name, "counter" if name.endswith("_total") else "gauge", about)
            lines.append(f"knnext_{name} {value}")
    return "\n".join(lines) + "\n"


def _head(name: str, kind: str, about: str) -> list[str]:
    return [f"# HELP knnext_{name} {about}", f"# TYPE knnext_{name} {kind}"]
