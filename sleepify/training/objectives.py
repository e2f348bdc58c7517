"""What a sleeping model is trained on: cross entropy, and what can be added to it.

With the labels y of a batch, their places t (the tokens before them) and weights w from `ObjectiveArguments`:

    loss = w_ce CE + w_d D + w_r R + w_p P

Every term is a mean over its own places in the whole optimiser step, over accumulated batches and ranks. Logits exist
for a few hundred places at a time, the teacher's too.

- `distill`: D = mean over t of tau^2 KL(softmax(z_t / tau) || softmax(s_t / tau)), z the logits of the base that has
  the whole text before t in its context, s those of the model that sleeps (Hinton et al., arXiv:1503.02531; between
  contexts: Askell et al., arXiv:2112.00861).
- `reconstruct`: R = mean over i of -log p(x_(i+1) | S, x_s .. x_i), S the state that a sleep on x leaves, read awake
  from x_s on with nothing else remembered (the auxiliary loss of context autoencoders: Ge et al., arXiv:2307.06945).
- `pass_loss`: the state S_m after pass m of a sleep is that of a sleep with N = m. Let CE_m be the cross entropy of the
  labels after a row's last sleep, woken from S_m. "all": P = mean of CE_1 .. CE_(N-1) (deep supervision: Lee et al.,
  arXiv:1409.5185). "one": P = lambda CE_m + (1 - lambda) KL(stop(p_N) || p_m), m drawn from 1 .. N-1 in every step,
  lambda from 1 to 0 (self-distillation: Zhang et al., arXiv:1905.08094).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sleepify.loss import PIECE, Asked
from sleepify.memory import Memory
from sleepify.modeling import SleepForCausalLM
from sleepify.packing import Marks
from sleepify.recompute import recompute
from sleepify.schedule import Sleep
from sleepify.sleep import wake
from sleepify.snapshot import Window
from sleepify.tasks.base import IGNORE
from sleepify.training.arguments import SleepTrainingArguments
from sleepify.training.objective_arguments import PASS_LOSS_WEIGHT, ObjectiveArguments
from sleepify.training.rounds import PACKED
from sleepify.training.teacher import Teacher, own_teacher

Criterion = Callable[[Tensor, Tensor], Tensor]
SUPERVISED = "supervised"


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy [] of logits [m, V] over the targets [m] that are not -100, in float32 at least."""
    return nn.functional.cross_entropy(_wide(logits), targets, ignore_index=IGNORE, reduction="sum")


def summed_divergence(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """tau^2 KL(softmax(teacher / tau) || softmax(student / tau)) of logits [m, V], summed over m."""
    p, q = (nn.functional.log_softmax(_wide(each) / temperature, dim=-1) for each in (teacher, student))
    return temperature**2 * nn.functional.kl_div(q, p, reduction="sum", log_target=True)


def in_pieces(function: Callable[..., Tensor], whole: bool, *tensors: Tensor) -> Tensor:
    """A sum over places [M, ...], a few at a time, each made again in the backward pass; all at once if ``whole``."""
    if whole or tensors[0].shape[0] <= PIECE:
        return function(*tensors)
    pieces = zip(*(tensor.split(PIECE) for tensor in tensors), strict=True)
    return torch.stack([checkpoint(function, *piece, use_reentrant=False) for piece in pieces]).sum()


@dataclass
class Step:
    """What one call of the model is trained on.

    Attributes:
        counts: labels, places of distillation and tokens to reconstruct [3], of the whole optimiser step.
        supervised: labels [B, T], if those that the model is given are more (distillation at other places).
        number: of the optimiser step.
        done: the share of the training that is behind.
        slept: the sleeps of the call and what they left.
        ends: the same, but what each pass before the last left.
        windows: sleeps of each row.
    """

    counts: Tensor
    supervised: Tensor | None
    number: int
    done: float
    slept: list[tuple[Sleep, Memory]] = field(default_factory=list)
    ends: list[tuple[Sleep, Sequence[Memory]]] = field(default_factory=list)
    windows: dict[int, int] = field(default_factory=dict)


class Objectives:
    """The losses of a training, put in the place of a model's own while a batch is read.

    Args:
        arguments: weights and options.
        model: the one that is trained.
        seed: of what is drawn.
        criterion: in the place of cross entropy: logits [m, V] and targets [m], -100 where there is none, to their sum.

    Raises:
        ValueError: if the model's own base is to teach while it is trained, or the teacher has another vocabulary.
    """

    def __init__(
        self,
        arguments: ObjectiveArguments,
        model: SleepForCausalLM,
        seed: int = 0,
        criterion: Criterion | None = None,
    ) -> None:
        self.arguments, self.model, self.seed = arguments, model, seed
        self.criterion = criterion or summed_cross_entropy
        self._teacher: Teacher | None = None
        if arguments.distill:
            name = arguments.distill_teacher
            self._teacher = own_teacher(model) if name is None else Teacher.load(name, model)

    @property
    def tells_last_sleeps(self) -> bool:
        """Whether a row's last sleep is another matter than those before it, so that ranks must agree which it is."""
        return self.arguments.pass_loss != "none"

    # --- batches ---------------------------------------------------------------------------------------------------

    def prepare(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch with a label wherever something is asked; the given labels then as ``supervised``.

        Raises:
            ValueError: for ephemeral tokens with a loss that goes by the windows that a text fills.
        """
        asked = self.arguments
        if inputs.get("ephemeral") is not None and (asked.distill or asked.reconstruct or asked.pass_loss != "none"):
            raise ValueError(
                "expected no ephemeral tokens with distill, reconstruct or pass_loss, got both: these losses go by the "
                "windows that a text fills, and ephemeral tokens fill none; leave one of them out"
            )
        if not self.arguments.distill or self.arguments.distill_at == "labels" or SUPERVISED in inputs:
            return inputs
        ids = inputs["input_ids"]
        labels = inputs.get("labels", torch.full_like(ids, IGNORE))
        wanted = self._taught(inputs)
        return inputs | {"labels": torch.where(wanted, ids, labels), SUPERVISED: labels}

    def _taught(self, inputs: dict[str, Any]) -> Tensor:
        """The tokens [B, T] whose predictions the base teaches, labels or not."""
        _, place = _texts(inputs)
        first = 1 + (self.model.options().window_size if self.arguments.distill_at == "later" else 0)
        return place >= first

    def count(self, batches: Sequence[dict[str, Any]]) -> Tensor:
        """Labels, places of distillation and tokens to reconstruct [3] in these batches."""
        counts = []
        for batch in batches:
            inputs = self.prepare(dict(batch))
            text, place = _texts(inputs)
            follows = place >= 1
            labelled = (inputs.get(SUPERVISED, inputs["labels"]) != IGNORE) & follows
            taught = labelled if SUPERVISED not in inputs else self._taught(inputs)
            last = torch.where((inputs["labels"] != IGNORE) & follows, place, 0).flatten()
            ends = torch.zeros_like(last).scatter_reduce_(0, text.flatten(), last, "amax")
            sleeps = (ends - 1).clamp_(min=0) // self.model.options().window_size
            counts.append(torch.stack([labelled.sum(), taught.sum(), sleeps.sum() * self._span()]))
        return torch.stack(counts).sum(0)

    def _span(self) -> int:
        """Tokens of a slept window that are predicted again."""
        most = self.model.options().window_size - 1
        return min(most, max(1, round(self.arguments.reconstruct_share * (most + 1))))

    # --- one call --------------------------------------------------------------------------------------------------

    @contextmanager
    def on(
        self, counts: Tensor, supervised: Tensor | None = None, number: int = 0, done: float = 0.0
    ) -> Iterator[None]:
        """Train the model on these losses instead of its own; the arguments are those of `Step`."""
        step, model = Step(counts, supervised, number, done), self.model
        own, watch = model.objective, model.watch

        def note(each: Sleep, after: Memory) -> None:
            if watch is not None:
                watch(each, after)
            for row in each.rows:
                step.windows[row] = step.windows.get(row, 0) + 1
            # Of a window of one token nothing follows that could be predicted again.
            if self.arguments.reconstruct and self._span():
                step.slept.append((each, after))

        model.objective, model.watch = lambda asked: self._loss(asked, step), note
        if self.arguments.pass_loss != "none":
            model.branch = lambda each, earlier: step.ends.append((each, earlier))
        try:
            yield
        finally:
            model.objective, model.watch, model.branch = own, watch, None

    def _loss(self, asked: Asked, step: Step) -> Tensor:
        own = self.arguments
        if step.supervised is not None:
            targets, _ = replace(asked.tokens, labels=step.supervised).targets(asked.rows, asked.columns)
        else:
            targets = asked.targets
        n_labels, n_taught, n_reconstructed = step.counts.to(asked.hidden.device).clamp(min=1)
        loss = asked.hidden.new_zeros((), dtype=torch.promote_types(asked.hidden.dtype, torch.float32))
        if own.cross_entropy:
            loss = loss + own.cross_entropy * self._cross_entropy(asked, asked.hidden, targets) / n_labels
        if self._teacher is not None:
            loss = loss + own.distill * self._distilled(asked, targets) / n_taught
        if step.ends and step.ends[0][1]:
            weight = PASS_LOSS_WEIGHT[own.pass_loss] if own.pass_loss_weight is None else own.pass_loss_weight
            loss = loss + weight * self._passes(asked, targets, step) / n_labels
        if step.slept:
            loss = loss + own.reconstruct * self._reconstructed(asked, step) / n_reconstructed
        return loss

    def _cross_entropy(self, asked: Asked, hidden: Tensor, targets: Tensor) -> Tensor:
        head = asked.blocks.logits
        return in_pieces(lambda h, y: self.criterion(head(h), y), asked.whole, hidden, targets.to(hidden.device))

    # --- distill ---------------------------------------------------------------------------------------------------

    def _distilled(self, asked: Asked, targets: Tensor) -> Tensor:
        assert self._teacher is not None
        # Where something is asked: a filler row and the end of a text have no target.
        there = (targets if self.arguments.distill_at == "labels" else asked.targets) != IGNORE
        if self.arguments.distill_at == "later":
            later = torch.from_numpy(asked.columns >= self.model.options().window_size)
            there = there & later.to(there.device)
        which = there.nonzero()[:, 0].to(asked.hidden.device)
        known = self._teacher.read(asked.tokens.ids, asked.tokens.lengths)
        flat = torch.from_numpy(asked.rows * asked.tokens.ids.shape[1] + asked.columns).to(known.device)
        known = known.flatten(0, 1)[flat[which.to(known.device)]]
        teacher, head = self._teacher, asked.blocks.logits

        def divergence(theirs: Tensor, ours: Tensor) -> Tensor:
            taught = teacher.logits(theirs).to(ours.device)
            return summed_divergence(taught, head(ours), self.arguments.distill_temperature)

        return in_pieces(divergence, asked.whole, known, asked.hidden[which])

    # --- pass_loss -------------------------------------------------------------------------------------------------

    def _passes(self, asked: Asked, targets: Tensor, step: Step) -> Tensor:
        """P, summed over the labels after each row's last sleep."""
        settings, tokens = self.model.options(), asked.tokens
        rows = sorted(step.windows)
        starts = np.zeros(tokens.ids.shape[0], dtype=np.int64)
        starts[rows] = [step.windows[row] * settings.window_size for row in rows]
        slept = np.isin(asked.rows, rows)
        which = (slept & (asked.columns >= starts[asked.rows])).nonzero()[0]
        of, offset = asked.rows[which], asked.columns[which] - starts[asked.rows[which]]
        lengths = [int(offset[of == row].max()) + 1 for row in rows]
        window = _window(tokens.ids, rows, starts[rows].tolist(), lengths, settings.sliding)
        picked = torch.from_numpy(np.searchsorted(rows, of) * max(lengths) + offset).to(asked.hidden.device)
        wanted = targets[torch.from_numpy(which).to(targets.device)]
        ours = asked.hidden[torch.from_numpy(which).to(asked.hidden.device)]

        def woken(m: int) -> Tensor:
            """The hidden states of the same places after pass m."""
            return self._wake(asked, window, _after_pass(m, step, rows)).flatten(0, 1)[picked]

        n_earlier = len(step.ends[0][1])
        if self.arguments.pass_loss == "all":
            sums = [self._cross_entropy(asked, woken(m), wanted) for m in range(1, n_earlier + 1)]
            return torch.stack(sums).mean()
        m = Random(f"{self.seed}/{step.number}/pass").randint(1, n_earlier)
        hidden, share = woken(m), 1 - step.done
        labelled = (wanted != IGNORE).nonzero()[:, 0].to(hidden.device)
        head = asked.blocks.logits

        def divergence(last: Tensor, earlier: Tensor) -> Tensor:
            with torch.no_grad():
                known = head(last)
            return summed_divergence(known, head(earlier))

        apart = in_pieces(divergence, asked.whole, ours[labelled].detach(), hidden[labelled])
        return share * self._cross_entropy(asked, hidden, wanted) + (1 - share) * apart

    # --- reconstruct -----------------------------------------------------------------------------------------------

    def _reconstructed(self, asked: Asked, step: Step) -> Tensor:
        settings, tokens, span = self.model.options(), asked.tokens, self._span()
        assert tokens.labelled is not None
        # Rows that were added for the sake of other ranks have no label.
        counts = np.asarray(tokens.labelled.any(axis=1))
        slept: dict[int, int] = {}
        hidden, targets = [], []
        for number, (each, after) in enumerate(step.slept):
            draw = Random(f"{self.seed}/{step.number}/reconstruct/{number}")
            first = draw.randint(0, settings.window_size - 1 - span)
            starts = [slept.get(row, 0) * settings.window_size + first for row in each.rows]
            window = _window(tokens.ids, each.rows, starts, [span + 1] * len(each.rows), settings.sliding)
            read = replace(window, input_ids=window.input_ids[:, :-1], lengths=(span,) * len(each.rows))
            # Of the window nothing but the state: under sliding eviction its keys are still there.
            hidden.append(self._wake(asked, read, Memory(after.batch_size, after.state)).flatten(0, 1))
            real = torch.from_numpy(counts[list(each.rows)]).to(window.input_ids.device)
            targets.append(window.input_ids[:, 1:].masked_fill(~real[:, None], IGNORE).flatten())
            slept |= {row: slept.get(row, 0) + 1 for row in each.rows}
        head = asked.blocks.logits
        return in_pieces(
            lambda h, y: summed_cross_entropy(head(h), y), asked.whole, torch.cat(hidden), torch.cat(targets)
        )

    def _wake(self, asked: Asked, window: Window, memory: Memory) -> Tensor:
        settings = self.model.options()
        return recompute(settings, "window", wake, asked.blocks, window, memory, settings, False)[0]


def _after_pass(m: int, step: Step, rows: Sequence[int]) -> Memory:
    """What pass m of each row's latest sleep left."""
    latest = {row: number for number, (each, _) in enumerate(step.ends) for row in each.rows}
    place = {row: number for number, row in enumerate(rows)}
    memory = Memory(len(rows))
    for number, (each, earlier) in enumerate(step.ends):
        if chosen := [row for row in each.rows if latest[row] == number]:
            left = earlier[m - 1].select([each.rows.index(row) for row in chosen])
            memory = memory.put([place[row] for row in chosen], left)
    return memory


def _window(ids: Tensor, rows: Sequence[int], starts: Sequence[int], lengths: Sequence[int], runs_on: bool) -> Window:
    """Tokens of some rows from their starts on; positions run on through the text or begin anew."""
    columns = torch.tensor(list(starts))[:, None] + torch.arange(max(lengths))[None, :]
    columns = columns.clamp_(max=ids.shape[1] - 1).to(ids.device)
    picked = ids[torch.tensor(list(rows), device=ids.device)].gather(1, columns)
    return Window(picked, tuple(lengths), tuple(starts) if runs_on else (0,) * len(rows))


def objectives_of(
    arguments: SleepTrainingArguments,
    model: nn.Module,
    criterion: Criterion | None,
    compute_loss_func: Callable[..., Any] | None = None,
) -> Objectives | None:
    """The losses that are asked for; None for the model's own.

    Args:
        arguments, model, criterion: those of `Objectives`.
        compute_loss_func: the Trainer's, which takes the place of every loss of the model's making.

    Raises:
        ValueError: if they are asked of a model that does not sleep, do not fit it, or would be put out of force.
    """
    given = arguments.objectives()
    if not given and criterion is None:
        return None
    asked = [*sorted(given), *(["criterion"] if criterion is not None else [])]
    if compute_loss_func is not None:
        raise ValueError(
            f"expected either compute_loss_func or {', '.join(asked)}, got both: the former makes the loss alone; "
            "leave it out, or put what it does into criterion"
        )
    if not any(isinstance(module, SleepForCausalLM) for module in model.modules()):
        raise ValueError(
            f"expected a model that sleeps for {', '.join(asked)}, got {type(model).__name__}; leave them out"
        )
    return Objectives(arguments, sleeping_model(model), arguments.seed, criterion)


def sleeping_model(model: nn.Module) -> SleepForCausalLM:
    """The model itself, or what peft has put itself around."""
    return next(module for module in model.modules() if isinstance(module, SleepForCausalLM))


def _texts(inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The text of every token [B, T], numbered over the batch, and its place in it [B, T], from 0; -1 for padding."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask == 1
    begins = real & (real.cumsum(1) == 1)
    if told := {name: inputs[name] for name in PACKED & inputs.keys()}:
        here = {name: each.cpu().numpy() for name, each in Marks(**told).tensors(*ids.shape).items()}
        if (packed := Marks.begins(here, real.cpu().numpy(), None, 0)) is not None:
            begins[real] = torch.from_numpy(packed).to(ids.device)
    number, text = real.flatten().cumsum(0) - 1, (begins.flatten().cumsum(0) - 1).clamp_(min=0)
    # Without a look at which they are, for which a GPU would be waited for.
    first = torch.where(begins.flatten(), number, 0).cummax(0).values
    return text.view_as(ids), torch.where(real, (number - first).view_as(ids), -1)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
