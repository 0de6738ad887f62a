"""Every Python snippet of the README runs as pasted, on its own, and prints what its comments say."""

import re
from pathlib import Path

import pytest

from scripts import run_script

ROOT = Path(__file__).parent.parent
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
EXPECTED = {
    0: r"0\.weight +4096 +\S+ +\d{3,4} \(",
    1: r"^\[",
    2: r"^l1\(0\.001\) on '0' \+ l2\(0\.0001\) on weights$",
    3: r"1\.0000\]\)\ntensor\(\[",
    4: r"^0\.weight +4x3 +layers\.0\.kernel +3x4 +shape +transposed$",
}


def test_the_readme_has_its_snippets() -> None:
    assert len(SNIPPETS) == len(EXPECTED)


@pytest.mark.relaxed_promotion  # as it is for their reader
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # inductor imports what torch itself has deprecated
@pytest.mark.parametrize("i", [pytest.param(i, marks=pytest.mark.slow if i == 3 else ()) for i in EXPECTED])  # compiles
def test_snippet_runs_as_pasted(i: int, tmp_path: Path) -> None:
    (tmp_path / "snippet.py").write_text(SNIPPETS[i])
    printed = run_script(tmp_path / "snippet.py", tmp_path, silent=False)
    assert re.search(EXPECTED[i], printed, flags=re.MULTILINE), printed


@pytest.mark.relaxed_promotion
def test_the_lasso_snippet_has_the_zeros_it_claims(tmp_path: Path) -> None:
    namespace: dict[str, object] = {}
    claimed = int(re.search(r"(\d+) of 10 coefficients are exactly zero", SNIPPETS[1]).group(1))  # type: ignore[union-attr]
    exec(SNIPPETS[1].replace("print(", "weights = ("), namespace)
    zeros = int((namespace["weights"] == 0).sum())  # type: ignore[attr-defined]
    assert zeros == claimed
