"""Optimizers of torch.optim and their state on the JAX side, and back, mid-run."""

from ._transformation import TorchOptimizerState as TorchOptimizerState
from .to_jax import optimizer_to_jax as optimizer_to_jax
from .to_torch import optimizer_to_torch as optimizer_to_torch
