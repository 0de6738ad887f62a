"""What crosses between PyTorch and JAX: import it as `from funcreg import interop`.

`match(net, flax)` makes the `Pair` by which parameters, gradients, penalties and optimizers cross; `to_jax` and
`to_torch` carry any tree of arrays; `save` and `load` are for files; `rules.register` declares the twin of a layer of
one's own. `check` and `check_training` say whether two sides agree, `check_probes` on inputs that excite faults;
`locate` says where they part, `hints` why; `testing` has the assertions, `python -m interop check` the command.
`exported` makes the files of an exported function one that can be checked.

It needs both frameworks and flax (`pip install 'funcreg[all]'`); each wing alone does without it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import hints as hints
from . import rules as rules
from .arrays import to_jax as to_jax
from .arrays import to_torch as to_torch
from .exported import exported as exported
from .files import load as load
from .files import save as save
from .locate import locate as locate
from .location import Location as Location
from .match import match as match
from .pair import Pair as Pair
from .parity import check as check
from .probes import check_probes as check_probes
from .probes import probes as probes
from .report import Hint as Hint
from .report import Report as Report
from .training import check_training as check_training
from .verdict import Verdict as Verdict

if TYPE_CHECKING:
    from . import testing as testing

PART_OF = "funcreg"  # the marker by which `funcreg.interop` tells this package from another of the same name


def __getattr__(name: str) -> Any:
    if name == "testing":  # imported when it is asked for: pytest rewrites the assertions of a plugin not imported yet
        return import_module("interop.testing")
    raise AttributeError(f"module 'interop' has no attribute {name!r}")
