"""What fine-tuning minimizes: held against NumPy in float64, written from the definitions."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import Graph, run, weights
from onnx import helper, numpy_helper
from tuning import INPUTS, STEPS, STILL, Arrays, inputs, network, tune

from rnnprune_cli.errors import RnnpruneError, UsageError
from rnnprune_cli.model import FineTuned

COUNT, HELD = 30, 17
CLASSES = 3
DIGITS = 1e-4
"""Relative: TensorFlow computes in float32."""


def sequences(
    labels: str, count: int, seed: int, lengths: bool = False, dtype: type = np.int64
) -> dict[str, np.ndarray]:
    """Samples and their labels: ``class`` or ``real``, of each ``sample`` or ``step``."""
    rng = np.random.default_rng(seed)
    arrays = {"x": inputs(count, seed=seed)}
    kind, _, of = labels.partition(" ")
    shape = (count,) if of == "sample" else (count, STEPS)
    if kind == "class":
        arrays["labels"] = rng.integers(-1, CLASSES, shape).astype(dtype)  # below 0: none
    elif kind == "two":
        arrays["labels"] = rng.integers(0, 2, shape).astype(dtype)
    elif kind == "real":
        arrays["labels"] = rng.standard_normal((*shape, CLASSES)).astype(np.float32)
    if lengths:
        arrays["lengths"] = rng.integers(1, STEPS + 1, count).astype(np.int32)
    return arrays


# The definitions


def columns(values: np.ndarray, probabilities: bool) -> np.ndarray:
    """Logarithms of probabilities; one column speaks for the second of two classes."""
    values = values.astype(np.float64)
    if values.shape[-1] == 1:
        other = 1 - values if probabilities else np.zeros_like(values)
        values = np.concatenate([other, values], axis=-1)
    if probabilities:
        return np.log(np.maximum(values, 1e-12))
    return normal(values)


def normal(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def cross_entropy(values, labels, valid, probabilities, counts=None) -> float:
    logs = columns(values, probabilities)
    total, number = 0.0, 0
    for place in np.ndindex(labels.shape):
        if labels[place] >= 0 and valid[place]:
            total -= logs[place][labels[place]] * (1 if counts is None else counts[labels[place]])
            number += 1
    return total / number


def divergence(values, wanted, valid, probabilities, temperature) -> float:
    p = normal(columns(wanted, probabilities) / temperature)
    q = normal(columns(values, probabilities) / temperature)
    each = (np.exp(p) * (p - q)).sum(-1) * temperature**2
    return float(each[valid].mean())


def squares(values, wanted, valid, variance) -> float:
    apart = (values.astype(np.float64) - wanted)[valid]
    return float((apart**2).mean() / variance)


# Held against what training says


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, its data, and how it is trained."""

    model: dict
    labels: str
    lengths: bool = False
    distill: float | None = None
    temperature: float = 2.0
    balance: bool = False

    @property
    def probabilities(self) -> bool:
        return self.model.get("end") is not None


CASES = {
    "class of a sample": Case({"last": True}, "class sample", distill=0.0),
    "class of a step": Case({}, "class step", distill=0.0),
    "class of a step, padded": Case({}, "class step", True, 0.0),
    "class of a step, told": Case({"lengths": True}, "class step", True, 0.0),
    "probability of a step, told": Case(
        {"lengths": True, "end": "Softmax", "direction": "bidirectional"}, "class step", True, 0.3
    ),
    "class of a sample, reverse": Case(
        {"last": True, "direction": "reverse"}, "class sample", True
    ),
    "one of two, logit": Case({"last": True, "outputs": 1}, "two sample", distill=0.25),
    "one of two, probability": Case(
        {"outputs": 1, "end": "Sigmoid"}, "two step", True, 0.6, temperature=3.5
    ),
    "real": Case({"last": True}, "real sample", distill=0.0),
    "real, padded": Case({"op": "GRU"}, "real step", True, 0.4),
    "distance": Case({}, "none"),
    "distance, padded": Case({"direction": "bidirectional"}, "none", True),
    "divergence": Case({"end": "Softmax"}, "none", temperature=1.0),
    "divergence of one column": Case(
        {"outputs": 1, "end": "Sigmoid", "lengths": True}, "none", True, temperature=5.0
    ),
    "balanced": Case({"last": True}, "class sample", distill=0.0, balance=True),
}


def outputs(model: onnx.ModelProto | Path, arrays: Arrays, told: bool) -> np.ndarray:
    """Output of each sample, run by itself and without its padding."""
    found = []
    for k in range(len(arrays["x"])):
        length = int(arrays["lengths"][k]) if "lengths" in arrays else STEPS
        feed = {"x": arrays["x"][k : k + 1, :length]}
        feed |= {"lengths": arrays["lengths"][k : k + 1]} if told else {}
        (result,) = run(model, feed)
        if result.ndim == 3:
            result = np.pad(result, ((0, 0), (0, STEPS - length), (0, 0)), constant_values=0.5)
        found.append(result)
    return np.concatenate(found)


def expected(case: Case, folder: Path, arrays: Arrays, train: Arrays) -> float:
    """The loss of the one-shot model."""
    told = bool(case.model.get("lengths"))
    dense, pruned = (outputs(folder / f, arrays, told) for f in ("model.onnx", "one.onnx"))
    shape = dense.shape[:-1]
    valid = np.ones(shape, bool)
    if len(shape) == 2 and case.lengths:
        valid = np.arange(STEPS)[None] < arrays["lengths"][:, None]
    original = outputs(folder / "model.onnx", train, told)
    if len(shape) == 2 and case.lengths:
        original = original[np.arange(STEPS)[None] < train["lengths"][:, None]]
    variance = float(original.astype(np.float64).var())
    labels = arrays.get("labels")
    share = case.distill if case.distill is not None else 1.0 if labels is None else 0.9
    total = 0.0
    if share < 1 and labels.dtype.kind == "f":
        total += (1 - share) * squares(pruned, labels, valid, variance)
    elif share < 1:
        counts = None
        if case.balance:
            known = train["labels"][train["labels"] >= 0]
            counts = [len(known) / CLASSES / np.sum(known == k) for k in range(CLASSES)]
        total += (1 - share) * cross_entropy(pruned, labels, valid, case.probabilities, counts)
    classes = case.probabilities or (labels is not None and labels.dtype.kind == "i")
    if share > 0 and classes:
        total += share * divergence(pruned, dense, valid, case.probabilities, case.temperature)
    elif share > 0:
        total += share * squares(pruned, dense, valid, variance)
    return total


@pytest.mark.parametrize("name", CASES)
def test_losses_are_what_their_definitions_say(tmp_path, name):
    case = CASES[name]
    model = network(**case.model)
    train, held = (
        sequences(case.labels, count, seed, case.lengths) for count, seed in ((COUNT, 1), (HELD, 2))
    )
    tune(tmp_path, model, None, name="one", compensate=False)
    report = tune(
        tmp_path, model, train, validation=held, compensate=False, epochs=1, lr=STILL, batch=COUNT,
        distill=case.distill, temperature=case.temperature, balance=case.balance,
    )  # fmt: skip
    (epoch,) = report.finetune.epochs
    assert report.finetune.steps == 1
    assert epoch.loss == pytest.approx(expected(case, tmp_path, train, train), rel=DIGITS)
    assert epoch.validation_loss == pytest.approx(expected(case, tmp_path, held, train), rel=DIGITS)


@pytest.mark.parametrize("size", [1, 7])
def test_a_batch_is_a_mean_over_all_of_its_labels(tmp_path, size):
    """Not over samples, or parts of one length; an epoch is a mean over batches."""
    case = CASES["class of a step, padded"]
    train = sequences(case.labels, COUNT, 1, True)
    model = network()
    tune(tmp_path, model, None, name="one", compensate=False)
    report = tune(
        tmp_path, model, train, validation=train, compensate=False, epochs=1, lr=STILL,
        batch=size, distill=0.0,
    )  # fmt: skip
    from rnnprune_cli.data import load_dataset
    from rnnprune_cli.onnx_model import OnnxModel
    from rnnprune_cli.trainer.batches import Batches

    runner = OnnxModel(tmp_path / "model.onnx").open()
    data = load_dataset(tmp_path / "out.train.npz", runner.inputs)
    losses = []
    for samples in Batches(data, size, runner, {}).epoch([0, 0]):
        part = {name: array[samples] for name, array in train.items()}
        known = part["labels"][np.arange(STEPS)[None] < part["lengths"][:, None]] >= 0
        losses.append(expected(case, tmp_path, part, train) if known.any() else 0.0)
    assert report.finetune.epochs[0].loss == pytest.approx(np.mean(losses), rel=DIGITS)


# Several outputs, tokens, and labels of any shape


def two_heads() -> onnx.ModelProto:
    """Classes ``kind`` at each step, and a number ``rest`` for the whole."""
    made, rng = weights("GRU", 8, INPUTS, 1, 0), np.random.default_rng(0)
    g = Graph(["batch", "time", INPUTS])
    x = g.op("Transpose", "x", perm=[1, 0, 2])
    y = g.op("GRU", x, *(made[name] for name in "WRB"), outs=2, hidden_size=8)
    last = y.replace("_0", "_1")
    steps = g.op("Transpose", g.op("Squeeze", y, np.array([1])), perm=[1, 0, 2])
    heads = [rng.standard_normal((8, n)).astype(np.float32) for n in (CLASSES, 1)]
    ends = [
        g.op("MatMul", steps, heads[0]),
        g.op("MatMul", g.op("Squeeze", last, np.array([0])), heads[1]),
    ]
    for name, value in zip(("kind", "rest"), ends, strict=True):
        g.output(g.op("Identity", value))
        g.nodes[-1].output[0] = g.outputs[-1].name = name
    return g.model()


def test_outputs_with_labels_of_their_own_are_weighed(tmp_path):
    model, rng = two_heads(), np.random.default_rng(3)
    arrays = {
        "x": inputs(COUNT),
        "target:kind": rng.integers(0, CLASSES, (COUNT, STEPS)),
        "target:rest": rng.standard_normal(COUNT).astype(np.float32),
    }
    tune(tmp_path, model, None, name="one", compensate=False)
    kind, rest = run(tmp_path / "one.onnx", {"x": arrays["x"]})
    dense_kind, dense_rest = run(model, {"x": arrays["x"]})
    valid, whole = np.ones((COUNT, STEPS), bool), np.ones(COUNT, bool)
    parts = {
        "kind": cross_entropy(kind, arrays["target:kind"], valid, False),
        "rest": squares(rest[:, 0], arrays["target:rest"], whole, dense_rest.var()),
        "kind's": divergence(kind, dense_kind, valid, False, 2.0),
        "rest's": squares(rest, dense_rest, whole, dense_rest.var()),
    }

    def loss(name: str, chosen: Arrays, **more: object) -> tuple[float, str]:
        report = tune(
            tmp_path, model, chosen, validation=chosen, compensate=False, epochs=1, lr=STILL,
            batch=8, name=name, **more,
        )  # fmt: skip
        return report.finetune.epochs[0].validation_loss, report.finetune.loss

    found, said = loss("both", arrays, distill=0.0)
    assert found == pytest.approx(parts["kind"] + parts["rest"], rel=DIGITS)
    assert said == "cross-entropy of kind + squared error of rest"
    found, said = loss("weighed", arrays, distill=0.2, output_weights=("rest=0.25", "kind=3"))
    wanted = 3 * (0.8 * parts["kind"] + 0.2 * parts["kind's"])
    wanted += 0.25 * (0.8 * parts["rest"] + 0.2 * parts["rest's"])
    assert found == pytest.approx(wanted, rel=DIGITS)
    found, said = loss("left", arrays, distill=0.0, output_weights=("kind=0",))
    assert found == pytest.approx(parts["rest"], rel=DIGITS)
    only = {name: array for name, array in arrays.items() if name != "target:rest"}
    found, said = loss("one_labelled", only, distill=0.5)
    wanted = 0.5 * (parts["kind"] + parts["kind's"] + parts["rest's"])
    assert found == pytest.approx(wanted, rel=DIGITS)
    with pytest.raises(UsageError, match="no output 'rast'") as caught:
        loss("misspelt", arrays, output_weights=("rast=2",))
    assert "'rest'" in caught.value.hint
    with pytest.raises(UsageError, match="nothing to train for"):
        loss("none", arrays, output_weights=("rest=0", "kind=0"))


def test_models_that_read_tokens_predict_classes_of_them(tmp_path):
    rng, vocabulary = np.random.default_rng(4), 11
    made = weights("LSTM", 8, INPUTS, 1, 0)
    g = Graph(["batch", "time"])
    g.inputs[0] = helper.make_tensor_value_info("x", 6, ["batch", "time"])
    table = rng.standard_normal((vocabulary, INPUTS)).astype(np.float32)
    v = g.op("Transpose", g.op("Gather", table, "x"), perm=[1, 0, 2])
    v = g.op("LSTM", v, *(made[name] for name in "WRB"), hidden_size=8)
    v = g.op("Transpose", g.op("Squeeze", v, np.array([1])), perm=[1, 0, 2])
    g.output(g.op("MatMul", v, rng.standard_normal((8, vocabulary)).astype(np.float32)))
    model = g.model()
    text = rng.integers(0, vocabulary, (COUNT, STEPS + 1)).astype(np.int32)
    plain = {"x": text[:, :-1]}
    tune(tmp_path, model, None, name="one", compensate=False)
    pruned, dense = (run(m, plain)[0] for m in (tmp_path / "one.onnx", model))
    valid = np.ones((COUNT, STEPS), bool)
    same = {"compensate": False, "epochs": 1, "lr": STILL}
    report = tune(tmp_path, model, plain, validation=plain, **same)
    assert report.finetune.epochs[0].validation_loss == pytest.approx(
        divergence(pruned, dense, valid, False, 2.0), rel=DIGITS
    )
    arrays = {**plain, "labels": text[:, 1:]}
    report = tune(tmp_path, model, arrays, validation=arrays, name="b", distill=0.0, **same)
    wanted = cross_entropy(pruned, arrays["labels"], valid, False)
    assert report.finetune.epochs[0].validation_loss == pytest.approx(wanted, rel=DIGITS)
    (metric,) = report.finetune.epochs[0].metrics
    assert (metric.name, metric.value) == ("bits-per-char", pytest.approx(wanted / np.log(2)))
    x = {"x": plain["x"], "labels": arrays["labels"]}
    report = tune(tmp_path, model, x, validation=x, name="c", epochs=2, lr=0.01)
    before, after = stored_of(model), stored_of(tmp_path / "c.onnx")
    assert report.finetune.best > 0
    assert not np.array_equal(before, after)  # embeddings learn, too


def stored_of(model: onnx.ModelProto | Path) -> np.ndarray:
    """The table of a Gather."""
    proto = onnx.load(str(model)) if isinstance(model, Path) else model
    (name,) = (node.input[0] for node in proto.graph.node if node.op_type == "Gather")
    return next(numpy_helper.to_array(t) for t in proto.graph.initializer if t.name == name)


def without_last_axis(model: onnx.ModelProto) -> onnx.ModelProto:
    value = model.graph.output[0].name
    axes = numpy_helper.from_array(np.array([-1]), "last_axis")
    model.graph.initializer.append(axes)
    model.graph.node.append(helper.make_node("Squeeze", [value, "last_axis"], ["squeezed"]))
    del model.graph.output[:]
    model.graph.output.append(helper.make_empty_tensor_value_info("squeezed"))
    return onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)


def losses_of(folder: Path, model: onnx.ModelProto, arrays: Arrays, name: str = "out") -> FineTuned:
    report = tune(
        folder, model, arrays, validation=arrays, name=name, compensate=False, epochs=1, batch=8,
        force=True,
    )  # fmt: skip
    assert report.finetune.rollbacks == 0
    return report.finetune


TYPES = (np.int8, np.uint8, np.uint64, ">i4")


def test_labels_may_be_of_any_integer_type(tmp_path):
    model, rng = network(last=True), np.random.default_rng(0)
    arrays = {"x": inputs(COUNT), "labels": rng.integers(0, CLASSES, COUNT)}
    one = losses_of(tmp_path, model, arrays)
    for kind in TYPES:
        other = losses_of(tmp_path, model, arrays | {"labels": arrays["labels"].astype(kind)})
        assert [e.validation_loss for e in other.epochs] == [e.validation_loss for e in one.epochs]


@pytest.mark.parametrize(("last", "end"), [(True, None), (False, "Sigmoid")])
def test_labels_of_two_classes_may_have_any_shape(tmp_path, last, end):
    """As metrics take them: with an axis of length 1 or without, of outputs with it or without."""
    arrays = sequences("two sample" if last else "two step", COUNT, 3)
    model = network(outputs=1, last=last, end=end)
    squeezed = without_last_axis(network(outputs=1, last=last, end=end))
    labels = arrays["labels"]
    cases = [(model, labels), (model, labels.astype(bool)), (model, labels[..., None])]
    cases += [(squeezed, labels)]
    found = [losses_of(tmp_path, one, arrays | {"labels": own}).epochs[0] for one, own in cases]
    for epoch in found[1:]:
        assert epoch.loss == pytest.approx(found[0].loss, rel=1e-5)
        assert epoch.validation_loss == pytest.approx(found[0].validation_loss, rel=1e-5)


@pytest.mark.parametrize("labels", ["class sample", "class step", "real step"])
@pytest.mark.parametrize("lengths", [False, True])
def test_an_axis_of_length_one_of_labels_changes_nothing(tmp_path, labels, lengths):
    arrays = sequences(labels, COUNT, 3, lengths)
    outputs = 1 if labels == "real step" else CLASSES
    if outputs == 1:
        arrays["labels"] = arrays["labels"][..., 0]
    model = network(last=labels.endswith("sample"), outputs=outputs)
    found = [
        losses_of(tmp_path, model, arrays | {"labels": own}).epochs[0]
        for own in (arrays["labels"], arrays["labels"][..., None])
    ]
    assert found[0].validation_loss == found[1].validation_loss


def test_labels_for_validation_may_be_of_another_type(tmp_path):
    train = sequences("class step", COUNT, 1)
    others = [train["labels"].astype(np.int32)[..., None]]
    found = [
        tune(
            tmp_path, network(), train, validation=train | {"labels": labels}, compensate=False,
            epochs=1, force=True,
        ).finetune.epochs[0].validation_loss
        for labels in (train["labels"], *others)
    ]  # fmt: skip
    assert len(set(found)) == 1


def test_lengths_of_only_one_of_both_data_sets_mean_that_the_other_is_whole(tmp_path):
    train = sequences("class step", COUNT, 1)
    whole = train | {"lengths": np.full(COUNT, STEPS)}
    short = sequences("class step", HELD, 2, lengths=True)
    found = [
        tune(
            tmp_path, network(), one, validation=two, compensate=False, epochs=1, force=True
        ).finetune.epochs[0]
        for one, two in ((train, short), (whole, short), (train, train), (whole, train))
    ]
    assert found[0].validation_loss == pytest.approx(found[1].validation_loss, rel=1e-5)
    assert found[2].validation_loss == pytest.approx(found[3].validation_loss, rel=1e-5)


MISMATCHES = {
    "none": (None, "for validation hold no 'labels'", "--validation"),
    "another kind": (np.zeros((HELD, CLASSES), np.float32), "another kind", "integers"),
    "no class": (np.full(HELD, 7), "label 7 is no class of a model with 3", "below 0"),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_labels_for_validation_that_do_not_fit_are_refused(tmp_path, name):
    labels, message, hint = MISMATCHES[name]
    held = {"x": inputs(HELD)} | ({} if labels is None else {"labels": labels})
    with pytest.raises(RnnpruneError, match=message) as caught:
        tune(
            tmp_path, network(last=True), sequences("class sample", COUNT, 1), validation=held,
            epochs=1,
        )  # fmt: skip
    assert hint in caught.value.hint
    assert not (tmp_path / "out.onnx").exists()


def test_a_label_that_is_no_class_is_found_before_training(tmp_path):
    """Only some of the samples are looked at closely."""
    count = 1200
    arrays = {"x": inputs(count), "labels": np.zeros(count, np.int64)}
    arrays["labels"][501] = 3
    with pytest.raises(RnnpruneError, match="label 3 is no class of a model with 3"):
        tune(tmp_path, network(last=True), arrays, epochs=1, told=refuse_training)


def refuse_training(step: str) -> None:
    assert "epoch" not in step
