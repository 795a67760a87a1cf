"""Cross-entropy recovered: how much of a model's loss survives when a hook is replaced by its reconstruction."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from millpond.analysis.sae import blocks
from millpond.store.errors import InvalidInput
from millpond.store.result import Result

if TYPE_CHECKING:
    from millpond.analysis.sae.estimator import Sae

Rows = NDArray[np.float32]
Replace = Callable[[Rows], Rows]


@dataclass(frozen=True)
class Splice:
    """Replace what a hook holds, at the positions from `first_position` on, by a function of the same or an earlier hook."""

    read: str
    write: str
    replace: Replace
    """(tokens, d_in) of `read` to (tokens, d_out) of `write`."""
    what: Literal["sae", "zero"] = "sae"
    """What `replace` gives: the reconstruction, or 0; for models that do it themselves."""


class SplicedModel(Protocol):
    """A language model that can run with a hook replaced."""

    def cross_entropy(
        self, prompts: Sequence[Sequence[int]], first_position: int, splice: Splice | None
    ) -> tuple[float, int]:
        """Summed loss in nats of the tokens that follow positions from `first_position` on, and their number."""
        ...


def cross_entropy_recovered(
    sae: Sae, model: SplicedModel, prompts: Sequence[Sequence[int]], hook: str | None = None, *, first_position: int = 1
) -> Result:
    """Loss of `model` as it is, with the hook reconstructed, and with it set to 0.

    `ce_recovered` is (zero - reconstructed) / (zero - clean): 1 for a perfect reconstruction, 0 for one no
    better than nothing. Positions before `first_position` are left alone; rows were not captured there.

    Args:
        sae: an autoencoder, or a transcoder (its output hook is replaced).
        model: such as `HuggingFaceModel(path)`, or `millpond.hub.recovered.VllmModel(path, sae)` where vLLM is at hand.
        prompts: token ids, with whatever the model starts from.
        hook: what the autoencoder was trained on; by default what it says.
        first_position: of the first row that capture kept.

    Raises:
        InvalidInput: there is no hook to replace, or no token to predict.
    """
    weights = sae._weights()
    read = hook or sae.trained_on_.get("hook")
    write = sae.trained_on_.get("hook_out", read)
    if not read or not write or sae.kind == "crosscoder":
        raise InvalidInput("the autoencoder does not say one hook that it reconstructs; give hook")

    def rebuilt(rows: Rows) -> Rows:
        return blocks.reconstruct(weights, blocks.encode(weights, rows), rows)

    def nothing(rows: Rows) -> Rows:
        return np.zeros((len(rows), weights.w_dec.shape[1]), np.float32)

    splices = {"clean": None, "sae": Splice(read, write, rebuilt), "zero": Splice(read, write, nothing, "zero")}
    losses = {}
    for name, splice in splices.items():
        total, count = model.cross_entropy(prompts, first_position, splice)
        if not count:
            raise InvalidInput(f"no prompt is longer than {first_position + 1} tokens; nothing to predict")
        losses[name] = total / count
    values = {f"ce_{name}": loss for name, loss in losses.items()}
    values["ce_recovered"] = (losses["zero"] - losses["sae"]) / (losses["zero"] - losses["clean"])
    provenance = {"estimator": type(sae).__name__, "trained_on": sae.trained_on_, "read": read, "write": write}
    return Result("sae-cross-entropy", values, {}, {"tokens": count, "prompts": len(prompts)}, provenance)


class HuggingFaceModel:
    """A causal language model of transformers, in float32, run prompt by prompt."""

    def __init__(self, path: str | Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32).eval()
        decoder = getattr(self.model, "model", None) or getattr(self.model, "transformer", None)
        layers = getattr(decoder, "layers", None) or getattr(decoder, "h", None)
        if layers is None:
            raise InvalidInput(f"{path}: no decoder layers found in {type(self.model).__name__}")
        self.layers: Any = layers

    def cross_entropy(
        self, prompts: Sequence[Sequence[int]], first_position: int, splice: Splice | None
    ) -> tuple[float, int]:
        """See `SplicedModel.cross_entropy`."""
        import torch
        import torch.nn.functional as nn

        total, count = 0.0, 0
        held: dict[str, Any] = {}
        handles = [] if splice is None else self._attach(splice, first_position, held)
        try:
            for prompt in prompts:
                if len(prompt) < first_position + 2:
                    continue
                ids = torch.tensor([list(prompt)])
                with torch.no_grad():
                    logits = self.model(ids).logits[0]
                predicted, follows = logits[first_position:-1], ids[0, first_position + 1 :]
                total += float(nn.cross_entropy(predicted.double(), follows, reduction="sum"))
                count += len(follows)
        finally:
            for handle in handles:
                handle.remove()
        return total, count

    def _attach(self, splice: Splice, first: int, held: dict[str, Any]) -> list[Any]:
        import torch

        def replaced(value: Any) -> Any:
            rows = splice.replace(held["read"][0, first:].numpy())
            moved = value.clone()
            moved[0, first:] = torch.from_numpy(np.ascontiguousarray(rows, np.float32))
            return moved

        def keep(value: Any) -> Any:
            held["read"] = value
            return value

        return [self._on(splice.read, keep), self._on(splice.write, replaced)]

    def _on(self, hook: str, change: Callable[[Any], Any]) -> Any:
        match = re.fullmatch(r"blocks\.(\d+)\.hook_(resid_pre|resid_post|attn_out|mlp_out)", hook)
        if match is None or int(match[1]) >= len(self.layers):
            raise InvalidInput(
                f"{hook} cannot be replaced here; resid_pre, resid_post, attn_out and mlp_out of layers 0 to "
                f"{len(self.layers) - 1} can"
            )
        layer = self.layers[int(match[1])]
        if match[2] == "resid_pre":

            def before(_: Any, args: Any, kwargs: Any) -> Any:
                if args:
                    return (change(args[0]), *args[1:]), kwargs
                return args, kwargs | {"hidden_states": change(kwargs["hidden_states"])}

            return layer.register_forward_pre_hook(before, with_kwargs=True)
        names = {"resid_post": (), "attn_out": ("self_attn", "attn"), "mlp_out": ("mlp",)}[match[2]]
        module = next((getattr(layer, name) for name in names if hasattr(layer, name)), layer)

        def after(_: Any, __: Any, out: Any) -> Any:
            return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

        return module.register_forward_hook(after)
