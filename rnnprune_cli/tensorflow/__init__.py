"""The TensorFlow back end; :mod:`rnnprune_cli.tensorflow_model` is its public face.

TensorFlow itself is imported only by :func:`rnnprune_cli.tensorflow.runtime.import_tensorflow`.
"""
