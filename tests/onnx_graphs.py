"""A small network as an ONNX file, in the form in which face networks are published."""

import numpy as np
from onnx import TensorProto, helper, numpy_helper


def graph(images="n", size=112, seed=0, **others):
    """A small network, (images, 3, size, size) → a norm (images, 1) and an embedding (images, 64)."""
    rng = np.random.default_rng(seed)
    weights = {
        "w": (16, 3, 7, 7),
        "bias": (16, 1),
        "slope": (16, 1, 1),
        "w2": (32, 16, 5, 5),
        "fc": (288, 64),
    }
    tensors = [
        numpy_helper.from_array(
            rng.normal(0, 1 / np.sqrt(np.prod(shape[1:])), shape).astype(np.float32), name
        )
        for name, shape in weights.items()
    ]
    nodes = [
        helper.make_node("Flatten", ["bias"], ["b"], axis=0),
        helper.make_node("Squeeze", ["b"], ["b1"]),
        helper.make_node("Conv", ["image", "w", "b1"], ["c"], strides=[4, 4]),
        helper.make_node("PRelu", ["c", "slope"], ["r"]),
        helper.make_node("Conv", ["r", "w2"], ["c2"], strides=[4, 4]),
        helper.make_node("MaxPool", ["c2"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("MatMul", ["f", "fc"], ["embedding"]),
        helper.make_node("ReduceL2", ["embedding"], ["norm"], axes=[1]),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [images, 3, size, size])
    outputs = [("norm", 1), ("embedding", 64)]
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [images, d]) for n, d in outputs]
    inputs = [image, *others.get("inputs", [])]
    made = helper.make_graph(nodes, "network", inputs, outputs, tensors)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
