"""What a datastore will need before it is built: disk, memory, time; and what would not fit.

Sizes come from the rooms that write them (``datastore.room``, ``index.codes_meta``,
``index.faiss_size``), so that a plan, a build and an index agree on every byte. Times are sizes
over rates, which were measured here or are a datasheet's.
"""

from knnext.planning.job import Job
from knnext.planning.plan import Plan, make_plan

__all__ = ["Job", "Plan", "make_plan"]
