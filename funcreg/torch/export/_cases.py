"""What functions returned, recorded at several sizes: the cases that a file is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..._export_sizes import combinations
from ._inputs import Method, Tensors


@dataclass(frozen=True)
class Case:
    """What a function returned at some sizes."""

    method: str
    sizes: dict[str, int]
    inputs: Tensors
    static: list[str]  # inputs without a dynamic dimension
    carried: list[str]  # inputs that are outputs of the case before
    outputs: Tensors


def record(methods: Mapping[str, Method], check_sizes: Sequence[int], feed_back: bool) -> list[Case]:
    """What the functions return at the sizes of their examples and at those to be checked.

    A state is fed back, since the first one often is zero, which hides most of what a step computes.
    """
    cases = []
    for key, method in methods.items():
        outputs: Tensors = {}
        every = combinations(method.inputs.sizes, check_sizes)
        for i, sizes in enumerate([*every, every[0]]):
            given = method.inputs.resized(sizes)
            static = {name: x for name, x in given.items() if not method.inputs.dims[name]}
            state = {name: x for name, x in outputs.items() if feed_back and name in static and _alike(x, static[name])}
            if i == len(every) and not state:
                break
            given |= state
            try:
                outputs = method.run({name: x.clone() for name, x in given.items()})
            except Exception as error:
                if sizes != method.inputs.sizes:
                    error.add_note(
                        f"The function itself raises this at {sizes}, which check_sizes={check_sizes} asks for; inputs "
                        "that are not in dynamic keep the example's sizes."
                    )
                raise
            outputs = {name: x.detach().clone(memory_format=torch.contiguous_format) for name, x in outputs.items()}
            cases.append(Case(key, sizes, given, list(static), list(state), outputs))
    return cases


def _alike(x: Tensor, y: Tensor) -> bool:
    return x.dtype == y.dtype and x.shape == y.shape


def to_bytes(cases: Sequence[Case]) -> bytes:
    """All arrays of the cases, by the names that `funcreg/_manifest.py` tells."""
    from safetensors.torch import save

    arrays = {}
    for i, case in enumerate(cases):
        for name, x in case.inputs.items():
            if name not in case.carried:  # parameters, which may be large, are stored once
                arrays[f"in.{name}" if name in case.static else f"{i}.in.{name}"] = x.cpu()
        for name, x in case.outputs.items():
            arrays[f"{i}.out.{name}"] = x.cpu()
    return save(arrays)
