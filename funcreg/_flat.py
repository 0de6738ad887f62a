"""Any tree of arrays as a flat dict of names and back: what safetensors writes."""

from collections.abc import Mapping
from typing import Any


def to_flat(wing: Any, tree: Any) -> dict[str, Any]:
    paths, leaves, _ = wing.paths_and_leaves(tree)
    _check_names("to_flat", [".".join(path) for path in paths])
    flat: dict[str, Any] = {}
    for path, leaf in zip(paths, leaves, strict=True):
        name = ".".join(path)
        if leaf is None:
            continue
        if not wing.is_array(leaf):
            raise TypeError(f"to_flat: the leaf {name!r} must be an array, got {type(leaf).__name__}")
        flat[name] = wing.stored(leaf)
    return flat


def from_flat(wing: Any, like: Any, flat: Mapping[str, Any]) -> Any:
    paths, leaves, unflatten = wing.paths_and_leaves(like)
    names = [".".join(path) for path in paths]
    for name, leaf in zip(names, leaves, strict=True):
        if leaf is not None and not wing.is_array(leaf):
            raise TypeError(f"from_flat: the leaf {name!r} of `like` must be an array, got {type(leaf).__name__}")
    _check_names("from_flat", names)
    wanted = {name for name, leaf in zip(names, leaves, strict=True) if leaf is not None}
    if wanted != set(flat):
        missing = sorted(wanted - set(flat))
        text = (
            f"is missing {missing[0]!r}" if missing else f"has {sorted(set(flat) - wanted)[0]!r}, which `like` has not"
        )
        raise ValueError(f"from_flat: flat {text}; `like` must be a state of the same transformation and parameters")
    new = []
    for name, leaf in zip(names, leaves, strict=True):
        if leaf is not None:
            have, want = form(flat[name]), form(leaf)
            if have != want:
                raise ValueError(f"from_flat: the leaf {name!r} must be {want}, got {have}")
            leaf = wing.like_array(name, flat[name], leaf)
        new.append(leaf)
    return unflatten(new)


def form(x: Any) -> str:
    # before any conversion: JAX without x64 would narrow float64 silently
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}" if hasattr(x, "dtype") else repr(x)


def forms(wing: Any, tree: Any) -> dict[str, str]:
    """Dotted path -> dtype and shape."""
    paths, leaves, _ = wing.paths_and_leaves(tree)
    return {".".join(path): form(leaf) for path, leaf in zip(paths, leaves, strict=True)}


def _check_names(where: str, names: list[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{where}: two leaves have the name {name!r}; rename one of them")
        seen.add(name)
