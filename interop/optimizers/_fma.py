"""Sums, products and roots with PyTorch's roundings, eagerly and compiled.

NOTE [rounding]: PyTorch's `add(alpha=)`, `addcmul` and `lerp` are compiled to fused multiply-adds, in vectors as in the
elements that are left over. JAX cannot ask for `a * b + c` with one rounding, and XLA takes it so where it likes; it
multiplies by inverses instead of dividing by a number, and by `rsqrt` instead of dividing by a root. Each difference is
a unit in the last place of a sum, which is many units of what is left where a step takes a parameter through 0.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

_HIGH = 0xFFFFFFFFF8000000  # sign, exponent and the upper 26 of the 53 bits of a float64
_HALF = 0x4000000  # of the last of these bits


def fma(a: Array, b: Array, c: Array) -> Array:
    r"""`a * b + c`, in float64 with one rounding; narrower floats round twice.

    The product is split without error into its rounded value and the rest (Dekker 1971), and so is the sum (Knuth,
    The Art of Computer Programming, 4.2.2). The upper halves are cut off by their bits: then it does not matter whether
    a compiler fuses the operations of the splitting itself.

    Args:
        a: float array.
        b: of the same dtype, broadcasting with it.
        c: of the same dtype, broadcasting with them.
    """
    product = a * b
    plain = product + c
    if plain.dtype != jnp.float64:
        return plain
    a_high, b_high = _upper(a), _upper(b)
    a_low, b_low = a - a_high, b - b_high
    below = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    part = plain - product
    rest = (product - (plain - part)) + (c - part)
    exact = plain + (rest + below)
    return jnp.where(jnp.isfinite(exact), exact, plain)  # what overflows has no halves


def plus(a: Any, b: Any) -> Array:
    """`a + b`, neither of them fused with the product that it may be: that has another use here."""
    return jnp.where(jnp.isnan(a) | jnp.isnan(b), jnp.nan, a + b)


def quotient(x: Array, scalar: Any) -> Array:
    """An array divided by a 0-d array, which is not made a product with its inverse."""
    return x / jnp.where(jnp.isnan(x), x, jnp.asarray(scalar).astype(x.dtype))


def root(x: Array) -> Array:
    """The square root, which a division by it is not fused with."""
    return jnp.where(jnp.isnan(x), x, jnp.sqrt(x))


def narrowed(x: Array, dtype: Any) -> Array:
    """Rounded to half precision, also where a compiler would rather go on in float32."""
    return lax.optimization_barrier(x.astype(dtype))


def _upper(x: Array) -> Array:
    bits = lax.bitcast_convert_type(x, jnp.uint64)
    nearest = bits + jnp.asarray(_HALF, jnp.uint64)  # so that what is left has 26 bits and a sign
    return lax.bitcast_convert_type(nearest & jnp.asarray(_HIGH, jnp.uint64), jnp.float64)
