"""NOTE [batches]: which examples the first axis of an array counts.

Frames are often put into the batch and taken out again: `(b, t, c, h, w)` is viewed as `(b * t, c, h, w)`, and what a
convolution makes of it as `(b, t, features)`, of which the features are no flattened image of `b * t` examples. So the
length of a first axis is followed as a product of lengths without values: each is an axis of a step, `(step, axis)`.
A length of -1 or of a number says nothing of itself. It is trusted if the batch is one that the model was given.
"""

from typing import Any

from torch import fx, nn

from .values import Array, Flat, Image, Lengths, Number, Plain, Several, Sizes

# of functions that leave the first axis alone unless told: where their axis is, its name, what it is if left out
_AXIS = {
    "unflatten": (1, "dim", 0), "unsqueeze": (1, "dim", 0), "squeeze": (1, "dim", 0), "cat": (1, "dim", 0),
    "concat": (1, "dim", 0), "concatenate": (1, "dim", 0), "chunk": (2, "dim", 0), "split": (2, "dim", 0),
    "unbind": (1, "dim", 0), "glu": (1, "dim", -1), "mean": (1, "dim", 0), "sum": (1, "dim", 0), "amax": (1, "dim", 0),
    "amin": (1, "dim", 0), "max": (1, "dim", 0), "min": (1, "dim", 0), "std": (1, "dim", 0), "var": (1, "dim", 0),
}  # fmt: skip
_KEEPS = set("linear matmul bmm pad pixel_shuffle pixel_unshuffle expand channel_shuffle".split())


def product(*lengths: Lengths) -> Lengths:
    """The length of axes that were merged."""
    return tuple(sorted((length for some in lengths for length in some), key=str))


class Batches:
    """The first axis of what each step gives."""

    def __init__(self) -> None:
        self.of: dict[fx.Node, Lengths] = {}
        self.same: dict[fx.Node, fx.Node] = {}  # step -> an earlier one whose result has the same shape
        self.trusted: set[Lengths] = set()

    def sizes(self, x: Any, node: fx.Node) -> Sizes:
        """The shape of what a step gives."""
        return Sizes(x, self.same.get(node, node), self.of[node])

    def keeps(self, first: Any, before: Lengths, axes: int) -> bool:
        """Whether a view with such a first length, and so many axes, has the same first axis."""
        if isinstance(first, Number):
            return first.lengths == before
        return axes == 2 and before in self.trusted

    def follow(
        self, node: fx.Node, name: str, args: Any, options: Any, module: Any, result: Any, keeps: bool, alike: bool
    ) -> None:
        """Note the first axis of what a step gives.

        Args:
            node: the step.
            name: of its function.
            args: its arguments.
            options: those by name.
            module: what is called, if it is a module that is known.
            result: what it gives.
            keeps: whether a step of this name works on every channel on its own.
            alike: whether it works on every element on its own.
        """
        before = [n for n in node.all_input_nodes if n in self.of]
        if isinstance(result, (Number, Sizes, Array)):
            return
        own: Lengths = ((node, 0),)
        if not before:
            self.of[node] = own
            self.trusted.add(own)
            return
        x = args[0] if args else None
        first = self.of[before[0]]
        if node.op == "call_module":
            start = getattr(module, "start_dim", getattr(module, "dim", 1))
            changed = module is None or (isinstance(module, (nn.Flatten, nn.Unflatten)) and start == 0)
            self.of[node] = own if changed else first
        elif name in ("view", "reshape"):
            shape = args[1] if len(args) == 2 else args[1:]
            length = shape[0] if isinstance(shape, (list, tuple)) and shape else shape
            if isinstance(length, Number) and length.lengths is not None:
                self.of[node] = length.lengths
            elif isinstance(x, (Image, Flat)) and self.keeps(length, first, 2 if isinstance(result, Flat) else 0):
                self.of[node] = first
            else:
                self.of[node] = own
                if isinstance(x, Plain) and first in self.trusted:
                    self.trusted.add(own)
        elif name == "flatten":
            start = options.get("start_dim", args[1] if len(args) > 1 else 0)
            end = options.get("end_dim", args[2] if len(args) > 2 else -1)
            same = self.same.get(before[0], before[0])
            merged = product(first, *(((same, n),) for n in range(1, end + 1))) if end > 0 else own
            self.of[node] = merged if start == 0 else first
        elif keeps or alike or self._leaves_first(name, args, options):
            self.of[node] = first
            if alike:
                self.same[node] = self.same.get(before[0], before[0])
        else:
            self.of[node] = own

    @staticmethod
    def _leaves_first(name: str, args: Any, options: Any) -> bool:
        if name == "permute":
            dims = options.get("dims", args[1] if len(args) == 2 else args[1:])
            return bool(dims) and dims[0] == 0
        if name in ("transpose", "swapaxes", "swapdims", "movedim"):
            return 0 not in (*args[1:], *options.values())
        if name in ("getitem", "getattr"):
            if isinstance(args[0], (Several, tuple)):
                return True
            index = args[1][0] if isinstance(args[1], tuple) and args[1] else args[1]
            return index == slice(None) or index is Ellipsis
        if name in _AXIS:
            n, key, default = _AXIS[name]
            axis = options.get(key, args[n] if len(args) > n else default)
            return axis is not None and 0 not in (axis if isinstance(axis, (list, tuple)) else (axis,))
        return name in _KEEPS or name.startswith("conv")
