"""The benchmark measures what it says, in the order it says, and runs on a small net. How fast it is, is no test."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMALL = ["--widths", "12", "8", "4", "--batch", "8", "--rounds", "2", "--steps", "2", "--backend", "eager"]


@pytest.fixture(scope="module")
def scripts():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    sys.modules.pop("ensemble", None)  # there is an example of that name as well
    yield importlib.import_module
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def bench(scripts):
    return scripts("train_step")


@pytest.fixture(scope="module")
def ensembles(scripts):
    return scripts("ensemble")


class Clock:
    """A machine that becomes twice as slow every 100 steps, on which a variant's step takes so many seconds."""

    def __init__(self):
        self.now, self.steps, self.order = 0.0, 0, []

    def __call__(self):
        return self.now

    def advance(self, name, seconds):
        def advance(steps):
            self.order.append(name)
            for _ in range(steps):
                self.now += seconds * 2 ** (self.steps / 100)
                self.steps += 1

        return advance


def test_ratios_are_those_of_neighbours_in_time_whatever_the_machine_does_meanwhile(bench):
    clock = Clock()
    variants = [
        bench.Variant("plain", clock.advance("plain", 2.0), lambda: 0.0),
        bench.Variant("same", clock.advance("same", 2.0), lambda: 0.25, "plain", 1.10),
        bench.Variant("slow", clock.advance("slow", 6.0), lambda: 0.5, "plain", 2.0),
        bench.Variant("free", clock.advance("free", 1.0), lambda: 0.0, "plain"),
    ]
    results = {r.case: r for r in bench.measure("family", variants, 20, 3, clock=clock)}
    # Ten steps lie between the middles of neighbours at most, in alternating order: 2 ** 0.1.
    assert {case: pytest.approx(r.ratio, rel=0.07) for case, r in results.items()} == {
        "same": 1,
        "slow": 3,
        "free": 0.5,
    }
    assert {case: r.verdict for case, r in results.items()} == {"same": "ok", "slow": "over", "free": ""}
    assert [r.zeros for r in results.values()] == [0.25, 0.5, 0.0]
    assert all(r.against == "plain" and r.quartiles[0] <= r.ratio <= r.quartiles[1] for r in results.values())


def test_each_case_runs_next_to_its_baseline_in_alternating_order(bench):
    clock = Clock()
    variants = [
        bench.Variant("plain", clock.advance("plain", 1.0), lambda: 0.0),
        bench.Variant("a", clock.advance("a", 1.0), lambda: 0.0, "plain"),
        bench.Variant("b", clock.advance("b", 1.0), lambda: 0.0, "plain"),
    ]
    bench.measure("family", variants, 2, 5, clock=clock)
    runs = clock.order[2 * len(variants) :: 2]  # after the first steps; every measurement follows a step not measured
    assert runs == ["a", "plain", "b", "plain", "plain", "a", "plain", "b"]
    assert runs == clock.order[2 * len(variants) + 1 :: 2]


@pytest.mark.slow
@pytest.mark.relaxed_promotion
def test_the_command_measures_every_family_and_says_on_what(bench, tmp_path, capsys):
    bench.main([*SMALL, "--json", str(tmp_path / "out.json")])
    said = json.loads((tmp_path / "out.json").read_text())
    limits = {(r["family"], r["case"]): r["limit"] for r in said["results"]}
    required = {
        ("torch", "penalize l1"): 1.10,
        ("torch", "prox_adam l1"): 1.25,
        ("jax", "penalize l1"): 1.10,
        ("jax", "prox_adam l1"): 1.10,
        ("attach", "Adam + l1"): 2.0,
        ("attach", "Adam + group_lasso per output"): 5.0,
        ("attach", "Adam + group_lasso per input"): 5.0,
    }
    assert required.items() <= limits.items()
    assert {"group_lasso" in case for family, case in limits if family != "attach"} == {True, False}
    assert {case.split(" + ")[0] for family, case in limits if family == "attach"} == {"Adam", "AdamW", "SGD momentum"}
    assert all(r["milliseconds"] > 0 and r["against_milliseconds"] > 0 and r["ratio"] > 0 for r in said["results"])
    assert {"processor", "cores", "versions", "torch device", "jax device"} <= said["machine"].keys()
    text = capsys.readouterr().out
    for name in ("funcreg", "torch", "jax", "optax"):
        assert re.search(rf"{name} \d+\.\d+", text), name
    for family, case in limits:
        assert case in text and f"{family}: " in text


@pytest.mark.slow
@pytest.mark.relaxed_promotion
@pytest.mark.parametrize("family", ["torch", "jax", "attach"])
def test_every_variant_trains_and_only_a_prox_makes_zeros(bench, family, monkeypatch):
    """What is timed is the real thing: with a strong penalty the proximal steps, and they alone, end in zeros."""
    monkeypatch.setattr(bench, "LAM", 1.0)
    monkeypatch.setattr(bench, "LEARNING_RATE", 0.05)
    widths = [12, 8, 4]
    variants = {
        "torch": lambda: bench.torch_compiled(widths, 8, "cpu", "eager"),
        "jax": lambda: bench.jax_jitted(widths, 8),
        "attach": lambda: bench.torch_attached(widths, 8, "cpu"),
    }[family]()
    for variant in variants:
        before = variant.zeros()
        variant.advance(30)
        proximal = variant.name.startswith("prox_adam") or (family == "attach" and variant.against is not None)
        assert (variant.zeros() > 0.5) == proximal, variant.name
        assert proximal or variant.zeros() <= before, variant.name


@pytest.mark.parametrize(
    ("argument", "value"),
    [("--rounds", "0"), ("--steps", "-1"), ("--batch", "0"), ("--widths", "3"), ("--only", "tpu")],
)
def test_impossible_arguments_are_refused(bench, argument, value, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main([argument, value])
    assert stopped.value.code == 2
    assert argument in capsys.readouterr().err


def test_how_much_faster_is_that_of_the_loop_in_the_same_round(ensembles, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(ensembles.time, "perf_counter", clock)
    loop, fast = (ensembles.Variant(name, clock.advance(name, s), 5.0) for name, s in (("loop", 8.0), ("fast", 1.0)))
    results = ensembles.measure([loop, fast], rounds=7, steps=1, warm=1, tick=lambda: None)
    assert [r.case for r in results] == ["loop", "fast"]
    assert results[0].faster == 1 and results[1].faster == pytest.approx(8, rel=0.1)


@pytest.mark.slow
@pytest.mark.relaxed_promotion  # the benchmark is what a user writes
def test_the_ensemble_benchmark_runs(ensembles, tmp_path, capsys):
    small = ["--eager", "--members", "2", "--examples", "3", "--rounds", "1", "--steps", "1", "--warm", "1"]
    results = ensembles.main([*small, "--json", str(tmp_path / "out.json")])
    assert [len(family) for family in results.values()] in (
        [5, 2, 2, 2, 2],
        [6, 2, 2, 2, 2],
    )  # by the devices that JAX has
    assert all(r.milliseconds > 0 and r.faster > 0 for family in results.values() for r in family)
    out = capsys.readouterr().out
    assert "torch: ensemble" in out and "jax: per_example" in out and ">= 12" in out
    assert json.loads((tmp_path / "out.json").read_text())["results"].keys() == results.keys()
    with pytest.raises(SystemExit):
        ensembles.main(["--members", "0"])
    assert "argument --members: must be >= 1, got 0" in capsys.readouterr().err


def test_the_port_benchmark_measures_a_port(scripts, capsys):
    scripts("port").main(["--leaves", "8", "--width", "1000", "--rounds", "1"])
    out = capsys.readouterr().out
    assert "4.0M float32 parameters in 8 leaves" in out and "pair.optimizer_to_torch" in out
    assert 0.8 < float(re.search(r"beside the model: (\S+) times", out)[1]) < 2


@pytest.mark.relaxed_promotion
def test_the_parity_benchmark_runs_what_it_says(scripts, monkeypatch, capsys):
    """Each figure from a process of its own, here from this one; `check` holds more than the functions do."""
    parity = scripts("parity")
    monkeypatch.setattr(parity, "in_a_process", parity.once)
    parity.main(["--layers", "4", "--width", "700"])
    rows = re.findall(r"^ +(PyTorch|JAX|check).*? +([\d.]+) +[\d.]+ *$", capsys.readouterr().out, re.MULTILINE)
    copies = {name: float(found) for name, found in rows}
    assert copies.keys() == {"PyTorch", "JAX", "check"} and 1 < copies["check"] < 6
