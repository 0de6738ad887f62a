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


def scale(x: Array, axis: Sequence[int]) -> Array:
    """The largest entry over `axis`, a constant for differentiation: divided by it no square overflows or vanishes."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), tuple(axis), keepdims=True, initial=0))
    # far below the largest float: XLA multiplies by 1 / scale, or 1 / (2 scale) for x / 2, and flushes subnormals to 0
    bounded = jnp.minimum(largest, float(jnp.finfo(x.dtype).max) ** 0.75)
    return jnp.where((largest == 0) | jnp.isinf(largest), 1, bounded)


def norm(x: Array, axis: Sequence[int]) -> Array:
    """Euclidean norm over `axis`, which is kept with length 1; the derivative at 0 is 0.

    Scaled by the largest entry, so that no square overflows or vanishes: 1e-30 and 1e38 are right in float32.
    """
    unit = scale(x, axis)
    square = jnp.sum((x / unit) ** 2, tuple(axis), keepdims=True)
    zero = square == 0  # NOTE [double where]
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, square))) * unit
