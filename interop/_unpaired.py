"""What could not be paired, said with the nearest candidates and a line to paste."""

from difflib import SequenceMatcher

from ._layers import Flax, Node, Torch, fits
from ._names import Path
from ._pairing import Pairing

_SHOWN = 50  # of each side, with their nearest candidates


def refuse_unpaired(pairing: Pairing) -> None:
    """Everything that has no partner, and everything that nothing tells apart."""
    text = []
    paste = "add to what you have renamed" if any(how == "rename" for *_, how in pairing.pairs) else "paste"
    for ours, pieces in pairing.lonely:
        theirs = _put_together(pieces)
        text.append(
            f"no partner for {len(ours)} of the PyTorch side and {len(theirs)} of the flax side (or one too many):"
        )
        text += [f"  PyTorch  {x}{_nearest(x, theirs)}{x.why_bare and f'; {x.why_bare}'}" for x in ours[:_SHOWN]]
        text += [f"  PyTorch  and {len(ours) - _SHOWN} more"] if len(ours) > _SHOWN else []
        text += [f"  flax     {y}{_nearest_torch(y, ours)}" for y in theirs[:_SHOWN]]
        text += [f"  flax     and {len(theirs) - _SHOWN} more"] if len(theirs) > _SHOWN else []
        if ours and all(any(_other_size(x, y) for y in theirs) for x in ours):
            text.append("the layers are the same but for their sizes: make one of the models as wide as the other")
        else:
            text.append(
                "rename={'name': 'partner'} pairs two of one shape, rename={'name': None} leaves one of PyTorch's out; "
                "a layer without a rule needs one (interop.rules.register)"
            )
    for ours, theirs, why in pairing.unclear:
        text.append(f"cannot tell which is which: {why}:")
        text.append(f"  PyTorch  {', '.join(_named(x) for x in ours)}")
        text.append(f"  flax     {', '.join(_named(y) for y in theirs)}")
        said = ", ".join(f"{_named(x)!r}: {_named(y)!r}" for x, y in zip(ours, theirs, strict=True))
        text.append(f"correct and {paste}: rename={{{said}}}")
    if text:
        raise ValueError("match: " + "\n".join(text))


def _put_together(items: list[Flax]) -> list[Flax]:
    """Bare leaves of one container as the layer that they could have been."""
    whole: dict[Path, Flax] = {}
    for item in items:
        place = item.path[:-1] if item.bare and len(item.path) > 1 else item.path
        one = whole.setdefault(place, Flax(place, {}, {}) if place != item.path else item)
        if one is not item:
            own = "".join(item.path[-1:])
            one.names[own], one.shapes[own] = item.names[""], item.shapes[""]
    return list(whole.values())


def _named(node: Node) -> str:
    return ".".join(node.path)


def _nearest(ours: Torch, theirs: list[Flax]) -> str:
    near = sorted(theirs, key=lambda y: (not why_not(ours, y), _distance(ours.path, y.path)))[:2]
    return f"; nearest: {' or '.join(f'{y}{why_not(ours, y)}' for y in near)}" if near else ""


def _nearest_torch(theirs: Flax, ours: list[Torch]) -> str:
    near = sorted(ours, key=lambda x: (not why_not(x, theirs), _distance(x.path, theirs.path)))[:2]
    return f"; nearest: {' or '.join(f'{x.name}{why_not(x, theirs)}' for x in near)}" if near else ""


def _distance(a: Path, b: Path) -> float:
    return -SequenceMatcher(None, ".".join(a).lower(), ".".join(b).lower()).ratio()


def why_not(ours: Torch, theirs: Flax) -> str:
    """What keeps two layers apart, if it is little."""
    if fits(ours, theirs):
        return " (fits)"
    wanted = [{"": ours.shape}] if ours.module is None else ours.forms
    for form in wanted:
        if ours.module is None and len(theirs.shapes) == 1:
            form = dict.fromkeys(theirs.shapes, ours.shape)
        missing, more = [n for n in form if n not in theirs.shapes], [n for n in theirs.shapes if n not in form]
        other = {n for n in form if n in theirs.shapes and form[n] != theirs.shapes[n]}
        if not other and not missing and not more:
            return f" (the same arrays, but a {theirs.kind})" if theirs.kind else ""
        if not other and len(form) > len(missing):
            text = [f"lacks {', '.join(missing)}"] if missing else []
            text += [f"has {', '.join(more)} besides"] if more else []
            hint = ": pass the batch statistics too, all of linen's variables or nnx.state(model)"
            hint = hint if "mean" in missing else ""
            return f" (flax {' and '.join(text)}{hint})"
        if (
            other
            and not missing
            and not more
            and all(form[n] == theirs.shapes[n][::-1] for n in other if len(form[n]) > 1)
            and all(sorted(form[n]) == sorted(theirs.shapes[n]) for n in other)
        ):
            return " (fits after a transpose)"
    sizes = _other_size(ours, theirs)
    return f" ({sizes})" if sizes else ""


def _other_size(ours: Torch, theirs: Flax) -> str:
    """Which sizes differ, where the arrays are the same but for these."""
    for form in ours.forms:
        same = form.keys() == theirs.shapes.keys() and all(len(form[n]) == len(theirs.shapes[n]) for n in form)
        sizes = {(a, b) for n in form if same for a, b in zip(form[n], theirs.shapes[n], strict=True) if a != b}
        if same and 0 < len(sizes) <= 2:
            return ", ".join(f"{a} here, {b} there" for a, b in sorted(sizes))
    return ""


def refuse_crossed(pairing: Pairing) -> None:
    """Nodes with the name of another one, from which their shapes keep them apart."""
    for ours, partner, namesake in pairing.crossed:
        text = f"{ours.item or _named(ours)} fits {partner.item or _named(partner)} by its arrays"
        raise ValueError(
            f"match: {text}, but has the name of {'.'.join(namesake)}; one of the models may be wrong; "
            f"rename={{{_named(ours)!r}: {_named(partner)!r}}} says that this is meant"
        )
