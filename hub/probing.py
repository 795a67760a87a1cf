"""What the runners of several kinds of job share: rows with their labels, estimators, and results as they may leave."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from millpond.hub.evidence import Part, class_codes
from millpond.hub.kinds.base import Made, RowSet
from millpond.hub.kinds.estimators import ProbeEstimator, SaeEstimator
from millpond.hub.vault import Vault
from millpond.store.errors import InvalidInput
from millpond.store.result import Result

if TYPE_CHECKING:
    import xarray as xr

    from millpond.analysis.probes.base import LinearProbe
    from millpond.analysis.sae.estimator import Sae
    from millpond.hub.kinds.probe import ProbeJob
    from millpond.store.artifacts import Artifact
    from millpond.store.run import Run

_METRICS = ("auroc", "accuracy", "balanced_accuracy", "f1", "log_loss")
_SAE_METRICS = ("l0", "fvu", "explained_variance", "mse", "cosine", "dead_latents")


def rows_of(vault: Vault, rows: RowSet) -> Part:
    """The rows."""
    return Part(vault.run_held(rows.run), vault.run(rows.run), vault.rows(rows))


def part_of(vault: Vault, rows: RowSet, label: str) -> tuple[Part, xr.DataArray]:
    """The rows and their label, whose classes are those that a result says something about."""
    view = vault.rows(rows)
    y = view.labels[vault.label(rows.run, label)].compute()
    return Part(vault.run_held(rows.run), vault.run(rows.run), view, class_codes(y.values)), y


def build(estimator: ProbeEstimator) -> LinearProbe:
    """The probe that a job names."""
    kind = getattr(import_module("millpond.analysis"), estimator.name)
    probe: LinearProbe = kind(**estimator.checked, progress=False)
    return probe


def build_sae(estimator: SaeEstimator) -> Sae:
    """The autoencoder that a job names; one thread, so that the same job gives the same bits."""
    kind = getattr(import_module("millpond.analysis"), estimator.name)
    sae: Sae = kind(**estimator.checked, progress=False, device="cpu", n_threads=1)
    return sae


def keep_probe(vault: Vault, probe: LinearProbe, job: ProbeJob) -> Made:
    """Keep a fitted probe with all that evaluating or releasing it later needs."""
    linear = probe._linear
    classes = getattr(probe, "classes_", None)
    tensors = {
        "coef": linear.coef, "intercept": linear.intercept, "shift": linear.shift,
        "intercept_shifted": linear.intercept_shifted,
    }  # fmt: skip
    if probe.train_prompts_ is not None:
        tensors["train_prompts"] = np.asarray(probe.train_prompts_, np.int64)
    config = {
        "job": job.model_dump(mode="json"),
        "pins": dict(vault.pins or {}),
        "classes": None if classes is None else classes.tolist(),
        "evidence": {name: int(value) for name, value in probe.evidence_.items() if name != "residual_dof"},
        "trained_on": dict(probe.trained_on_),
        "hook": job.hook,
        "strength": None if probe.strength is None else float(getattr(probe, f"{probe.strength}_")),
    }
    return vault.keep("probe", tensors, config, linear.coef.shape, job, job.train.run)


def fitted_to(vault: Vault, artifact: Artifact) -> tuple[Part, ...]:
    """The rows that an artifact was fitted to, with the classes that it was fitted to tell apart; none if no job made it.

    Raises:
        InvalidInput: a job made it, and it was kept without saying from what.
    """
    from millpond.hub.kinds import parse_job
    from millpond.hub.kinds.probe import ProbeJob
    from millpond.hub.kinds.sae_train import SaeTrainJob

    if "job" not in artifact.provenance:  # an operator put it into the lake
        return ()
    if "spec" not in artifact.provenance:
        raise InvalidInput(f"artifact {artifact.name!r} does not say what it was fitted to; fit it again")
    made_by, earlier = parse_job(artifact.provenance["spec"]), vault.at(artifact.provenance["pins"])
    if isinstance(made_by, ProbeJob):
        return (part_of(earlier, made_by.train, made_by.label)[0],)
    assert isinstance(made_by, SaeTrainJob)
    return (rows_of(earlier, made_by.rows),)


def load_probe(artifact: Artifact) -> LinearProbe:
    """The probe that `keep_probe` kept."""
    from millpond.analysis.probes.linear import Linear

    config, arrays = artifact.config, artifact.arrays()
    probe = build(ProbeEstimator.model_validate(config["job"]["estimator"]))
    linear = Linear(arrays["coef"], arrays["intercept"], arrays["shift"], arrays["intercept_shifted"])
    classes = None if config["classes"] is None else np.asarray(config["classes"])
    probe.trained_on_ = config["trained_on"]
    probe.train_prompts_ = arrays.get("train_prompts")
    return probe.take(linear, classes, config["evidence"], config["strength"])


def load_sae(artifact: Artifact) -> Sae:
    """The autoencoder that a job kept.

    Raises:
        InvalidInput: the artifact is none.
    """
    from millpond.analysis.sae.estimator import Sae

    if artifact.kind != "sae":
        raise InvalidInput(f"the artifact is a {artifact.kind}; give the handle of an autoencoder")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "cfg.json").write_text(json.dumps(artifact.config))
        (Path(folder) / "sae_weights.safetensors").write_bytes(artifact.data)
        sae = Sae.load(folder)
    sae.progress = False
    return sae


def evaluation(found: Result) -> Result:
    """A probe's evaluation as it may leave: of numbers, under a name of its own."""
    kind = "regression-evaluation" if "r2" in found.values else "probe-evaluation"
    return Result(kind, found.values, found.intervals, found.evidence)


def sae_evaluation(found: Result, part: Part) -> Result:
    """An autoencoder's evaluation as it may leave."""
    values = {name: found.values[name] for name in (*_SAE_METRICS, "frequency_histogram")}
    return Result("sae-evaluation", values, {}, {"rows": len(part.view), "prompts": len(part.view.prompts)})


def sweep_result(rows: Sequence[Mapping[str, Any]], test: Part) -> Result:
    """One label's rows of a sweep as arrays: the probes, then those of the shuffled label."""
    ordered = [row for row in rows if not row["control"]] + [row for row in rows if row["control"]]
    values: dict[str, Any] = {}
    for name in (name for name in _METRICS if name in ordered[0]):
        values[name] = np.array([row[name] for row in ordered], np.float64)
        for end in ("low", "high"):
            if f"{name}_{end}" in ordered[0]:
                values[f"{name}_{end}"] = np.array([row[f"{name}_{end}"] for row in ordered], np.float64)
    if not values:
        raise InvalidInput("a sweep is for labels of classes; fit numbers with a probe job")
    return Result("probe-sweep", values, {}, {"rows": len(test.view), "prompts": len(test.view.prompts)})


def latent_results(sae: Sae, view: Run, hook: str, latents: Sequence[int], contexts: int) -> list[Result]:
    """What each latent responds to, in one pass: `contexts` are prompt numbers and positions, the strongest first."""
    from millpond.analysis.sae.latents import survey

    if max(latents) >= sae.d_sae:
        raise InvalidInput(f"latent {max(latents)} does not exist; the autoencoder has {sae.d_sae}")
    found = survey(sae, view[hook], n=contexts, progress=False)
    counts = {"rows": len(view), "prompts": len(view.prompts)}
    results = []
    for latent in latents:
        top = found.top[found.top["latent"] == latent]
        places = top[["prompt", "position"]].to_numpy(np.int64).reshape(-1, 2)
        density = float(found.frequency[latent])
        values: dict[str, Any] = {
            "density": density,
            "mean_active": float(found.mean[latent] / density) if density else 0.0,
            "maximum": float(top["value"].max()) if len(top) else 0.0,
            "histogram": np.asarray(found.histogram[latent], np.float64) / found.rows,
            "contexts": _filled(places, contexts),
            "activations": _filled(top["value"].to_numpy(np.float64)[:, None], contexts)[:, 0],
        }
        results.append(Result("latent", values, {}, counts))
    return results


def _filled(values: Any, length: int) -> Any:
    """The rows, repeated from the last (or 0) up to `length`, so that a body's length says nothing."""
    short = length - len(values)
    last = values[-1:] if len(values) else np.zeros((1, values.shape[1]), values.dtype)
    return np.concatenate([values, np.repeat(last, short, axis=0)]) if short > 0 else values[:length]
