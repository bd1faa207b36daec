"""Serving an artifact in Triton Inference Server: the model repository, the model in it, and the server's start."""
