# %% [markdown]
# # Where does the model know what?
#
# A sweep fits many probes in one job: hooks times labels, each beside its control. This notebook asks at which depth a model
# of code knows that it is inside a comment, a string or an identifier.

# %%
import matplotlib.pyplot as plt
import pandas as pd

import millpond as mp

lake = mp.connect()
run = lake["stdlib-heldout"]
train, test = run.split(test=0.25, seed=0)
hooks = "blocks.*.hook_resid_post"

# %% [markdown]
# Know the price first. A quote is an upper bound of the bytes that a job's answers may cost, and asks nothing of the data. To
# fit alone costs no answer: the probe stays in the vault. Evaluating it does.

# %%
hook = "blocks.3.hook_resid_post"
mp.LogisticProbe().quote(train[hook], train.labels["in_comment"])

# %%
labels = ["in_comment", "in_string", "is_identifier"]
sweep = mp.LogisticProbe().sweep(train, test, hooks=hooks, labels=labels)
table = sweep.table()
table[["hook", "label", "control", "auroc", "auroc_low", "auroc_high"]]

# %% [markdown]
# A control is the same probe with shuffled labels. Its AUROC lies near one half; what a probe has above its control is what
# the layer holds.

# %%
table["layer"] = table["hook"].str.extract(r"blocks\.(\d+)\.").astype(int)
figure, axes = plt.subplots(figsize=(7, 3.5))
for label, rows in table[~table["control"].astype(bool)].groupby("label"):
    rows = rows.sort_values("layer")
    axes.plot(rows["layer"], rows["auroc"], marker="o", label=label)
    axes.fill_between(rows["layer"], rows["auroc_low"], rows["auroc_high"], alpha=0.2)
axes.axhline(0.5, color="grey", linewidth=0.8)
axes.set_xlabel("layer")
axes.set_ylabel("AUROC on held-out prompts")
legend = axes.legend(frameon=False)
# %% [markdown]
# ## Several strengths at once
#
# `submit_fit` returns a future, so that many jobs are under way while you do something else.

# %%
strengths = (0.01, 0.1, 1.0)
futures = [mp.LogisticProbe(C=c).submit_fit(train[hook], train.labels["in_comment"]) for c in strengths]
scores = {c: f.result().score(test[hook], test.labels["in_comment"]) for c, f in zip(strengths, futures, strict=True)}
pd.Series(scores, name="accuracy").rename_axis("C")

# %% [markdown]
# The same question again gives the same bytes for the fixed charge only: nothing is averaged away by asking often.
