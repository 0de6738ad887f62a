"""Fine-tuning that stays near a predefined state: what is learned of a new task, and what is forgotten of the old one.

A network learns scikit-learn's bundled handwritten digits. It is then fine-tuned on the same digits turned by a
quarter, three times from the same state with the same batches; the upright digits are not seen again:

    plain     without a penalty
    L2-SP     l2 of the distance from the state before: fr.anchored(fr.l2(lam), anchor)
    EWC       the same, with every parameter weighed by its importance for the old task, the diagonal of the Fisher
              information: the mean of the *squared gradients of single examples*, which is vmap(grad). (The square of
              the mean gradient is something else, and nearly 0 after training.)

What to look at: all three learn the new task, to 90% and more of images not seen. On the old one plain fine-tuning
falls below 50%. L2-SP stays nearest to the anchor and keeps more. EWC moves almost as far as plain fine-tuning, but in
directions that the old task does not need, and keeps most: 80% and more.
"""

import argparse
import copy

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import funcreg.torch as fr


def train(net: nn.Module, x: Tensor, y: Tensor, lr: float, steps: int, penalty: fr.Penalty | None) -> None:
    optimizer = torch.optim.Adam(net.parameters(), lr)
    if penalty is not None:
        fr.attach(optimizer, net, penalty)
    for _ in range(steps):
        batch = torch.randint(len(x), (128,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
        optimizer.step()


@torch.no_grad()
def importance(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The diagonal of the Fisher information; its labels are drawn from what the network believes."""

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional_call(net, params, (x[None],)), y[None])

    labels = torch.distributions.Categorical(logits=net(x)).sample()
    gradients = vmap(grad(loss), in_dims=(None, 0, 0))(fr.params(net), x, labels)  # of each parameter: [examples, ...]
    return {name: g.square().mean(0) for name, g in gradients.items()}


def run(seed: int = 0, steps: int = 400) -> dict[str, float]:
    torch.manual_seed(seed)
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels))
    upright, y = torch.tensor(images / 16, dtype=torch.float32)[order], torch.tensor(labels)[order]
    turned = upright.reshape(-1, 8, 8).rot90(dims=(1, 2)).flatten(1)
    seen, unseen = slice(0, 1400), slice(1400, None)

    before = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    train(before, upright[seen], y[seen], lr=1e-3, steps=600, penalty=None)
    anchor = fr.params(before)
    fisher = importance(before, upright[seen])
    penalties = {
        "plain": None,
        "L2-SP": fr.anchored(fr.l2(0.01), anchor),
        "EWC": fr.anchored(fr.l2(100.0), anchor, importance=fisher),
    }

    def accuracy(net: nn.Module, x: Tensor) -> float:
        return (net(x[unseen]).argmax(1) == y[unseen]).float().mean().item()

    results = {f"before: accuracy on {task}": accuracy(before, x) for task, x in (("old", upright), ("new", turned))}
    for name, penalty in penalties.items():
        net = copy.deepcopy(before)
        torch.manual_seed(seed)
        train(net, turned[seen], y[seen], lr=3e-3, steps=steps, penalty=penalty)
        results[f"{name}: accuracy on old"] = accuracy(net, upright)
        results[f"{name}: accuracy on new"] = accuracy(net, turned)
        moved = [(p - anchor[key]).flatten() for key, p in fr.params(net).items()]
        results[f"{name}: distance from the anchor"] = torch.cat(moved).norm().item()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of the split, the initial values and the batches")
    parser.add_argument("--steps", type=int, default=400, help="steps of fine-tuning")
    for name, value in run(**vars(parser.parse_args())).items():
        print(f"{name:.<50} {value:.3g}")


if __name__ == "__main__":
    main()
