"""Losses: the negative log-likelihood of labels, and of what the model itself expects.

Each is a mean over items (samples, or steps of samples), returned with how many these are. Padded
steps, and labels below 0, which stand for none, count nowhere.
"""

from __future__ import annotations

from typing import Any

from rnnprune_cli.trainer.call import Value, tf

_SMALLEST = 1e-12
"""Probabilities below count as this, as they do in the metrics."""


def cross_entropy(
    prediction: Value,
    labels: Value,
    probabilities: bool,
    valid: Value = None,
    weights: Value = None,
) -> tuple[Any, Any]:
    """Negative log-likelihood of classes.

    Args:
        prediction: ``[samples, …, classes]``.
        labels: Integers, as many as there are predictions; below 0 for none.
        probabilities: Whether predictions are probabilities, rather than logits.
        valid: bool ``[samples, steps]``: which steps count; None for all.
        weights: ``[classes]``: what a label of each class counts; None for the same.

    Returns:
        Mean over the labels, and their number.
    """
    labels = tf.reshape(tf.cast(labels, tf.int64), tf.shape(prediction)[:-1])
    logs = _log_probabilities(prediction, probabilities)
    counts = labels >= 0
    if valid is not None:
        counts &= tf.reshape(valid, [*tf.unstack(tf.shape(valid)), *[1] * (labels.shape.rank - 2)])
    labels = tf.maximum(tf.cast(labels, tf.int32), 0)
    picked = tf.gather(logs, labels, axis=-1, batch_dims=labels.shape.rank)
    if weights is not None:
        picked *= tf.gather(tf.cast(weights, picked.dtype), labels)
    return _mean(-picked, counts)


def distilled(
    prediction: Value,
    teacher: Value,
    classes: bool,
    probabilities: bool,
    temperature: float,
    variance: float,
    samples: Value,
    valid: Value = None,
) -> tuple[Any, Any]:
    """How far a model is from another, of the same task.

    Of classes, the Kullback-Leibler divergence of softened predictions, times the square of the
    temperature, so that gradients keep their size (Hinton et al. 2015, arXiv:1503.02531, section
    2). Of other values, the squared error in units of their variance.

    Args:
        prediction: Any shape, with ``valid`` ``[samples, steps, …]``; classes on the last axis.
        teacher: Of the same shape.
        classes: Whether they predict classes.
        probabilities: Whether as probabilities, rather than logits.
        temperature: Above 1 small probabilities count more.
        variance: Of the teacher's values.
        samples: How many they are of.
        valid: bool ``[samples, steps]``: which steps count; None for all.

    Returns:
        Mean over all entries, and the number of samples or steps.
    """
    teacher = tf.cast(teacher, prediction.dtype)
    if classes:
        logs, wanted = (
            tf.nn.log_softmax(_log_probabilities(p, probabilities) / temperature)
            for p in (prediction, teacher)
        )
        errors = temperature**2 * tf.reduce_sum(tf.exp(wanted) * (wanted - logs), -1)
    else:
        errors = tf.square(prediction - teacher) / variance
    if valid is None:
        return tf.reduce_mean(errors), samples
    return _mean(tf.reduce_mean(errors, list(range(2, errors.shape.rank))), valid)


def squared_error(
    prediction: Value, target: Value, samples: Value, valid: Value = None
) -> tuple[Any, Any]:
    """Mean squared error.

    Args:
        prediction: ``[samples, …]``, with ``valid`` ``[samples, steps, …]``.
        target: As many values.
        samples: How many these are.
        valid: bool ``[samples, steps]``: which steps count; None for all.

    Returns:
        Mean over all entries, and the number of samples or steps.
    """
    target = tf.reshape(tf.cast(target, prediction.dtype), tf.shape(prediction))
    if valid is not None:  # what stands in padding may be no number, which gradients would become
        beyond = tf.reshape(~valid, [*tf.unstack(tf.shape(valid)), *[1] * (target.shape.rank - 2)])
        target = tf.where(beyond, tf.zeros_like(target), target)
    errors = tf.square(prediction - target)
    if valid is None:
        return tf.reduce_mean(errors), samples
    return _mean(tf.reduce_mean(errors, list(range(2, errors.shape.rank))), valid)


def expected(
    prediction: Value,
    classes: bool,
    probabilities: bool,
    seed: Value,
    samples: Value,
    valid: Value = None,
) -> tuple[Any, Any]:
    """Negative log-likelihood of labels that are drawn from the model's own predictions.

    Of classes, from their probabilities; of other values, from a Gaussian of unit variance around
    them, whose negative log-likelihood is half the squared error.

    Args:
        prediction: Any shape, with ``valid`` ``[samples, steps, …]``; classes on the last axis.
        classes: Whether they predict classes.
        probabilities: Whether as probabilities, rather than logits.
        seed: int32 ``[2]``.
        samples: How many they are of.
        valid: bool ``[samples, steps]``: which steps count; None for all.

    Returns:
        Sum over what a sample (a step) has, as the mean over these, and their number.
    """
    if classes:
        logs = _log_probabilities(prediction, probabilities)
        flat = tf.reshape(logs, [-1, logs.shape[-1]])
        drawn = tf.random.stateless_categorical(tf.stop_gradient(flat), 1, seed)
        picked = tf.gather(flat, drawn, axis=-1, batch_dims=1)
        likelihood = -tf.reshape(picked, tf.shape(logs)[:-1])
        likelihood.set_shape(logs.shape[:-1])
    else:
        noise = tf.random.stateless_normal(tf.shape(prediction), seed, dtype=prediction.dtype)
        drawn = tf.stop_gradient(prediction) + noise
        likelihood = 0.5 * tf.square(prediction - drawn)
    if valid is None:
        return tf.reduce_sum(likelihood) / tf.cast(samples, likelihood.dtype), samples
    return _mean(tf.reduce_sum(likelihood, list(range(2, likelihood.shape.rank))), valid)


def _log_probabilities(prediction: Value, probabilities: bool) -> Value:
    """Returns the log-probability of each class; a single column speaks for the second of two."""
    if prediction.shape[-1] == 1:
        other = 1 - prediction if probabilities else tf.zeros_like(prediction)
        prediction = tf.concat([other, prediction], -1)
    if probabilities:
        return tf.math.log(tf.maximum(prediction, _SMALLEST))
    return tf.nn.log_softmax(prediction)


def _mean(values: Value, counts: Value) -> tuple[Any, Any]:
    """Returns the mean of the values that count, and their number."""
    number = tf.reduce_sum(tf.cast(counts, tf.int32))
    total = tf.reduce_sum(tf.where(counts, values, tf.zeros_like(values)))
    return tf.math.divide_no_nan(total, tf.cast(number, total.dtype)), number
