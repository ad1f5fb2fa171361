"""A round without jit, one client after another on one device: what looks on, and what it says.

`execution.debug` computes the same functions as any run. Under `jax.disable_jit` JAX's loops and branches are
Python's; `stacked.per_slot` and `stacked.on_devices` leave out `vmap` and `shard_map` there; a wave is one
client. So `print` shows values, `breakpoint()` stops at them, and an error comes from the line that made it.

The parts of a round tell a `Watch` what they are about. That of a normal run does nothing, when a program is
traced; the `Debugger` of a debug run knows who is at work when an error comes, and looks at the numbers.
After ForEachClientDebugBackend of FedJAX (Ro, Suresh, Wu: "FedJAX: Federated learning simulation with JAX",
2021, arXiv:2108.02117), which names the client of an error.
"""

import bdb
import contextlib
import copy
import dataclasses
import functools
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from fedjax_sim.config import ExecutionConfig
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.imports import own_lines
from fedjax_sim.core.model import Model

HINT = (
    "Run it with execution.debug = True: clients train one after another without jit, `print` and "
    "`breakpoint()` see values, and the error names round, client and step."
)
"""What an error while a round is traced is told to do."""


class Watch:
    """Looks on while the parts of a round are computed. This one does nothing."""

    def during(self, number: int) -> contextlib.AbstractContextManager[None]:
        """All of round `number`, from 1. An error from a line of the user's own is told of debugging."""
        del number
        return _hinted()

    def client(self, ids: jax.Array | None) -> None:
        """A wave of the clients i32[L] begins; None: the server is at work again."""

    def called(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, of which a message speaks as `name`."""
        del name
        return function

    def look(self, what: str, tree: Any, before: Any = None, *, infinite: bool = False) -> None:
        """Looks at numbers.

        Args:
          what: they are.
          tree: of arrays.
          before: what they come from: a leaf that has been as bad already is passed over.
          infinite: whether they may be infinite.
        """


UNWATCHED = Watch()


class DebugError(UserError):
    """What went wrong in a debug run: says where, round, client, step and function.

    `detail` is the traceback of the error that it comes from, if there is one.
    """

    def __str__(self) -> str:
        where = f"{self.value}\n" if self.value else ""
        return f"{where}{self.field}: {self.why}. {self.fix}"


class RoundError(DebugError):
    """A function failed in a debug run. The error that it raised is the cause of this one."""


class NotFinite(DebugError):
    """The first NaN or infinity of a debug run."""


@dataclasses.dataclass
class _Place:
    """Where a debug run is.

    Attributes:
      round: from 1; 0 before the first.
      client: its id; None where the server is at work.
      step: of the client in this round, from 1; 0 before the first.
    """

    round: int = 0
    client: int | None = None
    step: int = 0

    def __str__(self) -> str:
        words = [f"round {self.round}" if self.round else "the run's first state"]
        if self.client is not None:
            words.append(f"client {self.client}")
            words.append(f"step {self.step}" if self.step else "before its first step")
        return ", ".join(words)


class Debugger(Watch):
    """The watch of a debug run."""

    def __init__(self):
        self.place = _Place()
        self._names: list[str] = []  # of the functions that are running, outermost first
        self._last: tuple[str, Callable[[], Any]] | None = None  # of the outermost: how to call it again
        self._failed: tuple[BaseException, str, str] | None = None  # an error, its function and place
        self._ranges: dict[str, str] = {}  # of each leaf when it was last sound
        self._noted: list[str] = []  # values of functions that were not finite, since the step began
        self._quiet = False

    # --- told by the round ----------------------------------------------------------------------------

    def client(self, ids: jax.Array | None) -> None:
        """See `Watch`."""
        if not isinstance(ids, Tracer):
            self.place = _Place(self.place.round, None if ids is None else int(ids[0]))

    def called(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """See `Watch`. Each call of the one that is named `step` counts as one."""

        @functools.wraps(function)
        def call(*args: Any, **keywords: Any) -> Any:
            if self._quiet:
                return function(*args, **keywords)
            if name == "step":
                self.place.step += 1
            if not self._names:
                self._last = name, functools.partial(function, *args, **keywords)
                self._noted = []
            self._names.append(name)
            try:
                out = function(*args, **keywords)
            except Exception as error:
                if self._failed is None or self._failed[0] is not error:
                    self._failed = error, name, str(self.place)
                raise
            finally:
                self._names.pop()
            self._note(name, out)
            return out

        return call

    def look(self, what: str, tree: Any, before: Any = None, *, infinite: bool = False) -> None:
        """See `Watch`. Raises NotFinite."""
        old = dict(_leaves(before))
        for path, leaf in _leaves(tree):
            name, bad = f"{what}{path}", _worst(leaf)
            if not bad:
                self._ranges[name] = f"from {leaf.min():.4g} to {leaf.max():.4g} ({self.place})"
            elif path in old and _worst(old[path]) == bad:
                continue
            elif bad == "NaN" or not infinite:
                raise self._found(what, name, leaf, bad)
            else:
                self._noted.append(f"{name} held an infinity")

    def _note(self, name: str, out: Any) -> None:
        """Remembers that a function's value is not finite."""
        for path, leaf in _leaves(out):
            if bad := _worst(leaf):
                self._noted.append(f"{name} returned {_some(bad)}{f' at {path}' if path else ''}")
                return

    # --- what it says ---------------------------------------------------------------------------------

    def _found(self, what: str, name: str, leaf: np.ndarray, bad: str) -> NotFinite:
        finite = leaf[np.isfinite(leaf)]
        which = np.isnan(leaf) if bad == "NaN" else np.isinf(leaf)
        of = f"{int(which.sum())} of its {leaf.size} numbers are {bad}" if leaf.ndim else f"it is {leaf}"
        why = f"in {self.place}, {of}"
        if finite.size:
            why += f", the finite ones lie from {finite.min():.4g} to {finite.max():.4g}"
        before = self._ranges.get(name)
        why += f". When it was last finite it lay {before}" if before else ". It was never finite before"
        if self._noted:
            why += f". The first to show it: {self._noted[0]}"
        line, error = self._line_of(bad)
        advice = _ADVICE.get(what, _ADVICE[""])
        made = NotFinite(f"{what} is not finite", line, why, advice)
        if line or name != what:
            made.why = f"{name}: {made.why}"
        if error is not None:
            made.__cause__ = error
            if own_lines(error):  # else all of it is ours and JAX's, and says no more than the message
                made.detail = _trace(error)
        return made

    def _line_of(self, bad: str) -> tuple[str, BaseException | None]:
        """The line whose operation gave the first such number, by calling the last function again."""
        if self._last is None:
            return "", None
        self._quiet = True
        check = jax.debug_nans if bad == "NaN" else jax.debug_infs
        try:
            with check(True):
                self._last[1]()
        except FloatingPointError as error:
            # Of a derivative: where JAX says that the operation which it is of stands.
            cause = error.__cause__
            origin = error if cause is None or not own_lines(cause) else cause
            return _line(origin) if own_lines(origin) else "", error
        except Exception:
            return "", None
        finally:
            self._quiet = False
        return "", None

    def _told(self, error: Exception) -> DebugError:
        """The error of a function as one that says where it was."""
        origin, name, place = error, "", str(self.place)
        if self._failed is not None and self._failed[0] is error:
            _, name, place = self._failed
        if isinstance(error, UserError):  # one that has named the function already
            origin, name = error.__cause__ or error, error.field
        told = " ".join(str(origin).strip().split("\n--------")[0].split())
        what = f"{name} failed" if name else "the round failed"
        fix = "Correct that line." if own_lines(origin) else (
            "No line of yours is in it: a function has returned what it should not, perhaps. Without "
            "execution.debug shapes are followed through all of them first, and the message says which."
        )  # fmt: skip
        made = RoundError(what, _line(origin), f"in {place}, {type(origin).__name__}: {told}", fix)
        made.detail = _trace(origin)
        return made

    @contextlib.contextmanager
    def during(self, number: int) -> Iterator[None]:
        """Round `number`, from 1, without jit. Raises DebugError for what goes wrong in it."""
        before = self.place, self._names
        self.place, self._names, self._failed = _Place(number), [], None
        try:
            with jax.disable_jit():
                yield
        except (DebugError, bdb.BdbQuit):
            raise
        except UserError as error:
            if error.__cause__ is None:  # a setting that is refused
                raise
            raise self._told(error) from error.__cause__
        except Exception as error:
            raise self._told(error) from error
        finally:
            self.place, self._names = before


_ADVICE = {
    "loss": "Look for a logarithm or a division of 0; if the step before moved far, lower local.lr or set "
    "local.clip_norm.",
    "gradient": "The loss is finite and its derivative is not: that of a root, a norm or a quotient at 0, "
    "perhaps. Guard the argument itself, before the function, with jnp.where.",
    "optimiser update": "The gradient is finite, and the optimiser makes this of it: look at local.lr and "
    "local.options.",
    "parameters": "Every number of the step is finite, and their sum is not: lower local.lr.",
    "upload": "Look at what the rule divides by when a client's training ends.",
    "": "Look for a division by 0, or a root of what is below it; the server's learning rate, where there is "
    "one, may be too high.",
}


@contextlib.contextmanager
def _hinted() -> Iterator[None]:
    """Adds `HINT` to an error that comes from a line of the user's own."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if own_lines(error) and HINT not in getattr(error, "__notes__", ()):
            error.add_note(HINT)
        raise


def shapes_of(function: Callable[..., Any], *args: Any) -> Any:
    """`jax.eval_shape`; without jit the value itself, so that the function is called with numbers."""
    if jax.config.jax_disable_jit:  # pyright: ignore[reportAttributeAccessIssue] dynamic attribute
        return function(*args)
    return jax.eval_shape(function, *args)


# --- a setup that is watched ------------------------------------------------------------------------------


def layout(execution: ExecutionConfig) -> ExecutionConfig:
    """How a run is laid out: as it says, or for its debugging.

    Raises:
      UserError: several processes are to debug a run.
    """
    if not execution.debug:
        return execution
    if jax.process_count() > 1:
        why = f"{jax.process_count()} processes run it, and it is debugged by one"
        raise UserError("execution.debug", True, why, "Start it in one process, without --join.")
    return dataclasses.replace(execution, devices=1, wave=1)


def watched(setup: Any) -> Any:
    """A `Setup` whose functions tell a debugger when they are called, by the names of their fields."""
    debugger, dataset = Debugger(), copy.copy(setup.dataset)
    vars(dataset)["task"] = _record(dataset.task, "task", debugger)
    model = _Model(**{f.name: getattr(setup.model, f.name) for f in dataclasses.fields(Model)})
    object.__setattr__(model, "watch", debugger)
    algorithm = _record(setup.algorithm, "algorithm", debugger)
    return dataclasses.replace(setup, dataset=dataset, model=model, algorithm=algorithm, watch=debugger)


def _record(value: Any, name: str, debugger: Debugger) -> Any:
    """A record of functions, and of such records, all of which are watched."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and not callable(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        changed = {own: _record(of, f"{name}.{own}", debugger) for own, of in fields.items()}
        return dataclasses.replace(value, **changed)
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(_record(one, name, debugger) for one in value)
    return debugger.called(name, value) if callable(value) else value


class _Model(Model):
    """A model that is watched."""

    watch: Watch

    def _call(self, *args: Any, **keywords: Any) -> Any:
        return self.watch.called("model", super()._call)(*args, **keywords)


# --- words ------------------------------------------------------------------------------------------------


def _leaves(tree: Any) -> Iterator[tuple[str, np.ndarray]]:
    """(path, values) of each leaf of floats whose values are there, those that are differentiated too."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | float):
            continue
        try:
            value = np.asarray(jax.lax.stop_gradient(leaf) if isinstance(leaf, Tracer) else leaf)
        except (jax.errors.ConcretizationTypeError, TypeError):  # under a vmap; a key
            continue
        if jax.numpy.issubdtype(value.dtype, jax.numpy.inexact) and value.size:
            wide = value if np.iscomplexobj(value) else value.astype(np.float64)
            yield jax.tree_util.keystr(path), wide


def _worst(leaf: np.ndarray) -> str:
    """`NaN`, `infinite`, or "" where all is finite."""
    return "" if np.isfinite(leaf).all() else "NaN" if np.isnan(leaf).any() else "infinite"


def _trace(error: BaseException) -> str:
    """Its traceback, from the outermost of the user's own lines on."""
    lines, own = traceback.extract_tb(error.__traceback__), own_lines(error)
    kept = lines[lines.index(own[0]) :] if own else lines
    end = traceback.format_exception_only(error)
    return "".join(["Traceback (most recent call last):\n", *traceback.format_list(kept), *end])


def _some(bad: str) -> str:
    return "NaN" if bad == "NaN" else "an infinity"


def _line(error: BaseException) -> str:
    """`FILE:LINE, in FUNCTION: its text` of the user's innermost line; of ours where there is none."""
    lines = own_lines(error) or [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(__file__).parents[1] in Path(frame.filename).parents and frame.filename != __file__
    ]
    if not lines:
        return type(error).__name__
    line = lines[-1]
    return f"{line.filename}:{line.lineno}, in {line.name}: {line.line}"
