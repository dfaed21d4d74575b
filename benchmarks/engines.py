"""The engines that only evaluate: onnxruntime and OpenVINO, on the ONNX file that `inception.export` writes."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.vocabulary import Network, Workload


def build(kind: str, path: str, work: Workload) -> Network:
    """The engine of this kind with the network in the ONNX file `path`, on a batch of random pictures."""
    pictures = np.random.default_rng(0).standard_normal((work.batch, 3, work.size, work.size), np.float32)
    return (OnnxRuntime if kind == "onnxruntime" else OpenVino)(path, pictures)


class OnnxRuntime(Network):
    def __init__(self, path: str, pictures: np.ndarray):
        self.path, self.feed = path, {"pictures": pictures}

    def set_threads(self, n: int) -> None:  # a session keeps its number of threads
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = n, 1
        self.session = onnxruntime.InferenceSession(self.path, options, providers=["CPUExecutionProvider"])

    def evaluate(self) -> Any:
        return self.session.run(None, self.feed)[0]


class OpenVino(Network):
    def __init__(self, path: str, pictures: np.ndarray):
        self.path, self.pictures = path, pictures

    def set_threads(self, n: int) -> None:
        import openvino

        core = openvino.Core()
        model = core.read_model(self.path)
        model.reshape(list(self.pictures.shape))
        # float32: on some processors OpenVINO would choose bfloat16.
        options = {"INFERENCE_NUM_THREADS": n, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        self.request = core.compile_model(model, "CPU", options).create_infer_request()

    def evaluate(self) -> Any:
        return next(iter(self.request.infer({"pictures": self.pictures}).values()))
