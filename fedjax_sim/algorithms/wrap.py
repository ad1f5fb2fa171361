"""The one wrapper: a layer names the hooks that it changes, and all others stay the inner algorithm's.

Additions on the client, private leaves, a server's optimiser, transient sparsity and personal models are
layers, and compose as the transformations of `optax.chain` do.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from fedjax_sim.core import stacked
from fedjax_sim.core.algorithm import Algorithm, LocalRule, Step

Around = Callable[..., Any]
"""(inside, *arguments of the hook) -> what the hook returns.

`inside` is the inner algorithm's hook. It takes the layer's own states and looks up the inner ones in them;
what it returns holds the inner algorithm's new state in the place of the old one, in the layer's own. A hook
that the inner algorithm does not have does nothing.
"""


@dataclasses.dataclass(frozen=True)
class Layer:
    """What goes around an algorithm.

    Attributes:
      pairs: which of these the layer has of its own: `state` (the server's), `client` (a client's), `extra`
        (of the steps), `broadcast`, `uploads`. Each is a dict or a dataclass that holds the inner
        algorithm's under the name `inner`; of the others, the inner algorithm's is used as it is. Of a pair
        the hook that makes it must be named: `init`, `init_client`, `start_round`, `dispatch`,
        `finish_round`. In it, `inside` returns the inner algorithm's alone.
      init: around `Algorithm.init`, as are all down to `slot_models` around the hook of that name.
      dispatch: likewise.
      merge: likewise.
      deploy: likewise.
      weights: likewise.
      personal_models: likewise.
      slot_models: likewise.
      init_client: around `LocalRule.init_client`, as are the following around the hook of that name.
      receive: likewise.
      start_round: likewise.
      gradient: likewise.
      wants_last_gradient: likewise.
      finish_round: likewise.
      send: likewise.
      personal: likewise.
      stacked: further names of the state's fields that lead with K or N.
      by_client: those of them that can lie on the host, see `Algorithm.by_client`.
      needs_models: the layer's merge needs the K models.
      keeps_model: the next round still starts from the model that is deployed, where it did so inside
        (`Algorithm.with_model`).
      steps_beyond_mean: the layer's merge goes on by more than the mean.
    """

    pairs: tuple[str, ...] = ()
    init: Around | None = None
    dispatch: Around | None = None
    merge: Around | None = None
    deploy: Around | None = None
    weights: Around | None = None
    personal_models: Around | None = None
    slot_models: Around | None = None
    init_client: Around | None = None
    receive: Around | None = None
    start_round: Around | None = None
    gradient: Around | None = None
    wants_last_gradient: Around | None = None
    finish_round: Around | None = None
    send: Around | None = None
    personal: Around | None = None
    stacked: tuple[str, ...] = ()
    by_client: tuple[str, ...] = ()
    needs_models: bool = False
    keeps_model: bool = True
    steps_beyond_mean: bool = False

    def __post_init__(self):
        for name in self.pairs:
            if getattr(self, _MAKERS[name]) is None:
                raise ValueError(
                    f"a layer that pairs {name!r} must name {_MAKERS[name]}, which makes the pair"
                )


def wrap(inner: Algorithm, layer: Layer) -> Algorithm:
    """`inner` with a layer around it."""
    absent = {
        "personal_models": lambda state, ids: stacked.broadcast(inner.deploy(state), len(ids)),
        "slot_models": inner.client_models,
    }
    rule = {name: _hook(layer, name, getattr(inner.local, name), _CLIENT[name]) for name in _CLIENT}
    server = {
        name: _hook(layer, name, getattr(inner, name), dataclasses.replace(hook, absent=absent.get(name)))
        for name, hook in _SERVER.items()
    }
    if not layer.keeps_model:
        server["with_model"] = None
    chooser = inner.cohort_chooser
    if chooser is not None:
        chooser = dataclasses.replace(chooser, measure=_inside(layer, chooser.measure, _Hook(("state",))))
    return dataclasses.replace(
        inner,
        **server,
        local=LocalRule(**rule),
        cohort_chooser=chooser,
        stacked=(*inner.stacked, *layer.stacked),
        by_client=(*inner.by_client, *layer.by_client),
        needs_models=inner.needs_models or layer.needs_models,
        steps_beyond_mean=inner.steps_beyond_mean or layer.steps_beyond_mean,
    )


# --- the hooks --------------------------------------------------------------------------------------------


def _alone(held: Any, out: Any) -> Any:
    return _with_inner(held, out)


def _first(held: Any, out: Any) -> Any:
    return _with_inner(held, out[0]), out[1]


def _of_step(held: Any, out: Any) -> Any:
    step = Step(*out)
    return step._replace(extra=_with_inner(held, step.extra))


@dataclasses.dataclass(frozen=True)
class _Hook:
    """What a wrapper must know of a hook.

    Attributes:
      takes: its arguments, each by what may be a pair in it; "" for what never is.
      gives: which argument's successor it returns, if any, and how that is put back among what it returns.
      absent: what a hook does that an algorithm does not have.
    """

    takes: tuple[str, ...]
    gives: tuple[str, Callable[[Any, Any], Any]] | None = None
    absent: Callable[..., Any] | None = None


_SERVER = {
    "init": _Hook(("", "")),
    "dispatch": _Hook(("state", "", "")),
    "merge": _Hook(("state", "", "starts", "results", ""), ("state", _first)),
    "deploy": _Hook(("state",)),
    "weights": _Hook(("",)),
    "personal_models": _Hook(("state", "")),
    "slot_models": _Hook(("state", "", "")),
    "with_model": _Hook(("state", ""), ("state", _alone)),
}
_CLIENT = {
    "init_client": _Hook(("", ""), absent=lambda variables, labels: None),
    "receive": _Hook(
        ("", "client", "broadcast", ""), absent=lambda model, client_state, broadcast, key: model
    ),
    "start_round": _Hook(("", "client", "broadcast")),
    "gradient": _Hook(("", "", "", "extra"), ("extra", _of_step)),
    "wants_last_gradient": _Hook(("broadcast",), absent=lambda broadcast: jnp.asarray(False)),
    "finish_round": _Hook(("", "", "client", "extra", "", "", ""), ("client", _first)),
    "send": _Hook(("",), absent=lambda variables: variables),
    "personal": _Hook(("client", ""), absent=lambda client_state, model: model),
}
_MAKERS = {
    "state": "init",
    "client": "init_client",
    "extra": "start_round",
    "broadcast": "dispatch",
    "uploads": "finish_round",
}


def _hook(layer: Layer, name: str, inner: Any, hook: _Hook) -> Any:
    """The hook called `name` of an algorithm inside a layer; None if neither has it."""
    own = getattr(layer, name, None)
    if own is None:
        return inner and _inside(layer, inner, hook)
    inside = _inside(layer, hook.absent if inner is None else inner, hook)
    return lambda *args: own(inside, *args)


def _inside(layer: Layer, inner: Any, hook: _Hook) -> Callable[..., Any]:
    """A hook of the inner algorithm, of the layer's states."""

    def call(*args: Any) -> Any:
        out = inner(*(_unpaired(layer, kind, arg) for kind, arg in zip(hook.takes, args, strict=True)))
        if hook.gives is None or hook.gives[0] not in layer.pairs:
            return out
        kind, put = hook.gives
        return put(args[hook.takes.index(kind)], out)

    return call


def _unpaired(layer: Layer, kind: str, held: Any) -> Any:
    """What the inner algorithm sees of an argument."""
    if kind == "starts":
        return dataclasses.replace(held, broadcast=_unpaired(layer, "broadcast", held.broadcast))
    if kind == "results":
        return dataclasses.replace(held, uploads=_unpaired(layer, "uploads", held.uploads))
    if kind not in layer.pairs:
        return held
    return held["inner"] if isinstance(held, dict) else held.inner


def _with_inner(held: Any, inner: Any) -> Any:
    return {**held, "inner": inner} if isinstance(held, dict) else dataclasses.replace(held, inner=inner)
