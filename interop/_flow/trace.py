"""The steps of a PyTorch model: a trace with `torch.fx`, without values, on a copy that shares the model's arrays."""

import copy
import dis
import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from .. import rules
from .views import rest

# classes by name, for some cost seconds to import: what they call
_CALLS_ANOTHER = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def traced(net: nn.Module) -> tuple[fx.Graph, set[str]] | None:
    """The graph of a model and the modules that cannot be looked into; None if the model is one of these.

    `torch.fx` traces the forward of the model's class: one that was put in its place is not seen.
    """
    if "forward" in vars(_called_by(net)):
        return None
    for given in (_defaults(net), None):
        try:
            copies: dict[nn.Module, nn.Module] = {}
            root = _copied(net, copies)
            names = {module: name for name, module in net.named_modules()}
            tracer = _Tracer({**names, **{copies[module]: name for module, name in names.items()}})
            with warnings.catch_warnings(), torch.no_grad(), torch.random.fork_rng(devices=[]):
                warnings.simplefilter("ignore")
                return tracer.trace(root, given), tracer.opaque
        except Exception:  # whatever the model's own code raises
            continue
    return None


class _Proxy(fx.Proxy):
    def __len__(self) -> int:  # a TypeError, which is what `(*sizes,)` expects of what has no length
        raise TypeError("the length of an array is not known in a trace")


class _Tracer(fx.Tracer):
    """Looks into modules that are neither PyTorch's nor have a rule; what cannot be traced is `opaque`."""

    proxy_buffer_attributes = True

    def __init__(self, names: dict[nn.Module, str]) -> None:
        super().__init__()
        self.names, self.opaque = names, set[str]()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        theirs = type(m).__module__.startswith("torch.nn.modules") and not isinstance(m, nn.Sequential)
        return theirs or isinstance(m, CONVOLUTIONS) or rules.covers(m)

    def path_of_module(self, mod: nn.Module) -> str:
        return self.names[mod]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def iter(self, obj: fx.Proxy) -> Iterator[fx.Proxy]:
        """`*x.shape[2:]`, `b, *rest = x.shape` and loops over sizes: one step stands for all that are left."""
        if not _is_shape(obj.node):
            return super().iter(obj)
        frame: Any = inspect.currentframe()
        caller = frame.f_back.f_back  # of Proxy.__iter__
        (now,) = (one for one in dis.get_instructions(caller.f_code) if one.offset == caller.f_lasti)
        before = now.arg & 0xFF if now.opname == "UNPACK_EX" and now.arg is not None else 0
        shape: Any = obj
        left = self.create_proxy("call_function", rest, (shape[before:],), {})
        return iter([*(shape[n] for n in range(before)), left])

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        stack = self.module_stack.copy()
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.module_stack = stack
            self.opaque.add(self.path_of_module(m))
            return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)


def _is_shape(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", node.target)
    if name == "getitem":
        return isinstance(node.args[0], fx.Node) and _is_shape(node.args[0])
    return name == "size" and len(node.args) == 1 or name == "getattr" and node.args[1] == "shape"


def _defaults(net: nn.Module) -> dict[str, Any] | None:
    """The arguments that a call of the model may leave out."""
    try:
        parameters = inspect.signature(net.forward).parameters.values()
    except (TypeError, ValueError):
        return None
    return {p.name: p.default for p in parameters if p.default is not p.empty} or None


def _called_by(module: nn.Module) -> nn.Module:
    """What a module calls that does nothing else, or the module."""
    own = _CALLS_ANOTHER.get(type(module).__name__)
    return module if own is None else _called_by(getattr(module, own))


def _copied(module: nn.Module, copies: dict[nn.Module, nn.Module]) -> nn.Module:
    """A module that shares the arrays of another, so that what its code writes on itself is not seen.

    Of what only calls another one, such as `torch.compile`'s, it is the copy of that one.
    """
    if module not in copies and _called_by(module) is not module:
        copies[module] = _copied(_called_by(module), copies)
    if module not in copies:
        copies[module] = made = copy.copy(module)
        for name, value in vars(module).items():
            if isinstance(value, (list, dict, set)):
                made.__dict__[name] = copy.copy(value)
            elif isinstance(value, Tensor):
                made.__dict__[name] = value.clone()
        made.__dict__["_modules"] = {  # not by setattr, with which a module may do as it likes
            name: child if child is None else _copied(child, copies) for name, child in module._modules.items()
        }
    return copies[module]
