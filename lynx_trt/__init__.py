"""lynx-trt: Mixture-of-Experts language models as TensorRT engines with batch-aware expert selection."""

__version__ = "0.1.0"
