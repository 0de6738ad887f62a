"""The part of optax that a training loop needs, on torch tensors: in a ported loop only the import line changes.

    import funcreg.torch.optax as optax

    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = optimizer.init(params)
    grads = torch.func.grad(loss)(params, batch)
    updates, state = optimizer.update(grads, state, params)
    params = optax.apply_updates(params, updates)

Every parameter, default and state field is that of optax 0.2.8; what is absent here raises TypeError. Conventions:

* Pure functions of trees of tensors (a `dict[str, Tensor]` above all): nothing is changed in place, no state is kept
  outside the state, no update waits for the device. `torch.func.vmap`, `grad` and `torch.compile` go through all of it.
* Trees are matched by structure, dicts by key. Floating-point and complex tensors are trained; the update of any other
  leaf is zero, that of None is None, and a leaf whose gradient is None stays where it is.
* A hyper-parameter is a Python number or a 0-d tensor, which may be traced or batched by `vmap` and promotes nothing.
* Updates and states keep the dtypes of gradients and params. Half precision is computed in float32 and rounded once.
* Counts are int32, on the device of the params; bias corrections and schedules are computed from them in float64.
* Updates can be differentiated. Where that is not wanted, hand over params that do not require gradients (`p.detach()`)
  or work in `torch.no_grad()`: otherwise autograd records the whole training run.
"""

from ._base import EmptyState as EmptyState
from ._base import GradientTransformation as GradientTransformation
from ._base import OptState as OptState
from ._base import Params as Params
from ._base import ScalarOrSchedule as ScalarOrSchedule
from ._base import Schedule as Schedule
from ._base import Updates as Updates
from ._base import apply_updates as apply_updates
from ._base import chain as chain
from ._base import identity as identity
from ._base import safe_increment as safe_increment
from ._multi_steps import MultiSteps as MultiSteps
from ._multi_steps import MultiStepsState as MultiStepsState
from ._optimizers import adam as adam
from ._optimizers import adamw as adamw
from ._optimizers import rmsprop as rmsprop
from ._optimizers import sgd as sgd
from ._schedules import constant_schedule as constant_schedule
from ._schedules import cosine_decay_schedule as cosine_decay_schedule
from ._schedules import exponential_decay as exponential_decay
from ._schedules import linear_schedule as linear_schedule
from ._schedules import warmup_cosine_decay_schedule as warmup_cosine_decay_schedule
from ._transforms import MaskedState as MaskedState
from ._transforms import ScaleByAdamState as ScaleByAdamState
from ._transforms import ScaleByRmsState as ScaleByRmsState
from ._transforms import ScaleByRStdDevState as ScaleByRStdDevState
from ._transforms import ScaleByScheduleState as ScaleByScheduleState
from ._transforms import TraceState as TraceState
from ._transforms import add_decayed_weights as add_decayed_weights
from ._transforms import clip_by_global_norm as clip_by_global_norm
from ._transforms import scale_by_adam as scale_by_adam
from ._transforms import scale_by_learning_rate as scale_by_learning_rate
from ._transforms import trace as trace
