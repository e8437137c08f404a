"""Graphs exported by PyTorch: `ts_*` by the TorchScript exporter, `dyn_*` by the dynamo one.

Weights are PyTorch's own seeded initial values, enlarged so that gates move; expected outputs are
those of the module run eagerly.
"""
# mypy: no-warn-return-any

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import onnx
import torch
import torch._dynamo
from common import Case, strip_notes, write_cases
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

T, N, IN, H = 7, 3, 5, 6
CELLS: dict[str, Callable[..., nn.RNNBase]] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
Feeds = dict[str, Tensor]
Axes = dict[str, dict[int, str]]
TIME_BATCH = {0: "T", 1: "N"}
BATCH_TIME = {0: "N", 1: "T"}


@dataclass(frozen=True)
class Plan:
    """A module and how to export it."""

    name: str
    module: nn.Module
    feeds: Feeds
    outputs: tuple[str, ...]
    idiom: str
    axes: Axes = field(default_factory=dict)
    opset: int = 18
    dynamo: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    atol: float = 1e-5


class Tagger(nn.Module):
    """A recurrent layer, one way of using its output, and a dense layer."""

    def __init__(self, cell: str, head: str, inputs: int = IN, **settings: Any) -> None:
        """Take the cell (`lstm`, `gru`, `rnn`), the head and the settings of the layer."""
        super().__init__()
        self.head = head
        self.rnn = CELLS[cell](inputs, H, **settings)
        width = H * (2 if self.rnn.bidirectional else 1)
        self.score = nn.Linear(width, 1)
        self.norm = nn.LayerNorm(width)
        self.dense = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Give class scores for each sequence or step."""
        y, state = self.rnn(x)
        time = 1 if self.rnn.batch_first else 0
        match self.head:
            case "last":
                y = y[:, -1] if time else y[-1]
            case "mean":
                y = y.mean(dim=time)
            case "states":
                h = state[0] if isinstance(state, tuple) else state
                y = torch.cat([h[-2], h[-1]], dim=1)
            case "residual":
                y = y + x
            case "attention":
                y = (torch.softmax(self.score(y), dim=time) * y).sum(dim=time)
            case "norm":
                y = torch.relu(self.norm(y))
            case "directions":
                forward, backward = y.chunk(2, dim=-1)
                y = torch.cat([forward[-1], backward[0]], dim=-1)
        return self.dense(y)


class Streaming(nn.Module):
    """States are inputs and outputs."""

    def __init__(self, cell: str, **settings: Any) -> None:
        """Take the cell and the settings of the layer."""
        super().__init__()
        self.rnn = CELLS[cell](IN, H, **settings)
        self.dense = nn.Linear(H, 2)

    def forward(self, x: Tensor, h0: Tensor, c0: Tensor | None = None) -> tuple[Tensor, ...]:
        """Give scores and the next states."""
        if c0 is None:
            y, h = self.rnn(x, h0)
            return self.dense(y), h
        y, (h, c) = self.rnn(x, (h0, c0))
        return self.dense(y), h, c


class PackedState(nn.Module):
    """Both states travel in one tensor, as in Silero VAD."""

    def __init__(self) -> None:
        """Make a two-layer LSTM behind a convolution."""
        super().__init__()
        self.conv = nn.Conv1d(1, IN, 3, padding=1)
        self.rnn = nn.LSTM(IN, H, 2)
        self.dense = nn.Conv1d(H, 1, 1)

    def forward(self, wave: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Give a probability and the next states."""
        x = torch.relu(self.conv(wave.unsqueeze(1))).permute(2, 0, 1)
        y, (h, c) = self.rnn(x, (state[0], state[1]))
        p = torch.sigmoid(self.dense(torch.relu(y.permute(1, 2, 0)))).mean(2)
        return p, torch.stack([h, c])


class ZerosInside(nn.Module):
    """Zero states made in `forward`."""

    def __init__(self) -> None:
        """Make a two-layer LSTM."""
        super().__init__()
        self.rnn = nn.LSTM(IN, H, 2, batch_first=True)
        self.dense = nn.Linear(H, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Give scores from the last state of the top layer."""
        zeros = torch.zeros(2, x.size(0), H, dtype=x.dtype)
        _, (h, _) = self.rnn(x, (zeros, zeros))
        return self.dense(h[-1])


class Unrolled(nn.Module):
    """A cell in a Python loop over a fixed number of steps."""

    def __init__(self, cell: Callable[..., nn.RNNCellBase]) -> None:
        """Take the class of the cell."""
        super().__init__()
        self.cell = cell(IN, H)
        self.dense = nn.Linear(H, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Give scores for each step."""
        h = torch.zeros(x.size(1), H)
        c = torch.zeros(x.size(1), H)
        steps = []
        for t in range(3):
            if isinstance(self.cell, nn.LSTMCell):
                h, c = self.cell(x[t], (h, c))
            else:
                h = self.cell(x[t], h)
            steps.append(self.dense(h))
        return torch.stack(steps)


class HandCell(nn.Module):
    """One LSTM step written out with one joint kernel, states outside."""

    def __init__(self) -> None:
        """Make the joint kernel over input and state."""
        super().__init__()
        self.gates = nn.Linear(IN + H, 4 * H)
        self.dense = nn.Linear(H, 2)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give scores and the next states."""
        i, f, g, o = self.gates(torch.cat([x, h], dim=1)).chunk(4, dim=1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        return self.dense(h), h, c


class Padded(nn.Module):
    """Sequences of several lengths, packed and padded again."""

    def __init__(self, cell: str, **settings: Any) -> None:
        """Take the cell and the settings of the layer."""
        super().__init__()
        self.rnn = CELLS[cell](IN, H, batch_first=True, **settings)
        self.dense = nn.Linear(H * (2 if self.rnn.bidirectional else 1), 2)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Give scores for each step."""
        packed = pack_padded_sequence(x, lengths, batch_first=True)
        y, _ = self.rnn(packed)
        y, _ = pad_packed_sequence(y, batch_first=True)
        return self.dense(y)


class Shared(nn.Module):
    """One layer called on two inputs (siamese)."""

    def __init__(self) -> None:
        """Make the layer."""
        super().__init__()
        self.rnn = nn.LSTM(IN, H)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Give the distance of the two last states."""
        return (self.rnn(x)[1][0][-1] - self.rnn(z)[1][0][-1]).abs().sum(1)


class Tied(nn.Module):
    """Two layers, one after the other, with the same Parameters."""

    def __init__(self) -> None:
        """Make two layers and tie them."""
        super().__init__()
        self.first = nn.GRU(H, H)
        self.second = nn.GRU(H, H)
        for name, _ in self.first.named_parameters():
            setattr(self.second, name, getattr(self.first, name))

    def forward(self, x: Tensor) -> Tensor:
        """Give the output of the second layer."""
        return self.second(self.first(x)[0])[0]


class Separate(nn.Module):
    """A stack of modules: convolution, bidirectional LSTM, dense, GRU, embedding input."""

    def __init__(self) -> None:
        """Make the layers."""
        super().__init__()
        self.embedding = nn.Embedding(11, IN, padding_idx=0)
        self.conv = nn.Conv1d(IN, 4, 3, padding=1)
        self.lstm = nn.LSTM(4, H, batch_first=True, bidirectional=True)
        self.between = nn.Linear(2 * H, 4)
        self.gru = nn.GRU(4, 8, batch_first=True)
        self.dense = nn.Linear(8, 3)

    def forward(self, words: Tensor) -> Tensor:
        """Give log probabilities for each word."""
        x = self.conv(self.embedding(words).transpose(1, 2)).transpose(1, 2)
        y = torch.relu(self.between(self.lstm(x)[0]))
        return torch.log_softmax(self.dense(self.gru(y)[0]), dim=-1)


class EncoderDecoder(nn.Module):
    """A bidirectional encoder whose joined states start the decoder."""

    def __init__(self) -> None:
        """Make the layers."""
        super().__init__()
        self.encoder = nn.LSTM(IN, H, bidirectional=True)
        self.bridge_h = nn.Linear(2 * H, 8)
        self.bridge_c = nn.Linear(2 * H, 8)
        self.decoder = nn.LSTM(4, 8)
        self.query = nn.Linear(8, 2 * H)
        self.dense = nn.Linear(8 + 2 * H, 3)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Attend from each decoder step to the encoder."""
        memory, (h, c) = self.encoder(x)
        h = torch.tanh(self.bridge_h(torch.cat([h[0], h[1]], dim=1)))
        c = self.bridge_c(torch.cat([c[0], c[1]], dim=1))
        y, _ = self.decoder(z, (h.unsqueeze(0), c.unsqueeze(0)))
        weights = torch.softmax(torch.einsum("und,tnd->unt", self.query(y), memory), dim=2)
        context = torch.einsum("unt,tnd->und", weights, memory)
        return self.dense(torch.cat([y, context], dim=2))


class ScriptedIf(nn.Module):
    """Scripted branches that run one shared layer on the whole or on half of the sequence."""

    def __init__(self) -> None:
        """Make the layer."""
        super().__init__()
        self.rnn = nn.LSTM(IN, H)
        self.dense = nn.Linear(H, 2)

    def forward(self, x: Tensor, whole: Tensor) -> Tensor:
        """Give scores of the last step."""
        if bool(whole):
            y, _ = self.rnn(x)
        else:
            y, _ = self.rnn(x[::2])
        return self.dense(y[-1])


class ScriptedRates(nn.Module):
    """Scripted branches with a layer each, chosen by the sampling rate, as in Silero VAD."""

    def __init__(self) -> None:
        """Make the layers."""
        super().__init__()
        self.narrow = nn.GRU(IN, H)
        self.wide = nn.GRU(IN, 8)
        self.narrow_out = nn.Linear(H, 2)
        self.wide_out = nn.Linear(8, 2)

    def forward(self, x: Tensor, rate: Tensor) -> Tensor:
        """Give scores for each step."""
        if bool(rate == 16000):
            return self.wide_out(self.wide(x)[0])
        return self.narrow_out(self.narrow(x)[0])


class ScriptedLoop(nn.Module):
    """A scripted loop over steps, each one call of an LSTM layer."""

    def __init__(self) -> None:
        """Make the layer."""
        super().__init__()
        self.rnn = nn.LSTM(IN, H)
        self.dense = nn.Linear(H, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Add up the scores of the steps."""
        h = torch.zeros(1, x.size(1), self.rnn.hidden_size)
        c = torch.zeros(1, x.size(1), self.rnn.hidden_size)
        total = torch.zeros(x.size(1), 2)
        for t in range(x.size(0)):
            y, state = self.rnn(x[t].unsqueeze(0), (h, c))
            h, c = state[0], state[1]
            total = total + self.dense(y[0])
        return total


class ScriptedCellLoop(nn.Module):
    """A scripted loop over steps of an LSTM cell."""

    def __init__(self) -> None:
        """Make the cell."""
        super().__init__()
        self.cell = nn.LSTMCell(IN, H)
        self.dense = nn.Linear(H, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Give the scores of the last step."""
        h = torch.zeros(x.size(1), self.cell.hidden_size)
        c = torch.zeros(x.size(1), self.cell.hidden_size)
        for t in range(x.size(0)):
            h, c = self.cell(x[t], (h, c))
        return self.dense(h)


class ScriptedLayer(nn.Module):
    """A scripted layer that writes its cell out and appends every state to a list."""

    def __init__(self) -> None:
        """Make the weights."""
        super().__init__()
        self.inner = nn.Linear(IN, 4 * H)
        self.recurrent = nn.Linear(H, 4 * H)
        self.dense = nn.Linear(H, 2)

    def step(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Run the cell once."""
        i, f, g, o = (self.inner(x) + self.recurrent(h)).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c

    def forward(self, x: Tensor) -> Tensor:
        """Give the scores of all steps."""
        h = torch.zeros(x.size(1), 6)
        c = torch.zeros(x.size(1), 6)
        states: list[Tensor] = []
        for t in range(x.size(0)):
            h, c = self.step(x[t], h, c)
            states.append(h)
        return self.dense(torch.stack(states))


class ScriptedUnbound(ScriptedLayer):
    """The same over the steps as a list."""

    def forward(self, x: Tensor) -> Tensor:
        """Give the scores of all steps."""
        h = torch.zeros(x.size(1), 6)
        c = torch.zeros(x.size(1), 6)
        states: list[Tensor] = []
        steps = x.unbind(0)
        for t in range(len(steps)):
            h, c = self.step(steps[t], h, c)
            states.append(h)
        return self.dense(torch.stack(states))


class CondShared(nn.Module):
    """`torch.cond` whose branches run one shared layer."""

    def __init__(self) -> None:
        """Make the layer."""
        super().__init__()
        self.rnn = nn.LSTM(IN, H)
        self.dense = nn.Linear(H, 2)

    def forward(self, x: Tensor, whole: Tensor) -> Tensor:
        """Give scores of the last step."""

        def on_all(x: Tensor) -> Tensor:
            return self.dense(self.rnn(x)[0][-1])

        def on_negative(x: Tensor) -> Tensor:
            return self.dense(self.rnn(-x)[0][-1])

        result: Tensor = torch.cond(whole, on_all, on_negative, (x,))
        return result


def scaled(module: nn.Module, seed: int = 7) -> nn.Module:
    """Draw the parameters anew, larger than PyTorch does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan = parameter.shape[-1] if parameter.dim() > 1 else 9
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (1.2 / fan**0.5))
    return module.eval()


def sequence(*shape: int, seed: int = 1) -> Tensor:
    """Draw an input, `[T, N, IN]` unless said otherwise."""
    return torch.randn(shape or (T, N, IN), generator=torch.Generator().manual_seed(seed))


def common_plans() -> Iterator[Plan]:
    """Plans that both exporters carry out."""
    x = {"x": sequence()}
    bt = {"x": sequence(N, T, IN)}
    out = ("out",)

    def tagger(name: str, idiom: str, cell: str, head: str, **settings: Any) -> Plan:
        first = bool(settings.get("batch_first"))
        axes = {"x": BATCH_TIME if first else TIME_BATCH}
        feeds = {"x": sequence(N if first else T, T if first else N, settings.get("inputs", IN))}
        return Plan(name, Tagger(cell, head, **settings), feeds, out, idiom, axes)

    yield tagger("lstm_last", "Plain LSTM, last step.", "lstm", "last")
    yield tagger(
        "lstm_batch_first", "Batch first, mean over time.", "lstm", "mean", batch_first=True
    )
    yield tagger("lstm_no_bias", "`bias=False`.", "lstm", "all", bias=False)
    yield tagger("gru_last", "Plain GRU, last step.", "gru", "last")
    yield tagger(
        "gru_bi_stack", "Two bidirectional layers.", "gru", "all", num_layers=2, bidirectional=True
    )
    yield tagger(
        "lstm_bi_stack3",
        "Three bidirectional layers; last states of both directions of the top layer joined.",
        "lstm",
        "states",
        num_layers=3,
        bidirectional=True,
        batch_first=True,
    )
    idiom = "Two tanh RNN layers; the dynamo exporter unrolls them to dense operators."
    yield tagger("rnn_tanh", idiom, "rnn", "last", num_layers=2)
    yield tagger(
        "rnn_relu_bi",
        "Bidirectional relu RNN; the dynamo exporter unrolls it.",
        "rnn",
        "all",
        nonlinearity="relu",
        bidirectional=True,
    )
    yield tagger("lstm_residual", "Input added to the output.", "lstm", "residual", inputs=H)
    yield tagger("lstm_attention", "Attention pooling.", "lstm", "attention", batch_first=True)
    yield tagger("gru_norm", "LayerNorm and Relu after the layer.", "gru", "norm")
    yield tagger(
        "lstm_directions",
        "Last step of one direction joined with the first of the other.",
        "lstm",
        "directions",
        bidirectional=True,
    )
    h = sequence(2, N, H, seed=2)
    c = sequence(2, N, H, seed=3)
    states = {"x": TIME_BATCH, "h0": {1: "N"}, "c0": {1: "N"}}
    yield Plan(
        "lstm_streaming",
        Streaming("lstm", num_layers=2),
        x | {"h0": h, "c0": c},
        ("out", "hn", "cn"),
        "Two layers; states are inputs `[layers, N, H]` and outputs.",
        states,
    )
    yield Plan(
        "gru_streaming",
        Streaming("gru"),
        x | {"h0": h[:1]},
        ("out", "hn"),
        "State is an input and an output.",
        {"x": TIME_BATCH, "h0": {1: "N"}},
    )
    yield Plan(
        "lstm_one_state",
        PackedState(),
        {"wave": sequence(N, 8), "state": sequence(2, 2, N, H, seed=2)},
        ("p", "next"),
        "h and c travel in one tensor `[2, layers, N, H]`; convolutions before and after.",
    )
    yield Plan(
        "lstm_zeros_inside",
        ZerosInside(),
        bt,
        out,
        "Zero states made in `forward`.",
        {"x": {0: "N"}},
    )
    short = {"x": sequence(3, N, IN)}
    yield Plan(
        "lstmcell_unrolled",
        Unrolled(nn.LSTMCell),
        short,
        out,
        "`LSTMCell` in a Python loop: three copies of dense operators, no recurrent node.",
    )
    yield Plan("grucell_unrolled", Unrolled(nn.GRUCell), short, out, "`GRUCell` in a Python loop.")
    yield Plan(
        "cell_step",
        HandCell(),
        {"x": sequence(N, IN), "h": h[0], "c": c[0]},
        ("out", "hn", "cn"),
        "One hand-written LSTM step over a joint kernel of input and state.",
        {"x": {0: "N"}, "h": {0: "N"}, "c": {0: "N"}},
    )
    yield Plan(
        "shared_layer",
        Shared(),
        {"x": sequence(), "z": sequence(4, N, IN, seed=4)},
        out,
        "One module called twice: two nodes, in TorchScript the second behind Identity.",
    )
    yield Plan(
        "tied_layers",
        Tied(),
        {"x": sequence(T, N, H)},
        out,
        "Two modules with the same Parameters, in TorchScript the second behind Identity.",
        {"x": TIME_BATCH},
    )
    yield Plan(
        "mixed_stack",
        Separate(),
        {"words": torch.randint(0, 11, (N, T), generator=torch.Generator().manual_seed(5))},
        out,
        "Integer input, embedding, convolution, bidirectional LSTM, dense, GRU.",
        {"words": BATCH_TIME},
    )
    yield Plan(
        "encoder_decoder",
        EncoderDecoder(),
        {"x": sequence(), "z": sequence(4, N, 4, seed=4)},
        out,
        "Joined encoder states start the decoder, which attends to the encoder.",
    )
    yield Plan(
        "half",
        Tagger("lstm", "all", bidirectional=True).half(),
        {"x": sequence().half()},
        out,
        "float16.",
        {"x": TIME_BATCH},
        atol=4e-3,
    )
    yield Plan(
        "double",
        Tagger("lstm", "all").double(),
        {"x": sequence().double()},
        out,
        "double.",
        {"x": TIME_BATCH},
    )


def torchscript_plans() -> Iterator[Plan]:
    """Plans for the TorchScript exporter."""
    yield from common_plans()
    padded = {"x": sequence(N, T, IN), "lengths": torch.tensor([7, 5, 2])}
    axes = {"x": BATCH_TIME, "lengths": {0: "N"}}
    yield Plan(
        "lstm_packed",
        Padded("lstm", bidirectional=True, num_layers=2),
        padded,
        ("out",),
        "Packed sequences: `sequence_lens` of two bidirectional layers.",
        axes,
    )
    yield Plan("gru_packed", Padded("gru"), padded, ("out",), "Packed sequences.", axes)
    x = {"x": sequence()}
    scripted = torch.jit.script
    yield Plan(
        "script_if_shared",
        scripted(scaled(ScriptedIf())),
        x | {"whole": torch.tensor(False)},
        ("out",),
        "Scripted If, one layer in both branches, which put its outer Constants in order each.",
        {"x": TIME_BATCH},
    )
    yield Plan(
        "script_if_rates",
        scripted(scaled(ScriptedRates())),
        x | {"rate": torch.tensor(16000)},
        ("out",),
        "Scripted If, a layer in each branch, of other sizes.",
        {"x": TIME_BATCH},
    )
    yield Plan(
        "script_loop_layer",
        scripted(scaled(ScriptedLoop())),
        x,
        ("out",),
        "Scripted loop, one step of a layer in the body.",
        {"x": TIME_BATCH},
    )
    yield Plan(
        "script_loop_cell",
        scripted(scaled(ScriptedCellLoop())),
        x,
        ("out",),
        "Scripted loop, an `LSTMCell` in the body: it becomes an LSTM node.",
        {"x": TIME_BATCH},
    )
    for name, module in (("list", ScriptedLayer()), ("unbound", ScriptedUnbound())):
        yield Plan(
            f"script_{name}",
            scripted(scaled(module)),
            x,
            ("out",),
            f"Scripted loop, a cell written out, states in a list ({name}).",
            {"x": TIME_BATCH},
        )
    stack = Plan(
        "",
        Tagger("lstm", "mean", num_layers=2, bidirectional=True, batch_first=True),
        {"x": sequence(N, T, IN)},
        ("out",),
        "",
        {"x": BATCH_TIME},
    )
    for opset in (9, 20):
        idiom = f"Two bidirectional layers in opset {opset}."
        yield replace(stack, name=f"opset{opset}", opset=opset, idiom=idiom)
    for opset in (11, 18):
        yield replace(
            stack,
            name=f"unfolded_opset{opset}",
            module=Tagger("lstm", "mean", bidirectional=True, batch_first=True),
            opset=opset,
            options={"do_constant_folding": False},
            idiom="Constant folding off: weights arrive through chains.",
        )
    gru = Plan("", Tagger("gru", "all"), x, ("out",), "", {"x": TIME_BATCH})
    yield replace(
        gru,
        name="unfolded_gru",
        options={"do_constant_folding": False},
        idiom="Constant folding off, GRU.",
    )
    yield replace(
        gru,
        name="initializers_as_inputs",
        opset=9,
        options={"keep_initializers_as_inputs": True},
        idiom="`keep_initializers_as_inputs=True`: weights are inputs with default values.",
    )
    yield replace(
        gru,
        name="weights_as_inputs",
        options={"export_params": False},
        idiom="`export_params=False`: the weights are inputs, in the layout of ONNX.",
    )
    yield replace(
        stack,
        name="functions",
        options={"export_modules_as_functions": {nn.LSTM}},
        idiom="`export_modules_as_functions`: a call in another domain is itself named LSTM.",
    )


def dynamo_plans() -> Iterator[Plan]:
    """Plans for the dynamo exporter, which cannot keep the steps of an RNN dynamic."""
    for plan in common_plans():
        yield replace(plan, axes={}) if plan.name.startswith("rnn") else plan
    x = {"x": sequence()}
    yield Plan(
        "cond_shared",
        CondShared(),
        x | {"whole": torch.tensor(False)},
        ("out",),
        "`torch.cond`, one layer in both branches.",
    )
    bidirectional = Tagger("lstm", "mean", bidirectional=True, batch_first=True)
    stack = Plan("", bidirectional, {"x": sequence(N, T, IN)}, ("out",), "", {"x": BATCH_TIME})
    for opset in (17, 23):
        idiom = f"A bidirectional layer, opset {opset} asked for."
        yield replace(stack, name=f"opset{opset}", opset=opset, idiom=idiom)
    for cell in ("lstm", "gru"):
        yield Plan(
            f"{cell}_unoptimized",
            Tagger(cell, "all"),
            x,
            ("out",),
            "`optimize=False`: weights arrive through chains whose slice ends hold H, taken from "
            "the Shape of a tensor that depends on the input.",
            {"x": TIME_BATCH},
            options={"optimize": False},
        )


def export(plan: Plan) -> onnx.ModelProto:
    """Export a module."""
    options: dict[str, Any] = {"dynamic_axes": plan.axes}
    if plan.dynamo:
        shapes = tuple(plan.axes.get(name) for name in plan.feeds) if plan.axes else None
        options = {"dynamic_shapes": shapes, "external_data": False}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(
            plan.module,
            tuple(plan.feeds.values()),
            path,
            input_names=list(plan.feeds),
            output_names=list(plan.outputs),
            opset_version=plan.opset,
            dynamo=plan.dynamo,
            verbose=False,
            **options,
            **plan.options,
        )
        return onnx.load(path)


def make(plan: Plan) -> Case:
    """Export a module and run it eagerly."""
    if not isinstance(plan.module, torch.jit.ScriptModule):
        scaled(plan.module)
    model = export(plan)
    strip_notes(model)
    with torch.no_grad():
        result = plan.module(*plan.feeds.values())
    results = result if isinstance(result, tuple) else (result,)
    feeds = {name: value.numpy() for name, value in plan.feeds.items()}
    if plan.options.get("export_params") is False:
        stored = export(replace(plan, options={})).graph.initializer
        feeds |= {tensor.name: numpy_helper.to_array(tensor) for tensor in stored}
    inputs = {i.name for i in model.graph.input}
    kind = "dynamo" if plan.dynamo else "TorchScript"
    version = torch.__version__.split("+")[0]
    return Case(
        name=f"{'dyn' if plan.dynamo else 'ts'}_{plan.name}",
        model=model,
        feeds={name: value for name, value in feeds.items() if name in inputs},
        outputs={n: r.detach().numpy() for n, r in zip(plan.outputs, results, strict=True)},
        exporter=f"torch {version}, {kind} exporter",
        idiom=plan.idiom,
        atol=plan.atol,
        onnxruntime=not any(r.dtype == torch.float64 for r in results),
        # The exporter declares an axis too many, which shows only where lists are gone.
        full_check=plan.name != "script_unbound",
    )


def plans() -> Iterator[Plan]:
    """All plans."""
    yield from torchscript_plans()
    for plan in dynamo_plans():
        yield replace(plan, dynamo=True)


def make_numbered(number: int) -> Case:
    """Carry out the plan of a number."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    torch._dynamo.config.allow_rnn = True
    return make(list(plans())[number])


def make_all() -> list[Case]:
    """Carry out all plans, each in its own process: `torch.export` fails on some after others."""
    count = len(list(plans()))
    with get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        return pool.map(make_numbered, range(count), chunksize=1)


if __name__ == "__main__":
    write_cases(make_all(), "make_torch.py")
