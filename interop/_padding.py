"""Which padding of flax's is PyTorch's, for inputs of every size."""

from collections.abc import Iterator
from typing import Any, NamedTuple

_FLAX_MODES = {"CIRCULAR": "circular", "REFLECT": "reflect"}
_NUMPY_MODES = {"circular": "wrap", "reflect": "reflect", "replicate": "edge"}


class Window(NamedTuple):
    """A kernel along one axis."""

    size: int
    stride: int
    dilation: int

    @property
    def span(self) -> int:
        return self.dilation * (self.size - 1) + 1


class Pad(NamedTuple):
    """What is put in front of an axis and behind it, and where the values come from ("zeros", "circular" ...)."""

    mode: str
    low: int
    high: int


def of_conv(module: Any, padding: Any) -> tuple[Any, bool, str]:
    """What a flax Conv's `padding` must be for an nn.Conv, whether this one is as good, and a word on where not."""
    ours = [_of_torch(module, axis, window) for axis, window in enumerate(_windows(module))]
    axes = list(zip(ours, _per_axis(padding, len(ours)), _windows(module), strict=True))
    agree = [[_agree(size, *axis) for size in _sizes(axis[2])] for axis in axes]
    needed, why = _spelled(ours, list(_windows(module)))
    for axis, ((_, _, window), sizes) in enumerate(zip(axes, agree, strict=True)):
        if any(sizes) and not all(sizes):
            good = sorted({size % window.stride for size, same in zip(_sizes(window), sizes, strict=True) if same})
            why = f"on spatial axis {axis} they agree only where size % {window.stride} is {good}"
    return needed, all(map(all, agree)), why


def of_conv_transpose(module: Any, padding: Any) -> tuple[Any, bool, str]:
    """The same for a flax ConvTranspose, which pads the input that has been spread out by the stride."""
    windows = list(_windows(module))
    needed = [
        (window.span - 1 - p, window.span - 1 - p + extra)
        for window, p, extra in zip(windows, module.padding, module.output_padding, strict=True)
    ]
    theirs = [_transposed(one, window) for one, window in zip(_per_axis(padding, len(needed)), windows, strict=True)]
    return needed, needed == theirs, "dilation * (kernel_size - 1) - padding, behind it output_padding more"


def _windows(module: Any) -> Iterator[Window]:
    return map(Window, module.kernel_size, module.stride, module.dilation)


def _sizes(window: Window) -> range:
    """Enough of them: what SAME adds depends on the size modulo the stride, if on anything."""
    return range(window.span, window.span + 6 * window.stride)


def _per_axis(padding: Any, n: int) -> list[Any]:
    """flax's shorthands spelled out: a word or a pair for each axis."""
    if isinstance(padding, str | int):
        return [padding if isinstance(padding, str) else (padding, padding)] * n
    return [(p, p) if isinstance(p, int) else tuple(p) for p in padding]


def _of_torch(module: Any, axis: int, window: Window) -> Pad:
    if module.padding == "valid":
        return Pad("zeros", 0, 0)
    if module.padding == "same":
        low = (window.span - 1) // 2
        return Pad(module.padding_mode, low, window.span - 1 - low)
    return Pad(module.padding_mode, module.padding[axis], module.padding[axis])


def _of_flax(padding: Any, window: Window, size: int) -> Pad:
    if padding == "VALID":
        return Pad("zeros", 0, 0)
    if padding == "CAUSAL":
        return Pad("zeros", window.span - 1, 0)
    if padding in _FLAX_MODES:
        return Pad(_FLAX_MODES[padding], (window.span - 1) // 2, window.span // 2)
    if padding in ("SAME", "SAME_LOWER"):
        total = max((-(-size // window.stride) - 1) * window.stride + window.span - size, 0)
        low = total // 2 if padding == "SAME" else total - total // 2
        return Pad("zeros", low, total - low)
    return Pad("zeros", *padding) if isinstance(padding, tuple) else Pad(str(padding), -1, -1)  # a word we do not know


def _agree(size: int, ours: Pad, padding: Any, window: Window) -> bool:
    """What is padded behind the last window does not count."""
    theirs = _of_flax(padding, window, size)
    lengths = [(size + pad.low + pad.high - window.span) // window.stride for pad in (ours, theirs)]
    nothing = not any([*ours[1:], *theirs[1:]])
    return (ours.mode == theirs.mode or nothing) and ours.low == theirs.low and lengths[0] == lengths[1]


def _spelled(ours: list[Pad], windows: list[Window]) -> tuple[Any, str]:
    pairs = [(pad.low, pad.high) for pad in ours]
    mode = ours[0].mode
    if mode == "zeros" or not any(map(any, pairs)):
        return pairs, ""
    for word, meant in _FLAX_MODES.items():
        if mode == meant and all(_of_flax(word, window, 0) == pad for pad, window in zip(ours, windows, strict=True)):
            return word, ""
    return "VALID", f"and in front of it jnp.pad(x, {[(0, 0), *pairs, (0, 0)]}, mode={_NUMPY_MODES[mode]!r})"


def _transposed(padding: Any, window: Window) -> Any:
    """What `jax.lax.conv_transpose` makes of its words."""
    if padding == "VALID":
        total = window.span + window.stride - 2 + max(window.span - window.stride, 0)
        return window.span - 1, total - (window.span - 1)
    if padding == "SAME":
        total = window.span + window.stride - 2
        low = window.span - 1 if window.stride > window.span - 1 else -(-total // 2)
        return low, total - low
    return padding
