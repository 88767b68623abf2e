"""Being told to stop, whatever libraries make of it."""

from __future__ import annotations

import os
import signal
import time

import pytest

from jobs import stop
from jobs.errors import ServiceError


def tell_to_stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)  # the handler comes before this is over


def swallowed_by_a_library() -> None:
    """As pydantic does it that is building a model."""
    try:
        tell_to_stop()
    except BaseException as error:
        raise ValueError("no serializer can be built") from error


@pytest.fixture(autouse=True)
def installed() -> None:
    stop.install(lambda: 60.0, lambda: None)


def test_what_a_library_makes_of_it_is_it_again() -> None:
    with pytest.raises(stop.Stop), stop.recognized():
        swallowed_by_a_library()


def test_an_error_before_it_stays_what_it_is() -> None:
    with pytest.raises(ValueError, match="a bug"), stop.recognized():
        raise ValueError("a bug")


def test_an_error_that_says_what_to_do_stays_after_it_too() -> None:
    with pytest.raises(ServiceError), stop.recognized():
        try:
            tell_to_stop()
        except stop.Stop:
            raise ServiceError("the lease is lost", "look who has it") from None


def test_a_deferred_one_changes_no_error_either() -> None:
    with pytest.raises(ValueError, match="a bug"), stop.recognized(), stop.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        raise ValueError("a bug")
