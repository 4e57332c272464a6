# %% [markdown]
# # A store larger than memory
#
# Keys stay on disk. Exact search goes through them in pieces of `chunk_bytes`, holds no more than
# that, and gives the bits that a search of all of them in memory gives.
#
# ```
# python docs/tutorials/larger_than_memory.py WORK
# ```

# %%
import sys
from pathlib import Path

import torch

from knnext import Datastore, ExactIndex
from knnext.index import StoredCodes

work = Path(sys.argv[1] if len(sys.argv) > 1 else "tutorial")
work.mkdir(parents=True, exist_ok=True)
rows, dim = 20_000, 64

# %% [markdown]
# ## Written in pieces
#
# `append` takes as many rows as there are; `commit` makes them survive a kill. A build that was
# cut off goes on from its last commit with `resume=True`.

# %%
generator = torch.Generator().manual_seed(0)
path = work / "large.store"
if not path.exists():
    with Datastore.create(path, dim, torch.float16) as made:
        for _ in range(4):
            keys = torch.randn(rows // 4, dim, generator=generator)
            made.append(keys, torch.randint(0, 1000, (rows // 4,), generator=generator))
            made.commit()
store = Datastore.open(path)
print(store.describe())

# %% [markdown]
# ## Searched in pieces
#
# Here a piece is a sixteenth of the keys, and nothing is kept between searches
# (`resident_bytes=0`). One pass over the disk serves all queries of a batch: many queries at once
# are what makes a large store affordable.

# %%
queries = torch.randn(32, dim, generator=generator).half()
in_pieces = ExactIndex(store, chunk_bytes=rows * dim * 2 // 16, resident_bytes=0)
distances, indices = in_pieces.search(queries, 8)
print(in_pieces.describe())

# %% [markdown]
# ## The same bits

# %%
whole = ExactIndex.from_tensors(store.keys[:])
same_distances, same_indices = whole.search(queries, 8)
print(f"distances: {torch.equal(distances, same_distances)}")
print(f"indices:   {torch.equal(indices, same_indices)}")

# %% [markdown]
# ## Half of the bytes
#
# Eight-bit codes beside the keys answer the same question with a certified bound: the search
# reads the codes, and of the keys only the rows that may be among the nearest. `knnext index
# STORE --kind codes` makes them, and every exact search finds them by itself.

# %%
StoredCodes.renew(store)
by_codes = ExactIndex(store)
print(by_codes.describe())
print(f"indices:   {torch.equal(by_codes.search(queries, 8)[1], same_indices)}")

# %% [markdown]
# What a job will need is said before it starts: `knnext plan --tokens 1e9 --model M`
# ([scale](../scale.md)).
