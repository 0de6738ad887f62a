"""What `per_example` refuses, and clipping: bookkeeping without a framework."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ._axes import arrays_of, axis_of_each, check_axes, check_chunk, length
from ._training import Penalized


def check_options(loss: Any, chunk_size: Any, batch_axes: Any) -> None:
    if isinstance(loss, Penalized):
        raise TypeError(
            "per_example: the loss is penalized; a penalty belongs to the parameters and not to the examples, and "
            "would be clipped and weighted with each of them. Pass the bare loss (penalized.loss), aggregate, and add "
            "penalty.grad(params) to the result, or take a proximal step"
        )
    if not callable(loss):
        raise TypeError(f"per_example: loss must be a function (params, *batch) -> scalar, got {loss!r}")
    check_axes("per_example", batch_axes)
    check_chunk("per_example", "chunk_size", chunk_size)


def example_axes(wing: Any, batch_axes: Any, batch: Sequence[Any]) -> tuple[tuple[int | None, ...], int]:
    """The axis of each batch argument that counts examples, and how many there are."""
    axes = axis_of_each("per_example", batch_axes, batch)
    count, first = 0, ""
    for axis, arrays in zip(axes, arrays_of(wing, batch), strict=True):
        if axis is None:
            continue
        for name, array in arrays:
            found = length("per_example", name, array, axis)
            if not first:
                count, first = found, name
            if found != count:
                raise ValueError(
                    f"per_example: {first} has {count} examples, but {name} has {found}; say None in batch_axes for an "
                    "argument that all examples share"
                )
    if not first:
        raise ValueError("per_example: no batch argument counts examples; pass a batch, and its axis in batch_axes")
    if count == 0:
        raise ValueError(f"per_example: {first} has 0 examples")
    return axes, count


def naming_rows(loss: Callable[..., Any], params: Any, rows: Sequence[Any]) -> Any:
    """Call the loss for one example; an error says in which shape it got it."""
    try:
        return loss(params, *rows)
    except Exception as error:
        shapes = ", ".join(str(list(x.shape)) if hasattr(x, "shape") else type(x).__name__ for x in rows)
        error.add_note(f"per_example called the loss with batches of one example: {shapes}.")
        raise


def batch_statistics(name: str) -> ValueError:
    return ValueError(
        f"per_example: {name} normalizes by statistics of the batch, so that the gradient of a single example does not "
        "exist; use group or layer norm, or the stored statistics (evaluation mode)"
    )


def check_clip(wing: Any, where: str, grads: Any, weights: Any, reduction: str) -> int:
    """The number of examples."""
    if reduction not in ("mean", "sum"):
        raise ValueError(f"{where}: reduction must be 'mean' or 'sum', got {reduction!r}")
    count = count_examples(wing, where, grads)
    if weights is not None and hasattr(weights, "dtype") and not wing.is_real(weights):
        raise TypeError(f"{where}: weights must be real, got {weights.dtype}")
    if weights is not None and tuple(getattr(weights, "shape", ())) != (count,):
        got = list(weights.shape) if hasattr(weights, "shape") else weights
        raise ValueError(f"{where}: weights must have shape [{count}], one per example, got {got}")
    return count


def count_examples(wing: Any, where: str, grads: Any) -> int:
    flat = wing.flatten(grads)
    if not flat.leaves:
        raise ValueError(f"{where}: grads has no floating-point array")
    for name, leaf in zip(flat.names, flat.leaves, strict=True):
        if wing.is_complex(leaf):
            raise TypeError(
                f"{where}: grads {name!r} is complex, for which this norm is not defined here: store real and "
                "imaginary parts as a last axis of two"
            )
    count = length(where, f"grads {flat.names[0]!r}", flat.leaves[0], 0)
    for name, leaf in zip(flat.names, flat.leaves, strict=True):
        found = length(where, f"grads {name!r}", leaf, 0)
        if found != count:
            raise ValueError(f"{where}: grads {flat.names[0]!r} has {count} examples, but {name!r} has {found}")
    if count == 0:
        raise ValueError(f"{where}: grads {flat.names[0]!r} has 0 examples")
    return count
