"""`locate`: the first layer in which a PyTorch model and a flax one differ, forwards and backwards."""

from collections.abc import Callable
from typing import Any

from torch import nn

from .arrays import outside_compilation
from .location import Location
from .pair import Pair

Tree = Any


@outside_compilation
def locate(
    net: nn.Module,
    flax_model: Any,
    pair: Pair,
    *inputs: Tree,
    torch_call: Callable[..., Tree] | None = None,
    flax_call: Callable[..., Tree] | None = None,
) -> Location:
    r"""The first layer in which a PyTorch model and its flax twin differ, in values or in gradients.

    Both models run freely in float64, and then cut apart at the layers that the pair pairs: every layer is given what
    PyTorch's was given, and what it returns is replaced by what PyTorch's returned. So each layer, and each group of
    steps between layers (activations, reshapes, sums), is compared by itself, and no difference goes further than
    where it is made. Backwards alike: every piece pulls PyTorch's gradient back, of its values and of its parameters.
    Each piece is judged by the rules of `check` (`interop.verdict`), with runs in float32 and runs whose numbers are
    moved by an ulp.

    Layouts are not faults: images are channels last in flax, features lie as the pair says, a recurrent or attention
    layer of PyTorch may have time first. What a layer does not tell, the lengths of the axes do; where they are equal
    and values agree in another order only, this is inconclusive, and said.

    Gradients are those of a fixed random combination of all results, or of the result itself if that is one number,
    such as a loss.

    Args:
        net: the PyTorch model, in the mode that is to be compared (`eval`, or `train` without dropout). It is copied.
        flax_model: an nnx module, a linen module bound to its variables (`module.bind(variables)`), or a bare linen
            module, which gets PyTorch's parameters.
        pair: of `interop.match(net, ...)`.
        inputs: NumPy arrays, or trees of them, that both models are called with. An image that the first convolution
            reads is given to flax with its channels last, if it can take it so.
        torch_call: `(net, *inputs) -> result`, where a call is more than `net(*inputs)`: options, parts of the result,
            or a loss.
        flax_call: the same for flax, `(module, *inputs) -> result`; it gets all inputs in PyTorch's layout. Results of
            both must be trees of the same names, or one array each.

    Returns:
        The location; `print` shows it layer by layer, `.where` and `.direction` say it in words.

    Raises:
        TypeError: what is no such model or pair; tensors or traced arrays as inputs of another kind.
        ValueError: a pair of other models; dropout that is switched on; results of different trees.
        Exception: what a model raises, with a note that says which side.

    Example:
        >>> import jax, numpy as np, torch
        >>> from flax import nnx
        >>> from funcreg import interop
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.GELU(), torch.nn.Linear(4, 2))
        >>> rngs = nnx.Rngs(0)
        >>> model = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), jax.nn.gelu, nnx.Linear(4, 2, rngs=rngs))
        >>> pair = interop.match(net, model)
        >>> nnx.update(model, pair.to_jax(net))
        >>> location = interop.locate(net, model, pair, np.linspace(-2, 2, 15).reshape(5, 3))  # flax's gelu is by tanh
        >>> print(location.verdict, location.direction, location.where)
        semantic forward between `0` and `2`
    """
    from . import _locate_inputs, _locate_pieces, _locate_runs  # they import flax

    _locate_inputs.check_arguments(net, flax_model, pair)
    runs = _locate_runs.Runs(net, flax_model, pair, inputs, torch_call, flax_call)
    return _locate_pieces.judged(runs)
