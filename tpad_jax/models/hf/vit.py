"""The vision transformers of CLIP and SigLIP, and of Qwen2-VL, Qwen2.5-VL and Qwen3-VL.

Tokens are in row-major order from the pixels to the merged tokens of a Qwen transformer. Neighbours
are gathered only where they are merged, and an attention window is a mask. Angles, windows and
places depend only on the grid, so numpy computes them once per program.
"""

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tpad_jax.errors import refuse_if
from tpad_jax.models.hf import layers, spec
from tpad_jax.nn.attention import RMSNorm, rotate
from tpad_jax.nn.linear import STACKED, Linear, gated, uniform

THETA = 10_000.0  # base of the rotary frequencies in all three


def normalise(image, mean, std, dtype):
    """Compute (image / 255 - mean) / std per channel in float32.

    Args:
      image: uint8 [..., H, W, 3].
      mean: three numbers, on 0..1.
      std: three numbers, on 0..1.
      dtype: of the result.
    """
    x = image.astype(jnp.float32) / 255
    return ((x - jnp.float32(mean)) / jnp.float32(std)).astype(dtype)


def patches(image, p: int):
    """Cut an image into squares row by row. The layout of a square is (channel, row, column).

    Pixels at the right and the bottom that do not fill a square are dropped, as in a convolution of
    stride p (SigLIP reads 27 squares of 14 from 384 pixels).

    Args:
      image: [..., H, W, 3].
      p: side of a square in pixels.

    Returns:
      [..., (H // p) (W // p), 3 p p].
    """
    *lead, height, width, channels = image.shape
    rows, columns = height // p, width // p
    x = image[..., :rows * p, :columns * p, :]
    x = x.reshape(-1, rows, p, columns, p, channels).transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(*lead, rows * columns, channels * p * p)


def norm(x, sizes: spec.Tower | spec.Grid, name: str):
    """Normalise x with a new norm of the transformer's kind."""
    if sizes.kind == 'qwen2_5':
        return RMSNorm(sizes.eps, name=name)(x)
    return layers.layer_norm(x, sizes.eps, name)


class Attention(nn.Module):
    """Attention with rotary positions in two dimensions, or without. [B, P, W] -> [B, P, W]."""

    heads: int
    how: str

    @nn.compact
    def __call__(self, x, cos, sin, mask):
        """Attend.

        Args:
          x: float [B, P, W].
          cos: of `angles`. None: no positions, and separate layers for queries, keys and values.
          sin: of `angles`.
          mask: bool [1, 1, P, P] or None.
        """
        width, lead = x.shape[-1], x.shape[:2]
        if cos is None:
            q, k, v = (Linear(width, use_bias=True, name=n)(x).reshape(*lead, self.heads, -1)
                       for n in 'qkv')
        else:
            qkv = Linear(3 * width, use_bias=True, name='qkv')(x)
            q, k, v = jnp.moveaxis(qkv.reshape(*lead, 3, self.heads, -1), 2, 0)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = layers.attend(q, k, v, mask, self.how)
        return Linear(width, use_bias=True, name='o')(y.reshape(x.shape))


class Block(nn.Module):
    """One pre-norm layer, a scan body with carry (x [B, P, W], deep [n + 1, B, P, W] or None)."""

    sizes: spec.Tower | spec.Grid
    how: str

    @nn.compact
    def __call__(self, carry, layer, fixed):
        """Apply the layer.

        Args:
          carry: (x, deep).
          layer: (everywhere, slot). Whether to attend outside of windows, and the index in `deep`
            where x is written.
          fixed: (cos, sin, window), the same for all layers. Each may be None.
        """
        (x, deep), (everywhere, slot), (cos, sin, window) = carry, layer, fixed
        sizes = self.sizes
        mask = None if window is None else window | everywhere
        y = norm(x, sizes, 'norm1')
        x = x + Attention(sizes.heads, self.how, name='attention')(y, cos, sin, mask)
        y = norm(x, sizes, 'norm2')
        x = x + (gated(y, sizes.hidden, layers.activation(sizes.activation), use_bias=True)
                 if sizes.kind == 'qwen2_5' else
                 layers.perceptron(y, sizes.hidden, sizes.width, sizes.activation))
        if deep is not None:
            deep = jax.lax.dynamic_update_index_in_dim(deep, x, slot, 0)
        return (x, deep), None


class VisionTransformer(nn.Module):
    """The first `tower.layers` blocks of a tower, without pooling; with Idefics3's final norm.

    Attributes:
      tower: sizes.
      how: of attention, one of layers.ATTENTION.
      remat: one of layers.REMAT.
    """

    tower: spec.Tower
    how: str = 'xla'
    remat: str = 'none'

    @nn.compact
    def __call__(self, patches):
        """Encode patches of normalised pixels in their dtype.

        Args:
          patches: float [B, P, 3 p p].

        Returns:
          [B, P, W], or [B, 1 + P, W] with the class token first if tower.keep_class. With
          tower.merge = m neighbours form one token: [B, P / m^2, m m W].
        """
        tower, clip = self.tower, self.tower.kind == 'clip'
        x = Linear(tower.width, use_bias=not clip, name='patch')(patches)
        if clip:
            first = self.param('class', uniform(0.02), (tower.width,)).astype(x.dtype)
            first = jnp.broadcast_to(first, (x.shape[0], 1, tower.width))
            x = jnp.concatenate([first, x], axis=1)
        # positions of the native size; an image of another size fails to broadcast
        count = (tower.image // tower.patch) ** 2 + clip
        place = self.param('place', uniform(0.02), (count, tower.width))
        x += (place[places(tower)] if tower.kind == 'idefics3' else place).astype(x.dtype)
        if clip:
            x = layers.layer_norm(x, tower.eps, 'pre_norm')
        block = nn.scan(layers.rematerialised(Block, self.remat), length=tower.layers, **STACKED)
        (x, _), _ = block(tower, self.how, name='layers')(
            (x, None), (None, None), (None, None, None))
        if tower.kind == 'idefics3':
            x = layers.layer_norm(x, tower.eps, 'post_norm')
            side, m = tower.image // tower.patch // tower.merge, tower.merge
            return einops.rearrange(x, 'b (r i c j) w -> b (r c) (i j w)', r=side, i=m, j=m)
        return x[:, 1:] if clip and not tower.keep_class else x


def places(tower: spec.Tower) -> np.ndarray:
    """Return the rows of the table of places that a picture's patches take in Idefics3, int [P].

    They are computed as transformers does, in float32, whose rounding moves some where the patches
    of a side are not a power of two.
    """
    side = tower.image // tower.patch
    share = np.arange(side, dtype=np.float32) * np.float32(1 / side)
    at = np.searchsorted(np.arange(1 / side, 1, 1 / side).astype(np.float32), share, side='right')
    return (at[:, None] * side + at).ravel()


def angles(cells, head_dim: int):
    """Return cos and sin float32 [1, P, 1, head_dim / 2]: a quarter head by row, one by column."""
    frequencies = THETA ** -(np.arange(0, head_dim // 2, 2) / (head_dim // 2))
    row, column = (place.reshape(-1, 1) * frequencies for place in np.indices(cells))
    angle = np.concatenate([row, column], axis=-1)[None, :, None]
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def windows(cells, grid: spec.Grid):
    """Return which cells share a window, bool [1, 1, P, P], or None with a single window.

    Windows start at the top left corner, so those at the right and the bottom may be smaller.
    """
    if not grid.window:
        return None
    side = grid.window // grid.merge // grid.patch * grid.merge  # whole merged tokens
    row, column = (place.reshape(-1) // side for place in np.indices(cells))
    same = (row[:, None] == row) & (column[:, None] == column)
    return None if same.all() else same[None, None]


def resampled(table, cells):
    """Resample a square table of learned places [N N, W] at a grid's cells, float32 [P, W].

    Bilinear with aligned corners: the first and the last cell get the first and the last place.
    """
    side = round(table.shape[0] ** 0.5)
    x = table.astype(jnp.float32).reshape(side, side, -1)
    for axis, count in enumerate(cells):
        at = np.linspace(0, side - 1, count)
        low = np.minimum(at.astype(int), max(side - 2, 0))
        high = np.minimum(low + 1, side - 1)
        share = np.expand_dims(at - low, (1, 2) if axis == 0 else (0, 2)).astype(np.float32)
        # gathers instead of a product with a matrix of weights: exact at any matmul precision
        x = x.take(low, axis) * (1 - share) + x.take(high, axis) * share
    return x.reshape(-1, x.shape[-1])


class Patch(nn.Module):
    """Patch embedding of a still image by a video kernel [2, 3 p p, W]. [..., 3 p p] -> [..., W].

    A still image fills both time steps of the kernel, so the slices of the steps are summed.
    """

    features: int
    use_bias: bool

    @nn.compact
    def __call__(self, x):
        """Embed x [B, P, 3 p p].

        Raises:
          InputError: the variables have an adapter for this layer, which does not support one.
        """
        refuse_if(self.has_variable('lora', 'a'), 'config.model.lora_targets: matches vision/patch,'
                  ' a convolution. Expected dense layers only. Fix: narrow the expression')
        kernel = self.param('kernel', nn.initializers.lecun_uniform(),
                            (2, x.shape[-1], self.features))
        y = x @ kernel.astype(jnp.float32).sum(0).astype(x.dtype)
        if self.use_bias:
            y += self.param('bias', nn.initializers.zeros, (self.features,)).astype(x.dtype)
        return y


class Merger(nn.Module):
    """Merger of merge x merge neighbours into one token. [B, P, W] -> [B, P / merge^2, out].

    Attributes:
      grid: sizes.
      cells: rows and columns of patches.
      joined: whether the norm is over all neighbours together instead of over each.
    """

    grid: spec.Grid
    cells: tuple[int, int]
    joined: bool

    @nn.compact
    def __call__(self, x):
        """Merge x. Input and output are row-major."""
        m, width = self.grid.merge, x.shape[-1]
        rows, columns = (n // m for n in self.cells)
        x = x.reshape(-1, rows, m, columns, m, width).swapaxes(2, 3)
        merged = (x.shape[0], rows * columns, m * m * width)
        if self.joined:
            x = x.reshape(merged)
        x = norm(x, self.grid, 'norm').reshape(merged)
        return layers.perceptron(x, merged[-1], self.grid.out, 'gelu')


class GridTransformer(nn.Module):
    """A Qwen vision transformer for images of one size.

    Attributes:
      grid: sizes.
      cells: rows and columns of patches, multiples of grid.merge.
      how: of attention, one of layers.ATTENTION.
      remat: one of layers.REMAT.
    """

    grid: spec.Grid
    cells: tuple[int, int]
    how: str = 'xla'
    remat: str = 'none'

    @nn.compact
    def __call__(self, patches):
        """Encode patches of normalised pixels in their dtype.

        Args:
          patches: float [B, P, 3 p p]. Row by row.

        Returns:
          Tokens [B, P / merge^2, out], row by row, and deep features [B, P / merge^2, n, out] that
          the decoder's first n layers add to them (None if grid.deep is empty).
        """
        grid, cells, n = self.grid, self.cells, len(self.grid.deep)
        x = Patch(grid.width, use_bias=grid.kind == 'qwen3', name='patch')(patches)
        if grid.places:
            table = self.param('place', uniform(0.02), (grid.places ** 2, grid.width))
            x += resampled(table, cells).astype(x.dtype)
        # a layer outside grid.deep writes to an extra slot, which nothing reads
        deep = jnp.zeros((n + 1, *x.shape), x.dtype) if n else None
        numbers = range(grid.layers)
        layer = (jnp.array([i in grid.full for i in numbers]),
                 jnp.array([grid.deep.index(i) if i in grid.deep else n for i in numbers]))
        fixed = (*angles(cells, grid.width // grid.heads), windows(cells, grid))
        scanned = nn.scan(layers.rematerialised(Block, self.remat), length=grid.layers,
                          in_axes=(0, nn.broadcast), **STACKED)
        (x, deep), _ = scanned(grid, self.how, name='layers')((x, deep), layer, fixed)
        tokens = Merger(grid, cells, joined=False, name='merger')(x)
        if not n:
            return tokens, None
        mergers = nn.vmap(Merger, in_axes=0, out_axes=2, **STACKED)
        return tokens, mergers(grid, cells, joined=True, name='deep')(deep[:n])
