"""The walk along the steps of a trace: every step says what its result is, told by its arguments."""

import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from . import meet, views
from .batches import Batches, product
from .known import Flow
from .modules import NORMS, PLACEWISE, POOLS, RESIZES, made
from .trace import CONVOLUTIONS
from .values import Array, Image, NotUnderstood, Number, Plain, Several, Sizes, Unknown, listed, results

# by the names of functions and methods, without the underscores of a step in place
ELEMENTWISE = set(
    "relu relu6 gelu silu mish elu selu celu leaky_relu rrelu prelu hardswish hardtanh hardsigmoid hardshrink "
    "softplus softsign softshrink tanhshrink sigmoid tanh logsigmoid threshold softmax softmin log_softmax dropout "
    "dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout stochastic_depth drop_path add sub subtract mul "
    "multiply div divide truediv floordiv true_divide pow neg pos exp expm1 log log1p sqrt rsqrt abs square reciprocal "
    "clamp clip sin cos erf sign rsub maximum minimum where lerp addcmul addcdiv contiguous clone detach to float "
    "double half bfloat16 type type_as cpu cuda iadd isub imul itruediv normalize batch_norm instance_norm zeros_like "
    "ones_like rand_like randn_like empty_like gt lt ge le eq ne logical_and logical_or logical_not expand_as "
    "nan_to_num requires_grad masked_fill identity fill zero local_response_norm native_channel_shuffle".split()
)
POOLINGS = set(
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d lp_pool1d lp_pool2d adaptive_avg_pool1d "
    "adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d".split()
)
RESIZINGS = set("interpolate upsample upsample_nearest upsample_bilinear grid_sample".split())
REDUCTIONS = set("mean sum amax amin std var logsumexp prod norm nanmean".split())
REDUCTIONS_TO_PAIRS = set("max min median".split())
VIEWS: dict[str, Callable[..., Any]] = {
    "flatten": views.flatten,
    "transpose": views.transpose,
    "swapaxes": views.transpose,
    "swapdims": views.transpose,
    "movedim": views.movedim,
    "moveaxis": views.movedim,
    "unsqueeze": views.unsqueeze,
    "squeeze": views.squeeze,
    "expand": views.expand,
    "repeat": views.repeat,
    "pad": views.pad,
    "split": views.split,
    "chunk": views.chunk,
    "getitem": views.getitem,
    "rest": views.rest,
}
MEETINGS: dict[str, Callable[..., Any]] = {
    "cat": meet.cat,
    "concat": meet.cat,
    "concatenate": meet.cat,
    "glu": meet.glu,
    "pixel_shuffle": lambda flow, x, upscale_factor: meet.scaled(flow, x, 1, upscale_factor**2),
    "pixel_unshuffle": lambda flow, x, downscale_factor: meet.scaled(flow, x, downscale_factor**2, 1),
}


class Walk:
    """One walk through a graph; `values` has what each step gives."""

    def __init__(self, net: nn.Module, opaque: set[str]) -> None:
        self.opaque = opaque
        self.modules = dict(net.named_modules())
        every = frozenset(m.out_channels for m in net.modules() if isinstance(m, CONVOLUTIONS))
        self.series = any(len(m.kernel_size) == 1 for m in net.modules() if isinstance(m, CONVOLUTIONS))
        self.flow = Flow(every)
        self.values: dict[fx.Node, Any] = {}
        self.cut: set[fx.Node] = set()  # what is made of an input that was cut into pieces
        self.batches = Batches()

    def step(self, node: fx.Node) -> None:
        args, options = self._given(node.args), self._given(node.kwargs)
        name = str(node.target if isinstance(node.target, str) else getattr(node.target, "__name__", ""))
        if node.op != "call_module":
            name = name.strip("_")
        try:
            result = self._result(node, name, args, options)
        except Exception:  # not in the table, or with arguments that it does not expect
            result = self.flow.unknown((args, options), name)
        self.values[node] = result
        self._follow_cut(node, name, args)
        module = self.modules.get(name) if node.op == "call_module" and name not in self.opaque else None
        keeps = name in POOLINGS | RESIZINGS
        self.batches.follow(node, name, args, options, module, result, keeps, name in ELEMENTWISE)

    def _result(self, node: fx.Node, name: str, args: Any, options: Any) -> Any:
        if node.op == "placeholder":
            return self._input(node, set())
        if node.op == "get_attr":
            return self._array(str(node.target))
        if node.op == "output":
            return self._returned(args)
        if node.op == "call_module":
            return self._module(name, list(results((args, options))))
        return self._function(node, name, list(args), dict(options))

    def _follow_cut(self, node: fx.Node, name: str, args: Any) -> None:
        """An input cut into patches, whose features are in another order where its channels are last."""
        module = self.modules.get(name) if node.op == "call_module" else None
        given = bool(args) and isinstance(args[0], Plain) and args[0].given == "whole"
        sizes = args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:] if args else ()
        cuts = name == "unfold" or isinstance(module, nn.Unfold) or (name in ("view", "reshape") and len(sizes) > 4)
        if not (given and cuts) and not self.cut.intersection(node.all_input_nodes[:1]):
            return
        if isinstance(module, (nn.Linear, *NORMS)):
            self.flow.cut.append(name)
        if not isinstance(module, nn.Linear):
            self.cut.add(node)

    def _given(self, args: Any) -> Any:
        return map_arg(args, self.values.__getitem__)

    def _input(self, node: fx.Node, passed: set[fx.Node]) -> Any:
        """A placeholder is an image if a convolution reads it, itself or after steps that leave an image one."""
        for user in node.users:
            module = self.modules.get(str(user.target)) if user.op == "call_module" else None
            if isinstance(module, CONVOLUTIONS):
                return Image(module.in_channels, len(module.kernel_size))
            name = str(getattr(user.target, "__name__", user.target)).strip("_")
            keeps = name in ELEMENTWISE | POOLINGS | RESIZINGS
            if module is not None:
                keeps = type(module).__module__ in (POOLS, *RESIZES, *PLACEWISE)
            if keeps and user not in passed and len(user.all_input_nodes) == 1:
                passed.add(user)
                found = self._input(user, passed)
                if isinstance(found, Image):
                    return found
        return Plain(given="whole")

    def _array(self, name: str) -> Any:
        above, _, own = name.rpartition(".")
        x = getattr(self.modules.get(above), own, None)
        if not isinstance(x, Tensor):
            return Plain()
        return Number() if x.numel() == 1 else Array(name, tuple(x.shape))

    def _returned(self, args: Any) -> None:
        """NOTE [claims]: whether a view that nobody reads is an image, only the caller of the model knows."""
        for x in results(args):
            if isinstance(x, Image) and not x.sure and (x.axes > 1 or self.series):
                self.flow.unclear += [("", claim) for claim in x.claims]

    def _module(self, name: str, found: list[Any]) -> Any:
        module = self.modules[name]
        if name not in self.opaque:
            return made(self.flow, name, module, found)
        inside = frozenset(m.out_channels for m in module.modules() if isinstance(m, CONVOLUTIONS))
        outside = self.flow.unknown(found)
        if isinstance(outside, Unknown) or inside:
            return Unknown(inside | (outside.channels if isinstance(outside, Unknown) else frozenset()))
        return outside

    def _function(self, node: fx.Node, name: str, args: list[Any], options: dict[str, Any]) -> Any:
        found = list(results((args, options)))
        if "input" in options:
            args = [options.pop("input"), *args]
        x, rest = args[0] if args else None, args[1:]
        if name in ("getattr", "size", "dim", "numel", "ndimension", "len"):
            return self._asked(node, name, x, rest, options)
        if found and all(isinstance(one, Number) for one in found) and name in ELEMENTWISE:
            return _calculated(name, args)
        if name.startswith("conv"):
            return self._convolution(name, args, options)
        if isinstance(x, Unknown):
            raise NotUnderstood
        if name in ELEMENTWISE:
            return meet.together(self.flow, found)
        if name in POOLINGS and isinstance(x, Plain) or name in RESIZINGS and isinstance(x, Plain):
            return x.changed()
        if name in POOLINGS:
            size = options.get("output_size", rest[0] if rest else None) if name.startswith("adaptive") else None
            return meet.pooled(self.flow, x, size)
        if name in RESIZINGS:
            return meet.resized(self.flow, x)
        if name in REDUCTIONS | REDUCTIONS_TO_PAIRS:
            return self._reduced(name, x, rest, options, found)
        if name in ("view", "reshape"):
            shape = options.get("shape", options.get("size", rest[0] if len(rest) == 1 else rest))
            return self._view(node, x, listed(shape))
        if name == "unflatten":
            return self._unflatten(x, *rest, **options)
        if name == "permute":
            return views.permute(x, *options.get("dims", rest))
        if name in VIEWS:
            return VIEWS[name](x, *rest, **options)
        if name in MEETINGS:
            return MEETINGS[name](self.flow, x, *rest, **options)
        raise NotUnderstood

    def _asked(self, node: fx.Node, name: str, x: Any, rest: list[Any], options: dict[str, Any]) -> Any:
        """Sizes, and what else is no array."""
        if name not in ("getattr", "size"):
            return Number()
        what = rest[0] if name == "getattr" else "shape"
        if what == "shape":
            of = node.all_input_nodes[0]
            sizes = self.batches.sizes(x, of) if of in self.batches.of else Sizes(x, of, ((of, 0),))
            axis = options.get("dim", rest[0] if rest and name == "size" else None)
            return sizes if axis is None else views.size(sizes, axis)
        if isinstance(x, Several):
            return x.each
        if what in ("dtype", "device", "ndim", "is_cuda"):
            return Number()
        raise NotUnderstood

    def _convolution(self, name: str, args: list[Any], options: dict[str, Any]) -> Any:
        """By a function, of a weight that may be anything."""
        x = args[0]
        weight = options.get("weight", args[1] if len(args) > 1 else None)
        groups = options.get("groups", args[6] if len(args) > 6 else 1)
        if not isinstance(weight, Array):
            return Unknown(self.flow.every | (x.channels if isinstance(x, Unknown) else frozenset()))
        into, out = weight.shape[1], weight.shape[0]
        if "transpose" in name:
            into, out = out, into * (groups if isinstance(groups, int) else 1)
        self.flow.image(x, name, into)
        return Image(out, len(weight.shape) - 2)

    def _reduced(self, name: str, x: Any, rest: list[Any], options: dict[str, Any], found: list[Any]) -> Any:
        def option(key: str, n: int, default: Any) -> Any:
            return options[key] if key in options else rest[n] if len(rest) > n else default

        dim = option("dim", 1 if name == "norm" else 0, options.get("axis"))
        keep = option("keepdim", 2 if name in ("norm", "std", "var") else 1, False)
        if list(results(dim)) or "other" in options:  # the larger of two
            return meet.together(self.flow, found)
        reduced = views.reduce(x, dim, bool(keep))
        return reduced if name in REDUCTIONS or dim is None else Several(reduced)

    def _view(self, node: fx.Node, x: Any, shape: list[Any]) -> Any:
        before = self.batches.of[node.all_input_nodes[0]]
        return views.view(x, shape, self.batches.keeps(shape[0], before, len(shape)))

    @staticmethod
    def _unflatten(x: Any, dim: Any, sizes: Any) -> Any:
        if dim != 1:
            raise NotUnderstood
        return views.view(x, [Number(), *sizes], same=True)


def _calculated(name: str, args: list[Any]) -> Number:
    """Of sizes."""
    known = {"mul": operator.mul, "floordiv": operator.floordiv, "add": operator.add, "sub": operator.sub}
    values = [x.value if isinstance(x, Number) else x for x in args]
    fine = name in known and all(isinstance(n, int) for n in values)
    lengths = None
    if name == "mul" and all(isinstance(x, Number) and x.lengths is not None for x in args):
        lengths = product(*(x.lengths for x in args))
    return Number(known[name](*values) if fine else None, lengths)
