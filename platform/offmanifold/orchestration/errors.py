"""What a job may stop with that is not a bug: one line for a person."""


class JobError(Exception):
    """A job cannot start or go on; the message says what, where and what to do."""
