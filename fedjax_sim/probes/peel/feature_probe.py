"""The layer-peeled probe: what a merge does to every layer's features, measured right after it.

For some clients of a measured round it takes the model that the client trained (`before`) and what the
client holds once merged (`after`), runs both on the same samples of the client's own, and peels off the
features at each of the model's peel points, the inputs of its weight layers. That features are compared
before and after aggregation by class variances, by their alignment with the next weights and by linear
probes is FOUND of "The Other Side of the Coin: Unveiling the Downsides of Model Aggregation in Federated
Learning from a Layer-peeled Perspective" (arXiv 2502.03231); formulas, samples and pooling are not, and are
OUR CHOICE where a function's docstring names no other source.

One row a (client, layer, state, metric), layer being the name of the weight layer that reads the feature:

    trace_within, trace_between, trace_total    of the class covariances; the first two add up to the third
    sigma_within, sigma_between                 the first two over the third
    log_c                                       log(trace_within / trace_between)
    log_c_balanced                              the same with every present class weighing alike
    cdnv, discrimination                        see `fedjax_sim.probes.peel.moments`
    rank, stable_rank                           if asked for: of the pooled features about their class means
    pabs, pabs_centred                          mean cosine of the principal angles with the next kernel
    pabs_corrected                              pabs above what random subspaces have, 1 at most
    pabs_smallest, pabs_rank                    cosine of the largest angle; how many angles there are
    ncm, ridge                                  accuracy of probes fitted to the client's other samples
    shift_cka, shift_cosine                     without a state: 1 - similarity of after to before
    spread, update_cosine                       of the kernel, without a state; see `Probe.observe`

and, without a layer, `peel_accuracy` and `peel_loss` of start, before, after and controls, and
`peel_samples`. Controls are further states, see `fedjax_sim.probes.peel.controls`. A number that its client's
samples do not define (log_c of a single class; pabs_corrected where the class means fill the whole space, as
they do at the one channel of a grey image) has no row; in its place stands one with the metric
`undefined/<metric>` and value 1.

A convolution's feature is flattened for variances (as in the code of Rangamani et al., ICML 2023), averaged
over places for probes, ranks and CKA. A transformer's is averaged over its tokens throughout.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fedjax_sim.core.rng import PEEL, key_for
from fedjax_sim.core.stacked import AXIS
from fedjax_sim.engine.device_data import DeviceData
from fedjax_sim.engine.round import MergeView
from fedjax_sim.probes.peel import alignment, controls, linear_probes, moments
from fedjax_sim.probes.peel.forward import Forward, pooled, zeros_like
from fedjax_sim.records import Row, make_row

STATES = ("before", "after")


@dataclasses.dataclass(frozen=True, eq=False)
class Probe:
    """Measures rounds; the engine compiles it (`fedjax_sim.engine.observing.Observer`).

    Attributes:
      forward: the model on samples.
      mesh: devices, over which the measured clients are sharded.
      width: clients side by side on a device.
    """

    forward: Forward
    mesh: Mesh
    width: int

    def __post_init__(self):
        controls.check_controls(self.forward.config, self.forward.model)

    @property
    def states(self) -> tuple[str, ...]:
        """The S models of a client that are measured layer by layer: before, after, and the controls."""
        return STATES + self.forward.config.controls

    # --- on the devices ----------------------------------------------------------------------------

    def observe(self, view: MergeView, inputs: Any, data: DeviceData) -> dict[str, jax.Array]:
        """Everything that is measured, by name.

        f32[m, S, L] by state and layer; f32[m, S - 1, L] of each later state against `before`; f32[m, S + 1]
        of `start` and all states; f32[m, L] of the kernels. `spread` is ‖w_k - w'_k‖ / ‖w'_k‖ of a layer's
        kernel before (w) and after (w') the merge; `update_cosine` the mean cosine of a client's update of
        the kernel with the other measured clients'.
        """
        count = len(view.cohort.ids)
        spare = -count % self.mesh.size
        key = key_for(view.key, PEEL, view.cohort.round)
        keys = jax.vmap(partial(jax.random.fold_in, key))(view.cohort.ids)
        own = (view.start, view.before, view.after, inputs["fit"], inputs["measured"], keys)
        own = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf[:1].repeat(spare, 0)]), own)

        train = data.train
        pools = {"fit": train, "measured": inputs["test"] or train}

        def share(own, pools):
            width = None if self.width == 1 else self.width
            return jax.lax.map(lambda one: self._client(one, pools), own, batch_size=width)

        run = jax.shard_map(
            share, mesh=self.mesh, in_specs=(P(AXIS), P()), out_specs=P(AXIS), check_vma=False
        )
        out = jax.tree.map(lambda leaf: leaf[:count], run(own, pools))
        return out | self._kernels(view)

    def _client(self, own, pools) -> dict[str, jax.Array]:
        """One client: the same without m.

        The S models pass one after another through loops whose bodies hold the network once: written out, a
        deep network takes minutes to compile.
        """
        start, before, after, fit, measured, key = own
        models = [before, after]
        for name in self.forward.config.controls:
            models.append(controls.make(name, self.forward, before, after, (fit, pools["fit"]), key))
        models = jax.tree.map(lambda *leaves: jnp.stack(leaves), *models)
        learnt = self._fitted(models, fit, pools["fit"])
        begun, sums, classes, pairs = self._seen(start, models, learnt, measured, pools["measured"])

        total = measured["count"].astype(jnp.float32)
        for name in begun:
            sums[name] = jnp.concatenate([begun[name][None], sums[name]])
        out = {name: value / total for name, value in sums.items()}
        out["shift_cosine"] = 1 - out["shift_cosine"][1:]
        out["shift_cka"] = jnp.stack([1 - jax.vmap(linear_probes.linear_cka)(pair)[1:] for pair in pairs], 1)
        figures, traced = [], jax.jit(self._figures, inline=True, static_argnames="shape")  # once for a shape
        for moment, pair, point, shape in zip(
            classes, pairs, self.forward.model.peel_points, self.forward.shapes(), strict=True
        ):
            covariance = jnp.concatenate([pair.xx[1:2], pair.yy[1:]])
            one = partial(traced, shape=shape)
            kernels = leaf_at(models["params"], point.kernel)
            figures.append(jax.lax.map(lambda args, one=one: one(*args), (moment, covariance, kernels)))
        for name in figures[0]:
            out[name] = jnp.stack([of_layer[name] for of_layer in figures], 1)
        return out

    def _fitted(self, models, fit, pool):
        """What probes are made of: a pair (Ridge, Moments), leaves [S, …], for each layer."""

        def measure(images, labels, mask):
            target = jax.nn.one_hot(labels, self.forward.num_classes)

            def one(model):
                return [
                    (linear_probes.of_batch(pooled(z), target, mask), self.forward.moments(z, labels, mask))
                    for z in self.forward.features(model, images)[1]
                ]

            return jax.lax.map(one, models)

        learnt = self.forward.over(fit, pool, measure, _merged)
        return [(jax.lax.map(linear_probes.ridge, linear), means) for linear, means in learnt]

    def _seen(self, start, models, learnt, measured, pool):
        """The pass over the measured samples.

        Returns:
          Sums over them of `start`, f32[], and of the models, f32[S] or f32[S, L]; class moments, and
          comoments with the first model's features (none for itself), leaves [S, …], of each layer.
        """

        def measure(images, labels, mask):
            def right(guess):
                return ((guess == labels) & mask).sum().astype(jnp.float32)

            def answers(logits):
                loss = jnp.where(mask, _losses(logits, labels), 0).sum()
                return {"peel_loss": loss, "peel_accuracy": right(jnp.argmax(logits, -1))}

            def compared(first, own):
                flat, mean = zip(*[zip(*pair, strict=True) for pair in (first, own)], strict=True)
                cosines = [jnp.where(mask, _cosine(*pair), 0).sum() for pair in zip(*flat, strict=True)]
                return jnp.stack(cosines), [
                    linear_probes.of_batch(x, y, mask) for x, y in zip(*mean, strict=True)
                ]

            def viewed(model):
                logits, features = self.forward.features(model, images)
                return logits, [(self.forward.flat(z), pooled(z)) for z in features]

            def one(first, inputs):
                number, model, learnt = inputs
                logits, own = viewed(model)
                first = jax.tree.map(lambda a, b: jnp.where(number == 0, b, a), first, own)
                sums = answers(logits)
                sums["ridge"] = jnp.stack(
                    [
                        right(linear_probes.predict(ridge, mean))
                        for (ridge, _), (_, mean) in zip(learnt, own, strict=True)
                    ]
                )
                sums["ncm"] = jnp.stack(
                    [
                        right(moments.nearest_mean(means, flat))
                        for (_, means), (flat, _) in zip(learnt, own, strict=True)
                    ]
                )
                nothing = zeros_like(jax.eval_shape(compared, first, own))
                alike, pairs = jax.lax.cond(number > 0, compared, lambda *_: nothing, first, own)
                classes = [moments.of_batch(flat, labels, mask, self.forward.num_classes) for flat, _ in own]
                return first, (sums | {"shift_cosine": alike}, classes, pairs)

            count = jax.tree.leaves(models)[0].shape[0]
            nothing = zeros_like(jax.eval_shape(viewed, jax.tree.map(lambda leaf: leaf[0], models))[1])
            inputs = (jnp.arange(count, dtype=jnp.int32), models, learnt)
            _, seen = jax.lax.scan(one, nothing, inputs)
            return answers(self.forward.features(start, images)[0]), *seen

        return self.forward.over(measured, pool, measure, _merged)

    def _figures(self, m: moments.Moments, covariance, kernel, *, shape) -> dict[str, jax.Array]:
        """What one layer's features of one model say."""
        plain, even = moments.traces(m), moments.traces(m, balanced=True)
        out = {
            "trace_within": plain.within,
            "trace_between": plain.between,
            "trace_total": plain.total,
            "sigma_within": plain.within / plain.total,
            "sigma_between": plain.between / plain.total,
            "log_c": jnp.log(plain.within / plain.between),
            "log_c_balanced": jnp.log(even.within / even.between),
            "cdnv": moments.cdnv(m),
            "discrimination": moments.discrimination(m),
        }
        if self.forward.config.ranks:
            share = m.count / jnp.maximum(m.count.sum(), 1)
            centres = pooled(m.mean.reshape(self.forward.num_classes, *shape))
            away = (centres - (share @ centres)[None]) * jnp.sqrt(m.count)[:, None]
            out["rank"], out["stable_rank"] = linear_probes.ranks(covariance - away.T @ away)

        return out | self.angles(m, kernel, shape)

    def angles(self, m: moments.Moments, kernel: jax.Array, shape: Any) -> dict[str, jax.Array]:
        """The `pabs` family of one layer: its kernel against the class means of its input.

        Args:
          m: class moments of the input.
          kernel: of the layer, f32[d, F] or f32[kh, kw, C, F].
          shape: of one sample's input, see `Forward.shapes`.
        """
        maps = m.mean.reshape(self.forward.num_classes, *shape)
        share = m.count / jnp.maximum(m.count.sum(), 1)
        out = {}
        present = (m.count > 0).reshape(-1, *[1] * len(shape))
        classes = present.sum().astype(jnp.int32)
        centre = jnp.tensordot(share, maps, 1)
        weights = alignment.kernel_basis(kernel)
        for suffix, means, wanted in (("", maps, classes), ("_centred", maps - centre[None], classes - 1)):
            found = alignment.basis(alignment.means_matrix(jnp.where(present, means, 0)))
            cosines, r = alignment.cosines(weights, found, wanted, self.forward.num_classes)
            cosines = jnp.pad(cosines, (0, self.forward.num_classes - len(cosines)))
            size = r.astype(jnp.float32)
            out["pabs" + suffix] = cosines.sum() / size
            out["pabs_rank" + suffix] = size
            if not suffix:
                out["pabs_smallest"] = jnp.where(r > 0, cosines[jnp.maximum(r - 1, 0)], jnp.nan)
                out["pabs_cosines"] = cosines
        return out

    def _kernels(self, view: MergeView) -> dict[str, jax.Array]:
        """Of the layers' kernels: spread and agreement of updates, f32[m, L] each."""
        spread, agreement = [], []
        for point in self.forward.model.peel_points:
            start, before, after = (
                leaf_at(tree["params"], point.kernel).astype(jnp.float32)
                for tree in (view.start, view.before, view.after)
            )
            norm = lambda a: jnp.sqrt((a * a).reshape(len(a), -1).sum(1))  # noqa: E731
            spread.append(norm(before - after) / norm(after))
            update = (before - start).reshape(len(start), -1)
            size = norm(update)
            cosine = jnp.matmul(update, update.T, precision=jax.lax.Precision.HIGHEST) / (
                size[None] * size[:, None]
            )
            others = cosine.sum(1) - jnp.diagonal(cosine)
            agreement.append(others / (len(start) - 1) if len(start) > 1 else jnp.full_like(others, jnp.nan))
        return {"spread": jnp.stack(spread, 1), "update_cosine": jnp.stack(agreement, 1)}

    # --- on the host --------------------------------------------------------------------------------

    def rows(self, number: int, ids: np.ndarray, out: dict[str, np.ndarray], counts: np.ndarray) -> list[Row]:
        """The tidy rows of a round.

        Args:
          number: of the round, from 1.
          ids: i32[m], the clients that were looked at.
          out: what `observe` returned, by name; [m, …].
          counts: i32[m], samples that were measured of each.
        """
        made: list[Row] = []
        layers = [point.name for point in self.forward.model.peel_points]
        widths = [shape[-1] for shape in self.forward.shapes()]

        def add(metric, value, **where):
            made.append(make_row(number, metric, value, **where))

        for place, client in enumerate(ids.tolist()):
            for name in ("peel_accuracy", "peel_loss"):
                for state, value in zip(("start", *self.states), out[name][place], strict=True):
                    add(name, value, client=client, state=state)
            add("peel_samples", counts[place], client=client)
            for layer, name in enumerate(layers):
                for metric in KERNELS:
                    add(metric, out[metric][place, layer], layer=name, client=client)
                for s, state in enumerate(self.states):
                    where = dict(layer=name, client=client, state=state)
                    for metric in SHIFTS if s else ():
                        of = "" if state == "after" else state
                        add(metric, out[metric][place, s - 1, layer], layer=name, client=client, state=of)
                    for metric in EACH + RANKS * self.forward.config.ranks:
                        add(metric, out[metric][place, s, layer], **where)
                    pabs, r = out["pabs"][place, s, layer], int(out["pabs_rank"][place, s, layer])
                    add("pabs_corrected", alignment.corrected(float(pabs), widths[layer], r), **where)
                    if self.forward.config.angles:
                        for angle in range(r):
                            add(
                                f"pabs_cosine_{angle + 1}",
                                out["pabs_cosines"][place, s, layer, angle],
                                **where,
                            )
        return made


SHIFTS = ("shift_cka", "shift_cosine")
KERNELS = ("spread", "update_cosine")
EACH = (
    "trace_within", "trace_between", "trace_total", "sigma_within", "sigma_between", "log_c",
    "log_c_balanced", "cdnv", "discrimination", "pabs", "pabs_centred", "pabs_smallest", "pabs_rank",
    "ncm", "ridge",
)  # fmt: skip
RANKS = ("rank", "stable_rank")


def _merged(old, new):
    """Measurements of two batches together: moments, [S] of them, by their rules, arrays by addition."""
    rules = {moments.Moments: jax.vmap(moments.merge), linear_probes.Comoments: jax.vmap(linear_probes.merge)}
    is_one = lambda node: type(node) in rules  # noqa: E731
    return jax.tree.map(lambda a, b: rules.get(type(a), jnp.add)(a, b), old, new, is_leaf=is_one)


def _losses(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def _cosine(a, b):
    """Of rows; 1 where both are zero, 0 where one is. f32[B, d] twice -> f32[B]."""
    square = [(v * v).sum(1) for v in (a, b)]
    scale = jnp.sqrt(square[0] * square[1])
    cosine = (a * b).sum(1) / jnp.where(scale > 0, scale, 1)
    return jnp.where(scale > 0, cosine, ((square[0] == 0) & (square[1] == 0)).astype(a.dtype))


def leaf_at(tree: Any, path: tuple[str, ...]) -> Any:
    """What lies at a path of a nested mapping."""
    for key in path:
        tree = tree[key]
    return tree
