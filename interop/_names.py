"""What the names of layers say: `blocks.0.attn.q` and `blocks_0.attention.query` are one place.

A name is taken apart into stems and numbers. Equal names pair layers, abbreviations pair them where they leave no
choice, and words that only tell the kind of a layer (`fc1`, `Dense_0`) say nothing but their number.
"""

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

Path = tuple[str, ...]
Stems = tuple[str, ...]
Label = tuple[tuple[str, tuple[int, ...]], ...]  # per component: its letters and its numbers

_KINDS = frozenset(
    "linear dense fc lin conv convolution convtranspose deconv norm layernorm batchnorm groupnorm rmsnorm instancenorm "
    "bn ln gn rms layer layers block blocks module modules net seq sequential list proj projection embed embedding emb "
    "general".split()
)
# Words for one kind of layer.
_SYNONYMS = {
    **dict.fromkeys(("linear", "fc", "lin"), "dense"),
    **dict.fromkeys(("bn", "batchnorm"), "batchnorm"),
    **dict.fromkeys(("ln", "layernorm"), "layernorm"),
    **dict.fromkeys(("gn", "groupnorm"), "groupnorm"),
    **dict.fromkeys(("emb", "embedding"), "embed"),
}


def label(path: Path) -> Label:
    """`("blocks", "0", "attn")` and `("blocks_0", "attn")` have one label."""
    parts: list[tuple[str, tuple[int, ...]]] = []
    for component in path:
        letters, numbers = _taken_apart(component)
        if not letters and parts:
            parts[-1] = (parts[-1][0], parts[-1][1] + numbers)
        else:
            parts.append((letters, numbers))
    return tuple(parts)


@lru_cache(maxsize=4096)
def _taken_apart(component: str) -> tuple[str, tuple[int, ...]]:
    """Its letters and its numbers."""
    letters = "".join(re.findall(r"[^\W\d_]+", component)).lower()
    return letters, tuple(int(n) for n in re.findall(r"\d+", component))


def stems(path: Path) -> Stems:
    """The letters of each component; words for one kind of layer are one word."""
    return tuple(_SYNONYMS.get(letters, letters) for letters, _ in label(path))


def numbers(path: Path) -> tuple[tuple[int, ...], ...]:
    return tuple(n for _, n in label(path))


def roles(path: Path) -> frozenset[str]:
    """The words of a name that tell what a layer is for, not what it is: `attn_norm` has `attn`, `Dense_0` none."""
    words = [w.lower() for part in path for w in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[^\W\d_a-zA-Z]+", part)]
    # wq, wk, wv, wo: the weights of query, key, value and output
    words = [w[1] if re.fullmatch("w[qkvo]", w) else w for w in words]
    # `h` and `w` may be height and width; beside a number or another word a letter is the kind: `l1`, `h_0`
    letters = {w for part in path if len(part) > 1 for w in "dbhlw" if w in re.split(r"[\W\d_]+", part.lower())}
    return frozenset(w for w in words if w not in _KINDS and w not in letters)


def same_role(a: frozenset[str], b: frozenset[str]) -> bool:
    return any(_abbreviates(x, y) or _abbreviates(y, x) for x in a for y in b)


def _abbreviates(short: str, long: str) -> bool:
    """`q` and `query`, `attn` and `attention`, equal words."""
    if short == long or (long.startswith(short)):
        return True
    letters = iter(long)
    return len(short) <= 4 and len(short) < len(long) and short[0] == long[0] and all(c in letters for c in short)


def distinct_roles(paths: Sequence[Path]) -> list[frozenset[str]]:
    """The roles of each name without the words that all of them share."""
    each = [roles(path) for path in paths]
    shared = frozenset.intersection(*each) if len(set(map(stems, paths))) > 1 else frozenset()
    return [words - shared for words in each]


def pair_by_label(ours: Sequence[Path], theirs: Sequence[Path]) -> list[int] | None:
    """For each of ours the index of its partner if all have equal names, or None.

    Names are equal as they are, or as labels, or as labels without what all names of a side begin with: a wrapper.
    """
    for key in (_itself, label):
        for some, others in ((ours, theirs), (_without_wrapper(ours), _without_wrapper(theirs))):
            index = {key(path): i for i, path in enumerate(others)}
            if len(index) == len(others) and {key(path) for path in some} == set(index):
                return [index[key(path)] for path in some]
    return None


def _itself(path: Path) -> Path:
    return path


def _without_wrapper(paths: Sequence[Path]) -> list[Path]:
    shared = 0
    while all(len(path) > shared + 1 and path[shared] == paths[0][shared] for path in paths):
        shared += 1
    return [path[shared:] for path in paths]


def pair_by_stem(ours: Sequence[Path], theirs: Sequence[Path]) -> dict[Stems, Stems] | None:
    """Which stem is which, or None: equal ones, those of one role where it leaves no choice, then the last one."""
    counts, their_counts = Counter(map(stems, ours)), Counter(map(stems, theirs))
    if len(counts) != len(their_counts):
        return None
    partner = {s: s for s in counts if s in their_counts}
    our_roles = dict(zip(map(stems, ours), distinct_roles(ours), strict=True))
    their_roles = dict(zip(map(stems, theirs), distinct_roles(theirs), strict=True))
    found = True
    while found:
        found = False
        free = [s for s in counts if s not in partner]
        their_free = [s for s in their_counts if s not in partner.values()]
        options = {s: [t for t in their_free if same_role(our_roles[s], their_roles[t])] for s in free}
        for s, fitting in options.items():
            if len(fitting) == 1 and sum(fitting[0] in other for other in options.values()) == 1:
                partner[s] = fitting[0]
                found = True
                break
    free = [s for s in counts if s not in partner]
    if len(free) == 1 and partner:
        partner[free[0]] = next(s for s in their_counts if s not in partner.values())
    whole = len(partner) == len(counts)
    return partner if whole and all(counts[s] == their_counts[t] for s, t in partner.items()) else None


def natural(name: str) -> list[tuple[bool, int, str]]:
    """The key of the natural order: `Dense_2` before `Dense_10`."""
    return [
        (not part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", name) if part
    ]
