"""A training step on handwritten digits, and what it starts from, as files for the program in `host.cpp`.

    python examples/cpp_host/export_digits.py FOLDER

writes `step.pt` (a step of `prox_adam` with L1 on one layer and a group lasso on the other, with its manifest and
recorded cases), `start.pt` (parameters, optimizer state, learning rate and strengths by the names of the step's inputs)
and `data.pt` (the examples). The batch size is dynamic; learning rate and strengths are inputs, so that a host can
change them from step to step.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor

import funcreg.torch as fr

UNITS = 32  # of the one hidden layer


def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    hidden = torch.relu(torch.nn.functional.linear(x, params["hidden.weight"], params["hidden.bias"]))
    logits = torch.nn.functional.linear(hidden, params["output.weight"], params["output.bias"])
    return torch.nn.functional.cross_entropy(logits, y)


def optimizer(hyper: dict[str, Tensor]) -> Any:
    penalty = fr.l1(hyper["l1"]).on("output.weight") + fr.group_lasso(hyper["group"], per="output").on("hidden.weight")
    return fr.prox_adam(hyper["learning_rate"], penalty)


init, step = fr.train_step(loss, optimizer)


def start() -> dict[str, Any]:
    """The inputs of the first step, all but the batch."""
    torch.manual_seed(0)
    hidden, output = torch.nn.Linear(64, UNITS), torch.nn.Linear(UNITS, 10)
    layers = {"hidden": hidden, "output": output}
    params = {f"{k}.{name}": x.detach() for k, layer in layers.items() for name, x in layer.named_parameters()}
    hyper = {"learning_rate": torch.tensor(3e-3), "l1": torch.tensor(1e-3), "group": torch.tensor(3e-3)}
    return {"state": init(params, hyper), "hyper": hyper}


def data() -> dict[str, Tensor]:
    """scikit-learn's digits: 1797 images of 8x8 pixels between 0 and 1, and their labels."""
    images, labels = load_digits(return_X_y=True)
    return {"x": torch.tensor(images / 16, dtype=torch.float32), "y": torch.tensor(labels)}


def write(folder: Path) -> Any:
    """The three files; returns the report of the export."""
    folder.mkdir(parents=True, exist_ok=True)
    inputs, examples = start(), data()
    torch.save(fr.to_flat(inputs), folder / "start.pt")
    torch.save(examples, folder / "data.pt")
    return fr.export.export_step(
        step,
        {**inputs, **{name: x[:8] for name, x in examples.items()}},
        folder / "step.pt",
        dynamic={name: {0: "batch"} for name in examples},
        outputs=("state", "metrics"),
        check_sizes=(1, 5, 16),
        overwrite=True,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="made if it is not there; files in it are replaced")
    print(write(parser.parse_args().folder))
