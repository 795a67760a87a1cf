"""Rows that are elsewhere: who holds them takes an estimator's declared specification and answers with results.

An array, a run or a label is elsewhere if it has a method `millpond_backend()`. Nothing here knows what answers it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import numpy as np

from millpond.store.errors import ActivationsStayInVault, InvalidInput

if TYPE_CHECKING:
    import pandas as pd

    from millpond.store.result import Result

T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T")
_RELEASE = "probe.release() asks the gate for its direction"


class Future(Protocol[T_co]):
    """Work that was handed over."""

    def result(self, timeout: float | None = None) -> T_co:
        """Wait for it."""
        ...


class Backend(Protocol):
    """What holds the rows."""

    def submit(
        self,
        kind: str,
        parts: Mapping[str, Any],
        finish: Callable[[Sequence[Result], Sequence[Any]], T],
        *,
        progress: bool = True,
    ) -> Future[T]:
        """Hand over a job of `kind` (`probe`, `evaluate`, `sweep`, `release`, `sae_train`, `latents`, `expression`).

        `finish` makes what the future gives from the job's results and the artifacts that it made, which stay there.
        """
        ...

    def quote(self, kind: str, parts: Mapping[str, Any]) -> int:
        """The most bytes that the job can cost."""
        ...


def backend_of(data: Any) -> Backend | None:
    """Who holds the rows of `data`; None if they are here."""
    give = getattr(data, "millpond_backend", None)
    found: Backend | None = None if give is None else give()
    return found


def check_unused(what: str, given: Mapping[str, tuple[Any, Any]]) -> None:
    """Check that arguments which only work on rows that are here have their defaults: name to value and default.

    Raises:
        InvalidInput: one does not.
    """
    for name, (value, default) in given.items():
        if value is not default and (type(value) is not type(default) or value != default):
            raise InvalidInput(f"{name} cannot be sent with {what} to the gateway; leave it out")


class Handed(ABC):
    """What estimators have when their rows are elsewhere."""

    remote_: Any
    """The artifact in the vault, once fitted there."""

    @abstractmethod
    def specification(self) -> dict[str, Any]:
        """Name and parameters that are not the default, as JSON values."""

    @abstractmethod
    def fit_job(self, X: Any, y: Any = None, **more: Any) -> tuple[str, dict[str, Any]]:
        """The kind and the parts of the job that fits it."""

    def _become(self, results: Sequence[Result], made: Sequence[Any]) -> Any:
        """Become what a job has fitted."""
        self.remote_ = made[0]
        if results:
            self.evaluation_ = results[0]
        return self

    def submit_fit(self, X: Any, y: Any = None, *, test: tuple[Any, Any] | None = None, **more: Any) -> Future[Any]:
        """Start to fit on rows behind a gateway; the future gives this estimator.

        Args:
            X: a hook of a remote run, such as `run[hook]`.
            y: a label of it, for those that need one.
            test: rows (and label) to evaluate on in the same job; the result is in `evaluation_`.
            more: as in `fit`, such as `tokens` of an autoencoder.

        Raises:
            InvalidInput: the rows are here.
        """
        backend = backend_of(X)
        if backend is None:
            raise InvalidInput("submit_fit hands work to a gateway, but these rows are here; call fit")
        kind, parts = self.fit_job(X, y, test=test, **more)
        return backend.submit(kind, parts, self._become, progress=bool(getattr(self, "progress", True)))

    def quote(self, X: Any, y: Any = None, *, test: tuple[Any, Any] | None = None, **more: Any) -> int:
        """The most bytes that `submit_fit` with these arguments can cost; 0 for rows that are here."""
        backend = backend_of(X)
        if backend is None:
            return 0
        return backend.quote(*self.fit_job(X, y, test=test, **more))

    def _there(self) -> Any:
        """Who holds what was fitted.

        Raises:
            InvalidInput: it was fitted here, or not at all.
        """
        remote = vars(self).get("remote_")
        if remote is None:
            raise InvalidInput(
                f"this {type(self).__name__} is not in a vault; only what was fitted there can be asked so"
            )
        return remote.millpond_backend()

    def _ask(self, kind: str, parts: Mapping[str, Any]) -> Result:
        """The only result of a job about what was fitted in the vault."""
        future = self._there().submit(
            kind,
            {"artifact": self.remote_, **parts},
            lambda results, made: results[0],
            progress=bool(getattr(self, "progress", True)),
        )
        found: Result = future.result()
        return found

    def _forget(self) -> None:
        """Fitted here now."""
        vars(self).pop("remote_", None)


class HandedProbe(Handed):
    """What probes have when their rows are elsewhere."""

    def specification(self) -> dict[str, Any]:
        """See `Handed`."""
        defaults = type(self)().get_params()
        changed = {name: value for name, value in self.get_params().items() if value != defaults[name]}
        changed.pop("progress", None)
        return {"name": type(self).__name__, "params": changed}

    def fit_job(self, X: Any, y: Any = None, **more: Any) -> tuple[str, dict[str, Any]]:
        """See `Handed`."""
        self.check_parameters()
        test = more.pop("test", None)
        check_unused("fit", {name: (value, None) for name, value in more.items()})
        return "probe", {"estimator": self.specification(), "data": X, "labels": y, "test": test}

    def _become(self, results: Sequence[Result], made: Sequence[Any]) -> Any:
        for name in ("coef_", "intercept_", "_linear"):  # of an earlier fit
            vars(self).pop(name, None)
        return super()._become(results, made)

    def release(self) -> Result:
        """Ask the gate for the direction of a probe in the vault, which then is `coef_`: 6 bits a coordinate, charged.

        Raises:
            NotReleased: the gate holds it back, or a reviewer must decide first.
            InvalidInput: the probe is not in a vault.
        """
        result = self._ask("release", {})
        self.coef_ = np.atleast_2d(np.asarray(result["direction"], np.float64))
        if "bias" in result.values:
            self.intercept_ = np.atleast_1d(np.float64(result["bias"]))
        return result

    def __getattr__(self, name: str) -> Any:
        if "remote_" in vars(self) and not name.startswith("__") and (name.endswith("_") or name == "_linear"):
            raise stays(f"{'coef_' if name == '_linear' else name} of this {type(self).__name__} is", _RELEASE)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


class HandedSae(Handed):
    """What autoencoders have when their rows are elsewhere."""

    _architecture: ClassVar[str | None]
    config: Any
    progress: bool

    def specification(self) -> dict[str, Any]:
        """See `Handed`."""
        config = self._trainable()  # type: ignore[attr-defined]
        usual = {field.name: field.default for field in fields(config)} | {"architecture": self._architecture}
        changed = {name: value for name, value in asdict(config).items() if value != usual[name]}
        return {"name": type(self).__name__, "params": changed}

    def fit_job(self, X: Any, y: Any = None, **more: Any) -> tuple[str, dict[str, Any]]:
        """See `Handed`."""
        tokens, epochs, test = more.pop("tokens", None), more.pop("epochs", 1), more.pop("test", None)
        check_unused("fit", {"y": (y, None)} | {name: (value, None) for name, value in more.items()})
        return "sae_train", {
            "estimator": self.specification(), "data": X, "tokens": tokens, "epochs": epochs, "test": test,
        }  # fmt: skip

    def latents(self, X: Any, latents: Iterable[int], n: int = 10) -> list[Result]:
        """Of an autoencoder in a vault: for each of `latents` its density, a histogram and `n` top contexts as references.

        Raises:
            InvalidInput: it was trained here; `top_rows` and `millpond.analysis.sae.latents.survey` look at it.
        """
        parts = {"artifact": vars(self).get("remote_"), "data": X, "latents": list(latents), "contexts": n}
        future = self._there().submit("latents", parts, lambda results, made: list(results), progress=self.progress)
        found: list[Result] = future.result()
        return found

    def _top_rows_there(self, X: Any, latents: Iterable[int] | None, n: int) -> pd.DataFrame:
        import pandas as pd

        if latents is None:
            raise InvalidInput("latents is not given; name those to look at, each is charged")
        asked = list(latents)
        rows = [
            {"latent": latent, "rank": rank, "prompt": int(prompt), "position": int(position), "value": float(value)}
            for latent, one in zip(asked, self.latents(X, asked, n), strict=True)
            for rank, ((prompt, position), value) in enumerate(zip(one["contexts"], one["activations"], strict=True))  # type: ignore[arg-type]
        ]
        return pd.DataFrame(rows, columns=["latent", "rank", "prompt", "position", "value"])


def stays(what: str, remedy: str) -> ActivationsStayInVault:
    """The error for something that is asked of the client and is in the vault."""
    return ActivationsStayInVault(f"{what} in the vault and cannot be read here; {remedy}")
