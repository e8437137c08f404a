"""Whole layers: choose, and put linear maps fitted to data in their place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from rnnprune_cli.calibrate import prepared
from rnnprune_cli.compensate import Moments
from rnnprune_cli.model import GATES, LayerFigures, RecurrentLayer, Repair
from rnnprune_cli.rewrite.layers import LinearMap, bypass, imitate, obstacle
from rnnprune_cli.shrink.task import (
    Shrunk,
    Task,
    method_of,
    nothing_removed,
    verified,
)

WITHOUT_LAYERS = "the model without layers computes what linear operators in their place compute"


def remove_layers(task: Task) -> Shrunk:
    """Removes whole layers: a linear map fitted to data, or the identity, stands for each.

    1. See which layers can go; watch what they make of what they read.
    2. Score and choose; one layer stays.
    3. Write the model without them, and the one whose operators compute the linear maps.
    4. Hold them against each other.

    Raises:
        RnnpruneError: If no layer could be removed.
        UsageError: If the criterion needs data and there are none.
    """
    method, model = method_of(task), task.model
    assert method.layer is not None  # the options were checked
    task.progress("finding the layers that can go")
    graph = prepared(model)
    nodes = {n.name or "": n for n in graph.graph.all_nodes() if n.op_type in GATES}
    fit = task.calibration is not None and task.stage.compensate
    blocked: dict[str, str] = {}
    free: list[RecurrentLayer] = []
    for layer in model.layers:
        if layer.name not in nodes or layer.name not in task.names:
            continue
        sizes = layer.input_size, layer.w.shape[0], layer.hidden_size
        why = obstacle(nodes[layer.name], *sizes, data=fit)
        if why:
            blocked[layer.name] = why
        else:
            free.append(layer)
    wanted = min(round(task.stage.sparsity * len(task.names)), len(model.layers) - 1)
    if task.stage.sparsity > 0 and not (wanted and free):
        raise nothing_removed(model, blocked, task.stage)
    fitted: dict[str, tuple[LinearMap, float, int]] = {}
    if task.calibration is not None and (fit or method.needs_data):
        fitted = _fitted(task, graph, [(layer, nodes[layer.name]) for layer in free])
        for layer in [layer for layer in free if layer.name not in fitted]:
            blocked[layer.name] = "the data never reach it, or it is in a loop"
            free.remove(layer)
        if task.stage.sparsity > 0 and not free:
            raise nothing_removed(model, blocked, task.stage)
    generator = np.random.default_rng(task.seed)
    scored = [
        method.layer(
            LayerFigures(
                float(np.mean([np.square(w.read(), dtype=np.float64).mean() for w in x.weights])),
                fitted[x.name][1] if x.name in fitted else None,
            ),
            generator,
        )
        for x in free
    ]
    gone = [free[k] for k in np.argsort(scored, kind="stable")[:wanted]]
    chosen = {x.name: fitted[x.name][0] if fit else LinearMap() for x in gone}
    task.progress("taking layers out")
    without, imitating = prepared(model), prepared(model)
    bypass(without, chosen)
    imitate(imitating, chosen)
    result = task.opened(without, "shrunk")
    result.skipped = model.skipped
    whole = task.opened(prepared(model), "prepared")
    imitation = task.opened(imitating, "masked")
    claims = verified(task, whole, imitation, result, WITHOUT_LAYERS, {})
    stands = "a linear map" if fit else "its input"
    repairs = [
        Repair(f"linear map for '{name}'", fitted[name][2], fitted[name][1])
        for name in chosen
        if fit
    ]
    blocked |= dict.fromkeys(chosen, f"removed: {stands} stands for it")
    return Shrunk(result, claims, (), (), tuple(repairs), blocked, ())


def _fitted(
    task: Task, graph: ir.Model, layers: Sequence[tuple[RecurrentLayer, ir.Node]]
) -> dict[str, tuple[LinearMap, float, int]]:
    """Runs a model on data and predicts what layers make from what they read.

    Returns:
        Name → map, share of the variance that it leaves unexplained, and number of steps.
    """
    values = [v for _, node in layers for v in (node.inputs[0], node.outputs[0]) if v is not None]
    names, batches = task.batches(graph, values, {})
    found: dict[str, Moments] = {}
    for batch in batches:
        for layer, node in layers:
            x, y = (
                batch.values.get(names.get(id(value), ""))
                for value in (node.inputs[0], node.outputs[0])
            )
            if x is None or y is None or not x.size or not y.size:
                continue  # in a loop, or in a branch that was not taken
            x, y = batch.steps(x), batch.steps(y)
            made = y.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1)
            both = np.concatenate([x, made], axis=2).reshape(1, -1, x.shape[2] + made.shape[2])
            found.setdefault(layer.name, Moments(1, both.shape[2])).add(both)
    maps = {}
    for layer, _ in layers:
        moments = found.get(layer.name)
        if moments is not None:
            units = layer.w.shape[0] * layer.hidden_size
            read = np.arange(layer.input_size + units) < layer.input_size
            weight, bias, unexplained = moments.predict(0, read)
            dtype = layer.w.dtype
            linear = LinearMap(weight.T.astype(dtype), bias.astype(dtype))
            maps[layer.name] = (linear, unexplained, moments.count)
    return maps
