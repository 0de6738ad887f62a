"""Penalties and whole training steps as files that run without Python, and that cannot go wrong silently.

    init, step = fr.train_step(loss, lambda hyper: fr.prox_adam(hyper["lr"], fr.l1(hyper["lam"])))
    fr.export.export_step(
        step,
        {"state": init(params, hyper), "hyper": hyper, "x": x, "y": y},
        "step.pt",
        dynamic={"x": {0: "batch"}, "y": {0: "batch"}},
        outputs=("state", "metrics"),
    )

The function is traced to a graph of PyTorch's operations in which the dynamic dimensions are symbols, and the graph is
written as TorchScript source: neither `torch.jit.trace` nor the numbers of the example are involved, which is how
traced training steps get wrong at another batch size. TorchScript is deprecated, and still the only file that libtorch
runs on every instruction set without Python; `formats=("torchscript", "pt2")` writes an ExportedProgram beside it.

**What a file is.** Every method takes and returns a dictionary of tensors by name. Names are those of the function's
arguments and of the leaves of their trees, joined by dots: `state.params.hidden.weight`, `hyper.lr`. The file checks
its own inputs: a name, a dtype, a fixed size or two different sizes of one dimension are refused with a message, and so
are sizes 0 and 1 unless they were checked, and sizes at which the graph is not known to be the function's. What the
function does not get as an argument is a constant of the file: strengths, learning rates and states are inputs, and a
tensor that is no argument is refused. There is one dtype for every input, and one device; inputs are made contiguous.
Autograd goes through the file (`torch::NoGradGuard` if that is not wanted).

**What is written.** Beside `step.pt` a manifest, `step.pt.json`, with names, dtypes, shapes, sha256 and versions, and
recorded cases, `step.pt.safetensors`. Before they are put in place, a fresh process has loaded the file and has
returned every recorded output bit for bit, at the example's sizes and at `check_sizes`. Bits are equal for one build of
PyTorch, instruction set and number of threads; with others `verify_exported` allows 32 eps of an output's largest
number. `python -m funcreg.torch.export verify step.pt` does that anywhere.

**In C++**, with the libtorch of the Python package or any other of that version:

    #include <torch/script.h>
    auto module = torch::jit::load("step.pt");
    torch::NoGradGuard no_grad;
    c10::Dict<std::string, at::Tensor> inputs;
    inputs.insert("x", x);                                     // ... and so on, in any order
    auto outputs = module.forward({inputs}).toGenericDict();
    auto loss = outputs.at("metrics.loss").toTensor();         // a state is fed back under the names it comes out with

A penalty's methods are called by name: `module.get_method("prox")({inputs})`.

**Onwards from the pt2**, whose methods the recorded cases check as well:

    program = torch.export.load("step.pt2")
    torch._inductor.aoti_compile_and_package(program, package_path=os.path.abspath("step.aoti.pt2"))

    wrong_in_onnx = torch._decomp.get_decompositions([torch.ops.aten.nll_loss_forward])
    program = program.run_decompositions(wrong_in_onnx)
    method = report.manifest.methods["forward"]
    names = {"input_names": list(method.inputs), "output_names": [f"new.{name}" for name in method.outputs]}
    torch.onnx.export(program, (), "step.onnx", dynamo=True, optimize=False, **names)

ONNX, which needs onnx and onnxscript, has no name twice; its optimizer (onnxscript 0.7.2) breaks graphs with a clamp.
Without `wrong_in_onnx` the gradient of `cross_entropy` is that of the sum over the batch there, not of the mean, and
nothing complains. No file that is made from the pt2 is checked: hold its results against those of the pt2.
An AOTInductor package needs a C++ compiler, is for one instruction set, differs in the last bits, and looks at the
shapes of its inputs only if the environment variable AOTI_RUNTIME_CHECK_INPUTS is 1.

**Limits.** A loaded file is a program: load only what you trust (`load_exported(path, trusted=True)`). Under
`torch.func.vmap` some operations fix a dynamic dimension (indexing by labels, slices, `cat`, `layer_norm`, `gelu`),
which is refused; loop over the members of an ensemble there and stack the results. `fr.ensemble` compiles for one batch
size: export `torch.func.vmap(step)` instead. A dynamic dimension has no largest size: what has one, such as a table of
positions, is sliced outside, and is an input. `torch.Tensor.cpu()` and the like follow the device of the inputs.
A dynamic size is like a number in all but one respect: `type(x.shape[0]) is int` is false while a function is traced
(`isinstance` is right), and what hangs on that is seen only if it changes a result at a size that is checked.
"""

from ..._export_errors import BakedDeviceError as BakedDeviceError
from ..._export_errors import CapturedTensorError as CapturedTensorError
from ..._export_errors import ControlFlowError as ControlFlowError
from ..._export_errors import ExportError as ExportError
from ..._export_errors import IntegrityError as IntegrityError
from ..._export_errors import MutationError as MutationError
from ..._export_errors import RandomOpError as RandomOpError
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
from ._penalty import export_penalty as export_penalty
from ._step import export_step as export_step
