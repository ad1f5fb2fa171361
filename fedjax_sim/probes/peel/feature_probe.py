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
from fedjax_sim.engine.device_data import DeviceData
from fedjax_sim.engine.round import MergeView
from fedjax_sim.probes.peel import alignment, controls, linear_probes, moments
from fedjax_sim.probes.peel.clients import each_client
from fedjax_sim.probes.peel.forward import Forward, loop, side_by_side
from fedjax_sim.probes.peel.layers import Layers
from fedjax_sim.records import Row, make_row

STATES = ("before", "after")


@dataclasses.dataclass(frozen=True)
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
        """Everything that is measured; `by_name` takes it apart.

        Returns:
          figures: f32[m, S, L, F] by state, layer and figure.
          shifts: f32[m, S - 1, L, 2] of each later state against `before`.
          answers: f32[m, S + 1, 2], accuracy and loss of `start` and all states.
          pabs_cosines: f32[m, S, L, C].
          spread: f32[m, L], ‖w_k - w'_k‖ / ‖w'_k‖ of a layer's kernel before (w) and after (w') the merge.
          update_cosine: f32[m, L], the mean cosine of a client's update of the kernel with the other measured
            clients'.
        """
        key = key_for(view.key, PEEL, view.cohort.round)
        keys = jax.vmap(partial(jax.random.fold_in, key))(view.cohort.ids)
        models, own = (view.start, view.before, view.after), (inputs["fit"], inputs["measured"], keys)
        pools = {"fit": data.train, "measured": inputs["test"] or data.train}
        out = each_client(self.mesh, self._client, models, own, pools, width=self.width)
        return out | self._kernels(view)

    @property
    def _stacks(self) -> dict[str, tuple[str, ...]]:
        """The metrics in each array of `observe`, in order of its last axis."""
        ranks = RANKS if self.forward.config.ranks else ()
        return {"figures": EACH + ranks, "shifts": SHIFTS, "answers": ANSWERS}

    def by_name(self, out: dict[str, Any]) -> dict[str, Any]:
        """What `observe` returned by the metrics' names: [m, S, L], [m, S - 1, L], [m, S + 1] or [m, L]."""
        stacks = self._stacks
        found = {
            name: out[stack][..., place] for stack, own in stacks.items() for place, name in enumerate(own)
        }
        return found | {name: value for name, value in out.items() if name not in stacks}

    def _client(self, own, pools) -> dict[str, jax.Array]:
        """One client: the same without m.

        But for controls that run it too, the network stands once, in a loop over batches and in it over
        models. What follows is computed of all layers at once as far as their shapes allow it: written out,
        a deep network takes minutes to compile.
        """
        (start, before, after), (fit, measured, key) = own
        models = [before, after]
        for name in self.forward.config.controls:
            models.append(controls.make(name, self.forward, before, after, (fit, pools["fit"]), key))
        models = jax.tree.map(lambda *leaves: jnp.stack(leaves), *models, start)
        parts = [(fit, pools["fit"]), (measured, pools["measured"])]
        sums, found, (fitted, seen) = self._seen(models, parts)
        answers = self._linear(fitted, self.forward.labels(*parts[0]), seen, self.forward.labels(*parts[1]))
        total = measured["count"].astype(jnp.float32)
        out = answers | {name: value / total for name, value in (sums | {"ridge": answers["ridge"]}).items()}
        out["shift_cosine"], out["shift_cka"] = 1 - out["shift_cosine"][1:], 1 - out["cka"][1:]
        kernels = [leaf_at(models["params"], point.kernel) for point in self.forward.model.peel_points]
        angles = partial(self.angles, shapes=self.forward.shapes())
        out |= jax.vmap(_class_figures)(found) | self._of_models(angles, (found, kernels))
        stacks = {stack: jnp.stack([out[name] for name in own], -1) for stack, own in self._stacks.items()}
        return stacks | {"pabs_cosines": out["pabs_cosines"]}

    def _of_models(self, one, trees):
        """`one` of every of the S models, one after another; leaves [S or more, …]."""
        pick = lambda number: jax.tree.map(lambda leaf: leaf[number], trees)  # noqa: E731
        return jax.lax.map(lambda number: one(*pick(number)), jnp.arange(len(self.states), dtype=jnp.int32))

    def _seen(self, models, parts):
        """The pass over the samples that probes are fitted to, and then over the measured ones.

        Args:
          models: the S models and `start`, which sees the measured samples alone; leaves [S + 1, …].
          parts: (chosen, pool) of the one and of the other, see `Forward.collected`.

        Returns:
          Sums over the measured samples, f32[S + 1] with `start` first, and f32[S, L]; their class moments,
          leaves [S, …]; pooled features of both parts, f32[2, S, s, L, p].
        """
        count, layers = len(self.states), self.forward.layers

        def measure(part, total, images, labels, mask):
            known = jax.tree.map(lambda leaf: leaf[0], total[1])  # of the first part

            def right(guess):
                valid = mask.reshape(-1, *[1] * (guess.ndim - 1))
                here = labels.reshape(valid.shape)
                return ((guess == here) & valid).sum(0).astype(jnp.float32)

            def one(first, number):
                model, means = jax.tree.map(lambda leaf: leaf[number], (models, known))
                logits, features = self.forward.features(model, images)
                flat = [self.forward.flat(z) for z in features]
                z = layers.join(flat)
                first = jnp.where(number == 0, z, first)
                loss = jnp.where(mask, _losses(logits, labels), 0).sum()
                sums = [
                    jnp.stack([loss, right(jnp.argmax(logits, -1))]),
                    right(moments.nearest_mean(means, flat)),
                    jnp.where(mask[:, None], _cosines(layers, first, z), 0).sum(0),
                ]
                found = self.forward.moments(features, labels, mask)
                return first, ((jnp.concatenate(sums), found), side_by_side(features))

            nothing = jnp.zeros((len(images), layers.size), jnp.float32)
            return loop(one, nothing, count + part, count + 1)

        def merge(old, new):
            return old[0] + new[0], jax.vmap(moments.merge)(old[1], new[1])

        empty = moments.empty(self.forward.num_classes, layers.widths)
        nothing = jnp.zeros(2 + 2 * len(layers.widths), jnp.float32), empty
        nothing = jax.tree.map(lambda leaf: jnp.zeros((count + 1, *leaf.shape), leaf.dtype), nothing)
        total, rows = self.forward.collected(parts, measure, merge, nothing)
        sums, found = jax.tree.map(lambda leaf: leaf[1], total)
        loss, hits, (ncm, cosines) = sums[:, 0], sums[:, 1], jnp.split(sums[:count, 2:], 2, 1)
        sums = {"peel_loss": jnp.roll(loss, 1), "peel_accuracy": jnp.roll(hits, 1)}
        sums |= {"ncm": ncm, "shift_cosine": cosines}
        rows = jax.lax.collapse(rows[:, :, :count].swapaxes(1, 2), 2, 4)  # batches one after another
        return sums, jax.tree.map(lambda leaf: leaf[:count], found), rows

    def _linear(self, fitted, fit, seen, measured):
        """What linear probes and covariances of pooled features say of each layer of each model.

        Args:
          fitted: pooled features of the samples that probes are fitted to, f32[S, s, L, p].
          fit: labels i32[s] of these, and bool[s], False for padding.
          seen: pooled features of the measured samples, f32[S, s, L, p].
          measured: labels and mask of these.

        Returns:
          f32[S, L]: `ridge`, samples that the probe gets right; `cka` with the first model; the ranks.
        """
        target = jax.nn.one_hot(fit[0], self.forward.num_classes)
        labels, mask = measured
        member = jax.nn.one_hot(labels, self.forward.num_classes) * mask.astype(jnp.float32)[:, None]

        def of_layer(own):
            fitted, seen = own

            def one(pair):
                old, new = pair
                guess = jnp.argmax(linear_probes.ridge_scores(old, target, fit[1], new), 1)
                hits = ((guess == labels) & mask).sum().astype(jnp.float32)
                out = [hits]
                if self.forward.config.ranks:
                    means = _product(member.T, new) / jnp.maximum(member.sum(0), 1)[:, None]
                    away = (new - means[labels]) * mask.astype(jnp.float32)[:, None]
                    out += linear_probes.ranks(away)
                return jnp.stack(out)

            similar = linear_probes.linear_cka(seen, mask)
            return jnp.concatenate([similar[:, None], jax.lax.map(one, (fitted, seen))], 1)

        layers = [jnp.moveaxis(stack, 2, 0) for stack in (fitted, seen)]
        figures = jax.lax.map(of_layer, layers)  # [L, S, …]
        names = ("cka", "ridge", *(RANKS if self.forward.config.ranks else ()))
        return dict(zip(names, figures.transpose(2, 1, 0), strict=True))

    def angles(self, m: moments.Moments, kernels: Any, shapes: Any) -> dict[str, jax.Array]:
        """The `pabs` family of some layers: their kernels against the class means of their inputs.

        Args:
          m: class moments of the layers' inputs.
          kernels: of the layers, f32[d, F] or f32[kh, kw, C, F].
          shapes: of one sample's input of each layer, see `Forward.shapes`.

        Returns:
          f32[L] each; `pabs_cosines` f32[L, C].
        """
        most, share = self.forward.num_classes, m.count / jnp.maximum(m.count.sum(), 1)
        weights = [alignment.kernel_basis(kernel) for kernel in kernels]

        def against(means):
            parts = zip(weights, m.layers.split(means), shapes, strict=True)
            matrices = ((own, part.reshape(most, *shape)) for own, part, shape in parts)
            overlaps = [
                alignment.overlap(own, alignment.basis(alignment.means_matrix(maps)), most)
                for own, maps in matrices
            ]
            return jax.tree.map(lambda *leaves: jnp.stack(leaves), *overlaps)

        both = jnp.stack([m.mean, m.mean - _product(share[None], m.mean)])
        product, values = jax.lax.map(against, jnp.where(m.present[None, :, None], both, 0))
        present = m.present.sum().astype(jnp.int32)
        found, r = alignment.cosines(product, values, jnp.stack([present, present - 1])[:, None])
        mean = found.sum(2) / r.astype(jnp.float32)
        smallest = jnp.take_along_axis(found[0], jnp.maximum(r[0][:, None] - 1, 0), 1)[:, 0]
        return {
            "pabs": mean[0],
            "pabs_rank": r[0].astype(jnp.float32),
            "pabs_cosines": found[0],
            "pabs_smallest": jnp.where(r[0] > 0, smallest, jnp.nan),
            "pabs_centred": mean[1],
        }

    def _kernels(self, view: MergeView) -> dict[str, jax.Array]:
        """Of the layers' kernels: spread and agreement of updates, f32[m, L] each."""
        gaps, sizes, products = [], [], []
        for point in self.forward.model.peel_points:
            start, before, after = (
                leaf_at(tree["params"], point.kernel).astype(jnp.float32)
                for tree in (view.start, view.before, view.after)
            )
            flat = lambda a: a.reshape(len(a), -1)  # noqa: E731
            gaps.append((flat(before - after) ** 2).sum(1))
            sizes.append((flat(after) ** 2).sum(1))
            # Whole on every device: of one layer after another, and of no other figure.
            update = jax.lax.with_sharding_constraint(flat(before - start), P())
            products.append(_product(update, update.T))
        products = jax.lax.with_sharding_constraint(jnp.stack(products), P())
        size = jnp.sqrt(jnp.diagonal(products, axis1=1, axis2=2))
        cosines = products / (size[:, None] * size[:, :, None])
        others = cosines.sum(2) - jnp.diagonal(cosines, axis1=1, axis2=2)
        count = others.shape[1]
        agreement = others / (count - 1) if count > 1 else jnp.full_like(others, jnp.nan)
        return {"spread": jnp.sqrt(jnp.stack(gaps, 1) / jnp.stack(sizes, 1)), "update_cosine": agreement.T}

    # --- on the host --------------------------------------------------------------------------------

    def rows(self, number: int, ids: np.ndarray, out: dict[str, np.ndarray], counts: np.ndarray) -> list[Row]:
        """The tidy rows of a round.

        Args:
          number: of the round, from 1.
          ids: i32[m], the clients that were looked at.
          out: what `observe` returned.
          counts: i32[m], samples that were measured of each.
        """
        made: list[Row] = []
        out = self.by_name(out)
        layers = [point.name for point in self.forward.model.peel_points]
        widths = [shape[-1] for shape in self.forward.shapes()]

        def add(metric, value, **where):
            made.append(make_row(number, metric, value, **where))

        for place, client in enumerate(ids.tolist()):
            for name in ANSWERS:
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
                    for metric in self._stacks["figures"]:
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


ANSWERS = ("peel_accuracy", "peel_loss")
SHIFTS = ("shift_cka", "shift_cosine")
KERNELS = ("spread", "update_cosine")
EACH = (
    "trace_within", "trace_between", "trace_total", "sigma_within", "sigma_between", "log_c",
    "log_c_balanced", "cdnv", "discrimination", "pabs", "pabs_centred", "pabs_smallest", "pabs_rank",
    "ncm", "ridge",
)  # fmt: skip
RANKS = ("rank", "stable_rank")


def _class_figures(m: moments.Moments) -> dict[str, jax.Array]:
    """What class moments of a model say, f32[L] each."""
    plain, even = moments.traces(m), moments.traces(m, balanced=True)
    return {
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


def _losses(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def _cosines(layers: Layers, a: jax.Array, b: jax.Array) -> jax.Array:
    """Layer by layer; 1 where both are zero, 0 where one is. f32[B, D] twice -> f32[B, L]."""
    product, *square = layers.sums(jnp.stack([a * b, a * a, b * b]))
    scale = jnp.sqrt(square[0] * square[1])
    cosine = product / jnp.where(scale > 0, scale, 1)
    return jnp.where(scale > 0, cosine, ((square[0] == 0) & (square[1] == 0)).astype(jnp.float32))


def _product(a, b):
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def leaf_at(tree: Any, path: tuple[str, ...]) -> Any:
    """What lies at a path of a nested mapping."""
    for key in path:
        tree = tree[key]
    return tree
