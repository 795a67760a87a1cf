# %% [markdown]
# # A first look
#
# The activations of a model lie in the vault, a place that this notebook cannot reach. What you have here is a description
# of them, and methods that work on them where they are. Results come back; rows do not.
#
# Every cell below runs as it is. None takes longer than a few seconds.

# %%
import millpond as mp

lake = mp.connect()
lake.runs()

# %% [markdown]
# `stdlib-heldout` was captured from a small Llama that was trained on the Python standard library, while it read files that
# it had not seen. Looking at the run reads no activation.

# %%
run = lake["stdlib-heldout"]
run

# %% [markdown]
# Labels were stored with the run. `in_string` says of every token whether it lies inside a string literal: the tokenizer of
# Python decided, so it is always right. We keep a quarter of the prompts for scoring. The split is by prompt, since tokens
# of one file resemble each other.

# %%
train, test = run.split(test=0.25, seed=0)
hook = "blocks.3.hook_resid_post"
train[hook]

# %% [markdown]
# The column above has a shape and a type, but no values: asking for them is an error that says what to do instead.

# %%
try:
    train[hook].values
except mp.MillpondError as error:
    print(f"{type(error).__name__}: {error}")

# %% [markdown]
# ## A probe
#
# Is there a direction in layer 3 that tells strings from code? The same line would work on rows in memory. Here it declares
# a job; the vault fits it and keeps the probe.

# %%
probe = mp.LogisticProbe().fit(train[hook], train.labels["in_string"])
probe

# %% [markdown]
# Scoring gives a released result: numbers rounded to what their own uncertainty supports, with the evidence behind them.

# %%
score = probe.evaluate(test[hook], test.labels["in_string"])
score

# %% [markdown]
# Is that good? Compare layers. One job fits a probe at each of the six, and once more with shuffled labels: what a probe
# reaches without anything to find.

# %%
sweep = mp.LogisticProbe().sweep(train, test, hooks="blocks.*.hook_resid_post", labels="in_string")
sweep.table()[["hook", "control", "auroc", "auroc_low", "auroc_high"]]

# %%
import matplotlib.pyplot as plt

figure = sweep.plot(plt.figure(figsize=(7, 3.5)).subplots())
# %% [markdown]
# The picture was drawn here, from the numbers above: no image crosses.
#
# ## What it cost
#
# Every byte that leaves the vault is charged before it is sent. This model is public, so its bytes are counted and not
# capped; for a private one the line below says what is left of your week.

# %%
lake.budget()
