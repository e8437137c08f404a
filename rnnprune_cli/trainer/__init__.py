"""ONNX models as TensorFlow functions with trainable weights.

The modules here, like those of ``rnnprune_cli.tensorflow``, import TensorFlow; nothing else does.
"""
