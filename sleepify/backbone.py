"""``model.base_model``: the sleeping model without its head, for trainers that apply the head themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from typing import Any, ClassVar

from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import can_return_tuple

from sleepify.keywords import refuse, refuse_unequal_ranks
from sleepify.packing import Marks
from sleepify.reading import Call, Reading


class Backbone(nn.Module):
    """Ids in, hidden states out: what the head of a sleeping model makes its logits of.

    A view, made anew whenever it is asked for: it has the model's own parts, and is itself no part of the model, so
    that names in checkpoints do not change.

    Args:
        parts: the model's modules by name.
        config: the model's.
        read: reads a batch awake and asleep, as the model does.
        layers: the base's, as they are now.
    """

    # transformers asks a base model for them; layers are not to be spread over devices one by one.
    _tp_plan: ClassVar[dict[str, Any]] = {}
    _pp_plan: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        parts: dict[str, nn.Module],
        config: Any,
        read: Callable[[Call], Reading],
        layers: Callable[[], Iterable[nn.Module]],
    ) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
            self.training = part.training
        self.config, self._read, self._layers = config, read, layers

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        *args: Any,
        inputs_embeds: None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Read tokens as ``SleepForCausalLM.forward`` does.

        Args:
            args, kwargs: those of ``SleepForCausalLM.forward``, without labels; ``logits_to_keep`` says of which
                columns hidden states are wanted (all by default).
            inputs_embeds, output_attentions, output_hidden_states, output_router_logits: must be off.

        Returns:
            ``last_hidden_state`` [B, columns, D], awake and with the final norm applied (0 at padding), and
            ``past_key_values``, the session, if it is kept.

        Raises:
            TypeError: for a keyword that the model does not take.
            ValueError: as ``SleepForCausalLM.forward``.
            SleepifyError: for sharded layers, also without gradient: who applies the head himself has each process
                read a batch of its own.
        """
        refuse(
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            output_router_logits=output_router_logits,
        )
        if kwargs.get("awake") is None:
            refuse_unequal_ranks(self._layers())
        marks = Marks(**{field.name: kwargs.pop(field.name, None) for field in fields(Marks)})
        reading = self._read(replace(Call(*args, **kwargs), marks=marks))
        hidden = reading.last_hidden_state()
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=reading.keep())
