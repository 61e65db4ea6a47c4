"""The Hugging Face hub's cache, laid out without a network; face detectors that find what a test plants."""

import numpy as np

CELLS = {stride: (640 // stride) ** 2 for stride in (8, 16, 32)}
POINTS = [-1.0, -1, 1, -1, 0, 0.5, -0.8, 1.2, 0.8, 1.2]  # around a cell's corner, in strides


def lay_in_hub(home, repository, **files):
    """A repository in huggingface_hub's cache; `files`: a name → the function that writes it."""
    folder = home / "hub" / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    for name, write in files.items():
        path = folder / "snapshots" / ("0" * 40) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)


def lay_detector(home, file, outputs, shape):
    """Lay an ONNX file that gives these outputs, by name, for whatever it sees, in the place of `file`."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes = [
        helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.float32(values)))
        for name, values in outputs.items()
    ]
    seen = helper.make_tensor_value_info("input.1", TensorProto.FLOAT, shape)
    gives = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, list(np.shape(values)))
        for name, values in outputs.items()
    ]
    graph = helper.make_graph(nodes, "planted", [seen], gives)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    lay_in_hub(home, file.repository, **{file.names[0]: lambda path: onnx.save(model, path)})


def scrfds(*faces, batch=()):
    """SCRFD's nine outputs with faces of (stride, row, column, anchor, score, four sides)."""
    outputs = {}
    for kind, width in (("score", 1), ("bbox", 4), ("kps", 10)):
        outputs |= {f"{kind}_{s}": np.zeros((*batch, 2 * CELLS[s], width), np.float32) for s in CELLS}
    for stride, row, column, anchor, score, sides in faces:
        at = 2 * (row * (640 // stride) + column) + anchor
        for kind, values in (("score", [score]), ("bbox", sides), ("kps", POINTS)):
            outputs[f"{kind}_{stride}"].reshape(2 * CELLS[stride], -1)[at] = values
    return outputs
