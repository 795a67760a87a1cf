"""Runs inside the peers' environment: what SAELens and dictionary_learning make of our folders and batches.

Not a test module. `python saelens_peer.py FOLDER`: reads FOLDER/ours/*, encodes FOLDER/x.npy with SAELens, writes
the latents and reconstructions; writes autoencoders of SAELens' own into FOLDER/theirs/*; trains on the run in
FOLDER/lake; caches activations of the example model into FOLDER/cache, and what its own reader makes of them into
FOLDER/cache.npz; prints one JSON object.
"""

import contextlib
import io
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import torch

warnings.filterwarnings("ignore")
folder = Path(sys.argv[1])
MODEL = str(Path(__file__).parents[2] / "examples" / "stdlib_llama" / "model")
x = torch.from_numpy(np.load(folder / "x.npy"))
report = {"loaded": {}}


def use(sae, where):
    """Latents, and the whole forward pass, which for a skip transcoder is more than decoding."""
    with torch.no_grad():
        np.savez(where, latents=sae.encode(x).numpy(), rebuilt=sae(x).numpy())


with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    import sae_lens
    from datasets import Dataset, load_from_disk
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE, BatchTopKTrainer
    from dictionary_learning.training import trainSAE
    from sae_lens import (
        SAE,
        CacheActivationsRunner,
        CacheActivationsRunnerConfig,
        LoggingConfig,
        SAETrainer,
        StandardTrainingSAE,
        StandardTrainingSAEConfig,
    )
    from sae_lens.config import SAETrainerConfig
    from sae_lens.registry import get_sae_class
    from sae_lens.training.multi_sae_trainer import MultiSAETrainer
    from transformers import AutoModelForCausalLM

    import millpond

    for path in sorted((folder / "ours").iterdir()):
        sae = SAE.load_from_disk(str(path))
        report["loaded"][path.name] = type(sae).__name__
        use(sae, folder / f"{path.name}.npz")

    torch.manual_seed(0)
    for name in ("standard", "topk", "jumprelu", "gated", "transcoder", "skip_transcoder", "jumprelu_transcoder"):
        kind, config_kind = get_sae_class(name)
        extra = {"k": 5} if name == "topk" else {"d_out": x.shape[1]} if "transcoder" in name else {}
        if "transcoder" in name:
            extra["apply_b_dec_to_input"] = False
        sae = kind(config_kind(d_in=x.shape[1], d_sae=40, **extra))
        with torch.no_grad():
            for parameter in sae.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.3)
            if hasattr(sae, "threshold"):
                sae.threshold.abs_()
        sae.save_model(folder / "theirs" / name)
        use(sae, folder / "theirs" / f"{name}.npz")

    run = millpond.open(folder / "lake")["r"]
    hooks = run.hooks
    batch, steps, d = 64, 4, run.d_model
    config = SAETrainerConfig(
        total_training_samples=batch * steps,
        train_batch_size_samples=batch,
        lr=1e-3,
        lr_end=1e-4,
        autocast=False,
        logger=LoggingConfig(log_to_wandb=False),
    )

    def new():
        return StandardTrainingSAE(StandardTrainingSAEConfig(d_in=d, d_sae=32, l1_coefficient=0.1))

    sae = new()
    before = sae.W_dec.detach().clone()
    trainer = SAETrainer(cfg=config, sae=sae, data_provider=run.as_data_provider(hooks[0], batch))
    trainer.fit()
    report["saelens_samples"] = trainer.n_training_samples
    report["saelens_moved"] = float((sae.W_dec - before).abs().max())
    saes = {"a": new(), "b": new()}
    names = {"a": hooks[0], "b": hooks[1]}
    provider = run.as_data_provider(list(hooks[:2]), batch)
    multi = MultiSAETrainer(cfg=config, saes=saes, hook_names=names, data_provider=provider)
    multi.fit()
    report["multi_samples"] = multi.n_training_samples
    trainSAE(
        data=run.as_data_provider(hooks[0], batch),
        trainer_configs=[
            {
                "trainer": BatchTopKTrainer, "dict_class": BatchTopKSAE, "activation_dim": d, "dict_size": 32, "k": 4,
                "layer": 0, "lm_name": "x", "steps": steps, "warmup_steps": 1, "threshold_start_step": 1,
                "device": "cpu", "seed": 0,
            }
        ],
        steps=steps,
        save_dir=str(folder / "dictionary_learning"),
        device="cpu",
    )  # fmt: skip
    report["dictionary_learning"] = (folder / "dictionary_learning" / "trainer_0" / "ae.pt").exists()

    contexts, length, layer = 6, 16, "model.layers.3"
    texts = [
        [0, *(int(token) for token in row)]
        for row in np.random.default_rng(1).integers(1, 4096, (contexts, length - 1))
    ]
    cache = CacheActivationsRunnerConfig(
        dataset_path="", model_name=MODEL, model_from_pretrained_kwargs={"dtype": torch.float32},
        model_class_name="AutoModelForCausalLM", hook_name=layer, d_in=256, model_batch_size=2, context_size=length,
        training_tokens=contexts * length, buffer_size_gb=4e-5, prepend_bos=False, shuffle=False, streaming=False,
        device="cpu", new_cached_activations_path=str(folder / "cache"),
    )  # fmt: skip
    CacheActivationsRunner(cache, override_dataset=Dataset.from_dict({"input_ids": texts})).run()
    cached = load_from_disk(str(folder / "cache")).with_format("numpy")
    with torch.no_grad():
        asked = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)(
            torch.tensor(texts), output_hidden_states=True
        )
    hidden = asked.hidden_states[4].numpy()
    np.savez(folder / "cache.npz", token_ids=cached["token_ids"][:], rows=cached[layer][:], hidden=hidden)
    report["cached"] = [texts, len(list((folder / "cache").glob("*.arrow")))]
    report["version"] = sae_lens.__version__
print(json.dumps(report))
