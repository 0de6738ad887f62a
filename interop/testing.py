"""`assert_parity`: parity as a test. pytest is not needed; with it, `pytest_plugins = ["interop.testing"]` in a
conftest.py offers the fixture `parity`, which also keeps the report of a failure as a page for a browser.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ._text import printable
from .pair import Pair
from .parity import check
from .report import Report
from .training import Steps, check_training
from .verdict import Verdict

Tree = Any


def assert_parity(
    torch_fn: Callable[..., Tree],
    jax_fn: Callable[..., Tree],
    *inputs: Tree,
    pair: Pair | None = None,
    allow_inconclusive: Sequence[str] = (),
) -> Report:
    """`interop.check`, and an error unless both sides agree.

    Args:
        torch_fn, jax_fn, inputs, pair: as of `check`.
        allow_inconclusive: names or globs of leaves that may be inconclusive, such as the results of a bfloat16 kernel;
            everything else that is inconclusive fails, as a difference does.

    Returns:
        The report.

    Raises:
        AssertionError: a leaf is semantic, or inconclusive and not allowed; its message is the report.
        ValueError: a glob that matches no leaf; else as `check`.

    Example:
        >>> import jax.numpy as jnp, numpy as np, torch
        >>> from interop.testing import assert_parity
        >>> assert_parity(torch.sin, jnp.sin, np.linspace(-3, 3, 50)).verdict
        <Verdict.ROUNDING: 'rounding'>
        >>> assert_parity(torch.sin, jnp.cos, np.linspace(-3, 3, 50))
        Traceback (most recent call last):
            ...
        AssertionError: the two sides do not agree: (result)
        ...
    """
    __tracebackhide__ = True  # pytest shows the report where the test called
    return agreed("assert_parity", check(torch_fn, jax_fn, *inputs, pair=pair), allow_inconclusive)


def assert_training_parity(
    torch_steps: Steps,
    jax_steps: Steps,
    params: Tree,
    hyper: Tree,
    batches: Iterable[Any],
    pair: Pair | None = None,
    allow_inconclusive: Sequence[str] = (),
) -> Report:
    """`interop.check_training`, and an error unless both sides take the same way.

    Args:
        torch_steps, jax_steps, params, hyper, batches, pair: as of `check_training`.
        allow_inconclusive: as of `assert_parity`, such as `["metrics.*"]`.

    Returns:
        The report.

    Raises:
        AssertionError: as `assert_parity`.
        ValueError: a glob that matches no leaf; else as `check_training`.

    Example:
        >>> import numpy as np, optax, jax.numpy as jnp
        >>> import funcreg.jax as frj, funcreg.torch as frt
        >>> from interop.testing import assert_training_parity
        >>> ours = frt.train_step(lambda p, x: (p["w"] * x).square().mean(), lambda h: frt.optax.sgd(h["lr"]))
        >>> theirs = frj.train_step(lambda p, x: jnp.mean((p["w"] * x) ** 2), lambda h: optax.sgd(h["lr"]))
        >>> batches = [np.linspace(0, i, 3) for i in (1, 2)]
        >>> assert_training_parity(ours, theirs, {"w": np.ones(3)}, {"lr": 0.1}, batches).verdict
        <Verdict.ROUNDING: 'rounding'>
    """
    __tracebackhide__ = True
    report = check_training(torch_steps, jax_steps, params, hyper, batches, pair)
    return agreed("assert_training_parity", report, allow_inconclusive)


def agreed(where: str, report: Report, allow_inconclusive: Sequence[str] = (), page: Path | None = None) -> Report:
    """The report, if it is one of agreement; else an AssertionError, and its page at this path."""
    __tracebackhide__ = True
    if isinstance(allow_inconclusive, str):
        raise TypeError(f"{where}: allow_inconclusive must be a list of names, got the string {allow_inconclusive!r}")
    names = [leaf.name for leaf in report.leaves]
    unused = [glob for glob in allow_inconclusive if not any(fnmatchcase(name, glob) for name in names)]
    if unused:
        raise ValueError(
            f"{where}: allow_inconclusive has {unused[0]!r}, which matches no leaf; there are "
            f"{', '.join(dict.fromkeys(names)) or 'none'}"
        )

    def allowed(name: str) -> bool:
        return any(fnmatchcase(name, glob) for glob in allow_inconclusive)

    failed = [leaf for leaf in report.leaves if leaf.verdict is not Verdict.ROUNDING]
    bad = [leaf.name for leaf in failed if leaf.verdict is Verdict.SEMANTIC or not allowed(leaf.name)]
    if report.verdict is Verdict.ROUNDING or (failed and not bad):
        return report
    said = "do not agree" if report.verdict is Verdict.SEMANTIC else "cannot be said to agree (inconclusive)"
    kept = ""
    if page is not None:
        report.to_html(page)
        kept = f"\nas a page: {page}"
    named = ", ".join(printable(name) for name in dict.fromkeys(bad))
    raise AssertionError(f"the two sides {said}: {named or 'nothing compared'}\n{report}{kept}")


class Parity:
    """What the fixture `parity` is: `parity(...)` is `assert_parity`, `parity.training(...)` its training form.

    A failure leaves its report in `folder`, as `parity-1.html` and so on, and says where.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, 0

    def __call__(
        self,
        torch_fn: Callable[..., Tree],
        jax_fn: Callable[..., Tree],
        *inputs: Tree,
        pair: Pair | None = None,
        allow_inconclusive: Sequence[str] = (),
    ) -> Report:
        __tracebackhide__ = True
        return agreed("parity", check(torch_fn, jax_fn, *inputs, pair=pair), allow_inconclusive, self._page())

    def training(
        self,
        torch_steps: Steps,
        jax_steps: Steps,
        params: Tree,
        hyper: Tree,
        batches: Iterable[Any],
        pair: Pair | None = None,
        allow_inconclusive: Sequence[str] = (),
    ) -> Report:
        __tracebackhide__ = True
        report = check_training(torch_steps, jax_steps, params, hyper, batches, pair)
        return agreed("parity.training", report, allow_inconclusive, self._page())

    def _page(self) -> Path:
        self.asked += 1
        return self.folder / f"parity-{self.asked}.html"


try:
    import pytest
except ImportError:
    pass
else:

    @pytest.fixture
    def parity(tmp_path: Path) -> Parity:
        """`parity(torch_fn, jax_fn, *inputs)` and `parity.training(...)`; pages of failures lie in `tmp_path`."""
        return Parity(tmp_path)
