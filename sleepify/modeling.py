"""SleepForCausalLM: a causal LM of transformers that sleeps. Ids in, logits and loss out."""

from __future__ import annotations

import hashlib
import json
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from sleepify import sleep as algorithm
from sleepify.backbone import Backbone
from sleepify.cache import SleepCache
from sleepify.checkpoints import SleepCheckpoint
from sleepify.config import SleepConfig, essential
from sleepify.defaults import LiveSettings, resolve
from sleepify.fast_weights import LAYERS, FastWeightLayer
from sleepify.generation import SleepGeneration
from sleepify.graphs import SleepCapture
from sleepify.hosts import Host, host_class
from sleepify.keywords import refuse, refuse_auto, refuse_unequal_ranks
from sleepify.loss import Objective, check_count, cross_entropy, rooted
from sleepify.memory import changed
from sleepify.on_demand import SleepOnDemand
from sleepify.packing import Marks
from sleepify.precision import cast_per_use
from sleepify.reading import Call, Reading
from sleepify.recompute import SleepRecompute
from sleepify.rows import NO_COLUMNS, Rows
from sleepify.schedule import schedule
from sleepify.settings import Adaptive, Loops, Settings, check_positive, with_loops
from sleepify.snapshot import Snapshot

# Whole numbers, of which there is nothing to compile; torch fails where it tries.
_planned, _taken_in = torch.compiler.disable(schedule), torch.compiler.disable(Rows.of)


class SleepForCausalLM(
    SleepGeneration, SleepOnDemand, SleepCapture, SleepRecompute, SleepCheckpoint, GenerationMixin
):  # transformers looks for the last by name
    """A base model that consolidates full windows of its context into fast weights.

    Made by `sleepify.sleepify(base)` or loaded with ``from_pretrained``. Contains the base as ``language_model`` and
    the inserted layers as ``fast_weights``.

    Args:
        config: how it sleeps, with the base's configuration inside.
        language_model: the base; built from ``config.text_config`` if not given.

    Attributes:
        logits_in_training: whether a call in training with labels gives logits too, as transformers' other models do;
            for trainers that look at them. Off, since they may be as large as all the rest of a step.
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
    # Nor are they to be quantized with the base: by this quantizers know what to leave.
    _keep_in_fp32_modules = ["fast_weights"]
    _skip_keys_device_placement = ["past_key_values"]

    def __init__(self, config: SleepConfig, language_model: PreTrainedModel | None = None) -> None:
        config = resolve(config)
        super().__init__(config)
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
        layer: Any
        for layer in self.fast_weights:
            # Drawn where there is memory; transformers would draw again, and a seed begin with other weights.
            layer._is_hf_initialized = layer.o_proj.weight.device.type != "meta"
        # Layers of the base that recompute themselves drop the cache, and with it the state.
        for module in language_model.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.gradient_checkpointing = False
        self._recompute = None
        self._capture = self._graphs = None
        self._settings = LiveSettings(config.fast_weights)
        self._host: tuple[Any, Host | None] = (None, None)
        self.watch: algorithm.Watch | None = None
        self.branch: algorithm.Branch | None = None
        self.objective: Objective = cross_entropy
        self.logits_in_training = False
        # What a saved session must agree with, wherever and in whatever precision the model was loaded; a vocabulary
        # may grow.
        base = essential(config.text_config.to_dict()) | {"vocab_size": None}
        described = [base, config.fast_weights.to_dict(), config.base_fingerprint]
        self._identity = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()[:12]
        self._idle = [parameter for parameter in self.blocks.idle_parameters() if parameter.requires_grad]
        self._leave_idle()
        self.post_init()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """A base may have experts; whether it can is its own to say."""
        return True

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, FastWeightLayer):
            module.reset_parameters()

    def is_custom_code(self) -> bool:  # type: ignore[override]
        """What the base says of itself: in code that is not its own transformers takes a module without weights for
        loaded, and leaves out what it would fill in (Falcon-H1's factors, which no file holds)."""
        return bool(self.language_model.is_custom_code())

    # --- parts -----------------------------------------------------------------------------------------------------

    @property
    def blocks(self) -> Host:
        """The base and the inserted layers as the algorithm drives them; built anew when one of them is another."""
        return self.host_of(self.options())

    def host_of(self, settings: Settings) -> Host:
        """`blocks` for these settings."""
        window = settings.window_size if settings.sliding else None
        base: Any = self.language_model
        # Looked up without asking the modules, since this is done for every token.
        decoder = base._modules.get(base.base_model_prefix)
        layers = None if decoder is None else decoder._modules.get("layers")
        made_of = (*map(id, (base, decoder, layers, *self.fast_weights)), settings.loop_range, window)
        known, host = self._host
        if host is None or known != made_of:
            inserted = dict(zip(self._settings.inserted.layers or [], self.fast_weights, strict=True))
            host = host_class(self.config.text_config)(base, inserted, settings.loop_range, window)
            self._host = (made_of, host)
        return host

    @property
    def base_model(self) -> Backbone:
        """The model without its head, for trainers that apply the head themselves."""
        parts = {"language_model": self.language_model, "fast_weights": self.fast_weights}
        return Backbone(parts, self.config, self._read, lambda: self.blocks.layers)

    @property
    def device(self) -> torch.device:
        """Where ids go. Weights that accelerate offloads are nowhere between calls; its hooks say where they go."""
        found: torch.device = super().device
        hooks = (getattr(module, "_hf_hook", None) for module in self.modules()) if found.type == "meta" else ()
        where = (getattr(hook, "execution_device", None) for hook in hooks)
        return next((torch.device(each) for each in where if each is not None), found)

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
        for parameter in self._idle:
            parameter.requires_grad_(True)
        return self.language_model

    def freeze_base(self, frozen: bool = True) -> None:
        """Train only what was inserted (or, with False, everything)."""
        self.language_model.requires_grad_(not frozen)
        self.fast_weights.requires_grad_(True)
        self._leave_idle()

    def _leave_idle(self) -> None:
        """Freeze what no pass uses: trained in several processes, a parameter that never has a gradient is an error."""
        for parameter in self.blocks.idle_parameters():
            parameter.requires_grad_(False)

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

    # --- forward ---------------------------------------------------------------------------------------------------

    def options(self, n_loops: Loops | None = None) -> Settings:
        """How this model sleeps now, checked: ``config`` may be changed at any time.

        Args:
            n_loops: another N, or "auto".

        Raises:
            ValueError: for a value that this base cannot have, or "auto" where it cannot be.
        """
        settings = with_loops(self._settings.of(self.config, self._recompute), n_loops)
        if isinstance(settings, Adaptive):
            refuse_auto(self.training, settings.backprop_loops, self.blocks.layers)
        return settings

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: SleepCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor | None = None,
        n_loops: Loops | None = None,
        num_items_in_batch: int | Tensor | None = None,
        awake: Tensor | None = None,
        ephemeral: Tensor | None = None,
        loss_pieces: int = 1,
        inputs_embeds: None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        position_ids: Tensor | None = None,
        cache_position: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | Tensor | None = None,
        max_length_k: int | Tensor | None = None,
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
            logits_to_keep: logits of the last so many columns, or of the columns given; 0 for all. By default all,
                but in training with labels none, since the loss needs only the supervised positions (all, if
                ``logits_in_training`` is set).
            n_loops: another N for this call; "auto" for as many passes as each row's state needs to settle, at most the
                model's N (``config.auto_threshold``; not in training).
            num_items_in_batch: what to divide the summed loss by (gradient accumulation).
            awake: [B, T] bool, tokens to read awake although nothing is asked of them. When given, also with none set,
                which layers are called depends on nothing but the windows slept on and read awake, as FSDP and ZeRO
                need it.
            ephemeral: [B, T] bool, tokens that are read awake and never consolidated (a secret, a tool's scratch). They
                see and are seen by what is awake until their row sleeps next; from then on the session is the one that
                never read them. They fill no window: one that follows a full window is read before it is slept on.
            loss_pieces: with ``awake``, how often the head is called for the loss, the same on all ranks.
            inputs_embeds, output_attentions, output_hidden_states: wrappers such as peft name them; they must be off,
                since sleep replays ids, and hidden states of several passes have no place in one tuple.
            output_router_logits: must be off: no auxiliary loss is made of them.
            position_ids, cache_position, token_type_ids: must say what is so anyway. Positions that begin at 0 again,
            seq_idx, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: mark the texts that are packed into a
                row, see `Marks`; each is read as if it were a row of its own. Not with a cache.

        Returns:
            ``loss``, ``logits`` [B, columns, V] (0 at padding) and ``past_key_values``, each None if not asked for.

        Raises:
            ValueError: for shapes that do not fit, a cache of another model or batch, right padding with a cache.
        """
        refuse(
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            output_router_logits=output_router_logits,
        )
        if input_ids is None:
            raise ValueError("expected input_ids [batch, tokens], got none")
        check_count(num_items_in_batch)
        boundaries = (seq_idx, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
        marks = Marks(position_ids, cache_position, token_type_ids, *boundaries)
        context = (input_ids, attention_mask, past_key_values, n_loops, marks, awake, ephemeral)
        reading = self._read(Call(*context, use_cache, labels, logits_to_keep))
        loss, logits = reading.predict(num_items_in_batch, check_positive("loss_pieces", loss_pieces))
        loss = rooted(loss, self.parameters(), bool(reading.pieces)) if loss is not None and self.training else loss
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=reading.keep())

    def _read(self, call: Call) -> Reading:
        """Read tokens as `forward` says, for what it or the backbone does with them."""
        cache, labels, awake, use_cache = call.past_key_values, call.labels, call.awake, call.use_cache
        if cache is not None and not isinstance(cache, SleepCache):
            raise ValueError(f"expected past_key_values to be a SleepCache, got {type(cache).__name__}")
        if awake is None and (self.training or labels is not None or torch.is_grad_enabled()):
            refuse_unequal_ranks(self.blocks.layers)
        if call.logits_to_keep is None and labels is not None and self.training and not self.logits_in_training:
            call = replace(call, logits_to_keep=NO_COLUMNS)
        settings = self.options(call.n_loops)
        if awake is not None and isinstance(settings, Adaptive):
            raise ValueError('expected a number for n_loops with `awake`, which fixes the calls of layers, got "auto"')
        blocks = self.host_of(settings)
        session, tokens = self._take_in(call, settings, kept=labels is None if use_cache is None else use_cache)
        if use_cache is None:
            by_default = not (labels is not None or self.training or tokens.right_padded or tokens.packed)
            use_cache = cache is not None or by_default
        if use_cache and cache is None:
            if tokens.right_padded:
                raise ValueError(
                    "expected left-padded rows with a cache, got right-padded ones; "
                    "set tokenizer.padding_side = 'left' or use_cache=False"
                )
            if tokens.packed:
                raise ValueError("expected one text per row with a cache, got packed rows; set use_cache=False")
            cache = SleepCache()
        plan = _planned(
            session.open_lengths,
            tokens.lengths,
            tokens.wanted,
            # L, or more while the window before is slept on in the background.
            session.open_ids.shape[1],
            keep=use_cache,
            mixes_lengths=blocks.masks_padding,
            may_share=settings.may_share and awake is None and tokens.ephemeral is None and not any(session.ephemeral),
            backprop_windows=settings.backprop_windows if torch.is_grad_enabled() else None,
            ephemeral=tokens.ephemeral,
        )
        # Where each pass is recomputed by itself, a cast per pass takes no more memory than one for all.
        with cast_per_use() if settings.checkpoint in ("loop", "selective") else nullcontext():
            session, pieces = algorithm.read(
                self._waking(blocks), session, tokens.ids, plan.rounds, settings, use_cache, self.watch, self.branch
            )
        after = None
        if use_cache:
            # What is read outside training is a constant: a session must not hold every graph since its beginning.
            after = session if self.training else session.detached()
            after = changed(after, columns=after.columns + tokens.lasting_columns())
        return Reading(blocks, pieces, plan, tokens, cache, after, self.objective, whole=awake is not None)

    def _take_in(self, call: Call, settings: Settings, kept: bool) -> tuple[Snapshot, Rows]:
        """The session that a call goes on from, and its batch, before which comes what the session must read first."""
        cache, input_ids = call.past_key_values, call.input_ids
        past = None if cache is None else cache.get_seq_length()
        read = None if cache is None else cache.text_lengths()
        asked = (call.attention_mask, call.labels, call.awake, call.logits_to_keep)
        vocabulary = self.config.text_config.vocab_size
        tokens = _taken_in(input_ids, *asked, vocabulary, past, call.marks, read, call.ephemeral)
        owner, window_size = self.owner_of(settings), settings.window_size
        if cache is None:
            return Snapshot.empty(owner, len(tokens.lengths), window_size, input_ids.device, kept), tokens
        session = cache.begin(owner, input_ids.shape[0], window_size, input_ids.device)
        session = session.finished(None if tokens.ephemeral is not None else tokens.lengths)
        first, own = session.first()
        if any(len(ids) for ids in first):
            tokens = tokens.after(first, own)
        return session.from_start(), tokens

    def owner_of(self, settings: Settings) -> str:
        """What a session must agree with: weights may be trained on, shapes and windows may not change."""
        return f"{self._identity}, L={settings.window_size}, {settings.eviction} eviction"
