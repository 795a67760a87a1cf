"""The policy file: what may be released, and how many bytes may leave. Docs: docs/gate.md.

The bounds of each field are the floor: they are code, so a configuration can be stricter than they are and never laxer.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from millpond.store.errors import InvalidInput

SCOPES = ("user_week", "project", "lifetime")
"""The budgets of each model: of a user in a week, of a project, of everybody for ever."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Disclosure(_Section):
    """What a result must be like to leave (`[disclosure]`)."""

    vector_bits: int = Field(default=6, ge=2, le=6)
    """Bits a coordinate of a direction, whatever its standard error."""
    digits: int = Field(default=3, ge=1, le=3)
    """Significant digits of a number, where its standard error supports as many."""
    min_rows: int = Field(default=100, ge=20)
    """Rows behind a vector, and on restricted prompts behind any number."""
    min_variance_ratio: float = Field(default=0.05, ge=0.01, le=1)
    """Variance within a cohort over the run's at the hook; a cohort with less shows a row, not an average."""
    max_identical_share: float = Field(default=0.5, gt=0, le=0.5)
    """Largest share of a vector's cohort that may be one and the same row, repeated."""
    min_prompts: int = Field(default=20, ge=10)
    """Distinct prompts, near-duplicates counted once (restricted prompts)."""
    min_class: int = Field(default=10, ge=5)
    """Rows and distinct prompts of each class; smaller cells of tables are shown as 0 (restricted prompts)."""
    min_residual_dof: int = Field(default=10, ge=10)
    """Rows less fitted parameters (restricted prompts)."""
    max_parameters_per_row: float = Field(default=0.33, gt=0, le=0.5)
    """Fitted parameters over rows (restricted prompts)."""
    max_top_prompt_share: float = Field(default=0.1, gt=0, le=0.25)
    """Share of a cohort's rows that one distinct prompt may hold (restricted prompts)."""
    max_top_two_share: float = Field(default=0.9, gt=0, le=0.9)
    """Share of a cohort's rows that two distinct prompts may hold (restricted prompts)."""
    max_label_sets: int = Field(default=32, ge=1, le=64)
    """Different label sets released on cohorts that overlap by half or more (restricted prompts)."""
    count_base: int = Field(default=5, ge=5, le=100)
    """Counts are rounded to multiples of it (restricted prompts)."""


class Charges(_Section):
    """What a response costs beside its encoded body (`[charges]`)."""

    response_bytes: int = Field(default=16, ge=16)
    """For what a response says without its body: its length, status code, time slot and connection."""
    slot_ms: int = Field(default=100, ge=100)
    """A job's state becomes visible at the ends of slots; none is shorter."""
    slot_growth: float = Field(default=1 / 32, ge=1 / 64, le=1)
    """A slot lasts at least this fraction of the time since the job was submitted."""


class Budgets(_Section):
    """Caps as fractions of a model's `secret_bytes` (`[budgets]`)."""

    user_week: float = Field(default=2.5e-4, gt=0, le=1e-3)
    """Of one user in a week."""
    project: float = Field(default=0.01, gt=0, le=0.02)
    """Of one project, ever."""
    lifetime: float = Field(default=0.10, gt=0, le=0.25)
    """Of everybody, ever."""


class Jobs(_Section):
    """What one job may take (`[jobs]`)."""

    seconds: int = Field(default=6 * 3600, ge=1, le=7 * 86_400)
    """Time from when somebody takes it; it is ended then, and has failed."""


class ModelPolicy(_Section):
    """One model whose activations the vault holds (`[models.NAME]`)."""

    parameters: int = Field(gt=0)
    """How many the model has."""
    public: bool = False
    """Weights anybody can download: metered, not capped."""
    secret_bytes: int | None = Field(default=None, gt=0)
    """What there is to lose; by default half a byte a parameter, a 4-bit copy. A fine-tune of a public model declares its delta."""
    user_week_bytes: int | None = Field(default=None, gt=0)
    """These three replace the fractions."""
    project_bytes: int | None = Field(default=None, gt=0)
    """Of one project, ever."""
    lifetime_bytes: int | None = Field(default=None, gt=0)
    """Of everybody, ever."""

    @property
    def secret(self) -> int:
        """The denominator of the budgets, in bytes."""
        return self.secret_bytes or -(-self.parameters // 2)

    @model_validator(mode="after")
    def _floor(self) -> ModelPolicy:
        if self.secret > -(-self.parameters // 2):
            raise ValueError(
                f"secret_bytes is {self.secret:,}; at most half a byte a parameter, {self.parameters // 2:,}"
            )
        for scope in SCOPES:
            asked = getattr(self, f"{scope}_bytes")
            most = int(_highest(scope) * self.secret)
            if asked is not None and asked > most:
                raise ValueError(f"{scope}_bytes is {asked:,}; the floor allows at most {most:,}")
        return self


class Policy(_Section):
    """The whole file."""

    disclosure: Disclosure = Disclosure()
    charges: Charges = Charges()
    budgets: Budgets = Budgets()
    jobs: Jobs = Jobs()
    models: dict[str, ModelPolicy] = {}
    """By name."""

    def model(self, name: str) -> ModelPolicy:
        """The entry of model `name`.

        Raises:
            InvalidInput: there is none.
        """
        if name not in self.models:
            raise InvalidInput(f"model {name!r} is not in the policy file; it has {', '.join(self.models) or 'none'}")
        return self.models[name]

    def cap(self, model: str, scope: str) -> int | None:
        """Bytes that `scope` (`user_week`, `project`, `lifetime`) of `model` may let out; None for a public model."""
        entry = self.model(model)
        if entry.public:
            return None
        given: int | None = getattr(entry, f"{scope}_bytes")
        return given if given is not None else int(getattr(self.budgets, scope) * entry.secret)

    def ceiling(self, model: str, scope: str) -> int:
        """The highest cap that the floor allows, which two people may raise a budget to."""
        return int(_highest(scope) * self.model(model).secret)


def _highest(scope: str) -> float:
    return float(next(rule.le for rule in Budgets.model_fields[scope].metadata if hasattr(rule, "le")))


def read_policy(path: Path) -> Policy:
    """The policy in the TOML file `path`.

    Raises:
        InvalidInput: it cannot be read, has an unknown field, or asks for less than the floor.
    """
    try:
        return Policy.model_validate(tomllib.loads(path.read_text()))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidInput(f"the policy file {path} cannot be read: {error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"])) or "file"
        raise InvalidInput(f"policy file {path}: {field} is {first['input']!r}: {first['msg']}") from error
