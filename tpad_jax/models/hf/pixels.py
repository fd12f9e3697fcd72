"""From the bytes of an image to the rows a patch embedding multiplies; it runs on the device."""

import jax.numpy as jnp


def normalise(image, mean, std, dtype):
    """(image / 255 - mean) / std per channel, in float32 and then cast to dtype.

    Args:
      image: uint8 [..., H, W, 3]. mean, std: three numbers each, on 0..1.
    """
    x = image.astype(jnp.float32) / 255
    return ((x - jnp.float32(mean)) / jnp.float32(std)).astype(dtype)


def patches(image, p: int):
    """Squares of p x p pixels, row by row; a square is laid out (channel, row, column).

    Pixels at the right and the bottom that fill no square are left out, as a convolution of stride
    p leaves them out (SigLIP reads 27 squares of 14 out of 384 pixels).

    Args:
      image: [..., H, W, 3].

    Returns:
      [..., (H // p) (W // p), 3 p p].
    """
    *lead, height, width, channels = image.shape
    rows, columns = height // p, width // p
    x = image[..., :rows * p, :columns * p, :]
    x = x.reshape(-1, rows, p, columns, p, channels).transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(*lead, rows * columns, channels * p * p)
