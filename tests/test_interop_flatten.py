"""Flattens in `interop.match`: what the data flow tells, by outputs against twins with channels last; what is asked."""

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
    LABELS,
    LATENT,
    SERIES,
    SMALL,
    TABLE,
    WORDS,
    C,
    L,
    attend,
    check,
    conv,
    deconv,
    dense,
    flat,
    layer_norm,
    net_of,
    norm,
    pixels,
    pool,
    random,
    relu,
    shaped,
    shuffled,
    tanh,
    tree_of,
)


class Lenet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.fc1, self.fc2 = C(3, 6, 3), C(6, 4, 1), L(16, 8), L(8, 5)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = torch.relu(self.conv2(x))
        x = x.view(-1, self.flat_features(x))
        return self.fc2(F.dropout(F.relu(self.fc1(x)), training=self.training))

    def flat_features(self, x):
        return 4 * 2 * 2


class Attention(nn.Module):
    """With heads, as in vision transformers."""

    def __init__(self, d, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, L(d, 3 * d), L(d, d)

    def forward(self, x):
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = (q @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        return self.proj(x.transpose(1, 2).reshape(b, n, d))


def vit_twin(v, x):
    x = pixels(conv(v["embed"], x))
    b, n, d = x.shape
    q, k, w = dense(v["attn"]["qkv"], x).reshape(b, n, 3, 2, d // 2).transpose(2, 0, 3, 1, 4)
    y = (jax.nn.softmax(q @ k.swapaxes(-2, -1)) @ w).swapaxes(1, 2).reshape(b, n, d)
    x = x + dense(v["attn"]["proj"], y)
    x = x + dense(v["mlp"]["2"], jax.nn.gelu(dense(v["mlp"]["0"], x), approximate=False))
    return dense(v["head"], layer_norm(v["norm"], x).mean(1))


def vit_forward(self, x):
    x = self.embed(x).flatten(2).transpose(1, 2)
    x = x + self.attn(x)
    x = x + self.mlp(x)
    return self.head(self.norm(x).mean(dim=1))


def vit():
    mlp = nn.Sequential(L(4, 16), nn.GELU(), L(16, 4))
    return net_of(vit_forward, embed=C(3, 4, 3), attn=Attention(4, 2), mlp=mlp, norm=nn.LayerNorm(4), head=L(4, 5))


def vae_forward(self, x):
    h = F.relu(self.conv(x)).flatten(1)
    mu, logvar = self.mu(h), self.logvar(h)
    z = mu + torch.exp(0.5 * logvar) * 0.1
    y = self.bn(self.project(z)).relu().view(-1, 4, 4, 4)
    return self.deconv(y)


def vae_twin(v, x):
    h = flat(relu(conv(v["conv"], x)))
    z = dense(v["mu"], h) + jnp.exp(0.5 * dense(v["logvar"], h)) * 0.1
    y = relu(norm(v["bn"], dense(v["project"], z))).reshape(-1, 4, 4, 4)
    return deconv(v["deconv"], y)


def gated_forward(self, x):
    x = torch.relu(self.conv(x))
    b, c, _, _ = x.size()
    gate = self.fc2(torch.relu(self.fc1(x.mean((2, 3))))).sigmoid().view(b, c, 1, 1)
    return self.head((x * gate.expand_as(x)).flatten(1))


def gated_twin(v, x):
    x = relu(conv(v["conv"], x))
    gate = jax.nn.sigmoid(dense(v["fc2"], relu(dense(v["fc1"], x.mean((1, 2))))))
    return dense(v["head"], flat(x * gate[:, None, None]))


def squeezed_forward(self, x):
    x = torch.relu(self.conv(x))
    return self.head((x * self.se(x)[:, :, None, None]).flatten(1))


def chunked_forward(self, x):
    a, b = self.conv(x).chunk(2, 1)
    return self.fc((a * b).flatten(1))


def film_forward(self, x, t):
    scale, shift = self.film(t).chunk(2, dim=-1)
    y = self.conv(x) * scale[..., None, None] + shift.unsqueeze(-1).unsqueeze(-1)
    return self.out(torch.tanh(self.fc(y.mean((-1, -2)))))


def film_twin(v, x, t):
    scale, shift = jnp.split(dense(v["film"], t)[:, None, None], 2, -1)
    return dense(v["out"], tanh(dense(v["fc"], (conv(v["conv"], x) * scale + shift).mean((1, 2)))))


def convnext_forward(self, x):
    y = self.conv(x)
    y = y + self.fc2(F.gelu(self.fc1(self.norm(y.permute(0, 2, 3, 1))))).permute(0, 3, 1, 2)
    return self.head(y.flatten(1))


def convnext_twin(v, x):
    y = conv(v["conv"], x)
    y = y + dense(v["fc2"], jax.nn.gelu(dense(v["fc1"], layer_norm(v["norm"], y)), approximate=False))
    return dense(v["head"], flat(y))


def mixer_forward(self, x):
    x = self.conv(x).flatten(2).transpose(1, 2)
    x = x + self.mix2(F.gelu(self.mix1(x.transpose(1, 2)))).transpose(1, 2)
    return self.head(self.norm(x).mean(1))


def mixer_twin(v, x):
    x = pixels(conv(v["conv"], x))
    y = jax.nn.gelu(dense(v["mix1"], x.swapaxes(1, 2)), approximate=False)
    x = x + dense(v["mix2"], y).swapaxes(1, 2)
    return dense(v["head"], layer_norm(v["norm"], x).mean(1))


def resnet_forward(self, x):
    x = F.relu(self.bn(self.conv1(x)))
    x = F.relu(x + self.conv2(x))
    return self.fc(torch.flatten(self.pool(x), 1))


def autoencoder():
    encoder = nn.Sequential(C(3, 4, 3), nn.ReLU(), nn.Flatten(), L(64, 6))
    decoder = nn.Sequential(L(6, 64), nn.ReLU(), nn.Unflatten(1, (4, 4, 4)), nn.ConvTranspose2d(4, 3, 3))
    return nn.Sequential(encoder, decoder)


def autoencoder_twin(v, x):
    z = dense(v["0"]["3"], flat(relu(conv(v["0"]["0"], x))))
    return deconv(v["1"]["3"], relu(dense(v["1"]["0"], z)).reshape(-1, 4, 4, 4))


def pooled_forward(self, x):
    x = F.max_pool2d(x, 2)
    return self.fc(self.conv(x).flatten(1)) + self.skip(x.flatten(1))


def optional_forward(self, x, mask=None, raw=False):
    if raw:
        return x
    if mask is not None:
        x = x * mask
    return self.fc(self.conv(x).flatten(1))


class Cbam(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.mlp, self.space = nn.Sequential(L(c, 2), nn.ReLU(), L(2, c)), C(2, 1, 1)

    def forward(self, x):
        gate = self.mlp(F.adaptive_avg_pool2d(x, 1).flatten(1)) + self.mlp(x.amax((2, 3)))
        x = x * torch.sigmoid(gate).unsqueeze(2).unsqueeze(3).expand_as(x)
        y = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], 1)
        return x * self.space(y).sigmoid()


def cbam_twin(v, x):
    x = conv(v["0"], x)
    first, second = v["1"]["mlp"]["0"], v["1"]["mlp"]["2"]
    gate = sum(dense(second, relu(dense(first, y))) for y in (x.mean((1, 2)), x.max((1, 2))))
    x = x * jax.nn.sigmoid(gate)[:, None, None]
    y = jnp.stack([x.mean(-1), x.max(-1)], -1)
    return dense(v["3"], flat(x * jax.nn.sigmoid(conv(v["1"]["space"], y))))


def residual_forward(self, x):
    h = self.conv(x).flatten(1)
    return self.out(h + self.fc(h))


def pyramid_forward(self, x):
    y = self.conv(x)
    return self.fc(torch.cat([F.adaptive_max_pool2d(y, k).flatten(1) for k in (1, 2)], 1))


def towers(self, image, words):
    return self.head(self.conv(image).flatten(1)) + self.text(words)


def generator(self, z):
    return self.deconv(self.project(z).view(-1, 4, 4, 4))


def conditioned(self, z, label):
    return self.deconv(torch.relu(self.project(torch.cat([z, self.embed(label)], 1))).view(z.size(0), 4, 4, 4))


def cat_heads(self, x, table):
    return self.fc(torch.cat([self.conv(x).flatten(1), table], 1))


# name: the model, its twin, what both are given; images and series get channels last.
DECIDED = {
    "gate between conv and head": (
        lambda: net_of(gated_forward, conv=C(3, 8, 3), fc1=L(8, 2), fc2=L(2, 8), head=L(128, 5)),
        gated_twin, (IMAGE,),
    ),
    "gate of modules": (
        lambda: net_of(
            squeezed_forward, conv=C(3, 8, 3), head=L(128, 5),
            se=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), L(8, 2), nn.ReLU(), L(2, 8), nn.Sigmoid()),
        ),
        lambda v, x: gated_twin({**v, "fc1": v["se"]["2"], "fc2": v["se"]["4"]}, x), (IMAGE,),
    ),
    "channel-last mlp": (
        lambda: net_of(
            convnext_forward, conv=C(3, 4, 3), norm=nn.LayerNorm(4), fc1=L(4, 16), fc2=L(16, 4), head=L(64, 5)
        ),
        convnext_twin, (IMAGE,),
    ),
    "flattened with channels last": (
        lambda: net_of(lambda self, x: self.fc(self.conv(x).permute(0, 2, 3, 1).flatten(1)),
            conv=C(3, 4, 3), fc=L(64, 5)),
        lambda v, x: dense(v["fc"], flat(conv(v["conv"], x))), (IMAGE,),
    ),
    "attention over pixels": (
        lambda: net_of(
            lambda self, x: (
                lambda t: self.fc(self.attn(t, t, t, need_weights=False)[0].flatten(1))
            )(self.conv(x).flatten(2).transpose(1, 2)),
            conv=C(3, 4, 3), attn=nn.MultiheadAttention(4, 2, batch_first=True), fc=L(64, 5),
        ),
        lambda v, x: dense(v["fc"], flat(attend(v["attn"], pixels(conv(v["conv"], x))))), (IMAGE,),
    ),
    "two heads on differently pooled maps": (
        lambda: net_of(
            lambda self, x: (lambda y: self.coarse(F.max_pool2d(y, 2).flatten(1)) + self.fine(y.flatten(1)))(
                self.conv(x)
            ),
            conv=C(3, 4, 3), coarse=L(16, 5), fine=L(64, 5),
        ),
        lambda v, x: dense(v["coarse"], flat(pool(conv(v["conv"], x)))) + dense(v["fine"], flat(conv(v["conv"], x))),
        (IMAGE,),
    ),
    "head defined before the convolution": (
        lambda: net_of(lambda self, x: self.fc(self.conv(x).flatten(1)), fc=L(64, 5), conv=C(3, 4, 3)),
        lambda v, x: dense(v["fc"], flat(conv(v["conv"], x))), (IMAGE,),
    ),
    "towers": (
        lambda: net_of(towers, conv=C(3, 4, 3), text=L(7, 5), head=L(64, 5)),
        lambda v, x, t: dense(v["head"], flat(conv(v["conv"], x))) + dense(v["text"], t), (IMAGE, WORDS),
    ),
    "towers, sixteen words": (
        lambda: net_of(towers, conv=C(3, 4, 3), text=L(16, 7), head=L(64, 7)),
        lambda v, x, t: dense(v["head"], flat(conv(v["conv"], x))) + dense(v["text"], t),
        (IMAGE, np.arange(32.0).reshape(2, 16)),
    ),
    "global pool and a table": (
        lambda: net_of(
            lambda self, x, t: self.fc(torch.cat([self.conv(x).mean(dim=(2, 3)), t], dim=1)),
                conv=C(3, 4, 3), fc=L(16, 5)
        ),
        lambda v, x, t: dense(v["fc"], jnp.concatenate([conv(v["conv"], x).mean((1, 2)), t], 1)), (IMAGE, TABLE),
    ),
    "features and an embedding": (
        lambda: net_of(
            lambda self, x, n: self.fc(torch.cat([self.conv(x).flatten(1), self.embed(n)], 1)),
            conv=C(3, 4, 3), embed=nn.Embedding(5, 8), fc=L(72, 5),
        ),
        lambda v, x, n: dense(v["fc"], jnp.concatenate([flat(conv(v["conv"], x)), v["embed"]["embedding"][n]], 1)),
        (IMAGE, LABELS),
    ),
    "pixel shuffle": (
        lambda: net_of(lambda self, x: self.fc(F.pixel_shuffle(self.conv(x), 2).flatten(1)),
            conv=C(3, 8, 3), fc=L(128, 5)),
        lambda v, x: dense(v["fc"], flat(shuffled(conv(v["conv"], x), 2))), (IMAGE,),
    ),
    "glu": (
        lambda: net_of(lambda self, x: self.fc(F.glu(self.conv(x), 1).flatten(1)), conv=C(3, 8, 3), fc=L(64, 5)),
        lambda v, x: dense(v["fc"], flat(jax.nn.glu(conv(v["conv"], x), -1))), (IMAGE,),
    ),
    "chunks": (
        lambda: net_of(chunked_forward, conv=C(3, 8, 3), fc=L(64, 5)),
        lambda v, x: dense(v["fc"], flat(jnp.prod(jnp.stack(jnp.split(conv(v["conv"], x), 2, -1)), 0))), (IMAGE,),
    ),
    "scales and shifts, and a multiple of the channels that is no flatten": (
        lambda: net_of(film_forward, film=L(7, 8),
            conv=C(3, 4, 3), fc=L(4, 16), out=L(16, 2)), film_twin, (IMAGE, WORDS),
    ),
    "four convolutions side by side": (
        lambda: net_of(
            lambda self, x: self.fc(torch.cat([self.a(x), self.b(x), self.c(x), self.d(x)], 1).flatten(1)),
            a=C(3, 2, 3), b=C(3, 4, 3), c=C(3, 2, 3), d=C(3, 8, 3), fc=L(256, 5),
        ),
        lambda v, x: dense(v["fc"], flat(jnp.concatenate([conv(v[name], x) for name in "abcd"], -1))), (IMAGE,),
    ),
    "token mixing": (
        lambda: net_of(mixer_forward,
            conv=C(3, 4, 1), mix1=L(16, 16), mix2=L(16, 16), norm=nn.LayerNorm(4), head=L(4, 5)),
        mixer_twin, (SMALL,),
    ),
    "generator": (
        lambda: net_of(
            generator, project=nn.Sequential(L(6, 64), nn.ReLU()), deconv=nn.Sequential(nn.ConvTranspose2d(4, 3, 3))
        ),
        lambda v, z: deconv(v["deconv"]["0"], relu(dense(v["project"]["0"], z)).reshape(-1, 4, 4, 4)), (LATENT,),
    ),
    "conditioned generator": (
        lambda: net_of(conditioned, embed=nn.Embedding(5, 2), project=L(8, 64), deconv=nn.ConvTranspose2d(4, 3, 3)),
        lambda v, z, n: deconv(
            v["deconv"],
            relu(dense(v["project"], jnp.concatenate([z, v["embed"]["embedding"][n]], 1))).reshape(-1, 4, 4, 4),
        ),
        (LATENT, LABELS),
    ),
    "vae": (
        lambda: net_of(
            vae_forward, conv=C(3, 4, 3), mu=L(64, 6), logvar=L(64, 6), project=L(6, 64), bn=nn.BatchNorm1d(64),
            deconv=nn.ConvTranspose2d(4, 3, 3),
        ),
        vae_twin, (IMAGE,),
    ),
    "lenet": (
        Lenet,
        lambda v, x: dense(
            v["fc2"], relu(dense(v["fc1"], flat(relu(conv(v["conv2"], pool(relu(conv(v["conv1"], x))))))))
        ),
        (IMAGE,),
    ),
    "sequential with norms and pools": (
        lambda: nn.Sequential(
            C(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.BatchNorm1d(16),
            nn.Dropout(), L(16, 6), nn.ReLU(), L(6, 2),
        ),
        lambda v, x: dense(
            v["9"], relu(dense(v["7"], norm(v["5"], flat(pool(relu(norm(v["1"], conv(v["0"], x))))))))
        ),
        (IMAGE,),
    ),
    "residual, adaptive pool": (
        lambda: net_of(
            resnet_forward, conv1=C(3, 4, 3), bn=nn.BatchNorm2d(4), conv2=C(4, 4, 1), pool=nn.AdaptiveMaxPool2d((1, 1)),
            fc=L(4, 5),
        ),
        lambda v, x: (
            lambda y: dense(v["fc"], relu(y + conv(v["conv2"], y)).max((1, 2)))
        )(relu(norm(v["bn"], conv(v["conv1"], x)))),
        (IMAGE,),
    ),
    "adaptive pool to more than one place": (
        lambda: net_of(
            resnet_forward, conv1=C(3, 4, 3), bn=nn.BatchNorm2d(4), conv2=C(4, 4, 1), pool=nn.AdaptiveMaxPool2d(2),
            fc=L(16, 5),
        ),
        lambda v, x: (
            lambda y: dense(v["fc"], flat(pool(relu(y + conv(v["conv2"], y)))))
        )(relu(norm(v["bn"], conv(v["conv1"], x)))),
        (IMAGE,),
    ),
    "view with sizes": (
        lambda: net_of(lambda self, x: self.fc((lambda y: y.view(y.size(0), -1))(self.conv(x))),
            conv=C(3, 4, 3), fc=L(64, 5)),
        lambda v, x: dense(v["fc"], flat(conv(v["conv"], x))), (IMAGE,),
    ),
    "a series": (
        lambda: net_of(lambda self, x: self.fc(torch.tanh(self.conv(x)).flatten(1)), conv=nn.Conv1d(3, 4, 3),
            fc=L(24, 5)),
        lambda v, x: dense(v["fc"], flat(tanh(conv(v["conv"], x)))), (SERIES,),
    ),
    "a dense layer over the axis of a series": (
        lambda: net_of(lambda self, x: self.fc(self.conv(x)).sum(-1), conv=nn.Conv1d(3, 3, 3), fc=L(6, 5)),
        lambda v, x: dense(v["fc"], conv(v["conv"], x).swapaxes(1, 2)).sum(-1), (SERIES,),
    ),
    "no square": (
        lambda: net_of(
            lambda self, x: self.fc(F.max_pool2d(self.conv(x), (1, 2)).flatten(1)), conv=C(3, 4, 3), fc=L(32, 5)
        ),
        lambda v, x: dense(v["fc"], flat(conv(v["conv"], x).reshape(-1, 4, 2, 2, 4).max(3))), (IMAGE,),
    ),
    "vision transformer": (vit, vit_twin, (IMAGE,)),
    "autoencoder": (autoencoder, autoencoder_twin, (IMAGE,)),
    "the input pooled, and flattened beside a convolution": (
        lambda: net_of(pooled_forward, conv=C(3, 4, 1), fc=L(36, 5), skip=L(27, 5)),
        lambda v, x: dense(v["fc"], flat(conv(v["conv"], pool(x)))) + dense(v["skip"], flat(pool(x))), (IMAGE,),
    ),
    "arguments that may be left out": (
        lambda: net_of(optional_forward, conv=C(3, 4, 3), fc=L(64, 5)),
        lambda v, x: dense(v["fc"], flat(conv(v["conv"], x))), (IMAGE,),
    ),
    "attention of channels and places": (
        lambda: nn.Sequential(C(3, 8, 3), Cbam(8), nn.Flatten(), L(128, 5)), cbam_twin, (IMAGE,),
    ),
    "a dense residual of a flattened image": (
        lambda: net_of(residual_forward, conv=C(3, 4, 3), fc=L(64, 64), out=L(64, 5)),
        lambda v, x: (lambda h: dense(v["out"], h + dense(v["fc"], h)))(flat(conv(v["conv"], x))), (IMAGE,),
    ),
    "spatial pyramid": (
        lambda: net_of(pyramid_forward, conv=C(3, 4, 3), fc=L(20, 5)),
        lambda v, x: (lambda y: dense(v["fc"], jnp.concatenate([y.max((1, 2)), flat(pool(y))], 1)))(conv(v["conv"], x)),
        (IMAGE,),
    ),
    "columns as tokens": (
        lambda: net_of(
            lambda self, x: self.fc(self.conv(x).mean(2).transpose(1, 2).flatten(1)), conv=C(3, 4, 3), fc=L(16, 5)
        ),
        lambda v, x: dense(v["fc"], flat(conv(v["conv"], x).mean(1))), (IMAGE,),
    ),
    "the input flattened beside a convolution": (
        lambda: net_of(
            lambda self, x: self.fc(self.conv(x).flatten(1)) + self.skip(x.flatten(1)), conv=C(3, 4, 3), fc=L(64, 5),
            skip=L(108, 5),
        ),
        lambda v, x: dense(v["fc"], flat(conv(v["conv"], x))) + dense(v["skip"], flat(x)), (IMAGE,),
    ),
}  # fmt: skip


@pytest.mark.relaxed_promotion
@pytest.mark.parametrize("name", DECIDED)
def test_what_the_flow_tells(name, x64):
    make, twin, given = DECIDED[name]
    check(make(), twin, given, x64)


# --- what is asked ---


class Branch(nn.Module):
    """Control flow that depends on values: it cannot be traced."""

    def __init__(self, inner=None):
        super().__init__()
        self.inner = inner or nn.Identity()

    def forward(self, x):
        return self.inner(x) if x.sum() < 1e9 else x


def twice_forward(self, x):
    y = self.conv(x)
    return self.fc(y.flatten(1)) + self.fc(y.permute(0, 2, 3, 1).flatten(1))


def frames_forward(self, x):
    b, t = x.shape[:2]
    return self.fc(self.conv(x.flatten(0, 1)).view(b, -1))


def frames_twin(v, x):  # channels in the third place, for `check` moves the second axis only
    x = jnp.moveaxis(jnp.moveaxis(x, -1, 1), 2, -1)
    y = conv(v["conv"], x.reshape(-1, *x.shape[2:]))
    return dense(v["fc"], y.reshape(len(x), -1))


def sides_forward(self, x):
    y = self.conv(x)
    return self.fc(torch.cat([y.flatten(1), F.max_pool2d(y, 2).flatten(1)], 1))


def sides_twin(v, x):
    y = conv(v["conv"], x)
    return dense(v["fc"], jnp.concatenate([flat(y), flat(pool(y))], 1))


def both_forward(self, z):
    h = self.fc(z)
    return self.conv(h.view(-1, 4, 4, 4)).mean((2, 3)) + self.out(h)


def both_twin(v, z):
    h = dense(v["fc"], z)
    return conv(v["conv"], h.reshape(-1, 4, 4, 4)).mean((1, 2)) + dense(v["out"], h)


def twin_of_head(v, x):
    return dense(v["fc"], flat(conv(v["conv"], x)))


# name: the model, its twin, inputs, what the error says, and the remedy in it that is right for this twin
ASKED = {
    "pieces of sizes that are not known": (
        lambda: net_of(sides_forward, conv=C(3, 4, 3), fc=L(80, 5)), sides_twin, (IMAGE,),
        ("fc reads 80 features, 2 pieces", "flatten={'fc': [(4, size), (4, size)]}"), {"fc": [(4, 64), (4, 16)]},
    ),
    "features and a table": (
        lambda: net_of(cat_heads, conv=C(3, 4, 3), fc=L(76, 5)),
        lambda v, x, t: dense(v["fc"], jnp.concatenate([flat(conv(v["conv"], x)), t], 1)), (IMAGE, TABLE),
        ("flatten={'fc': [(4, size), (None, size)]}",), {"fc": [(4, 64), (None, 12)]},
    ),
    "an unknown step": (
        lambda: net_of(lambda self, x: self.fc(torch.cumsum(self.conv(x), 1).flatten(1)), conv=C(3, 4, 3), fc=L(64, 5)),
        lambda v, x: dense(v["fc"], flat(jnp.cumsum(conv(v["conv"], x), -1))), (IMAGE,),
        ("fc reads 64 features, perhaps 4 channels flattened", "flatten={'fc': 4}"), {"fc": 4},
    ),
    "an unfold": (
        lambda: net_of(lambda self, x: self.fc(F.unfold(self.conv(x), 4).flatten(1)), conv=C(3, 4, 3), fc=L(64, 5)),
        twin_of_head, (IMAGE,), ("flatten={'fc': 4}",), {"fc": 4},
    ),
    "a module that cannot be traced": (
        lambda: net_of(lambda self, x: self.fc(self.branch(self.conv(x)).flatten(1)),
            conv=C(3, 4, 3), branch=Branch(), fc=L(64, 5)),
        twin_of_head, (IMAGE,), ("flatten={'fc': 4}",), {"fc": 4},
    ),
    "a backbone that cannot be traced": (
        lambda: net_of(lambda self, x: self.fc(self.branch(x)),
            branch=Branch(nn.Sequential(C(3, 4, 3), nn.Flatten())), fc=L(64, 5)),
        lambda v, x: dense(v["fc"], flat(conv(v["branch"]["inner"]["0"], x))),
            (IMAGE,), ("flatten={'fc': 4}",), {"fc": 4},
    ),
    "a model that cannot be traced": (
        lambda: Branch(nn.Sequential(C(3, 4, 3), nn.Flatten(), L(64, 5))),
        lambda v, x: dense(v["inner"]["2"], flat(conv(v["inner"]["0"], x))), (IMAGE,),
        ("inner.2 reads 64 features, perhaps 4 channels flattened: its calls could not be traced", "{'inner.2': 4}"),
        {"inner.2": 4},
    ),
    "a generator that cannot be traced": (
        lambda: Branch(nn.Sequential(L(6, 64), nn.Unflatten(1, (4, 4, 4)), C(4, 3, 3))),
        lambda v, z: conv(v["inner"]["2"], dense(v["inner"]["0"], z).reshape(-1, 4, 4, 4)), (LATENT,),
        ("inner.0 gives 64 features, perhaps an image of the 4 channels that inner.2 reads",), {"inner.0": (None, 4)},
    ),
    "an image made by an unknown step": (
        lambda: net_of(
            lambda self, z: self.conv(torch.cumsum(self.fc(z), 0).view_as(torch.zeros(2, 4, 4, 4))), fc=L(6, 64),
                conv=C(4, 3, 3)
        ),
        lambda v, z: conv(v["conv"], jnp.cumsum(dense(v["fc"], z), 0).reshape(-1, 4, 4, 4)), (LATENT,),
        ("fc gives 64 features, perhaps an image of the 4 channels that conv reads", "flatten={'fc': (None, 4)}"),
        {"fc": (None, 4)},
    ),
    "frames in the batch": (
        lambda: net_of(frames_forward, conv=C(3, 4, 3), fc=L(128, 5)), frames_twin, (FRAMES,),
        ("fc reads 128 features, perhaps 4 channels flattened",), {"fc": [(4, 64), (4, 64)]},
    ),
    "an image that a dense layer reads too": (
        lambda: net_of(both_forward, fc=L(6, 64), conv=C(4, 5, 3), out=L(64, 5)), both_twin, (LATENT,),
        ("fc writes an image of 4 channels, and out reads the same features",), {"fc": (None, 4), "out": 4},
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


WITHOUT_TWIN = {
    "two orders in two calls": (
        lambda: net_of(twice_forward, conv=C(3, 4, 3), fc=L(64, 5)),
        ("fc reads something flattened in one call and not in another",),
    ),
    "no multiple of the channels": (
        lambda: net_of(lambda self, x: self.fc(self.conv(x).flatten(1)), conv=C(3, 8, 3), fc=L(100, 5)),
        ("fc reads 100 features, no multiple of the 8 channels", "flatten={'fc': None}"),
    ),
    "an image of an embedding": (
        lambda: net_of(lambda self, x: self.conv(self.embed(x).view(-1, 4, 4, 4)), embed=nn.Embedding(5, 64),
            conv=C(4, 3, 3)),
        ("embed gives an image of 4 channels, and no option permutes it",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WITHOUT_TWIN)
def test_what_has_no_twin_is_refused(name):
    make, texts = WITHOUT_TWIN[name]
    net = make()
    with pytest.raises(ValueError) as error:
        interop.match(net, tree_of(net))
    for text in texts:
        assert text in str(error.value)


def test_a_trace_leaves_the_model_as_it_was():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc, self.calls, self.kept = C(3, 4, 3), L(64, 5), 0, []
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x):
            self.calls += 1
            self.kept.append(x)
            self.last = self.conv(x) + torch.randn(1)
            self.count += 1
            return self.fc(self.last.flatten(1))

    net = Net()
    state, random_state = {name: x.clone() for name, x in net.state_dict().items()}, torch.get_rng_state()
    interop.match(net, {**tree_of(net), "count": shaped(1)}, flatten={"fc": 4})
    assert net.calls == 0 and net.kept == [] and not hasattr(net, "last")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(net.state_dict()[name], x) for name, x in state.items())


def test_a_forward_that_was_replaced_is_not_traced():
    net = net_of(lambda self, x: self.fc(self.conv(x).flatten(1)), conv=C(3, 4, 3), fc=L(64, 5))
    net.forward = lambda x: net.fc(net.conv(x).permute(0, 2, 3, 1).flatten(1))
    with pytest.raises(ValueError, match="its calls could not be traced"):
        interop.match(net, tree_of(net))


@pytest.mark.parametrize("wrap", [lambda net: torch.compile(net, backend="eager"), nn.DataParallel])
def test_a_trace_looks_through_wrappers_and_leaves_them_as_they_were(wrap):
    net = net_of(lambda self, x: self.fc(self.conv(x).flatten(1)), conv=C(3, 4, 3), fc=L(64, 5))
    wrapped = wrap(net)
    names, own = list(wrapped.state_dict()), list(net.state_dict())
    assert "rows permuted (4 channels x 16)" in str(interop.match(wrapped, tree_of(net)))
    assert list(wrapped.state_dict()) == names and list(net.state_dict()) == own


def test_the_table_and_globs():
    net = net_of(
        lambda self, x: (lambda y: self.c(self.b(y)) + self.a(y))(self.conv(x).flatten(1)),
        conv=C(3, 8, 3), a=L(128, 6), b=L(128, 128), c=L(128, 6),
    )  # fmt: skip
    rows = str(interop.match(net, tree_of(net))).splitlines()
    assert [line.split()[0] for line in rows if "rows permuted (8 channels x 16)" in line] == ["a.weight", "b.weight"]
    assert "permuted" not in str(interop.match(net, tree_of(net), flatten={"[ab]": None}))
    net = net_of(cat_heads, conv=C(3, 4, 3), fc=L(76, 5))
    table = str(interop.match(net, tree_of(net), flatten={"fc": [(4, 64), (None, 12)]}))
    assert "transposed, rows permuted (4 channels x 16, 12 as they are)" in table


@pytest.mark.parametrize(
    "value", [0, True, [], [4], [(4, 0)], [(0, 4)], [(4, 64, 1)], (4, 4, 4), (None, [(4, 64)]), "4", 4.0, {}]
)
def test_options_of_another_form_are_refused(value):
    net = net_of(lambda self, x: self.fc(self.conv(x).flatten(1)), conv=C(3, 4, 3), fc=L(64, 5))
    with pytest.raises(TypeError, match="flatten must be a dict of layer names and channels"):
        interop.match(net, tree_of(net), flatten={"fc": value})


def test_pieces_of_another_size_are_refused():
    net = net_of(cat_heads, conv=C(3, 4, 3), fc=L(76, 5))
    for pieces, text in (([(4, 64)], "the pieces have 64"), ([(4, 66), (None, 10)], "no multiple of 4 channels")):
        with pytest.raises(ValueError, match=text):
            interop.match(net, tree_of(net), flatten={"fc": pieces})


# --- norms over a cube ---


def cube(v, x, axes):
    x = (x - x.mean(axes, keepdims=True)) / jnp.sqrt(x.var(axes, keepdims=True) + 1e-5)
    return x * v["scale"] + v["bias"]


CUBES = {  # the model, its twin
    "an image": (
        net_of(lambda self, x: self.norm(torch.relu(self.conv(x))), conv=C(3, 4, 3), norm=nn.LayerNorm((4, 4, 4))),
        lambda v, x: cube(v["norm"], relu(conv(v["conv"], x)), (1, 2, 3)),
    ),
    "an image of one axis": (
        net_of(lambda self, x: self.norm(self.conv(x)), conv=nn.Conv1d(3, 6, 3), norm=nn.LayerNorm((6, 6))),
        lambda v, x: cube(v["norm"], conv(v["conv"], x), (1, 2)),
    ),
    "tokens": (
        net_of(lambda self, x: self.norm(self.fc(x)), fc=L(3, 8), norm=nn.LayerNorm((8, 8))),
        lambda v, x: cube(v["norm"], dense(v["fc"], x), (1, 2)),
    ),
}


@pytest.mark.relaxed_promotion  # the twins'
@pytest.mark.parametrize("case", CUBES)
def test_a_norm_over_a_cube_is_moved_where_it_reads_an_image(case, x64):
    net, twin = CUBES[case]
    if case == "tokens":
        net, x = random(net), np.random.default_rng(0).standard_normal((2, 8, 3))
        with x64():
            values = jax.tree.map(jnp.asarray, interop.match(net, tree_of(net)).to_jax(net))
            got = twin(values, jnp.asarray(x))
        np.testing.assert_allclose(got, net(torch.tensor(x)).detach(), rtol=1e-12, atol=1e-12)
    else:
        check(net, twin, [SERIES if "axis" in case else IMAGE], x64)


def test_a_norm_over_the_space_alone_stays_as_it_is(x64):
    net = random(net_of(lambda self, x: self.norm(self.conv(x)), conv=C(3, 5, 3), norm=nn.LayerNorm((4, 4))))
    with x64():
        values = interop.match(net, tree_of(net)).to_jax(net)
    np.testing.assert_array_equal(values["norm"]["scale"], net.norm.weight.detach())


@pytest.mark.relaxed_promotion  # the twins'
def test_a_norm_over_a_cube_of_an_input_is_asked_for(x64):
    net = net_of(lambda self, x: self.conv(self.norm(x)), norm=nn.LayerNorm((3, 3, 3)), conv=C(3, 4, 1))
    says = (
        r"norm is a norm over 3 axes of 3, whose order no shape tells: flatten=\{'norm': 3\} says .*\{'norm': None\} th"
    )
    with pytest.raises(ValueError, match=says):
        interop.match(random(net), tree_of(net))
    x = np.random.default_rng(0).standard_normal((2, 3, 3, 3))
    check(net, lambda v, x: conv(v["conv"], cube(v["norm"], x, (1, 2, 3))), [x], x64, flatten={"norm": 3})
    with x64():
        as_it_is = interop.match(net, tree_of(net), flatten={"norm": None}).to_jax(net)
    np.testing.assert_array_equal(as_it_is["norm"]["scale"], net.norm.weight.detach())
    with pytest.raises(ValueError, match="flatten: norm is a norm over axes of 3, which are no image of 2"):
        interop.match(net, tree_of(net), flatten={"norm": 2})
    plain = net_of(
        lambda self, x: self.fc(self.norm(x)), norm=nn.LayerNorm((3, 3), elementwise_affine=False), fc=L(3, 3)
    )
    interop.match(plain, {"fc": {"kernel": np.zeros((3, 3), "f"), "bias": np.zeros(3, "f")}})
