"""Quantized checkpoints, presented as unquantized ones: a module for each way in which weights are stored.

`methods.dequantized` puts in the place of the tensors that hold a quantized weight (its integers, its scales) one
tensor that is computed of them when it is read. All else that reads a checkpoint sees weights of their full shape.
"""
