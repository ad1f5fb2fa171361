"""How convolutions are implemented: a setting of the trace.

It changes speed, and results by rounding only.
"""

import contextlib
import contextvars
from collections.abc import Iterator

CONV_IMPLS = ("xla", "canonical", "patches", "winograd")
"""The names; `auto` chooses among them. `fedjax_sim.models.kernels.conv` says what they mean."""

_conv_impl = contextvars.ContextVar("conv_impl", default="auto")


@contextlib.contextmanager
def conv_impl(name: str) -> Iterator[None]:
    """Models traced inside this context implement their layers by `name` (one of CONV_IMPLS, or auto).

    `xla` leaves everything to JAX's autodiff. The others have derivatives of their own, in reverse mode
    only; these can be differentiated again in that mode.
    """
    token = _conv_impl.set(name)
    try:
        yield
    finally:
        _conv_impl.reset(token)


def current_conv_impl() -> str:
    """The implementation that the innermost context names; `auto` outside of any."""
    return _conv_impl.get()
