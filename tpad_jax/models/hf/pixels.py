"""Turn the bytes of an image into the rows of a patch embedding, on the device."""

import jax.numpy as jnp


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
