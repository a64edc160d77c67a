"""The elastic decoder: runs a Schedule over the layers of a Hugging Face decoder.

`install(model)` swaps the class of `model.get_decoder()` for a subclass whose forward owns the loop over the layers;
the layers stay what they are. Parameter names, checkpoints, generate(), beams, gradient checkpointing and LoRA targets
do not change, and outside `running(...)` the model is the unmodified one.

    install(model)
    with running(model, schedules):
        model.generate(**inputs)

Shapes: B batch, N live tokens, P prompt length, D hidden width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from budgets.schedule import LayerMode, Schedule
from visor.engine.cache import ElasticCache
from visor.engine.compat import (
    CACHE,
    BaseModelOutputWithPast,
    cache_argument,
    capture_outputs,
    causal_mask,
    decoder_output,
    merge_with_config_defaults,
    one_cache,
    register_recordable,
    start_weights,
)
from visor.engine.context import LayerContext
from visor.engine.cross_attention import CrossAttentionBlock, weight_placement
from visor.engine.deepstack import DeepStack
from visor.engine.execution import Choose, HeldChoices, KeepMasks, KeepRecord, Run, first_differing_layer
from visor.engine.hooks import check_ran, note_prompt, rebind_hooked_forward
from visor.engine.positions import lowered, rotary, split_position_ids
from visor.engine.selfcheck import check_model
from visor.engine.stopwatch import scoring
from visor.engine.streams import PromptLayout, PromptStreams, TokenStream
from visor.families.base import adapter_for

CallLayer = Callable[[int, TokenStream, ElasticCache | None], None]

__all__ = ["ElasticDecoder", "LayerContext", "install", "running"]


class ElasticDecoder:
    """Mixed into the class of a decoder by `install`. Holds nothing but the run it is in and the last run's record."""

    _TRANSIENT = ("_run", "_layout", "_record", "_held", "_has_run")
    visual_source = "latest"
    _run: Run | None = None
    _layout: PromptLayout | None = None
    _record: KeepRecord | None = None
    _held: HeldChoices | None = None
    _has_run = True

    # A decoder is copied and pickled in the middle of a run too; the copy starts outside of it.
    def __reduce_ex__(self, protocol: int) -> tuple:
        # The class is made at run time: pickle and deepcopy rebuild it from the family's own.
        state = {name: value for name, value in self.__dict__.items() if name not in self._TRANSIENT}
        mro = type(self).__mro__
        return _blank_decoder, (mro[mro.index(ElasticDecoder) + 1],), state

    @property
    def last_kept(self) -> list[Tensor]:
        """By sample, which of its visual tokens [N_v] were alive after the last reduction of the last prompt."""
        if self._record is None:
            raise ValueError("no prompt has run under a schedule yet; use `with running(model, schedules): ...`")
        return self._record.last()

    @property
    def last_kept_by_layer(self) -> dict[int, list[Tensor]]:
        """The same after each reduction, by the layer it stood before; `running(keep_masks=)` repeats it."""
        return {} if self._record is None else self._record.by_layer()

    def _init_weights(self, module: nn.Module) -> None:
        if not start_weights(module):
            super()._init_weights(module)

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
        # The fourth argument of every family's forward is the cache.
        cache = args[3] if len(args) > 3 else cache_argument(kwargs)
        # An elastic cache goes on after `running` has ended: its layers hold different tokens, which only the engine
        # can continue.
        if self._run is None and not isinstance(cache, ElasticCache):
            return super().forward(*args, **kwargs)
        run = self._run  # a plain run needs nothing of the engine, so it may have a cache that the engine cannot use
        if run is not None and (run.unmodified or (run.is_plain and not ElasticCache.can_convert(cache))):
            return super().forward(*args, **kwargs)
        self._has_run = True
        return self._elastic_forward(*args, **kwargs)

    @merge_with_config_defaults
    @capture_outputs
    def _elastic_forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        visual_pos_masks: Tensor | None = None,
        deepstack_visual_embeds: Sequence[Tensor] | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        cache = one_cache(cache, past_key_values)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("the decoder takes exactly one of input_ids and inputs_embeds")
        if attention_mask is not None and (not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2):
            raise ValueError("schedules need the 2D attention_mask [batch, length]: masks differ from layer to layer")
        hidden_BND = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and cache is None:
            cache = ElasticCache(len(self.layers))
        cache = ElasticCache.converted(cache, len(self.layers))
        num_seen = cache.get_seq_length() if cache is not None else 0
        if position_ids is None:
            position_ids = (torch.arange(hidden_BND.shape[1], device=hidden_BND.device) + num_seen)[None]
        positions, running_ids = split_position_ids(position_ids, self.rotary_emb)
        deepstack = DeepStack.of(deepstack_visual_embeds, visual_pos_masks)
        layout, self._layout = self._layout, None  # of this prompt only: a bare call of the decoder notes none
        call = functools.partial(self._run_layer, use_cache=use_cache, **kwargs)
        if num_seen:
            last_hidden_state = self._continue(hidden_BND, attention_mask, positions, cache, call, deepstack)
        else:
            run = self._run or Run.unscheduled(len(self.layers))
            layout = run.layout(layout, hidden_BND.shape[:2], attention_mask)
            # transformers makes the mask of the running numbers, and of none if they are not given beside the others.
            segment_BP = run.segments(layout)
            running_ids = running_ids if run.is_dense and segment_BP is None else None
            streams = self._streams(layout, hidden_BND, attention_mask, positions, running_ids, deepstack)
            if segment_BP is not None:
                if cache is not None:
                    raise ValueError("texts packed into one row run without a cache; pass use_cache=False")
                streams.full.segment_BN = segment_BP.to(hidden_BND.device)
            last_hidden_state = self._prefill(run, layout, streams, cache, call)
        return decoder_output(self, last_hidden_state, cache)

    def _streams(
        self,
        layout: PromptLayout,
        hidden_BND: Tensor,
        attention_mask: Tensor | None,
        positions: Tensor,
        running_ids: Tensor | None,
        deepstack: DeepStack | None,
    ) -> PromptStreams:
        """A prompt before layer 0."""
        full = TokenStream(
            hidden_BND,
            rotary(self.rotary_emb, hidden_BND, positions),
            # transformers sees the caller's own mask, as in its own forward; an all-True one is dropped on the host.
            None if layout.valid_BP is None else attention_mask.bool(),
            positions=running_ids,
        )
        return PromptStreams(full, positions, layout, self.visual_source == "initial", deepstack)

    def _prefill(
        self,
        run: Run,
        layout: PromptLayout,
        streams: PromptStreams,
        cache: ElasticCache | None,
        call: CallLayer,
    ) -> Tensor:
        """Run a prompt: final hidden states [B, P, D]."""
        rows = run.rows(layout)
        if any(method.reads_embeddings for method in run.methods.values()):
            streams.embedded_BPD = streams.full.hidden_BND
        self._record = KeepRecord(layout)
        if cache is None and run.methods and not torch.compiler.is_compiling():
            # Generation without a cache runs the prompt again at every step, with more text behind it. Scored anew,
            # it would keep other tokens for every word of the answer.
            if self._held is None or not self._held.holds_for(streams.full.hidden_BND):
                self._held = HeldChoices(streams.full.hidden_BND.detach())
        else:
            self._held = None
        prompt_length, start = layout.visual_BP.shape[1], 0
        if run.choose is not None:
            # Until the alternatives differ, all rows run one schedule; there the router chooses.
            start = first_differing_layer(run.schedules)
            self._run_layers(range(start), run, rows, streams, cache, call)
            rows = [run.schedules[index] for index in run.choose(streams)]
        if run.stop:
            return streams.full_stream().hidden_BND
        hidden_BPD = self._run_rows(start, run, rows, streams, cache, call, prompt_length)
        if cache is not None:
            cache.end_prefill(prompt_length, run.num_fixed(layout))
            if not torch.compiler.is_compiling():
                run.check_lengths(rows, layout, cache.layer_lengths, cache.cross_lengths)
        return hidden_BPD

    def _run_rows(
        self,
        start: int,
        run: Run,
        rows: list[Schedule],
        streams: PromptStreams,
        cache: ElasticCache | None,
        call: CallLayer,
        prompt_length: int,
    ) -> Tensor:
        """Run the layers from `start` on: final hidden states [B, P, D].

        As long as the rows' schedules agree, the batch runs as one. Where they part, rows of one mode go on together,
        each group with a cache of its own, and all come together again at the end: what is shared runs once.
        """
        end = first_differing_layer(rows, start)
        self._run_layers(range(start, end), run, rows, streams, cache, call)
        if end == len(self.layers):
            return streams.prompt_hidden(self.norm, prompt_length)
        # Rows split by the mode of one layer, not by their whole schedules: each group splits again where it differs,
        # so that no two rows part earlier than they must.
        groups: dict[LayerMode, list[int]] = {}
        for row, schedule in enumerate(rows):
            groups.setdefault(schedule.layers[end].mode, []).append(row)
        hidden, caches = [], []
        for members in groups.values():
            own = None if cache is None else ElasticCache(len(self.layers))
            mine = [rows[i] for i in members]
            hidden.append(self._run_rows(end, run, mine, streams.rows(members), own, call, prompt_length))
            caches.append((members, own))
        if cache is not None:
            cache.join(end, caches)
        # The groups' rows stand one group after the other; argsort of their numbers puts them back.
        order = torch.tensor([row for members in groups.values() for row in members]).argsort()
        return torch.cat(hidden).index_select(0, order.to(hidden[0].device))

    def _run_layers(
        self,
        layers: range,
        run: Run,
        rows: list[Schedule],
        streams: PromptStreams,
        cache: ElasticCache | None,
        call: CallLayer,
    ) -> None:
        """Run some layers. `rows` holds one schedule a row, and they agree on these layers."""
        ops, before, h_in = rows[0].layers, None, None
        for i in layers:
            op = ops[i]
            if op.reduce is not None:
                # Rules score by the attention of the layer before: its keys are in the cache, after RoPE. Without one
                # (training, checkpointing) they are computed again from its input.
                keys = None
                if cache is not None and h_in is not None and cache.layers[i - 1].is_initialized:
                    keys = cache.layers[i - 1].keys
                # A sample with fewer tokens than its schedule keeps (none, without an image) keeps them all.
                counts = [min(row.layers[i].reduce.keep, n) for row, n in zip(rows, streams.num_visual, strict=True)]
                context = LayerContext(i, self, streams, tuple(counts), before, h_in, keys)
                self._reduce(run, context)
            if op.mode is LayerMode.SELF:
                stream = streams.full_stream()
            else:
                # The visual tokens stand still: no layer writes them, and CROSS layers only read them.
                stream = streams.text_stream()
                if op.mode is LayerMode.CROSS and any(streams.num_visual):
                    self._read_visual_tokens(i, stream, streams, cache)
            # Only a reduction looks back; holding every layer's input would cost memory.
            looks_back = i + 1 < len(ops) and ops[i + 1].reduce is not None and stream is streams.full
            before, h_in = op.mode, stream.hidden_BND if looks_back else None
            if cache is not None:
                held = cache.layers[i]
                # What later tokens must know of this layer: which tokens it holds (layers of a group share one mask),
                # and how much lower than the model counts its position ids are after renumbering.
                held.group, held.shift_B1, held.shift_group = stream.group, streams.shift_B1, streams.full.group
            call(i, stream, cache)
            streams.add_levels(i)

    def _reduce(self, run: Run, context: LayerContext) -> None:
        """Keep the best visual tokens, or those that the caller of `running` has fixed."""
        streams, layer = context.streams, context.layer
        if context.keep != streams.num_visual:
            forced_BP = run.forced_keep(layer, self._record.layout, context.keep)
            if forced_BP is not None:
                # Masks are over the prompt; the live tokens know from which of its columns they come.
                forced_BP = forced_BP.to(streams.visual_BN.device)
                kept_BN = forced_BP if streams.origin_BN is None else forced_BP.gather(1, streams.origin_BN)
                kept_BN = kept_BN & streams.visual_BN
                if run.methods[layer].merges:
                    raise ValueError(
                        f"keep_masks[{layer}]: {run.methods[layer].title} merges tokens, a mask is not all"
                    )
            else:
                selection = None if self._held is None else self._held.selection(layer, streams)
                if selection is None:
                    # A compiled graph has no place for a clock.
                    with torch.no_grad(), nullcontext() if torch.compiler.is_compiling() else scoring("decoder"):
                        selection = run.methods[layer].select_tokens(context)
                    if self._held is not None:
                        self._held.add(layer, selection)
                kept_BN = selection.kept_BN
                if selection.hidden_BND is not None:
                    streams.rewrite(selection.hidden_BND, selection.source_BN)
            renumber = functools.partial(rotary, self.rotary_emb) if run.positions == "contiguous" else None
            streams.keep(kept_BN, context.keep, renumber)
        self._record.add(layer, streams.alive_in_prompt(self._record.layout.visual_BP.shape[1]))

    def _read_visual_tokens(
        self, layer: int, text: TokenStream, streams: PromptStreams, cache: ElasticCache | None
    ) -> None:
        visual_BVD, valid_BV, active_B = streams.visual_tokens()
        block = self.cross_blocks[str(layer)]
        text.hidden_BND, (keys, values) = block(text.hidden_BND, visual_BVD, valid_BV, active_B)
        if cache is not None:
            cache.layers[layer].cross = keys, values, valid_BV, active_B

    def _continue(
        self,
        hidden_BND: Tensor,
        attention_mask: Tensor | None,
        positions: Tensor,
        cache: ElasticCache,
        call: CallLayer,
        deepstack: DeepStack | None,
    ) -> Tensor:
        """Run tokens that follow a cached prompt: text, through every layer, against what that layer holds."""
        # The caller's mask spans all that the model has seen. The cached part of it is of no use: layers hold other
        # tokens than that, and each keeps its own mask. Only the columns of the new tokens count.
        valid_BN = None if attention_mask is None else attention_mask[:, -hidden_BND.shape[1] :].bool()
        stream = TokenStream(hidden_BND, rotary(self.rotary_emb, hidden_BND, positions), valid_BN)
        rotary_by_shift = {}
        for i, held in enumerate(cache.layers):
            if held.shift_B1 is not None:
                # This layer's tokens were renumbered: generate() counts all tokens, so its position ids are too high.
                # Once lowered, `stream.rotary` stays so: no layer behind a renumbering is without one.
                if held.shift_group not in rotary_by_shift:
                    moved = lowered(positions, held.shift_B1)
                    rotary_by_shift[held.shift_group] = rotary(self.rotary_emb, hidden_BND, moved)
                stream.rotary = rotary_by_shift[held.shift_group]
            if held.cross is not None:  # the keys and values of the visual tokens are constant while decoding
                keys, values, valid_BV, active_B = held.cross
                block = self.cross_blocks[str(i)]
                stream.hidden_BND, _ = block(stream.hidden_BND, None, valid_BV, active_B, (keys, values))
            call(i, stream, cache)
            if deepstack is not None:  # new images in a later turn, under a dense schedule
                stream.hidden_BND = deepstack.add(stream.hidden_BND, i)
        return self.norm(stream.hidden_BND)

    def _run_layer(self, i: int, stream: TokenStream, cache: ElasticCache | None, **kwargs: Any) -> None:
        """Run Hugging Face's layer i on a stream, under a mask that fits what this layer's cache holds."""
        held = cache.layers[i] if cache is not None else None
        # While decoding, one stream runs through layers that hold different tokens: the mask follows the layer's group.
        group = held.group if held is not None else stream.group
        if group not in stream.masks:
            valid_BK = stream.valid_BN
            # Cached keys come first. If neither they nor the new ones hold padding, no mask is made at all, and the
            # kernel may take its fast causal path.
            if held is not None and held.is_initialized and (held.valid_BK is not None or valid_BK is not None):
                batch, num_new = stream.hidden_BND.shape[:2]
                ones = functools.partial(torch.ones, dtype=torch.bool, device=stream.hidden_BND.device)
                old = ones(batch, held.get_seq_length()) if held.valid_BK is None else held.valid_BK
                valid_BK = torch.cat([old, ones(batch, num_new) if valid_BK is None else valid_BK], 1)
            mask = causal_mask(self.config, stream.hidden_BND, valid_BK, cache, i, stream.positions, stream.segment_BN)
            stream.masks[group] = valid_BK, mask
        valid_BK, mask = stream.masks[group]
        if held is not None:
            held.valid_BK = valid_BK  # of the keys that the layer will hold after this call
        stream.hidden_BND = self.layers[i](
            stream.hidden_BND,
            attention_mask=mask,
            position_embeddings=stream.rotary,
            position_ids=None,  # flash attention would look for packed sequences in them, a device sync a layer
            **{CACHE: cache},
            **kwargs,
        )


@functools.cache
def _elastic_class(base: type) -> type:
    """The elastic subclass of a family's decoder class."""
    # Ours first, so that `super().forward` is the family's own. A swapped class, and no wrapper around the decoder:
    # parameter names, tied weights, LoRA targets and checkpoints stay what they are.
    cls = type(f"Elastic{base.__name__}", (ElasticDecoder, base), {"__module__": __name__})
    register_recordable(cls)
    return cls


def _blank_decoder(base: type) -> nn.Module:
    """An elastic decoder without state, for unpickling."""
    cls = _elastic_class(base)
    return cls.__new__(cls)


def install(
    model: nn.Module, cross_layers: Sequence[int] = (), *, cross_kernel: int = 7, visual_source: str | None = None
) -> nn.Module:
    """Make a model's decoder able to run schedules, in place. Doing it twice does nothing more.

    Args:
        model: `LlavaForConditionalGeneration` or another of a supported family.
        cross_layers: decoder layers that get a (new, zero-initialised) cross-attention block, if they have none yet.
        cross_kernel: width of the new blocks' convolution.
        visual_source: what CROSS layers read: "latest" or "initial" visual tokens; None leaves it ("latest" at first).

    Returns:
        The same model.

    Raises:
        ValueError: the family has no adapter, a layer does not exist, the decoder's forward has been replaced, or the
            weights that new blocks would be like are offloaded.
        Unsupported: the installed transformers lacks what the engine calls (`visor.engine.selfcheck`).
    """
    adapter = adapter_for(model)
    decoder = adapter.decoder
    num_layers = len(decoder.layers)
    if wrong := [i for i in cross_layers if not 0 <= i < num_layers]:
        raise ValueError(f"cross_layers {wrong} do not exist: the decoder has layers 0 to {num_layers - 1}")
    if not isinstance(decoder, ElasticDecoder):
        check_model(decoder, adapter.inner)
        own_forward = type(decoder).forward
        decoder.__class__ = _elastic_class(type(decoder))
        try:
            rebind_hooked_forward(decoder, own_forward)
        except ValueError:
            decoder.__class__ = type(decoder).__mro__[2]
            raise
        adapter.inner.register_forward_pre_hook(note_prompt, with_kwargs=True)
        adapter.inner.register_forward_hook(check_ran)
    if visual_source is not None:
        decoder.visual_source = visual_source
    if cross_layers and not hasattr(decoder, "cross_blocks"):
        decoder.cross_blocks = nn.ModuleDict()
    for i in cross_layers:
        if str(i) in decoder.cross_blocks:
            continue
        device, dtype = weight_placement(decoder.layers[i])
        block = CrossAttentionBlock(decoder.config, cross_kernel).to(device, dtype).train(decoder.training)
        if decoder.gradient_checkpointing:  # switched on before the block was there
            block.gradient_checkpointing = True
            block._gradient_checkpointing_func = decoder.layers[i]._gradient_checkpointing_func
        decoder.cross_blocks[str(i)] = block
    return model


@contextmanager
def running(
    model: nn.Module,
    schedules: Schedule | Sequence[Schedule],
    *,
    keep_masks: KeepMasks | None = None,
    visual: Tensor | None = None,
    segments: Tensor | None = None,
    choose: Choose | None = None,
    stop: bool = False,
) -> Iterator[nn.Module]:
    """Within this context, `model(...)` and `model.generate(...)` execute the schedule.

    Later tokens of a conversation follow what the prompt has left in the cache; they need no schedule.

    Args:
        schedules: one for the whole batch, or one a sample; where they part, the batch does. With reductions inside the
            decoder they must have one `.structure`. Their encoder parts are the caller's: feed reduced features and as
            many image tokens.
        keep_masks: choices to use instead of the methods' scores, {layer: [mask [N_v] of each sample]} over the
            sample's own visual tokens, as `last_kept_by_layer` returns them.
        segments: for training, without a cache: several texts in one row behind its image. [B, P]: 0 what all see (the
            image, and text before it), 1, 2, ... the texts; -1 padding. Give position ids too.
        choose: `schedules` are then alternatives. Before the layer where they first part it is called with the batch
            so far, and says by index which of them each row runs.
        stop: end there; what the model returns means nothing.
        visual: which prompt tokens are visual, bool [B, P], where `input_ids` do not tell (a bare decoder call, images
            merged into `inputs_embeds` by the caller).

    Raises:
        ValueError: not installed, or the schedule does not fit the model.
    """
    decoder = model.get_decoder()
    if not isinstance(decoder, ElasticDecoder):
        raise ValueError(f"{type(model).__name__} cannot run schedules yet: call visor.engine.install(model) first")
    schedules = (schedules,) if isinstance(schedules, Schedule) else tuple(schedules)
    run = Run.of(decoder, schedules, keep_masks, visual, segments, choose, stop)
    previous, decoder._run, decoder._held = decoder._run, run, None
    try:
        yield model
    finally:
        decoder._run, decoder._layout, decoder._held = previous, None, None
