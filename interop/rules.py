"""Which array of a PyTorch layer is which of its flax twin's, of flax.linen or flax.nnx: one row for each layer.

Shapes tell most of what can go wrong, but not all: a square kernel has to be transposed like any other, and options
such as an epsilon are in no array. `links_of` says how the arrays lie, `differences` what else is not the same.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from . import _fit, _options, _recurrent
from ._layouts import (
    Layout,
    Layouts,
    Shapes,
    attention,
    either,
    fixed,
    flipped,
    leaves,
    linear,
    normalized,
    slope,
)
from ._layouts import Mismatch as Mismatch
from ._layouts import NoRule as NoRule
from ._recurrent import Cell
from .links import Link as Link
from .links import axes as axes
from .links import link as link

Module = Any  # an nn.Module, or a Cell of a recurrent one


@dataclass(frozen=True)
class Rule:
    """What is known of a PyTorch layer.

    Attributes:
        twins: the names of flax's layers that compute the same; none: nothing is known of them.
        layouts: how they may hold its arrays, best first.
        options: what else has to be the same.
        refuses: module -> why it has no twin at all, or nothing.
        without_twin: arrays that flax has not, with the reason.
    """

    twins: str
    layouts: Layouts
    options: _options.Options = _options.none
    refuses: Callable[[Any], str] = lambda module: ""
    without_twin: Mapping[str, str] = field(default_factory=dict)


def _conv(*order: int) -> Rule:
    return Rule("Conv", leaves({"weight": ("kernel", axes(*order)), "bias": "bias"}), _options.conv)


def _conv_transpose(*space: int) -> Rule:
    flip = {"weight": ("kernel", flipped(*space, 0, 1)), "bias": "bias"}
    swap = {"weight": ("kernel", axes(*space, 1, 0)), "bias": "bias"}
    layouts = either(
        leaves(flip, "transpose_kernel=False, flax's default", {"transpose_kernel": False}),
        leaves(swap, "transpose_kernel=True", {"transpose_kernel": True}),
    )
    return Rule("ConvTranspose", layouts, _options.conv_transpose, _refuse_groups)


def _refuse_groups(module: Any) -> str:
    return f"groups={module.groups} has no twin: flax's ConvTranspose has no groups" if module.groups > 1 else ""


def _refuse_bias_k(module: Any) -> str:
    if module.bias_k is not None or module.add_zero_attn:
        return "add_bias_kv=True and add_zero_attn=True have no twin: flax adds nothing to keys and values"
    return ""


def _refuse_no_statistics(module: Any) -> str:
    if module.running_mean is None:
        return "track_running_stats=False has no twin: flax's BatchNorm keeps statistics and evaluates with them"
    return ""


_BATCH_NORM = Rule(
    "BatchNorm",
    leaves({"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}),
    _options.batch_norm,
    _refuse_no_statistics,
    {"num_batches_tracked": "flax counts no batches (PyTorch needs the number if momentum=None only)"},
)


def _of_cells(twins: str, layouts: Layouts) -> Rule:
    return Rule(f"{twins} RNN Bidirectional", layouts, _options.recurrent, _recurrent.refused)


_LSTM = _of_cells("LSTMCell OptimizedLSTMCell", _recurrent.LSTM)
_GRU = _of_cells("GRUCell", _recurrent.GRU)
_RNN = _of_cells("SimpleCell", _recurrent.RNN)

# PyTorch's class: the names of flax's, PyTorch's arrays = flax's with their axes in PyTorch's numbers, the options.
RULES: dict[type, Rule] = {
    nn.Linear: Rule("Dense DenseGeneral Linear LinearGeneral", linear, _options.linear),  # kernel = weight.T
    nn.Conv1d: _conv(2, 1, 0),
    nn.Conv2d: _conv(2, 3, 1, 0),
    nn.Conv3d: _conv(2, 3, 4, 1, 0),
    nn.ConvTranspose1d: _conv_transpose(2),
    nn.ConvTranspose2d: _conv_transpose(2, 3),
    nn.ConvTranspose3d: _conv_transpose(2, 3, 4),
    nn.Embedding: Rule("Embed", leaves({"weight": "embedding"}), _options.embedding),
    nn.LayerNorm: Rule("LayerNorm", normalized({"weight": "scale", "bias": "bias"}), _options.layer_norm),
    nn.RMSNorm: Rule("RMSNorm", normalized({"weight": "scale"}), _options.rms_norm),
    nn.GroupNorm: Rule("GroupNorm", leaves({"weight": "scale", "bias": "bias"}), _options.group_norm),
    nn.BatchNorm1d: _BATCH_NORM,  # scale, bias; mean, var = running_mean, running_var
    nn.BatchNorm2d: _BATCH_NORM,
    nn.BatchNorm3d: _BATCH_NORM,
    nn.MultiheadAttention: Rule(
        "MultiHeadAttention MultiHeadDotProductAttention", attention, _options.attention, _refuse_bias_k
    ),
    nn.LSTM: _LSTM,
    nn.LSTMCell: _LSTM,
    nn.GRU: _GRU,
    nn.GRUCell: _GRU,
    nn.RNN: _RNN,
    nn.RNNCell: _RNN,
    nn.PReLU: Rule("PReLU", slope),
}


_COMPUTE = ("forward", "_conv_forward", "__call__")  # what decides on what a layer computes


def register(
    torch_class: type[nn.Module],
    rule: Callable[[Any], Iterable[Link]],
    *,
    differences: Callable[[Any, Any], Iterable[str]] | None = None,
    without_twin: Mapping[str, str] | None = None,
) -> None:
    """Declares the twin of a layer of one's own, or of one that has no rule here; a rule there was is replaced.

    Args:
        torch_class: the class of the PyTorch layer; subclasses that do not override `forward` follow it.
        rule: module -> the links of all its arrays, with names relative to the layer on both sides.
        differences: module, flax layer -> sentences on what differs besides the arrays.
        without_twin: the names of arrays that the flax layer has not, each with the reason.

    Example:
        >>> import torch
        >>> from interop.rules import axes, link, links_of, register
        >>> class Mix(torch.nn.Module):
        ...     def __init__(self, n):
        ...         super().__init__()
        ...         self.weight = torch.nn.Parameter(torch.eye(n))
        ...         self.gain = torch.nn.Parameter(torch.ones(n))
        ...
        ...     def forward(self, x):
        ...         return self.gain * (x @ self.weight.T)
        >>> register(Mix, lambda module: [link("weight", "kernel", axes(1, 0)), link("gain", "scale")])
        >>> [(one.torch, one.jax) for one in links_of(Mix(3), {"kernel": (3, 3), "scale": (3,)})]
        [(('weight',), ('kernel',)), (('gain',), ('scale',))]
    """

    def said(module: Any, twin: Any) -> Iterable[str]:
        assert differences is not None
        return differences(module, twin)

    RULES[torch_class] = Rule("", fixed(rule), said if differences else _options.none, without_twin=without_twin or {})


def links_of(module: Module, shapes: Shapes, twin: Any = None, channels_last: bool | None = None) -> list[Link]:
    """The links of a PyTorch layer to a flax layer.

    Args:
        module: the PyTorch layer, or one of `parts(module)`.
        shapes: of all arrays of the flax layer, by names relative to it, parameters and batch statistics alike.
        twin: the flax layer itself, if there is one: it decides where shapes leave a choice.
        channels_last: whether the axes of a norm over several are those of an image, if that is known.

    Raises:
        NoRule: nobody has declared the twin of a `type(module)`.
        Mismatch: arrays are missing, too many or of other shapes, or one layer has what the other cannot do.
    """
    rule = rule_of(module)
    other = _fit.flax_layer(twin)
    if rule.twins and other and not _fit.is_twin(rule.twins, twin):
        known = " or ".join(rule.twins.split())
        raise Mismatch(
            f"{_fit.told(module)} and flax's {other} are not the same layer, whatever their arrays; it may be {known}"
        )
    ways = _ways(module, rule, shapes)
    fitting = [
        layout
        for layout, held in ways
        if held == dict(shapes) and all(getattr(twin, name, x) == x for name, x in layout.options.items())
    ]
    if not fitting:
        raise Mismatch(_fit.misfit(module, [held for _, held in ways] or leaves_of(module), shapes))
    if channels_last is not None:
        fitting = [layout for layout in fitting if layout.channels_last in (None, channels_last)] or fitting
    links = list(fitting[0].links)
    if len(fitting) > 1:
        note = f"{fitting[0].says}: assumed, for {fitting[1].says} has the same shapes"
        links[0] = replace(links[0], note=note)
    return links


def leaves_of(module: Module) -> list[dict[str, tuple[int, ...]]]:
    """The arrays that a flax twin may have, name -> shape: one dict for each way in which flax may hold them.

    Not all ways can be told beforehand: a `DenseGeneral` splits its features as it likes, and the cells of a recurrent
    module may be anywhere in the flax layer. `fits` knows them all.

    Raises:
        NoRule: nobody has declared the twin of a `type(module)`.
        Mismatch: there can be none.
    """
    rule = rule_of(module)
    return [held for _, held in _ways(module, rule, None)]


def fits(module: Module, shapes: Shapes, twin: Any = None) -> bool:
    """Whether `links_of` finds links."""
    try:
        links_of(module, shapes, twin)
    except (NoRule, Mismatch):
        return False
    return True


def covers(module: nn.Module) -> bool:
    """Whether a rule speaks of the whole module, so that nobody needs to look inside."""
    try:
        rule_of(module)
    except NoRule:
        return False
    return True


def parts(module: nn.Module) -> list[Module]:
    """What has a twin of its own: the module, or its cells if an `nn.LSTM`, `nn.GRU` or `nn.RNN` has several.

    flax has one cell for each layer and direction, wherever they are; each is asked about like a module of its own, and
    its arrays have the names that they have in the whole module.
    """
    if isinstance(module, nn.RNNBase) and len(found := _recurrent.cells(module)) > 1:
        return list(found)
    return [module]


def without_twin(module: Module) -> dict[str, str]:
    """The arrays of a PyTorch layer that its flax twin does not have: name -> reason. They are part of no link."""
    return {name: why for name, why in rule_of(module).without_twin.items() if name in _fit.arrays_of(module)}


def differences(module: Module, twin: Any, whole: Any = None) -> list[str]:
    """What makes a PyTorch layer and its flax twin compute different things although their arrays fit.

    Every option that no array shows: epsilon, momentum, padding (also where it agrees for some sizes only), strides,
    groups, activations, dtype of the computation and so on; and what is different in all such pairs, such as the order
    of an LSTM's state. An option that is not known here and has not flax's default is reported as well.

    Args:
        module: the PyTorch layer, or one of `parts(module)`.
        twin: the flax layer itself; None: nothing can be said.
        whole: the flax module that has it as a child, where it is known: a Bidirectional decides for its two RNNs.

    Returns:
        A sentence for each.
    """
    rule = rule_of(module)
    if twin is None:
        return []
    if not rule.twins:
        return [str(one) for one in rule.options(module, twin)]
    if not _fit.is_twin(rule.twins, twin):
        return [f"{type(twin).__name__} is not flax's own layer: what it computes besides its arrays is not known"]
    half = hasattr(twin, "cell") and _fit.is_twin("Bidirectional", whole)
    return _options.differences(module, twin, rule.options, whole if half else None)


def always(module: Module) -> list[str]:
    """What is different in all pairs of such layers: the part of `differences` that needs no flax layer."""
    return list(_options.always(module)) if rule_of(module).twins else []


def has_options(module: Module) -> bool:
    """Whether a flax twin has options that decide what it computes and that no array shows."""
    return rule_of(module).options not in (_options.none, _options.linear, _options.embedding)


def rule_of(module: Module) -> Rule:
    """The rule of the nearest class that has one; a subclass that computes something of its own has none."""
    layer = module.module if isinstance(module, Cell) else module
    kind = type(layer)
    for base in kind.__mro__:
        if base in RULES:
            if "forward" in vars(layer):
                raise NoRule(
                    f"this {kind.__name__} has had its forward replaced (layer.forward = ...), so that its flax twin "
                    "is not known; make it a class of its own and declare that: interop.rules.register(Class, rule)"
                )
            if all(getattr(kind, name, None) is getattr(base, name, None) for name in _COMPUTE):
                return RULES[base]
            raise NoRule(
                f"{kind.__name__} is a {base.__name__} with a forward of its own, so that its flax twin is not known; "
                f"declare it: interop.rules.register({kind.__name__}, rule)"
            )
    raise NoRule(
        f"no rule says which flax layer is the twin of {kind.__module__}.{kind.__qualname__}; declare it: "
        f"interop.rules.register({kind.__name__}, lambda module: [link('weight', 'kernel', axes(1, 0)), ...])"
    )


def _ways(module: Module, rule: Rule, shapes: Shapes | None) -> list[tuple[Layout, dict[str, tuple[int, ...]]]]:
    if why := rule.refuses(module.module if isinstance(module, Cell) else module):
        raise Mismatch(f"{_fit.told(module)}: {why}")
    return _fit.ways(module, rule.layouts, rule.without_twin, shapes)
