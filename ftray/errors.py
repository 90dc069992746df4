"""Errors a user can fix. Each says what is wrong, where, and the way out."""

from __future__ import annotations

from collections.abc import Sequence


class FtrayError(Exception):
    """Base of everything a user can fix. The command line ends with `exit_code`."""

    exit_code = 2


class ConfigError(FtrayError):
    """The run file is wrong. Carries every problem at once.

    `problems` are (key, what-and-what-to-do) pairs, e.g. ("method.rnak", "unknown key; did you mean 'rank'?").
    """

    def __init__(self, source: str, problems: Sequence[tuple[str, str]]):
        self.source = source
        self.problems = tuple(problems)
        count = f"{len(self.problems)} problem{'s' if len(self.problems) != 1 else ''}"
        lines = [f"{source}: {count}"]
        lines += [f"  {key}: {text}" if key else f"  {text}" for key, text in self.problems]
        super().__init__("\n".join(lines))

    def __reduce__(self):  # errors cross process borders by pickle inside Ray
        return (type(self), (self.source, self.problems))


class DataError(FtrayError):
    """A data file is missing, unreadable, empty, or holds a row that the run does not allow."""


class ModelError(FtrayError):
    """A base model, a tokenizer or a method does not exist or does not fit the others."""


class StorageError(FtrayError):
    """The storage root cannot be written, is full, or is not the same from every node."""


class RegistryError(FtrayError):
    """An adapter version or alias does not exist, is refused by its gate, is in use, or was moved by another writer."""


class BadReference(RegistryError):
    """What was given cannot name a version, an alias or a split at all."""


class UnknownVersion(RegistryError):
    """It could name a version or an alias, but there is none."""


class ClusterError(FtrayError):
    """The Ray cluster cannot be reached or has less than the run asks for."""


class TrainError(FtrayError):
    """The run stopped on something the user can fix: a NaN, a batch that does not fit in memory, an unfinished run."""


class Lost(TrainError):
    """Workers or machines were lost more often than `scale.retries`; the same command resumes, best on others."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: nothing to mend, try again


class Stopped(FtrayError):
    """The run was asked to stop and has left a checkpoint; the same command resumes it."""

    exit_code = 143


class ServeError(FtrayError):
    """A server cannot start, or cannot answer a request. `status` is its HTTP status, `code` OpenAI's word for it."""

    status = 500
    code = "server_error"


class RequestError(ServeError):
    """The request is wrong. `param` names its field."""

    status = 400
    code = "invalid_request"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int | None = None):
        super().__init__(message)
        self.param = param
        self.code = code or type(self).code
        self.status = status or type(self).status

    def __reduce__(self):
        return (_request_error, (type(self), str(self), self.param, self.code, self.status))


class AdapterError(ServeError):
    """A version cannot be served here: corrupt, for another base, too large. Other versions go on."""

    status = 422
    code = "adapter_not_servable"


class Overloaded(ServeError):
    """Too much waits already; try again after `retry_after_s`."""

    status = 429
    code = "overloaded"

    def __init__(self, message: str, retry_after_s: float = 1.0):
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def __reduce__(self):
        return (type(self), (str(self), self.retry_after_s))


class DeadlineExceeded(ServeError):
    """The request took longer than it may."""

    status = 504
    code = "deadline_exceeded"


class ReplicaGone(ServeError):
    """The process that worked on the request died or is being stopped; the request can be sent again as it is."""

    status = 503
    code = "replica_gone"


def _request_error(kind: type[RequestError], message: str, param: str | None, code: str, status: int) -> RequestError:
    return kind(message, param=param, code=code, status=status)
