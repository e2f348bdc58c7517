"""What fine-tuning and serving take at sizes and on numbers of GPUs that nobody here has: a small simulator.

    python -m benchmarks.scale [--output docs/scale.md]

Parameters, operations and bytes come from the shapes of the models and from `sleepify.schedule`; rates are measured
where they could be and named where they are assumed. `tests/test_scale.py` holds the arithmetic to what is counted on
the models themselves.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from benchmarks.report import Part, write_page
from sleepify.schedule import Schedule, passes, schedule

ROOT = Path(__file__).resolve().parent.parent
TEXTS = (12_000, 128_000, 1_000_000)
GPUS = (1, 8, 64, 512)
SUPERVISED = 8
CHUNK = 64  # tokens that the gated delta rule takes together
STATE = 4  # bytes of a number of the state: float32


@dataclass(frozen=True)
class Card:
    """One GPU and its wires.

    Attributes:
        matrix_rate: operations per second of a large bfloat16 product; measured on an H200.
        share: of it that training reaches; assumed, the goal of docs/results/gpu.md.
        memory: bytes free for us; measured on an H200.
        bandwidth: bytes per second of its memory, by its data sheet.
        link, net: bytes per second to a GPU of the same machine, and of another; by data sheet (NVLink, 400 Gb/s).
        machine: GPUs of a machine.
    """

    matrix_rate: float = 790e12
    share: float = 0.5
    memory: float = 139 * 2**30
    bandwidth: float = 4.8e12
    link: float = 450e9
    net: float = 50e9
    machine: int = 8

    @property
    def speed(self) -> float:
        return self.matrix_rate * self.share


@dataclass(frozen=True)
class Shape:
    """A model that sleeps, in numbers.

    Attributes:
        width, mlp, heads, kv_heads, head_dim, vocabulary: of the base; ``tied`` if head and embedding are one.
        mixers: of every layer of the base, "attention" or "jet".
        fast_heads, key_dim, value_dim: of a Jet layer.
        inserted: layers of the base that a Jet layer without MLP follows.
        loop: layers [start, stop) that are looped.
        n_loops: N.
        recompute: activations of one token in one layer, in widths of 2 bytes; from docs/results/counts.md.
    """

    name: str
    width: int
    mlp: int
    mixers: tuple[str, ...]
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    fast_heads: int
    key_dim: int
    value_dim: int
    inserted: tuple[int, ...]
    loop: tuple[int, int]
    n_loops: int
    recompute: float = 56.0

    # --- weights and operations ------------------------------------------------------------------------------------

    def mixer_weights(self, kind: str) -> int:
        """Parameters of attention or of a Jet layer, matrices only."""
        if kind == "attention":
            return self.width * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        keys, values = self.fast_heads * self.key_dim, self.fast_heads * self.value_dim
        kernels = values // 8 * (self.width + 4 * values)
        return self.width * (2 * keys + 3 * values + 2 * self.fast_heads) + kernels

    def layer_weights(self, index: int) -> int:
        """Of a layer of the base and what is inserted after it."""
        own = self.mixer_weights(self.mixers[index]) + 3 * self.width * self.mlp
        return own + (self.mixer_weights("jet") if index in self.inserted else 0)

    @property
    def n_layers(self) -> int:
        return len(self.mixers)

    @property
    def parameters(self) -> int:
        tables = self.vocabulary * self.width * (1 if self.tied else 2)
        return sum(map(self.layer_weights, range(self.n_layers))) + tables

    def layer_operations(self, index: int, window: int) -> float:
        """Of one token's forward pass through a layer; each meets half a window of keys on average."""
        attends = 2 * self.heads * self.head_dim * window if self.mixers[index] == "attention" else 0
        n_jet = (index in self.inserted) + (self.mixers[index] == "jet")
        k, v = self.key_dim, self.value_dim
        rule = self.fast_heads * 2 * (3 * CHUNK * k + 2 * CHUNK * v + 3 * k * v)
        return 2 * self.layer_weights(index) + attends + n_jet * rule

    @property
    def last_writer(self) -> int:
        """Layers from this one on leave nothing that outlives a window."""
        return max((i for i in range(self.n_layers) if self.mixers[i] == "jet" or i in self.inserted), default=-1) + 1

    def plan(self, tokens: int, window: int) -> Schedule:
        """Rounds of a text whose last tokens are supervised."""
        wanted = np.zeros((1, tokens), dtype=bool)
        wanted[0, -SUPERVISED - 1 : -1] = True
        return schedule([0], [tokens], wanted, window, keep=False)

    def sleep_operations(self, window: int, n_loops: int) -> float:
        """Of one window's sleep, forward."""
        inside = passes(n_loops, self.loop, self.last_writer)
        spans = [inside.prelude, *((each.start, each.stop) for each in inside.loops), inside.coda]
        return window * sum(self.layer_operations(i, window) for span in spans for i in range(*span))

    @lru_cache(None)  # noqa: B019  (a handful of shapes)
    def forward_operations(self, tokens: int, window: int, n_loops: int) -> float:
        """Of a text's forward pass: its sleeps, and its last part awake."""
        once = self.sleep_operations(window, n_loops)
        total = 0.0
        for each in self.plan(tokens, window).rounds:
            total += once * sum(len(sleep.rows) for sleep in each.sleeps)
            for wake in each.wakes:
                total += sum(wake.counts) * sum(self.layer_operations(i, window) for i in range(self.n_layers))
        return total + 2 * SUPERVISED * self.vocabulary * self.width

    # --- bytes -----------------------------------------------------------------------------------------------------

    @property
    def state_bytes(self) -> int:
        """Fast weights of a session, and the inputs of their convolutions (bfloat16)."""
        n_jet = len(self.inserted) + self.mixers.count("jet")
        values = self.fast_heads * self.value_dim
        return n_jet * (self.fast_heads * self.key_dim * self.value_dim * STATE + values * 4 * 2)

    def key_bytes(self, tokens: int) -> int:
        """Keys and values of so many tokens."""
        return self.mixers.count("attention") * 2 * self.kv_heads * self.head_dim * 2 * tokens

    def session_bytes(self, window: int) -> int:
        """A session in use, its window full: twice the state (now, and at the window's start), keys, ids."""
        return 2 * self.state_bytes + self.key_bytes(window) + 8 * window

    def resting_bytes(self, window: int) -> int:
        """A session set aside: state and the ids of its open window, which is read again."""
        return self.state_bytes + 8 * window


def evenly(count: int, n_layers: int) -> tuple[int, ...]:
    """Where `sleepify` inserts so many layers by default."""
    return tuple((2 * place + 1) * n_layers // (2 * count) for place in range(count))


def hybrid(
    name: str, width: int, mlp: int, layers: int, heads: int, kv_heads: int, vocabulary: int, n_loops: int = 4
) -> Shape:
    """A base of attention with a Jet layer after every fourth of its layers, as `sleepify` does by default."""
    fast_heads = max(1, round(width / 256))
    places = evenly(layers // 4, layers)
    sizes = (heads, kv_heads, 128, vocabulary, False, fast_heads, 128, 256)
    return Shape(name, width, mlp, ("attention",) * layers, *sizes, places, (0, layers), n_loops)


JET_LAYERS = tuple(
    {14: "attention", 19: "attention", 20: "attention", 21: "attention"}.get(i, "jet") for i in range(28)
)
OURO = hybrid("Ouro 1.4B + 6 Jet", 2048, 5632, 24, 16, 16, 49152)
JET = Shape(
    "Jet-Nemotron 2B", 1536, 8960, JET_LAYERS, 12, 2, 128, 151936, True, 12, 96, 256, (), (7, 21), 6
)  # fmt: skip
SHAPES = {
    "ouro_1.4b": OURO,
    "jet_nemotron_2b": JET,
    "7b": hybrid("7B (28 layers of 3,584) + 7 Jet", 3584, 18944, 28, 28, 4, 152064),
    "70b": hybrid("70B (80 layers of 8,192) + 20 Jet", 8192, 28672, 80, 64, 8, 128256),
}


# --- training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """How a model is spread over GPUs: weights of each group of ``tensor`` GPUs split by matrix, over ``shards`` of
    such groups sharded by FSDP2 or ZeRO-3, copied beyond."""

    gpus: int
    tensor: int
    shards: int

    @property
    def rows(self) -> int:
        """Texts that are worked on at a time."""
        return self.gpus // self.tensor

    @property
    def name(self) -> str:
        parts = [f"tensor parallel {self.tensor}"] if self.tensor > 1 else []
        copies = self.rows // self.shards
        parts += [f"FSDP2 / ZeRO-3 over {self.shards}"] if self.shards > 1 else []
        parts += [f"{copies} copies"] if copies > 1 else []
        return " x ".join(parts) or "one copy"


# Weight and gradient in bfloat16, master, momentum and second moment in float32: AdamW; with Muon 4 less.
TRAINED = 2 + 2 + 4 + 4 + 4


def memory_of(shape: Shape, way: Way, tokens: int, window: int) -> float:
    """Bytes on each GPU, `checkpoint="loop"` inside of `checkpoint="window"`: one pass's activations at a time."""
    weights = shape.parameters * TRAINED / (way.tensor * way.shards)
    # What is gathered: one layer at a time, two while the next is fetched.
    gathered = 2 * 2 * max(map(shape.layer_weights, range(shape.n_layers))) / way.tensor if way.shards > 1 else 0
    activations = window * shape.n_layers * shape.width * 2 * shape.recompute / way.tensor
    entering = window * shape.width * 2 * shape.n_loops
    boundaries = (tokens // window) * (shape.state_bytes / way.tensor + 8 * window)
    return weights + gathered + activations + entering + boundaries


def step_seconds(card: Card, shape: Shape, way: Way, tokens: int, window: int) -> float:
    """Of a text of each group: arithmetic, or what has to be gathered meanwhile if that takes longer.

    Three times the forward pass, a fourth for what is run again. A pass over a window gathers its layers before and,
    with the gradient, after; matrices that are split exchange hidden states twice per layer.
    """
    work = 4 * shape.forward_operations(tokens, window, shape.n_loops) / (card.speed * way.tensor)
    windows = (tokens - 1) // window
    layer_calls = windows * passes(shape.n_loops, shape.loop, shape.last_writer).layer_calls + shape.n_layers
    across = way.tensor * way.shards > card.machine
    gathering = 0.0
    if way.shards > 1:
        per_layer = 2 * shape.parameters / shape.n_layers / way.tensor
        gathering = 3 * layer_calls * per_layer / (card.net if across else card.link)
    exchanged = 0.0
    if way.tensor > 1:
        # Forward, again and backward; a ring sends twice what it sums up. Not hidden behind anything.
        exchanged = 3 * 2 * 2 * layer_calls * window * shape.width * 2 / card.link
    summed = 0.0
    if way.rows > way.shards:
        # Gradients of the copies, once per step.
        held = 2 * shape.parameters / (way.tensor * way.shards)
        summed = 2 * held / (card.net if way.gpus > card.machine else card.link)
    return max(work, gathering) + exchanged + summed


def choose(card: Card, shape: Shape, gpus: int, tokens: int, window: int) -> Way | None:
    """The fastest way that fits, per text and GPU; None if none does."""
    ways = [
        Way(gpus, tensor, shards)
        for tensor in (1, 2, 4, 8)
        for shards in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
        if tensor <= card.machine and gpus % (tensor * shards) == 0
    ]
    fitting = [way for way in ways if memory_of(shape, way, tokens, window) <= 0.9 * card.memory]
    return min(
        fitting, key=lambda way: (step_seconds(card, shape, way, tokens, window) / way.rows, way.shards), default=None
    )


def training(card: Card, shape: Shape, window: int) -> Part:
    """Fine-tuning by length and number of GPUs."""
    part = Part(
        f"Fine-tuning {shape.name}",
        f"{shape.parameters / 1e9:.2f} billion parameters, N = {shape.n_loops}, L = {window:,}, as many texts at a "
        "time as there are groups.",
        [
            "T",
            "TFLOP per text",
            "GPUs",
            "spread",
            "GiB per GPU",
            "seconds per step",
            "tokens/s, all",
            "hours per 1e9 tokens",
        ],
    )
    for tokens in TEXTS:
        work = 3 * shape.forward_operations(tokens, window, shape.n_loops)
        for gpus in GPUS:
            way = choose(card, shape, gpus, tokens, window)
            cells = [f"{tokens:,}", f"{work / 1e12:,.0f}", f"{gpus}"]
            if way is None:
                part.rows.append([*cells, "does not fit", "", "", "", ""])
                continue
            seconds = step_seconds(card, shape, way, tokens, window)
            speed = way.rows * tokens / seconds
            held = memory_of(shape, way, tokens, window) / 2**30
            cells += [way.name, f"{held:,.0f}", f"{seconds:,.1f}", f"{speed:,.0f}", f"{1e9 / speed / 3600:,.1f}"]
            part.rows.append(cells)
            part.figures[f"{tokens} on {gpus}"] = {"seconds": seconds, "tokens/s": speed, "bytes": held * 2**30}
    return part


# --- serving ----------------------------------------------------------------------------------------------------------


def token_seconds(card: Card, shape: Shape, tensor: int, sessions: int, keys: int) -> float:
    """Of one token of each of so many sessions: weights are read once, keys and states by each."""
    weights = 2 * shape.parameters / (card.bandwidth * tensor)
    each = (shape.key_bytes(keys) + 2 * shape.state_bytes) / (card.bandwidth * tensor)
    work = 2 * sum(map(shape.layer_weights, range(shape.n_layers))) / (card.speed * tensor)
    return max(weights + sessions * each, sessions * work)


def serving(card: Card, shape: Shape, window: int) -> Part:
    """A served session, and a fleet."""
    tensor = 1
    while 2 * shape.parameters / tensor > 0.7 * card.memory:
        tensor *= 2
    room = 0.9 * card.memory * tensor - 2 * shape.parameters
    resident = int(room // shape.session_bytes(window))
    pause = shape.sleep_operations(window, shape.n_loops) / (card.speed * tensor)
    held = ", ".join(f"{gpus // tensor * resident:,} on {gpus}" for gpus in GPUS if gpus >= tensor)
    part = Part(
        f"Serving {shape.name}",
        f"Weights on {tensor} GPU{'s' * (tensor > 1)}. A session takes {shape.session_bytes(window) / 1e6:,.0f} MB in "
        f"use, however long its text, {shape.resting_bytes(window) / 1e6:,.1f} MB at rest. Held in use: {held}. "
        f"A sleep (N = {shape.n_loops}, {window:,} tokens) pauses it for {pause * 1e3:,.0f} ms, once per window; "
        f"spread over the window's tokens {pause / window * 1e6:,.0f} microseconds each.",
        ["T", "first token after, s", "token, ms", "keys of the base, GB", "token of the base, ms"],
    )
    for tokens in TEXTS:
        first = shape.forward_operations(tokens, window, shape.n_loops) / (card.speed * tensor)
        ours, base = (token_seconds(card, shape, tensor, 1, keys) for keys in (window, tokens))
        keys = f"{shape.key_bytes(tokens) / 1e9:,.2f}"
        part.rows.append([f"{tokens:,}", f"{first:,.2f}", f"{ours * 1e3:.2f}", keys, f"{base * 1e3:.2f}"])
        part.figures[str(tokens)] = {"first": first, "token": ours, "base": base}
    part.figures |= {"pause": pause, "resident": resident, "tensor": tensor}
    return part


def fleet(card: Card, window: int, sessions: int = 1_000_000) -> Part:
    """What a million sessions hold."""
    part = Part(
        "A fleet of 1e6 sessions",
        "All at rest, on disks or in host memory; beside, the keys that the base would keep for them. In use: one "
        "in a hundred, each one token every 50 ms, sleeps included.",
        ["model", "TB at rest", "TB of keys, base, 128K", "TB of keys, base, 1M", "GPUs to hold 1%", "GPUs to run 1%"],
    )
    for shape in SHAPES.values():
        figures = serving(card, shape, window).figures
        tensor, resident, used = figures["tensor"], figures["resident"], sessions // 100
        hold = -(-used // resident) * tensor
        # Per second each makes 20 tokens, and 20 / L sleeps.
        batch = min(resident, 256)
        busy = used * 20 * (token_seconds(card, shape, tensor, batch, window) / batch + figures["pause"] / window)
        keys = [f"{sessions * shape.key_bytes(tokens) / 1e12:,.0f}" for tokens in TEXTS[1:]]
        rest = sessions * shape.resting_bytes(window) / 1e12
        part.rows.append([shape.name, f"{rest:,.1f}", *keys, f"{hold:,}", f"{int(busy * tensor) + 1:,}"])
        part.figures[shape.name] = {"rest": rest, "hold": hold, "busy": busy}
    return part


# --- the page ---------------------------------------------------------------------------------------------------------

WORDS = """**Nothing here was measured at these sizes.** Operations, parameters and bytes are counted from the models'
shapes and from the schedule, and a test holds them to what is counted on the models themselves. The matrix rate, 790
TFLOP/s, and 139 GiB are one H200's; that training reaches half of that rate is an assumption, and so are the data
sheet's 4.8 TB/s of memory, 450 GB/s inside of a machine and 50 GB/s per GPU between machines. Texts are counted with
labels on their last tokens, windows of {window:,}.

**What is sequential.** Windows: the state that one leaves is what the next begins with. Loops: each pass reads what the
one before it left. Neither can be spread over GPUs, so a text goes no faster than one group of GPUs runs its passes
one after the other. Inside of a pass all tokens of a window, all matrices and all texts of a batch are parallel. More
GPUs mean more texts at a time, and tensor parallelism (transformers' `tp_plan`) a faster pass, inside of one machine.
Pipelines over layers are not in the table: the last layer's state goes back to the first for every loop, so a stage
waits unless other texts fill it, and then sharding does the same without stages.

**Which sharding.** The table has the fastest spread that fits into 90% of the memory. One copy per GPU while weights,
gradients and optimiser (16 bytes per parameter) fit; then FSDP2 or ZeRO-3 inside of a machine. A looped layer is
gathered anew in every pass unless `fsdp_reshard_after_forward: false` keeps it. Between machines gathering is slower
than the arithmetic of short windows hides, which the longer L is, the less it matters: keep shards inside of a machine
and copies outside as long as they fit.

**Memory does not grow with the text,** but for the state at each boundary: with `checkpoint="window"` it is one
window's activations, and the table takes passes of it to be recomputed too.

**Where the pause of a sleep goes.** A session pauses once per window, when the token after the full window arrives.
Between turns it costs nobody anything (`model.sleep(cache)`); on a server other sessions go on meanwhile."""


def check() -> Part:
    """The model of this page against what was counted elsewhere."""
    part = Part(
        "Checked",
        "Operations of a training step per 12,000 tokens of Ouro 1.4B with six Jet layers, L = 2,048, three times the "
        "forward pass, against those counted on the model itself (benchmarks/models.py).",
        ["N", "TFLOP here", "TFLOP counted"],
    )
    for n_loops, counted in ((1, 101), (4, 363)):
        ours = 3 * OURO.forward_operations(12_000, 2048, n_loops) / 1e12
        part.rows.append([str(n_loops), f"{ours:.0f}", str(counted)])
        part.figures[str(n_loops)] = {"ours": ours, "counted": counted}
    return part


def parts_of(card: Card, window: int, names: Sequence[str] = tuple(SHAPES)) -> list[Part]:
    """All tables."""
    parts = [check()]
    for name in names:
        parts += [training(card, SHAPES[name], window), serving(card, SHAPES[name], window)]
    return [*parts, fleet(card, window)]


def main(argv: list[str] | None = None) -> list[Part]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--window_size", type=int, default=2048, help="L")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "scale.md", help="where the page goes")
    arguments = parser.parse_args(argv)
    parts = parts_of(Card(), arguments.window_size)
    intro = WORDS.format(window=arguments.window_size)
    write_page(arguments.output, title="At scale", command="python -m benchmarks.scale", intro=intro, parts=parts)
    print(arguments.output.read_text(encoding="utf-8"))
    return parts


if __name__ == "__main__":
    main()
