"""What a job may stop with that is not a bug: one line for a person."""


class JobError(Exception):
    """A job cannot start or go on; the message says what, where and what to do."""


class StorageError(JobError):
    """The storage root cannot be read or written, or holds what this version cannot read: no trial can go on."""


class Stopped(SystemExit):
    """By SIGTERM, as ``ray job stop`` sends it: no script's own ``sys.exit``."""


def first_line(error: BaseException) -> str:
    """What an exception says, without what follows: for the brackets of a message of ours."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def named(error: BaseException) -> str:
    """The same, after the exception's name."""
    return f"{type(error).__name__}: {first_line(error)}"
