"""funcreg for JAX: penalties as pure functions, and the transformations that train with them.

In a training loop:

    prox_adam, prox_sgd       transformations with a proximal step: exact zeros
    penalize                  the penalty in the loss
    add_penalty_gradient      decay, decoupled or coupled, in a chain of transformations
    train_step, run           a pure training step; many of them, stopped and resumed
    ensemble, stack, unstack  many members as one step
    per_example, per_example_norms, clip_per_example
                              gradients of single examples
    summary, params, to_flat, from_flat
                              exact zeros leaf by leaf; parameters and states by name

Penalties: l1, l2, elastic_net, group_lasso, sparse_group_lasso, non_negative, custom; sums of them; layerwise,
anchored; `penalty.on(selector)` with a glob or a role (weights, biases, norms).

Modules: `export` (training steps as files, by `jax.export`), `functional` (values, gradients and prox of one array).

`help` of a name says the rest. What these functions take and return: Penalty, TrainState, Run, Parts, Summary;
what they raise: NoProxError, NoGradError, Interrupted.
"""

# bookkeeping: combinators, selectors, errors
from .._combinators import anchored as anchored
from .._combinators import layerwise as layerwise
from .._rule import NoGradError as NoGradError
from .._rule import NoProxError as NoProxError
from .._selectors import biases as biases
from .._selectors import norms as norms
from .._selectors import weights as weights

# training
from .._summary import Summary as Summary
from .._summary import summary as summary
from . import export as export
from . import functional as functional
from ._per_example import clip_per_example as clip_per_example
from ._per_example import per_example as per_example
from ._per_example import per_example_norms as per_example_norms
from ._train import Interrupted as Interrupted
from ._train import Run as Run
from ._train import TrainState as TrainState
from ._train import ensemble as ensemble
from ._train import run as run
from ._train import stack as stack
from ._train import train_step as train_step
from ._train import unstack as unstack
from ._transform import Parts as Parts
from ._transform import add_penalty_gradient as add_penalty_gradient
from ._transform import from_flat as from_flat
from ._transform import penalize as penalize
from ._transform import prox_adam as prox_adam
from ._transform import prox_sgd as prox_sgd
from ._transform import to_flat as to_flat
from ._wing import Penalty as Penalty
from ._wing import params as params

# penalties
from .penalties.custom import custom as custom
from .penalties.elastic_net import elastic_net as elastic_net
from .penalties.group_lasso import group_lasso as group_lasso
from .penalties.l1 import l1 as l1
from .penalties.l2 import l2 as l2
from .penalties.non_negative import non_negative as non_negative
from .penalties.sparse_group_lasso import sparse_group_lasso as sparse_group_lasso
