"""Masks → ONNX graph: how pruned weights are written into a model."""
