# %% [markdown]
# # Budgets and review
#
# What leaves the vault is counted in bytes and paid for before it is sent. This notebook shows what things cost, what is asked
# for a second time, and what happens to results that a person must see first.

# %%
import torch

import millpond as mp

lake = mp.connect()
run = lake["stdlib-heldout"]
train, test = run.split(test=0.25, seed=0)
hook = "blocks.3.hook_resid_post"
lake.budget()

# %% [markdown]
# Every job can be priced before it is sent. The bound depends on shapes alone, never on what the activations are, so the price
# says nothing either.

# %%
probe = mp.LogisticProbe()
probe.quote(train[hook], train.labels["in_comment"])

# %%
probe = probe.fit(train[hook], train.labels["in_comment"])
probe.evaluate(test[hook], test.labels["in_comment"])

# %% [markdown]
# The same question again is answered with the same bytes, for the fixed charge of a response. So there is nothing to gain from
# asking often: no noise averages out.

# %%
probe.evaluate(test[hook], test.labels["in_comment"])

# %% [markdown]
# A direction is dearer: 256 coordinates of six bits each. The copy in the vault keeps all of them, so evaluating, steering and
# further jobs name the probe and lose nothing; release it to look at it.

# %%
direction = probe.release()
direction

# %% [markdown]
# ## What a reviewer sees first
#
# A number that your own graph computed can be anything, also a row in disguise. It waits for a person.


# %%
class Spread(torch.nn.Module):
    """The mean of each of four coordinates: harmless, but nobody can know that from its name."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the vault computes."""
        return {"statistic": x[:, :4].mean(dim=0)}


future = lake.submit_graph(Spread(), train[hook])
try:
    future.result(timeout=120)
except mp.MillpondError as error:
    print(f"{type(error).__name__}: {error}")

# %% [markdown]
# A reviewer of the project opens the gateway's page, sees how many rows and prompts stand behind the numbers and which rule asked for
# a review, and decides; nobody decides about their own. After that, `future.result()` gives the answer.
#
# Some things never leave. A cohort that is one token over and over would show an embedding, not an average:

# %%
alone = run.select(where="position == 1 and token_id == 0")
try:
    mp.lazy(alone)["blocks.0.hook_resid_post"].mean().compute()
except mp.MillpondError as error:
    print(f"{type(error).__name__}: {error}")

# %%
lake.budget()
