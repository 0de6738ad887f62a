"""Optimizers and their state on the other side, mid-run: torch.optim's exactly, ours and optax's by name."""

from ._transformation import TorchOptimizerState as TorchOptimizerState
from .schedules import schedule_of as schedule_of
from .states import opt_state_to_jax as opt_state_to_jax
from .states import opt_state_to_torch as opt_state_to_torch
from .to_jax import optimizer_to_jax as optimizer_to_jax
from .to_torch import optimizer_to_torch as optimizer_to_torch
