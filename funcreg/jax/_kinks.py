"""Absolute value and Euclidean norm with derivative 0 at the kink, and NaN in -> NaN out.

NOTE [double where]
The derivative of sqrt at 0 is infinite, and `where(zero, 0, sqrt(square))` still multiplies that infinity by 0 on the
way back: NaN. So the square is made 1 where it is 0 before the root is taken, and the root is made 0 there afterwards.
The test is `== 0` and not `> 0`: a NaN is neither, and must come out as NaN, not as a norm of 0.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array


def absolute(x: Array) -> Array:
    """|x| with derivative sign(x), which is 0 at 0 (that of `jnp.abs` is 1)."""
    return x * jnp.sign(x)


def scale(x: Array, axis: Sequence[int]) -> tuple[Array, Array]:
    """`down, unit`: `x * down / unit` has a largest entry of 1 over `axis`, so that no square overflows or vanishes.

    Constants for differentiation. XLA multiplies by `1 / unit` and flushes subnormals to 0, hence `down`, a power of 2.
    """
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), tuple(axis), keepdims=True, initial=0))
    down = jnp.where(largest > 1, jnp.asarray(2.0**-4, x.dtype), 1)
    return down, jnp.where((largest == 0) | jnp.isinf(largest), 1, largest * down)


def norm(x: Array, axis: Sequence[int]) -> Array:
    """Euclidean norm over `axis`, which is kept with length 1; the derivative at 0 is 0.

    Scaled by the largest entry: 1e-30 and 1e38 are right in float32.
    """
    down, unit = scale(x, axis)
    square = jnp.sum((x * down / unit) ** 2, tuple(axis), keepdims=True)
    zero = square == 0  # NOTE [double where]
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, square))) * unit / down
