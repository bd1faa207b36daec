"""Finding a TensorRT, and building engines with it."""
