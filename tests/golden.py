"""The slow golden path: VTC-CLS written out with stock transformers, one prompt at a time. Shares no code with `vtc`.

Eager attentions of the whole vision tower, selection by a plain Python sort, a prompt spliced by hand as embeddings,
and a decoding loop without a cache that runs the language model on everything so far, at positions 0, 1, 2, ...
"""

import copy
import math

import torch


def eager(model):
    """Return a copy of a stock model that returns its attention probabilities."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    return model.eval()


def scores(model, image, layers, combine=sum):
    """Scores (list of N floats) of one image `[3, H, W]`: [CLS] probabilities, mean over heads, over `layers`."""
    attentions = model.model.vision_tower(image[None], output_attentions=True).attentions
    rows = [attentions[layer][0, :, 0, 1:].float().mean(0).tolist() for layer in layers]
    return [combine(column) for column in zip(*rows, strict=True)]


def top(values, keep):
    """Indices of the `keep` largest values, ascending; ties go to the lower index."""
    return sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:keep])


def visual_tokens(model, image, keep, layers):
    """Projected features `[keep, D]` of one image's kept patches."""
    hidden = model.model.vision_tower(image[None], output_hidden_states=True).hidden_states
    patches = hidden[model.config.vision_feature_layer][0, 1:]
    return model.model.multi_modal_projector(patches[top(scores(model, image, layers), keep)])


def splice(model, row, images, keep, layers, tokens):
    """Embeddings `[1, L', D]` of one unpadded prompt (list of ids), and the ids they stand for."""
    embed, images = model.get_input_embeddings(), list(images)
    parts, short, at = [], [], 0
    while at < len(row):
        if row[at] == model.config.image_token_id:
            parts.append(visual_tokens(model, images.pop(0), keep, layers))
            short += [row[at]] * keep
            at += tokens
        else:
            parts.append(embed(torch.tensor([row[at]])))
            short.append(row[at])
            at += 1
    assert not images
    return torch.cat(parts)[None], short


def logits(model, embeds):
    """Logits `[L', V]` of embeddings `[1, L', D]` at positions 0 to L'-1."""
    positions = torch.arange(embeds.shape[1])[None]
    hidden = model.model.language_model(inputs_embeds=embeds, position_ids=positions, use_cache=False)
    return model.lm_head(hidden.last_hidden_state)[0]


@torch.no_grad()
def decode(model, embeds, steps, sample=False):
    """Return `steps` new ids, greedy or drawn from the softmax, and the logits `[steps, V]` they were chosen from."""
    new, seen = [], []
    for _ in range(steps):
        seen.append(logits(model, embeds)[-1])
        token = torch.multinomial(seen[-1].softmax(-1)[None], 1)[0] if sample else seen[-1].argmax()[None]
        new.append(int(token))
        embeds = torch.cat([embeds, model.get_input_embeddings()(token)[None]], 1)
    return new, torch.stack(seen)


def loss(model, embeds, labels):
    """Sum of -log p over the labels (list of L' ids, -100: ignored), and how many there are."""
    log_p = logits(model, embeds).log_softmax(-1)
    terms = [-log_p[i, label] for i, label in enumerate(labels[1:]) if label != -100]
    return torch.stack(terms).sum() if terms else torch.zeros(()), len(terms)


def close(actual, expected):
    """Whether two fp32 results agree to within what another order of the same sums explains."""
    assert math.isfinite(float(actual.float().abs().max()))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
