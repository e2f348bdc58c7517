"""SleepForCausalLM: a causal LM of transformers that sleeps. Ids in, logits and loss out."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from sleepify import sleep as algorithm
from sleepify.cache import SleepCache
from sleepify.config import SleepConfig, check_positive
from sleepify.defaults import resolve
from sleepify.fast_weights import LAYERS, FastWeightLayer
from sleepify.hosts import Host, host_class
from sleepify.precision import cast_per_use
from sleepify.rows import IGNORE, Rows

_LOSS_PIECE = 512
_INCIDENTAL = {"dtype", "torch_dtype", "architectures", "transformers_version", "_name_or_path", "use_cache"}


class SleepForCausalLM(PreTrainedModel, GenerationMixin):
    """A base model that consolidates full windows of its context into fast weights.

    Made by `sleepify.sleepify(base)` or loaded with ``from_pretrained``. Contains the base as ``language_model`` and
    the inserted layers as ``fast_weights``.

    Args:
        config: how it sleeps, with the base's configuration inside.
        language_model: the base; built from ``config.text_config`` if not given.
    """

    config_class = SleepConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    # transformers refuses assisted decoding by this: rejected tokens cannot be taken back out of fast weights.
    _is_stateful = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["FastWeightLayer"]
    _skip_keys_device_placement = ["past_key_values"]

    def __init__(self, config: SleepConfig, language_model: PreTrainedModel | None = None) -> None:
        super().__init__(resolve(config))
        if language_model is None:
            language_model = AutoModelForCausalLM.from_config(config.text_config)
        else:
            # `post_init` must not draw new weights for a base that has its own.
            for module in language_model.modules():
                module._is_hf_initialized = True  # type: ignore[assignment]
        self.language_model = language_model
        inserted, width = config.fast_weights, config.text_config.hidden_size
        mixer = LAYERS[inserted.rule]
        self.fast_weights = nn.ModuleList(
            FastWeightLayer(mixer.from_config(inserted, width), inserted.norm_eps) for _ in inserted.layers
        )
        # Layers of the base that recompute themselves drop the cache, and with it the state.
        for module in language_model.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.gradient_checkpointing = False
        self._recompute = config.checkpoint
        # What a saved session must agree with, wherever and in whatever precision the model was loaded.
        base = {name: value for name, value in config.text_config.to_dict().items() if name not in _INCIDENTAL}
        described = [base, config.fast_weights.to_dict(), config.base_fingerprint]
        self._identity = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()[:12]
        self.post_init()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """A base may have experts; whether it can is its own to say."""
        return True

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, FastWeightLayer):
            module.reset_parameters()

    # --- parts -----------------------------------------------------------------------------------------------------

    @property
    def blocks(self) -> Host:
        """The base and the inserted layers as the algorithm drives them."""
        config = self.config
        return host_class(config.text_config)(
            self.language_model,
            dict(zip(config.fast_weights.layers, self.fast_weights, strict=True)),
            tuple(config.loop_range),
            config.window_size if config.eviction == "sliding" else None,
        )

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def unload(self) -> PreTrainedModel:
        """The base model again, without sleep and without the inserted layers."""
        return self.language_model

    def freeze_base(self, frozen: bool = True) -> None:
        """Train only what was inserted (or, with False, everything)."""
        self.language_model.requires_grad_(not frozen)
        self.fast_weights.requires_grad_(True)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trained, of how many."""
        total = sum(parameter.numel() for parameter in self.parameters())
        trained = sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)
        print(f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}")

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile every layer by itself, in place, instead of the model as a whole: exact, and the loops stay readable.

        Equal layers share their graphs, so that compiling takes as long for 2 layers as for 40; about six graphs serve
        training and ten more generation (docs/performance).

        Args:
            args, kwargs: those of ``torch.compile``.
        """
        # One function of transformers wraps all kinds of layers; the default of 8 graphs is meant for one.
        config: Any = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, 64)
        for layer in (*self.blocks.layers, *self.fast_weights):
            layer.compile(*args, **kwargs)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Recompute per pass (or as ``config.checkpoint`` says), never re-entrant: layers of the base alone cannot,
        because their state must come out of the recomputed part as its value."""
        if gradient_checkpointing_kwargs and gradient_checkpointing_kwargs.get("use_reentrant"):
            raise ValueError("expected use_reentrant=False, got True: the state crosses windows as a value")
        # transformers' activation_checkpointing_enable, which Trainer calls, arrives here with its defaults.
        if other := {name: value for name, value in kwargs.items() if value not in (None, False, 1)}:
            raise ValueError(f"expected every_n_layers=1 and offload=False, got {other}; set config.checkpoint instead")
        self._recompute = "loop" if self.config.checkpoint == "none" else self.config.checkpoint

    def gradient_checkpointing_disable(self) -> None:
        """Keep all activations."""
        self._recompute = "none"

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether activations are recomputed."""
        return self._recompute != "none"

    # --- forward ---------------------------------------------------------------------------------------------------

    def options(self, n_loops: int | None = None) -> algorithm.Options:
        """How this model sleeps, with another N if given."""
        config = self.config
        return algorithm.Options(
            n_loops=config.n_loops if n_loops is None else check_positive("n_loops", n_loops),
            window_size=config.window_size,
            sliding=config.eviction == "sliding",
            checkpoint=self._recompute,
            backprop_loops=config.backprop_loops,
            backprop_windows=config.backprop_windows,
            check_finite=config.check_finite,
            offload=config.offload,
        )

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: SleepCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor | None = None,
        n_loops: int | None = None,
        num_items_in_batch: int | Tensor | None = None,
        awake: Tensor | None = None,
        inputs_embeds: None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> CausalLMOutputWithPast:
        """Read tokens, asleep where a window is full and awake where a prediction is asked for (§5, Alg. 1).

        Args:
            input_ids: [B, T].
            attention_mask: [B, T], or [B, tokens of earlier calls + T]; 0 marks padding, on either side without a
                cache, on the left with one.
            past_key_values: a session to go on with; it is moved forward.
            labels: [B, T], -100 where nothing is predicted. The loss is the mean over the others, or their sum over
                ``num_items_in_batch``.
            use_cache: return a session. By default where it is of use: one was given, or no loss is asked for in
                evaluation.
            logits_to_keep: logits of the last so many columns, or of the columns given; 0 for all. By default all
                without labels and none with labels, since the loss needs only the supervised positions.
            n_loops: another N for this call.
            num_items_in_batch: what to divide the summed loss by (gradient accumulation).
            awake: [B, T] bool, tokens to read awake although nothing is asked of them. When given, also with none set,
                which layers are called depends on nothing but the windows slept on and read awake, as FSDP and ZeRO
                need it.
            inputs_embeds, output_attentions, output_hidden_states: wrappers such as peft name them; they must be off,
                since sleep replays ids, and hidden states of several passes have no place in one tuple.

        Returns:
            ``loss``, ``logits`` [B, columns, V] (0 at padding) and ``past_key_values``, each None if not asked for.

        Raises:
            ValueError: for shapes that do not fit, a cache of another model or batch, right padding with a cache.
        """
        refused = {
            "inputs_embeds": inputs_embeds is not None,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
        }
        if asked := [name for name, value in refused.items() if value]:
            raise ValueError(f"expected {', '.join(asked)} to be off, got it on: sleep replays the ids of a window")
        if past_key_values is not None and not isinstance(past_key_values, SleepCache):
            raise ValueError(f"expected past_key_values to be a SleepCache, got {type(past_key_values).__name__}")
        tokens = Rows.align(input_ids, attention_mask, past_key_values)
        if labels is not None and labels.shape != input_ids.shape:
            raise ValueError(
                f"expected labels of the shape of input_ids, {tuple(input_ids.shape)}, got {tuple(labels.shape)}"
            )
        if use_cache is None:
            wanted_by_default = labels is None and not self.training and not tokens.right_padded
            use_cache = past_key_values is not None or wanted_by_default
        cache = past_key_values
        if cache is None:
            if use_cache and tokens.right_padded:
                raise ValueError(
                    "expected left-padded rows with a cache, got right-padded ones; "
                    "set tokenizer.padding_side = 'left' or use_cache=False"
                )
            cache = SleepCache()
        options = replace(self.options(n_loops), uniform=awake is not None)
        cache.bind(self._owner(), input_ids.shape[0], options.window_size, input_ids.device)

        kept = tokens.columns(logits_to_keep, default_all=labels is None)
        targets = None if labels is None else tokens.targets(labels)
        wanted = tokens.aligned(kept)
        if targets is not None:
            wanted = wanted | (targets != IGNORE)
        if awake is not None:
            wanted = wanted | tokens.places(awake)
        wanted = wanted.cpu()

        blocks = self.blocks
        # Where each pass is recomputed by itself, a cast per pass takes no more memory than one for all.
        with cast_per_use(options.checkpoint == "loop"):
            readings = algorithm.read(blocks, cache, tokens.ids, tokens.lengths, wanted, options, keep=use_cache)
        cache.columns += input_ids.shape[1]

        hidden, rows, columns = self._gather(readings)
        loss = None
        if targets is not None:
            aims = targets[rows.to(targets.device), columns.to(targets.device)]
            loss = _loss(blocks.logits, hidden, aims, num_items_in_batch, whole=options.uniform)
        logits = None
        if kept.numel():
            scores = blocks.logits(hidden)
            logits = tokens.spread(scores, rows.to(scores.device), columns.to(scores.device), kept)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache if use_cache else None)

    def _gather(self, readings: list[algorithm.Reading]) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states of all wanted tokens [M, D], and their rows and columns [M]."""
        if not readings:
            embeddings: Any = self.get_input_embeddings()
            nothing = torch.zeros(0, dtype=torch.long)
            return embeddings.weight.new_zeros(0, self.config.text_config.hidden_size), nothing, nothing
        return (
            torch.cat([reading.hidden_states for reading in readings]),
            torch.cat([reading.rows for reading in readings]),
            torch.cat([reading.columns for reading in readings]),
        )

    def sleep(self, past_key_values: SleepCache, n_loops: int | None = None) -> SleepCache:
        """Consolidate what is awake in a session now, also a window that is only part full (contract 2).

        Args:
            past_key_values: the session; it is moved forward and returned.
            n_loops: another N for this sleep.
        """
        if past_key_values.owner is None:
            raise ValueError("expected a cache that has read something, got an empty one; call the model with it first")
        options = self.options(n_loops)
        embeddings: Any = self.get_input_embeddings()
        past_key_values.bind(
            self._owner(), past_key_values.get_batch_size(), options.window_size, embeddings.weight.device
        )
        awake = [row for row, length in enumerate(past_key_values.open_lengths) if length]
        algorithm.sleep(self.blocks, past_key_values, awake, options)
        return past_key_values

    def _owner(self) -> str:
        """What a session must agree with: weights may be trained on, shapes and windows may not change."""
        return f"{self._identity}, L={self.config.window_size}, {self.config.eviction} eviction"

    # --- generation ------------------------------------------------------------------------------------------------

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        given = model_kwargs.get("past_key_values")
        if given is not None and not isinstance(given, SleepCache):
            raise ValueError(f"expected past_key_values to be a SleepCache, got {type(given).__name__}")
        if (kind := generation_config.cache_implementation) not in (None, "static"):
            raise ValueError(
                f"expected cache_implementation=None or 'static', got {kind!r}: a sleeping model has its own SleepCache"
            )
        if given is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = SleepCache(fixed_shapes=kind == "static")

    # --- files -----------------------------------------------------------------------------------------------------

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args: Any, fast_weights_only: bool = False, **kwargs: Any
    ) -> None:
        """As in transformers, written beside and renamed; with a model card.

        Args:
            save_directory: where to.
            fast_weights_only: save the inserted layers alone, with the name, revision and fingerprint of the base.
            args, kwargs: those of ``PreTrainedModel.save_pretrained``.
        """
        from sleepify.checkpoints import save

        save(self, super().save_pretrained, save_directory, *args, fast_weights_only=fast_weights_only, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; a checkpoint of inserted weights fetches its base and checks that it is the right one."""
        from sleepify.checkpoints import load

        return load(cls, super().from_pretrained, pretrained_model_name_or_path, *args, **kwargs)

    def push_to_hub(  # type: ignore[override]
        self, repo_id: str, fast_weights_only: bool = False, **kwargs: Any
    ) -> str:
        """Upload checkpoint and model card.

        Args:
            repo_id: "user/name".
            fast_weights_only: as in `save_pretrained`.
            kwargs: ``private``, ``token``, ``revision``, ``commit_message``, ``create_pr``, ``max_shard_size``.
        """
        from sleepify.checkpoints import push

        return push(self, repo_id, fast_weights_only=fast_weights_only, **kwargs)


def _loss(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    num_items: int | Tensor | None,
    whole: bool = False,
) -> Tensor:
    """Cross entropy, in float32 at least, over the places that have a target.

    Logits of a few hundred places are as large as all the rest of a step, so they are made and dropped piece by piece.
    """
    chosen = targets != IGNORE
    if num_items is None:
        num_items = chosen.sum().clamp_min(1)
    if hidden.shape[0] > _LOSS_PIECE and not whole:
        pieces = zip(hidden.split(_LOSS_PIECE), targets.split(_LOSS_PIECE), strict=True)
        total = sum(recompute(_summed_loss, head, *piece, use_reentrant=False) for piece in pieces)
    else:
        total = _summed_loss(head, hidden, targets)
    return total / (num_items.to(total.device) if isinstance(num_items, Tensor) else num_items)


def _summed_loss(head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor) -> Tensor:
    scores = head(hidden)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return nn.functional.cross_entropy(scores, targets.to(scores.device), ignore_index=IGNORE, reduction="sum")
