"""A small vision transformer, every weight a dense layer of its own so that it can be peeled."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from fedjax_sim.models import initialisers, layers


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)).

    Queries, keys and values come from three kernels, not a fused one: each is a peel point, with the
    normalised tokens as its feature.

    Attributes:
      heads: attention heads.
      mlp_ratio: width of the hidden layer of the MLP, in widths of a token.
      dropout: rate on what each branch adds.
      dtype: compute dtype; softmax is taken in float32.
    """

    heads: int
    mlp_ratio: int
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """f[B, T, D] -> f[B, T, D]."""
        drop = nn.Dropout(self.dropout, deterministic=not train)
        y = _layer_norm(x, self.dtype, "norm1")
        query, key, value = (
            self._heads(layers.dense(self, y, name, x.shape[-1], **_INITS))
            for name in ("query", "key", "value")
        )
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key).astype(jnp.float32) * query.shape[-1] ** -0.5
        weights = nn.softmax(scores, axis=-1).astype(self.dtype)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(x.shape)
        x = x + drop(layers.dense(self, mixed, "out", x.shape[-1], **_INITS))
        y = _layer_norm(x, self.dtype, "norm2")
        y = nn.gelu(layers.dense(self, y, "mlp1", self.mlp_ratio * x.shape[-1], **_INITS), approximate=False)
        return x + drop(layers.dense(self, y, "mlp2", x.shape[-1], **_INITS))

    def _heads(self, x):
        return x.reshape(*x.shape[:2], self.heads, -1)


class ViT(nn.Module):
    """Patches – dense embedding – learned positions – pre-norm blocks – norm – pooled token – dense.

    After Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021; the sizes are OUR CHOICE, for
    images of 28 to 64 pixels. Dense kernels Xavier uniform, biases 0, positions and class token N(0, 0.02).

    Attributes:
      num_classes: width of the logits.
      patch: side of a patch; divides the image's height and width.
      width: size of a token (D); a multiple of `heads`.
      depth: number of blocks.
      heads: attention heads.
      mlp_ratio: hidden width of the MLPs in widths of a token.
      pool: "mean" over tokens, or "cls" for a class token.
      dropout: rate in the blocks; above 0 training needs an rng.
      dtype: compute dtype.
    """

    num_classes: int
    patch: int = 4
    width: int = 128
    depth: int = 6
    heads: int = 4
    mlp_ratio: int = 2
    pool: str = "mean"
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False, mask: jax.Array | None = None) -> jax.Array:
        """f32[B, H, W, C] -> f32[B, num_classes]."""
        x = layers.dense(self, to_patches(x, self.patch), "embed", self.width, **_INITS)
        if self.pool == "cls":
            token = self.param("cls", initialisers.normal(0.02), (1, 1, self.width), jnp.float32)
            x = jnp.concatenate(
                [jnp.broadcast_to(token.astype(x.dtype), (x.shape[0], 1, self.width)), x], axis=1
            )
        positions = self.param("positions", initialisers.normal(0.02), x.shape[1:], jnp.float32)
        x = x + positions.astype(x.dtype)[None]
        for i in range(self.depth):
            x = Block(self.heads, self.mlp_ratio, self.dropout, self.dtype, name=f"block{i}")(x, train=train)
        x = _layer_norm(x, self.dtype, "norm")
        x = x[:, 0] if self.pool == "cls" else jnp.mean(x, axis=1)
        return layers.classifier(self, x, "head", **_INITS)


def to_patches(x: jax.Array, patch: int) -> jax.Array:
    """f[B, H, W, C] -> f[B, (H/patch)·(W/patch), patch·patch·C], row by row."""
    batch, height, width, channels = x.shape
    rows, columns = height // patch, width // patch
    x = x.reshape(batch, rows, patch, columns, patch, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, rows * columns, -1)


_INITS: dict[str, Any] = {"kernel_init": nn.initializers.xavier_uniform(), "bias_init": initialisers.zeros}


def _layer_norm(x: jax.Array, dtype: Any, name: str) -> jax.Array:
    # In float32 throughout: in bfloat16 Flax mixes the two, which strict dtype promotion refuses.
    layer = nn.LayerNorm(epsilon=1e-6, dtype=jnp.float32, use_fast_variance=False, name=name)
    return layer(x.astype(jnp.float32)).astype(dtype)
