"""What a generation gives a client: rates with their groups' names, and texts that a reviewer let pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from millpond.hub.body import Texts
from millpond.hub.kinds.generate import GenerateJob, Judge
from millpond.store.errors import InvalidInput
from millpond.store.result import Result

if TYPE_CHECKING:
    import pandas as pd

    from millpond.hub.client.lake import RemotePrompts
    from millpond.hub.client.texts import TextReader


@dataclass(frozen=True)
class Generation:
    """A generation, as far as it was released."""

    rates: Result | None
    """`rates`, `rates_low` and `rates_high`: the share of completions that match, overall and then of each group, with its
    95 % interval; of a judge those of its first choice, then those of the next one. Of a probe also `scores`, `scores_low`
    and `scores_high`, the means. And the counts `rows` of completions and `prompts`, near-duplicates counted once. None
    without a score."""
    groups: tuple[str, ...]
    """The groups' names, in the order of the rates after the first."""
    texts: tuple[tuple[str, ...], ...] | None
    """The completions of each prompt; None if they were not asked for."""
    choices: tuple[str, ...] = ()
    """A judge's, in the order of the rates."""

    def table(self) -> pd.DataFrame:
        """The rates with their intervals, overall and by group; a judge's by choice, a probe's with the mean scores.

        Raises:
            InvalidInput: no score was asked for.
        """
        import pandas as pd

        if self.rates is None:
            raise InvalidInput("no rates were asked for; give a score")
        ends = {"": "", "low": "_low", "high": "_high"}
        values = {name or "rate": self.rates.values[f"rates{end}"] for name, end in ends.items()}
        if "scores" in self.rates.values:
            values |= {f"score_{name}".rstrip("_"): self.rates.values[f"scores{end}"] for name, end in ends.items()}
        parts = ["overall", *self.groups]
        if self.choices:
            index = pd.MultiIndex.from_product([self.choices, parts], names=["choice", "group"])
            return pd.DataFrame(values, index=index)
        return pd.DataFrame(values, index=parts)


def group_names(prompts: Any, by: str | None) -> tuple[str, ...]:
    """The names of the groups of the prompts' column `by`, in the order of the rates.

    Raises:
        InvalidInput: they were not sent with such a column from this session.
    """
    if by is None:
        return ()
    columns = getattr(prompts, "columns", {})
    if by not in columns:
        raise InvalidInput(
            f"by is {by!r}, which names a column of what lake.prompts(name, prompts) returned; it has "
            f"{', '.join(columns) or 'none'}"
        )
    return tuple(sorted({str(value) for value in columns[by]}))


def finished(
    job: GenerateJob, prompts: RemotePrompts | None, groups: tuple[str, ...], reader: TextReader, answers: Sequence[Any]
) -> Generation:
    """The generation that a job's answers are."""
    rates = next((one for one in answers if isinstance(one, Result)), None)
    coded = next((one.coded for one in answers if isinstance(one, Texts)), None)
    texts = None
    if coded is not None:
        n = job.sampling.n
        count = len(prompts.ids) if prompts is not None else len(job.prompts)
        flat = reader.decode(coded, count * n, job.text_bytes)
        texts = tuple(tuple(flat[start : start + n]) for start in range(0, count * n, n))
    return Generation(rates, groups, texts, job.score.choices if isinstance(job.score, Judge) else ())
