"""Leaf functions: one array in, one array out, positional; the formulas themselves."""

from .penalties.elastic_net import grad as grad_elastic_net
from .penalties.elastic_net import prox as prox_elastic_net
from .penalties.elastic_net import value as elastic_net
from .penalties.group_lasso import grad as grad_group_lasso
from .penalties.group_lasso import prox as prox_group_lasso
from .penalties.group_lasso import value as group_lasso
from .penalties.l1 import grad as grad_l1
from .penalties.l1 import prox as prox_l1
from .penalties.l1 import value as l1
from .penalties.l2 import grad as grad_l2
from .penalties.l2 import prox as prox_l2
from .penalties.l2 import value as l2
from .penalties.non_negative import prox as prox_non_negative
from .penalties.non_negative import value as non_negative

__all__ = [
    "elastic_net",
    "grad_elastic_net",
    "grad_group_lasso",
    "grad_l1",
    "grad_l2",
    "group_lasso",
    "l1",
    "l2",
    "non_negative",
    "prox_elastic_net",
    "prox_group_lasso",
    "prox_l1",
    "prox_l2",
    "prox_non_negative",
]
