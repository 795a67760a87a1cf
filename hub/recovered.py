"""Cross-entropy recovered where models are served: the reconstruction is spliced into vLLM by capture's `sae` intervention."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from millpond.analysis.sae.estimator import Sae
from millpond.analysis.sae.recovered import Splice
from millpond.store.artifacts import save_sae
from millpond.store.capture_spec import CaptureJob
from millpond.store.errors import InvalidInput
from millpond.store.lake import open_lake


class VllmModel:
    """A model in vLLM, for `cross_entropy_recovered(sae, model, prompts)` of this one autoencoder.

    Prompts run in vLLM's own batches. Close it, or use it as a context manager: its engine is a process.

    Args:
        path: folder of the model.
        sae: what is spliced in; its architecture must be one that SAELens runs (BatchTopK is exported as JumpReLU).
        hook: where; by default what it was trained on.
        dtype: the model's; float32 compares with `HuggingFaceModel`.
        engine: further vLLM engine arguments.

    Raises:
        InvalidInput: `sae` is no autoencoder of one hook, or vLLM is not installed.
    """

    def __init__(
        self, path: str | Path, sae: Sae, hook: str | None = None, *, dtype: str = "float32", **engine: Any
    ) -> None:
        self.hook = str(hook or sae.trained_on_.get("hook", ""))
        if not self.hook or sae.kind != "sae":
            raise InvalidInput(
                f"a {sae.kind} of hook {self.hook or 'unknown'!r} cannot be spliced into vLLM: give an autoencoder and its "
                "hook, or use HuggingFaceModel (--engine transformers)"
            )
        from millpond.capture.engine import CaptureEngine
        from millpond.capture.losses import keep_nothing, splices_of
        from millpond.capture.plan import read_model_facts

        self._folder = tempfile.TemporaryDirectory(prefix="millpond-splice-")
        lake = open_lake(Path(self._folder.name) / "lake", create=True)
        save_sae(lake, "sae", sae.save(Path(self._folder.name) / "sae"))
        settings = {"max_num_seqs": 16, "kv_cache_memory_bytes": 1 << 28, **engine, "skip_tokenizer_init": True}
        facts = read_model_facts(
            CaptureJob.model_validate(
                {
                    "model": {"path": str(path), "dtype": dtype},
                    "capture": {"hooks": [self.hook]},
                    "prompts": {"path": ""},
                    "destination": {"lake": str(lake.folder), "run": "none"},
                    "engine": settings,
                }
            )
        )
        self._nothing = keep_nothing(lake, facts.d_model)
        wanted = splices_of(self.hook, "sae", self._nothing, 0).values()
        self._engine = CaptureEngine(
            facts, lake.url, [self.hook], settings, saes=[one for one in wanted if one is not None]
        )

    def cross_entropy(
        self, prompts: Sequence[Sequence[int]], first_position: int, splice: Splice | None
    ) -> tuple[float, int]:
        """See `SplicedModel.cross_entropy`.

        Raises:
            InvalidInput: another hook is to be replaced than the engine has a tap at.
        """
        from millpond.capture.losses import measure_losses, splices_of

        if splice is not None and not splice.read == splice.write == self.hook:
            raise InvalidInput(
                f"{splice.write} is to be replaced by a function of {splice.read}; this engine can {self.hook}"
            )
        what = "clean" if splice is None else splice.what
        wanted = splices_of(self.hook, "sae", self._nothing, first_position)
        table = measure_losses(self._engine, prompts, {what: wanted[what]}, first_position, "prompt")
        return float(table[what].sum()), int(table["tokens"].sum())

    def close(self) -> None:
        """End the engine's process."""
        self._engine.close()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
