"""Models of images and their twins with channels last, for the tests of flattens in `interop.match`."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax
from torch import nn

from funcreg import interop


def net_of(forward, **children):
    """A model with a `forward` of its own."""
    net = type("Net", (nn.Module,), {"forward": forward})()
    for name, child in children.items():
        setattr(net, name, child)
    return net


def random(net):
    torch.manual_seed(0)
    net = net.double().eval()
    with torch.no_grad():
        for name, x in net.state_dict().items():
            if x.is_floating_point():
                x.copy_(torch.rand_like(x) + 0.5 if "var" in name else torch.randn_like(x) / 2)
    return net


def shaped(*shape):
    return jax.ShapeDtypeStruct(shape, np.float64)


def leaves(module):
    """The arrays that the twin of a layer has."""
    if isinstance(module, nn.Linear):
        out = {"kernel": shaped(module.in_features, module.out_features)}
        return out | ({"bias": shaped(module.out_features)} if module.bias is not None else {})
    if isinstance(module, nn.Embedding):
        return {"embedding": shaped(module.num_embeddings, module.embedding_dim)}
    if isinstance(module, nn.MultiheadAttention):
        n, h = module.embed_dim, module.num_heads
        parts = {
            name: {"kernel": shaped(n, h, n // h), "bias": shaped(h, n // h)} for name in ("query", "key", "value")
        }
        return {**parts, "out": {"kernel": shaped(h, n // h, n), "bias": shaped(n)}}
    if hasattr(module, "running_mean"):
        return {name: shaped(module.num_features) for name in ("scale", "bias", "mean", "var")}
    if isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
        return {name: shaped(*module.weight.shape) for name in ("scale", "bias")}
    if hasattr(module, "kernel_size") and hasattr(module, "in_channels"):
        kernel = shaped(*module.kernel_size, module.in_channels // module.groups, module.out_channels)
        return {"kernel": kernel, "bias": shaped(module.out_channels)}
    return {}


def tree_of(net):
    tree = {name: shaped(*x.shape) for name, x in net.named_parameters(recurse=False)}
    covered = ()
    for name, module in net.named_modules():
        held = leaves(module)
        if held and not (covered and name.startswith(covered)):
            *above, own = name.split(".")
            node = tree
            for part in above:
                node = node.setdefault(part, {})
            node[own] = held
            covered = (*covered, f"{name}.")
    return tree


# --- the layers of the twins, channels last ---


def conv(p, x, padding="VALID"):
    kernel = p["kernel"]
    if kernel.ndim == 3:
        return lax.conv_general_dilated(x, kernel, (1,), padding, dimension_numbers=("NWC", "WIO", "NWC")) + p["bias"]
    return lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")) + p["bias"]


def deconv(p, x):
    return lax.conv_transpose(x, p["kernel"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")) + p["bias"]


def dense(p, x):
    return x @ p["kernel"] + p["bias"]


def norm(p, x):
    return (x - p["mean"]) / jnp.sqrt(p["var"] + 1e-5) * p["scale"] + p["bias"]


def layer_norm(p, x):
    x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * p["scale"] + p["bias"]


def flat(x):
    return x.reshape(len(x), -1)


def pool(x, k=2):
    n, h, w, c = x.shape
    return x.reshape(n, h // k, k, w // k, k, c).max((2, 4))


def pixels(x):
    return x.reshape(len(x), -1, x.shape[-1])


def attend(p, x):
    q, k, v = (jnp.einsum("nld,dhe->nlhe", x, p[a]["kernel"]) + p[a]["bias"] for a in ("query", "key", "value"))
    weights = jax.nn.softmax(jnp.einsum("nlhe,nmhe->nhlm", q, k) / q.shape[-1] ** 0.5)
    return jnp.einsum("nlhe,hed->nld", jnp.einsum("nhlm,nmhe->nlhe", weights, v), p["out"]["kernel"]) + p["out"]["bias"]


def shuffled(x, r):
    """`nn.PixelShuffle` with channels last."""
    n, h, w, c = x.shape
    return x.reshape(n, h, w, c // r**2, r, r).transpose(0, 1, 4, 2, 5, 3).reshape(n, h * r, w * r, c // r**2)


relu, tanh = jax.nn.relu, jnp.tanh
rng = np.random.default_rng(0)
IMAGE, SMALL = rng.standard_normal((2, 3, 6, 6)), rng.standard_normal((2, 3, 4, 4))
SERIES, LATENT = rng.standard_normal((2, 3, 8)), rng.standard_normal((2, 6))
FRAMES = rng.standard_normal((2, 2, 3, 6, 6))
TABLE, WORDS, LABELS = rng.standard_normal((2, 12)), rng.standard_normal((2, 7)), np.array([1, 3])
C, L = nn.Conv2d, nn.Linear


def check(net, twin, given, x64, **options):
    """Both compute the same, and the arrays come back bit for bit."""
    net = random(net)
    wanted = net(*(torch.tensor(x) for x in given)).detach().numpy()
    pair = interop.match(net, tree_of(net), **options)
    with x64():
        values = jax.tree.map(jnp.asarray, pair.to_jax(net))
        got = np.asarray(twin(values, *(jnp.asarray(np.moveaxis(x, 1, -1) if x.ndim > 2 else x) for x in given)))
        back = pair.to_torch(values)
    if wanted.ndim > 2:
        wanted = np.moveaxis(wanted, 1, -1)
    np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(back[name], x) for name, x in net.state_dict().items())
