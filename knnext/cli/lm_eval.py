"""``python -m knnext.cli.lm_eval``: the command lm_eval, which then knows the model "knnext".

Releases of lm-evaluation-harness after 0.4.13 find the model by themselves, by the entry point that
knnext has; up to then none looks beyond its own models.
"""

from __future__ import annotations

import knnext.cli.harness  # noqa: F401


def main() -> None:
    """Takes the words of lm_eval's command line, and gives them to it."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
