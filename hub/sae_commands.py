"""The commands `millpond sae`: those of analysis, and the evaluation inside the engine that serves the model."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from millpond.analysis.sae.commands import SaeExport, SaeShow, SaeTrain, job_of, print_result

if TYPE_CHECKING:
    from millpond.analysis.sae.estimator import Sae
    from millpond.analysis.sae.recovered import SplicedModel

Engine = Literal["vllm", "transformers"]


@dataclass(frozen=True)
class SaeEval:
    """Evaluate a trained autoencoder on the held-out part of its run."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder that `millpond sae train` wrote."""
    model: Path | None = None
    """Hugging Face folder of the model: also measure the cross-entropy recovered."""
    prompts: int = 50
    """Prompts for that."""
    bos: int | None = None
    """Token id in front of each prompt, where capture left position 0 out."""
    engine: Engine = "vllm"
    """What runs the model: vLLM with capture's `sae` intervention, for autoencoders; or transformers, in float32 and
    prompt by prompt, for transcoders too."""
    dtype: str = "auto"
    """Of the model in vLLM; auto: as it is stored."""

    def run(self) -> int:
        """Print the values, and keep them in the folder."""
        from millpond.analysis.sae.estimator import Sae
        from millpond.analysis.sae.job import evaluate, keep_values, parts, rows_of

        job = job_of(self.folder)
        sae = Sae.load(self.folder)
        _, test = parts(job)
        print_result(evaluate(sae, rows_of(job, test), self.folder))
        if self.model is not None:
            from millpond.analysis.sae.recovered import cross_entropy_recovered
            from millpond.store.prompt_tokens import prompts_of

            found = prompts_of(test, self.bos, self.prompts)
            first = int(test.tokens["position"][:1].compute()[0])
            with self.opened(sae, longest=max(map(len, found), default=0)) as model:
                result = cross_entropy_recovered(sae, model, found, first_position=first)
            print_result(result)
            keep_values(self.folder / "cross_entropy.json", result)
        return 0

    def opened(self, sae: Sae, longest: int) -> AbstractContextManager[SplicedModel]:
        """The model, for prompts of at most `longest` tokens."""
        assert self.model is not None
        if self.engine == "transformers":
            from millpond.analysis.sae.recovered import HuggingFaceModel

            return nullcontext(HuggingFaceModel(self.model))
        from millpond.hub.recovered import VllmModel

        return VllmModel(self.model, sae, dtype=self.dtype, max_model_len=longest + 1)  # it generates one token


@dataclass(frozen=True)
class SaeCommand:
    """Train, evaluate, look at and export sparse autoencoders."""

    command: tyro.conf.OmitSubcommandPrefixes[
        tyro.conf.OmitArgPrefixes[
            Annotated[SaeTrain, tyro.conf.subcommand("train")]
            | Annotated[SaeEval, tyro.conf.subcommand("eval")]
            | Annotated[SaeShow, tyro.conf.subcommand("show")]
            | Annotated[SaeExport, tyro.conf.subcommand("export")]
        ]
    ]

    def run(self) -> int:
        """Run the subcommand."""
        return self.command.run()
