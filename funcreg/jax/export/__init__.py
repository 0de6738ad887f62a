"""Whole training steps as files that `jax.export` reads, and that cannot go wrong silently.

    init, step = fr.train_step(loss, lambda hyper: fr.prox_adam(hyper["lr"], fr.l1(hyper["lam"])))
    fr.export.export_step(
        step,
        {"state": init(params, hyper), "hyper": hyper, "x": x, "y": y},
        "step.jax",
        dynamic={"x": {0: "batch"}, "y": {0: "batch"}},
        outputs=("state", "metrics"),
    )

The function is traced with symbols for the dynamic dimensions. JAX refuses most of what needs a number there; what it
answers with a guess, `x.shape[0] == 8`, is refused here, and so is an array that is no argument, which JAX would freeze
into the file.

**What a file is.** A function from a dictionary of arrays to another. Names are those of the arguments and of the
leaves of their trees, joined by dots: `state.opt_state.mu.hidden.kernel`, `hyper.lr`; they are what
`funcreg.torch.export` calls them where the trees are alike, and no type of optax or flax has to be registered.
`load_exported` checks what it is called with before JAX does, which narrows float64 without a word. A host that loads
the file with `jax.export` itself calls it with such a dictionary.

**What is written.** Beside `step.jax` a manifest, `step.jax.json`, and recorded cases, `step.jax.safetensors`, of the
form that `funcreg.torch.export` writes. Before they are put in place, a fresh process has loaded the file and returned
every recorded output, at the example's sizes and at `check_sizes`, up to 32 times rounding: eps of its largest number,
or what an ulp in the inputs does to it. With `dynamic={}` the bits are those of `jax.jit`. With a dynamic dimension
they differ, by 1 or 2 ulp in a step of `prox_adam`: the operations are the same, but they reach the compiler in another
form, which it simplifies in another order, as when it multiplies by 1/s to divide by s.
`python -m funcreg.jax.export verify step.jax` checks a file anywhere.

**Limits.** Derivatives of the loaded function are not in the file: export them. Newer versions of JAX read the files of
older ones for six months. Needs flatbuffers.
"""

from ..._export_errors import CapturedTensorError as CapturedTensorError
from ..._export_errors import ControlFlowError as ControlFlowError
from ..._export_errors import ExportError as ExportError
from ..._export_errors import IntegrityError as IntegrityError
from ..._export_errors import ResultError as ResultError
from ..._export_errors import SelfCheckError as SelfCheckError
from ..._export_errors import SpecializationError as SpecializationError
from ..._export_errors import UnsupportedOpError as UnsupportedOpError
from ..._export_errors import VersionError as VersionError
from ..._export_report import ExportReport as ExportReport
from ..._manifest import ArraySpec as ArraySpec
from ..._manifest import Manifest as Manifest
from ..._manifest import MethodSpec as MethodSpec
from ._load import Exported as Exported
from ._load import load_exported as load_exported
from ._load import verify_exported as verify_exported
from ._step import export_step as export_step
