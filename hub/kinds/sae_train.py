"""`sae_train`: train a sparse autoencoder, which stays in the vault."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from millpond.hub.kinds.base import Facts, Hook, Job, Needed, Outcome, Progress, RowSet, sae_evaluation_bytes
from millpond.hub.kinds.estimators import SaeEstimator

if TYPE_CHECKING:
    from millpond.hub.vault import Vault
    from millpond.store.run import Run


class SaeTrainJob(Job):
    """Train on `tokens` rows of one hook; measured on a test part if there is one."""

    kind: Literal["sae_train"]
    estimator: SaeEstimator
    hooks: Annotated[tuple[Hook, ...], Field(min_length=1, max_length=1)]
    rows: RowSet
    tokens: int = Field(ge=1, le=10_000_000_000)
    test: RowSet | None = None

    def needs(self) -> Iterator[tuple[Needed, str]]:
        """The runs."""
        yield "run", self.rows.run
        if self.test:
            yield "run", self.test.run

    def answers(self) -> int:
        """The evaluation, if there is a test part."""
        return int(self.test is not None)

    def answer_bytes(self, facts: Facts) -> int:
        """See the base class."""
        facts.hooks(self.rows.run, self.hooks)
        return self.answers() * sae_evaluation_bytes()

    def run(self, vault: Vault, progress: Progress) -> Outcome:
        """See the base class. A training that was killed begins again."""
        import json
        import tempfile
        from pathlib import Path

        from millpond.analysis.sae.config import SaeConfig
        from millpond.hub.evidence import is_plain, measure
        from millpond.hub.kinds.base import Answer
        from millpond.hub.probing import build_sae, rows_of, sae_evaluation

        part = rows_of(vault, self.rows)
        (hook,) = part.view.match(self.hooks)
        vault.figures = is_plain(part)  # as the rules would judge a curve without intervals
        sae = build_sae(self.estimator)
        rows = int(self.estimator.checked.get("batch_size", SaeConfig.batch_size))
        sae.fit(self._batches(vault, part.view, hook, rows, progress), self.tokens)
        sae.trained_on_ |= {"run": part.whole.name, "run_id": part.whole.plan.spec.id, "hook": hook}
        progress(0.8)
        with tempfile.TemporaryDirectory() as folder:
            saved = sae.save(folder)
            config = json.loads((Path(saved) / "cfg.json").read_text())
            data = (Path(saved) / "sae_weights.safetensors").read_bytes()
        made = (vault.keep("sae", data, config, (part.view.d_model, sae.d_sae), self, self.rows.run),)
        if self.test is None:
            return Outcome((), made)
        test = rows_of(vault, self.test)
        result = sae_evaluation(sae.evaluate(test.view[hook]), test)
        return Outcome((Answer(result, measure((test,), behind=(part,))),), made)

    def _batches(self, vault: Vault, view: Run, hook: str, rows: int, progress: Progress) -> Iterator[Any]:
        """Shuffled batches without end, looking up between them."""
        size = min(rows, len(view))
        for number, batch in enumerate(view.stream(hook, size, seed=self.estimator.checked.get("seed", 0))):
            vault.check()
            progress(0.8 * min(1.0, number * size / self.tokens))
            yield batch
