"""A run behind the gateway: what was declared of it, and names for its rows, which stay in the vault."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from millpond.analysis.remote import stays
from millpond.hub.body import Handles
from millpond.hub.kinds.base import RowSet, Split
from millpond.hub.projection import RunView
from millpond.store.errors import HookNotCaptured, InvalidInput, LabelNotFound
from millpond.store.expression import Expression
from millpond.store.hooks import match_hooks, summarize_hooks
from millpond.store.reprs import html_table

if TYPE_CHECKING:
    from millpond.hub.client.lake import RemoteLake
    from millpond.store.result import Result

_LOCAL = {
    "prompts": "you sent them; references in results are numbers and positions of your own prompts",
    "tokens": "conditions on `position` and `token_id` work in run.select",
    "stats": "run.statistics(hook) releases a summary",
    **dict.fromkeys(
        ("to_numpy", "to_torch", "to_dask", "to_xarray", "stream", "as_data_provider", "materialise", "follow"),
        "fit, evaluate and mp.lazy(run) work there, and lake.twin(run) has random rows to try code on",
    ),
}
_INDEX = ("prompt", "position", "token_id")


@dataclass(frozen=True, repr=False)
class RemoteRun:
    """A run of the project, or the rows of it that a condition and a split leave. Looking at it costs nothing."""

    lake: RemoteLake
    rows: RowSet
    """Which rows of which run."""

    @property
    def view(self) -> RunView:
        """What the gateway says of the whole run."""
        return self.lake.view(self.rows.run)

    @property
    def name(self) -> str:
        """As the project calls it."""
        return self.view.name

    @property
    def state(self) -> str:
        """`open` while it may grow, `sealed` when it cannot change."""
        return self.view.state

    @property
    def hooks(self) -> tuple[str, ...]:
        """Hook points held, by layer."""
        return self.view.hooks

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.view.d_model

    @property
    def dtype(self) -> str:
        """Data type of the stored activations."""
        return self.view.dtype

    @property
    def n_rows(self) -> int | None:
        """Rows of every hook; None where only the vault knows: of an open run, of generated text, and of a part."""
        return self.view.rows if self.is_whole else None

    @property
    def n_prompts(self) -> int | None:
        """Prompts; None where only the vault knows."""
        return self.view.prompts if self.is_whole else None

    @property
    def is_whole(self) -> bool:
        """Whether these are all rows of the run."""
        return self.rows.where is None and self.rows.part is None

    def millpond_backend(self) -> RemoteLake:
        """Who holds the rows."""
        return self.lake

    def match(self, hooks: str | Iterable[str]) -> tuple[str, ...]:
        """The run's hooks that `hooks` (names or globs) selects.

        Raises:
            HookNotCaptured: a name or glob selects none.
        """
        return match_hooks(hooks, self.hooks, f"run {self.name!r} holds")

    def __getitem__(self, hook: str) -> RemoteColumn:
        """The activations of one hook, to name in fits and evaluations.

        Raises:
            HookNotCaptured: the run does not hold it.
        """
        names = self.match(hook) if isinstance(hook, str) else ()
        if len(names) != 1:
            raise HookNotCaptured(
                f"{hook!r} names {len(names)} hook points; name one: run {self.name!r} holds {summarize_hooks(self.hooks)}"
            )
        return RemoteColumn(self, names[0])

    @property
    def labels(self) -> RemoteLabels:
        """Labels by name."""
        return RemoteLabels(self)

    def select(
        self,
        prompts: Any = None,
        *,
        where: str | None = None,
        position: int | Sequence[int] | None = None,
        token_id: int | Sequence[int] | None = None,
        sample: Any = None,
    ) -> RemoteRun:
        """The rows that satisfy every condition given, as `Run.select` does; evaluated in the vault.

        Args:
            prompts: ids.
            where: a condition on labels, prompt columns, `prompt`, `position` and `token_id`.
            position: a position from 0, or several.
            token_id: one, or several.
            sample: not here; a condition or a split chooses rows.

        Raises:
            InvalidInput: a condition cannot be sent or names no column or label of the run, or these rows are a part of a
                split already.
        """
        if sample is not None:
            raise InvalidInput("sample cannot be sent to the gateway; choose rows with where or split")
        found = [] if where is None else [f"({Expression(where).text})"]
        for name, value in (("position", position), ("token_id", token_id)):
            if value is not None:
                numbers = np.atleast_1d(np.asarray(value))
                if numbers.dtype.kind not in "iu" or numbers.ndim != 1 or (numbers < 0).any():
                    raise InvalidInput(f"{name} is {value!r}; give a number from 0, or several")
                found.append(f"{name} in {numbers.tolist()}")
        if prompts is not None:
            ids = [] if isinstance(prompts, str) else list(prompts)
            if not ids or not all(isinstance(one, str) for one in ids):
                raise InvalidInput(
                    "prompts must be a list of ids of the prompts that were sent; a mask would need them here"
                )
            found.append(f"id in {ids!r}")
        if not found:
            return self
        if self.rows.part is not None:
            raise InvalidInput("select rows before you split them: run.select(...).split(...)")
        if self.rows.where is not None:
            found.insert(0, self.rows.where)
        condition = Expression(" and ".join(found))  # refuses here what the vault would
        known = {*_INDEX, *self.view.columns, *self.view.labels}
        missing = {name.partition("@")[0] for name in condition.names} - known
        if missing and self.view.columns:
            raise InvalidInput(
                f"where names {min(missing)!r}, which is no column or label of run {self.name!r}; it has "
                f"{', '.join(sorted(known))} (lake.refresh() sees what others have added since)"
            )
        return self._with(where=condition.text)

    def split(self, test: float = 0.2, seed: int = 0, by: str | None = None) -> tuple[RemoteRun, RemoteRun]:
        """Split by prompt into a training and a test part, never by token, as `Run.split` does.

        Raises:
            InvalidInput: `test` is not between 0 and 1, there is no column `by`, or these rows are a part of a split already.
        """
        if not 0 < test < 1:
            raise InvalidInput(f"test is {test}; give a fraction between 0 and 1")
        if self.rows.part is not None:
            raise InvalidInput("these rows are a part of a split already; split the run with other fractions or seeds")
        if by is not None and self.view.columns and by not in self.view.columns:
            raise InvalidInput(
                f"by is {by!r}, which is no column of the prompts of run {self.name!r}; they have "
                f"{', '.join(self.view.columns)}"
            )
        split = Split(test=test, seed=seed, by=by)
        return self._with(split=split, part="train"), self._with(split=split, part="test")

    def statistics(self, hook: str) -> Result:
        """A released summary of one hook's rows: mean, standard deviation, norm."""
        from millpond.hub.kinds.statistics import StatisticsJob

        job = StatisticsJob(kind="statistics", rows=self.rows, hook=self[hook].hook)
        found: Result = self.lake.submit_job(job, lambda answers, made: answers[0]).result()
        return found

    def _with(self, **changed: Any) -> RemoteRun:
        return replace(self, rows=RowSet.model_validate(self.rows.model_dump() | changed))

    def facts(self) -> list[tuple[str, str]]:
        """What a reader wants to know of it, in order."""
        view = self.view
        rows = "rows, counted in the vault only," if self.n_rows is None else f"{self.n_rows:,} rows"
        found = [
            ("state", view.state),
            ("model", view.model),
            ("hooks", f"{summarize_hooks(view.hooks)} ({len(view.hooks)})"),
            ("rows", f"{rows} of {view.d_model} x {view.dtype}, in the vault"),
        ]
        if self.n_prompts is not None:
            found.append(("prompts", f"{self.n_prompts:,}"))
        if self.rows.where is not None:
            found.append(("where", self.rows.where))
        if self.rows.split is not None:
            by = f" by {self.rows.split.by}" if self.rows.split.by else ""
            found.append(("part", f"{self.rows.part}, test={self.rows.split.test} seed={self.rows.split.seed}{by}"))
        if view.labels:
            found.append(("labels", ", ".join(view.labels)))
        return found

    def __len__(self) -> int:
        if self.n_rows is None:
            raise stays(f"the number of rows of this part of run {self.name!r} is", "a released result counts its rows")
        return self.n_rows

    def __bool__(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        if name in _LOCAL:
            raise stays(f"{name} of run {self.name!r} is", _LOCAL[name])
        raise AttributeError(f"'RemoteRun' object has no attribute {name!r}")

    def __repr__(self) -> str:
        return "\n".join([f"<RemoteRun {self.name!r}>", *(f"  {name + ':':9}{value}" for name, value in self.facts())])

    def _repr_html_(self) -> str:
        return html_table(f"Run {self.name}, in the vault", self.facts())


@dataclass(frozen=True, repr=False, eq=False)
class _Column(ABC):
    """Values of rows in the vault; nothing turns them into an array here."""

    run: RemoteRun

    @property
    @abstractmethod
    def _what(self) -> str: ...

    def millpond_backend(self) -> RemoteLake:
        """Who holds the rows."""
        return self.run.lake

    def _refuse(self) -> Any:
        raise stays(
            f"{self._what} are",
            "fit, evaluate and mp.lazy(run) work there, run.statistics(hook) releases a summary, and lake.twin(run) has "
            "random rows to try code on",
        )

    @property
    def values(self) -> Any:
        """Raises ActivationsStayInVault."""
        return self._refuse()

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self._refuse()

    def __getitem__(self, _: Any) -> Any:
        return self._refuse()

    def __iter__(self) -> Iterator[Any]:
        self._refuse()
        return iter(())

    def compute(self, *_: Any, **__: Any) -> Any:
        """Raises ActivationsStayInVault, as what xarray would compute does."""
        return self._refuse()

    to_numpy = load = mean = sum = std = var = min = max = groupby = sel = isel = compute

    __array_ufunc__ = None


class RemoteColumn(_Column):
    """The activations of one hook of some rows: shape and type, and no values."""

    dims = ("row", "d_model")
    ndim = 2
    dtype = np.dtype(np.float32)

    def __init__(self, run: RemoteRun, hook: str) -> None:
        object.__setattr__(self, "run", run)
        object.__setattr__(self, "hook", hook)

    hook: str

    @property
    def name(self) -> str:
        """The hook."""
        return self.hook

    @property
    def shape(self) -> tuple[int | None, int]:
        """(rows, d_model); None for rows that only the vault can count."""
        return self.run.n_rows, self.run.d_model

    @property
    def attrs(self) -> Mapping[str, Any]:
        """Run, hook, model and state."""
        view = self.run.view
        return {"run": view.name, "hook": self.hook, "model": view.model, "state": view.state}

    @property
    def _what(self) -> str:
        return f"the activations of {self.hook}"

    def __matmul__(self, directions: Any) -> Any:
        from millpond.analysis.lazy import lazy

        return lazy(self.run)[self.hook] @ directions  # type: ignore[arg-type]

    def __repr__(self) -> str:
        rows = "?" if self.run.n_rows is None else f"{self.run.n_rows:,}"
        return (
            f"<RemoteColumn {self.hook} of run {self.run.name!r}: ({rows}, {self.run.d_model}) float32, in the vault>"
        )


class RemoteLabel(_Column):
    """A label of some rows, by name."""

    dims = ("row",)
    ndim = 1
    dtype = np.dtype(np.float64)
    """What expressions compute with; the vault knows the type stored."""

    def __init__(self, run: RemoteRun, name: str) -> None:
        object.__setattr__(self, "run", run)
        object.__setattr__(self, "name", name)

    name: str

    @property
    def _what(self) -> str:
        return f"the values of label {self.name!r} are known to those who gave them; those stored"

    def _compare(self, _: Any) -> Any:
        raise InvalidInput(
            f"label {self.name!r} cannot be computed with here; add another label with run.labels.add, choose rows with "
            "run.select(where=...), or use mp.lazy(run).label(...)"
        )

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __and__ = __or__ = _compare
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"<RemoteLabel {self.name!r} of run {self.run.name!r}, in the vault>"


class RemoteLabels(Mapping[str, RemoteLabel]):
    """The labels of a run by name; `name@2` is a version."""

    def __init__(self, run: RemoteRun) -> None:
        self._run = run

    def __getitem__(self, name: str) -> RemoteLabel:
        held = self._run.view.labels
        if name.partition("@")[0] not in held:
            raise LabelNotFound(
                f"label {name!r} is not in run {self._run.name!r}, which has {', '.join(held) or 'none'}; name one of "
                "these, or add it"
            )
        return RemoteLabel(self._run, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._run.view.labels)

    def __len__(self) -> int:
        return len(self._run.view.labels)

    def add(self, name: str, values: Mapping[str, Any], *, by: str | None = None) -> None:
        """Send a label for prompts of the whole run: by id a value, or one value a token from position 0.

        Args:
            name: of the label; where the run has it already, this is a new version.
            values: by prompt id. A DataFrame's column: `table.set_index("id")["deceptive"].to_dict()`.
            by: `prompt` or `token`; by default told by the values.

        Raises:
            InvalidInput: there are no values, or some are lists and some not; or the vault cannot use them.
        """
        plain = {str(key): _plain(value) for key, value in dict(values).items()}
        kinds = {isinstance(value, list) for value in plain.values()}
        if len(kinds) != 1:
            raise InvalidInput(f"label {name!r} has {len(plain)} values; give one for each prompt, or a list for each")
        found = by or ("token" if kinds == {True} else "prompt")
        run = self._run
        run.lake.connection.ask(
            Handles, "POST", f"runs/{run.view.handle}/labels", {"name": name, "by": found, "values": plain}
        )
        labels = tuple(sorted({*run.view.labels, name}))
        run.lake.learn(replace(run.view, labels=labels))

    def __repr__(self) -> str:
        return f"<RemoteLabels: {', '.join(self) or 'none'}>"


def _plain(value: Any) -> Any:
    """JSON's own types, from NumPy's too."""
    if isinstance(value, np.ndarray | list | tuple):
        return [_plain(one) for one in (value.tolist() if isinstance(value, np.ndarray) else value)]
    return value.item() if isinstance(value, np.generic) else value
