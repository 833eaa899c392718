"""A second and a third try of what a bucket refused: it may be away for seconds, or busy."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

PAUSES = (1.0, 4.0)
"""Seconds before the next try; the libraries below have tried for some seconds themselves."""
HOPELESS = ("ACCESS_DENIED", "AccessDenied", "NO_SUCH_BUCKET", "NoSuchBucket")
"""Said in errors that another try would meet, too."""


def tried_again(do: Callable[[], T], *errors: type[Exception]) -> T:
    """Its answer; the last of these errors where no try succeeds. A file that is not there is an answer."""
    for pause in PAUSES:
        try:
            return do()
        except FileNotFoundError:
            raise
        except errors as error:
            if any(words in str(error) for words in HOPELESS):
                raise
            time.sleep(pause)
    return do()
