"""`match`: the layers of a PyTorch model and those of a flax one, paired without a guess."""

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from . import _fit, _flatten, _flax, _layers, _options, _recurrent, _renames, rules
from ._flow import Flow, flow
from ._layers import Flax, Node, Torch
from ._pairing import Pairing
from ._refusals import checked
from ._table import Row
from ._unpaired import refuse_crossed, refuse_unpaired, why_not
from .arrays import outside_compilation
from .links import Link
from .pair import FlaxSide, Pair, TorchSide, form_of

_OWN_FILES = tuple(os.path.join(os.path.dirname(module), "") for module in (__file__, torch.__file__))


@outside_compilation
def match(
    net: nn.Module,
    flax: Any,
    rename: Mapping[str, str | None] | None = None,
    flatten: Mapping[str, _flatten.Given] | None = None,
    strict: bool = True,
) -> Pair:
    """Which arrays of a PyTorch model are which of a flax model, found once and used for everything that crosses.

    Layers with a rule (`interop.rules`) are paired with the subtrees of the flax side whose leaves have the names and
    shapes of their twins, and bare parameters and buffers of other modules with bare leaves of the same shape and
    layout. In this order:

    1. `rename`.
    2. Structure. Containers that hold equal layers are paired first, from the largest to the smallest, then what they
       hold, so that a layer is only compared with those of its own block.
    3. Among several that fit, names: equal ones (`blocks.0`, `blocks_0`, `blocks0`), and abbreviations that leave no
       choice (`q`, `query`). Numbers count as order, not as names: `fc1, fc2` are `Dense_0, Dense_1`.
    4. The order: the k-th goes to the k-th. PyTorch's is that of definition. Flax's is that of definition in nnx, of
       the numbers of one name (`Dense_2` before `Dense_10`), and of the keys of a dict that is not sorted: linen puts
       them in the order of calls, and JAX sorts them in every transformation. A name that speaks against it refuses it.
       Where JAX has sorted them, linen's numbers are all there is, and a warning says so.
    5. A shape that only one layer of each side has.

    What then has no partner, or more than one, raises: nothing is guessed, and there is no partial pair. The order of
    definition is trusted where names say nothing, unless a trace of the model shows that PyTorch calls the layers in
    another one; flax's may still come in another: `print(pair)` shows the evidence.

    A dense layer behind a flatten of an image reads it in another order in flax, where channels are last: its rows are
    permuted, and so are the columns of one whose output is viewed as an image; the table shows it. What reads and
    writes images is seen in a symbolic trace of the model (`torch.fx`: its `forward` runs once or twice on a copy,
    without values). Where a step of it is not known, or cannot be traced, `flatten` is asked for.

    Args:
        net: the PyTorch model, with its values.
        flax: an nnx module or its `nnx.State`; linen variables, or only their parameters; a linen module with variables
            (`module.bind(variables)`). Leaves may be abstract (`jax.eval_shape`).
        rename: name of a PyTorch layer, module or array, or a glob, -> the name on the flax side, or None: this has no
            partner and stays as it was. A `*` stands for one component or a part of one and is copied:
            `{"encoder": "Encoder_0", "blocks.*.attn.q": "blocks_*.attention.query"}`; names for None are globs as in
            `.on`: `{"aux": None, "*.mask": None}`.
        flatten: name or glob of a dense layer, or of a norm beside it, -> the channels of the image that was flattened
            in front of it, or None: its rows stay as they are. A tuple is for rows and columns: `{"fc": (None, 64)}`
            for a dense layer whose output is made an image of 64 channels. A list is for pieces side by side, each
            (channels, size): `{"fc": [(4, 64), (None, 8)]}` for an image of 4 channels and 8 other features. Also the
            name of a norm over several axes of one size -> their number if they are those of an image, channels first.
        strict: whether options that make two layers compute different functions although their arrays fit, such as the
            epsilon of a norm, are an error. They are seen only where the flax modules are: in nnx, and in what `setup`
            of a bound linen module defines; of other layers `pair.notes` says that they are not compared. If not
            strict, they are among `pair.notes`, as is always what flax has no option for (its batch norm keeps the
            biased variance) and what is only rounding (`use_fast_variance`).

    Returns:
        The pair.

    Raises:
        ValueError: layers without partner, with their nearest candidates; layers that nothing tells apart, with a
            `rename` to paste; a flatten in doubt; layers that differ in their options.
        TypeError: not a model; leaves that hold no values (meta, lazy, fake) or are traced; an unbound linen module.

    Example:
        >>> import jax, torch
        >>> from flax import nnx
        >>> from funcreg import interop
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), jax.nn.relu, nnx.Linear(4, 2, rngs=nnx.Rngs(1)))
        >>> pair = interop.match(net, model)
        >>> nnx.update(model, pair.to_jax(net))
        >>> print(pair)
        PyTorch   shape  flax             shape  by     how
        ----------------------------------------------------------
        0.weight  4x3    layers.0.kernel  3x4    shape  transposed
        0.bias    4      layers.0.bias    4      shape  as it is
        2.weight  2x4    layers.2.kernel  4x2    shape  transposed
        2.bias    2      layers.2.bias    2      shape  as it is
    """
    where = "match"
    if not isinstance(net, nn.Module):
        kind = f"{type(net).__module__}.{type(net).__name__}"
        raise TypeError(f"{where}: net must be an nn.Module, got {kind}{_hint(net, flax)}")
    if isinstance(net, AveragedModel):
        raise TypeError(
            f"{where}: net is an AveragedModel, whose n_averaged has no twin; pass the average itself, net.module: "
            "match(averaged.module, ...)"
        )
    if isinstance(net, torch.jit.ScriptModule):
        raise TypeError(
            f"{where}: net is a {type(net).__name__} of TorchScript, whose layers have no class; pass the model"
        )
    for name, value in (("rename", rename), ("flatten", flatten)):
        if value is not None and not isinstance(value, Mapping):
            raise TypeError(f"{where}: {name} must be a dict by names of the PyTorch side, got {value!r}")
    state = net.state_dict(keep_vars=True)
    for name, x in state.items():
        if isinstance(x, Tensor):
            checked(where, f"the leaf {name!r} of the PyTorch side", x)
    return _Match(net, state, _flax.read(where, flax), rename, flatten or {}).pair(strict)


def _hint(net: Any, flax: Any) -> str:
    """What is nearly right, and how it is said rightly."""
    if isinstance(net, type) and issubclass(net, nn.Module):
        return f": the class {net.__name__}; pass an instance"
    if isinstance(flax, nn.Module):
        return "; are the arguments swapped? The PyTorch model is the first"
    if isinstance(net, Mapping) and any(isinstance(x, Tensor) for x in net.values()):
        return "; a state dict does not tell which layers its arrays are of: pass the model itself"
    return ""


class _Match:
    """The steps of `match`, and what they know."""

    def __init__(
        self,
        net: nn.Module,
        state: Mapping[str, Any],
        side: _flax.Side,
        rename: Mapping[str, str | None] | None,
        flatten: Mapping[str, _flatten.Given],
    ) -> None:
        self.net, self.state, self.side, self.flatten = net, state, side, flatten
        self.over: dict[str, int] = {}  # bare arrays that meet images, and their axes in space
        by_id: dict[int, str] = {}
        for name, parameter in net.named_parameters():
            by_id[id(parameter)] = name
        self.first = {name: by_id.setdefault(id(x), name) for name, x in state.items()}
        modules = [name for name, _ in net.named_modules(remove_duplicate=False) if name]
        paths = [leaf.path for leaf in side.leaves.values()] + [path for path, _ in side.also]
        subtrees = {".".join(path[:n]) for path in paths for n in range(1, len(path) + 1)}
        renamed = _renames.resolve(rename, [*modules, *state], [*subtrees, *side.leaves])
        out = [name for name, partner in renamed.items() if partner is None]
        self.left_out = {name for name in state if any(name == o or name.startswith(f"{o}.") for o in out)} | {
            name for name, x in state.items() if not isinstance(x, Tensor)
        }
        kept = {name: partner for name, partner in renamed.items() if partner is not None}
        self.renamed = _renames.by_first_names(net, side.also, kept)

    def pair(self, strict: bool) -> Pair:
        ours, keys = _layers.torch_nodes(self.net, self.state, self.first, self.left_out)
        theirs = _layers.flax_nodes(self.side, [item for item in ours.items() if item.module is not None])
        steps = flow(self.net)
        pairing = Pairing(keys, self.side.keys, self.side.calls, steps.calls)
        everything = list(ours.items())
        regions = self._named_regions(ours, theirs)
        for node, partner in sorted(regions, key=lambda region: -len(region[0].path)):
            if node.item is not None and partner.item is not None:
                self._name(pairing, node.item, partner.item)
            else:
                pairing.solve([node], [partner])
        pairing.solve([ours], [theirs])
        refuse_unpaired(pairing)
        refuse_crossed(pairing)
        return self._result(pairing, everything, strict, steps)

    # --- rename ---

    def _named_regions(self, ours: Node, theirs: Node) -> list[tuple[Node, Node]]:
        """The nodes that `rename` pairs, taken out of their trees."""
        regions = []
        arrays: dict[Torch, dict[str, str]] = {}
        for name, partner in sorted(self.renamed.items(), key=lambda item: -item[0].count(".")):
            path = tuple(name.split("."))
            node = _find(ours, lambda n, path=path: n.path[: len(path)] == path)
            if node is not None:
                regions.append((_taken(ours, node), self._taken_partner(theirs, partner)))
                continue
            node = _find(ours, lambda n, name=name: n.item is not None and name in n.item.names)
            if node is None:
                raise ValueError(f"match: rename: {name!r} is part of what another entry renames, or left out")
            arrays.setdefault(node.item, {})[name] = partner
        for item, named in arrays.items():
            node = _find(ours, lambda n, item=item: n.item is item)
            if node is None:
                raise ValueError(f"match: rename: {', '.join(named)}: another entry renames the whole layer; drop one")
            regions.append((_taken(ours, node), self._layer_of(theirs, item, named)))
        return regions

    def _layer_of(self, theirs: Node, item: Torch, named: Mapping[str, str]) -> Node:
        """The layer that holds the leaves which `rename` gives to arrays of a layer, or one put together from them."""
        layers = {self._flax_node(theirs, partner) for partner in named.values()}
        node = next(iter(layers))
        if len(layers) > 1 or node is None or node.item.bare:
            made = self._made_of(item, named)
            for partner in named.values():
                self._taken_partner(theirs, partner)
            return Node((), item=made)
        if _layers.fits(item, node.item):
            links = rules.links_of(item.module, node.item.shapes, self.side.twin(node.path))
            for name, partner in named.items():
                if not any(
                    name.removeprefix(item.prefix) in x.torch and partner in map(node.item.names.get, x.jax)
                    for x in links
                ):
                    raise ValueError(
                        f"match: rename: {name} and {partner} are not the same array of {item.name} and "
                        f"{node.item.name}"
                    )
        return _taken(theirs, node)

    def _taken_partner(self, theirs: Node, partner: str) -> Node:
        node = self._flax_node(theirs, partner)
        if node is None:
            raise ValueError(f"match: rename: {partner!r} is part of what another entry renames")
        if partner in self.side.leaves and node.item is not None and len(node.item.names) > 1:
            raise ValueError(f"match: rename: {partner!r} is part of the layer {node.item}; name the layer")
        return _taken(theirs, node)

    def _flax_node(self, theirs: Node, partner: str) -> Node | None:
        path = self.side.leaves[partner].path if partner in self.side.leaves else tuple(partner.split("."))
        node = _find(theirs, lambda n: n.path[: len(path)] == path)
        return node or _find(theirs, lambda n: n.item is not None and partner in n.item.names.values())

    def _made_of(self, item: Torch, named: Mapping[str, str]) -> Flax:
        """A flax layer put together from leaves that lie anywhere."""
        for form in item.forms:
            links = rules.links_of(item.module, form, None)
            relative = {item.prefix + link.torch[0]: link.jax[0] for link in links if len(link.torch + link.jax) == 2}
            names = {relative[ours]: theirs for ours, theirs in named.items() if ours in relative}
            shapes = {name: self.side.leaves[theirs].shape for name, theirs in names.items()}
            if shapes == form:
                return Flax((), names, shapes)
        given = ", ".join(f"{ours} -> {theirs} {self.side.leaves[theirs].shape}" for ours, theirs in named.items())
        raise ValueError(f"match: rename: {given}: these are not the arrays that {item} has in flax")

    @staticmethod
    def _name(pairing: Pairing, ours: Torch, theirs: Flax) -> None:
        if not _layers.fits(ours, theirs):
            raise ValueError(f"match: rename: {ours} cannot be {theirs}{why_not(ours, theirs)}")
        pairing.pairs.append((ours, theirs, "rename"))

    # --- the result ---

    def _result(self, pairing: Pairing, everything: list[Torch], strict: bool, steps: Flow) -> Pair:
        position = {item: n for n, item in enumerate(everything)}
        pairs = sorted(pairing.pairs, key=lambda found: position[found[0]])
        self.over = dict(steps.over)
        behind, remarks = _flatten.channels(self.net, everything, self.flatten, steps)
        rows: list[Row] = []
        said = _Said()
        fed: dict[str, tuple[str, ...]] = {}
        seen: set[tuple[tuple[str, ...], tuple[str, ...]]] = set()
        for ours, theirs, by in pairs:
            for link, also in self._links(ours, theirs, by, behind, said):
                first = tuple(self.first[name] for name in link.torch)
                link = replace(link, torch=first)
                if (first, link.jax) in seen:  # tied on both sides
                    continue
                seen.add((first, link.jax))
                for name in link.jax:
                    if name in fed:
                        raise ValueError(
                            f"match: the flax side shares {name!r} where the PyTorch side has {', '.join(fed[name])} "
                            f"and {', '.join(first)}; tie them in PyTorch too (b.weight = a.weight), or do not share"
                        )
                    fed[name] = first
                rows.append(self._row(link, by, also))
        self._check_complete(everything, pairs, rows)
        notes = remarks + [
            f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {text}"
            for text, names in said.remarks.items()
        ]
        if said.unseen:
            more = f" and {len(said.unseen) - 1} more" if len(said.unseen) > 1 else ""
            notes.append(
                f"{said.unseen[0]}{more}: options (epsilon, momentum, padding, strides, ...) are not compared: flax "
                "shows them in an nnx module, or in a bound linen module with setup"
            )
        if pairing.counted:
            notes.append(
                f"{', '.join(pairing.counted)}: paired by linen's numbers, which count constructions: in "
                "Dense(2)(relu(Dense(2)(x))) the outer layer is Dense_0. Variables of `init` without jit have the "
                "order of calls: match with these, and move the others with the pair"
            )
            warnings.warn(f"match: {notes[-1]}", stacklevel=_callers_level())
        hooked = [
            name for name, module in self.net.named_modules() if module._forward_hooks or module._forward_pre_hooks
        ]
        if hooked:
            more = f" and {len(hooked) - 1} more" if len(hooked) > 1 else ""
            notes.append(f"{hooked[0] or 'the model'}{more}: forward hooks stay behind, and what they change with them")
        summed = [row.link.torch for row in rows if row.link.sums]
        if summed:
            more = f" and {len(summed) - 1} more such sums" if len(summed) > 1 else ""
            notes.append(
                f"{' + '.join(summed[0])}{more}: flax has their sum; values cross, but not the gradients, optimizer "
                "state and penalties of each"
            )
        self._note_ties(rows, notes)
        self._note_dtypes(rows, notes)
        self._note_left_out(rows, notes)
        if said.differences and strict:
            raise ValueError(
                "match: the arrays fit, but these layers compute different functions (strict=False only notes it):\n  "
                + "\n  ".join(said.differences)
            )
        parameters = tuple(name for name, _ in self.net.named_parameters())
        forms = {name: form_of(x) for name, x in self.state.items() if isinstance(x, Tensor)}
        leaves = self.side.leaves
        return Pair(
            tuple(row.link for row in rows),
            parameters,
            (*notes, *said.differences),
            self.net,
            TorchSide(forms, self.first, frozenset(parameters)),
            FlaxSide(
                {name: form_of(leaf.value) for name, leaf in leaves.items()},
                frozenset(name for name, leaf in leaves.items() if leaf.trained),
                self.side.build,
                self.side.build_params,
            ),
            tuple(rows),
            tuple(layer for ours, theirs, _ in pairs if (layer := _layer_names(ours, theirs)) is not None),
        )

    def _links(
        self,
        ours: Torch,
        theirs: Flax,
        by: str,
        behind: Mapping[str, _flatten.Channels],
        said: "_Said",
    ) -> Iterable[tuple[Link, str]]:
        """The links of a pair of layers by whole names, each with what the table has to say besides."""
        if ours.module is None:
            (name,) = ours.names
            order = "its axes in flax's order" if _could_be_moved(ours.shape) else ""
            if name in self.over and _could_be_of_channels(ours.shape, self.over[name]):
                order = "the channels last, of the image that it meets"
            if by != "rename" and order:
                raise ValueError(
                    f"match: the bare array {name!r} has a shape, {ours.shape}, that it would also have with {order}; "
                    f"rename={{{name!r}: {theirs.name!r}}} says that it lies as in PyTorch, a rule "
                    "(interop.rules.register) says anything else"
                )
            yield Link((name,), tuple(theirs.names.values()), _same, _same), ""
            return
        twin = self.side.twin(theirs.path)
        beside = behind.get(ours.name, _flatten.Channels(None))
        of_image = beside.rows is not None if _flatten.is_cube(ours.module) else None
        try:
            links = rules.links_of(ours.module, theirs.shapes, twin, of_image)
        except rules.Mismatch as error:
            raise ValueError(f"match: {ours} and {theirs}: {error}") from error
        about = f"{ours.name or 'the model'} / {theirs.name or 'the model'}"
        for link in links:
            if link.note:
                said.remarks.setdefault(link.note, []).append(about)
        if twin is None:
            for text in rules.always(ours.module):
                said.remarks.setdefault(text, []).append(about)
            said.unseen += [ours.name or "the model"] if rules.has_options(ours.module) else []
        else:
            remarks = _remarks(ours.module, twin)
            for text in rules.differences(ours.module, twin, self.side.twin(theirs.path[:-1]) if theirs.path else None):
                if text in remarks:
                    said.remarks.setdefault(text, []).append(about)
                else:
                    said.differences.append(f"{about}: {text}")
        for n, link in enumerate(links):
            also = link.note or (_recurrent.place_note(ours.module, theirs.name) if n == 0 else "")
            if of_image is None and beside != _flatten.Channels(None):
                link, also = _permuted(ours, theirs, link, beside)
            ours_names = tuple(ours.prefix + name for name in link.torch)
            yield replace(link, torch=ours_names, jax=tuple(theirs.names[name] for name in link.jax)), also

    def _row(self, link: Link, by: str, also: str) -> Row:
        ours = tuple(tuple(self.state[name].shape) for name in link.torch)
        return Row(link, ours, tuple(self.side.leaves[name].shape for name in link.jax), by, also)

    def _check_complete(self, everything: list[Torch], pairs: list[tuple[Torch, Flax, str]], rows: list[Row]) -> None:
        """Whatever else may be wrong: no partial pair."""
        paired = {ours for ours, _, _ in pairs}
        fed = {name for row in rows for name in row.link.jax}
        lost = [item.name for item in everything if item not in paired and not item.repeats]
        lost += [name for name in self.side.leaves if name not in fed]
        if lost:
            raise ValueError(f"match: {', '.join(lost)} have no partner; name it with rename")

    def _note_ties(self, rows: list[Row], notes: list[str]) -> None:
        names: dict[str, list[str]] = {}
        for name, first in self.first.items():
            names.setdefault(first, []).append(name)
        links: dict[str, list[Link]] = {}
        for row in rows:
            for name in row.link.torch:
                links.setdefault(name, []).append(row.link)
        for name, found in links.items():
            leaves = [leaf for link in found for leaf in link.jax]
            if len(found) > 1:
                notes.append(
                    f"{' = '.join(names[name])} are tied in PyTorch but not in flax: {' and '.join(leaves)} get the "
                    "same values; gradients and optimizer state do not cross"
                )
            elif len(names[name]) > 1:
                notes.append(f"{' = '.join(names[name])} are tied, and are one in flax: {', '.join(leaves)}")

    def _note_dtypes(self, rows: list[Row], notes: list[str]) -> None:
        found: dict[tuple[str, str], list[str]] = {}
        for row in rows:
            ours = str(form_of(self.state[row.link.torch[0]]).dtype)
            theirs = str(form_of(self.side.leaves[row.link.jax[0]].value).dtype)
            if ours != theirs:
                found.setdefault((ours, theirs), []).append(row.link.torch[0])
        for (ours, theirs), names in found.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            notes.append(f"{names[0]}{more}: {ours} in PyTorch, {theirs} in flax; values keep their own")

    def _note_left_out(self, rows: list[Row], notes: list[str]) -> None:
        linked = {name for row in rows for name in row.link.torch}
        told = [
            name
            for name, first in self.first.items()
            if name == first and name not in linked and not _layers.is_count(name)
        ]
        if told:
            notes.append(f"left out: {', '.join(told)}; to_torch gives them as they are in the model")


def _permuted(ours: Torch, theirs: Flax, link: Link, beside: _flatten.Channels) -> tuple[Link, str]:
    """The link of a layer beside a flatten, and what the table says of it."""
    (name,) = link.jax
    shape: Any = theirs.shapes[name]
    dense = isinstance(ours.module, nn.Linear)
    rows = beside.rows if not dense or name == "kernel" else None
    columns = beside.columns if dense else None
    if rows is None and columns is None:
        return link, link.note
    if len(shape) > 2:
        raise ValueError(
            f"match: {name} {shape} of {theirs.name} has its rows or columns on several axes, so that it "
            f"cannot follow a flatten; flatten={{{ours.name!r}: None}} leaves them as they are"
        )
    said = ["transposed"] if len(shape) == 2 else []
    for what, count, size in (("rows" if dense else "entries", rows, shape[0]), ("columns", columns, shape[-1])):
        if count is not None:
            said.append(f"{what} permuted ({_flatten.says(count, size)})")
    return _flatten.permuted(link, _flatten.Channels(rows, columns)), ", ".join(said)


@dataclass
class _Said:
    """What rules say of the options of twins.

    Faults one by one, remarks with the layers that they are about, and the layers of which flax shows no options.
    """

    differences: list[str] = field(default_factory=list)
    remarks: dict[str, list[str]] = field(default_factory=dict)
    unseen: list[str] = field(default_factory=list)


def _callers_level() -> int:
    """The `stacklevel` of who calls `match`; `outside_compilation` may put calls of PyTorch between."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OWN_FILES):
        frame, level = frame.f_back, level + 1
    return level


def _remarks(module: Any, twin: Any) -> set[str]:
    """What is no other function, or has no option on the flax side: what differs in all such pairs, and rounding."""
    rule = rules.rule_of(module)
    if not _fit.is_twin(rule.twins, twin):
        return set()
    layers = _options._with_cells(twin)
    remarks = {text for layer in layers for text in rule.options(module, layer) if isinstance(text, str)}
    return remarks | {text for text in rules.differences(module, twin) if ".use_fast_variance is" in text}


def _layer_names(ours: Torch, theirs: Flax) -> tuple[str, str] | None:
    """The names of twins that are called: no bare arrays, and no leaves that lie anywhere."""
    gathered = not theirs.path and any(whole not in (x, f"batch_stats.{x}") for x, whole in theirs.names.items())
    if ours.module is None or gathered:
        return None
    return ".".join(ours.path[:-1] if isinstance(ours.module, _recurrent.Cell) else ours.path), theirs.name


def _could_be_moved(shape: tuple[int, ...]) -> bool:
    """Whether a matrix or a convolution's kernel of this shape would look the same with flax's order of axes."""
    order = {2: (1, 0), 3: (2, 1, 0), 4: (2, 3, 1, 0), 5: (2, 3, 4, 1, 0)}.get(len(shape))
    return order is not None and max(shape) > 1 and tuple(shape[i] for i in order) == shape


def _could_be_of_channels(shape: tuple[int, ...], axes: int) -> bool:
    """Whether an array beside an image (n, channels, *space) would look the same with the channels last."""
    rest = shape[-axes - 1 :]
    return len(rest) == axes + 1 and len(set(rest)) == 1 and rest[0] > 1


def _same(x: Any) -> tuple[Any]:
    return (x,)


# --- trees of nodes ---


def _find(node: Node, wanted: Callable[[Node], bool]) -> Node | None:
    """The first node from the top."""
    if wanted(node):
        return node
    return next((found for child in node.children if (found := _find(child, wanted)) is not None), None)


def _taken(root: Node, node: Node) -> Node:
    """A node, which is no longer part of its tree."""
    taken = Node(node.path, node.children, node.item)
    _detach(root, node)
    return taken


def _detach(root: Node, node: Node) -> None:
    if root is node:  # the whole model
        root.children, root.item = [], None
    elif node in root.children:
        root.children.remove(node)
    else:
        for child in root.children:
            _detach(child, node)
