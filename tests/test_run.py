"""A long run: what was done is kept, whatever stops it, and a resumed run ends with the same bits."""

import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from wings import JAX, each_wing

STEPS = 9


def ensemble(wing, members=3):
    rng = np.random.default_rng(0)
    x, y = wing.array(rng.standard_normal((STEPS, 5, 4))), wing.array(rng.standard_normal((STEPS, 5)))

    def loss(params, x, y):
        return ((x @ params["w"] - y) ** 2).mean()

    pair = wing.fr.train_step(loss, lambda h: wing.fr.prox_adam(h["lr"], wing.fr.l1(h["lam"])))
    init, step = wing.fr.ensemble(*pair, compiled=wing is JAX)
    hyper = {"lr": 0.01, "lam": wing.array(np.geomspace(1e-3, 1e-1, members))}
    state = init(wing.array({"w": rng.standard_normal((members, 4))}), hyper)
    return step, state, hyper, lambda i: (x[i], y[i])


def assert_same_bits(wing, got, want):
    assert got.steps == want.steps
    got_flat, want_flat = wing.fr.to_flat(got.state), wing.fr.to_flat(want.state)
    assert got_flat.keys() == want_flat.keys()
    for name, x in got_flat.items():
        assert np.array_equal(wing.numpy(x), wing.numpy(want_flat[name])), name
    assert got.metrics.keys() == want.metrics.keys() == {"loss", "penalty", "objective"}
    for name, x in got.metrics.items():
        assert x.shape == (want.steps, 3) and np.array_equal(x, want.metrics[name])


@each_wing
def test_a_run_is_its_steps(wing):
    step, state, hyper, batch = ensemble(wing)
    run = wing.fr.run(step, state, hyper, batch, STEPS, progress=False)
    for i in range(STEPS):
        state, metrics = step(state, hyper, *batch(i))
        assert np.array_equal(run.metrics["loss"][i], wing.numpy(metrics["loss"]))
    assert np.array_equal(wing.numpy(run.state.params["w"]), wing.numpy(state.params["w"]))
    none = wing.fr.run(step, state, hyper, batch, 0, progress=False)
    assert none.steps == 0 and none.metrics == {}


@each_wing
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_loses_nothing_and_is_resumed(wing, number, tmp_path):
    step, state, hyper, batch = ensemble(wing)
    whole = wing.fr.run(step, state, hyper, batch, STEPS, progress=False)

    def interrupted(i):
        if i == 4:
            os.kill(os.getpid(), number)
        return batch(i)

    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    path = tmp_path / "deep" / "run.safetensors"
    with pytest.raises(wing.fr.Interrupted, match="stopped after step 5 of 9; saved in") as caught:
        wing.fr.run(step, state, hyper, interrupted, STEPS, progress=False, path=path)
    assert caught.value.run.steps == 5 and isinstance(caught.value, KeyboardInterrupt)
    assert caught.value.signal == number
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    seen = []
    resumed = wing.fr.run(step, state, hyper, lambda i: seen.append(i) or batch(i), STEPS, progress=False, path=path)
    assert seen == [5, 6, 7, 8]
    assert_same_bits(wing, resumed, whole)
    again = wing.fr.run(step, state, hyper, batch, STEPS, progress=False, path=path)  # nothing left to do
    assert_same_bits(wing, again, whole)
    assert [p.name for p in path.parent.iterdir()] == ["run.safetensors"]
    with pytest.raises(wing.fr.Interrupted, match="the exception's `run` holds it") as caught:
        wing.fr.run(step, state, hyper, interrupted, STEPS, progress=False)
    assert caught.value.run.steps == 5


@each_wing
def test_a_signal_in_the_last_step_still_stops_the_script(wing):
    step, state, hyper, batch = ensemble(wing)

    def interrupted(i):
        if i == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(i)

    with pytest.raises(wing.fr.Interrupted, match="stopped after step 2 of 2") as caught:
        wing.fr.run(step, state, hyper, interrupted, 2, progress=False)
    assert caught.value.run.steps == 2


@each_wing
def test_a_failing_batch_keeps_what_was_done(wing, tmp_path):
    step, state, hyper, batch = ensemble(wing)
    whole = wing.fr.run(step, state, hyper, batch, STEPS, progress=False)

    def broken(i):
        if i == 6:
            raise OSError("no more data")
        return batch(i)

    path = tmp_path / "run.safetensors"
    with pytest.raises(OSError, match="no more data"):
        wing.fr.run(step, state, hyper, broken, STEPS, progress=False, path=path)
    assert_same_bits(wing, wing.fr.run(step, state, hyper, batch, STEPS, progress=False, path=path), whole)


@each_wing
def test_it_saves_now_and_then(wing, tmp_path):
    """A kill -9 loses what came after the last saving, and leaves a whole file."""
    step, state, hyper, batch = ensemble(wing)
    path, sizes = tmp_path / "run.safetensors", []

    def watched(i):
        sizes.append(path.stat().st_size if path.exists() else 0)
        return batch(i)

    wing.fr.run(step, state, hyper, watched, STEPS, progress=False, path=path, save_every=0)
    assert sizes[0] > 0 and sorted(set(sizes)) == sizes  # before the first step, and a longer one after every step


@each_wing
def test_another_set_up_is_refused(wing, tmp_path):
    step, state, hyper, batch = ensemble(wing)
    path = tmp_path / "run.safetensors"
    wing.fr.run(step, state, hyper, batch, 2, progress=False, path=path)

    def go(state=state, hyper=hyper, batch=batch, steps=STEPS, path=path, **options):
        return wing.fr.run(step, state, hyper, batch, steps, progress=False, path=path, **options)

    with pytest.raises(ValueError, match="trained with 'lr' = 0.01 in hyper, now it is 0.02"):
        go(hyper=hyper | {"lr": 0.02})
    with pytest.raises(ValueError, match="'new' = nothing in hyper, now it is 1"):
        go(hyper=hyper | {"new": 1.0})
    with pytest.raises(ValueError, match="holds 2 steps, but steps is 1"):
        go(steps=1)
    with pytest.raises(ValueError, match="is missing 'params.v'") as caught:
        go(state=state._replace(params={"v": state.params["w"]}))
    assert "holds another training set-up" in caught.value.__notes__[0]
    other = tmp_path / "other.safetensors"
    wing.fr.run(step, state, hyper, batch, 0, progress=False, path=other)
    from safetensors.numpy import save_file

    save_file({"a": np.zeros(2)}, other)
    with pytest.raises(ValueError, match="is no checkpoint of a run"):
        go(path=other)
    other.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="other.safetensors cannot be read .* remove it to begin anew"):
        go(path=other)
    for options, error, message in [
        ({"batch": [1, 2]}, TypeError, "batch must be a function"),
        ({"batch": lambda i: batch(i)[0]}, TypeError, "must return a tuple"),
        ({"steps": -1}, ValueError, "steps must be an integer >= 0, got -1"),
        ({"steps": 2.0}, ValueError, "steps must be an integer >= 0, got 2.0"),
        ({"save_every": -1}, ValueError, "save_every must be >= 0"),
    ]:
        with pytest.raises(error, match=message):
            go(**options)


@each_wing
def test_a_penalty_among_the_hyper_parameters_is_part_of_the_set_up(wing, tmp_path):
    _, _, _, batch = ensemble(wing)
    path = tmp_path / "run.safetensors"
    init, step = wing.fr.train_step(
        lambda p, x, y: ((x @ p["w"] - y) ** 2).mean(), lambda h: wing.fr.prox_sgd(0.1, h["p"])
    )

    def go(penalty):
        state = init(wing.array({"w": np.ones(4)}), {"p": penalty})
        return wing.fr.run(step, state, {"p": penalty}, batch, 2, progress=False, path=path)

    go(wing.fr.l1(0.1))
    assert go(wing.fr.l1(0.1)).steps == 2
    with pytest.raises(ValueError, match="trained with the penalties .*l1.* now they are .*l2"):
        go(wing.fr.l2(0.1))


@each_wing
def test_what_cannot_be_saved_is_refused_before_anything_runs(wing, tmp_path):
    step, state, hyper, batch = ensemble(wing)
    seen = []
    with pytest.raises(TypeError, match="hyper 'name' must be an array or a number to be saved, got 'x'"):
        wing.fr.run(step, state, hyper | {"name": "x"}, seen.append, 3, progress=False, path=tmp_path / "run")
    assert seen == []


@each_wing
def test_metrics_that_change_are_refused_and_the_steps_kept(wing, tmp_path):
    step, state, hyper, batch = ensemble(wing)
    whole = wing.fr.run(step, state, hyper, batch, STEPS, progress=False)
    count = [0]

    def changing(state, hyper, *batch):
        count[0] += 1
        state, metrics = step(state, hyper, *batch)
        return state, metrics | ({"late": metrics["loss"]} if count[0] == 4 else {})

    path = tmp_path / "run"
    with pytest.raises(ValueError, match="'late' was not there and is"):
        wing.fr.run(changing, state, hyper, batch, STEPS, progress=False, path=path)
    assert_same_bits(wing, wing.fr.run(step, state, hyper, batch, STEPS, progress=False, path=path), whole)


@each_wing
def test_progress_is_shown_and_can_be_switched_off(wing, capsys):
    step, state, hyper, batch = ensemble(wing)
    wing.fr.run(step, state, hyper, batch, STEPS, progress=False)
    assert capsys.readouterr() == ("", "")
    wing.fr.run(step, state, hyper, batch, STEPS)
    assert f"{STEPS}/{STEPS}" in capsys.readouterr().err


@each_wing
def test_it_runs_in_another_thread(wing):
    step, state, hyper, batch = ensemble(wing)
    runs = []
    thread = threading.Thread(target=lambda: runs.append(wing.fr.run(step, state, hyper, batch, 3, progress=False)))
    thread.start()
    thread.join()
    assert runs[0].steps == 3


DEVICES = """
import numpy as np
import jax, jax.numpy as jnp
import funcreg.jax as fr

assert len(jax.devices()) == 8
def check(members, devices):
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.standard_normal((members, 4)), jnp.float32)}
    hyper = {"lr": 0.01, "lam": jnp.geomspace(1e-3, 1e-1, members)}
    x = jnp.asarray(rng.standard_normal((5, 4)), jnp.float32)
    y = jnp.asarray(rng.standard_normal((members, 5)), jnp.float32)
    pair = fr.train_step(lambda p, x, y: ((x @ p["w"] - y) ** 2).mean(),
                         lambda h: fr.prox_adam(h["lr"], fr.l1(h["lam"])))
    for chunk in (None, 2):
        init, step = fr.ensemble(*pair, batch_axes=(None, 0), chunk=chunk)
        state = init(params, hyper)
        for _ in range(5):
            state, metrics = step(state, hyper, x, y)
        spread = len(state.params["w"].sharding.device_set)
        assert spread == devices, spread
        back = fr.from_flat(state, {k: np.asarray(v) for k, v in fr.to_flat(state).items()})
        assert len(back.params["w"].sharding.device_set) == spread
        step(back, hyper, x, y)
        each = fr.unstack({**hyper, "lr": jnp.full(members, 0.01)})
        for i, (member, own) in enumerate(zip(fr.unstack(params), each)):
            alone = pair[0](member, own)
            for _ in range(5):
                alone, values = pair[1](alone, own, x, y[i])
            assert np.allclose(state.params["w"][i], alone.params["w"], rtol=1e-5, atol=1e-7)
            assert np.allclose(metrics["objective"][i], values["objective"], rtol=1e-5)

for members, devices in [(16, 8), (6, 6), (9, 3), (1, 1)]:
    check(members, devices)
print("ok")
"""


@pytest.mark.slow
def test_members_are_spread_over_the_devices():
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", DEVICES], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "ok\n", done.stderr
