"""LoRA and other adapters of peft on a model that sleeps: which layers, and whose weights an adapter must hold.

An adapter of a base is small because everybody has the base. Nobody has the inserted layers of a model that was made
to sleep in memory: they are trained whole, saved with the adapter, and without them it is not loaded.

They fit only the layers that they are of, and tensors do not tell after which layer of the base they were put. So an
adapter's configuration says how its model slept, in a form that `sleepify` takes.

peft is optional, and asks a model nothing before it changes it. So where it is installed, `register` goes before four
of its functions, which do for every other model what they did.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from sleepify.errors import CheckpointError

if TYPE_CHECKING:
    from peft import LoraConfig

_INSERTED = "fast_weights"
_SLEPT = "sleepify"
_HOW = ("n_loops", "window_size", "eviction", "loop_range")
_LINE = "sleepify.lora_config(model)"


def lora_config(model: nn.Module, r: int = 16, **kwargs: Any) -> LoraConfig:
    """LoRA for the base, and the inserted layers whole.

    Targets are the base's linear layers, but not: its head; what no pass uses; weights that several layers share, into
    which several adapters cannot be merged; output projections of Mamba layers, whose kernels read the weight past any
    adapter. What was inserted starts at nothing and is small: it is trained itself (``modules_to_save``), with no
    adapter in its mixers.

    Args:
        model: a model that sleeps, before or after peft has wrapped it.
        r: rank.
        kwargs: others of ``peft.LoraConfig``, which go before what is chosen here: ``lora_alpha`` is 2 r if not given,
            ``task_type`` "CAUSAL_LM"; ``modules_to_save`` is added to the inserted layers.

    Returns:
        For ``peft.get_peft_model(model, ...)``, ``model.add_adapter(...)`` or the ``peft_config`` of a trainer.

    Raises:
        TypeError: for a model that does not sleep.
        ImportError: without peft.

    Example:
        >>> model = peft.get_peft_model(model, sleepify.lora_config(model, r=8))
    """
    from peft import LoraConfig

    _, sleeping = _inside(model)
    if sleeping is None:
        raise TypeError(f"expected a model that sleeps, got {type(model).__name__}; call sleepify(model) first")
    saved = [*_names(sleeping), *(kwargs.pop("modules_to_save", None) or ())]
    chosen = {"target_modules": _targets(sleeping), "lora_alpha": 2 * r, "task_type": "CAUSAL_LM"}
    return LoraConfig(r=r, modules_to_save=list(dict.fromkeys(saved)) or None, **{**chosen, **kwargs})


def register() -> None:
    """Teach peft, where it is installed, what a sleeping model needs. Doing so again changes nothing."""
    if importlib.util.find_spec("peft") is None:
        return
    import peft
    from peft import peft_model
    from peft.config import PeftConfigMixin
    from peft.tuners.tuners_utils import BaseTuner
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as LORA_TARGETS

    # Shown to whoever asks; for a sleeping model itself, `_complete` is more exact.
    LORA_TARGETS["sleepify"] = "all-linear"
    places: list[tuple[Any, str, Callable[..., Any]]] = [
        (BaseTuner, "inject_adapter", _inject),
        (PeftConfigMixin, "save_pretrained", _describe),
    ]
    for module in (peft, peft_model):
        places += [(module, "get_peft_model_state_dict", _collect), (module, "set_peft_model_state_dict", _restore)]
    for place, name, ours in places:
        setattr(place, name, _around(getattr(place, name), ours))


def _around(function: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    if hasattr(function, "_sleepify"):
        return function

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return ours(function, *args, **kwargs)

    wrapped._sleepify = True  # type: ignore[attr-defined]
    return wrapped


# --- before and after a model gets an adapter ---


def _inject(function: Callable[..., Any], tuner: Any, model: nn.Module, adapter_name: str, *a: Any, **k: Any) -> Any:
    if not _sleeps(model):
        return function(tuner, model, adapter_name, *a, **k)
    config = tuner.peft_config[adapter_name]
    _check_layers(config, model)
    _complete(config, model)
    result = function(tuner, model, adapter_name, *a, **k)
    if not config.inference_mode and _all_idle(model):
        warnings.warn(
            f"this adapter leaves every inserted layer frozen at zero, where nothing that is written asleep can change "
            f"what the model says: it trains the base without sleep. Write `{_LINE}`, or add "
            f"modules_to_save={_names(model)} to yours",
            stacklevel=2,
        )
    return result


def _check_layers(config: Any, model: Any) -> None:
    """See that a loaded adapter was trained with the inserted layers that the model has; warn if the model sleeps in
    another way than it did then.

    Raises:
        CheckpointError: naming what differs, and what to do.
    """
    slept = (config.auto_mapping or {}).get(_SLEPT)
    if slept is None:
        return
    then, now = slept[_INSERTED], model.config.fast_weights.to_dict()
    names = sorted(then.keys() | now.keys())
    if differing := [f"{n}={now.get(n)!r}, not {then.get(n)!r}" for n in names if now.get(n) != then.get(n)]:
        trained_on = config.base_model_name_or_path
        raise CheckpointError(
            f"expected the inserted layers that the adapter was trained with, got {'; '.join(differing)}: load it onto "
            + (f"the checkpoint that it was trained on ({trained_on}), or " if trained_on else "")
            + f"sleepify(base, **peft.PeftConfig.from_pretrained(adapter).auto_mapping[{_SLEPT!r}])"
        )
    how = {n: (getattr(model.config, n), slept[n]) for n in _HOW if n in slept}
    if other := [f"{n}={now!r}, not {then!r}" for n, (now, then) in how.items() if now != then]:
        warnings.warn(
            f"this adapter was trained on a model that slept otherwise than this one: {'; '.join(other)}; set them in "
            "model.config to have it sleep as it was trained",
            stacklevel=3,
        )


def _complete(config: Any, model: Any) -> None:
    """Fill in what a configuration without targets leaves open: those of `lora_config`, and the inserted layers."""
    if getattr(config, "target_modules", ()) is not None or getattr(config, "target_parameters", None):
        return
    config.target_modules = set(_targets(model))
    config.modules_to_save = list(dict.fromkeys([*_names(model), *(config.modules_to_save or ())])) or None


def _targets(model: Any) -> list[str]:
    """Names in ``model`` of the base's linear layers that an adapter can do something for."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers.pytorch_utils import Conv1D

    base = model.language_model
    uses = Counter(id(parameter) for _, parameter in base.named_parameters(remove_duplicate=False))
    head, idle = base.get_output_embeddings(), {id(parameter) for parameter in model.blocks.idle_parameters()}
    modules: dict[str, Any] = dict(base.named_modules())
    adapted = tuple(f"{name}." for name, module in modules.items() if isinstance(module, BaseTunerLayer))
    kinds: tuple[Any, ...] = (nn.Linear, Conv1D, BaseTunerLayer)
    found = []
    for name, module in modules.items():
        parent = type(modules[name.rpartition(".")[0]]).__name__
        if (
            isinstance(module, kinds)
            and module is not head
            and not name.startswith(adapted)
            and not any(id(parameter) in idle or uses[id(parameter)] > 1 for parameter in module.parameters())
            and not ("Mamba" in parent and name.endswith("out_proj"))
        ):
            found.append(f"language_model.{name}")
    return found


def _all_idle(model: Any) -> bool:
    """Whether there are inserted layers, and all of them add nothing and never will."""
    projections = [layer.o_proj for layer in model.fast_weights]
    return bool(projections) and not any(
        parameter.requires_grad or _is_set(projection.weight)
        for projection in projections
        for parameter in projection.parameters()
    )


def _is_set(weight: Tensor) -> bool:
    """Whether a weight is not all zero. On the meta device, or partitioned by ZeRO-3, there are no values to see."""
    return weight.device.type == "meta" or weight.numel() == 0 or bool(weight.any())


# --- what is saved and loaded ---


def _collect(
    function: Callable[..., Any], model: Any, state_dict: Any = None, adapter_name: str = "default", *a: Any, **k: Any
) -> Any:
    """The tensors of an adapter, with the inserted weights of a model that is in no checkpoint."""
    collected = function(model, state_dict, adapter_name, *a, **k)
    prefix, sleeping = _inside(model)
    if sleeping is None:
        return collected
    # No field, so that the user's configuration still serves for another model.
    config, settings = model.peft_config[adapter_name], sleeping.config
    config._slept = {name: getattr(settings, name) for name in _HOW} | {_INSERTED: settings.fast_weights.to_dict()}
    if sleeping.name_or_path or config.is_prompt_learning:
        return collected
    state = model.state_dict() if state_dict is None else state_dict
    for name, stored in _own_weights(sleeping):
        if prefix + name in state:
            collected.setdefault(prefix + stored, state[prefix + name])
    return collected


def _describe(function: Callable[..., Any], config: Any, *a: Any, **k: Any) -> Any:
    """Write an adapter's configuration, and into it how the model slept that the adapter is of."""
    if (slept := getattr(config, "_slept", None)) is not None:
        k["auto_mapping_dict"] = (k.get("auto_mapping_dict") or config.auto_mapping or {}) | {_SLEPT: slept}
    return function(config, *a, **k)


def _restore(
    function: Callable[..., Any], model: Any, state: Any, adapter_name: str = "default", *a: Any, **k: Any
) -> Any:
    """Load an adapter, if it has the inserted weights that it needs."""
    prefix, sleeping = _inside(model)
    config = model.peft_config[adapter_name]
    if sleeping is None and any(name.startswith(f"base_model.model.{_INSERTED}.") for name in state):
        raise CheckpointError(
            f"expected a model that sleeps, since the adapter holds inserted layers, got {type(model).__name__} around "
            f"{type(model.get_base_model()).__name__}; give it sleep as it had when it was trained: sleepify(base, ...)"
        )
    if sleeping is not None and not config.is_prompt_learning:
        check_complete(sleeping, config, {name.removeprefix(prefix) for name in state})
    return function(model, state, adapter_name, *a, **k)


def check_complete(model: Any, config: Any, held: Iterable[str]) -> None:
    """Refuse an adapter without the inserted weights that its model has from nowhere else.

    Args:
        model: the sleeping model, with the adapter's layers in place.
        config: the adapter's.
        held: names of the tensors that it holds, as the model would call them without peft.

    Raises:
        CheckpointError: naming what is missing, and what to do.
    """
    held, saved = set(held), tuple(f"{name}." for name in _names(model) if name in (config.modules_to_save or ()))
    needed = [name for _, name in _own_weights(model) if not model.name_or_path or name.startswith(saved)]
    if missing := [name for name in needed if name not in held]:
        trained_on = config.base_model_name_or_path
        raise CheckpointError(
            f"expected an adapter that holds the inserted layers, since this model has them from no checkpoint, found "
            f"{len(needed) - len(missing)} of {len(needed)} tensors (missing: {', '.join(missing[:3])}...); load it "
            f"onto the checkpoint that it was trained on{f' ({trained_on})' if trained_on else ''}, or train and save "
            f"it with {_LINE}"
        )


def _own_weights(model: Any) -> Iterable[tuple[str, str]]:
    """(name in the model, name in an adapter) of the inserted weights themselves, without what adapters add to them."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    for place, layer in enumerate(model.fast_weights):
        whole = isinstance(layer, ModulesToSaveWrapper)
        inner, between = (layer.original_module, "original_module.") if whole else (layer, "")
        added = tuple(f"{name}." for name, module in inner.named_modules() if isinstance(module, BaseTunerLayer))
        kept = tuple(f"{name}base_layer." for name in added)
        for name in inner.state_dict():
            if not name.startswith(added) or name.startswith(kept):
                yield f"{_INSERTED}.{place}.{between}{name}", f"{_INSERTED}.{place}.{name}"


# --- finding the model ---


def _names(model: Any) -> list[str]:
    return [f"{_INSERTED}.{place}" for place in range(len(model.fast_weights))]


def _sleeps(module: Any) -> bool:
    return getattr(getattr(module, "config", None), "model_type", None) == "sleepify" and hasattr(module, _INSERTED)


def _inside(model: nn.Module) -> tuple[str, Any]:
    """The sleeping model in what peft has put around it, and the prefix of its names there."""
    for name, module in model.named_modules():
        if _INSERTED in module._modules and _sleeps(module):
            return f"{name}." if name else "", module
    return "", None
