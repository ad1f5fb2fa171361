import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from fedjax_sim import models
from fedjax_sim.core.errors import UserError
from fedjax_sim.models import layers
from fedjax_sim.models.vgg import VGG
from fedjax_sim.models.zoo import TABLE

KEY = jax.random.key(0)
CIFAR, GREY = (32, 32, 3), (28, 28, 1)

COUNTS = [
    ("mlp", GREY, 10, 199_210),
    ("mcmahan", CIFAR, 10, 2_156_490),
    ("mcmahan", GREY, 10, 1_663_370),
    ("lenet", CIFAR, 10, 62_006),
    ("lenet", CIFAR, 20, 62_856),
    ("femnist_cnn", GREY, 62, 160_510),
    ("resnet20", CIFAR, 10, 219_482),
    ("resnet20", CIFAR, 20, 222_052),
    ("resnet20_femnist", GREY, 62, 232_558),
    ("vgg16_bn", CIFAR, 10, 33_646_666),
    ("vgg16_bn", CIFAR, 20, 33_687_636),
    ("vgg16_mnist", GREY, 62, 8_024_958),
    ("vgg11_bn", CIFAR, 10, 3_918_858),
    ("vgg11_bn", CIFAR, 100, 3_965_028),
    ("cnn8", CIFAR, 10, 51_666),
    ("resnet6", CIFAR, 10, 314_954),
    ("resnet8", CIFAR, 10, 1_235_274),
    ("resnet8", CIFAR, 100, 1_258_404),
    ("resnet10", (64, 64, 3), 200, 5_008_392),
    ("resnet18", CIFAR, 100, 11_227_812),
    ("resnet18_cifar", CIFAR, 10, 11_173_962),
]

# Small enough to run, and with the others' every kind of layer.
SMALL: dict[str, tuple[tuple[int, int, int], dict]] = {
    "mlp": (GREY, {"hidden": [16, 8]}),
    "mcmahan": ((8, 8, 3), {}),
    "lenet": ((16, 16, 3), {}),
    "femnist_cnn": ((16, 16, 1), {}),
    "resnet20": ((8, 8, 3), {}),
    "resnet20_femnist": ((8, 8, 1), {}),
    "vgg16_bn": (CIFAR, {"hidden": [16]}),
    "vgg16_mnist": ((14, 14, 1), {}),
    "vgg11_bn": (CIFAR, {}),
    "cnn8": ((8, 8, 3), {}),
    "resnet6": ((8, 8, 3), {}),
    "resnet8": ((8, 8, 3), {}),
    "resnet10": ((8, 8, 3), {}),
    "resnet18": ((8, 8, 3), {}),
    "resnet34": ((8, 8, 3), {}),
    "resnet18_cifar": ((8, 8, 3), {}),
    "vit": ((8, 8, 3), {"width": 16, "depth": 2, "heads": 2}),
}
RUN = ["mlp", "mcmahan", "lenet", "femnist_cnn", "resnet20", "vgg11_bn", "resnet6", "vit"]


def small(name, num_classes=5, **options):
    shape, fixed = SMALL[name]
    return models.create(name, shape, num_classes, **{**fixed, **options})


def start(model, seed=1):
    """Variables drawn by NumPy: compiling a network's own draws would take longer than all else here."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if path[-1].key in ("scale", "var"):
            return jnp.ones(leaf.shape, jnp.float32)
        values = rng.normal(size=leaf.shape) / np.sqrt(max(leaf.size // leaf.shape[-1], 2))
        return jnp.asarray(values, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(model.init, KEY))


def batch(model, rows, seed=0):
    return jax.random.normal(jax.random.key(seed), (rows, *model.input_shape), jnp.float32)


def flat(tree):
    return traverse_util.flatten_dict(tree)


@pytest.mark.parametrize(("name", "shape", "classes", "count"), COUNTS)
def test_parameter_counts_are_those_of_the_sources(name, shape, classes, count):
    assert models.create(name, shape, classes).num_params() == count


@pytest.mark.parametrize(
    ("name", "shape", "trainable", "state"),
    [
        ("lenet", CIFAR, 10, 10),
        ("femnist_cnn", GREY, 8, 8),
        ("resnet20", CIFAR, 62, 119),
        ("vgg16_bn", CIFAR, 58, 97),
        ("vgg16_mnist", GREY, 14, 14),
    ],
)
def test_tensor_counts_are_those_of_fedmrs_code(name, shape, trainable, state):
    variables = jax.eval_shape(models.create(name, shape, 10).init, KEY)
    running = flat(variables.get("batch_stats", {}))
    counters = sum(path[-1] == "mean" for path in running)  # PyTorch's num_batches_tracked
    assert len(flat(variables["params"])) == trainable
    assert trainable + len(running) + counters == state


@pytest.mark.parametrize(
    ("name", "maskable"),
    [
        ("vgg11_bn", 3_907_584),
        ("resnet6", 303_104),
        ("resnet8", 1_220_608),
        ("resnet10", 4_890_624),
        ("resnet18", 11_157_504),
    ],
)
def test_inner_convolutions_add_up_to_lipss_maskable_weights(name, maskable):
    params = flat(jax.eval_shape(models.create(name, CIFAR, 10).init, KEY)["params"])
    inner = [leaf.size for path, leaf in params.items() if leaf.ndim == 4 and path[0] != "conv1"]
    assert sum(inner) == maskable


@pytest.mark.parametrize("name", TABLE)
def test_every_kernel_has_one_peel_point_whose_feature_it_can_read(name):
    model = small(name)
    variables = jax.eval_shape(model.init, KEY)
    params = flat(variables["params"])
    kernels = {path for path in params if path[-1] == "kernel"}
    assert len(model.peel_points) == len(kernels)
    assert {point.kernel for point in model.peel_points} == kernels
    images = jax.ShapeDtypeStruct((3, *model.input_shape), jnp.float32)
    logits, features = jax.eval_shape(model.features, variables, images)
    assert logits.shape == (3, 5)
    assert list(features) and set(features) == {point.name for point in model.peel_points}
    for point in model.peel_points:
        assert features[point.name].shape[0] == 3
        assert features[point.name].shape[-1] == params[point.kernel].shape[-2]
        assert point.name == "/".join(point.kernel[:-1])


@pytest.mark.parametrize("name", TABLE)
def test_peel_points_run_from_input_to_classifier_in_the_order_of_the_layers(name):
    model = small(name)
    order = [path[1:] for path in model.layer_order() if path[0] == "params" and path[-1] == "kernel"]
    assert [point.kernel for point in model.peel_points] == order
    params = flat(jax.eval_shape(model.init, KEY)["params"])
    assert params[model.peel_points[-1].kernel].shape[-1] == 5


def test_features_are_what_the_weight_layers_read(rng):
    model = small("lenet")
    variables = start(model)
    logits, features = model.features(variables, batch(model, 2))
    last = variables["params"]["fc3"]
    expected = features["fc3"] @ last["kernel"] + last["bias"][None]
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(features["conv1"], batch(model, 2))


@pytest.mark.parametrize("name", RUN)
def test_logits_are_float32_and_each_row_stands_alone_in_evaluation(name):
    model = small(name)
    variables = start(model)
    images = batch(model, 3)
    apply = jax.jit(lambda v, x: model.apply(v, x)[0])
    logits = apply(variables, images)
    assert logits.shape == (3, 5) and logits.dtype == jnp.float32
    other = images.at[1:].set(9.0)
    np.testing.assert_allclose(apply(variables, other)[0], logits[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        ("resnet20", "batch"),
        pytest.param("vgg11_bn", "batch", marks=pytest.mark.slow),
        ("resnet6", "batch"),
        ("resnet6", "group"),
    ],
)
def test_padded_rows_are_invisible_in_training(name, norm):
    model = small(name, norm=norm)
    variables = start(model)
    mask = jnp.asarray([True, True, False, True])

    @jax.jit
    def step(images):
        return model.apply(variables, images, train=True, mask=mask)

    images = batch(model, 4)
    logits, new = step(images)
    other_logits, other_new = step(images.at[2].set(50.0))
    np.testing.assert_array_equal(logits[mask], other_logits[mask])
    assert not np.allclose(logits[2], other_logits[2])
    assert ("batch_stats" in new) == (norm == "batch")
    for path, leaf in flat(new.get("batch_stats", {})).items():
        np.testing.assert_array_equal(leaf, flat(other_new["batch_stats"])[path])


def test_a_padded_batch_trains_like_the_short_one():
    model = small("resnet6")
    variables = start(model)
    images = batch(model, 4)

    @jax.jit
    def step(images, mask):
        def loss(params):
            logits, new = model.apply({**variables, "params": params}, images, train=True, mask=mask)
            return jnp.sum(jnp.where(mask, jnp.square(logits - 1.0).sum(1), 0.0)), new

        return jax.grad(loss, has_aux=True)(variables["params"])

    grads, new = step(images.at[3].set(50.0), jnp.asarray([True, True, True, False]))
    short_grads, short_new = step(images[:3], jnp.asarray([True, True, True]))
    for path, leaf in flat(new["batch_stats"]).items():
        np.testing.assert_allclose(leaf, flat(short_new["batch_stats"])[path], rtol=1e-4, atol=1e-6)
    for path, leaf in flat(grads).items():
        expected = flat(short_grads)[path]
        np.testing.assert_allclose(leaf, expected, atol=1e-3 * float(jnp.abs(expected).max()) + 1e-5)


def test_running_statistics_move_in_training_only():
    model = small("resnet20")
    variables = start(model)
    _, same = jax.jit(model.apply)(variables, batch(model, 3))
    _, moved = jax.jit(lambda v, x: model.apply(v, x, train=True))(variables, batch(model, 3))
    for path, leaf in flat(variables["batch_stats"]).items():
        np.testing.assert_array_equal(flat(same["batch_stats"])[path], leaf)
        changed = not np.array_equal(flat(moved["batch_stats"])[path], leaf)
        assert changed == (path[0] != "unused_norm"), path


@pytest.mark.parametrize("name", ["resnet20", "resnet6", "vgg11_bn"])
def test_without_norm_there_is_none_and_convolutions_have_a_bias(name):
    variables = jax.eval_shape(small(name, norm="none").init, KEY)
    assert set(variables) == {"params"}
    paths = flat(variables["params"])
    assert not any(path[-1] == "scale" for path in paths)
    assert all((*path[:-1], "bias") in paths for path in paths if path[-1] == "kernel")


@pytest.mark.parametrize("name", ["mcmahan", "resnet20", "resnet6", "vit"])
def test_bfloat16_computes_near_float32_with_float32_parameters(name):
    model, exact = small(name, dtype="bfloat16"), small(name)
    variables = start(model)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    images = batch(model, 2)
    logits, expected = jax.jit(lambda v, x: (model.apply(v, x)[0], exact.apply(v, x)[0]))(variables, images)
    assert logits.dtype == jnp.float32
    assert not np.array_equal(logits, expected)
    np.testing.assert_allclose(logits, expected, atol=0.06 * float(jnp.abs(expected).max()) + 0.02)


def test_dropout_needs_a_key_in_training_only():
    module = VGG(5, stages=((4,),), hidden=(8,), dropout=0.5, norm="none")
    model = models.Model("tiny", module, (4, 4, 1), 5)
    variables = start(model)
    images = batch(model, 2)
    train = jax.jit(lambda v, x, key: model.apply(v, x, train=True, rng=key)[0])
    first, again, other = (train(variables, images, jax.random.key(i)) for i in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    assert model.apply(variables, images)[0].shape == (2, 5)


def test_a_class_token_adds_itself_and_its_position():
    mean, cls = small("vit"), small("vit", pool="cls")
    assert cls.num_params() - mean.num_params() == 2 * 16
    logits, _ = jax.jit(cls.apply)(start(cls), batch(cls, 2))
    assert logits.shape == (2, 5)


def test_vit_without_positions_does_not_see_the_order_of_patches():
    model = small("vit")
    variables = start(model)
    images = batch(model, 2)
    swapped = jnp.concatenate([images[:, 4:], images[:, :4]], axis=1)
    apply = jax.jit(lambda v, x: model.apply(v, x)[0])
    here, there = apply(variables, images), apply(variables, swapped)
    assert not np.allclose(here, there, atol=1e-4)
    variables["params"]["positions"] = jnp.zeros_like(variables["params"]["positions"])
    here, there = apply(variables, images), apply(variables, swapped)
    np.testing.assert_allclose(here, there, atol=1e-5)


@pytest.mark.parametrize("places", [7, 14, 9, 16])
def test_adaptive_mean_averages_pytorchs_bins(rng, places):
    x = rng.normal(size=(2, places, places, 3)).astype(np.float32)
    expected = np.zeros((2, 7, 7, 3))
    for i in range(7):
        for j in range(7):
            rows = slice(i * places // 7, -(-(i + 1) * places // 7))
            columns = slice(j * places // 7, -(-(j + 1) * places // 7))
            expected[:, i, j] = x[:, rows, columns].mean((1, 2))
    np.testing.assert_allclose(layers.adaptive_mean(jnp.asarray(x), 7), expected, rtol=1e-4, atol=1e-5)


def test_padding_of_a_max_pool_never_wins_and_gets_no_gradient(rng):
    x = jnp.asarray(-1.0 - rng.uniform(size=(1, 4, 4, 2)), jnp.float32)
    pooled = layers.padded_max_pool(x, 3, 2, 1)
    assert pooled.shape == (1, 2, 2, 2)
    np.testing.assert_array_equal(pooled[0, 0, 0], x[0, :2, :2].max((0, 1)))
    grad = jax.grad(lambda x: layers.padded_max_pool(x, 3, 2, 1).sum())(x)
    np.testing.assert_allclose(grad.sum(), 8.0)


@pytest.mark.parametrize("name", ["lenet", "resnet20", "vgg11_bn", "resnet8"])
def test_every_convolution_has_the_gradient_that_is_fast_in_loops(name):
    model = small(name)
    variables = jax.eval_shape(model.init, KEY)
    images = jax.ShapeDtypeStruct((2, *model.input_shape), jnp.float32)
    traced = jax.make_jaxpr(model.apply)(variables, images)
    counts = {"custom": 0, "bare": 0}

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "custom_vjp_call":
                counts["custom"] += 1
            elif equation.primitive.name == "conv_general_dilated":
                counts["bare"] += 1
            else:
                for inner in jax.extend.core.jaxprs_in_params(equation.params):
                    walk(inner)

    walk(traced.jaxpr)
    kernels = [p for p in flat(variables["params"]).values() if p.ndim == 4]
    assert counts["bare"] == 0
    assert counts["custom"] >= len(kernels)


def test_names_and_summaries():
    listing = models.names()
    assert set(listing) == set(SMALL)
    assert all(summary and "\n" not in summary for summary in listing.values())


@pytest.mark.parametrize(
    ("name", "shape", "classes", "options", "field", "says"),
    [
        ("resnet21", CIFAR, 10, {}, "model.name", "resnet20"),
        ("zzz", CIFAR, 10, {}, "model.name", "mcmahan"),
        ("lenet", CIFAR, 10, {"norm": "batch"}, "model.norm", "dtype"),
        ("resnet20", CIFAR, 10, {"norm": "layer"}, "model.norm", "group"),
        ("mlp", CIFAR, 10, {"hidden": 64}, "model.hidden", "[200, 200]"),
        ("mlp", CIFAR, 10, {"hidden": [64, 0]}, "model.hidden", "positive"),
        ("mlp", CIFAR, 10, {"dtype": "float16"}, "model.dtype", "bfloat16"),
        ("vgg16_bn", CIFAR, 10, {"dropout": 1.0}, "model.dropout", "[0, 1)"),
        ("resnet20", CIFAR, 10, {"unused_norm": "no"}, "model.unused_norm", "switch"),
        ("vit", CIFAR, 10, {"depth": -1}, "model.depth", "positive"),
        ("vit", GREY, 10, {"patch": 5}, "model.patch", "28×28"),
        ("vit", CIFAR, 10, {"heads": 3}, "model.heads", "128"),
        ("vgg16_bn", GREY, 10, {}, "model.name", "32×32"),
        ("lenet", (8, 8, 1), 10, {}, "model.name", "resnet20"),
        ("lenet", (28, 28), 10, {}, "model.input_shape", "(28, 28, 1)"),
        ("lenet", CIFAR, 0, {}, "model.num_classes", "2"),
        ("lenet", CIFAR, True, {}, "model.num_classes", "2"),
    ],
)
def test_mistakes_name_the_field_and_the_way_out(name, shape, classes, options, field, says):
    with pytest.raises(UserError) as caught:
        models.create(name, shape, classes, **options)
    assert caught.value.field == field
    assert says in str(caught.value)
