"""The table of functions that the JAX wing exports, and how the tests export one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import funcreg.jax as fr

BATCH = {"x": {0: "batch"}, "y": {0: "batch"}}
SIZES = (1,)  # each is a compilation, of the function and of the file


# --- each is: function, example, dynamic, outputs ---


def linear(dtype=np.float32):
    rng = np.random.default_rng(0)
    return {"head": {"kernel": jnp.asarray(rng.normal(size=(4, 3)), dtype), "bias": jnp.zeros(3, dtype)}}


def labels(params, x, y):
    logits = x @ params["head"]["kernel"] + params["head"]["bias"][None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def batch(dtype=np.float32):
    rng = np.random.default_rng(1)
    return {"x": rng.normal(size=(8, 4)).astype(dtype), "y": rng.integers(0, 3, 8).astype(np.int32)}


def step_of(make, dtype=np.float32):
    hyper = {"lr": jnp.asarray(0.05, dtype), "lam": jnp.asarray(0.02, dtype)}
    init, step = fr.train_step(labels, make)
    return step, {"state": init(linear(dtype), hyper), "hyper": hyper, **batch(dtype)}, BATCH, ("state", "metrics")


def gradient():
    def gradient(params, lam, x, y):
        return jax.grad(fr.penalize(labels, fr.l1(lam).on("*.kernel")))(params, x, y)

    return gradient, {"params": linear(), "lam": jnp.asarray(0.1), **batch()}, BATCH, None


def prox_adam():
    return step_of(lambda hyper: fr.prox_adam(hyper["lr"], fr.l1(hyper["lam"])))


def optax_chain():
    return step_of(
        lambda hyper: optax.chain(
            fr.add_penalty_gradient(fr.l2(hyper["lam"])), optax.trace(0.9), optax.scale_by_learning_rate(hyper["lr"])
        )
    )


def ensemble():
    init, step = fr.train_step(labels, lambda hyper: fr.prox_sgd(hyper["lr"], fr.l1(hyper["lam"])))
    hyper = {"lr": jnp.asarray([0.1, 0.01]), "lam": jnp.asarray([0.1, 0.0])}
    state = jax.vmap(init)(fr.stack([linear(), linear()]), hyper)
    example = {"state": state, "hyper": hyper, **batch()}
    return jax.vmap(step, in_axes=(0, 0, None, None)), example, BATCH, ("state", "metrics")


def per_example():
    example = {"params": linear(), **batch()}
    return lambda params, x, y: fr.per_example(labels)(params, x, y), example, BATCH, ("values", "gradients")


def dropout():
    """A key goes in as its data; two dynamic dimensions, and a result that has their product."""

    def noisy(key, x):
        kept = jax.random.bernoulli(jax.random.wrap_key_data(key), 0.5, x.shape)
        return {"kept": jnp.where(kept, x, 0).reshape(-1), "mean": x.astype(jnp.bfloat16).mean(0)}

    key = jax.random.key_data(jax.random.key(3))
    return noisy, {"key": key, "x": np.ones((5, 6), np.float32)}, {"x": {0: "rows", -1: "columns"}}, None


CASES = {case.__name__: case for case in (gradient, prox_adam, optax_chain, ensemble, per_example, dropout)}


def exported(tmp_path, fn, example, dynamic, outputs=None, **options):
    path = tmp_path / "f.jax"
    report = fr.export.export_step(
        fn, example, path, dynamic=dynamic, outputs=outputs, **{"check_sizes": SIZES, **options}
    )
    return report, fr.export.load_exported(path, trusted=True)
