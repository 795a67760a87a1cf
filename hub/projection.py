"""What a client sees of a run: declared facts only, nothing that the model's outputs or the capture's course decided."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass

from millpond.store.errors import InvalidInput
from millpond.store.run import Run


@dataclass(frozen=True)
class RunView:
    """The typed projection of a run. Checksums, generated tokens and their number, times, and statistics are not in it."""

    handle: str
    """Random, 16 hexadecimal digits."""
    name: str
    """The project's own, given when the run was asked for."""
    state: str
    model: str
    """Its name in the policy file."""
    hooks: tuple[str, ...]
    d_model: int
    dtype: str
    prompts: int | None
    """None while the run is open."""
    rows: int | None
    """None while it is open, and where the model decided how many, by generating: that count is a result."""
    labels: tuple[str, ...]
    columns: tuple[str, ...] = ()
    """Columns of its prompts, by name, as conditions and splits take them; none while it is open."""

    @classmethod
    def parse(cls, data: bytes) -> RunView:
        """The view in canonical JSON.

        Raises:
            InvalidInput: it is not one.
        """
        try:
            found = json.loads(data)
            lists = {name: tuple(found[name]) for name in ("hooks", "labels", "columns")}
            return cls(**found | lists)
        except (ValueError, TypeError, KeyError) as error:
            raise InvalidInput(f"the body is no description of a run: {error}") from error


def project_run(run: Run, *, handle: bytes, name: str, model: str) -> RunView:
    """The projection of `run`, which the project calls `name`, of the policy file's `model`."""
    sealed = run.state == "sealed"  # while it is open, counts tell how the capture goes
    return RunView(
        handle=handle.hex(),
        name=name,
        state=run.state,
        model=model,
        hooks=tuple(run.hooks),
        d_model=run.d_model,
        dtype=run.dtype,
        prompts=len(run.prompts) if sealed else None,
        rows=run.n_rows if sealed and not _may_generate(run) else None,
        labels=tuple(sorted(map(str, run.labels))),
        columns=prompt_columns(run) if sealed else (),
    )


def prompt_columns(run: Run) -> tuple[str, ...]:
    """The names of a sealed run's prompt columns; that of the checksums is not told."""
    return tuple(sorted({*map(str, run.prompts.columns)} - {"sha256"}))


def new_handle() -> bytes:
    """A random name of 8 bytes for a run, a job, an artifact or a release."""
    return secrets.token_bytes(8)


def _may_generate(run: Run) -> bool:
    """Whether the run's declaration leaves its number of rows to the model; so too if it has none that says otherwise."""
    job = run.provenance.get("capture")
    capture = job.get("capture") if isinstance(job, dict) else None
    return not (isinstance(capture, dict) and capture.get("max_new_tokens") == 0)
