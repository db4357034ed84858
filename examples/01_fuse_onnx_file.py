"""Fuse an ONNX file from Python: `python examples/01_fuse_onnx_file.py [MODEL.onnx]`.

Without a file it makes one: a RepVGG block, conv 3x3 + conv 1x1 + skip connection, each with a BatchNorm.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import reparamc


def repvgg_block(channels: int = 16) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    constants: dict[str, np.ndarray] = {
        "w3": rng.normal(0, 0.1, (channels, channels, 3, 3)),
        "w1": rng.normal(0, 0.1, (channels, channels, 1, 1)),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w3"], ["c3"], "conv3x3", pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["x", "w1"], ["c1"], "conv1x1"),
    ]
    for branch, value in (("bn3", "c3"), ("bn1", "c1"), ("skip", "x")):
        names = [f"{branch}.{p}" for p in ("weight", "bias", "mean", "var")]
        constants |= {name: rng.uniform(0.5, 1.5, channels) for name in names}
        nodes.append(helper.make_node("BatchNormalization", [value, *names], [branch], branch))
    nodes += [
        helper.make_node("Add", ["bn3", "bn1"], ["both"], "add"),
        helper.make_node("Add", ["both", "skip"], ["sum"], "add_skip"),
        helper.make_node("Relu", ["sum"], ["y"], "relu"),
    ]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", channels, "h", "w"]) for n in "xy")
    weights = [numpy_helper.from_array(a.astype(np.float32), name) for name, a in constants.items()]
    graph = helper.make_graph(nodes, "repvgg_block", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        if len(sys.argv) > 1:
            source = Path(sys.argv[1])
        else:
            source = Path(folder) / "block.onnx"
            onnx.save(repvgg_block(), source)
        target = Path(folder) / "fused.onnx"

        reports: list[reparamc.Report] = []
        reparamc.fuse_onnx(source, output=target, on_report=reports.append)

        (report,) = reports
        print(report.table())
        for rewrite in report.rewrites[:3]:
            print(f"\n{rewrite.where}\n{rewrite.before}\nbecomes\n{rewrite.after}")
        for refusal in report.kept[:10]:
            print(f"\nkept: {refusal.where}: {refusal.reason}")
        if len(sys.argv) == 1:
            assert [node.op_type for node in onnx.load(target).graph.node] == ["Conv", "Relu"]


if __name__ == "__main__":
    main()
