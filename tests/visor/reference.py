"""What a schedule means, in the plainest code: one sample, no padding, no cache, and no token is ever removed.

Dropped tokens go on through every layer, but a mask hides them from the others. Nothing of the engine is used.
"""

from __future__ import annotations

import torch
from tiny_models import IMAGE_TOKEN, positions_in_generate
from torch import Tensor, nn

from budgets.schedule import LayerMode, Schedule


def entering(model: nn.Module, prompt: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """What enters the decoder: [B, P, D], and behind its first layers (DeepStack): [B, P, D] each, zero at text."""
    seen = {}
    hook = model.get_decoder().register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    with torch.no_grad():
        model(**prompt)
    hook.remove()
    embedded, levels = seen["inputs_embeds"], []
    for level in seen.get("deepstack_visual_embeds") or []:
        levels.append(torch.zeros_like(embedded))
        levels[-1][seen["visual_pos_masks"]] = level
    return embedded, levels


def closed_up(positions: Tensor, before: Tensor, alive: Tensor) -> Tensor:
    """Positions [axes, n] after every value that only tokens dropped now had is struck out."""
    gone = sorted(set(positions[:, before].flatten().tolist()) - set(positions[:, alive].flatten().tolist()))
    return positions - torch.tensor([[sum(g < p for g in gone) for p in axis] for axis in positions.tolist()])


def _cross_attention(block: nn.Module, text: Tensor, visual: Tensor) -> Tensor:
    heads = lambda x: x.view(len(x), -1, block.head_dim).transpose(0, 1)
    visual = (
        visual
        + torch.nn.functional.conv1d(
            visual.T,
            block.position_conv.weight,
            block.position_conv.bias,
            padding=block.position_conv.padding[0],
            groups=visual.shape[1],
        ).T
    )
    visual = block.visual_norm(visual)
    groups = block.num_heads // block.num_kv_heads
    q, k, v = heads(block.q_proj(block.text_norm(text))), heads(block.k_proj(visual)), heads(block.v_proj(visual))
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    weights = (q @ k.transpose(1, 2) * block.head_dim**-0.5).softmax(-1)
    return text + block.o_proj((weights @ v).transpose(0, 1).flatten(1))


def run_one(
    model: nn.Module,
    hidden: Tensor,
    levels: list[Tensor],
    positions: Tensor,
    visual: Tensor,
    num_prompt: int,
    schedule: Schedule,
) -> tuple[Tensor, Tensor]:
    """(logits [n, vocabulary], alive [n]) of one sample. The model must use eager attention, to show its weights.

    Reductions keep what the last prompt row attended to most in the layer before, as FastV does; or, for the method
    "longest", the tokens with the longest hidden states.
    """
    decoder, n = model.get_decoder(), len(hidden)
    alive, order = torch.ones(n, dtype=torch.bool), torch.arange(n)
    weights, entered = {}, hidden
    reads_initial = getattr(decoder, "visual_source", "latest") == "initial"
    for i, op in enumerate(schedule.layers):
        layer = decoder.layers[i]
        if op.reduce:
            by_length = op.reduce.method == "longest"
            scores = hidden.norm(dim=-1) if by_length else weights["last"][0, :, num_prompt - 1].mean(0)
            candidates = order[visual & alive]
            best = candidates[scores[candidates].argsort(descending=True, stable=True)[: op.reduce.keep]]
            before, alive = alive, ~visual
            alive[best] = True
            if schedule.positions == "contiguous":
                positions = closed_up(positions, before, alive)
        ids = order if op.mode is LayerMode.SELF else order[~visual]
        if op.mode is LayerMode.CROSS and (visual & alive).any():
            block = decoder.cross_blocks[str(i)]
            read = (entered if reads_initial else hidden)[visual & alive]
            hidden = hidden.index_put((ids,), _cross_attention(block, hidden[ids], read))
        allowed = (ids[None] <= ids[:, None]) & alive[ids][None]
        hook = layer.self_attn.register_forward_hook(lambda module, args, output: weights.update(last=output[1]))
        where = positions[:, ids][:, None]  # [axes, 1, n]; text alone has one axis under M-RoPE, too
        where = where.expand(3, -1, -1) if hasattr(decoder.rotary_emb, "mrope_section") else where[0]
        output = layer(
            hidden[ids][None],
            attention_mask=torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)[None, None],
            position_embeddings=decoder.rotary_emb(hidden[None], where),
            position_ids=None,
        )
        hook.remove()
        hidden = hidden.index_put((ids,), output[0])
        if i < len(levels):
            hidden = hidden + levels[i]
    return model.lm_head(decoder.norm(hidden)), alive


@torch.no_grad()
def reference(
    model: nn.Module, prompt: dict[str, Tensor], schedules: list[Schedule], new_ids: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """(logits [B, 1 + new tokens, vocabulary] from the last prompt token on, kept visual tokens [N_v] by sample)."""
    (embedded, levels), positions = entering(model, prompt), positions_in_generate(model, prompt)
    logits, kept = [], []
    for b, schedule in enumerate(schedules):
        real = prompt["attention_mask"][b].bool()
        hidden, pos, visual = embedded[b][real], positions[:, b, real], prompt["input_ids"][b][real] == IMAGE_TOKEN
        added = [level[b][real] for level in levels]
        num_prompt = len(hidden)
        if new_ids is not None:
            hidden = torch.cat([hidden, model.get_decoder().embed_tokens(new_ids[b])])
            pos = torch.cat([pos, pos[:, -1:] + 1 + torch.arange(len(new_ids[b]))], 1)
            added = [torch.cat([level, torch.zeros(len(new_ids[b]), level.shape[1])]) for level in added]
            visual = torch.cat([visual, torch.zeros(len(new_ids[b]), dtype=torch.bool)])
        row, alive = run_one(model, hidden, added, pos, visual, num_prompt, schedule)
        logits.append(row[num_prompt - 1 :])
        kept.append(alive[visual])
    return torch.stack(logits), kept
