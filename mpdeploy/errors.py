"""Every exception mpdeploy raises on purpose, and the exit code each one ends the command line with.

    MpdeployError                          exit
    ├── UsageError                            2    wrong usage: arguments, configuration, input files
    │   ├── ConfigError                       2    a pipeline file or a --set that does not validate
    │   ├── ModelError                        2    not ONNX, truncated, cyclic, external data missing or outside its folder
    │   ├── DataError                         2    samples that do not fit the model
    │   ├── KeepListError                     2    a keep pattern that matches nothing
    │   └── RunDirError                       2    a run directory that is foreign, unwritable, in use or corrupt
    ├── GateFailedError                      10    what was measured is worse than a gate allows
    ├── InconclusiveError                    11    the samples cannot tell, under --strict
    ├── NotComparableError                   12    evidence that does not match its digests, its hardware or its harness
    ├── StageFailedError                     20    a stage could not finish
    │   ├── UserCodeError                    20    an exception inside the user's own functions (holds their traceback)
    │   ├── TrainingDivergedError            20    the loss became NaN or infinite
    │   ├── ArtifactChangedError             20    a finished artifact no longer has the digest that was recorded
    │   ├── ConversionError                  20    the rewritten graph did not prove to be valid; no file was written
    │   └── BuildError                       20    an engine could not be built or loaded
    └── UnavailableError                     21    this machine lacks what was asked for
        └── MissingExtraError                21    an optional dependency is not installed

Anything else that reaches the top is a bug here (exit 1). Ctrl-C ends with 130 and SIGTERM with 143, as shells expect.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MpdeployError(Exception):
    """A fault with a message for the user: what, where, which values; the hint says what to do."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n\nhint: {self.hint}"

    def __reduce__(self) -> tuple[object, ...]:
        # The default would drop the keyword-only hint when an error crosses from a child process.
        return _rebuild, (type(self), self.message, self.hint)


def _rebuild(cls: type[MpdeployError], message: str, hint: str | None) -> MpdeployError:
    return cls(message, hint=hint)


class UsageError(MpdeployError):
    """Wrong usage: arguments, configuration or input files."""

    exit_code = 2


class ConfigError(UsageError):
    """A pipeline file or a `--set` that does not validate."""


class ModelError(UsageError):
    """A model file that cannot be read: not ONNX, truncated, cyclic, or its external data is missing or misplaced."""


class DataError(UsageError):
    """Samples that do not fit the model, or that no model should be judged by."""


class KeepListError(UsageError):
    """A keep pattern that matches nothing."""


class RunDirError(UsageError):
    """A run directory that is foreign, unwritable, in use by another process, or whose manifest is corrupt."""


class GateFailedError(MpdeployError):
    """What was measured is worse than a gate allows."""

    exit_code = 10


class InconclusiveError(MpdeployError):
    """The samples cannot tell, and `--strict` asked that this not pass."""

    exit_code = 11


class NotComparableError(MpdeployError):
    """Evidence that does not match its digests, or that came from other hardware or another harness."""

    exit_code = 12


class StageFailedError(MpdeployError):
    """A stage could not finish; what finished before it is kept."""

    exit_code = 20


class UserCodeError(StageFailedError):
    """An exception inside the user's own functions; the message carries their traceback, not ours."""


class TrainingDivergedError(StageFailedError):
    """The loss became NaN or infinite."""


class ArtifactChangedError(StageFailedError):
    """A finished artifact no longer has the digest that was recorded for it."""


class ConversionError(StageFailedError):
    """The rewritten graph did not prove to be valid; no file was written."""


class BuildError(StageFailedError):
    """An engine could not be built or loaded; the message carries the library's own errors."""


class UnavailableError(MpdeployError):
    """What was asked for is not on this machine: a device, a driver, a library."""

    exit_code = 21


class MissingExtraError(UnavailableError):
    """An optional dependency is not installed."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)

    @classmethod
    def for_extra(cls, what: str, extra: str) -> MissingExtraError:
        """`what` names the package that is missing, `extra` the extra of mpdeploy that brings it."""
        return cls(f"{what} is not installed.", hint=f"pip install 'mpdeploy[{extra}]'")


def closest_names(name: str, names: Iterable[str], *, count: int = 3) -> str:
    """The `count` names nearest to `name`, joined for a hint; the first few where none is near."""
    known = list(dict.fromkeys(names))
    near = difflib.get_close_matches(name, known, n=count, cutoff=0.4) or known[:count]
    return ", ".join(near) if near else "(there are none)"
