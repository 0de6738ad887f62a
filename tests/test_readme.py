"""Every Python snippet of the README runs as pasted, on its own, and prints what its comments say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("i", EXPECTED)
def test_snippet_runs_as_pasted(i: int, tmp_path: Path) -> None:
    run = subprocess.run(
        # inductor imports modules that torch itself has deprecated
        [sys.executable, "-W", "error", "-W", "ignore:`torch.jit:DeprecationWarning", "-c", SNIPPETS[i]],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert re.search(EXPECTED[i], run.stdout, flags=re.MULTILINE), run.stdout


@pytest.mark.relaxed_promotion
def test_the_lasso_snippet_has_the_zeros_it_claims(tmp_path: Path) -> None:
    namespace: dict[str, object] = {}
    claimed = int(re.search(r"(\d+) of 10 coefficients are exactly zero", SNIPPETS[1]).group(1))  # type: ignore[union-attr]
    exec(SNIPPETS[1].replace("print(", "weights = ("), namespace)
    zeros = int((namespace["weights"] == 0).sum())  # type: ignore[attr-defined]
    assert zeros == claimed
