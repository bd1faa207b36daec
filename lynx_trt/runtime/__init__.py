"""Decoding: sequences, the KV cache, sampling, and the backends that run the graph."""
