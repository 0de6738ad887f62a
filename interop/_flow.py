"""What reaches each layer of a PyTorch model: an image, a flattened image, or what lies as it does in flax.

The model is traced with `torch.fx`, on a copy that shares its arrays and without any values, and every step of the
trace says what its result is, told by its arguments: one function for each kind of step, and a table of names.

NOTE [unknown steps]: what is made of an image by a step that is not in the table is `Unknown`, and stays so until a
convolution reads it. What is made of anything else lies in flax as it does in PyTorch, and is `Plain`.

NOTE [batches]: frames are often put into the batch and taken out again. A first axis of another length than before is
another batch, and what is viewed as (n, -1) with the length of another batch is unknown.

NOTE [claims]: a dense layer's output that is viewed as (n, a, b, c) is an image, or tokens with heads. Only a step that
reads images tells: then the claims of the view hold, which say of what layers the columns count `a` channels first.
"""

import copy
import inspect
import math
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from . import rules

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.BatchNorm1d, nn.LayerNorm, nn.RMSNorm)  # of what may have been flattened


class Claim(NamedTuple):
    """NOTE [claims]: the output of a layer is an image of so many channels and places."""

    layer: str
    channels: int | None
    places: int | None


@dataclass(frozen=True)
class Plain:
    """An array that lies in flax as in PyTorch: features last.

    Attributes:
        features: the length of the last axis, if known.
        writers: the layers and arrays whose columns it has.
    """

    features: int | None = None
    writers: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Image:
    """An array (n, channels, *space), which flax has with channels last.

    Attributes:
        channels: how many, if known.
        axes: of the space.
        places: in the space, if known.
        sure: whether it is one; if not, it only has the shape of one.
        claims: what holds if it is one.
    """

    channels: int | None
    axes: int
    places: int | None = None
    sure: bool = True
    claims: frozenset[Claim] = frozenset()


class Piece(NamedTuple):
    """A part of the features: of a flattened image, or (channels None) of anything else. Size None: not known."""

    channels: int | None
    size: int | None


@dataclass(frozen=True)
class Flat:
    """Flattened images, next to one another and to other features."""

    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Unknown:
    """NOTE [unknown steps]: made of images of so many channels."""

    channels: frozenset[int]

    def doubtful(self, size: int) -> bool:
        """Whether so many features may be such images flattened, or next to something else."""
        return size not in self.channels and any(1 < count < size for count in self.channels)


@dataclass(frozen=True)
class Number:
    """A size or a scalar; `batch`: NOTE [batches]."""

    value: int | None = None
    batch: Any = None


@dataclass(frozen=True)
class Sizes:
    """The shape of an array; `batch`: NOTE [batches]."""

    of: Any
    batch: Any = None


@dataclass(frozen=True)
class Array:
    """A parameter or buffer."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Several:
    """A tuple of such results."""

    each: Any


@dataclass
class Flow:
    """What is known of a model.

    Attributes:
        read: layer -> what it reads, one for each call.
        seen: layers that every call is known of.
        claims: those that hold.
        unclear: convolution, its channels, the layers that may write the image that it reads.
    """

    read: dict[str, list[Any]] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    claims: set[Claim] = field(default_factory=set)
    unclear: list[tuple[str, int, frozenset[str]]] = field(default_factory=list)


def flow(net: nn.Module) -> Flow:
    """What reaches the layers of a model."""
    traced = _traced(net)
    if traced is None:
        return Flow()
    graph, opaque = traced
    walk = _Walk(net, opaque)
    for node in graph.nodes:
        walk.values[node] = walk.step(node)
    called = {str(node.target) for node in graph.nodes if node.op == "call_module"} - opaque
    for name, _ in net.named_modules():
        parts = name.split(".")
        above = {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
        if above & called and not above & opaque:
            walk.flow.seen.add(name)
    return walk.flow


# --- tracing ---


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

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        stack = self.module_stack.copy()
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.module_stack = stack
            self.opaque.add(self.path_of_module(m))
            return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)


def _traced(net: nn.Module) -> tuple[fx.Graph, set[str]] | None:
    """The graph of a model and the modules that cannot be looked into; None if the model is one of these."""
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


def _defaults(net: nn.Module) -> dict[str, Any] | None:
    """The arguments that a call of the model may leave out."""
    try:
        parameters = inspect.signature(net.forward).parameters.values()
    except (TypeError, ValueError):
        return None
    return {p.name: p.default for p in parameters if p.default is not p.empty} or None


def _copied(module: nn.Module, copies: dict[nn.Module, nn.Module]) -> nn.Module:
    """A module that shares the arrays of another, so that what its code writes on itself is not seen."""
    if module not in copies:
        copies[module] = made = copy.copy(module)
        for name, value in vars(module).items():
            if isinstance(value, (list, dict, set)):
                made.__dict__[name] = copy.copy(value)
            elif isinstance(value, Tensor):
                made.__dict__[name] = value.clone()
        made._modules = {
            name: child if child is None else _copied(child, copies) for name, child in module._modules.items()
        }
    return copies[module]


# --- the table of steps, by the names of functions, methods and modules ---

_ELEMENTWISE = set(
    "relu relu6 gelu silu mish elu selu celu leaky_relu rrelu prelu hardswish hardtanh hardsigmoid hardshrink "
    "softplus softsign softshrink tanhshrink sigmoid tanh logsigmoid threshold softmax softmin log_softmax dropout "
    "dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout stochastic_depth drop_path add sub subtract mul "
    "multiply div divide truediv floordiv true_divide pow neg pos exp expm1 log log1p sqrt rsqrt abs square reciprocal "
    "clamp clip sin cos erf sign rsub maximum minimum where lerp addcmul addcdiv contiguous clone detach to float "
    "double half bfloat16 type type_as cpu cuda iadd isub imul itruediv normalize batch_norm instance_norm zeros_like "
    "ones_like rand_like randn_like empty_like gt lt ge le eq ne logical_and logical_or logical_not expand_as "
    "nan_to_num requires_grad masked_fill identity fill zero local_response_norm".split()
)
_IMAGEWISE = set(  # every channel on its own, in space
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d lp_pool1d lp_pool2d interpolate upsample "
    "upsample_nearest upsample_bilinear adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
    "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d grid_sample".split()
)
_REDUCTIONS = set("mean sum amax amin std var logsumexp prod norm nanmean".split())
_REDUCTIONS_TO_PAIRS = set("max min median".split())
_CHANNEL_NORMS = (nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)
_POOLS = (
    "torch.nn.modules.pooling", "torch.nn.modules.upsampling", "torch.nn.modules.padding",
)  # fmt: skip

_PLACEWISE = ("torch.nn.modules.activation", "torch.nn.modules.dropout")


class _Walk:
    """One walk through a graph; `values` has what each node gives."""

    def __init__(self, net: nn.Module, opaque: set[str]) -> None:
        self.net, self.opaque = net, opaque
        self.modules = dict(net.named_modules())
        self.every = frozenset(m.out_channels for m in net.modules() if isinstance(m, CONVOLUTIONS))
        self.values: dict[fx.Node, Any] = {}
        self.batches: dict[fx.Node, Any] = {}
        self.flow = Flow()

    def step(self, node: fx.Node) -> Any:
        args, options = self._given(node.args), self._given(node.kwargs)
        self.batches[node] = self._batch(node, args)
        self.batch = self.batches[node.all_input_nodes[0]] if node.all_input_nodes else node
        if node.op == "placeholder":
            return self._input(node, set())
        if node.op == "get_attr":
            return self._array(str(node.target))
        if node.op == "output":
            return None
        name = str(node.target if isinstance(node.target, str) else getattr(node.target, "__name__", ""))
        try:
            if node.op == "call_module":
                return self._module(name, (*args, *options.values()))
            return self._named(name.strip("_"), list(args), dict(options))
        except Exception:  # not in the table, or with arguments that it does not expect
            return self._unknown((args, options))

    def _given(self, args: Any) -> Any:
        return map_arg(args, self.values.__getitem__)

    def _input(self, node: fx.Node, passed: set[fx.Node]) -> Any:
        """A placeholder is an image if a convolution reads it, itself or after steps that leave an image one."""
        for user in node.users:
            module = self.modules.get(str(user.target)) if user.op == "call_module" else None
            if isinstance(module, CONVOLUTIONS):
                return Image(module.in_channels, _axes(module))
            kind = type(module).__module__
            name = str(getattr(user.target, "__name__", user.target)).strip("_")
            keeps = kind in (*_POOLS, *_PLACEWISE) if module is not None else name in _ELEMENTWISE | _IMAGEWISE
            if keeps and user not in passed and len(user.all_input_nodes) == 1:
                passed.add(user)
                found = self._input(user, passed)
                if isinstance(found, Image):
                    return found
        return Plain()

    def _batch(self, node: fx.Node, args: Any) -> Any:
        """NOTE [batches]: that of what a node gives."""
        before = [n for n in node.all_input_nodes if not isinstance(self.values[n], (Number, Sizes, Array))]
        if not before:
            return node
        name = str(getattr(node.target, "__name__", node.target)).strip("_")
        first = args[1] if len(args) > 1 else None
        first = first[0] if isinstance(first, (list, tuple)) and first else first
        if name in ("view", "reshape"):
            same = isinstance(first, Number) and first.batch is self.batches[before[0]]
        elif name in ("permute", "flatten", "unflatten", "transpose", "unsqueeze", "squeeze", "getitem", "unbind"):
            whole = ("permute", "getitem")
            same = first in (0, slice(None), Ellipsis) if name in whole else first is not None and first != 0
            same = same and not (name == "getitem" and first == 0)
        else:
            same = True
        return self.batches[before[0]] if same else node

    def _array(self, name: str) -> Any:
        above, _, own = name.rpartition(".")
        x = getattr(self.modules.get(above), own, None)
        if not isinstance(x, Tensor):
            return Plain()
        return Number() if x.numel() == 1 else Array(name, tuple(x.shape))

    def _unknown(self, values: Any) -> Any:
        """NOTE [unknown steps]"""
        found = list(_results(values))
        images = [x for x in found if isinstance(x, (Flat, Unknown)) or (isinstance(x, Image) and x.sure)]
        if images:
            return Unknown(frozenset().union(*(self._counts(x) for x in images)))
        writers = [x.writers for x in found if isinstance(x, Plain)]
        claimed = [{claim.layer for claim in x.claims} for x in found if isinstance(x, Image)]
        return Plain(None, frozenset().union(*writers, *claimed))

    def _counts(self, x: Any) -> frozenset[int]:
        """The channels that something may have been made of."""
        if isinstance(x, Unknown):
            return x.channels
        if isinstance(x, Flat):
            return frozenset(piece.channels for piece in x.pieces if piece.channels is not None)
        return frozenset({x.channels}) if isinstance(x, Image) and x.channels else self.every

    # --- modules ---

    def _module(self, name: str, args: tuple[Any, ...]) -> Any:
        module = self.modules[name]
        found = list(_results(args))
        x = found[0] if found else Plain()
        kind = type(module)
        if name in self.opaque:
            inside = frozenset(m.out_channels for m in module.modules() if isinstance(m, CONVOLUTIONS))
            outside = self._unknown(args)
            if isinstance(outside, Unknown) or inside:
                return Unknown(inside | (outside.channels if isinstance(outside, Unknown) else frozenset()))
            return outside
        if isinstance(module, CONVOLUTIONS):
            self._image(name, x, module.in_channels)
            return Image(module.out_channels, _axes(module))
        self.flow.read.setdefault(name, []).extend(found)
        if isinstance(module, nn.Linear):
            if isinstance(x, Image) and x.sure:  # over the last axis of the space
                return replace(x, places=None)
            if isinstance(x, Unknown) and not x.doubtful(module.in_features) and module.in_features not in x.channels:
                return x
            return Plain(module.out_features, frozenset({name}))
        if isinstance(module, nn.Embedding):
            return Plain(module.embedding_dim, frozenset({name}))
        if isinstance(module, NORMS):
            return replace(x, writers=x.writers | {name}) if isinstance(x, Plain) else x
        if isinstance(module, _CHANNEL_NORMS) or kind.__module__ in _POOLS:
            if isinstance(x, Plain):
                return self._unknown((replace(x, writers=x.writers | {name}),))
            return self._imagewise(name, x, _output_size(module))
        if isinstance(module, nn.PReLU):
            return x if module.num_parameters == 1 or isinstance(x, Image) else self._unknown((x,))
        if isinstance(module, nn.Flatten):
            return self._flatten(x, module.start_dim, module.end_dim)
        if isinstance(module, nn.Unflatten):
            return self._view(x, [Number(), *module.unflattened_size]) if module.dim == 1 else self._unknown((x,))
        if isinstance(module, nn.PixelShuffle):
            return self._scaled(x, 1, module.upscale_factor**2)
        if isinstance(module, nn.PixelUnshuffle):
            return self._scaled(x, module.downscale_factor**2, 1)
        if isinstance(module, nn.GLU):
            return self._glu(x, module.dim)
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)):
            size = getattr(module, "input_size", None) or getattr(module, "embed_dim", 0)
            open_ones = [
                one
                for one in found
                if (isinstance(one, Image) and one.sure)
                or (isinstance(one, Unknown) and not one.doubtful(size) and size not in one.channels)
            ]
            made = self._unknown(args) if open_ones else Plain(getattr(module, "embed_dim", None))
            return made if isinstance(module, nn.RNNCellBase) else Several(made)
        if isinstance(module, nn.Identity) or kind.__module__ in _PLACEWISE:
            return self._together(found)
        return self._unknown(args)

    def _image(self, name: str, x: Any, count: int | None) -> Any:
        """What a layer reads that reads images: the claims hold."""
        if isinstance(x, Image):
            self.flow.claims |= x.claims
            return replace(x, sure=True, claims=frozenset(), channels=x.channels or count)
        if isinstance(x, Plain) and x.features is None and count:
            self.flow.unclear.append((name, count, x.writers))
        return x

    def _imagewise(self, name: str, x: Any, size: Any = None) -> Any:
        if isinstance(x, (Plain, Unknown)):
            return x
        if not isinstance(x, Image):
            return self._unknown((x,))
        x = self._image(name, x, None)
        one = x.places == 1 or (size is not None and all(n == 1 for n in _listed(size)))
        return replace(x, places=1 if one else None)

    # --- functions and methods ---

    def _named(self, name: str, args: list[Any], options: dict[str, Any]) -> Any:
        found = list(_results((args, options)))
        x, rest = (args[0], args[1:]) if args else (options.get("input"), [])

        def option(key: str, n: int, default: Any = None) -> Any:
            return options[key] if key in options else rest[n] if len(rest) > n else default

        if name == "getattr":
            if rest[0] == "shape":
                return Sizes(x, self.batch)
            if isinstance(x, Several):
                return x.each
            return Number() if rest[0] in ("dtype", "device", "ndim", "is_cuda") else self._unknown(args)
        if name in ("dim", "numel", "ndimension", "len"):
            return Number()
        if name == "size":
            sizes = Sizes(x, self.batch)
            return _size_of(sizes, option("dim", 0)) if option("dim", 0) is not None else sizes
        if name == "getitem":
            return self._getitem(x, rest[0])
        if name.startswith("conv") and isinstance(found[0] if found else None, (Plain, Image, Flat, Unknown)):
            return self._functional_convolution(name, args, options)
        if found and all(isinstance(one, Number) for one in found) and name in _ELEMENTWISE:
            return _calculated(name, args)
        if name in ("cat", "concat", "concatenate"):
            return self._cat(_listed(x), option("dim", 0, options.get("axis", 0)))
        if isinstance(x, Unknown) and name not in ("chunk", "split", "unbind"):
            return self._unknown((args, options))
        if name in _ELEMENTWISE:
            return self._together(found)
        if name in _IMAGEWISE:
            return self._imagewise(name, x, option("output_size", 0) if name.startswith("adaptive") else None)
        if name in _REDUCTIONS or name in _REDUCTIONS_TO_PAIRS:
            dim = option("dim", 1 if name == "norm" else 0, options.get("axis"))
            keep = option("keepdim", 2 if name in ("norm", "std", "var") else 1, False)
            if isinstance(dim, (Plain, Image, Flat, Unknown)):  # the larger of two
                return self._together(found)
            reduced = self._reduced(x, dim, bool(keep))
            return reduced if name in _REDUCTIONS or dim is None else Several(reduced)
        if name == "flatten":
            return self._flatten(x, option("start_dim", 0, 0), option("end_dim", 1, -1))
        if name in ("view", "reshape"):
            shape = options.get("shape", options.get("size", rest[0] if len(rest) == 1 else rest))
            return self._view(x, _listed(shape))
        if name == "unflatten" and option("dim", 0) == 1:
            return self._view(x, [Number(), *option("sizes", 1)])
        if name in ("transpose", "swapaxes", "swapdims"):
            return self._transposed(x, option("dim0", 0), option("dim1", 1))
        if name == "permute":
            dims = options.get("dims", rest[0] if len(rest) == 1 else rest)
            return self._permuted(x, list(dims))
        if name == "unsqueeze":
            return self._unsqueezed(x, option("dim", 0))
        if name == "squeeze":
            return self._squeezed(x, option("dim", 0))
        if name == "expand" and isinstance(x, Image) and x.places == 1:
            return replace(x, places=None, claims=frozenset())
        if name == "pad" and isinstance(x, Image) and len(_listed(option("pad", 0))) <= 2 * x.axes:
            return replace(x, places=None)
        if name in ("chunk", "split"):
            return self._split(name, x, option("chunks" if name == "chunk" else "split_size", 0), option("dim", 1, 0))
        if name == "glu":
            return self._glu(x, option("dim", 0, -1))
        if name == "pixel_shuffle":
            return self._scaled(x, 1, option("upscale_factor", 0) ** 2)
        if name == "pixel_unshuffle":
            return self._scaled(x, option("downscale_factor", 0) ** 2, 1)
        raise _NotUnderstood

    def _functional_convolution(self, name: str, args: list[Any], options: dict[str, Any]) -> Any:
        x = options.get("input", args[0] if args else None)
        weight = options.get("weight", args[1] if len(args) > 1 else None)
        groups = options.get("groups", args[6] if len(args) > 6 else 1)
        if not isinstance(weight, Array):
            return Unknown(self.every | (x.channels if isinstance(x, Unknown) else frozenset()))
        count = weight.shape[1] * (groups if isinstance(groups, int) else 1) if "transpose" in name else weight.shape[0]
        self._image(name, x, weight.shape[0] if "transpose" in name else weight.shape[1])
        return Image(count, len(weight.shape) - 2)

    def _together(self, found: Sequence[Any]) -> Any:
        """Elementwise, of one or several."""
        arrays = [x for x in found if isinstance(x, Array)]
        found = [x.each if isinstance(x, Several) else x for x in found if not isinstance(x, (Number, Sizes, Array))]
        images = [x for x in found if isinstance(x, Image)]
        flats = [x for x in found if isinstance(x, Flat)]
        plains = [x for x in found if isinstance(x, Plain)]
        if not found:
            return Plain(None, frozenset(x.name for x in arrays)) if arrays else Number()
        if len(images) == len(found):
            sure = any(x.sure for x in images)
            if sure:
                images = [self._image("", x, None) for x in images]
            counts = {x.channels for x in images if x.channels != 1} or {1}
            if len(counts) > 1:
                return self._unknown(images)
            places = 1 if all(x.places == 1 for x in images) else None
            if len(images) == 1:
                places = images[0].places
            claims = frozenset().union(*(x.claims for x in images))
            return Image(counts.pop(), max(x.axes for x in images), places, sure, claims)
        if len(flats) == len(found) and not arrays:
            return flats[0] if len(set(flats)) == 1 else self._unknown(found)
        if len(set(flats)) == 1 and len(flats[0].pieces) == 1 and not arrays and all(x.writers for x in plains):
            if len(flats) + len(plains) == len(found):  # a dense layer's output in the order of what it is added to
                count = flats[0].pieces[0].channels
                self.flow.claims |= {Claim(writer, count, None) for x in plains for writer in x.writers}
                return flats[0]
        if len(plains) == len(found):
            sizes = {x.features for x in plains}
            writers = frozenset().union(*(x.writers for x in plains), {x.name for x in arrays})
            return Plain(sizes.pop() if len(sizes) == 1 else None, writers)
        return self._unknown(found)

    def _cat(self, parts: list[Any], dim: Any) -> Any:
        parts = [Plain(x.shape[-1], frozenset({x.name})) if isinstance(x, Array) else x for x in parts]
        images = [x for x in parts if isinstance(x, Image)]
        if len(images) == len(parts):
            axes = images[0].axes
            dim = dim % (axes + 2)
            sure = any(x.sure for x in images)
            if sure:
                images = [self._image("", x, None) for x in images]
            counts = [x.channels for x in images]
            if dim == 0 or None in counts:
                return self._unknown(images)
            claims = frozenset().union(*(x.claims for x in images))
            count = sum(n for n in counts if n) if dim == 1 else counts[0]
            places = images[0].places if dim == 1 and len({x.places for x in images}) == 1 else None
            return Image(count, axes, places, sure, claims)
        if any(isinstance(x, Flat) for x in parts) and all(isinstance(x, (Flat, Plain)) for x in parts):
            if dim not in (1, -1):
                return self._unknown(parts)
            pieces = [x.pieces if isinstance(x, Flat) else (Piece(None, x.features),) for x in parts]
            return Flat(tuple(piece for some in pieces for piece in some))
        if all(isinstance(x, Plain) for x in parts):
            sizes = [x.features for x in parts]
            whole = sum(sizes) if dim == -1 and None not in sizes else None
            return Plain(whole, frozenset().union(*(x.writers for x in parts)))
        raise _NotUnderstood

    def _flatten(self, x: Any, start: int, end: int) -> Any:
        if isinstance(x, Plain):
            return Plain(None, x.writers)
        if isinstance(x, Flat):
            return x if start in (1, -1) else self._unknown((x,))
        if not isinstance(x, Image):
            raise _NotUnderstood
        start, end = start % (x.axes + 2), end % (x.axes + 2)
        if end == x.axes + 1 and start >= 2:
            return replace(x, axes=x.axes - (end - start))
        if end == x.axes + 1 and start == 1:
            return self._flat(x)
        return self._lost(x)

    def _flat(self, x: Image) -> Any:
        if x.places == 1:
            return Plain(x.channels, frozenset(claim.layer for claim in x.claims))
        if x.sure and x.channels is not None:
            return Flat((Piece(x.channels, x.channels * x.places if x.places else None),))
        return Unknown(frozenset({x.channels}) if x.channels else self.every)

    def _lost(self, x: Image) -> Any:
        """Something else than an image: tokens, heads, if it never was one."""
        return self._unknown((x,)) if x.sure else Plain()

    def _view(self, x: Any, shape: Sequence[Any]) -> Any:
        if shape and isinstance(shape[0], Number) and shape[0].batch not in (None, self.batch):
            return self._unknown((x,))  # NOTE [batches]
        shape = [n.value if isinstance(n, Number) else n for n in shape]
        known = [n if isinstance(n, int) else None for n in shape]
        if len(known) < 2:
            return self._unknown((x,))
        count, space = known[1], known[2:]
        places = math.prod(n for n in space if n) if None not in space and -1 not in space else None
        if isinstance(x, Image) and (x.sure or (len(known) > 2 and x.channels is not None and count == x.channels)):
            if len(known) == 2:
                return self._flat(x)
            if x.channels is not None and count == x.channels:
                return replace(x, axes=len(space), places=places or x.places)
            return self._unknown((x,))
        if isinstance(x, Image):
            return self._flat(x) if len(known) == 2 and x.places == 1 else Plain(known[-1] if known[-1] != -1 else None)
        if isinstance(x, Flat):
            if len(known) == 2:
                return x
            same = len(x.pieces) == 1 and x.pieces[0].channels == count
            return Image(count, len(space), places) if same else self._unknown((x,))
        if not isinstance(x, Plain):
            raise _NotUnderstood
        if len(known) == 2:
            return replace(x, features=x.features if count in (None, -1) else count)
        if count == -1:
            count = x.features // places if x.features and places else None
        elif places is None and count and x.features and space.count(-1) == 1 and None not in space:
            places = x.features // count
        return Image(count, len(space), places, False, frozenset(Claim(w, count, places) for w in x.writers))

    def _transposed(self, x: Any, a: int, b: int) -> Any:
        if isinstance(x, Image):
            dims = list(range(x.axes + 2))
            dims[a], dims[b] = dims[b], dims[a]
            return self._permuted(x, dims)
        if isinstance(x, Plain):
            three = {a % 3, b % 3} == {1, 2} and min(a, b) > -3
            return Image(x.features, 1, None, False) if three else Plain(None, x.writers)
        raise _NotUnderstood

    def _permuted(self, x: Any, dims: list[Any]) -> Any:
        if not all(isinstance(n, int) for n in dims):
            raise _NotUnderstood
        dims = [n % len(dims) for n in dims]
        if isinstance(x, Image):
            if len(dims) != x.axes + 2:
                return self._lost(x)
            if not x.sure and len(dims) > 3 and dims == [0, len(dims) - 1, *range(1, len(dims) - 1)]:
                return Image(None, x.axes)  # channels come from last
            where = dims.index(1)
            if where == len(dims) - 1:
                return Plain(x.channels)
            return x if where == 1 and dims[0] == 0 else self._lost(x)
        if isinstance(x, Plain):
            if len(dims) > 2 and dims[0] == 0 and dims[1] == len(dims) - 1:
                return Image(x.features, len(dims) - 2, None, len(dims) > 3)
            return Plain(None, x.writers)
        raise _NotUnderstood

    def _unsqueezed(self, x: Any, dim: int) -> Any:
        if isinstance(x, Plain):
            if dim in (-1, 2):
                return Image(x.features, 1, 1, False, frozenset(Claim(w, x.features, 1) for w in x.writers))
            return Plain(x.features if dim in (0, 1) else None, x.writers)
        if isinstance(x, Image):
            dim = dim % (x.axes + 3)
            return replace(x, axes=x.axes + 1) if dim > 1 else self._lost(x)
        raise _NotUnderstood

    def _squeezed(self, x: Any, dim: Any) -> Any:
        if isinstance(x, Image):
            if dim is None:
                return Plain(x.channels) if x.places == 1 else self._lost(x)
            dims = {n % (x.axes + 2) for n in _listed(dim)}
            return self._without(x, dims)
        if isinstance(x, Plain):
            return Plain(None, x.writers)
        raise _NotUnderstood

    def _without(self, x: Image, dims: set[int]) -> Any:
        """Without some axes of the space, or without channels."""
        if 0 in dims:
            return self._lost(x)
        if 1 in dims:
            return Plain()
        axes = x.axes - len(dims)
        return replace(x, axes=axes) if axes else Plain(x.channels)

    def _reduced(self, x: Any, dim: Any, keep: bool) -> Any:
        if dim is None:
            return Number()
        if isinstance(x, Plain):
            return Plain(x.features if dim in (0, 1) and not keep else None, x.writers if keep else frozenset())
        if not isinstance(x, Image):
            raise _NotUnderstood
        if not all(isinstance(n, int) for n in _listed(dim)):
            return self._lost(x)
        dims = {n % (x.axes + 2) for n in _listed(dim)}
        if not keep:
            return self._without(x, dims)
        if 0 in dims:
            return self._lost(x)
        places = 1 if dims >= set(range(2, x.axes + 2)) else None
        return replace(x, channels=1 if 1 in dims else x.channels, places=places or (1 if x.places == 1 else None))

    def _split(self, name: str, x: Any, parts: Any, dim: int) -> Any:
        if isinstance(x, Plain):
            return Several(Plain(None, x.writers))
        if not isinstance(x, Image) or not isinstance(dim, int):
            return Several(self._unknown((x,)))
        dim = dim % (x.axes + 2)
        if dim > 1:
            return Several(replace(x, places=None))
        if dim == 0 or not isinstance(parts, int) or not x.channels:
            return Several(self._lost(x))
        equal = x.channels % parts == 0
        count = parts if name == "split" else x.channels // parts
        return Several(replace(x, channels=count) if equal and not x.claims else self._lost(x))

    def _glu(self, x: Any, dim: int) -> Any:
        if isinstance(x, Image):
            if dim % (x.axes + 2) > 1:
                return replace(x, places=None)
            return self._scaled(x, 1, 2)
        return Plain(None, x.writers) if isinstance(x, Plain) else self._unknown((x,))

    def _scaled(self, x: Any, up: int, down: int) -> Any:
        """Other channels."""
        if not isinstance(x, Image):
            return self._unknown((x,))
        x = self._image("", x, None)
        return replace(x, channels=x.channels * up // down if x.channels else None, places=None)

    def _getitem(self, x: Any, index: Any) -> Any:
        if isinstance(x, Several):
            return x.each
        if isinstance(x, Sizes):
            return _size_of(x, index) if isinstance(index, int) else Several(Number(None, x.batch))
        index = index if isinstance(index, tuple) else (index,)
        news = [n for n in index if n is None]
        if isinstance(x, Plain):
            full = [n for n in index if n == slice(None) or n is Ellipsis]
            if len(news) + len(full) == len(index) and news and index[-len(news) :] == (None,) * len(news):
                return Image(x.features, len(news), 1, False, frozenset(Claim(w, x.features, 1) for w in x.writers))
            return Plain(None, x.writers)
        if not isinstance(x, Image):
            raise _NotUnderstood
        if Ellipsis in index:
            n = index.index(Ellipsis)
            missing = x.axes + 2 - (len(index) - len(news) - 1)
            index = (*index[:n], *(slice(None),) * missing, *index[n + 1 :])
        if not index or not isinstance(index[0], slice):
            return self._lost(x)
        count, axes = x.channels, x.axes
        if len(index) > 1 and index[1] != slice(None):
            if isinstance(index[1], (int, Number)):
                return Plain()
            bounds = [index[1].start, index[1].stop, index[1].step] if isinstance(index[1], slice) else [Number()]
            if x.claims or count is None or not all(n is None or isinstance(n, int) for n in bounds):
                return self._lost(x)
            count = len(range(count)[index[1]])
        for n in index[2:]:
            if not (n is None or isinstance(n, (int, slice, Number))):
                return self._lost(x)
            axes += (n is None) - isinstance(n, (int, Number))
        if axes == 0:
            return Plain(count)
        return replace(x, channels=count, axes=axes, places=1 if x.places == 1 else None)


class _NotUnderstood(Exception):
    """A step that the table does not have."""


def _axes(module: Any) -> int:
    return len(module.kernel_size)


def _results(values: Any) -> Iterator[Any]:
    """What nodes gave, in nested arguments."""
    if isinstance(values, (list, tuple)) and not isinstance(values, Piece):
        for value in values:
            yield from _results(value)
    elif isinstance(values, dict):
        yield from _results(list(values.values()))
    elif isinstance(values, slice):
        yield from _results([values.start, values.stop, values.step])
    elif isinstance(values, Several):
        yield values.each
    elif isinstance(values, (Plain, Image, Flat, Unknown, Number, Sizes, Array)):
        yield values


def _size_of(sizes: Sizes, axis: int) -> Number:
    x = sizes.of
    if axis == 0:
        return Number(None, sizes.batch)
    if isinstance(x, Image) and axis == 1:
        return Number(x.channels)
    if isinstance(x, Plain) and axis == -1:
        return Number(x.features)
    return Number(x.shape[axis]) if isinstance(x, Array) else Number()


def _calculated(name: str, args: list[Any]) -> Number:
    """Of sizes."""
    known = {"mul": operator.mul, "floordiv": operator.floordiv, "add": operator.add, "sub": operator.sub}
    values = [x.value if isinstance(x, Number) else x for x in args]
    fine = name in known and all(isinstance(n, int) for n in values)
    return Number(known[name](*values)) if fine else Number()


def _listed(x: Any) -> list[Any]:
    return list(x) if isinstance(x, (list, tuple)) else [x]


def _output_size(module: Any) -> Any:
    return getattr(module, "output_size", None) if type(module).__name__.startswith("Adaptive") else None
