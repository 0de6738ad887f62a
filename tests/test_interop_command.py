"""`python -m interop check FILE`: exit codes, what is written, and errors that name what is wrong before any work."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from interop import _command
from interop.__main__ import main

ROOT = Path(__file__).parent.parent
HEAD = """
import jax, numpy as np, torch, jax.numpy as jnp
from funcreg import interop
x = np.linspace(-3, 3, 7)
"""
AGREE = HEAD + "torch_fn, jax_fn, inputs = torch.sin, jnp.sin, (x,)\n"
DIFFER = HEAD + "torch_fn, jax_fn, inputs = torch.sin, jnp.cos, x\n"
UNKNOWN = HEAD + "torch_fn, jax_fn, inputs = lambda x: x * torch.nan, lambda x: x * jnp.nan, x\n"
TRAINING = (
    HEAD
    + """
import optax, funcreg.jax as frj, funcreg.torch as frt
torch_side = frt.train_step(lambda p, x: (p["w"] * x).square().mean(), lambda h: frt.optax.sgd(h["lr"]))
jax_side = frj.train_step(lambda p, x: jnp.mean((p["w"] * x) ** 2), lambda h: optax.sgd(h["lr"]))
params, hyper, batches = {"w": np.ones(7)}, {"lr": 0.1}, [x, 2 * x]
"""
)
PAIRED = (
    HEAD
    + """
net = torch.nn.Linear(7, 7)
pair = interop.match(net, {"params": {"kernel": jnp.zeros((7, 7)), "bias": jnp.zeros(7)}})
torch_fn, jax_fn = lambda p: p, lambda p: {"kernel": p["kernel"], "bias": p["bias"]}
inputs = ({k: v.detach().numpy() for k, v in net.named_parameters()},)
"""
)


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, _command.MODULE, raising=False)

    def write(text, name="port.py"):
        Path(name).write_text(text)
        return name

    yield write
    sys.modules.pop(_command.MODULE, None)


@pytest.mark.parametrize(
    "text, code, verdicts",
    [
        (AGREE, 0, ["rounding"]),
        (DIFFER, 1, ["semantic"]),
        (UNKNOWN, 2, ["inconclusive"]),
        (TRAINING, 0, ["rounding"]),
        (PAIRED, 0, ["rounding"]),
        (AGREE + "def parity_cos():\n    return interop.check(torch.cos, jnp.cos, x)\n", 0, ["rounding"] * 2),
        (
            UNKNOWN + "def parity_cos():\n    return interop.check(torch.cos, jnp.sin, x)\n",
            1,
            ["inconclusive", "semantic"],
        ),
        (TRAINING + AGREE, 0, ["rounding"] * 2),
        (AGREE + "if __name__ == '__main__':\n    raise SystemExit(0)\n", 0, ["rounding"]),
        (
            HEAD + "def helper():\n    return 3\ndef parity_f():\n    return interop.check(torch.cos, jnp.cos, x)\n",
            0,
            ["rounding"],
        ),
    ],
)
def test_the_worst_verdict_is_the_exit_code(text, code, verdicts, write, capsys):
    assert main(["check", write(text)]) == code
    said = capsys.readouterr()
    assert [line.split()[1] for line in said.out.splitlines() if line.startswith("verdict:")] == verdicts
    assert "float64 max" in said.out, "the plain table, since this is no terminal"
    assert said.err == "" and (said.out.count("== ") == len(verdicts)) == (len(verdicts) > 1)


@pytest.mark.parametrize(
    "text, message",
    [
        ("x = 1\n", "defines nothing to check: neither torch_fn, jax_fn and inputs"),
        ("torch_fn = abs\n", "defines torch_fn or jax_fn, but not jax_fn, inputs"),
        (
            "jax_side = torch_side = (abs, abs)\nparams = hyper = None\n",
            "defines torch_side or jax_side, but not batches",
        ),
        ("import nothing_of_this_name\n", "No module named 'nothing_of_this_name'"),
        ("def f(:\n", "SyntaxError"),
        ("raise SystemExit(0)\n", "the file ended the program itself (exit code 0); nothing was checked"),
        (HEAD + "def parity_f():\n    return 3\n", "parity_f() must return a Report of interop, got int"),
        (HEAD + "def parity_f():\n    raise SystemExit(0)\n", "parity_f(): the file ended the program itself"),
        (HEAD + "torch_fn, jax_fn, inputs = torch.sin, jnp.sin, 'x'\n", "the results hold no arrays|got str|must be"),
    ],
)
def test_errors_of_the_file_are_2_and_say_what_is_wrong(text, message, write, capsys):
    assert main(["check", write(text)]) == 2
    said = capsys.readouterr()
    assert any(part in said.err for part in message.split("|")), said.err
    assert "interop check: " in said.err and "verdict" not in said.out


def test_a_traceback_begins_in_the_file_and_the_other_checks_still_run(write, capsys):
    broken = "def loss(x):\n    return x.nothing\ndef parity_f():\n    return interop.check(loss, jnp.sin, x)\n"
    assert main(["check", write(AGREE + broken)]) == 2
    said = capsys.readouterr()
    assert "verdict: rounding" in said.out
    lines = said.err.splitlines()
    assert lines[0] == "interop check: parity_f(): Traceback (most recent call last):"
    files = [line.split('"')[1] for line in lines if line.startswith("  File ")]
    assert {Path(file).name for file in files} == {"port.py"} and len(files) == 2
    assert "return x.nothing" in said.err and "PyTorch side: raised in float64" in said.err


def test_what_is_written_is_whole_and_has_every_report(write, capsys):
    Path("out.json").write_text("before")
    broken = "def parity_f():\n    raise ValueError('<b>broken</b>')\n"
    assert main(["check", write(DIFFER + broken), "--json", "out.json", "--html", "out.html"]) == 1
    record = json.loads(Path("out.json").read_text())
    assert record["schema"] == 1 and record["file"] == "port.py"
    assert record["reports"]["torch_fn and jax_fn"]["verdict"] == "semantic"
    assert "broken" in record["errors"]["parity_f()"] and "torch" in record["environment"]
    page = Path("out.html").read_text()
    assert "compute different things" in page and "&lt;b&gt;broken" in page and "<b>" not in page
    assert sorted(p.name for p in Path.cwd().iterdir() if p.is_file()) == ["out.html", "out.json", "port.py"]


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "the following arguments are required"),
        (["check"], "the following arguments are required: FILE"),
        (["check", "nothing.py"], "FILE: no such file: 'nothing.py'"),
        (["check", "folder"], "FILE: not a file: 'folder'"),
        (["check", "port.py", "--html", "folder"], "--html: 'folder' is a folder; name a file"),
        (["check", "port.py", "--json", "no/out.json"], "--json: there is no folder"),
        (["check", "port.py", "--json", "/proc/out.json"], "--json: cannot write to the folder '/proc'"),
        (["check", "port.py", "--json", "out", "--html", "folder/../out"], "--json and --html: both name 'out'"),
        (["check", "port.py", "--tolerance", "1"], "unrecognized arguments: --tolerance"),
        (["locate", "port.py"], "invalid choice: 'locate'"),
    ],
)
def test_wrong_arguments_are_2_before_the_file_runs(options, message, write, capsys):
    write("raise RuntimeError('it ran')\n")
    Path("folder").mkdir()
    with pytest.raises(SystemExit) as stop:
        main(options)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and "it ran" not in error


def test_it_can_import_what_lies_beside_the_file(write):
    write(AGREE, "beside.py")
    Path("elsewhere").mkdir()
    os.chdir("elsewhere")
    Path("../port.py").write_text("from beside import torch_fn, jax_fn, inputs\n")
    assert main(["check", "../port.py"]) == 0
    sys.modules.pop("beside")


def test_it_runs_as_a_module(write):
    write(UNKNOWN)
    command = [sys.executable, "-W", "error", "-m", "interop", "check", "port.py"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    )
    assert done.returncode == 2 and "verdict: inconclusive" in done.stdout, done.stderr
    assert "\x1b" not in done.stdout


def test_it_runs_under_the_name_that_nothing_shadows(write, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["interop.py", "check", write(AGREE)])
    monkeypatch.delitem(sys.modules, "funcreg.interop", raising=False)
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("funcreg.interop", run_name="__main__")
    assert stop.value.code == 0 and "verdict: rounding" in capsys.readouterr().out
