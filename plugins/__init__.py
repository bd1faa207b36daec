"""The ops on TensorRT: the contract, and the plugins that keep it."""
