# %% [markdown]
# # Temperature and lmbda
#
# Two numbers decide how neighbors speak. `temperature` divides their distances before the
# softmax: a low one listens to the nearest alone, a high one to all k alike. `lmbda` is the
# neighbors' share of the mixture. Which are best depends on the model, as distances of one
# model's states are tens and those of another thousands: they are fitted on a validation split,
# from one stored search.
#
# ```
# python docs/tutorials/temperature.py WORK
# ```

# %%
import sys
from pathlib import Path

import numpy as np
import torch

from knnext import evaluate, tune
from knnext.evaluation import StreamScores
from knnext.report.plots import plot_surface

work = Path(sys.argv[1] if len(sys.argv) > 1 else "tutorial")
work.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## A search to fit on
#
# `search_stream` gives such scores of a text ([from a folder of your own](own_folder.md)); here
# they are made up, so that it is known what is true: of four tokens in ten some near neighbors
# hold the right token, the nearer the likelier, and the model gives every target a probability of
# about 1 in 50.

# %%
generator = torch.Generator().manual_seed(0)
count, k = 4000, 64
distances = (40 + 400 * torch.rand(count, k, generator=generator)).sort(dim=1).values
targets = torch.randint(0, 1000, (count,), generator=generator)
tokens = torch.randint(0, 1000, (count, k), generator=generator)
known = torch.rand(count, 1, generator=generator) < 0.4
near = torch.rand(count, k, generator=generator) < torch.exp(-(distances - 40) / 60)
tokens = torch.where(known & near, targets[:, None], tokens).int()
documents = torch.arange(count) // 200
scores = StreamScores(
    log_p_lm=torch.log(torch.full((count,), 1 / 50)),
    targets=targets,
    document_ids=documents,
    ends_document=torch.zeros(count, dtype=torch.bool),
    distances=distances,
    tokens=tokens,
    num_words=documents.bincount(),
    num_bytes=5 * documents.bincount(),
    document_names=[f"text {number}" for number in range(int(documents.max()) + 1)],
)

# %% [markdown]
# ## The surface
#
# `tune` computes the perplexity of every pair of a grid, and goes on from the best between its
# points. The picture shows where the neighbors help (blue), how much the two numbers matter, and
# where the mixture is worse than the model alone.

# %%
result = tune(scores, np.geomspace(2, 2000, 25), np.linspace(0, 0.95, 20))
plot_surface(result, work / "temperature.png")
print(f"temperature {result.temperature:.3g}, lmbda {result.lmbda:.3g}")

# %% [markdown]
# ![Perplexity by temperature and lmbda](../images/tutorial-temperature.png)
#
# ## What a wrong pair costs
#
# A temperature that is too low trusts the nearest alone, which costs little here, where the
# nearest is the likeliest to be right. One that is far too high lets all k speak alike, and most
# of the gain is gone; lmbda bounds what they can spoil.

# %%
for temperature in (2.0, result.temperature, 2000.0):
    found = evaluate(scores, temperature, result.lmbda)
    print(f"t = {temperature:7.1f}: {found.base.token:.1f} -> {found.mixture.token:.1f}")

# %% [markdown]
# From the shell, `knnext tune STORE --model M` does the same, keeps both numbers beside the
# datastore for the commands that follow, and draws this picture.
