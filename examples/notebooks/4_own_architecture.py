# %% [markdown]
# # Your own autoencoder
#
# The vault runs no code of yours. It runs your arithmetic: a module of PyTorch is traced here into a graph of operators, the
# graph is checked against a list, and the vault trains and measures it. What comes back is what trusted metrics say.
#
# A notebook has two gigabytes of memory; importing PyTorch takes a few hundred megabytes of it.

# %%
import torch

import millpond as mp

lake = mp.connect()
run = lake["stdlib-heldout"]
train, test = run.split(test=0.25, seed=0)
hook = "blocks.3.hook_resid_post"


# %% [markdown]
# An autoencoder whose decoder is its encoder turned round. It returns its reconstruction, its codes, and the loss to train by;
# the loss itself stays in the vault.


# %%
class Tied(torch.nn.Module):
    """Codes are relu(x W + b), the reconstruction is codes W'."""

    def __init__(self, width: int, codes: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(width, codes) / width**0.5)
        self.bias = torch.nn.Parameter(torch.zeros(codes))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the vault measures."""
        codes = torch.relu(x @ self.weight + self.bias)
        reconstruction = codes @ self.weight.T
        loss = ((reconstruction - x) ** 2).mean() + 1e-3 * codes.abs().mean()
        return {"reconstruction": reconstruction, "codes": codes, "loss": loss}


torch.manual_seed(0)
tied = Tied(run.d_model, 512)

# %% [markdown]
# Measured as it is, and after one pass of training. Nothing else differs.

# %%
lake.graph(tied, train[hook], test=test[hook])[0]

# %%
lake.graph(tied, train[hook], test=test[hook], learning_rate=3e-3, batch_rows=256)[0]

# %% [markdown]
# An operator that is not on the list is refused here, before anything is sent.


# %%
class Reader(torch.nn.Module):
    """Wants to put a row into its statistic by way of a file."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Never runs in the vault."""
        return {"reconstruction": torch.linalg.svd(x)[0]}


try:
    lake.graph(Reader(), train[hook], test=test[hook])
except mp.MillpondError as error:
    print(f"{type(error).__name__}: {error}")
