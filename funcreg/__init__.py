"""Regularization as pure functions, in PyTorch (`funcreg.torch`) and in JAX (`funcreg.jax`).

Importing `funcreg` imports neither framework: import the wing you train with.
"""

__version__ = "0.1.0"
