"""The lake as a client sees it: runs by name, jobs to submit, and what is left of the budget."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from millpond.hub.body import API, UNCAPPED, BudgetLeft, Handles, Quote
from millpond.hub.client import jobs
from millpond.hub.client.connection import Connection
from millpond.hub.client.futures import EarlierJob, JobFuture
from millpond.hub.client.generation import Generation, finished, group_names
from millpond.hub.client.run import RemoteRun
from millpond.hub.client.texts import TextReader
from millpond.hub.kinds.base import Job, RowSet
from millpond.hub.kinds.generate import GenerateJob
from millpond.hub.projection import RunView
from millpond.store.errors import GatewayRefused, GatewayUnavailable, InvalidInput, RunNotFound
from millpond.store.reprs import html_table

if TYPE_CHECKING:
    from millpond.store.lake import Lake
    from millpond.store.result import Result

T = TypeVar("T")


def connect(
    url: str | None = None,
    token: str | None = None,
    project: str | None = None,
    *,
    dictionary: str | os.PathLike[str] | None = None,
    timeout: float = 30.0,
) -> RemoteLake:
    """The lake behind a gateway. Its rows stay there; the same estimators work on it as on `millpond.open`.

    Args:
        url: `http://`, `https://` or `unix:PATH`; by default MILLPOND_URL.
        token: by default MILLPOND_TOKEN, or in a notebook of JupyterHub JUPYTERHUB_API_TOKEN.
        project: by default MILLPOND_PROJECT, or the only one that the token's user belongs to.
        dictionary: the file that completions are coded with; by default MILLPOND_DICTIONARY. Only needed for texts.
        timeout: seconds for one request; jobs take as long as they take.

    Raises:
        InvalidInput: there is no address, or the project is not given and there are several.
        GatewayUnavailable: nobody answers there, or another version.
        GatewayRefused: the token is not accepted, lacks the scope `read`, or is of no member of the project.
    """
    url = url or os.environ.get("MILLPOND_URL")
    if not url:
        raise InvalidInput("the gateway's address is not given; set MILLPOND_URL, or call connect('http://...')")
    token = token or os.environ.get("MILLPOND_TOKEN") or os.environ.get("JUPYTERHUB_API_TOKEN")
    connection = Connection(url, token, project or os.environ.get("MILLPOND_PROJECT"), timeout)
    try:
        version = _meet(connection)
    except BaseException:
        connection.close()
        raise
    given = dictionary or os.environ.get("MILLPOND_DICTIONARY")
    return RemoteLake(connection, version, None if given is None else Path(given))


def _meet(connection: Connection) -> dict[str, Any]:
    """Compare versions and settle the project."""
    version = connection.constant("/api/v1/version")
    if version.get("api") != API:
        raise GatewayUnavailable(
            f"the gateway speaks version {version.get('api')!r} of the interface, this client {API}; install "
            f"millpond=={version.get('version')}"
        )
    names = connection.constant("/api/v1/projects")["projects"]
    if connection.project is None:
        if len(names) != 1:
            raise InvalidInput(f"you belong to {', '.join(names) or 'no project'}; name one: connect(project=...)")
        connection.project = names[0]
    elif connection.project not in names:
        raise GatewayRefused(
            f"project {connection.project!r} is not found: it does not exist, or you are no member; you belong to "
            f"{', '.join(names) or 'no project'}"
        )
    return version


@dataclass(frozen=True)
class Artifact:
    """A probe or an autoencoder in the vault, by its handle."""

    lake: RemoteLake
    handle: str
    """16 hexadecimal digits, by which jobs and interventions name it."""

    def millpond_backend(self) -> RemoteLake:
        """Who holds it."""
        return self.lake

    def __repr__(self) -> str:
        return f"<Artifact {self.handle}, in the vault>"


@dataclass(frozen=True)
class RemotePrompts:
    """Prompts that were sent, by their handle."""

    handle: str
    name: str
    ids: tuple[str, ...]
    columns: Mapping[str, tuple[Any, ...]] = field(default_factory=dict, repr=False)
    """Further columns, as they were sent."""


class RemoteLake(Mapping[str, RemoteRun]):
    """The runs of a project behind a gateway: `lake["name"]` opens one. Descriptions are fetched, and charged, once."""

    def __init__(self, connection: Connection, version: Mapping[str, Any], dictionary: Path | None = None) -> None:
        self.connection = connection
        self.version = version
        self.texts = TextReader(dictionary, version.get("dictionary_sha256"), version.get("text_model"))
        self._views: dict[str, RunView] = {}
        self._listed = False

    @property
    def url(self) -> str:
        """Where the gateway is."""
        return self.connection.url

    @property
    def project(self) -> str:
        """Whose runs these are."""
        return str(self.connection.project)

    def runs(self) -> list[str]:
        """The names of the project's runs."""
        self._list()
        return sorted(view.name for view in self._views.values())

    def refresh(self) -> None:
        """Forget what is known of runs, so that new ones and new labels of others are seen."""
        self._views.clear()
        self._listed = False

    def _list(self) -> None:
        if self._listed:
            return
        for handle in self.connection.ask(Handles, "GET", "runs").values:
            if handle.hex() not in self._views:
                self._look(handle.hex())
        self._listed = True

    def _look(self, handle: str) -> RunView:
        view = self.connection.ask(RunView, "GET", f"runs/{handle}")
        self._views[handle] = view
        return view

    def view(self, handle: str) -> RunView:
        """The description of a run that was opened before."""
        return self._views.get(handle) or self._look(handle)

    def learn(self, view: RunView) -> None:
        """Remember what is now known of a run."""
        self._views[view.handle] = view

    def __getitem__(self, name: str) -> RemoteRun:
        found = self._named(name)
        if found is None or found.state != "sealed":
            self._listed = False  # it may be new, or have grown
            if found is not None:
                self._look(found.handle)
            self._list()
            found = self._named(name)
        if found is None:
            raise RunNotFound(
                f"run {name!r} is not in project {self.project!r}, which holds {', '.join(self.runs()) or 'no runs'}; "
                "name one of these, or capture it"
            )
        return self._run(found)

    def _named(self, name: str) -> RunView | None:
        return next((view for view in self._views.values() if view.name == name), None)

    def __iter__(self) -> Iterator[str]:
        return iter(self.runs())

    def __len__(self) -> int:
        return len(self.runs())

    def millpond_backend(self) -> RemoteLake:
        """Itself: it holds the rows of its runs."""
        return self

    def submit(
        self,
        kind: str,
        parts: Mapping[str, Any],
        finish: Callable[[Sequence[Any], Sequence[Any]], T],
        *,
        progress: bool = True,
    ) -> JobFuture[T]:
        """Submit a job of an estimator or an expression; see `millpond.analysis.remote.Backend`."""
        return self.submit_job(jobs.job_of(kind, parts), finish, progress=progress)

    def submit_job(
        self, job: Job, finish: Callable[[Sequence[Any], Sequence[Any]], T], *, progress: bool = True
    ) -> JobFuture[T]:
        """Submit a declared job.

        Args:
            job: of one of the kinds in `millpond.hub.kinds`.
            finish: makes the future's result from the answers and from what was made, artifacts or the run's handle.
            progress: whether waiting shows a status line.

        Raises:
            BudgetSpent: its quote is more than is left.
        """
        (handle,) = self.connection.ask(Handles, "POST", "jobs", {"job": jobs.wire(job)}).values

        def take(answers: Sequence[Any], made: Sequence[bytes]) -> T:
            return finish(answers, [Artifact(self, one.hex()) for one in made])

        return JobFuture(self, job, handle, take, progress=progress)

    def quote(self, kind: str | Job, parts: Mapping[str, Any] | None = None) -> int:
        """The most bytes that the answers of a job can cost; it is not submitted. The quote itself costs 23 bytes.

        Args:
            kind: a job, or its kind.
            parts: then its parts, as an estimator gives them.
        """
        job = jobs.job_of(kind, parts or {}) if isinstance(kind, str) else kind
        return self.connection.ask(Quote, "POST", "quote", {"job": jobs.wire(job)}).bytes

    def jobs(self) -> list[str]:
        """The handles of your jobs in the project."""
        return [handle.hex() for handle in self.connection.ask(Handles, "GET", "jobs").values]

    def job(self, handle: str, *, answers: int = 1) -> JobFuture[tuple[list[Any], list[Artifact]]]:
        """A job of the project that was submitted before, in another session too.

        Its result is what it answered, and the artifacts or the run that it made, by their handles.

        Args:
            handle: from a future's `handle`, or from `jobs`.
            answers: how many answers to ask for: a sweep has one a label, most other jobs one, a capture none.
        """
        if not re.fullmatch(r"[0-9a-f]{16}", handle):
            raise InvalidInput(f"handle is {handle!r}; give 16 hexadecimal digits, as future.handle and lake.jobs() do")

        def take(found: Sequence[Any], made: Sequence[bytes]) -> tuple[list[Any], list[Artifact]]:
            return list(found), [Artifact(self, one.hex()) for one in made]

        return JobFuture(self, EarlierJob(answers), bytes.fromhex(handle), take)

    def budget(self) -> BudgetLeft:
        """What is left now: bytes of your week, and 64ths of the project's and the model's lifetime budget."""
        return self.connection.budget()

    def left_text(self) -> str:
        """What is left of the week, as far as this session knows, without asking."""
        left = self.connection.left_about
        if left is None:
            return "budget left: ask lake.budget()"
        return (
            "no cap" if self.connection.left and self.connection.left.user_week == UNCAPPED else f"{left:,} bytes left"
        )

    def prompts(self, name: str, prompts: Iterable[Any]) -> RemotePrompts:
        """Send prompts once, to be named in captures.

        Args:
            name: in the project.
            prompts: texts, mappings with `id`, `text` and further columns, or a DataFrame of these.
        """
        rows = jobs.prompt_rows(prompts)
        (handle,) = self.connection.ask(Handles, "POST", "prompts", {"name": name, "prompts": rows}).values
        names = [column for column in rows[0] if column not in ("id", "text", "token_ids")]
        columns = {column: tuple(row[column] for row in rows) for column in names}
        return RemotePrompts(handle.hex(), name, tuple(row["id"] for row in rows), columns)

    def submit_capture(self, prompts: Any, **options: Any) -> JobFuture[RemoteRun]:
        """As `capture`, without waiting."""
        job = jobs.capture_job(prompts, **options)

        def finish(answers: Sequence[Any], made: Sequence[Artifact]) -> RemoteRun:
            return self._run(self._look(made[0].handle))

        return self.submit_job(job, finish)

    def capture(self, prompts: Any, *, model: str, name: str, hooks: str | Sequence[str], **options: Any) -> RemoteRun:
        """Run prompts through a model and keep activations as a new run.

        Args:
            prompts: what `prompts` returned, or prompts as it takes them (ids and texts alone are kept of those).
            model: its name in the vault.
            name: of the new run.
            hooks: names or globs.
            options: `adapter`, `positions` (such as `last`, or a mapping with further fields), `max_new_tokens`,
                `interventions` (of `millpond.store.interventions`, or mappings; vectors and autoencoders by handle).
        """
        return self.submit_capture(prompts, model=model, name=name, hooks=hooks, **options).result()

    def submit_generate(self, prompts: Any, **options: Any) -> JobFuture[Generation]:
        """As `generate`, without waiting."""
        groups = group_names(prompts, options.get("by"))
        job = jobs.job_of("generate", {"prompts": prompts, **options})
        assert isinstance(job, GenerateJob)
        if job.texts:
            self.texts.check()
        sent = prompts if isinstance(prompts, RemotePrompts) else None
        return self.submit_job(job, lambda answers, made: finished(job, sent, groups, self.texts, answers))

    def generate(
        self,
        prompts: Any,
        *,
        model: str,
        max_tokens: int,
        score: Any = None,
        by: str | None = None,
        texts: bool = False,
        **options: Any,
    ) -> Generation:
        """Let a model complete prompts in the vault; how often what it writes matches, or after a review the texts.

        Args:
            prompts: what `prompts` returned, or prompts as it takes them (ids and texts alone are kept of those).
            model: its name in the vault.
            max_tokens: of a completion.
            score: what counts as a match: a regular expression (RE2's syntax); a list of texts of which one is in it;
                `{"probe": probe, "threshold": 0.0, "of": "mean"}` (or `max`, `last`; and `hook`, by default the probe's own);
                or `{"template": "... {completion} ...", "choices": [" yes", " no"]}`, which a model of the vault answers
                (the same one without interventions and adapter, or `model` and `adapter`).
            by: column of prompts that were sent: rates of its groups too.
            texts: also ask for the texts, which a reviewer must let pass; with rates in the same job, those wait with them.
            options: `temperature` (0), `seed`, `n` completions a prompt (1), `stop` texts, `adapter`, `interventions` as in
                `capture`, and `text_bytes` (256), beyond which a text is cut.

        Raises:
            InvalidInput: a field cannot be used.
            InReview: a reviewer must decide; call `result()` of the future of `submit_generate` again later.
        """
        given = {"model": model, "max_tokens": max_tokens, "score": score, "by": by, "texts": texts}
        return self.submit_generate(prompts, **given, **options).result()

    def submit_sae_cross_entropy(self, sae: Any, prompts: Any, **options: Any) -> JobFuture[Result]:
        """As `sae_cross_entropy`, without waiting."""
        job = jobs.job_of("sae_cross_entropy", {"artifact": sae, "prompts": prompts, **options})
        return self.submit_job(job, lambda answers, made: answers[0])

    def sae_cross_entropy(self, sae: Any, prompts: Any, **options: Any) -> Result:
        """How much of a model's loss survives when a hook is replaced by an autoencoder's reconstruction, in the vault.

        Of at least 20 distinct prompts: `ce_clean`, `ce_sae` and `ce_zero`, nats a token of the model as it is, with the hook
        reconstructed and with it set to 0; `ce_recovered`, (zero - sae) / (zero - clean); and the counts `tokens` and `prompts`.

        Args:
            sae: an autoencoder that was trained in the vault, or its artifact.
            prompts: what `prompts` returned, prompts as it takes them, or a run whose prompts are taken, such as `test`.
            options: `model` (by default the one that the autoencoder was trained on), `adapter`, `hook` (where it was trained),
                `first_position` (1; of a run that of its first row), and `bos`, the token id in front of each prompt of a run
                that was captured without position 0.

        Raises:
            InvalidInput: a field cannot be used.
            NotReleased: the prompts are too few, or one has too many of the tokens.
            InReview: a reviewer must decide, as about an autoencoder that no job of the vault trained.
        """
        return self.submit_sae_cross_entropy(sae, prompts, **options).result()

    def submit_graph(self, module: Any, data: Any, labels: Any = None, **options: Any) -> JobFuture[list[Any]]:
        """As `graph`, without waiting."""
        job = jobs.graph_job(module, data, labels, **options)
        return self.submit_job(job, lambda answers, made: list(answers))

    def graph(
        self,
        module: Any,
        data: Any,
        labels: Any = None,
        *,
        test: Any = None,
        learning_rate: float | None = None,
        batch_rows: int = 1024,
    ) -> list[Any]:
        """Train and measure a torch module of your own in the vault; what trusted metrics say of its outputs.

        The module is traced here, so this needs PyTorch here. It takes activations (rows, d_model), and labels (rows) if
        `labels` is given, and returns a dict of some of `loss`, `reconstruction`, `codes`, `scores`, `statistic`.

        Args:
            module: a `torch.nn.Module`; it is not changed, its trained parameters stay in the vault.
            data: rows to train on, such as `train[hook]`.
            labels: a label of them.
            test: other rows of the same hook to measure on, such as `test[hook]`.
            learning_rate: of Adam, in one pass; nothing is trained without it.
            batch_rows: rows a step.

        Raises:
            InvalidInput: PyTorch is not installed here.
            GraphRefused: the module uses what the vault does not allow.
            InReview: it has a `statistic`, which a reviewer must see first.
        """
        options = {"test": test, "learning_rate": learning_rate, "batch_rows": batch_rows}
        return self.submit_graph(module, data, labels, **options).result()

    def twin(self, run: RemoteRun, *, seed: int = 0, max_bytes: int = 64_000_000) -> Lake:
        """A lake on this machine with random rows under the run's name, hooks, width and labels, to try code on.

        Nothing of it comes from the vault but what the run's description says. Errors show in full, nothing is charged.
        Needs what `millpond.open` needs. See `millpond.hub.client.twin`.
        """
        from millpond.hub.client.twin import make_twin

        return make_twin(run.view, seed=seed, max_bytes=max_bytes)

    def close(self) -> None:
        """End the session; jobs go on."""
        self.connection.close()

    def __enter__(self) -> RemoteLake:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _facts(self) -> list[tuple[str, str]]:
        session = f"{self.connection.charged:,} bytes charged, {self.left_text()}"
        held = [(view.name, "; ".join(value for _, value in self._run(view).facts())) for view in self._views.values()]
        return [("project", self.project), ("session", session), *sorted(held)]

    def _run(self, view: RunView) -> RemoteRun:
        return RemoteRun(self, RowSet(run=view.handle))

    def __repr__(self) -> str:
        known = "" if self._listed else " looked at so far"
        return (
            f"<RemoteLake {self.url!r}, project {self.project!r}: {len(self._views)} runs{known}, {self.left_text()}>"
        )

    def _repr_html_(self) -> str:
        return html_table(f"Lake behind {self.url}", self._facts())
