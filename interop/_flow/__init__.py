"""What reaches each layer of a PyTorch model: an image, a flattened image, or what lies as it does in flax.

The model is traced with `torch.fx` (`trace`), and one walk along its steps (`walk`) says what each of them gives
(`values`): steps that move axes (`views`), steps where arrays meet (`meet`), modules (`modules`).

NOTE [unknown steps]: what is made of an image by a step that is not in the table is `Unknown`, and stays so until a
convolution reads it. What is made of anything else lies in flax as it does in PyTorch, and is `Plain`.

NOTE [claims]: a dense layer's output that is viewed as (n, a, b, c) is an image, or tokens with heads. Only a step that
reads images tells: then the claims of the view hold, which say of what layers the columns count `a` channels first. Of
a view that the model returns nobody here can tell.
"""

from torch import fx, nn

from .known import Flow as Flow
from .modules import NORMS as NORMS
from .trace import CONVOLUTIONS as CONVOLUTIONS
from .trace import traced
from .values import Claim as Claim
from .values import Flat as Flat
from .values import Image as Image
from .values import Piece as Piece
from .values import Plain as Plain
from .values import Unknown as Unknown
from .walk import Walk


def flow(net: nn.Module) -> Flow:
    """What reaches the layers of a model."""
    found = traced(net)
    if found is None:
        return Flow()
    graph, opaque = found
    walk = Walk(net, opaque)
    for node in graph.nodes:
        walk.step(node)
    walk.flow.calls = _calls(graph)
    called = {str(node.target) for node in graph.nodes if node.op == "call_module"} - opaque
    for name in walk.modules:
        parts = name.split(".")
        above = {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
        if above & called and not above & opaque:
            walk.flow.seen.add(name)
        elif not above & opaque:
            walk.flow.uncalled.add(name)
    return walk.flow


def _calls(graph: fx.Graph) -> list[str]:
    """The layers that steps call and the bare arrays that they read; arrays of what is called say nothing more."""
    names = {node: str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")}
    called = {name for node, name in names.items() if node.op == "call_module"}
    of_called = {node for node, name in names.items() if node.op == "get_attr" and name.rpartition(".")[0] in called}
    return list(dict.fromkeys(name for node, name in names.items() if node not in of_called))
