"""What an algorithm's functions owe the engine, checked on shapes before anything is compiled.

The engine takes an algorithm at its word: what `merge` returns is the next round's state, what
`finish_round` returns goes back into the stack of clients. A mistake there ends deep inside JAX, in an error
that names neither. Here every function is called once on abstract values, in the order of a round, and what
it returns is compared with what it was given. Nothing is computed.
"""

import dataclasses
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fedjax_sim.core import memo, stacked
from fedjax_sim.core.algorithm import Algorithm, Cohort, Context, LocalRule, Prolonged, Results, Starts, Step
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.imports import own_lines, place_of
from fedjax_sim.core.task import Batch, Task
from fedjax_sim.engine.clients import Trainer
from fedjax_sim.runs.names import recorded_by_run


def build(config: Any, context: Context, name: str) -> Algorithm:
    """The record of an algorithm; `name`: for messages.

    Raises:
      UserError: its `build` fails, or does not return a record.
    """
    try:
        if isinstance(context, Prolonged):  # whose fields are not all to be read
            made = config.build(context)
        else:
            made = memo.once("algorithm", (config, context), lambda: config.build(context))
    except UserError:
        raise
    except Exception as error:
        raise _failed("build", name, error, "Correct that line.") from error
    if not isinstance(made, Algorithm):
        why = f"it returned a {type(made).__name__}, not an Algorithm"
        raise UserError("algorithm.build", name, why, "Let it return fedjax_sim.Algorithm(init=…, …).")
    return made


def check_contract(
    algorithm: Algorithm, trainer: Trainer, *, name: str, num_clients: int, cohort_size: int, mesh: Mesh
) -> None:
    """Follows a round through an algorithm's functions.

    Args:
      algorithm: the record.
      trainer: local training by its rule.
      name: of the algorithm, for messages.
      num_clients: N.
      cohort_size: K.
      mesh: over which the round will run.

    Raises:
      UserError: a function fails, which the error is chained to, or does not return what the engine wants of
        it: names the function, the place in the tree, both shapes and dtypes, and the likeliest cause.
    """
    model, task, local = trainer.model, trainer.task, trainer.local
    key = jax.eval_shape(lambda: jax.random.key(0))
    variables = model.abstract
    guarded = _Contract(name, num_clients, cohort_size, variables, task).algorithm(algorithm)
    rule = guarded.local
    trainer = dataclasses.replace(trainer, rule=rule)

    def a_round(key, variables, labels, cohort, batch, lr):
        kept = trainer.init_client(variables, labels)
        state = guarded.init(key, variables)
        guarded.deploy(state)
        starts = guarded.dispatch(state, cohort, key)
        sent = starts.models if starts.shared else jax.tree.map(lambda leaf: leaf[0], starts.models)
        start = rule.receive(sent, kept["rule"], starts.broadcast, key) if rule.receive else sent
        extra = rule.start_round(start, kept["rule"], starts.broadcast)
        memory = kept["optimizer"] if local.keep_optimizer else trainer.optimizer.init(start["params"])
        trained, _, _, gradient, extra = trainer._step(
            trainer.optimizer, start, memory, batch, extra, key, lr
        )
        wanted = trainer._wants_gradient(starts.broadcast)
        _, upload = rule.finish_round(
            start,
            trained,
            kept["rule"],
            extra,
            jnp.int32(1),
            lr,
            None if wanted is None else gradient,
        )
        back = trainer.send(trained)
        if guarded.weights is not None:
            guarded.weights(cohort)
        results = Results(
            models=stacked.broadcast(back, cohort_size) if guarded.needs_models else None,
            mean=back if guarded.weights is not None else None,
            uploads=stacked.broadcast(jax.tree.map(jnp.asarray, upload), cohort_size),
            included=jnp.ones(cohort_size, bool),
            loss=jnp.zeros(cohort_size, jnp.float32),
        )
        merged, _ = guarded.merge(state, cohort, starts, results, key)
        slots = jnp.arange(cohort_size, dtype=jnp.int32)
        if guarded.personal_models is not None:
            guarded.personal_models(merged, cohort.ids)
        if guarded.slot_models is not None:
            guarded.slot_models(merged, slots, cohort.ids)
        if guarded.with_model is not None:
            guarded.with_model(merged, variables)
        if guarded.cohort_chooser is not None:
            guarded.cohort_chooser.measure(merged)
        if rule.personal is not None:
            rule.personal(kept["rule"], sent)

    of: Any = jax.ShapeDtypeStruct
    whole, size = of((cohort_size,), jnp.int32), local.batch_size
    batch = Batch(
        jax.eval_shape(task.prepare, task.abstract(size)),
        of((size,), jnp.bool_) if trainer._masked() else None,
        key,
        of((), jnp.int32),
    )
    cohort = Cohort(whole, whole, of((), jnp.int32), whole)
    with jax.set_mesh(mesh):
        labels, lr = of((task.num_classes and model.outputs,), jnp.int32), of((), jnp.float32)
        jax.eval_shape(a_round, key, variables, labels, cohort, batch, lr)


# --- what each function owes ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Contract:
    """Puts a check around every function of an algorithm.

    Attributes:
      name: of the algorithm.
      num_clients: N.
      cohort_size: K.
      model: shapes of one model.
      task: of the run.
    """

    name: str
    num_clients: int
    cohort_size: int
    model: Any
    task: Task

    def algorithm(self, own: Algorithm) -> Algorithm:
        """The record, checked as it is called."""
        judges = {
            "init": partial(self._stacks, own),
            "dispatch": self._dispatched,
            "merge": self._merged,
            "deploy": lambda out, state: self._deployed(out, state),
            "weights": self._weighed,
            "personal_models": lambda out, *args: self._models("personal_models", out),
            "slot_models": lambda out, *args: self._models("slot_models", out),
            "with_model": lambda out, state, model: self._same("with_model", out, state, "it got"),
        }
        chooser = own.cohort_chooser
        if chooser is not None:
            measure = self._around("cohort_chooser.measure", chooser.measure, None)
            chooser = dataclasses.replace(chooser, measure=measure)
        checked = self._all("", own, judges)
        return dataclasses.replace(own, **checked, cohort_chooser=chooser, local=self._rule(own.local))

    def _rule(self, own: LocalRule) -> LocalRule:
        def received(out, *args):
            if own.send is None:
                self._one_model("local.receive", out)
            elif "params" not in out:
                raise self._wrong("local.receive", f"returned {_told(out)}", "A start has `params`.")

        def finished(out, start, trained, kept, *args):
            self._pair("local.finish_round", out, "(client_state, upload)")
            self._same("local.finish_round", out[0], kept, "init_client gave", "of the client's state ")

        judges = {
            "receive": received,
            "gradient": self._stepped,
            "wants_last_gradient": self._asked,
            "finish_round": finished,
            "send": lambda out, sent: self._one_model("local.send", out),
            "personal": lambda out, *args: self._one_model("local.personal", out),
        }
        hint = "" if own.init_client else "No `init_client` is given, so the client's state is None."
        return dataclasses.replace(own, **self._all("local.", own, judges, hint))

    def _all(
        self, home: str, record: Any, judges: dict[str, Callable[..., None]], hint: str = ""
    ) -> dict[str, Any]:
        """Every function of a record, each with its judge if it has one.

        Args:
          home: the record's name, with a dot.
          record: of functions.
          judges: see `_around`, by function.
          hint: likewise.
        """
        functions = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
        return {
            name: self._around(f"{home}{name}", function, judges.get(name), hint)
            for name, function in functions.items()
            if callable(function)
        }

    def _around(
        self, where: str, function: Callable[..., Any], judge: Callable[..., None] | None, hint: str = ""
    ) -> Callable[..., Any]:
        """`function`, whose errors have its name, and whose value `judge(value, *arguments)` looks at.

        `hint` is what to do where the error is of a None.
        """

        def call(*args):
            try:
                out = function(*args)
            except UserError:
                raise
            except Exception as error:
                fix = hint if hint and "NoneType" in str(error) else _cause(error, args)
                raise _failed(where, self.name, error, fix) from error
            self._arrays(where, out)
            if judge is not None:
                judge(out, *args)
            return out

        return call

    def _arrays(self, where: str, out: Any) -> None:
        for path, leaf in jax.tree_util.tree_leaves_with_path(out):
            if not isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | int | float):
                place = jax.tree_util.keystr(path)
                why = f"returned{' at ' + place if place else ''} a {type(leaf).__name__}, not an array"
                raise self._wrong(where, why, "Return arrays, in dicts, tuples or flax dataclasses.")

    def _stacks(self, own: Algorithm, state: Any, *args: Any) -> None:
        leads = (self.cohort_size, self.num_clients)
        flags, by_client = (jax.tree.leaves(each(state)) for each in (own.is_stacked, own.is_by_client))
        paths = jax.tree_util.tree_leaves_with_path(state)
        for flag, of_clients, (path, leaf) in zip(flags, by_client, paths, strict=True):
            if flag and np.shape(leaf)[:1] not in [(lead,) for lead in leads]:
                why = (
                    f"gave {_shape(leaf)} at {jax.tree_util.keystr(path)}, which `stacked` names and which "
                    f"does not lead with the K = {leads[0]} slots or the N = {leads[1]} clients"
                )
                raise self._wrong("init", why, "Take the field out of `stacked`, or stack it.")
            if of_clients and (not flag or np.shape(leaf)[:1] != leads[1:]):
                why = (
                    f"gave {_shape(leaf)} at {jax.tree_util.keystr(path)}, which `by_client` names and which "
                    f"is no stack over the N = {leads[1]} clients"
                )
                fix = "Take the field out of `by_client`, or name it in `stacked` too."
                raise self._wrong("init", why, fix)

    def _deployed(self, out: Any, state: Any) -> None:
        self._not_the_state("deploy", out, state)
        self._one_model("deploy", out)

    def _not_the_state(self, where: str, out: Any, state: Any) -> None:
        """Raises UserError if `out` is the whole state, where a model is wanted that is a part of it."""
        shapes, model = _shapes(out), _shapes(self.model)
        if shapes == _shapes(state) and shapes.keys() != model.keys():
            parts = _parts(state)
            found = next((place for place, part in parts.items() if _shapes(part) == model), None)
            fix = "Return the model in it" + (f", perhaps state{found}." if found else ".")
            raise self._wrong(where, "returned the whole state, where the model is wanted", fix)

    def _dispatched(self, out: Any, state: Any, *args: Any) -> None:
        if not isinstance(out, Starts):
            raise self._wrong(
                "dispatch", f"returned {_told(out)}", "Return Starts(model), or Starts(models, shared=False)."
            )
        if out.shared:
            self._not_the_state("dispatch", out.models, state)
            self._one_model("dispatch", out.models)
        else:
            self._models("dispatch", out.models)

    def _merged(self, out: Any, state: Any, cohort: Any, starts: Any, results: Results, key: Any) -> None:
        self._pair("merge", out, "(state, metrics)", "Without metrics return `state, {}`.")
        nothing = any(leaf is None for leaf in jax.tree.leaves(out[0], is_leaf=lambda leaf: leaf is None))
        missing = _missing(results) if nothing else ""
        self._same("merge", out[0], state, "init gave", "of the state ", missing)
        if not isinstance(out[1], dict):
            why = f"returned {_told(out[1])} in the place of the metrics"
            raise self._wrong("merge", why, "Metrics are a dict of scalars, {} for none.")
        for metric, value in out[1].items():
            number = jax.tree.structure(value) == jax.tree.structure(0) and np.shape(value) == ()
            if not isinstance(metric, str):
                raise self._wrong("merge", f"named a metric {metric!r}", "The name of a metric is text.")
            if (
                not number
                or jnp.issubdtype(_dtype(value), jax.dtypes.extended)
                or jnp.issubdtype(_dtype(value), jnp.complexfloating)
            ):
                why = f"returned for the metric {metric!r} {_told(value)}"
                raise self._wrong("merge", why, "A metric is one number: take a mean, or give each a name.")
            if recorded_by_run(metric, self.task):
                why = f"it names a metric {metric!r}, which the run records itself"
                raise self._wrong("merge", why, "Choose another name.")

    def _weighed(self, out: Any, cohort: Any) -> None:
        wanted = jax.ShapeDtypeStruct((self.cohort_size,), jnp.float32)
        self._same("weights", out, wanted, "the engine wants")

    def _stepped(self, out: Any, loss: Any, variables: Any, batch: Any, extra: Any) -> None:
        where, wanted = "local.gradient", "a Step(loss, variables, gradient, extra)"
        if not (isinstance(out, tuple) and len(out) in (4, 5)):
            raise self._wrong(where, f"returned {_told(out)}, not {wanted}", f"Return {wanted}.")
        step = Step(*out)
        self._scalar(where, step.loss)
        self._same(where, step.variables, variables, "it got", "of the variables ")
        self._same(where, step.gradient, variables["params"], "`params` has", "of the gradient ")
        self._same(where, step.extra, extra, "it got", "of extra ")
        if step.moves is not None:
            flags = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((), jnp.bool_), variables)
            self._same(where, step.moves, flags, "a flag for each leaf of the variables is wanted:")

    def _asked(self, out: Any, broadcast: Any) -> None:
        self._same("local.wants_last_gradient", out, jax.ShapeDtypeStruct((), jnp.bool_), "the engine wants")

    def _scalar(self, where: str, loss: Any) -> None:
        if np.shape(loss) != () or not jnp.issubdtype(_dtype(loss), jnp.floating):
            fix = "Take the mean over the batch (fedjax_sim.core.task.masked_mean leaves out padding)."
            raise self._wrong(where, f"returned a loss of {_shape(loss)}, not one number", fix)

    def _pair(self, where: str, out: Any, wanted: str, fix: str = "") -> None:
        if not (isinstance(out, tuple) and len(out) == 2):
            raise self._wrong(where, f"returned {_told(out)}, not {wanted}", fix or f"Return {wanted}.")

    def _one_model(self, where: str, out: Any) -> None:
        self._same(where, out, self.model, "the model has")

    def _models(self, where: str, out: Any) -> None:
        count = self.cohort_size
        many = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype), dict(self.model)
        )
        self._same(where, out, many, f"{count} stacked models have")

    def _same(self, where: str, out: Any, wanted: Any, whose: str, of: str = "", missing: str = "") -> None:
        """Raises UserError unless two trees have the same leaves."""
        has, want = (
            {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
            for tree in (out, wanted)
        )
        for path in {**want, **has}:
            at = f"{of}at {path}" if path else of.strip()
            if path not in has:
                why = f"returned nothing {at}, where {whose} {_shape(want[path])}"
                fix = missing or (
                    "Return every part of it: {**state, …}, or state.replace(…)."
                    if "state" in of
                    else "Return every part of it."
                )
            elif path not in want:
                why = f"returned {_shape(has[path])} {at}, where {whose} nothing"
                begins = "a part of a client's state begins in `init_client`"
                if "client" not in of:
                    begins = "a part of the state begins in `init`"
                fix = f"Return what has the same parts; {begins}."
            elif _shape(has[path]) != _shape(want[path]):
                why = f"returned {_shape(has[path])} {at}, where {whose} {_shape(want[path])}"
                fix = self._likeliest(has[path], want[path])
            else:
                continue
            raise self._wrong(where, " ".join(why.replace(" ,", ",").split()), fix)
        trees = [jax.tree.structure(tree) for tree in (_plain(out), _plain(wanted))]
        if trees[0] != trees[1]:
            raise self._wrong(
                where, f"returned {of}{trees[0]}, where {whose} {trees[1]}", "Keep the containers."
            )

    def _likeliest(self, has: Any, want: Any) -> str:
        found, wanted, count = np.shape(has), np.shape(want), self.cohort_size
        if found == wanted:
            return (
                f"Convert it, .astype({_dtype(want)}): training and means are in the model's precision, and "
                "what is kept from round to round keeps its dtype."
            )
        if found == (count, *wanted):
            return (
                f"It leads with the {count} slots: the mean over them was forgotten, perhaps (leaf.mean(0), "
                "or results.mean of an algorithm with `weights`)."
            )
        if wanted == (count, *found):
            return (
                f"It is one where {count} slots are wanted: fedjax_sim.stacked.broadcast(model, {count}), or "
                "Starts(model), which all share."
            )
        return "Look for a sum or a mean over the wrong axis."

    def _wrong(self, where: str, why: str, fix: str) -> UserError:
        return UserError(f"algorithm.{where}", self.name, why, fix)


# --- words ------------------------------------------------------------------------------------------------


def _failed(where: str, name: str, error: Exception, fix: str) -> UserError:
    told = str(error).strip().splitlines() or [""]
    why = f"fails: {type(error).__name__}: {told[0]}{place_of(error)}"
    return UserError(f"algorithm.{where}", name, why, fix)


def _cause(error: Exception, args: tuple) -> str:
    results = next((one for one in args if isinstance(one, Results)), None)
    if results is not None:
        lines = " ".join(frame.line or "" for frame in own_lines(error))
        if told := _missing(results, None if "None" in str(error) else lines):
            return told
    if isinstance(error, jax.errors.TracerArrayConversionError):
        why = "the function is traced, and its values are not there yet, but with execution.debug"
        return f"Use jax.numpy where NumPy is used: {why}."
    if isinstance(error, jax.errors.ConcretizationTypeError):
        return (
            "It is traced: no `if`, `int()` or `float()` of an array's values, but with execution.debug. Use "
            "jnp.where or jax.lax.cond."
        )
    if isinstance(error, TypeError) and "positional argument" in str(error):
        return "fedjax_sim/core/algorithm.py says which arguments each function gets."
    return "Correct that line; with execution.debug, `print` and `breakpoint()` see values there."


def _missing(results: Results, lines: str | None = None) -> str:
    """What of a round's results is None, and why; of what these `lines` speak of, if they are given."""
    whys = {
        "mean": "give the algorithm `weights` (by_samples, uniform)",
        "models": "the algorithm says needs_models = False",
        "uploads": "`local.finish_round` sends nothing",
    }
    told = [
        f"results.{name} is None: {why}"
        for name, why in whys.items()
        if getattr(results, name) is None and (lines is None or re.search(rf"\.{name}\b(?!\()", lines))
    ]
    return "; ".join(told) + "." * bool(told)


def _shapes(tree: Any) -> Any:
    """Shapes and dtypes by place."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): _shape(leaf) for path, leaf in leaves}


def _parts(tree: Any) -> dict[str, Any]:
    """The parts of a dict, a tuple or a dataclass, by how they are reached: `['model']`, `.model`."""
    parts = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda part: part is not tree)
    return {jax.tree_util.keystr(path): part for path, part in parts}


def _plain(tree: Any) -> Any:
    """A tree whose leaves are alike, and mappings of any kind are dicts."""
    if isinstance(tree, dict) or hasattr(tree, "items"):
        return {key: _plain(value) for key, value in tree.items()}
    return tree


def _dtype(leaf: Any) -> Any:
    return leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)


def _shape(leaf: Any) -> str:
    return f"{_dtype(leaf)}[{', '.join(map(str, np.shape(leaf)))}]"


def _told(value: Any) -> str:
    """A value in a word or two."""
    if isinstance(value, jax.Array | np.ndarray):
        return _shape(value)
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return f"a tuple of {len(value)}"
    return "None" if value is None else f"a {type(value).__name__}"
