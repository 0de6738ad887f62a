"""What PyTorch computes of a step that is a tensor: `differentiable=True` takes corrections in the step's own dtype.

That is float32 (PyTorch's default dtype), whatever the parameters are: `1 - beta**t` is off by 1e-5 of itself at the
first steps, which is part of such a run and has to be part of its continuation. A number divided by a tensor is the
tensor's inverse times the number there.
"""

import math
from functools import lru_cache

import jax.numpy as jnp
import numpy as np
import torch
from jax import Array

_LONGEST = 1 << 18


def corrections(beta: float, t: Array) -> tuple[Array, Array]:
    """`1 - beta**t` and its square root, in the dtype of `t`, with PyTorch's rounding."""
    if t.dtype != jnp.float32:
        correction = 1 - beta**t
        return correction, jnp.sqrt(correction)
    known = _known(beta)
    beyond = 1 - jnp.asarray(beta, t.dtype) ** t
    n = jnp.minimum(t, len(known) - 1).astype(jnp.int32)
    within, (powers, roots) = t < len(known), jnp.asarray(known.T)
    return jnp.where(within, powers[n], beyond), jnp.where(within, roots[n], jnp.sqrt(beyond))


@lru_cache(maxsize=16)
def _known(beta: float) -> np.ndarray:
    """Both by float32 steps, up to where `1 - beta**t` is 1; shape (steps, 2).

    They are PyTorch's own: NumPy's and XLA's powers and roots differ from them in the last place. PyTorch takes a
    single element as it takes elements with gaps between them, and not as it takes a vector.
    """
    count = math.ceil(26 * math.log(2) / -math.log(beta)) + 1 if 0 < beta < 1 else 2
    steps = torch.arange(min(count, _LONGEST), dtype=torch.float32)
    correction = 1 - beta ** torch.stack([steps, steps], 1)[:, 0]
    return torch.stack([correction, correction.sqrt()], 1).numpy()


def over(number: Array, x: Array, is_tensor: bool = False) -> Array:
    """A number divided by a tensor; `is_tensor`: by what is a tensor in PyTorch, too."""
    if is_tensor:
        dtype = max(number.dtype, x.dtype, key=lambda dtype: dtype.itemsize)
        return number.astype(dtype) / x.astype(dtype)
    return (1 / x) * number.astype(x.dtype)
