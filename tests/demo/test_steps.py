"""The demo says how many steps it has."""

from __future__ import annotations

import inspect
import re

from knnext import demo


def test_the_steps_that_are_said_are_those_that_there_are() -> None:
    """Each runs once, but for the search (of valid and of test), and of two for the model one."""
    said = [line for line in inspect.getsource(demo).splitlines() if "with self.step(" in line]
    said = [line for line in said if "quiet=True" not in line]
    searches = [line for line in said if re.search(r"search the \{name\}", line)]
    model = [line for line in said if "language model" in line]
    assert len(searches) == 1 and len(model) == 2
    assert len(said) + len(searches) - (len(model) - 1) == demo.NUM_STEPS
