# %% [markdown]
# # Exploring without seeing
#
# Two ways to look around: expressions that are recorded here and computed in the vault, and a twin, a lake of random rows with
# the same schema on which everything runs here, in full and for free.

# %%
import numpy as np

import millpond as mp

lake = mp.connect()
run = lake["stdlib-heldout"]
hook = "blocks.3.hook_resid_post"

# %% [markdown]
# `run[hook] @ v` is not computed when it is written. What a reduction makes of it is.

# %%
direction = np.random.default_rng(0).standard_normal(run.d_model)
direction /= np.linalg.norm(direction)
projected = mp.lazy(run)[hook] @ direction
projected

# %% [markdown]
# Its mean inside and outside of strings, computed next to the rows and released:

# %%
projected.groupby("in_string").mean().compute()

# %% [markdown]
# A summary of the hook itself:

# %%
run.statistics(hook)

# %% [markdown]
# ## The twin
#
# A job that fails in the vault says only that it failed: a traceback could carry rows. So debug on a twin. The same lines run
# on it, here, with whole tracebacks and without a charge. Its rows are random; nothing of the vault is in them.

# %%
twin = lake.twin(run, max_bytes=20_000_000)
copy = twin["stdlib-heldout"]
copy

# %%
train, test = copy.split(test=0.25, seed=0)
probe = mp.LogisticProbe().fit(train[hook], train.labels["in_string"])
probe.coef_.shape, probe.score(test[hook], test.labels["in_string"])

# %% [markdown]
# When it works there, put `lake` in the place of `twin`.
