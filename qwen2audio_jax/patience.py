"""What is asked again, because it may answer yet: a busy server, a connection that broke."""

import time
from collections.abc import Callable
from typing import TypeVar

PAUSES = (0.5, 2.0)  # seconds before each further attempt
LATER = (408, 425, 429)  # with which a server asks for patience; those from 500 do so, too

T = TypeVar("T")


def passing(code: int) -> bool:
    """Whether a web server's answer may be another one later."""
    return code in LATER or code >= 500


def patiently(ask: Callable[[], T], error: type[Exception]) -> T:
    """What `ask` gives, asked again where it raises `error`; the last time that is raised."""
    for pause in PAUSES:
        try:
            return ask()
        except error:
            time.sleep(pause)
    return ask()
