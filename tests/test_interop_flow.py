"""The flow of the data in `interop.match`, in models as they are written: outputs against twins with channels last.

The steps between a convolution and a dense layer are the subject here: batches with frames in them, sizes taken apart,
views that nobody reads, arrays that meet, tokens. What must not be decided is asked, with the remedy in the error.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from funcreg import interop
from images import (
    FRAMES,
    IMAGE,
    LATENT,
    SERIES,
    SMALL,
    C,
    L,
    attend,
    check,
    conv,
    dense,
    flat,
    layer_norm,
    net_of,
    norm,
    pixels,
    relu,
    tanh,
    tree_of,
)
from interop import _flow
from interop._flow.values import Plain


def with_array(forward, *shape, **children):
    net = net_of(forward, **children)
    net.array = nn.Parameter(torch.zeros(*shape))
    return net


def frames(x):
    """What `check` gives for (b, t, c, h, w), the second axis last, as (b, t, h, w, c)."""
    return jnp.moveaxis(jnp.moveaxis(x, -1, 1), 2, -1)


def of_frames(v, x):
    x = frames(x)
    return conv(v["conv"], x.reshape(-1, *x.shape[2:]))


def head_twin(v, x):
    return dense(v["fc"], flat(conv(v["conv"], x)))


def starred(self, x):
    b, t, *_ = x.shape
    y = self.conv(x.flatten(0, 1) * 1.0)
    return self.fc(y.view(b * t, -1)).view(b, t, -1).sum(1)


def rows_of_frames(self, x):
    b, t = x.shape[:2]
    y = self.conv(x.reshape(b * t, *x.shape[2:]))
    return self.fc(y.reshape(y.shape[0], -1)).reshape(b, t, -1).sum(1)


def frames_head(v, x):
    y = dense(v["fc"], flat(of_frames(v, x)))
    return y.reshape(len(x), -1, y.shape[-1]).sum(1)


def pictures(self, x):
    return self.fc(self.conv(x.view(-1, 3, 6, 6)).view(-1, 64))


def folded_back(self, x):
    y = self.conv(x).flatten(2)
    return self.fc(y.view(y.size(0), 4, *x.size()[2:]).amax(3).flatten(1))


def counted(self, x):
    x = self.conv(x)
    count = 1
    for n in x.size()[1:]:
        count *= n
    return self.fc(x.view(-1, count))


def nonlocal_block(self, x):
    x = self.conv(x)
    b = x.size(0)
    q, k, v = (f(x).view(b, 2, -1) for f in (self.q, self.k, self.v))
    y = torch.matmul(torch.softmax(q.transpose(1, 2) @ k, -1), v.permute(0, 2, 1))
    return self.w(y.permute(0, 2, 1).contiguous().view(b, 2, *x.size()[2:])) + x


def nonlocal_twin(v, x):
    x = conv(v["conv"], x)
    q, k, w = (pixels(conv(v[name], x)) for name in "qkv")
    y = jax.nn.softmax(q @ k.swapaxes(1, 2)) @ w
    return conv(v["w"], y.reshape(*x.shape[:3], 2)) + x


def upsampled(self, x):
    x = self.conv(x)
    return self.fc((self.up(F.adaptive_avg_pool2d(x, 1)) + x).flatten(1)) + self.fc(
        F.interpolate(x.mean((2, 3), keepdim=True), size=(4, 4)).flatten(1)
    )


def upsampled_twin(v, x):
    x = conv(v["conv"], x)
    mean = x.mean((1, 2), keepdims=True)
    return dense(v["fc"], flat(mean + x)) + dense(v["fc"], flat(jnp.broadcast_to(mean, x.shape)))


def windows(self, x):
    x = self.conv(x).permute(0, 2, 3, 1)
    b, h, w, c = x.shape
    y = x.view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, 4, c)
    y = (self.fc(y) * y).view(b, h // 2, w // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).contiguous().view(b, h, w, c)
    return self.out(y.flatten(1))


def windows_twin(v, x):
    x = conv(v["conv"], x)
    b, h, w, c = x.shape
    y = x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
    y = (dense(v["fc"], y) * y).reshape(b, h // 2, w // 2, 2, 2, c).transpose(0, 1, 3, 2, 4, 5)
    return dense(v["out"], flat(y))


def on_a_map(self, x):
    t = self.conv(x).flatten(2).transpose(1, 2)
    t = self.norm(t + self.mlp(t))
    b, n, c = t.shape
    return self.fc(self.out(t.transpose(1, 2).reshape(b, c, 4, 4)).flatten(1))


def on_a_map_twin(v, x):
    t = pixels(conv(v["conv"], x))
    t = layer_norm(v["norm"], t + dense(v["mlp"], t))
    return dense(v["fc"], flat(conv(v["out"], t.reshape(len(t), 4, 4, -1))))


def told_by_a_view(self, x, table):
    y = self.conv(x)
    return self.fc(torch.cat([y.view(y.size(0), 4, 4, 4).flatten(1), table], 1))


def told_by_a_view_twin(v, x, table):
    return dense(v["fc"], jnp.concatenate([flat(conv(v["conv"], x)), table], 1))


def two_heads(self, x):
    x = torch.relu(self.conv(x))
    return self.policy(self.p(x).view(-1, 32)) + self.value(self.v(x).view(-1, 16))


def two_heads_twin(v, x):
    x = relu(conv(v["conv"], x))
    return dense(v["policy"], flat(conv(v["p"], x))) + dense(v["value"], flat(conv(v["v"], x)))


def parts(self, x):
    a, b, c = self.conv(x).split([4, 4, 2], dim=1)
    return self.fc(torch.max(a, b).flatten(1)) + self.out(c.flatten(1))


def parts_twin(v, x):
    x = conv(v["conv"], x)
    y = jnp.maximum(x[..., :4], x[..., 4:8])
    return dense(v["fc"], flat(y)) + dense(v["out"], flat(x[..., 8:]))


def words(self, x):
    x = self.emb(x.long()).unsqueeze(1)
    y = [torch.relu(f(x)).squeeze(3) for f in self.convs]
    return self.fc(torch.cat([F.max_pool1d(one, one.size(2)).squeeze(2) for one in y], 1))


def words_twin(v, x):
    x = v["emb"]["embedding"][x.astype(int)][..., None]
    y = [relu(conv(v["convs"][k], x)).max((1, 2)) for k in ("0", "1")]
    return dense(v["fc"], jnp.concatenate(y, 1))


def conditional(self, x, table):
    label = self.label(table).view(-1, 1, 4, 4)
    return self.fc(self.conv(torch.cat([x, label], 1)).flatten(1))


def conditional_twin(v, x, table):
    label = dense(v["label"], table).reshape(-1, 4, 4, 1)
    return dense(v["fc"], flat(conv(v["conv"], jnp.concatenate([x, label], -1))))


def decoder(self, z):
    h = torch.relu(self.bn(self.fc(z)))
    return self.out(F.silu(F.interpolate(self.gn(h.unflatten(1, (4, 2, 2))), scale_factor=1)))


def decoder_twin(v, z):
    y = relu(norm(v["bn"], dense(v["fc"], z))).reshape(-1, 2, 2, 4)
    n = y.reshape(len(y), 4, 2, 2)  # two groups of two channels
    mean, var = n.mean((1, 3), keepdims=True), n.var((1, 3), keepdims=True)
    y = ((n - mean) / jnp.sqrt(var + 1e-5)).reshape(y.shape) * v["gn"]["scale"] + v["gn"]["bias"]
    return conv(v["out"], jax.nn.silu(y))


def crnn(self, x):
    x = self.conv(x.transpose(1, 2)).transpose(1, 2)
    x = self.again(torch.tanh(self.mid(x)).transpose(1, 2))
    return self.fc(x.flatten(1))


def crnn_twin(v, x):  # `check` gives (n, 8, 3) for (n, 3, 8)
    x = conv(v["conv"], x.swapaxes(1, 2))
    return dense(v["fc"], flat(conv(v["again"], tanh(dense(v["mid"], x)))))


# name: the model, its twin, what both are given; images and series get channels last.
DECIDED = {
    "frames, the shape unpacked with a star": (
        lambda: net_of(starred, conv=C(3, 4, 3), fc=L(64, 5)), frames_head, (FRAMES,),
    ),
    "frames, the rest of the shape as it is": (
        lambda: net_of(rows_of_frames, conv=C(3, 4, 3), fc=L(64, 5)), frames_head, (FRAMES,),
    ),
    "pictures of one batch, both views with -1": (
        lambda: net_of(pictures, conv=C(3, 4, 3), fc=L(64, 5)), head_twin, (IMAGE,),
    ),
    "an image again, by the shape of another": (
        lambda: net_of(folded_back, conv=C(3, 4, 3, padding=1), fc=L(24, 5)),
        lambda v, x: dense(v["fc"], flat(conv(v["conv"], x, "SAME").max(2))), (IMAGE,),
    ),
    "features counted in a loop": (
        lambda: net_of(counted, conv=C(3, 4, 3), fc=L(64, 5)), head_twin, (IMAGE,),
    ),
    "a nonlocal block": (
        lambda: net_of(nonlocal_block, conv=C(3, 4, 3), q=C(4, 2, 1), k=C(4, 2, 1), v=C(4, 2, 1), w=C(2, 4, 1)),
        nonlocal_twin, (IMAGE,),
    ),
    "one place made many": (
        lambda: net_of(upsampled, conv=C(3, 4, 3), up=nn.Upsample(scale_factor=4), fc=L(64, 5)), upsampled_twin,
        (IMAGE,),
    ),
    "windows of tokens": (
        lambda: net_of(windows, conv=C(3, 4, 3), fc=L(4, 4), out=L(64, 5)), windows_twin, (IMAGE,),
    ),
    "tokens on a map again": (
        lambda: net_of(
            on_a_map, conv=C(3, 8, 3), mlp=L(8, 8), norm=nn.LayerNorm(8), out=C(8, 4, 1), fc=L(64, 5)
        ),
        on_a_map_twin, (IMAGE,),
    ),
    "heads of two channels and of one": (
        lambda: net_of(two_heads, conv=C(3, 4, 3), p=C(4, 2, 1), v=C(4, 1, 1), policy=L(32, 5), value=L(16, 5)),
        two_heads_twin, (IMAGE,),
    ),
    "parts of the channels": (
        lambda: net_of(parts, conv=C(3, 10, 3), fc=L(64, 5), out=L(32, 5)), parts_twin, (IMAGE,),
    ),
    "an embedding as an image of one channel": (
        lambda: net_of(
            words, emb=nn.Embedding(9, 3), convs=nn.ModuleList([C(1, 4, (2, 3)), C(1, 4, (3, 3))]), fc=L(8, 5)
        ),
        words_twin, (np.arange(14).reshape(2, 7) % 9 * 1.0,),
    ),
    "an input beside an image": (
        lambda: net_of(conditional, label=L(12, 16), conv=C(4, 4, 1), fc=L(64, 5)), conditional_twin,
        (SMALL, np.ones((2, 12))),
    ),
    "a decoder with both norms": (
        lambda: net_of(decoder, fc=L(6, 16), bn=nn.BatchNorm1d(16), gn=nn.GroupNorm(2, 4), out=C(4, 3, 1)),
        decoder_twin, (LATENT,),
    ),
    "an output of channels last, made an image": (
        lambda: net_of(
            lambda self, z: self.conv(self.fc(z).view(-1, 4, 4, 3).permute(0, 3, 1, 2)), fc=L(6, 48), conv=C(3, 2, 1)
        ),
        lambda v, z: conv(v["conv"], dense(v["fc"], z).reshape(-1, 4, 4, 3)), (LATENT,),
    ),
    "a series through dense layers and back": (
        lambda: net_of(crnn, conv=nn.Conv1d(8, 4, 1), mid=L(4, 6), again=nn.Conv1d(6, 2, 1), fc=L(6, 5)), crnn_twin,
        (SERIES,),
    ),
    "a size that a view tells": (
        lambda: net_of(told_by_a_view, conv=C(3, 4, 3), fc=L(76, 5)), told_by_a_view_twin, (IMAGE, np.ones((2, 12))),
    ),
    "a map of the mean over channels": (
        lambda: net_of(lambda self, x: self.fc(self.conv(x).mean(1).flatten(1)), conv=C(3, 4, 3), fc=L(16, 5)),
        lambda v, x: dense(v["fc"], flat(conv(v["conv"], x).mean(-1))), (IMAGE,),
    ),
    "the mean over channels, kept": (
        lambda: net_of(lambda self, x: self.fc(self.conv(x).mean(1, keepdim=True).flatten(1)), conv=C(3, 4, 3),
            fc=L(16, 5)),
        lambda v, x: dense(v["fc"], flat(conv(v["conv"], x).mean(-1))), (IMAGE,),
    ),
    "some of the channels": (
        lambda: net_of(lambda self, x: self.fc(self.conv(x)[:, 1:5].flatten(1)), conv=C(3, 6, 3), fc=L(64, 5)),
        lambda v, x: dense(v["fc"], flat(conv(v["conv"], x)[..., 1:5])), (IMAGE,),
    ),
    "channels told by a part of the shape": (
        lambda: net_of(
            lambda self, x: (lambda y: self.fc(y.reshape(y.size(0), y.shape[1:][0], -1).flatten(1)))(self.conv(x)),
            conv=C(3, 4, 3), fc=L(64, 5),
        ),
        head_twin, (IMAGE,),
    ),
    "a forecast, in a model without convolutions": (
        lambda: net_of(lambda self, z: self.out(torch.relu(self.fc(z))).view(-1, 4, 3), fc=L(6, 5), out=L(5, 12)),
        lambda v, z: jnp.moveaxis(dense(v["out"], relu(dense(v["fc"], z))).reshape(-1, 4, 3), 1, -1), (LATENT,),
    ),
    "channels moved to the end": (
        lambda: net_of(lambda self, x: self.fc(self.conv(x).movedim(1, -1).flatten(1)), conv=C(3, 4, 3), fc=L(64, 5)),
        head_twin, (IMAGE,),
    ),
    "a shuffle and a response norm of no effect": (
        lambda: net_of(
            lambda self, x: self.fc(self.norm(self.shuffle(self.conv(x))).flatten(1)), conv=C(3, 4, 3),
            shuffle=nn.ChannelShuffle(2), norm=nn.LocalResponseNorm(2, alpha=0.0), fc=L(64, 5),
        ),
        lambda v, x: dense(v["fc"], flat(conv(v["conv"], x)[..., np.array([0, 2, 1, 3])])), (IMAGE,),
    ),
    "a positional array on one place": (
        lambda: with_array(
            lambda self, x: self.fc((F.adaptive_avg_pool2d(self.conv(x), 1) + self.array).flatten(1)), 1, 4, 2, 8,
            conv=C(3, 4, 3), fc=L(64, 5),
        ),
        lambda v, x: dense(
            v["fc"], flat(conv(v["conv"], x).mean((1, 2), keepdims=True) + jnp.moveaxis(v["array"], 1, -1))
        ),
        (IMAGE,),
    ),
}  # fmt: skip


@pytest.mark.relaxed_promotion
@pytest.mark.parametrize("name", DECIDED)
def test_what_the_flow_tells(name, x64):
    make, twin, given = DECIDED[name]
    check(make(), twin, given, x64)


class Branch(nn.Module):
    """Control flow that depends on values: it cannot be traced."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) if x.sum() < 1e9 else x


def attended(self, x):
    t = self.conv(x)
    return self.fc(self.attn(t, t, t, need_weights=False)[0].flatten(1))


def returned_twin(v, x):
    y = flat(relu(conv(v["conv"], x)))
    return dense(v["out"], relu(dense(v["fc"], y))).reshape(-1, 4, 4, 3)


def returned(self, x):
    y = torch.relu(self.conv(x)).flatten(1)
    return self.out(torch.relu(self.fc(y))).view(-1, 3, 4, 4)


def boxes(self, x):
    y = torch.relu(self.conv(x)).flatten(1)
    return self.out(torch.relu(self.fc(y))).view(-1, 4, 4, 3).sigmoid()


def boxes_twin(v, x):  # returned as in PyTorch, of which `check` moves the second axis
    return jnp.moveaxis(jax.nn.sigmoid(returned_twin(v, x)), 1, -1)


def over_places(self, x):
    return self.out(self.fc(self.conv(x).flatten(2)).flatten(1))


def over_places_twin(v, x):
    return dense(v["out"], flat(dense(v["fc"], pixels(conv(v["conv"], x)).swapaxes(1, 2))))


def two_writers(self, z):
    h = torch.cat([self.a(z), self.b(z)], 1)
    return self.conv(h.view(z.size(0), 8, 2, 2))


def two_writers_twin(v, z):
    h = jnp.concatenate([dense(v["a"], z), dense(v["b"], z)], 1)
    return conv(v["conv"], jnp.moveaxis(h.reshape(-1, 8, 2, 2), 1, -1))


def patches(self, z):
    y = self.fc(z).view(-1, 2, 2, 3, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, 4, 4)
    return self.conv(y)


def patches_twin(v, z):
    y = dense(v["fc"], z).reshape(-1, 2, 2, 3, 2, 2).transpose(0, 1, 4, 2, 5, 3).reshape(-1, 4, 4, 3)
    return conv(v["conv"], y)


def flipped_view(self, z):
    return self.conv(torch.flip(self.fc(z).view(-1, 4, 4, 4), [1])[:, :2])


def flipped_view_twin(v, z):
    return conv(v["conv"], dense(v["fc"], z).reshape(-1, 4, 4, 4)[..., ::-1][..., :2])


def bare_twin(v, x):
    return jnp.moveaxis(conv(v["conv"], x), -1, 1).reshape(len(x), -1) @ v["array"]


def taken_out(self, x):
    return self.fc(self.conv(x.view(-1, 3, 6, 6)).view(x.shape[0], 2, -1)).sum(1)


def taken_out_by_numbers(self, x):
    return self.fc(self.conv(x.flatten(0, 1)).view(-1, 2, 32)).sum(1)


def taken_out_of_rows(self, x):
    return self.fc(self.conv(x.flatten(0, 1)).view(-1, 64))


def taken_out_twin(v, x):
    y = dense(v["fc"], flat(of_frames(v, x)))
    return y.reshape(len(x), 2, -1).sum(1)


def pooled_columns(self, x):
    x = self.conv(x).permute(0, 2, 1, 3).contiguous()
    return self.fc(x.view(x.size(0), x.size(1), -1)).sum(1)


def frames_in_columns(self, z):
    return self.conv(self.fc(z).view(z.size(0) * 2, -1, 4, 4)).view(z.size(0), 2, 3, -1).mean((1, 3))


def frames_in_columns_twin(v, z):
    y = jnp.moveaxis(dense(v["fc"], z).reshape(-1, 4, 4, 4), 1, -1)
    return conv(v["conv"], y).reshape(len(z), -1, 3).mean(1)


# name: the model, its twin, inputs, what the error says, and the remedy in it that is right for this twin
ASKED = {
    "an image that the model returns": (
        lambda: net_of(returned, conv=C(3, 4, 3), fc=L(64, 5), out=L(5, 48)), returned_twin, (IMAGE,),
        ("out gives 48 features, perhaps an image of the 3 channels that the model returns", "{'out': (None, 3)}"),
        {"out": (None, 3)},
    ),
    "a grid of boxes that the model returns": (
        lambda: net_of(boxes, conv=C(3, 4, 3), fc=L(64, 5), out=L(5, 48)), boxes_twin, (IMAGE,),
        ("out gives 48 features, perhaps an image of the 4 channels that the model returns", "{'out': None}"),
        {"out": None},
    ),
    "an image from a model without convolutions": (
        lambda: net_of(lambda self, z: self.fc(z).view(z.size(0), *(3, 4, 4)), fc=L(6, 48)),
        lambda v, z: dense(v["fc"], z).reshape(-1, 4, 4, 3), (LATENT,), ("that the model returns",), {"fc": (None, 3)},
    ),
    "a series that the model returns beside a convolution": (
        lambda: net_of(lambda self, x: self.fc(self.conv(x).mean(2)).view(-1, 4, 3), conv=nn.Conv1d(3, 2, 1),
            fc=L(2, 12)),
        lambda v, x: dense(v["fc"], conv(v["conv"], x).mean(1)).reshape(-1, 3, 4), (SERIES,),
        ("4 channels that the model returns",), {"fc": (None, 4)},
    ),
    "places in another order": (
        lambda: net_of(lambda self, x: self.fc(self.conv(x).transpose(1, 3).flatten(1)), conv=C(3, 4, 3), fc=L(64, 5)),
        lambda v, x: dense(v["fc"], flat(conv(v["conv"], x).swapaxes(1, 2))), (IMAGE,),
        ("fc reads 64 features, perhaps 4 channels flattened",), {"fc": None},
    ),
    "a dense layer over the places, flattened": (
        lambda: net_of(over_places, conv=C(3, 4, 3), fc=L(16, 7), out=L(28, 5)), over_places_twin, (IMAGE,),
        ("out reads 28 features, perhaps 4 channels flattened",), {"out": None},
    ),
    "an image of two layers": (
        lambda: net_of(two_writers, a=L(6, 16), b=L(6, 16), conv=C(8, 3, 1)), two_writers_twin, (LATENT,),
        ("a writes a part of an image", "b writes a part of an image", "flatten={'a': None}"), {"[ab]": None},
    ),
    "patches put together": (
        lambda: net_of(patches, fc=L(6, 48), conv=C(3, 2, 1)), patches_twin, (LATENT,),
        ("fc writes a part of an image", "flatten={'fc': None}"), {"fc": None},
    ),
    "an unknown step behind a view, fewer channels behind that": (
        lambda: net_of(flipped_view, fc=L(6, 64), conv=C(2, 3, 1)), flipped_view_twin, (LATENT,),
        ("perhaps an image of the 4 channels that conv reads", "flatten={'fc': (None, 4)}"), {"fc": (None, 4)},
    ),
    "frames taken out of a batch of -1": (
        lambda: net_of(taken_out, conv=C(3, 2, 3), fc=L(32, 5)), taken_out_twin, (FRAMES,),
        ("fc reads 32 features, perhaps 2 channels flattened", "flatten={'fc': 2}"), {"fc": 2},
    ),
    "frames taken out by numbers": (
        lambda: net_of(taken_out_by_numbers, conv=C(3, 2, 3), fc=L(32, 5)), taken_out_twin, (FRAMES,),
        ("flatten={'fc': 2}",), {"fc": 2},
    ),
    "channels of one count and of another": (
        lambda: net_of(lambda self, x: self.fc(self.branch(x)), fc=L(64, 5),
            branch=Branch(nn.Sequential(C(3, 64, 1), C(64, 4, 3), nn.Flatten()))),
        lambda v, x: dense(v["fc"], flat(conv(v["branch"]["inner"]["1"], conv(v["branch"]["inner"]["0"], x)))),
        (IMAGE,), ("flatten={'fc': 4}",), {"fc": 4},
    ),
    "a table beside an unknown step": (
        lambda: net_of(
            lambda self, x, t: self.fc(torch.cat([torch.cumsum(self.conv(x), 1).flatten(1), t], 1)), conv=C(3, 4, 3),
            fc=L(71, 5),
        ),
        lambda v, x, t: dense(v["fc"], jnp.concatenate([flat(jnp.cumsum(conv(v["conv"], x), -1)), t], 1)),
        (IMAGE, np.ones((2, 7))), ("fc reads 71 features, perhaps with an image flattened",),
        {"fc": [(4, 64), (None, 7)]},
    ),
    "an array that scales flattened features": (
        lambda: with_array(lambda self, x: self.fc(self.conv(x).flatten(1) * self.array), 64, conv=C(3, 4, 3),
            fc=L(64, 5)),
        lambda v, x: dense(v["fc"], flat(conv(v["conv"], x) * jnp.moveaxis(v["array"].reshape(4, 4, 4), 0, -1))),
        (IMAGE,), ("array meets 4 channels flattened", "flatten={'fc': 4}"), {"fc": 4, "array": None},
    ),
    "another batch": (
        lambda: net_of(
            lambda self, x: self.fc(torch.cat([self.conv(x), self.conv(-x)], 0).view(x.size(0), -1)), conv=C(3, 4, 3),
            fc=L(128, 5),
        ),
        lambda v, x: dense(v["fc"], jnp.concatenate([conv(v["conv"], x), conv(v["conv"], -x)]).reshape(len(x), -1)),
        (IMAGE,), ("fc reads 128 features",), {"fc": [(4, 64), (4, 64)]},
    ),
    "attention over channels": (
        lambda: net_of(attended, conv=nn.Conv1d(3, 4, 1), attn=nn.MultiheadAttention(8, 2, batch_first=True),
            fc=L(32, 5)),
        lambda v, x: dense(v["fc"], flat(attend(v["attn"], conv(v["conv"], x).swapaxes(1, 2)))), (SERIES,),
        ("fc reads 32 features, perhaps 4 channels flattened",), {"fc": None},
    ),
    "three axes by -1": (
        lambda: net_of(lambda self, x: self.fc(self.conv(x).view(-1, 4, 16)).sum(1), conv=C(3, 4, 3), fc=L(16, 5)),
        lambda v, x: dense(v["fc"], pixels(conv(v["conv"], x)).swapaxes(1, 2)).sum(1), (IMAGE,),
        ("fc reads 16 features, perhaps 4 channels flattened",), {"fc": None},
    ),
    "frames side by side": (
        lambda: net_of(taken_out_of_rows, conv=C(3, 2, 3), fc=L(64, 5)),
        lambda v, x: dense(v["fc"], of_frames(v, x).reshape(len(x), -1)), (FRAMES,), ("flatten={'fc': 2}",),
        {"fc": [(2, 32), (2, 32)]},
    ),
    "channels and columns": (
        lambda: net_of(pooled_columns, conv=C(3, 4, 3), fc=L(16, 5)),
        lambda v, x: dense(v["fc"], conv(v["conv"], x).swapaxes(2, 3).reshape(len(x), 4, -1)).sum(1), (IMAGE,),
        ("fc reads 16 features, perhaps 4 channels flattened",), {"fc": None},
    ),
    "an array of the model's own": (
        lambda: with_array(lambda self, x: self.conv(x).flatten(1) @ self.array, 64, 5, conv=C(3, 4, 3)), bare_twin,
        (IMAGE,), ("array meets 4 channels flattened, and no option permutes it", "flatten={'array': None}"),
        {"array": None},
    ),
    "frames in the columns": (
        lambda: net_of(frames_in_columns, fc=L(6, 128), conv=C(4, 3, 1)), frames_in_columns_twin, (LATENT,),
        ("fc writes a part of an image, or several", "flatten={'fc': None}"), {"fc": None},
    ),
    "flattened with the batch": (
        lambda: net_of(lambda self, x: self.fc(torch.flatten(self.conv(x))), conv=C(3, 4, 3), fc=L(64, 5)),
        lambda v, x: dense(v["fc"], conv(v["conv"], x).reshape(-1)), (IMAGE[:1],), ("flatten={'fc': 4}",), {"fc": 4},
    ),
    "a flattened image in parts of another length": (
        lambda: net_of(lambda self, x: self.fc(self.conv(x).flatten(1).view(x.size(0), 8, -1)).sum(1),
            conv=C(3, 4, 3), fc=L(8, 5)),
        lambda v, x: dense(v["fc"], jnp.moveaxis(conv(v["conv"], x), -1, 1).reshape(-1, 8, 8)).sum(1), (IMAGE,),
        ("fc reads 8 features, perhaps 4 channels flattened",), {"fc": None},
    ),
    "a layer that forward does not call": (
        lambda: net_of(lambda self, x: self.conv(x).mean((2, 3)), conv=C(3, 4, 3), fc=L(64, 5)),
        lambda v, x: conv(v["conv"], x).mean((1, 2)), (IMAGE,),
        ("fc reads 64 features, perhaps 4 channels flattened: forward does not call it",), {"fc": None},
    ),
}  # fmt: skip


@pytest.mark.relaxed_promotion
@pytest.mark.parametrize("name", ASKED)
def test_what_the_flow_does_not_tell_is_asked(name, x64):
    make, twin, given, texts, remedy = ASKED[name]
    net = make()
    with pytest.raises(ValueError) as error:
        interop.match(net, tree_of(net))
    for text in texts:
        assert text in str(error.value)
    check(net, twin, given, x64, flatten=remedy)


def test_a_layer_of_pytorchs_with_layers_inside_is_not_taken_to_read_tokens():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.layer = C(3, 4, 3), nn.TransformerEncoderLayer(64, 2, 8, batch_first=True)

        def forward(self, x):
            return self.layer(self.conv(x).flatten(1).unsqueeze(1))

    assert all(not isinstance(x, Plain) for x in _flow.flow(Net()).read["layer.linear1"])


def test_a_flattened_input_is_noted_unless_an_option_speaks_of_it():
    net = nn.Sequential(nn.Flatten(), L(48, 4), nn.ReLU(), L(4, 2))
    (note,) = [note for note in interop.match(net, tree_of(net)).notes if "flattened" in note]
    assert note.startswith("1 reads an input of the model flattened") and "flatten={'1': channels}" in note
    for remedy in (3, None):
        assert not [note for note in interop.match(net, tree_of(net), flatten={"1": remedy}).notes if "flat" in note]
    assert "rows permuted (3 channels x 16)" in str(interop.match(net, tree_of(net), flatten={"1": 3}))


def cut_by_views(x):
    x = x.reshape(x.shape[0], 3, 2, 2, 2, 2).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(x.shape[0], 4, 12)


@pytest.mark.parametrize("cut", [lambda x: F.unfold(x, 2, stride=2).transpose(1, 2), cut_by_views])
def test_an_input_that_is_cut_into_patches_is_noted(cut):
    net = net_of(lambda self, x: self.fc(torch.relu(self.patch(cut(x)))), patch=L(12, 4), fc=L(4, 2))
    (note,) = [note for note in interop.match(net, tree_of(net)).notes if "pieces" in note]
    assert note.startswith("patch reads an input of the model cut into pieces") and "flatten={'patch': ch" in note
    assert "rows permuted (3 channels x 4)" in str(interop.match(net, tree_of(net), flatten={"patch": 3}))
    tokens = net_of(lambda self, x: self.fc(self.patch(x.view(2, 2, 12))), patch=L(12, 4), fc=L(4, 2))
    assert not [note for note in interop.match(tokens, tree_of(tokens)).notes if "pieces" in note]
