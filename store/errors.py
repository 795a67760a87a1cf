"""Every exception that Millpond raises on purpose.

MillpondError
├── InvalidInput          what the caller gave cannot be used; nothing was changed
│   ├── HookNotCaptured   the run does not hold that hook point
│   ├── LabelNotFound     the run has no label of that name
│   ├── ReadNotFound      the run has no read of that name
│   ├── RunNotFound       the lake holds no run of that name
│   ├── ArtifactNotFound  the lake holds no artifact of that name
│   ├── RunExists         the lake already holds a run of that name
│   ├── RunBusy           another process captures into the run
│   ├── JobNotFound       the queue holds no job of that id
│   ├── NotHeld           the project holds nothing of that handle, whether or not another one does
│   ├── NotPermitted      the caller's role does not allow it
│   ├── TooMany           the user or project has as many jobs waiting as are allowed
│   ├── TooFewPrompts     fewer restricted prompts are selected than a result may show, or none
│   ├── MemoryTooSmall    a worker cannot hold what an analysis needs; nothing was run
│   ├── ClusterUnavailable a Dask cluster cannot be started or reached, or has no workers
│   ├── OneClass          labels hold one class where two are needed
│   ├── MissingLabels     rows or prompts have no label, or NaN
│   ├── UnknownPrompts    labels name prompts that the run does not have
│   ├── OverlappingGroups training and test part share prompts or groups
│   ├── GraphRefused      a graph has an operator, a shape or a cost that is not allowed
│   ├── PromptTooLong     a prompt does not fit the model's context
│   ├── TextVersionUnknown texts are coded under another version of the model than this side has
│   ├── QuotaExceeded     the lake's configuration, or a user's or project's quota, does not allow so many bytes
│   └── UnsafeStore       the store cannot keep the promises that several writers need
├── ActivationsStayInVault  only the vault may hold what was asked for; also an AttributeError
├── BudgetSpent           more bytes would leave than a cap allows; none did
├── Cancelled             the caller stopped it
├── CaptureFailed         a capture ended without all its rows; none of the failed rows are visible
├── GatewayRefused        the gateway did not take a request, or the job ended in an error
│   └── NotReleased       the release gate held a result back
│       └── InReview      a reviewer must decide about it first
├── GatewayUnavailable    the gateway cannot be reached, or speaks another version; also an OSError
├── IsolationFailed       a workspace cannot be locked down as promised; it was not started
├── LakeCorrupt           stored bytes or counts contradict the manifest
├── LeaseLost             another worker claimed the job, or it has ended
├── LedgerCorrupt         the ledger was changed by something else than the ledger
├── StorageFailed         the store cannot be reached, refuses or is full; also an OSError
└── RunOpen               the operation needs a sealed run
"""


class MillpondError(Exception):
    """Base of every exception raised on purpose; its text says what, the value, the limit and the remedy."""


class InvalidInput(MillpondError, ValueError):
    """What the caller gave cannot be used; nothing was changed."""


class HookNotCaptured(InvalidInput, KeyError):
    """The run does not hold that hook point."""

    __str__ = Exception.__str__  # KeyError would quote the message


class LabelNotFound(InvalidInput, KeyError):
    """The run has no label of that name."""

    __str__ = Exception.__str__


class ReadNotFound(InvalidInput, KeyError):
    """The run has no read of that name."""

    __str__ = Exception.__str__


class RunNotFound(InvalidInput, KeyError):
    """The lake holds no run of that name."""

    __str__ = Exception.__str__


class ArtifactNotFound(InvalidInput, KeyError):
    """The lake holds no artifact of that name."""

    __str__ = Exception.__str__


class RunExists(InvalidInput):
    """The lake already holds a run of that name."""


class RunBusy(InvalidInput):
    """Another process captures into the run."""


class JobNotFound(InvalidInput, KeyError):
    """The queue holds no job of that id."""

    __str__ = Exception.__str__


class NotHeld(InvalidInput, KeyError):
    """The project holds nothing of that handle, whether or not another one does."""

    __str__ = Exception.__str__


class NotPermitted(InvalidInput):
    """The caller's role does not allow it."""


class TooMany(InvalidInput):
    """The user has as many jobs waiting as are allowed; nothing was queued."""


class TooFewPrompts(InvalidInput):
    """Fewer restricted prompts are selected than a result may show, or none: it is not told which."""


class MemoryTooSmall(InvalidInput):
    """A worker cannot hold what an analysis needs; nothing was run."""


class ClusterUnavailable(InvalidInput):
    """A Dask cluster cannot be started or reached, or has no workers; nothing was run."""


class OneClass(InvalidInput):
    """Labels hold one class where two are needed."""


class MissingLabels(InvalidInput):
    """Rows or prompts have no label, or NaN."""


class UnknownPrompts(InvalidInput):
    """Labels name prompts that the run does not have."""


class OverlappingGroups(InvalidInput):
    """Training and test part share prompts or groups."""


class PromptTooLong(InvalidInput):
    """A prompt does not fit the model's context."""


class Cancelled(MillpondError):
    """The caller stopped it."""


class UnsafeStore(InvalidInput):
    """The store cannot keep the promises that several writers need."""


class TextVersionUnknown(InvalidInput):
    """Texts are coded under another version of the model than this side has."""


class QuotaExceeded(InvalidInput):
    """The lake's configuration does not allow so many bytes."""


class CaptureFailed(MillpondError):
    """A capture ended without all its rows; none of the failed rows are visible."""


class IsolationFailed(MillpondError):
    """A workspace, or the machine it is to run on, cannot be locked down as promised; it was not started."""


class LeaseLost(MillpondError):
    """Another worker claimed the job, or it has ended; whoever held it must stop."""


class LakeCorrupt(MillpondError):
    """Stored bytes or counts contradict the manifest."""


class StorageFailed(MillpondError, OSError):
    """The store cannot be reached, refuses or is full."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)
        if self.strerror is None and arguments:
            self.strerror = str(arguments[0])


class RunOpen(MillpondError):
    """The operation needs a sealed run."""


class GraphRefused(InvalidInput):
    """A graph has an operator, a shape or a cost that is not allowed."""


class BudgetSpent(MillpondError):
    """More bytes would leave than a cap allows; none did."""


class LedgerCorrupt(MillpondError):
    """The ledger was changed by something else than the ledger."""


class ActivationsStayInVault(MillpondError, AttributeError):
    """Only the vault may hold what was asked for."""


class GatewayRefused(MillpondError):
    """The gateway did not take a request, or the job ended in an error."""


class NotReleased(GatewayRefused):
    """The release gate held a result back."""


class InReview(NotReleased):
    """A reviewer must decide about a result before it leaves."""


class GatewayUnavailable(MillpondError, OSError):
    """The gateway cannot be reached, or speaks another version."""
