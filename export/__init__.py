"""Checkpoints and foreign ONNX to lynx ONNX: Hugging Face export, the ops, their function bodies."""
