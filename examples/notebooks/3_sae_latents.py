# %% [markdown]
# # A sparse autoencoder and its latents
#
# A sparse autoencoder rewrites each activation as a sum of few directions out of many. It is trained in the vault, next to the
# rows, and stays there: what comes back is how good it is, and what single latents do.

# %%
import millpond as mp

lake = mp.connect()
run = lake["stdlib-heldout"]
train, test = run.split(test=0.25, seed=0)
hook = "blocks.3.hook_resid_post"

# %%
sae = mp.BatchTopKSae(d_sae=1024, k=16).fit(train[hook], tokens=200_000)
sae

# %% [markdown]
# L0 is how many latents are active a row, FVU the share of the variance that the reconstruction misses.

# %%
sae.evaluate(test[hook])

# %% [markdown]
# The latents themselves. `top_rows` says where a latent is most active: prompts' numbers and positions, of your own prompts.

# %%
sae.top_rows(test[hook], [0, 1, 2, 3])
