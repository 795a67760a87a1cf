"""One project's way to its runs, labels and artifacts in the lake: handles in, data out. Nothing of it may be sent.

Labels that clients add are kept under their project's mark, so that projects that share a run do not see each other's.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from millpond.hub.kinds.base import Job, Made, RowSet
from millpond.hub.kinds.generate import GenerateJob
from millpond.hub.kinds.sae_cross_entropy import SaeCrossEntropyJob
from millpond.hub.policy import Policy
from millpond.hub.projection import prompt_columns
from millpond.hub.projects import Held, HeldKind, Projects
from millpond.store.errors import Cancelled, InvalidInput, LabelNotFound, NotHeld, TooFewPrompts
from millpond.store.objects import open_storage

if TYPE_CHECKING:
    from millpond.analysis.expressions import Expression
    from millpond.store.artifacts import Artifact
    from millpond.store.lake import Lake
    from millpond.store.run import Run

Pins = Mapping[str, Mapping[str, str]]
"""Run handle to label as the client calls it to label and version in the lake."""
_MARK = re.compile(r"p[0-9a-f]{12}_(?=.)")
_INDEX = ("prompt", "position", "token_id")


def label_mark(project: str) -> str:
    """What the project's own labels begin with in the lake."""
    return f"p{hashlib.sha256(project.encode()).hexdigest()[:12]}_"


def visible_labels(run: Run, project: str) -> dict[str, str]:
    """The labels that the project may know of: its own, and those that came with the run; as it calls them."""
    mark = label_mark(project)
    found = {name: name for name in map(str, run.labels) if not _MARK.match(name)}
    return found | {name.removeprefix(mark): name for name in map(str, run.labels) if name.startswith(mark)}


@dataclass
class Vault:
    """What a project's jobs may read."""

    lake: Lake
    projects: Projects
    policy: Policy
    project: str
    job: str = ""
    """The id of the job that runs."""
    pins: Pins | None = None
    """The labels' versions when the job was submitted; the newest without."""
    stop: threading.Event | None = None
    """Set when the job was cancelled or is another executor's."""
    dictionary: Path | None = None
    """What texts are coded with."""
    figures: bool = False
    """Whether those who may see the job may see how its training does; the job says so, by the rules."""
    written: list[str] = field(default_factory=list)
    """Where prompts were written that a job brought, which has not been taken yet."""
    _runs: dict[str, tuple[Held, Run]] = field(default_factory=dict)

    def at(self, pins: Pins) -> Vault:
        """The same with labels at other versions."""
        return replace(self, pins=pins)

    def check(self) -> None:
        """Called now and then by what takes long.

        Raises:
            Cancelled: the job is not this process' any more.
        """
        if self.stop is not None and self.stop.is_set():
            raise Cancelled(f"job {self.job} was stopped")

    def held(self, kind: HeldKind, handle: str) -> Held:
        """What the project holds under a handle in hexadecimal digits.

        Raises:
            NotHeld: nothing.
        """
        try:
            return self.projects.find(self.project, kind, bytes.fromhex(handle))
        except ValueError as error:
            if isinstance(error, NotHeld):
                raise
            raise NotHeld(f"project {self.project!r} holds no {kind} of that handle") from None

    def run(self, handle: str) -> Run:
        """The run."""
        return self._run(handle)[1]

    def run_held(self, handle: str) -> Held:
        """What the project knows of the run."""
        return self._run(handle)[0]

    def rows(self, rows: RowSet) -> Run:
        """The rows as a view of their run, which must be sealed."""
        view = self.run(rows.run)
        view.check_sealed()
        if rows.where is not None:
            view = view.select(where=self._condition(rows.run, rows.where))
        if rows.split is not None and rows.part is not None:
            parts = view.split(rows.split.test, rows.split.seed, by=rows.split.by)
            view = parts[rows.part == "test"]
        fewest = self._fewest(rows.run)
        if len(view.prompts) < fewest:
            raise TooFewPrompts(f"fewer than {fewest} restricted prompts are selected; change where")
        if not len(view):
            raise InvalidInput("no row is selected; change where")
        return view

    def stored_rows(self, rows: RowSet) -> dict[str, Any]:
        """The same rows as a capture worker finds them in the lake; no row is looked at here."""
        found: dict[str, Any] = {"run": self.run_held(rows.run).target, "fewest": self._fewest(rows.run)}
        if rows.where is not None:
            found["where"] = self._condition(rows.run, rows.where)
        if rows.split is not None and rows.part is not None:
            split = rows.split
            found |= {"test": split.test, "seed": split.seed, "by": split.by, "part": rows.part}
        return found

    def _fewest(self, run: str) -> int:
        """Prompts of the run that a selection must have."""
        # none, one or a few: that they differ would say whether somebody's prompt is there
        own = self.run_held(run).detail.get("prompts") == "own"
        return 0 if own else self.policy.disclosure.min_prompts

    def label(self, run: str, name: str) -> str:
        """The label and version in the lake that the project calls `name`.

        Raises:
            LabelNotFound: it may know of none.
        """
        if self.pins is not None:
            found = self.pins.get(run, {}).get(name)
            if found is None:
                raise LabelNotFound(f"label {name!r} was not there when the job was submitted")
            return found
        plain, _, version = name.partition("@")
        held = visible_labels(self.run(run), self.project)
        if plain not in held:
            raise LabelNotFound(f"label {plain!r} is not in the run, which has {', '.join(sorted(held)) or 'none'}")
        versions = self.run(run).labels.versions(held[plain])
        number = int(version) if version.isdigit() else versions[-1]
        if number not in versions:
            raise LabelNotFound(f"label {plain!r} has no version {version}")
        return f"{held[plain]}@{number}"

    def pin(self, job: Job) -> dict[str, dict[str, str]]:
        """The labels that `job` reads, at their newest versions.

        Raises:
            LabelNotFound: one is not there.
        """
        found: dict[str, dict[str, str]] = {}
        for run, name in job.labels_read():
            found.setdefault(run, {})[name] = self.label(run, name)
        for run, names in self._named_in_conditions(job):
            held = visible_labels(self.run(run), self.project)
            for name in names:
                if name.partition("@")[0] in held:
                    found.setdefault(run, {})[name] = self.label(run, name)
        return found

    def check_columns(self, job: Job) -> None:
        """Check that conditions and splits name labels that the project may know of, and columns of the prompts.

        Raises:
            InvalidInput: one does not; labels of another project are as if there were none.
        """
        from millpond.store.expression import Expression as Condition

        for rows in job.row_sets():
            run = self.run(rows.run)
            if run.state != "sealed":
                continue
            columns = set(prompt_columns(run))
            if rows.split is not None and rows.split.by is not None and rows.split.by not in columns:
                raise InvalidInput(f"split.by is {rows.split.by!r}; the prompts have {', '.join(sorted(columns))}")
            if rows.where is not None:
                known = {*columns, *_INDEX, *visible_labels(run, self.project)}
                names = {name.partition("@")[0] for name in Condition(rows.where).names}
                if names - known:
                    raise InvalidInput(f"where names {min(names - known)!r}; there are {', '.join(sorted(known))}")

    def expression(self, given: Expression) -> Expression:
        """The expression over the lake's names."""
        wire = given.to_wire()

        def rename(value: Any) -> Any:
            if isinstance(value, list):
                return [rename(one) for one in value]
            if not isinstance(value, dict):
                return value
            changed = {name: rename(one) for name, one in value.items()}
            if changed.get("op") == "label":
                changed["name"] = self.label(given.run, changed["name"])
            if isinstance(changed.get("by"), str):
                changed["by"] = self.label(given.run, changed["by"])
            return changed

        return type(given).from_wire(rename(wire) | {"run": self.run(given.run).name})

    def artifact(self, handle: str) -> Mapping[str, Any]:
        """What the artifact was kept with."""
        return self.held("artifact", handle).detail

    def load(self, handle: str) -> Artifact:
        """The artifact itself."""
        from millpond.store.artifacts import load_artifact

        return load_artifact(self.lake, self.held("artifact", handle).target)

    def keep(
        self, kind: str, tensors: Any, config: Mapping[str, Any], shape: tuple[int, ...], job: Job, run: str
    ) -> Made:
        """Keep an artifact that `job` made from the run of that handle.

        A job that is run again, after a kill, finds what it kept before.
        """
        from millpond.store.artifacts import load_artifact, save_artifact

        target = f"job-{self.job}"
        provenance = {
            "job": self.job, "project": self.project, "spec": job.model_dump(mode="json"), "pins": dict(self.pins or {}),
        }  # fmt: skip
        try:
            save_artifact(self.lake, target, kind, tensors, config=config, provenance=provenance)  # type: ignore[arg-type]
        except InvalidInput:
            if load_artifact(self.lake, target).provenance.get("job") != self.job:
                raise
        detail = {"kind": kind, "shape": list(shape), "job": self.job}
        return Made("artifact", f"{kind}-{self.job}", target, self.run_held(run).model, detail)

    def d_model(self, run: str) -> int:
        """See `kinds.base.Facts`, of which this is one."""
        return self.run(run).d_model

    def hooks(self, run: str, asked: tuple[str, ...]) -> tuple[str, ...]:
        """See `kinds.base.Facts`."""
        return self.run(run).match(asked)

    def groups(self, run: str, label: str) -> int:
        """See `kinds.base.Facts`."""
        import numpy as np

        return len(np.unique(self.run(run).labels[self.label(run, label)].values))

    def width(self, run: str, column: Any) -> int:
        """See `kinds.base.Facts`."""
        from millpond.analysis import expressions as ex

        given = ex.Expression(run=run, reduce=ex.Mean(of=column))
        return ex.width_of(self.expression(given).reduce.of, self.run(run))

    def prompts(self, prompts: str, by: str | None) -> tuple[int, int]:
        """See `kinds.base.Facts`."""
        count = int(self.held("prompts", prompts).detail["prompts"])
        return count, 0 if by is None else len(set(self.prompt_column(prompts, by)))

    def prompt_column(self, prompts: str, column: str) -> list[str]:
        """A further column of the prompts of that handle, as texts.

        Raises:
            InvalidInput: they have none of that name.
        """
        held = self.held("prompts", prompts)
        if column not in held.detail["columns"]:
            raise InvalidInput(f"by: the prompts have no column {column!r}; name one that was sent with them")
        folder, _, name = held.target.rpartition("/")
        lines = open_storage(folder).get(name).decode().splitlines()
        return [str(json.loads(line)[column]) for line in lines]

    def statistic(self, graph: str, d_model: int) -> int:
        """See `kinds.base.Facts`."""
        from millpond.hub.graph import MAX_STATISTIC, dry_run, parse_graph

        parsed = parse_graph(graph)
        dry_run(parsed, d_model)
        return MAX_STATISTIC if "statistic" in parsed.outputs else 0

    def data(self, job: Job) -> dict[str, str]:
        """What stands behind the handles that the job names: runs by their ids, artifacts by their jobs. Neither changes."""
        found = {}
        for kind, handle in job.needs():
            held = self.held(kind, handle)
            found[handle] = self.run(handle).plan.spec.id if kind == "run" else f"{kind}:{held.target}"
        return found

    def subject(self, job: Job) -> str:
        """The run whose rows the job's answers are about, by its id in the lake, which all projects share; or a model.

        Of several runs, such as those that an artifact was fitted to and is evaluated on, the one of restricted prompts.
        """
        if isinstance(job, GenerateJob):
            return f"model:{job.model}"
        if isinstance(job, SaeCrossEntropyJob) and not isinstance(job.prompts, RowSet):
            return f"model:{self.model_of(job)}"
        runs = [rows.run for rows in job.row_sets()]
        for kind, handle in job.needs():
            if kind == "artifact":
                made_by = self.load(handle).provenance.get("spec")
                runs += [(made_by.get("train") or made_by["rows"])["run"]] if made_by else []
        if not runs:
            raise InvalidInput("the job is about no run")
        first = min(runs, key=lambda run: self.run_held(run).detail.get("prompts") == "own")
        return self.run(first).plan.spec.id

    def models(self, job: Job) -> tuple[str, ...]:
        """The models whose budgets the job's answers are charged to: those of everything that it reads."""
        found = {self.held(kind, handle).model for kind, handle in job.needs()}
        if isinstance(job, GenerateJob):
            found |= {job.model, job.judging_model() or job.model}
        if isinstance(job, SaeCrossEntropyJob):
            found.add(self.model_of(job))
        return tuple(sorted(found - {""})) or tuple(self.policy.models)

    def model_of(self, job: SaeCrossEntropyJob) -> str:
        """The policy's name of the model that the job runs."""
        return job.model or self.held("artifact", job.artifact).model

    def _run(self, handle: str) -> tuple[Held, Run]:
        if handle not in self._runs:
            held = self.held("run", handle)
            self._runs[handle] = (held, self.lake[held.target])
        return self._runs[handle]

    def _named_in_conditions(self, job: Job) -> Iterator[tuple[str, set[str]]]:
        from millpond.store.expression import Expression as Condition

        for rows in job.row_sets():
            if rows.where is not None:
                yield rows.run, Condition(rows.where).names - set(_INDEX)

    def _condition(self, run: str, text: str) -> str:
        """The condition over the lake's names: a label `x` becomes `mark_x @ 3`."""
        from millpond.store.expression import Expression as Condition

        names = {name for name in Condition(text).names if name not in _INDEX}
        if self.pins is not None:  # a label of the name of a prompt's column may have come since
            pinned = {name: label for name, label in self.pins.get(run, {}).items() if name in names}
        else:
            held = visible_labels(self.run(run), self.project)
            pinned = {name: self.label(run, name) for name in names if name.partition("@")[0] in held}
        hidden = [name for name in names - set(pinned) if _MARK.match(name)]
        if hidden:
            raise LabelNotFound(f"label {hidden[0]!r} is not in the run")
        tree = _Rename(pinned).visit(ast.parse(text.strip(), mode="eval"))
        return ast.unparse(tree)


class _Rename(ast.NodeTransformer):
    def __init__(self, names: Mapping[str, str]) -> None:
        self.names = names

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        """`name @ version`."""
        if (
            isinstance(node.op, ast.MatMult)
            and isinstance(node.left, ast.Name)
            and isinstance(node.right, ast.Constant)
        ):
            return self._versioned(f"{node.left.id}@{node.right.value!r}", node)
        return self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        """A name alone."""
        return self._versioned(node.id, node)

    def _versioned(self, name: str, node: ast.expr) -> ast.expr:
        if name not in self.names:
            return node
        label, _, version = self.names[name].partition("@")
        return ast.BinOp(ast.Name(label, ast.Load()), ast.MatMult(), ast.Constant(int(version)))
