"""How layers are spelled for XLA: a setting of the trace that changes speed, and results by rounding only."""

import contextlib
import contextvars
from collections.abc import Iterator

SPELLINGS = ("xla", "canonical", "patches", "winograd")
"""Explicit ones; `auto` chooses among them. `fedjax_sim.models.kernels.conv` says what they mean."""

_spelling = contextvars.ContextVar("spelling", default="auto")


@contextlib.contextmanager
def spelling(name: str) -> Iterator[None]:
    """Models traced inside this context spell their layers `name` (one of SPELLINGS, or auto).

    `xla` leaves everything to JAX's autodiff; the others have derivatives of their own, in
    reverse mode only, which can be differentiated again in that mode.
    """
    token = _spelling.set(name)
    try:
        yield
    finally:
        _spelling.reset(token)


def current() -> str:
    """The spelling of the innermost context; `auto` outside of any."""
    return _spelling.get()
