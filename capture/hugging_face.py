"""A model of transformers' with a recorder at chosen hook points, edited there as a run's requests were."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millpond.capture.adapters import merge_adapter
from millpond.capture.edits import Edits
from millpond.store.hooks import parse_hook
from millpond.store.interventions import Intervention, Patch


class HuggingFaceModel:
    """Computes one sequence at a time.

    Args:
        folder: of the model.
        adapter: folder of a LoRA adapter.
        dtype: a torch data type.
        hooks: hook points whose values are wanted.
        interventions: what is done at which hook points, in order.
        edits: makes the interventions ready; float32 on the true residual, rounded once an edit, as in the engine.
    """

    def __init__(
        self,
        folder: Path,
        adapter: Path | None,
        dtype: Any,
        hooks: Sequence[str],
        interventions: Sequence[tuple[str, Intervention]] = (),
        edits: Edits | None = None,
    ) -> None:
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
        if adapter is not None:
            merge_adapter(self._model, adapter)
        self._hooks = tuple(hooks)
        self._interventions = tuple(interventions)
        self._edits = edits

    def activations(self, token_ids: list[int], n_prompt: int) -> dict[str, NDArray[np.float32]]:
        """Every hook's values at every position, (n_tokens, d_model)."""
        import torch

        seen: dict[str, NDArray[np.float32]] = {}
        changes = self._changes(np.array(token_ids, np.int32), n_prompt)

        def passing(hook: str, value: Any) -> None:
            # in place: what a layer adds to later is the tensor that passes here
            rows = value.view(-1, value.shape[-1])
            for change in changes.get(hook, ()):
                change(rows)
            if hook in self._hooks:
                seen[hook] = rows.float().numpy().copy()

        with torch.no_grad(), _listening(self._model, {*self._hooks, *changes}, passing):
            self._model(torch.tensor([token_ids]), use_cache=False)
        return seen

    def _changes(self, tokens: NDArray[np.int32], n_prompt: int) -> dict[str, list[Callable[[Any], None]]]:
        found: dict[str, list[Callable[[Any], None]]] = {}
        for hook, intervention in self._interventions:
            assert self._edits is not None
            at = intervention.select(n_prompt, 0, len(tokens), tokens)
            edit = self._edits.make(intervention, hook, n_prompt if isinstance(intervention, Patch) else 0)

            def change(rows: Any, at: NDArray[np.int32] = at, edit: Any = edit) -> None:
                rows[at] = edit(rows[at].float(), at).to(rows.dtype)

            if len(at):
                found.setdefault(hook, []).append(change)
        return found


@contextmanager
def _listening(model: Any, hooks: Iterable[str], passing: Callable[[str, Any], None]) -> Iterator[None]:
    """Calls `passing` with what passes at each hook during a forward pass."""
    from millpond.capture.hook_points import decoder_layers, find_hook_point

    layers = decoder_layers(model, model.config.get_text_config().num_hidden_layers)
    handles = []

    def before(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: passing(name, args[0] if args else kwargs["hidden_states"])

    def after(name: str) -> Callable[..., None]:
        return lambda module, args, output: passing(name, output[0] if isinstance(output, tuple) else output)

    for name in hooks:
        point = find_hook_point(layers, parse_hook(name))
        if point.before:
            handles.append(point.module.register_forward_pre_hook(before(name), with_kwargs=True))
        else:
            handles.append(point.module.register_forward_hook(after(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
