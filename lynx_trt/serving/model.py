"""The model of the repository: between the server's Python backend and `lynx_trt.serving.service`.

`python -m lynx_trt.serve` copies this file to `NAME/1/model.py`, beside the copy of lynx_trt that it imports.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# The copy beside this file, whatever lies in the folder that the server was started in.
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import triton_python_backend_utils as utils

from lynx_trt.serving import watchdog
from lynx_trt.serving.dial import DIAL
from lynx_trt.serving.schema import INPUTS
from lynx_trt.serving.start import start_service

# The backend fills in the rest of `utils` only after it has imported this file, so codes are looked up when needed.
KINDS = {"invalid": "INVALID_ARG", "busy": "UNAVAILABLE", "internal": "INTERNAL"}


class _Reply:
    """The response sender of one request; see lynx_trt.serving.service.Reply."""

    def __init__(self, request: Any) -> None:
        self._sender = request.get_response_sender()

    def send(self, outputs: Mapping[str, np.ndarray[Any, Any]], *, final: bool) -> None:
        tensors = [utils.Tensor(name, value) for name, value in outputs.items()]
        self._sender.send(
            utils.InferenceResponse(tensors), flags=utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if final else 0
        )

    def fail(self, kind: str, message: str) -> None:
        error = utils.TritonError(message, getattr(utils.TritonError, KINDS[kind]))
        self._sender.send(utils.InferenceResponse(error=error), flags=utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def cancelled(self) -> bool:
        return bool(self._sender.is_cancelled())


class TritonPythonModel:
    """What the Python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the artifact beside this file and start to serve it."""
        self._watchdog = watchdog.start()
        config = json.loads(args["model_config"])
        parameters = {name: value["string_value"] for name, value in config["parameters"].items()}
        labels = {"model": args["model_name"], "version": args["model_version"]}
        folder = Path(args["model_repository"])
        self._service = start_service(
            folder / args["model_version"] / "artifact", parameters, folder.parent / DIAL, utils, labels
        )

    def execute(self, requests: list[Any]) -> None:
        """Queue the requests; the answers are sent on another thread."""
        for request in requests:
            found = {tensor.name: utils.get_input_tensor_by_name(request, tensor.name) for tensor in INPUTS}
            values = {name: tensor.as_numpy() for name, tensor in found.items() if tensor is not None}
            self._service.accept(values, request.parameters(), _Reply(request))

    def finalize(self) -> None:
        """Stop: the server has waited for the requests in flight, as long as it was told to."""
        self._service.close()
        self._watchdog.terminate()
        self._watchdog.wait()
        # Metrics that outlive the connection to the server crash this process at its exit.
        del self._service
        gc.collect()
