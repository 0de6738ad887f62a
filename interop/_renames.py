"""`rename=`: partners that the user names, of layers, of whole subtrees or of single arrays, with globs.

A `*` stands for one component or a part of it (`blocks.*.attn` -> `Block_*.attention`) and is copied to the other side.
What has no partner is named as in a selector (`.on`), where it also crosses dots.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from funcreg._selectors import matches, nearest

from ._names import Path


def resolve(
    rename: Mapping[str, str | None] | None, ours: Sequence[str], theirs: Iterable[str]
) -> dict[str, str | None]:
    """For each of our names that is renamed the name of its partner, or None for none.

    Args:
        rename: as given to `match`.
        ours: names of modules and arrays of the PyTorch side.
        theirs: names of subtrees and leaves of the flax side.

    Raises:
        TypeError: not a dict of strings.
        ValueError: a name that a side has not, a name renamed twice, or a glob whose stars do not fit.
    """
    if not isinstance(rename, Mapping | None):
        raise TypeError(f"match: rename must be a dict of PyTorch names and flax names, got {type(rename).__name__}")
    known = set(theirs)
    found: dict[str, str | None] = {}
    by: dict[str, str] = {}
    for key, value in (rename or {}).items():
        if not isinstance(key, str) or not isinstance(value, str | None):
            raise TypeError(f"match: rename must be a dict of strings (or None for no partner), got {key!r}: {value!r}")
        pattern = re.compile("([^.]*)".join(map(re.escape, key.split("*"))))
        if value is None:
            hits = [(name, ()) for name in ours if matches(key, name)]
        else:
            hits = [(name, m.groups()) for name in ours if (m := pattern.fullmatch(name))]
        if not hits:
            raise ValueError(f"match: rename: the PyTorch side has no {key!r}; nearest names: {nearest(key, ours)}")
        for name, stars in hits:
            if name in by and found[name] != value:
                raise ValueError(f"match: rename: {name!r} is renamed by {by[name]!r} and by {key!r}")
            by[name] = key
            found[name] = value if value is None else _partner(key, value, stars)
            if found[name] is not None and found[name] not in known:
                raise ValueError(
                    f"match: rename: {name!r} -> {found[name]!r}, which the flax side has not; nearest names: "
                    f"{nearest(str(found[name]), list(known))}"
                )
    partners = [partner for partner in found.values() if partner is not None]
    for partner in partners:
        if partners.count(partner) > 1:
            both = [name for name, value in found.items() if value == partner]
            raise ValueError(f"match: rename: {both[0]!r} and {both[1]!r} are both renamed to {partner!r}")
    return found


def _partner(key: str, value: str, stars: Sequence[str]) -> str:
    value = value.removeprefix("params.")
    if value.count("*") not in (0, len(stars)) or (stars and "*" not in value):
        raise ValueError(f"match: rename: {key!r} has {key.count('*')} stars and {value!r} {value.count('*')}")
    pieces = value.split("*")
    return pieces[0] + "".join(star + piece for star, piece in zip(stars, pieces[1:], strict=True))


def by_first_names(net: nn.Module, also: Iterable[tuple[Path, str]], renamed: Mapping[str, str]) -> dict[str, str]:
    """A module that PyTorch has under two names and flax under one, under its first.

    Args:
        net: the model.
        also: further paths to a leaf of the flax side.
        renamed: name -> partner.
    """
    modules = dict(net.named_modules(remove_duplicate=False))
    firsts = {module: name for name, module in reversed(modules.items())}
    again = {".".join(path[:n]) for path, _ in also for n in range(1, len(path) + 1)}
    found: dict[str, str] = {}
    for name, partner in renamed.items():
        first = firsts[modules[name]] if name in modules and partner not in again else name
        found[name if first in renamed else first] = partner
    return found
