"""Muon for hidden matrices, AdamW for everything else, as one optimiser.

Muon orthogonalises a matrix's momentum, which makes sense for a matrix that maps hidden vectors to hidden vectors. Rows
of embeddings and heads belong to tokens, and a gate's to one number each: those are AdamW's, as the paper has it (§6).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sleepify.fast_weights.layer import FastWeightLayer
from sleepify.training.muon import GroupedMuon, evaluated

if TYPE_CHECKING:
    from sleepify.training.arguments import SleepTrainingArguments

NamedParameters = list[tuple[str, nn.Parameter]]

# Modules whose 2-D weight makes a number per head, expert or channel and no hidden vector: decays, write strengths,
# routers, exit gates.
GATES = frozenset(
    {"a_proj", "b_proj", "in_proj_a", "in_proj_b", "in_proj_ba", "dt_proj", "x_proj"}
    | {"gate", "router", "shared_expert_gate", "early_exit_gate"}
)

# How names of biases and decays end, whatever their dimensions: one of each expert or channel makes them 2-D.
NUMBERS = ("bias", "A_log")

# Where peft keeps the frozen original of a module that it trains as a whole.
PEFT_COPY = "original_module"


def split_parameters(model: nn.Module) -> tuple[NamedParameters, NamedParameters]:
    """Who trains which parameter: (Muon's, AdamW's), each a list of (name, parameter) in the model's order.

    Muon gets the trainable 2-D weights except those of embeddings, the head, gates and low-rank adapters (whose step
    size Muon's scaling by shape does not fit). Stacked experts and convolutions are 3-D and AdamW's; biases and decays
    of a layer's experts or channels, which are 2-D too, are numbers side by side and AdamW's.

    Raises:
        ValueError: if nothing is trainable, or nothing is left for Muon.
    """
    outside = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        module = getattr(model, getter, lambda: None)()
        outside |= set() if module is None else {id(p) for p in module.parameters()}

    muon: NamedParameters = []
    adamw: NamedParameters = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_hidden = len(_shape(parameter)) == 2 and id(parameter) not in outside and not _is_special(name)
            (muon if is_hidden else adamw).append((name, parameter))
    if not muon and not adamw:
        raise ValueError("expected parameters to train, found none that requires a gradient; see model.freeze_base()")
    if not muon:
        names = ", ".join(name for name, _ in adamw[:3])
        raise ValueError(
            f"expected hidden matrices for Muon, found none among the {len(adamw)} trainable parameters ({names}...); "
            "use optimizer='adamw', or train the inserted layers or the base too"
        )
    return muon, adamw


def parameter_groups(model: nn.Module, args: SleepTrainingArguments) -> list[dict[str, Any]]:
    """Groups for an optimiser, each with its ``algorithm``, ``lr`` and ``weight_decay``; prints what trains."""
    if args.optimizer == "muon":
        muon, adamw = split_parameters(model)
    else:
        muon, adamw = [], [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if not adamw:
            raise ValueError("expected parameters to train, found none that requires a gradient")
    if args.process_index == 0:
        print(describe_training(model, muon, adamw))
    decayed = [
        p
        for name, p in adamw
        if len(_shape(p)) >= 2 and not name.endswith(NUMBERS) and not getattr(p, "_no_weight_decay", False)
    ]
    apart = {id(p) for p in decayed}
    groups = [
        ("muon", [p for _, p in muon], args.muon_learning_rate, args.weight_decay),
        ("adamw", decayed, args.adamw_learning_rate, args.weight_decay),
        ("adamw", [p for _, p in adamw if id(p) not in apart], args.adamw_learning_rate, 0.0),
    ]
    return [
        {"params": parameters, "algorithm": algorithm, "lr": lr, "weight_decay": decay}
        for algorithm, parameters, lr, decay in groups
        if parameters
    ]


def describe_training(model: nn.Module, muon: NamedParameters, adamw: NamedParameters) -> str:
    """For the log: what trains and what does not, in the base, in what is inserted and in adapters; and by whom."""
    lines = []
    parameters = [(name, p) for name, p in model.named_parameters() if PEFT_COPY not in name]
    trained = {id(p) for _, p in muon + adamw}
    for part in dict.fromkeys(_part(name) for name, _ in parameters):
        mine = [p for name, p in parameters if _part(name) == part]
        lines.append(f"{part}: {_count([p for p in mine if id(p) in trained]):,} of {_count(mine):,} parameters train")
    frozen = [(name, p) for name, p in parameters if id(p) not in trained]
    for holder, named in (("Muon", muon), ("AdamW", adamw), ("frozen", frozen)):
        kinds = sorted({".".join(name.split(".")[-2:]) for name, _ in named})
        count = _count([p for _, p in named])
        lines.append(f"{holder}: {count:,} parameters in {len(named)} tensors ({', '.join(kinds) or 'none'})")
    return "; ".join(lines)


def idle_layers(model: nn.Module) -> list[str]:
    """Names of inserted layers that add nothing and never will: their output projection is zero, and frozen."""
    idle = []
    for name, layer in model.named_modules():
        if isinstance(layer, FastWeightLayer) and PEFT_COPY not in name:
            weight = layer.o_proj.weight
            # On the meta device, or partitioned by ZeRO-3, there are no values to look at.
            is_seen = weight.device.type != "meta" and weight.numel() > 0
            is_trained = any(parameter.requires_grad for parameter in layer.o_proj.parameters())
            if is_seen and not is_trained and not weight.any():
                idle.append(name)
    return idle


def _part(name: str) -> str:
    return "adapters" if "lora_" in name else "inserted" if "fast_weights." in name else "base"


def _count(parameters: list[nn.Parameter]) -> int:
    return sum(_shape(parameter).numel() for parameter in parameters)


def build_optimizer(model: nn.Module, args: SleepTrainingArguments) -> MuonAdamW:
    """The optimiser of a run. Prints what trains and what does not.

    Raises:
        ValueError: if nothing is trainable or nothing is left for Muon.
    """
    return MuonAdamW(
        parameter_groups(model, args),
        momentum=args.muon_momentum,
        adjust_lr=args.muon_adjust_lr,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
    )


def build_deepspeed_optimizer(model: nn.Module, args: SleepTrainingArguments) -> torch.optim.Optimizer:
    """The same under ZeRO, which flattens parameters so that only DeepSpeed's own Muon can put matrices together again.

    DeepSpeed would take every tensor of two or more dimensions outside embeddings and head, gates and convolutions too;
    here the split is `split_parameters`'.

    Raises:
        ValueError: as `build_optimizer`, for gradient clipping (DeepSpeed clips Muon's orthogonalised updates), and for
            another ``muon_adjust_lr`` than DeepSpeed's.
    """
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    if args.max_grad_norm:
        raise ValueError(
            f"expected max_grad_norm=0 with Muon under DeepSpeed, got {args.max_grad_norm}: it takes the norm over "
            "Muon's updates instead of the gradients, and would shrink every one of them; or use optimizer='adamw'"
        )
    if args.muon_adjust_lr != "original":
        raise ValueError(
            "expected muon_adjust_lr='original' under DeepSpeed, whose Muon knows no other, "
            f"got {args.muon_adjust_lr!r}"
        )
    adam = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    groups = []
    for group in parameter_groups(model, args):
        is_muon = group.pop("algorithm") == "muon"
        for parameter in group["params"]:
            parameter.use_muon = is_muon
        own = {"momentum": args.muon_momentum, "ns_method": "standard"} if is_muon else adam
        groups.append(group | own | {"use_muon": is_muon})
    return MuonWithAuxAdam(groups, adam_optimizer=torch.optim.AdamW, adam_optimizer_kwargs=adam)


class MuonAdamW(torch.optim.Optimizer):
    """`GroupedMuon` and `torch.optim.AdamW` behind one interface, so that schedulers, Accelerate and checkpoints
    see one optimiser: its groups are theirs, and its state is theirs.

    A parameter narrower than float32 has a float32 copy in its state, under "master": that is updated, and rounded to
    the parameter. A step of the recipes' size is less than half the distance of two bfloat16 numbers and would be lost.
    Where something else has changed the parameter since, the copy is made anew.

    Args:
        groups: parameter groups, each with ``algorithm`` "muon" or "adamw", ``lr`` and ``weight_decay``.
        momentum: of Muon (Nesterov).
        adjust_lr: what Muon makes of its rate for a matrix of this shape, ``adjust_lr_fn`` of `torch.optim.Muon`.
        betas, eps: of AdamW.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        momentum: float,
        betas: tuple[float, float],
        eps: float,
        adjust_lr: str = "original",
    ) -> None:
        # Each algorithm completes its own groups with its own defaults; here the same dicts are put side by side.
        self._parts: dict[str, torch.optim.Optimizer] = {}
        if muon := [group for group in groups if group["algorithm"] == "muon"]:
            self._parts["muon"] = GroupedMuon(muon, momentum=momentum, adjust_lr_fn=adjust_lr)
        if adamw := [group for group in groups if group["algorithm"] == "adamw"]:
            self._parts["adamw"] = torch.optim.AdamW(adamw, betas=betas, eps=eps)
        # transformers' schedules that end at a rate take their share of it from the rate in the defaults.
        rate = {"lr": groups[0]["lr"]}
        super().__init__([group for part in self._parts.values() for group in part.param_groups], rate)
        self._share()

    def _share(self) -> None:
        """Let both algorithms work on the groups and the state of this optimiser."""
        for algorithm, part in self._parts.items():
            part.param_groups = [group for group in self.param_groups if group["algorithm"] == algorithm]
            part.state = self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but float32 state stays so: torch rounds it to the dtype of its parameter."""
        super().load_state_dict(state_dict)
        saved, own = (
            chain.from_iterable(group["params"] for group in groups)
            for groups in (state_dict["param_groups"], self.param_groups)
        )
        for index, parameter in zip(saved, own, strict=True):
            if is_narrow(parameter):
                for key, value in state_dict["state"].get(index, {}).items():
                    if isinstance(value, Tensor) and key != "step":
                        self.state[parameter][key] = value.to(parameter.device, torch.float32)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = evaluated(closure)
        for part in self._parts.values():
            with self._masters(part):
                part.step()
        return loss

    @contextmanager
    def _masters(self, part: torch.optim.Optimizer) -> Iterator[None]:
        """Put float32 copies in the place of narrower parameters, and round them to those at the end."""
        groups = part.param_groups
        trained = [p for group in groups for p in group["params"] if p.grad is not None]
        masters = {p: self.state[p].get("master", None) for p in trained if is_narrow(p)}
        if not masters:
            yield
            return
        for parameter, master in masters.items():
            if master is None:
                masters[parameter] = master = parameter.detach().float()
            else:
                # Weights may have been loaded since the last step. To look whether they were would wait for the device.
                master.copy_(torch.where(master.to(parameter.dtype) == parameter, master, parameter))
            master.grad = parameter.grad.float()
            # AdamW takes a state that is not empty for its own.
            self.state[master] = {key: value for key, value in self.state[parameter].items() if key != "master"}
        part.param_groups = [group | {"params": [masters.get(p, p) for p in group["params"]]} for group in groups]
        try:
            yield
        finally:
            part.param_groups = groups
            for parameter, master in masters.items():
                master.grad = None
                self.state[parameter] = self.state.pop(master) | {"master": master}
                parameter.copy_(master)


def is_narrow(parameter: Tensor) -> bool:
    """Whether its numbers are too far apart to be trained in place."""
    return parameter.dtype in (torch.bfloat16, torch.float16)


def _shape(parameter: Tensor) -> torch.Size:
    """Also of a parameter that ZeRO-3 has partitioned, which looks empty."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _is_special(name: str) -> bool:
    parts = name.replace(".base_layer", "").split(".")
    return "lora_" in name or name.endswith(NUMBERS) or not GATES.isdisjoint(parts[-2:])
