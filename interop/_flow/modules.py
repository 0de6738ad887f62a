"""What modules make of what they read: layers with a rule, and PyTorch's own without one."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from .known import Flow
from .meet import glu, pooled, resized, scaled, together
from .trace import CONVOLUTIONS
from .values import Flat, Image, NotUnderstood, Number, Plain, Several, Unknown
from .views import flatten, view

NORMS = (nn.BatchNorm1d, nn.LayerNorm, nn.RMSNorm)  # of what may have been flattened
CHANNEL_NORMS = (
    nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm, nn.LocalResponseNorm,
    nn.ChannelShuffle,
)  # fmt: skip
RECURRENT = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
POOLS = "torch.nn.modules.pooling"
RESIZES = ("torch.nn.modules.upsampling", "torch.nn.modules.padding")
PLACEWISE = ("torch.nn.modules.activation", "torch.nn.modules.dropout", "torch.nn.modules.linear")


def made(flow: Flow, name: str, module: Any, found: Sequence[Any]) -> Any:
    """What a module gives.

    Args:
        flow: learns what is read.
        name: of the module.
        module: the module.
        found: what it reads, the first first.

    Raises:
        NotUnderstood: NOTE [unknown steps].
    """
    x = found[0] if found else Plain()
    if isinstance(module, CONVOLUTIONS):
        flow.image(x, name, module.in_channels)
        return Image(module.out_channels, len(module.kernel_size))
    flow.read.setdefault(name, []).extend(found)
    if isinstance(x, Plain) and x.given == "flattened" and isinstance(module, (nn.Linear, *NORMS)):
        flow.inputs.append(name)
    if isinstance(module, nn.Linear):
        return _dense(flow, name, module, x)
    if isinstance(module, nn.Embedding):
        return Plain(module.embedding_dim, frozenset({name}))
    if isinstance(module, NORMS):
        return replace(x, writers=x.writers | {name}) if isinstance(x, Plain) else x
    if isinstance(module, RECURRENT):
        return _recurrent(flow, module, found)
    return _without_rule(flow, name, module, x, found)


def _dense(flow: Flow, name: str, module: nn.Linear, x: Any) -> Any:
    if isinstance(x, Image) and x.sure:  # over the last axis of the space: flax may have that axis anywhere
        raise NotUnderstood
    if isinstance(x, Unknown) and not x.doubtful(module.in_features) and module.in_features not in x.channels:
        return x
    return Plain(module.out_features, frozenset({name}))


def _recurrent(flow: Flow, module: Any, found: Sequence[Any]) -> Any:
    """Of a step of an RNN its features only, of an attention its first result."""
    size = getattr(module, "input_size", None) or getattr(module, "embed_dim", 0)
    open_ones = [
        x
        for x in found
        if (isinstance(x, Image) and x.sure)
        or (isinstance(x, Unknown) and not x.doubtful(size) and size not in x.channels)
    ]
    one = flow.unknown(found) if open_ones else Plain(getattr(module, "embed_dim", None))
    return one if isinstance(module, nn.RNNCellBase) else Several(one)


def _without_rule(flow: Flow, name: str, module: Any, x: Any, found: Sequence[Any]) -> Any:
    kind = type(module).__module__
    if isinstance(module, CHANNEL_NORMS) or kind == POOLS or kind in RESIZES:
        if isinstance(x, Plain):
            return x.changed()
        if kind in RESIZES:
            return resized(flow, x, name)
        keeps = not type(module).__name__.startswith("Adaptive")
        if isinstance(module, CHANNEL_NORMS) and isinstance(x, Image):
            return flow.image(x, name)
        return pooled(flow, x, None if keeps else module.output_size, name)
    if isinstance(module, nn.PReLU):
        if module.num_parameters == 1 or isinstance(x, Image):
            return x
        raise NotUnderstood
    if isinstance(module, nn.Flatten):
        return flatten(x, module.start_dim, module.end_dim)
    if isinstance(module, nn.Unflatten):
        if module.dim != 1:
            raise NotUnderstood
        return view(x, [Number(), *module.unflattened_size], same=True)
    if isinstance(module, nn.PixelShuffle):
        return scaled(flow, x, 1, module.upscale_factor**2)
    if isinstance(module, nn.PixelUnshuffle):
        return scaled(flow, x, module.downscale_factor**2, 1)
    if isinstance(module, nn.GLU):
        return glu(flow, x, module.dim)
    if isinstance(module, nn.Identity) or kind in PLACEWISE:
        return together(flow, found)
    inner = [f"{name}.{own}" for own, _ in module.named_modules() if own]
    if inner and any(isinstance(one, (Flat, Unknown, Image)) for one in found):  # as in a transformer's layer
        for one in inner:
            flow.read.setdefault(one, []).append(flow.unknown(found))
    raise NotUnderstood
