"""Which leaves a penalty acts on: dotted leaf names matched by globs, roles, functions or trees of bools.

Plain Python on plain strings, so that `torch.compile(fullgraph=True)` can trace it (it cannot trace `fnmatch`).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


def weights(name: str, leaf: Any) -> bool:
    """Role: matrices and kernels, that is every leaf with two or more axes."""
    del name
    return leaf.ndim >= 2


def biases(name: str, leaf: Any) -> bool:
    """Role: every leaf whose own name is `bias`."""
    del leaf
    return name.split(".")[-1] == "bias"


def norms(name: str, leaf: Any) -> bool:
    """Role: gains and offsets of normalization layers, told by their names and axes.

    A leaf with at most one axis that is called `scale` (flax) or `weight` (torch: matrices have two axes, gains one),
    or a `bias` whose layer is named as normalization layers are: a name with `norm` in it, or `bn` or `ln` with or
    without a number (`bn1`, `ln_2`, `LayerNorm_0`). In an `nn.Sequential` a normalization layer is called by its
    number, so that its bias cannot be told from others: select it by its own name.
    """
    *layers, own = name.split(".")
    layer = layers[-1].lower() if layers else ""
    named = "norm" in layer or layer.rstrip("0123456789").rstrip("_") in ("bn", "ln")
    return leaf.ndim <= 1 and (own in ("scale", "weight") or (own == "bias" and named))


def leaf_name(path: Sequence[str]) -> str:
    """The dotted name of a leaf from the components of its path; a leading `params` collection is dropped."""
    return ".".join(path[1:] if len(path) > 1 and path[0] == "params" else path)


def _tokens(glob: str) -> list[str]:
    """`a[bc]*` -> ["a", "[bc", "*"]; a bracket that is never closed stands for itself."""
    tokens = []
    i = 0
    while i < len(glob):
        # the first character of a set may be a closing bracket: []a], [!]a]
        close = glob.find("]", i + 2 + (glob[i + 1 : i + 2] == "!")) if glob[i] == "[" else -1
        if close > 0:
            tokens.append(glob[i:close])
            i = close + 1
        else:
            tokens.append("[[" if glob[i] == "[" else glob[i])
            i += 1
    return tokens


def _accepts(token: str, char: str) -> bool:
    if token[0] != "[":
        return token == "?" or token == char
    negated = token[1] == "!"
    chars = token[2:] if negated else token[1:]
    found = False
    i = 0
    while i < len(chars):
        if i + 2 < len(chars) and chars[i + 1] == "-":
            found = found or chars[i] <= char <= chars[i + 2]
            i += 3
        else:
            found = found or chars[i] == char
            i += 1
    return found != negated


def glob_match(glob: str, text: str) -> bool:
    """Shell-style match of the whole text, case-sensitive; `*` also crosses dots. Greedy, back to the last star."""
    tokens = _tokens(glob)
    t, c, star, mark = 0, 0, -1, 0
    while c < len(text):
        if t < len(tokens) and tokens[t] == "*":
            star, mark = t, c
            t += 1
        elif t < len(tokens) and _accepts(tokens[t], text[c]):
            t += 1
            c += 1
        elif star >= 0:
            mark += 1
            t, c = star + 1, mark
        else:
            return False
    while t < len(tokens) and tokens[t] == "*":
        t += 1
    return t == len(tokens)


def _leading(name: str) -> list[str]:
    """`a.b.c` -> ["a", "a.b", "a.b.c"]: the name and every whole leading part of it."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def matches(glob: str, name: str) -> bool:
    """Whether a glob selects a leaf: by its name or a leading part of it; `*.weight` also matches a bare `weight`."""
    if any(glob_match(glob, part) for part in _leading(name)):
        return True
    return glob.startswith("*.") and any(glob_match(glob[2:], part) for part in _leading(name))


def check_glob(glob: Any, where: str) -> None:
    """Refuse what is not a glob."""
    if not isinstance(glob, str) or glob.removeprefix("!") == "":
        raise TypeError(f"{where}: a glob must be a non-empty string such as '*.weight' or '!*.bias', got {glob!r}")


def nearest(name: str, names: Sequence[str]) -> str:
    """The names that a wrong one may have meant."""
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.3) or list(names[:5])
    return ", ".join(near) or "(no leaves)"


def check_found(glob: str, names: Sequence[str], where: str, passed_over: Sequence[tuple[str, Any]] = ()) -> None:
    """Refuse a glob that matches no leaf: a typo would silently leave the weights unpenalized.

    `passed_over`, the leaves that no penalty acts on, tell one that exists from a typo.
    """
    if not any(matches(glob.removeprefix("!"), name) for name in names):
        for name, leaf in passed_over:
            if matches(glob.removeprefix("!"), name):
                dtype = str(getattr(leaf, "dtype", type(leaf).__name__)).removeprefix("torch.")
                what = "no parameter" if "float" in dtype or "complex" in dtype else dtype
                raise ValueError(
                    f"{where}: the glob {glob!r} matches no leaf that a penalty acts on: the leaf {name!r} exists but "
                    f"is {what}, which penalties pass over"
                )
        near = nearest(glob.removeprefix("!"), names)
        raise ValueError(f"{where}: the glob {glob!r} matches no leaf; nearest names: {near}")


@dataclass(frozen=True)
class Selector:
    """One `.on(...)`: globs, a function of (name, leaf), a tree of bools as (name, bool) pairs, or row `row` of a
    `layerwise` table with the globs `rows`. Static and hashable, so that equal penalties share one compiled program."""

    globs: tuple[str, ...] = ()
    function: Callable[[str, Any], Any] | None = None
    flags: tuple[tuple[str, bool], ...] = ()
    rows: tuple[str, ...] = ()
    row: int = 0

    def __repr__(self) -> str:
        if self.globs:
            return repr(self.globs[0]) if len(self.globs) == 1 else repr(list(self.globs))
        if self.function is not None:
            return getattr(self.function, "__name__", repr(self.function))
        return repr(self.rows[self.row]) if self.rows else repr(dict(self.flags))

    def select(
        self, names: Sequence[str], leaves: Sequence[Any], where: str, passed_over: Sequence[tuple[str, Any]] = ()
    ) -> list[bool]:
        """For every leaf whether it is selected. Raises ValueError for a glob that matches nothing."""
        for glob in self.globs + self.rows:
            check_found(glob, names, where, passed_over)
        if self.globs:
            return [self._by_glob(name) for name in names]
        if self.rows:
            return [row == self.row for row in self._winning_rows(names, where)]
        if self.function is not None:
            return [
                self._by_function(self.function, name, leaf, where) for name, leaf in zip(names, leaves, strict=True)
            ]
        flags = dict(self.flags)
        leading = {part for name in names for part in _leading(name)}
        if "params" in flags and "params" not in leading:  # a whole collection; its siblings are passed over
            flags = {"": flags["params"]}
        for flagged in flags:
            if flagged and flagged not in leading:
                raise ValueError(f"{where}: the tree of bools names {flagged!r}, which the parameters do not have")
        return [self._by_flag(flags, name, where) for name in names]

    def _by_glob(self, name: str) -> bool:
        excluded = [glob[1:] for glob in self.globs if glob.startswith("!")]
        included = [glob for glob in self.globs if not glob.startswith("!")] or ["*"]
        return any(matches(g, name) for g in included) and not any(matches(g, name) for g in excluded)

    def _winning_rows(self, names: Sequence[str], where: str) -> list[int]:
        """For every leaf the first row that matches it; every row but `"*"`, the rest, must be the first for some."""
        winning = []
        for name in names:
            rows = [i for i, glob in enumerate(self.rows) if matches(glob, name)]
            if not rows:
                raise ValueError(f"{where}: the leaf {name!r} is in no row; add a row '*' (None: no penalty)")
            winning.append(rows[0])
        for i, glob in enumerate(self.rows):
            if i not in winning and glob != "*":
                earlier = sorted({row for row, name in zip(winning, names, strict=True) if matches(glob, name)})
                raise ValueError(
                    f"{where}: row {glob!r} never applies: every leaf it matches is taken by an earlier row "
                    f"({', '.join(repr(self.rows[row]) for row in earlier)}); move it up"
                )
        return winning

    @staticmethod
    def _by_function(function: Callable[[str, Any], Any], name: str, leaf: Any, where: str) -> bool:
        chosen = function(name, leaf)
        if not isinstance(chosen, bool):
            raise TypeError(
                f"{where}: a selector function must return True or False from the name and the shape of a leaf, "
                f"got {type(chosen).__name__} for {name!r}"
            )
        return chosen

    @staticmethod
    def _by_flag(flags: dict[str, bool], name: str, where: str) -> bool:
        for part in [*reversed(_leading(name)), ""]:
            if part in flags:
                return flags[part]
        raise ValueError(
            f"{where}: the tree of bools says nothing about the leaf {name!r}; it names {', '.join(flags)}"
        )


_NO_SELECTOR = (
    "on: expected a glob, a list of globs, a role (weights, biases, norms), a function (name, leaf) -> bool or a tree "
    "of bools, got "
)


def selector_of(wing: Any, given: Any) -> Selector:
    """What was given to `.on` as a selector, or TypeError."""
    if isinstance(given, str) or (isinstance(given, (list, tuple)) and all(isinstance(g, str) for g in given)):
        globs = (given,) if isinstance(given, str) else tuple(given)
        if not globs:
            raise TypeError("on: an empty list selects nothing; give at least one glob")
        for glob in globs:
            check_glob(glob, "on")
        return Selector(globs=globs)
    # A model can be called, but says nothing about a leaf. callable() first: torch.compile cannot trace __mro__.
    model = callable(given) and any(cls.__name__ == "Module" for cls in type(given).__mro__)
    try:
        flat = wing.flatten(given, scalars=True)
    except TypeError:
        if callable(given) and not model:
            return Selector(function=given)
        raise TypeError(_NO_SELECTOR + type(given).__name__) from None
    flags = tuple(zip(flat.names, flat.leaves, strict=True))
    wrong = [name for name, flag in flags if not isinstance(flag, bool)]
    if callable(given) and not model and (wrong or not flags):
        function: Callable[[str, Any], Any] = given
        return Selector(function=function)
    globs_among = isinstance(given, (list, tuple)) and any(isinstance(g, str) for g in given)
    if wrong or not flags or globs_among:
        raise TypeError(_NO_SELECTOR + type(given).__name__ + (f" with the leaf {wrong[0]!r}" if wrong else ""))
    flat.check_names("on")
    return Selector(flags=flags)
