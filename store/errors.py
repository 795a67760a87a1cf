"""Every exception that Millpond raises on purpose.

MillpondError
├── InvalidInput          what the caller gave cannot be used; nothing was changed
│   ├── HookNotCaptured   the run does not hold that hook point
│   ├── LabelNotFound     the run has no label of that name
│   ├── RunNotFound       the lake holds no run of that name
│   ├── ArtifactNotFound  the lake holds no artifact of that name
│   ├── RunExists         the lake already holds a run of that name
│   ├── PromptTooLong     a prompt does not fit the model's context
│   ├── QuotaExceeded     the lake's configuration does not allow so many bytes
│   └── UnsafeStore       the store cannot keep the promises that several writers need
├── CaptureFailed         a capture ended without all its rows; none of the failed rows are visible
├── LakeCorrupt           stored bytes or counts contradict the manifest
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


class RunNotFound(InvalidInput, KeyError):
    """The lake holds no run of that name."""

    __str__ = Exception.__str__


class ArtifactNotFound(InvalidInput, KeyError):
    """The lake holds no artifact of that name."""

    __str__ = Exception.__str__


class RunExists(InvalidInput):
    """The lake already holds a run of that name."""


class PromptTooLong(InvalidInput):
    """A prompt does not fit the model's context."""


class UnsafeStore(InvalidInput):
    """The store cannot keep the promises that several writers need."""


class QuotaExceeded(InvalidInput):
    """The lake's configuration does not allow so many bytes."""


class CaptureFailed(MillpondError):
    """A capture ended without all its rows; none of the failed rows are visible."""


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
