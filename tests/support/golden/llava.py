"""The slow golden path: VTC-CLS written out with stock transformers, one prompt at a time. Shares no code with `vtc`.

Eager attentions of the whole vision tower, selection by a plain Python sort, a prompt spliced by hand as embeddings,
and a decoding loop without a cache that runs the language model on everything so far, at positions 0, 1, 2, ... or at
those of the full prompt.
"""

import copy

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


def view(model, pixels, layers):
    """Features `[N, D]` before the projector and scores (N floats) of one view `[3, H, W]`, without [CLS]."""
    stops = next(
        getattr(model.config, name)
        for name in ("vision_feature_layer", "vision_feature_layers")
        if hasattr(model.config, name)
    )
    seen = model.model.vision_tower(pixels[None], output_hidden_states=True)
    chosen = [seen.hidden_states[stop][0, 1:] for stop in ([stops] if isinstance(stops, int) else stops)]
    return torch.cat(chosen, -1), scores(model, pixels, layers)


def tile_tokens(grid, rows, columns, size):
    """The tokens of an image of `size` (height, width) in a base image and rows x columns tiles, each grid x grid.

    Each token is (view, patch), or None for a newline. First comes the base image, then the tiles as one image, line by
    line, without the lines or columns that are only padding to the tiles' shape.
    """
    tokens = [(0, patch) for patch in range(grid * grid)]
    high, wide = rows * grid, columns * grid
    top = left = 0
    if size[1] / size[0] > wide / high:
        top = (high - int(round(size[0] * wide / size[1], 7))) // 2
    else:
        left = (wide - int(round(size[1] * high / size[0], 7))) // 2
    for y in range(top, high - top):
        for x in range(left, wide - left):
            tokens.append((1 + y // grid * columns + x // grid, y % grid * grid + x % grid))
        tokens.append(None)
    return tokens


def share_out(values, tokens, keep, equal):
    """Positions, ascending, of the `keep` tokens: each seat goes to the tile with the most mass per seat."""
    own = {}
    for i, token in enumerate(tokens):
        if token is not None:
            own.setdefault(token[0], []).append(i)
    mass = {tile: 1 if equal else sum(values[i] for i in its) for tile, its in own.items()}
    queues = {tile: sorted(its, key=lambda i: (-values[i], i)) for tile, its in own.items()}
    seats = []
    while len(seats) < keep and any(queues.values()):
        given = {tile: sum(tokens[i][0] == tile for i in seats) for tile in queues}
        tile = min((t for t in queues if queues[t]), key=lambda t: (-mass[t] / (given[t] + 0.5), queues[t][0]))
        seats.append(queues[tile].pop(0))
    seats += [i for i, token in enumerate(tokens) if token is None][: keep - len(seats)]
    return sorted(seats)


def splice_features(model, row, visuals):
    """Embeddings `[1, L', D]` of one unpadded prompt (list of ids).

    Its images are `visuals`, in order: (number of placeholders, features `[K, D]`).
    """
    embed, visuals, parts, at = model.get_input_embeddings(), list(visuals), [], 0
    markers = {model.config.image_token_id, getattr(model.config, "video_token_id", None)}
    while at < len(row):
        if row[at] in markers:
            placeholders, features = visuals.pop(0)
            parts.append(features)
            at += placeholders
        else:
            parts.append(embed(torch.tensor([row[at]])))
            at += 1
    assert not visuals
    return torch.cat(parts)[None]


def columns(row, visuals, marker):
    """The columns of a prompt (list of ids) that stay, which are also their positions.

    Its images are `visuals`, in order: (number of placeholders, numbers of those that stay).
    """
    visuals, found, at = list(visuals), [], 0
    while at < len(row):
        size, kept = visuals.pop(0) if row[at] == marker else (1, [0])
        found += [at + number for number in kept]
        at += size
    return found


def spread(short, columns, length):
    """`short` `[L', ...]` of the `columns` (list) that stay, for all `length` columns: of the last one that stays."""
    return torch.stack([short[max(sum(at <= j for at in columns) - 1, 0)] for j in range(length)])


def logits(model, embeds, positions=None):
    """Logits `[L', V]` of embeddings `[1, L', D]` at positions 0 to L'-1, or at these (list of L')."""
    positions = torch.tensor([range(embeds.shape[1]) if positions is None else positions])
    mask = torch.ones(embeds.shape[:2])  # without it, gaps would be ends of samples
    call = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions}
    hidden = model.model.language_model(**call, use_cache=False)
    return model.lm_head(hidden.last_hidden_state)[0]


@torch.no_grad()
def decode(model, embeds, steps, sample=False, positions=None, length=None):
    """Return `steps` new ids, greedy or drawn from the softmax, and their logits `[steps, V]`.

    `positions` (list of L') are those of the prompt, if they are not 0 to L'-1, and `length` is the first new token's.
    """
    new, seen = [], []
    positions = list(range(embeds.shape[1]) if positions is None else positions)
    for _ in range(steps):
        seen.append(logits(model, embeds, positions)[-1])
        positions.append(positions[-1] + 1 if length is None else length)
        length = None
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
    """Assert that two fp32 results differ by no more than another order of the same sums explains."""
    assert actual.isfinite().all()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
