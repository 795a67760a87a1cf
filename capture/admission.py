"""Whether an engine can do what a request asks of Millpond, checked before the request is scheduled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from millpond.capture.edits import BankRows, Edits
from millpond.capture.reads import Readers
from millpond.store.capture_spec import RequestArgs
from millpond.store.errors import InvalidInput
from millpond.store.hooks import KINDS, Hook, match_hooks
from millpond.store.interventions import Intervention, Patch, SpliceSae
from millpond.store.lake import Lake, open_lake
from millpond.store.manifest import RunSpec
from millpond.store.near_names import near
from millpond.store.reprs import human_bytes

_SETTINGS = {
    "lake", "run", "hooks", "request_bytes", "queue_bytes", "commit_seconds",
    "device_taps", "staging_rows", "edits_per_token", "vectors_per_request", "saes", "latents_per_request",
}  # fmt: skip


@contextmanager
def naming(field: str) -> Iterator[None]:
    """What is refused inside is refused with the field's name."""
    try:
        yield
    except InvalidInput as error:
        raise type(error)(f"{field}: {error}") from error


def model_hooks(patterns: Iterable[str], n_layers: int, where: str = "the model offers") -> tuple[str, ...]:
    """The hook points of a model of `n_layers` layers that any of `patterns` (names or globs) selects.

    Raises:
        HookNotCaptured: a pattern selects nothing.
    """
    every = [str(Hook(layer, kind)) for layer in range(n_layers) for kind in KINDS]
    return match_hooks(patterns, every, where)


def _on_device(settings: Mapping[str, Any]) -> bool:
    """Whether taps are to be part of the model's graphs; on a GPU they have to be."""
    asked = settings.get("device_taps")
    if asked is True:
        return True
    from vllm.platforms import current_platform

    if asked is not None and (asked is not False or not current_platform.is_cpu()):
        raise InvalidInput(f"additional_config['millpond'] has device_taps {asked!r}; on a GPU leave it out")
    return not current_platform.is_cpu()


def _count(settings: Mapping[str, Any], name: str, default: int) -> int:
    value = settings.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise InvalidInput(f"additional_config['millpond'] has {name} {value!r}; give a whole number from 0")
    return value


def _saes(settings: Mapping[str, Any], hooks: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """The hook points and names of `saes`, a list of objects with `hook` (or a glob) and `artifact`."""
    found: list[tuple[str, str]] = []
    for one in settings.get("saes", ()):
        if not isinstance(one, Mapping) or set(one) != {"hook", "artifact"}:
            raise InvalidInput(f"additional_config['millpond'] has {one!r} among saes; give a hook and an artifact")
        for hook in match_hooks(one["hook"], hooks, "saes: the engine has taps at"):
            found.append((hook, str(one["artifact"])))
    return tuple(dict.fromkeys(found))


@dataclass(frozen=True)
class EngineFacts:
    """What an engine with taps can do: from `additional_config["millpond"]` and the model's configuration."""

    lake_url: str | None
    run: str | None
    """Where requests go that name no run."""
    hooks: tuple[str, ...]
    """Hook points that have a tap."""
    d_model: int
    dtype: str
    request_bytes: int
    """Most bytes of activations that one request may keep until it ends."""
    queue_bytes: int
    commit_seconds: float | None
    on_device: bool = False
    """Whether taps are part of the model's graphs, as on CUDA, and work on buffers of a fixed size."""
    max_tokens: int = 0
    """Most tokens of one step, padding included."""
    staging_rows: int = 0
    """Rows of the staging ring of each hook, where taps are on the device."""
    edits_per_token: int = 0
    """Most interventions of one request at one hook, where taps are on the device; 0 leaves them out of the graphs."""
    vectors_per_request: int = 0
    """Most vectors and stored rows that the interventions of one request need, where taps are on the device."""
    saes: tuple[tuple[str, str], ...] = ()
    """Hook points and the SAEs that may be spliced in there, where taps are on the device."""
    latents_per_request: int = 0
    """Most latents of one SAE that a request edits, where taps are on the device."""
    max_requests: int = 1
    clients: int = 1
    """Processes that admit requests to it."""
    patience_seconds: float | None = None
    """How long a store over a network is waited for; by default as long as the store does."""

    @property
    def bank_rows(self) -> int:
        """Vectors that fit into device memory: every request of a step has its share, so no request waits for room."""
        return self.max_requests * self.vectors_per_request

    @classmethod
    def of(cls, vllm_config: Any) -> EngineFacts:
        """The facts of the engine with this configuration.

        Raises:
            InvalidInput: the engine was not started with Millpond's settings.
        """
        additional = vllm_config.additional_config
        settings = additional.get("millpond") if isinstance(additional, Mapping) else None
        if not isinstance(settings, Mapping) or not settings.get("hooks"):
            raise InvalidInput(
                "the engine has no Millpond settings; start it with millpond serve, or with --worker-cls "
                'millpond.capture.worker.TapWorker --additional-config \'{"millpond": {"lake": ..., "hooks": [...]}}\''
            )
        unknown = set(settings) - _SETTINGS
        if unknown:
            meant = near(min(unknown), _SETTINGS)
            remedy = f"did you mean {meant!r}?" if meant else "leave it out"
            raise InvalidInput(f"additional_config['millpond'] has {min(unknown)!r}, which is no setting; {remedy}")
        model = vllm_config.model_config
        hooks = model_hooks(settings["hooks"], model.hf_text_config.num_hidden_layers)
        scheduler = vllm_config.scheduler_config
        # a batch is padded to the size of a recorded graph
        max_tokens = max(
            scheduler.max_num_batched_tokens, vllm_config.compilation_config.max_cudagraph_capture_size or 0
        )
        return cls(
            lake_url=settings.get("lake"),
            run=settings.get("run"),
            hooks=hooks,
            d_model=model.get_hidden_size(),
            dtype=str(model.dtype).removeprefix("torch."),
            request_bytes=int(settings.get("request_bytes", 1 << 30)),
            queue_bytes=int(settings.get("queue_bytes", 1 << 30)),
            commit_seconds=settings.get("commit_seconds"),
            on_device=_on_device(settings),
            max_tokens=max_tokens,
            staging_rows=_count(settings, "staging_rows", 2 * scheduler.max_num_batched_tokens),
            edits_per_token=_count(settings, "edits_per_token", 1),
            vectors_per_request=_count(settings, "vectors_per_request", 8),
            saes=_saes(settings, hooks),
            latents_per_request=_count(settings, "latents_per_request", 8),
            max_requests=scheduler.max_num_seqs,
            clients=vllm_config.parallel_config._api_process_count,
        )

    @cached_property
    def lake(self) -> Lake | None:
        """The engine's lake."""
        if not self.lake_url:
            return None
        options: dict[str, Any] = {}
        if self.patience_seconds is not None and self.lake_url.startswith("s3"):
            options["retry_timeout_s"] = self.patience_seconds
        return open_lake(self.lake_url, **options)

    @cached_property
    def edits(self) -> Edits:
        """Makes this engine's edits."""
        return Edits(self.lake, self.d_model)

    @cached_property
    def _edit(self) -> Callable[[Intervention, str, int], Any]:
        return lru_cache(maxsize=256)(self.edits.make)

    @cached_property
    def _rows(self) -> Callable[[Any, str, int], BankRows]:
        return lru_cache(maxsize=256)(self.edits.rows)

    @cached_property
    def readers(self) -> Readers:
        """Makes what computes this engine's reads."""
        return Readers(self.lake, self.d_model, self.dtype, self.edits.sae)

    @cached_property
    def _specs(self) -> dict[str, RunSpec]:
        return {}

    def run_spec(self, name: str | None) -> RunSpec:
        """The run that a request naming `name` goes to.

        Raises:
            InvalidInput: there is none, or this engine cannot fill it.
        """
        name = name or self.run
        if name is None or self.lake is None:
            raise InvalidInput("capture.run is missing, and the engine has no run of its own; name one")
        spec = self._specs.get(name)
        if spec is None:
            spec = self._specs[name] = self.lake.spec(name)
        missing = [hook for hook in (*spec.hooks, *(read.hook for read in spec.reads)) if hook not in self.hooks]
        if missing:
            raise InvalidInput(
                f"run {name!r} keeps or reads {missing[0]}, where this engine has no tap; start it with that hook"
            )
        if (spec.d_model, spec.dtype) != (self.d_model, self.dtype):
            raise InvalidInput(
                f"run {name!r} is for d_model {spec.d_model} and {spec.dtype}, the engine has {self.d_model} and {self.dtype}"
            )
        for read in spec.reads:
            self.readers.make(read)
        return spec

    def check(self, args: RequestArgs, n_prompt: int, max_new_tokens: int) -> None:
        """Check a request of `n_prompt` prompt tokens that may generate `max_new_tokens`.

        Raises:
            InvalidInput: the engine cannot do what it asks; the message names the field.
        """
        at_hook: Counter[str] = Counter()
        banked: set[BankRows] = set()
        spliced: set[str] = set()
        for number, intervention in enumerate(args.intervene):
            length = n_prompt if isinstance(intervention, Patch) else 0
            for hook in match_hooks(intervention.hook, self.hooks, "intervene: the engine has taps at"):
                if not self.on_device or isinstance(intervention, SpliceSae):
                    with naming(f"intervene.{number}"):
                        self._edit(intervention, hook, length)
                if self.on_device and isinstance(intervention, SpliceSae):
                    if hook in spliced or at_hook[hook]:
                        raise InvalidInput(
                            f"intervene: an sae at {hook} comes after another intervention; where taps are on the device "
                            "it has to be the first and only one of its kind at a hook point"
                        )
                    self._check_splice(intervention, hook)
                    spliced.add(hook)
                elif self.on_device:
                    with naming(f"intervene.{number}"):
                        banked.add(self._rows(intervention, hook, length))
                    at_hook[hook] += 1
            if (
                self.on_device
                and intervention.token_ids is not None
                and intervention.positions not in ("prompt", "last")
            ):
                raise InvalidInput(
                    "intervene.token_ids: generated tokens are known on the device only; set positions to 'prompt' or 'last'"
                )
        for field, limit, found in (
            ("edits_per_token", self.edits_per_token, max(at_hook.values(), default=0)),
            ("vectors_per_request", self.vectors_per_request, sum(rows.count for rows in banked)),
        ):
            if self.on_device and found > limit:
                raise InvalidInput(
                    f"intervene: the request needs {field} {found}, the engine has {limit}; start it with more"
                )
        if args.capture is None:
            return
        spec = self.run_spec(args.capture.run)
        if args.capture.hooks is not None:
            named = match_hooks(args.capture.hooks, self.hooks, "capture.hooks: the engine has taps at")
            if named != spec.hooks:
                raise InvalidInput(
                    f"capture.hooks selects {len(named)} hooks, but run {spec.name!r} keeps {len(spec.hooks)}; "
                    "leave hooks out or capture into another run"
                )
        if args.capture.reads is not None and self.readers.resolve(args.capture.reads, self.hooks) != spec.reads:
            held = ", ".join(read.name for read in spec.reads) or "nothing"
            raise InvalidInput(
                f"capture.reads asks for other reads than run {spec.name!r} has ({held}); leave reads out or capture into "
                "another run"
            )
        computed = n_prompt + max(max_new_tokens - 1, 0)
        beyond = args.capture.out_of_reach(n_prompt, computed)
        if beyond is not None:
            raise InvalidInput(
                f"capture.positions: {beyond} is outside the request, which has {n_prompt} prompt tokens"
            )
        rows = len(args.capture.select(n_prompt, 0, computed))
        size = rows * spec.row_bytes()
        if size > self.request_bytes:
            raise InvalidInput(
                f"the request may keep {human_bytes(size)} of activations until it ends; the engine's request_bytes allows "
                f"{human_bytes(self.request_bytes)}: ask for fewer positions or tokens"
            )

    def _check_splice(self, splice: SpliceSae, hook: str) -> None:
        """Check a splice where taps are on the device."""
        if (hook, splice.artifact) not in self.saes:
            raise InvalidInput(
                f"intervene: the engine's graphs have no SAE {splice.artifact!r} at {hook}; start it with "
                f"{{\"hook\": {hook!r}, \"artifact\": {splice.artifact!r}}} among additional_config['millpond']['saes'] "
                f"(millpond serve: --saes {hook}={splice.artifact})"
            )
        edited = len({*splice.set_latents, *splice.scale_latents})
        if edited > self.latents_per_request:
            raise InvalidInput(
                f"intervene: the request edits {edited} latents of {splice.artifact!r}, the engine has latents_per_request "
                f"{self.latents_per_request}; start it with more"
            )
