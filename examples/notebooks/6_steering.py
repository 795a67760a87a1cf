# %% [markdown]
# # Steering and ablation
#
# A direction that a probe found can be added to the residual stream while the model writes, or taken out of it. The model runs in
# the vault; what comes back is how often its completions match what you look for.

# %%
import millpond as mp

lake = mp.connect()
run = lake["stdlib-heldout"]
hook = "blocks.3.hook_resid_post"

# %% [markdown]
# Which direction says "this token is in a comment"? The difference of the class means: adding it pushes an activation from one
# class to the other.

# %%
probe = mp.MassMeanProbe().fit(run[hook], run.labels["in_comment"])
probe

# %% [markdown]
# Eight beginnings of Python files, and what counts as a match: the completion has a comment in it.

# %%
beginnings = [
    "import os\n\n\ndef read(path):\n",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "def main():\n    parser = argparse.ArgumentParser()\n",
    "for name in names:\n    if name in seen:\n        continue\n",
    "def test_empty(self):\n    self.assertEqual(len(self.queue), 0)\n",
    "    try:\n        value = int(text)\n    except ValueError:\n",
    "while True:\n    line = self.file.readline()\n",
    "def __eq__(self, other):\n    return self.x == other.x\n\n",
]
prompts = [{"id": f"p{number}", "text": text} for number, text in enumerate(beginnings)]
asked = {"model": "stdlib-llama", "max_tokens": 24, "score": r"#", "n": 4, "temperature": 1.0}
plain = lake.generate(prompts, **asked)
plain

# %% [markdown]
# The same with the direction added at layer 3, at generated tokens only. The probe never leaves the vault: the job names it.

# %%
steered = lake.generate(
    prompts,
    **asked,
    interventions=[{"op": "add", "hook": hook, "vector": probe, "scale": 2.0, "positions": "generated"}],
)
steered

# %% [markdown]
# And with everything along it taken out:

# %%
ablated = lake.generate(prompts, **asked, interventions=[{"op": "ablate", "hook": hook, "vector": probe}])
ablated

# %% [markdown]
# Rates have intervals by prompt; eight prompts are few. The texts themselves can be asked for with `texts=True`: a reviewer reads them
# first, and they are charged at their coded length.

# %%
lake.budget()
