"""Cross-entropy recovered where models are served: the reconstruction is spliced into vLLM by capture's `sae` intervention."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from millpond.analysis.sae.blocks import SaeWeights
from millpond.analysis.sae.estimator import Sae
from millpond.analysis.sae.format import write_sae
from millpond.analysis.sae.recovered import Splice
from millpond.capture.params import capture_params
from millpond.capture.versions import check_vllm_version, set_environment
from millpond.store.artifacts import save_sae
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
        check_vllm_version()
        set_environment()
        from vllm import LLM

        self._folder = tempfile.TemporaryDirectory(prefix="millpond-splice-")
        lake = open_lake(Path(self._folder.name) / "lake", create=True)
        self._d_in = int(sae.W_enc_.shape[0])
        save_sae(lake, "sae", sae.save(Path(self._folder.name) / "sae"))
        save_sae(lake, "zero", self._nothing(Path(self._folder.name) / "zero"))
        settings: dict[str, Any] = {
            "max_num_seqs": 16,
            "kv_cache_memory_bytes": 1 << 28,
            "enforce_eager": True,
            "enable_prefix_caching": False,
            "disable_log_stats": True,
            **engine,
            "dtype": dtype,
            "skip_tokenizer_init": True,
            "async_scheduling": False,
            "worker_cls": "millpond.capture.worker.TapWorker",
            "additional_config": {"millpond": {"lake": str(lake.folder), "hooks": [self.hook]}},
        }
        self._llm: Any = LLM(str(path), **settings)

    def _nothing(self, folder: Path) -> Path:
        """An autoencoder whose reconstruction is 0."""
        empty = np.zeros((self._d_in, 1), np.float32)
        weights = SaeWeights("relu", empty, empty[0], empty.T.copy(), empty[:, 0])
        return write_sae(folder, weights, {"hook_name": self.hook}, {"kind": "sae"}, None)

    def cross_entropy(
        self, prompts: Sequence[Sequence[int]], first_position: int, splice: Splice | None
    ) -> tuple[float, int]:
        """See `SplicedModel.cross_entropy`.

        Raises:
            InvalidInput: another hook is to be replaced than the engine has a tap at.
        """
        from vllm import SamplingParams

        if splice is not None and not splice.read == splice.write == self.hook:
            raise InvalidInput(
                f"{splice.write} is to be replaced by a function of {splice.read}; this engine can {self.hook}"
            )
        asked = None
        if splice is not None:
            wish = {"op": "sae", "hook": self.hook, "artifact": splice.what, "first_position": first_position}
            asked = capture_params(capture=False, intervene=[wish])
        long = [list(prompt) for prompt in prompts if len(prompt) >= first_position + 2]
        parameters = SamplingParams(
            temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False, extra_args=asked
        )
        outputs = self._llm.generate([{"prompt_token_ids": prompt} for prompt in long], parameters, use_tqdm=False)
        total, count = 0.0, 0
        for prompt, output in zip(long, outputs, strict=True):
            for token, logprobs in zip(
                prompt[first_position + 1 :], output.prompt_logprobs[first_position + 1 :], strict=True
            ):
                total -= logprobs[token].logprob
                count += 1
        return total, count

    def close(self) -> None:
        """End the engine's process."""
        self._llm.llm_engine.engine_core.shutdown()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
