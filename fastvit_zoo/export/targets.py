"""The runtimes that a network is converted for.

Each target has a function that writes a file and, where its runtime runs on this kind of machine, one that loads it.
Its packages are imported there and nowhere else.
"""

import contextlib
import importlib.util
import io
import os
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastvit_zoo.onnx_export import export_onnx

# pyright: reportMissingImports=false

Runner = Callable[[np.ndarray], np.ndarray]
"""Images (B, C, H, W) in, the first output out."""


@dataclass(frozen=True)
class Target:
    """One runtime.

    `convert(network, image, path)` writes `path`, whose name ends in `suffix`, for images of the size of `image`, and
    may write files of the same stem beside it. `load(path)` gives a function that runs it on one thread; None means
    that the runtime needs another machine, and `operators(path)` counts what is in the file instead.
    """

    packages: tuple[str, ...]
    modules: tuple[str, ...]
    suffix: str
    convert: Callable[[nn.Module, Tensor, Path], None]
    load: Callable[[Path], Runner] | None
    operators: Callable[[Path], Counter[str]] | None = None

    def missing(self) -> list[str]:
        """The packages that are not installed."""
        return [package for package, module in zip(self.packages, self.modules, strict=True) if not _installed(module)]


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent
        return False


@contextlib.contextmanager
def _onnx_of(network: nn.Module, image: Tensor) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(network, path, size=image.shape[-1], batch=len(image))
        yield path


def _onnx(network: nn.Module, image: Tensor, path: Path) -> None:
    export_onnx(network, path, size=image.shape[-1], batch=len(image))


def _run_onnx(path: Path) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda image: np.asarray(session.run(None, {name: image})[0])


def _openvino(network: nn.Module, image: Tensor, path: Path) -> None:
    import openvino

    with _onnx_of(network, image) as file:
        openvino.save_model(openvino.convert_model(file), path, compress_to_fp16=False)


def _run_openvino(path: Path) -> Runner:
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    model = openvino.Core().compile_model(path, "CPU", settings)
    return lambda image: model(image)[0]


def _coreml(network: nn.Module, image: Tensor, path: Path) -> None:
    import coremltools

    with torch.no_grad():
        program = torch.export.export(network, (image,)).run_decompositions({})
    model = coremltools.convert(
        program,
        inputs=[coremltools.TensorType("image", shape=tuple(image.shape))],
        convert_to="mlprogram",
        minimum_deployment_target=coremltools.target.iOS16,
    )
    model.save(str(path))


def _operators_of_coreml(path: Path) -> Counter[str]:
    import coremltools

    program = coremltools.models.MLModel(str(path), skip_model_load=True).get_spec().mlProgram
    (block,) = program.functions["main"].block_specializations.values()
    return Counter(operation.type for operation in block.operations if operation.type != "const")


def _executorch(network: nn.Module, image: Tensor, path: Path) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    program = torch.export.export(network, (image,))
    path.write_bytes(to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch().buffer)


def _run_executorch(path: Path) -> Runner:
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(path)
    method = program.load_method("forward")
    return lambda image: (program, method.execute([torch.from_numpy(image)]))[1][0].numpy()


def _litert(network: nn.Module, image: Tensor, path: Path) -> None:
    import litert_torch

    litert_torch.convert(network, (image,)).export(str(path))


def _run_litert(path: Path) -> Runner:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), num_threads=1)
    interpreter.allocate_tensors()
    first, result = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]

    def run(image: np.ndarray) -> np.ndarray:
        interpreter.set_tensor(first, image)
        interpreter.invoke()
        return interpreter.get_tensor(result)

    return run


def _onnx2tf(network: nn.Module, image: Tensor, path: Path) -> None:
    with _onnx_of(network, image) as file:
        # It asks for images, and loads them from its authors if they are not there, to try what it has made.
        np.save(
            file.with_name("calibration_image_sample_data_20x128x128x3_float32.npy"), np.zeros((20, 128, 128, 3), "f")
        )
        _tool("onnx2tf", "-i", str(file), "-o", str(file.parent), "-n", "-rtpo", "Erf", folder=str(file.parent))
        os.replace(file.with_name("model_float32.tflite"), path)


def _run_onnx2tf(path: Path) -> Runner:
    run = _run_litert(path)
    return lambda image: run(np.ascontiguousarray(image.transpose(0, 2, 3, 1)))


def _ncnn(network: nn.Module, image: Tensor, path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/model.pt"
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.save(torch.jit.trace(network, image), file)
        shape = ",".join(map(str, image.shape))
        _tool("pnnx", file, f"inputshape=[{shape}]f32", "fp16=0", folder=folder)
        for suffix in ".param", ".bin":
            os.replace(f"{folder}/model.ncnn{suffix}", path.with_suffix(suffix))


def _run_ncnn(path: Path) -> Runner:
    import ncnn

    net = ncnn.Net()
    net.opt.num_threads = 1
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    net.opt.use_bf16_storage = False
    net.load_param(str(path))
    net.load_model(str(path.with_suffix(".bin")))

    def run(image: np.ndarray) -> np.ndarray:
        rows = []
        for one in image:
            extractor = net.create_extractor()
            extractor.input("in0", ncnn.Mat(np.ascontiguousarray(one)).clone())
            rows.append(np.array(extractor.extract("out0")[1]))
        return np.stack(rows)

    return run


def _mnn(network: nn.Module, image: Tensor, path: Path) -> None:
    with _onnx_of(network, image) as file:
        _tool("mnnconvert", "-f", "ONNX", "--modelFile", str(file), "--MNNModel", str(path), "--bizCode", "zoo")


def _run_mnn(path: Path) -> Runner:
    import MNN.expr
    import MNN.nn

    config = {"backend": 0, "numThread": 1, "precision": "high"}
    runtime = MNN.nn.create_runtime_manager((config,))
    with contextlib.redirect_stdout(io.StringIO()):
        net = MNN.nn.load_module_from_file(str(path), ["image"], ["logits"], runtime_manager=runtime)

    def run(image: np.ndarray) -> np.ndarray:
        given = MNN.expr.placeholder(list(image.shape), MNN.expr.NCHW)
        given.write(image)
        (result,) = net.onForward([given])
        return np.array(MNN.expr.convert(result, MNN.expr.NCHW).read()).reshape(len(image), -1)

    return run


def _iree(network: nn.Module, image: Tensor, path: Path) -> None:
    with _onnx_of(network, image) as file:
        program = str(file.with_suffix(".mlir"))
        _tool("iree-import-onnx", str(file), "-o", program)
        cpu = "device=local", "local-target-device-backends=llvm-cpu"
        options = (f"--iree-hal-target-{cpu[0]}", f"--iree-hal-{cpu[1]}", "--iree-llvmcpu-target-cpu=host")
        _tool("iree-compile", program, *options, "-o", str(path))


def _run_iree(path: Path) -> Runner:
    import iree.runtime

    context = iree.runtime.SystemContext(config=iree.runtime.Config("local-sync"))
    program = iree.runtime.VmModule.copy_buffer(context.instance, path.read_bytes())
    context.add_vm_module(program)
    call = context.modules[program.name]["main_graph"]
    return lambda image: np.asarray(call(image))


def _tvm(network: nn.Module, image: Tensor, path: Path) -> None:
    import onnx
    import tvm
    from tvm.relax.frontend.onnx import from_onnx

    with _onnx_of(network, image) as file:
        program = tvm.relax.get_pipeline("zero")(from_onnx(onnx.load(file)))
    tvm.compile(program, tvm.target.Target("llvm")).export_library(str(path))


def _run_tvm(path: Path) -> Runner:
    import tvm

    machine = tvm.relax.VirtualMachine(tvm.runtime.load_module(str(path)), tvm.cpu())
    return lambda image: machine["main"](tvm.runtime.tensor(image)).numpy()


def _run_tract(path: Path) -> Runner:
    import tract

    network = tract.onnx().load(str(path)).into_model().into_runnable()
    return lambda image: network.run([image])[0].to_numpy()


def _tool(name: str, *arguments: str, folder: str | None = None) -> None:
    """Run a program that came with a package."""
    path = Path(sys.executable).with_name(name)
    command = [str(path) if path.exists() else name, *arguments]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, errors="replace", check=False, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise RuntimeError(f"{name} failed: {next((line for line in lines if 'error' in line.lower()), lines[-1])}")


TARGETS: Mapping[str, Target] = {
    "onnx": Target(("onnxruntime",), ("onnxruntime",), ".onnx", _onnx, _run_onnx),
    "openvino": Target(("openvino",), ("openvino",), ".xml", _openvino, _run_openvino),
    "coreml": Target(("coremltools",), ("coremltools",), ".mlpackage", _coreml, None, _operators_of_coreml),
    "executorch": Target(("executorch",), ("executorch",), ".pte", _executorch, _run_executorch),
    "litert": Target(
        ("litert-torch", "ai-edge-litert"), ("litert_torch", "ai_edge_litert"), ".tflite", _litert, _run_litert
    ),
    "onnx2tf": Target(
        ("onnx2tf", "tensorflow-cpu", "tf-keras", "ai-edge-litert"),
        ("onnx2tf", "tensorflow", "tf_keras", "ai_edge_litert"),
        ".tflite",
        _onnx2tf,
        _run_onnx2tf,
    ),
    "ncnn": Target(("pnnx", "ncnn"), ("pnnx", "ncnn"), ".param", _ncnn, _run_ncnn),
    "mnn": Target(("MNN",), ("MNN",), ".mnn", _mnn, _run_mnn),
    "iree": Target(
        ("iree-base-compiler", "iree-base-runtime"), ("iree.compiler", "iree.runtime"), ".vmfb", _iree, _run_iree
    ),
    "tvm": Target(("apache-tvm",), ("tvm",), ".so", _tvm, _run_tvm),
    "tract": Target(("tract",), ("tract",), ".onnx", _onnx, _run_tract),
}
