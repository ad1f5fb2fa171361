"""The landscape's numbers against closed forms, dense Hessians and NumPy loops in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.flatten_util import ravel_pytree

import fedjax_sim as fs
from fedjax_sim import models
from fedjax_sim.core.errors import UserError
from fedjax_sim.data import Preprocessing, normalise
from fedjax_sim.models.kernels import conv
from fedjax_sim.models.norms import norm
from fedjax_sim.probes import landscape
from fedjax_sim.probes.landscape import objective, surfaces
from fedjax_sim.probes.landscape.curvature import lanczos
from fedjax_sim.probes.landscape.directions import filter_norms

KEY = jax.random.key(3)
SIZE, SAMPLES = 12, 23  # samples divide neither by devices nor by the batch


def quadratic(rng, eigenvalues, slope=0.0):
    """(objective, A, b): L(w) = ½ wᵀAw + bᵀw, as a mean over samples that differ in b."""
    turn, _ = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))
    matrix = (turn * eigenvalues) @ turn.T
    parts = rng.normal(size=(SAMPLES, SIZE)).astype(np.float32)
    parts += np.float32(slope) - parts.mean(0)

    def function(variables, images, labels):
        w = ravel_pytree(variables["params"])[0]
        half = 0.5 * jnp.vdot(w, jnp.asarray(matrix, jnp.float32) @ w)
        return half + images @ w, labels == 1

    labels = (np.arange(SAMPLES) < 5).astype(np.int32)
    return landscape.Objective(function, parts, labels, batch_size=2), matrix, parts.mean(0)


def variables_of(vector):
    """A model whose parameters are these numbers: a kernel and a bias."""
    vector = np.asarray(vector, np.float32)
    return {"params": {"fc": {"bias": vector[:3], "kernel": vector[3:].reshape(3, 3)}}}


@pytest.fixture(scope="module")
def net():
    """(model, variables, images f32, labels) of a tiny network."""
    rng = np.random.default_rng(5)
    model = models.create("mlp", (4, 4, 1), 3, hidden=[5])
    images = rng.normal(size=(21, 4, 4, 1)).astype(np.float32)
    return model, model.init(KEY), images, rng.integers(0, 3, 21).astype(np.int32)


# --- closed forms -------------------------------------------------------------------------------------


def test_of_a_quadratic_everything_is_known(rng):
    eigenvalues = np.asarray([9.0, 4.0, 4.0, 2.0, 1.0, 0.5, 0.3, 0.2, 0.1, 0.0, -0.5, -1.0])
    objective, matrix, slope = quadratic(rng, eigenvalues)
    w, d, e = rng.normal(size=(3, SIZE))

    def loss(v):
        return 0.5 * v @ matrix @ v + slope @ v

    at = np.linspace(-1, 2, 7)
    found = landscape.line(objective, variables_of(w), variables_of(d), at)
    np.testing.assert_allclose(found.loss, [loss(w + t * d) for t in at], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.accuracy, 5 / SAMPLES)  # padding counts nowhere
    x, y = np.linspace(-1, 1, 5), np.linspace(0, 2, 7)  # more points than one call takes
    found = landscape.surface(objective, variables_of(w), variables_of(d), variables_of(e), x, y)
    expected = [[loss(w + s * d + t * e) for t in y] for s in x]
    np.testing.assert_allclose(found.loss, expected, rtol=1e-5, atol=1e-4)
    value, gradient = objective.gradient(variables_of(w), d)
    np.testing.assert_allclose(value, loss(w + d), rtol=1e-5)
    np.testing.assert_allclose(gradient, matrix @ (w + d) + slope, rtol=1e-4, atol=1e-5)
    # As many steps as parameters: all eigenvalues, the double one twice.
    found = landscape.spectrum(objective, variables_of(w), KEY, k=SIZE, steps=99, probes=400)
    np.testing.assert_allclose(found.eigenvalues, eigenvalues, atol=2e-5)
    np.testing.assert_allclose(found.least, -1, atol=2e-5)
    assert found.residuals.shape == (SIZE,) and found.residuals.max() < 1e-4
    few = landscape.spectrum(objective, variables_of(w), KEY, k=2, steps=3, probes=2)
    off = np.abs(few.eigenvalues[:, None] - eigenvalues).min(1)
    assert (off <= few.residuals + 1e-5).all() and few.residuals.max() > 0.05
    # vᵀAv of signs v has variance 2 (‖A‖² − ‖diag A‖²).
    deviation = np.sqrt(2 * (np.square(matrix).sum() - np.square(np.diag(matrix)).sum()) / 400)
    np.testing.assert_allclose(found.trace_error, deviation, rtol=0.2)
    assert abs(found.trace - eigenvalues.sum()) < 4 * deviation


def test_residuals_bound_the_error_of_few_steps(rng):
    values = np.sort(rng.uniform(0, 1, 40))[::-1]
    values[:3] = [8.0, 5.0, 3.0]
    turn, _ = np.linalg.qr(rng.normal(size=(40, 40)))
    matrix = (turn * values) @ turn.T
    found, vectors = lanczos(lambda v: matrix @ v, 40, 8, lambda _: rng.normal(size=40), 3)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1)
    for value, vector in zip(found[:3], vectors, strict=True):
        assert np.abs(value - values).min() <= np.linalg.norm(matrix @ vector - value * vector) + 1e-6
    np.testing.assert_allclose(found[0], 8.0, atol=1e-3)
    np.testing.assert_allclose(np.abs(vectors[0] @ turn[:, 0]), 1, atol=1e-3)


@pytest.mark.parametrize("scale", ["absolute", "relative", "filter"])
def test_sharpness_of_a_quadratic(rng, scale):
    eigenvalues = np.asarray([9.0, 4.0, 3.0, 2.0, 1.0, 0.5, 0.3, 0.2, 0.1, 0.0, 0.0, 0.0])
    objective, matrix, _ = quadratic(rng, eigenvalues)
    w = rng.normal(size=SIZE)
    # At the minimum of a shifted copy, where the slope is 0: L(w + δ) − L(w) = ½ δᵀAδ.
    inner = objective.function
    objective.function = lambda variables, images, labels: inner(
        jax.tree.map(lambda leaf, centre: leaf - centre, variables, variables_of(w)), images, labels
    )
    kernel = w[3:].reshape(3, 3)
    norms = np.concatenate([np.zeros(3), np.tile(np.linalg.norm(kernel, axis=0), 3)])
    stretch = {"absolute": np.ones(SIZE), "relative": np.full(SIZE, np.linalg.norm(w)), "filter": norms}[
        scale
    ]
    inside = stretch[:, None] * matrix * stretch[None]
    rho = 0.3
    found = landscape.sharpness(objective, variables_of(w), KEY, rho=rho, scale=scale, steps=40, draws=200)
    top = np.linalg.eigvalsh(inside)[-1]
    np.testing.assert_allclose(found.worst, 0.5 * rho**2 * top, rtol=1e-3)
    free = np.count_nonzero(stretch)
    expected = 0.5 * rho**2 * np.trace(inside) / free
    assert 0 < found.average_error < 0.2 * expected
    assert abs(found.average - expected) < 4 * found.average_error


def test_worst_case_climbs_a_slope(rng):
    objective, _, slope = quadratic(rng, np.zeros(SIZE), slope=2.0)
    found = landscape.sharpness(objective, variables_of(np.ones(SIZE)), KEY, rho=0.5, steps=3, starts=1)
    np.testing.assert_allclose(found.worst, 0.5 * np.linalg.norm(slope), rtol=1e-4)
    assert abs(found.average) < 1e-5  # ± draws: the slope drops out


def test_no_barrier_where_the_loss_is_convex(rng):
    objective, matrix, _ = quadratic(rng, np.linspace(0, 5, SIZE))
    a, b = rng.normal(size=(2, SIZE))
    found = landscape.barrier(objective, variables_of(a), variables_of(b), 9)
    assert abs(found.height) <= 1e-5 and found.accuracy <= 1e-12 and found.prominence <= 1e-5
    np.testing.assert_allclose(found.distance, np.linalg.norm(a - b), rtol=1e-5)
    np.testing.assert_allclose(found.middle, -(a - b) @ matrix @ (a - b) / 8, rtol=1e-4)
    np.testing.assert_allclose(found.curve.at[[0, -1]], [0, 1])
    # Upside down it is a hill, highest in the middle: ⅛ (a − b)ᵀA(a − b).
    objective, matrix, _ = quadratic(rng, -np.linspace(0, 5, SIZE))
    found = landscape.barrier(objective, variables_of(a), variables_of(b), 9)
    np.testing.assert_allclose(found.height, -(a - b) @ matrix @ (a - b) / 8, rtol=1e-4)
    assert found.at == 0.5 and found.middle == found.height
    ends = found.curve.loss[[0, -1]]
    np.testing.assert_allclose(found.prominence, found.curve.loss.max() - ends.max(), rtol=1e-6)


@pytest.mark.parametrize(("end", "height"), [(1.0, 1.0), (1.5, 0.0), (1.8, 0.0)])
def test_two_valleys_are_seen_from_high_on_their_walls_too(end, height):
    """(w² − 1)² + 1 is 1 at ±1 and 2 between them, all of it below the chord of high ends."""

    def function(variables, images, labels):
        w = variables["params"]["fc"]["kernel"][0, 0]
        return jnp.square(w**2 - 1) + 1 + 0 * images[:, 0], labels == 1

    objective = landscape.Objective(function, np.zeros((2, 1), np.float32), np.ones(2, np.int32))
    ends = ({"params": {"fc": {"kernel": np.full((1, 1), sign * end, np.float32)}}} for sign in (-1, 1))
    found = landscape.barrier(objective, *ends, 721)
    np.testing.assert_allclose(found.height, height, atol=1e-4)
    np.testing.assert_allclose([found.prominence, found.distance], [1, 2 * end], rtol=1e-4)


@pytest.mark.parametrize(("losses", "expected"), [
    ([3, 1, 2, 4], 0),
    ([3, 1, 2, 0, 4], 1),
    ([0, 5, 1, 3, 2, 9], 4),
    ([1, np.inf, 2], np.inf),
    ([np.inf, 1, np.inf], 0),
])  # fmt: skip
def test_prominence(losses, expected):
    assert surfaces._prominence(np.asarray(losses, np.float64)) == expected


def test_a_plane_passes_through_its_models(rng):
    objective, matrix, slope = quadratic(rng, np.linspace(0, 5, SIZE))
    w = rng.normal(size=(3, SIZE))
    found = landscape.plane(objective, [variables_of(one) for one in w], 5, 0.25)
    for i in range(3):
        for j in range(3):
            apart = np.linalg.norm(found.models[i] - found.models[j])
            np.testing.assert_allclose(apart, np.linalg.norm(w[i] - w[j]), rtol=1e-5)
    # A quadratic's restriction to the plane, from any affine coordinates of the same point.
    lift = np.linalg.lstsq(found.models[1:], w[1:] - w[:1], rcond=None)[0]
    for i, x in enumerate(found.x):
        for j, y in enumerate(found.y):
            v = w[0] + np.asarray([x, y]) @ lift
            np.testing.assert_allclose(found.loss[i, j], 0.5 * v @ matrix @ v + slope @ v, rtol=1e-4)
    low, high = found.models.min(0), found.models.max(0)
    np.testing.assert_allclose(
        [found.x[0], found.y[-1]], [(low - 0.25 * (high - low))[0], (high + 0.25 * (high - low))[1]]
    )
    with pytest.raises(UserError, match="one line"):
        landscape.plane(objective, [variables_of(v) for v in (w[0], w[1], 2 * w[1] - w[0])])


# --- networks -----------------------------------------------------------------------------------------


def test_a_network_against_its_dense_hessian(net):
    model, variables, images, labels = net
    objective = landscape.Objective(model, images, labels, batch_size=2)
    flat, tree = ravel_pytree(variables["params"])

    def loss(vector):
        logits, _ = model.with_conv("xla").apply({"params": tree(vector)}, images)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)
        return -picked.mean()

    dense = np.asarray(jax.hessian(loss)(flat), np.float64)
    values = np.linalg.eigvalsh(dense)[::-1]
    found = landscape.spectrum(objective, variables, KEY, k=4, steps=len(flat), probes=200)
    np.testing.assert_allclose(found.eigenvalues, values[:4], rtol=1e-3)
    np.testing.assert_allclose(found.least, values[-1], rtol=1e-2, atol=1e-4)
    assert abs(found.trace - np.trace(dense)) < 4 * found.trace_error
    value, gradient = objective.gradient(variables)
    np.testing.assert_allclose(value, loss(flat), rtol=1e-5)
    np.testing.assert_allclose(gradient, jax.grad(loss)(flat), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) for name in ("mcmahan", "resnet20")]
)
def test_networks_of_the_zoo_against_forward_over_reverse(rng, name):
    model = models.create(name, (8, 8, 1), 3)
    variables = model.init(KEY)
    images = rng.integers(0, 256, (3, 8, 8, 1)).astype(np.uint8)
    labels = np.asarray([0, 1, 2], np.int32)
    about = Preprocessing()
    objective = landscape.Objective(model.with_conv("patches"), images, labels, preprocessing=about)
    value, v = objective.gradient(variables)  # random directions of so many parameters hardly curve
    flat, tree = ravel_pytree(variables["params"])

    def loss(vector):
        changed = {**variables, "params": tree(vector)}
        logits, _ = model.with_conv("xla").apply(changed, normalise(images, about))
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean()

    slope, product = jax.jit(lambda p, v: jax.jvp(jax.grad(loss), (p,), (v,)))(flat, v.astype(np.float32))
    np.testing.assert_allclose(v, slope, rtol=1e-3, atol=1e-5 * np.abs(v).max())
    found = objective.hessian_product(variables, v)
    assert np.linalg.norm(found - product) < 1e-3 * np.linalg.norm(product)
    logits, _ = model.apply(variables, normalise(images, about))  # running statistics
    expected = -np.mean(np.asarray(jax.nn.log_softmax(logits), np.float64)[np.arange(3), labels])
    np.testing.assert_allclose(value, expected, rtol=1e-4)


class Smooth(nn.Module):
    """The package's convolution and batch norm without a kink, so that differences have a limit."""

    @nn.compact
    def __call__(self, x, *, train=False, mask=None):
        x = conv.Conv(4, (3, 3), name="conv1")(x)
        x = nn.tanh(norm("batch")(name="norm1")(x, train=train, mask=mask))
        return nn.Dense(3, name="fc")(jnp.mean(conv.Conv(4, (3, 3), name="conv2")(x), (1, 2)))


def test_the_hessian_is_the_limit_of_differences_of_gradients(rng):
    model = models.Model("smooth", Smooth(), (6, 6, 1), 3)
    variables = model.init(KEY)
    variables["batch_stats"] = jax.tree.map(lambda leaf: leaf + 0.3, variables["batch_stats"])
    images = rng.normal(size=(9, 6, 6, 1)).astype(np.float32)
    labels = rng.integers(0, 3, 9).astype(np.int32)
    objective = landscape.Objective(model, images, labels, batch_size=2)
    logits, _ = model.apply(variables, images)  # running statistics
    expected = -np.asarray(jax.nn.log_softmax(logits), np.float64)[np.arange(9), labels].mean()
    np.testing.assert_allclose(objective.gradient(variables)[0], expected, rtol=1e-5)
    v = rng.normal(size=landscape.objective.size(variables))
    v /= np.linalg.norm(v)
    up, down = (objective.gradient(variables, sign * 1e-2 * v)[1] for sign in (1, -1))
    slope = (up - down) / 2e-2
    difference = objective.hessian_product(variables, v) - slope
    assert np.linalg.norm(difference) < 5e-3 * np.linalg.norm(slope)


def test_bfloat16_models_are_looked_at_in_float32(net):
    model, variables, images, labels = net
    coarse = models.create("mlp", (4, 4, 1), 3, hidden=[5], dtype="bfloat16")
    fine, same = (landscape.Objective(m, images, labels).gradient(variables)[0] for m in (model, coarse))
    assert fine == same


def test_products_are_those_of_the_landscape_and_not_of_training(net):
    trained_with = dataclasses.replace(net[0], products="tensorfloat32")
    assert objective.CrossEntropy(trained_with).model.products is None


def test_filters_of_a_direction_have_the_norms_of_the_models():
    model = models.Model("smooth", Smooth(), (6, 6, 1), 3)
    variables = jax.tree.map(np.asarray, model.init(KEY))
    direction = landscape.filter_normalised(KEY, variables)
    assert jax.tree.structure(direction) == jax.tree.structure(variables)
    pairs = []
    for (path, d), w in zip(
        jax.tree_util.tree_leaves_with_path(direction), jax.tree.leaves(variables), strict=True
    ):
        d, w = np.asarray(d, np.float64), np.asarray(w, np.float64)
        if path[0].key == "batch_stats" or w.ndim < 2:
            assert not d.any()
            continue
        mine, own = (np.sqrt(np.square(v).reshape(-1, v.shape[-1]).sum(0)) for v in (d, w))
        np.testing.assert_allclose(mine, own, rtol=1e-5)
        pairs.append(np.stack([(d / mine).ravel(), (w / own).ravel()]))
    assert len(pairs) == 3  # conv1, conv2, fc
    assert abs(np.corrcoef(np.concatenate(pairs, 1))[0, 1]) < 0.4  # it is no copy of the weights
    kernel = lambda key: np.asarray(landscape.filter_normalised(key, variables)["params"]["fc"]["kernel"])  # noqa: E731
    np.testing.assert_array_equal(kernel(KEY), direction["params"]["fc"]["kernel"])
    assert np.abs(kernel(KEY) - kernel(jax.random.key(4))).max() > 0
    # A filter of zeros has no direction, and positions of a transformer are one filter.
    zeros, ones = np.zeros((2, 3), np.float32), np.ones((2, 2), np.float32)
    norms = filter_norms({"params": {"fc": {"kernel": zeros}, "positions": ones}})
    assert not np.asarray(norms["fc"]["kernel"]).any()
    np.testing.assert_allclose(norms["positions"], 2.0)
    assert not np.asarray(
        landscape.filter_normalised(KEY, {"params": {"kernel": zeros}})["params"]["kernel"]
    ).any()


def test_neither_batches_nor_devices_change_a_thing(net):
    model, variables, images, labels = net
    direction = landscape.filter_normalised(KEY, variables)
    parts = []
    for batch, devices in ((100, 1), (3, 1), (2, 4)):
        mesh = fs.placement.make_mesh(devices)
        objective = landscape.Objective(model, images, labels, batch_size=batch, mesh=mesh)
        v = np.linspace(-1, 1, landscape.objective.size(variables))
        curve = landscape.line(objective, variables, direction, np.linspace(-1, 1, 5))
        parts.append([curve.loss, curve.accuracy, objective.hessian_product(variables, v)])
    for other in parts[1:]:
        for a, b in zip(parts[0], other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_mistakes_are_told_before_anything_is_compiled(net):
    model, variables, images, labels = net
    with pytest.raises(UserError, match=r"samples = 0"):
        landscape.Objective(model, images[:0], labels[:0])
    with pytest.raises(UserError, match=r"samples = 20"):
        landscape.Objective(model, images, labels[:-1])
    objective = landscape.Objective(model, images, labels)
    for call, told in (
        (lambda: landscape.spectrum(objective, variables, KEY, k=5, steps=4), "eigenvalues = 5"),
        (lambda: landscape.spectrum(objective, variables, KEY, probes=1), "probes = 1"),
        (lambda: landscape.sharpness(objective, variables, KEY, rho=0.0), "rho = 0"),
        (lambda: landscape.sharpness(objective, variables, KEY, scale="mean"), "scale = 'mean'"),  # type: ignore[arg-type]
        (lambda: landscape.barrier(objective, variables, variables, 2), "points = 2"),
        (lambda: landscape.plane(objective, [variables]), "models = 1"),
    ):
        with pytest.raises(UserError, match=told):
            call()
    broken = {**variables, "params": jax.tree.map(lambda leaf: leaf * jnp.nan, variables["params"])}
    with pytest.raises(UserError, match="not finite"):
        landscape.spectrum(objective, broken, KEY)


def test_counts_and_flags_of_a_model_stay_on_every_line(rng):
    """They have no direction: all points have those of the model from which the line starts."""

    def function(variables, images, labels):
        told = variables["told"]
        assert told["count"].dtype == jnp.int32 and told["flag"].dtype == bool
        wrong = (told["count"] != 2**24 + 1) | ~told["flag"]
        return images @ variables["params"]["w"] + jnp.where(wrong, 1e3, 0.0), labels == 1

    images = rng.normal(size=(7, 3)).astype(np.float32)
    objective = landscape.Objective(function, images, np.zeros(7, np.int32))
    models = [
        {
            "params": {"w": rng.normal(size=3).astype(np.float32)},
            "told": {"count": np.int32(n), "flag": np.bool_(f)},
        }
        for n, f in ((2**24 + 1, True), (5, False), (7, True))
    ]
    found = landscape.barrier(objective, models[0], models[1], points=3)
    ends = [float((images @ model["params"]["w"]).mean()) for model in models[:2]]
    np.testing.assert_allclose(found.curve.loss, [ends[0], sum(ends) / 2, ends[1]], atol=1e-5)
    assert landscape.plane(objective, models, points=3).loss.max() < 100
    direction = landscape.filter_normalised(KEY, models[0])
    assert landscape.line(objective, models[0], direction, np.linspace(-1, 1, 3)).loss.max() < 100
