"""Every method again, slow and plain: one image, loops, float64, full attention matrices. No code of `vtc`.

An image is given by the outputs of a tower with eager attention: `hidden` [1 + N, C] of the feature layer, the full
attention probabilities [H, 1 + N, 1 + N] of each layer, the keys and queries of a layer [1 + N, C] before they are
split into heads. Each function returns the indices of the patches that stay, in the order of selection, and the
features [R, C].
"""

import math

import numpy
import torch
from PIL import Image


def by_score(values, keep):
    """Indices of the `keep` largest values, the largest first; ties go to the lower index."""
    return sorted(range(len(values)), key=lambda n: (-values[n], n))[:keep]


def vtc_cls(hidden, attentions, keep, combine=sum):
    """`attentions`: of the scored layers."""
    num_heads, patches = len(attentions[0]), len(hidden) - 1
    scores = []
    for n in range(1, 1 + patches):
        layers = [sum(head[0, n].item() for head in layer) / num_heads for layer in attentions]
        scores.append(combine(layers))
    kept = sorted(by_score(scores, keep))
    return kept, torch.stack([hidden[1 + n] for n in kept])


def fastervlm(hidden, attention, keep):
    return vtc_cls(hidden, [attention], keep)


def visionzip(hidden, attention, keys, num_heads, dominant, contextual):
    """`keys` [1 + N, C] of the feature layer."""
    size = keys.shape[1] // num_heads
    scores = [sum(head[0, n].item() for head in attention) for n in range(1, len(hidden))]
    patches = sorted(by_score(scores, dominant - 1))
    kept = [0, *(1 + n for n in patches)]
    metric = []
    for row in keys:
        mean = sum(row[h * size : (h + 1) * size] for h in range(num_heads)) / num_heads
        metric.append(mean / math.sqrt(sum(v * v for v in mean.tolist())))
    left = [n for n in range(len(hidden)) if n not in kept]
    targets = left[:: len(left) // contextual][:contextual] if contextual else []
    members = {t: [] for t in targets}
    for n in left:
        if n not in targets and targets:
            cosines = [torch.dot(metric[n], metric[t]).item() for t in targets]
            members[targets[cosines.index(max(cosines))]].append(n)
    rows = [hidden[n] for n in kept]
    for t in targets:
        row = hidden[t]
        if members[t]:
            row = row + sum(hidden[n] for n in members[t]) / len(members[t])
        rows.append(row)
    return patches, torch.stack(rows)


def undivided_scores(queries, keys):
    """The [CLS] row over the patches, of attention with a single head as wide as the layer."""
    logits = [torch.dot(queries[0], key).item() / math.sqrt(len(key)) for key in keys]
    highest = max(logits)
    weights = [math.exp(logit - highest) for logit in logits]
    return [weight / sum(weights) for weight in weights][1:]


def outlier_fraction(scores):
    ordered = sorted(scores)

    def quartile(share):
        position = share * (len(ordered) - 1)
        low, high = math.floor(position), math.ceil(position)
        return ordered[low] + (position - low) * (ordered[high] - ordered[low])

    bound = quartile(0.75) + 1.5 * (quartile(0.75) - quartile(0.25))
    return len([score for score in scores if score > bound]) / len(scores)


def merged(hidden, keys, scores, kept, neighbors=32):
    """PruMerge's second half: the features of the kept patches, and the extra token."""
    patches, keys = hidden[1:], keys[1:]
    unit = [key / math.sqrt(torch.dot(key, key).item()) for key in keys]
    rows = []
    for i in kept:
        others = [j for j in range(len(patches)) if j != i]
        cosines = [torch.dot(unit[i], unit[j]).item() for j in others]
        row = patches[i].clone()
        for place in by_score(cosines, neighbors):
            row += patches[others[place]] * scores[others[place]]
        rows.append(row)
    extra = torch.zeros_like(patches[0])
    for j in range(len(patches)):
        if j not in kept:
            extra += patches[j] * scores[j]
    return torch.stack([*rows, extra])


def prumerge(hidden, queries, keys, keep=None, neighbors=32):
    """`keep`: the number of top-scoring patches to keep in place of the outliers."""
    scores = undivided_scores(queries, keys)
    count = int(len(scores) * outlier_fraction(scores)) if keep is None else keep
    kept = by_score(scores, count)
    return kept, merged(hidden, keys, scores, kept, neighbors)


def prumerge_plus(hidden, queries, keys, best=None, stride=None):
    """`best` and `stride` of the version with a fixed `keep`; without them the paper's own version."""
    scores = undivided_scores(queries, keys)
    if best is None:
        fraction = outlier_fraction(scores)
        best = int(len(scores) * fraction)
        stride = int(1 / fraction) if fraction else 3 * len(scores)
    kept = by_score(scores, best)
    for n in range(0, len(scores) - 1, int(stride / 3)):
        if n not in kept:
            kept.append(n)
    return kept, merged(hidden, keys, scores, kept)


def unit_rows(rows):
    return [row / math.sqrt(torch.dot(row, row).item()) for row in rows]


def greedy_coverage(cover, weights, keep):
    """`cover` [R][N]: the columns in the order in which they are chosen. Every gain is computed at every step."""
    columns = [torch.stack([row[n] for row in cover]) for n in range(len(cover[0]))]
    covered, chosen = torch.zeros_like(columns[0]), []
    for _ in range(keep):
        best, gain = None, -1.0
        for n, column in enumerate(columns):
            own = weights[n] * sum(torch.clamp(column - covered, min=0).tolist())
            if n not in chosen and own > gain:
                best, gain = n, own
        chosen.append(best)
        covered = torch.maximum(covered, columns[best])
    return chosen


def coverage(hidden, keep, temperature=0.2):
    unit = unit_rows(hidden[1:])
    cover = []
    for row in unit:
        weights = [math.exp(torch.dot(row, other).item() / temperature) for other in unit]
        cover.append(torch.tensor([weight / sum(weights) for weight in weights], dtype=torch.float64))
    chosen = greedy_coverage(cover, [1.0] * len(unit), keep)
    return chosen, torch.stack([hidden[1 + n] for n in sorted(chosen)])


def scope(hidden, attentions, keep, received=False):
    """`attentions`: of the layers whose saliencies are added."""
    unit = torch.stack(unit_rows(hidden[1:]))
    if received:
        weights = [sum(values) for values in zip(*map(received_scores, attentions), strict=True)]
    else:
        weights = [sum(head[0, n].item() for layer in attentions for head in layer) for n in range(1, len(hidden))]
    chosen = greedy_coverage([unit @ row for row in unit], weights, keep)
    return chosen, torch.stack([hidden[1 + n] for n in sorted(chosen)])


def divprune(hidden, projected, keep):
    """`projected` [N, E]."""
    unit = unit_rows(projected)
    distance = [[1 - torch.dot(a, b).item() for b in unit] for a in unit]
    nearest = [min(row[m] for m in range(len(unit)) if m != n) for n, row in enumerate(distance)]
    chosen = [nearest.index(max(nearest))]
    while len(chosen) < keep:
        left = [n for n in range(len(unit)) if n not in chosen]
        nearest = [min(distance[n][m] for m in chosen) for n in left]
        chosen.append(left[nearest.index(max(nearest))])
    return chosen, torch.stack([hidden[1 + n] for n in sorted(chosen)])


def received_scores(attention):
    """The mean over heads and queries, [CLS] among them, for each patch."""
    heads, tokens = len(attention), len(attention[0])
    return [sum(head[:, n].sum().item() for head in attention) / (heads * tokens) for n in range(1, tokens)]


def received(hidden, attention, keep):
    kept = sorted(by_score(received_scores(attention), keep))
    return kept, torch.stack([hidden[1 + n] for n in kept])


def hiprune(hidden, middle, deep, width, keep, alpha=0.1):
    """`middle` and `deep`: the attention of the object layer and of the feature layer."""
    last = len(hidden) - 2
    anchors = by_score(received_scores(middle), round(keep * alpha / 5))
    kept = set(anchors)
    for anchor in anchors:
        kept |= {max(min(anchor + step, last), 0) for step in (-1, 1, -width, width)}
    scores = received_scores(deep)
    others = [n for n in range(last + 1) if n not in kept]
    places = by_score([scores[n] for n in others], keep - len(kept))
    kept = sorted(kept | {others[place] for place in places})
    return kept, torch.stack([hidden[1 + n] for n in kept])


def vispruner(hidden, attention, keep, important=0.5):
    unit = unit_rows(hidden[1:])
    scores = [sum(head[0, n].item() for head in attention) / len(attention) for n in range(1, len(hidden))]
    order = by_score(scores, len(scores))
    first = int(keep * important)
    rest = order[first:]
    while len(rest) > keep - first:
        a, b = rest[0::2], rest[1::2]
        drop = min(8, len(rest) - (keep - first), len(a))
        if b:
            likeness = [max(torch.dot(unit[n], unit[m]).item() for m in b) for n in a]
            a = [a[place] for place in by_score(likeness, len(a))]
        rest = a[drop:] + b
    kept = sorted(order[:first] + rest)
    return kept, torch.stack([hidden[1 + n] for n in kept])


def fastv(attention, is_image, keep):
    """`attention` [H, L, L] of language-model layer k - 1 without padding: the positions that stay before layer k."""
    length = len(is_image)
    images = [n for n in range(length) if is_image[n]]
    scores = [sum(head[length - 1, n].item() for head in attention) / len(attention) for n in images]
    best = [images[place] for place in by_score(scores, keep)]
    return [n for n in range(length) if not is_image[n] or n in best]


def pool(hidden, grid, keep):
    side = max(s for s in range(1, keep + 1) if s * s <= keep)
    rows, columns = grid
    features = []
    for i in range(side):
        for j in range(side):
            cells = [
                hidden[1 + r * columns + c]
                for r in range(i * rows // side, -(-(i + 1) * rows // side))
                for c in range(j * columns // side, -(-(j + 1) * columns // side))
            ]
            features.append(sum(cells) / len(cells))
    return torch.stack(features)


def cosines(xs, ys):
    """Cosine similarity of every row of `xs` to every row of `ys`, a list of lists."""
    xs, ys = ([row / max(math.sqrt(torch.dot(row, row)), 1e-12) for row in rows] for rows in (xs, ys))
    return [[torch.dot(x, y).item() for y in ys] for x in xs]


def softmax(values):
    highest = max(values)
    weights = [math.exp(value - highest) for value in values]
    return [weight / sum(weights) for weight in weights]


def mmtok(hidden, projected, words, keep, alpha=0.5, temperature=0.2, text_temperature=0.02):
    """`projected` [N, E] are the patches after the projector, `words` [m, E] the embeddings of those that count."""
    patches = hidden[1:]
    image = [softmax([s / temperature for s in row]) for row in cosines(patches, patches)]
    text = [softmax([s / text_temperature for s in row]) for row in cosines(words, projected)]
    rows = [[p / len(text) for p in row] for row in text] + [[alpha * q / len(image) for q in row] for row in image]
    columns = [torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True)]
    covered, kept = torch.zeros(len(rows), dtype=torch.float64), []
    while len(kept) < keep:
        gains = [(column - covered).clamp(min=0).sum().item() for column in columns]
        n = max((n for n in range(len(columns)) if n not in kept), key=lambda n: (gains[n], -n))
        kept.append(n)
        covered = torch.maximum(covered, columns[n])
    return sorted(kept), torch.stack([patches[n] for n in sorted(kept)])


def cdpruner(hidden, projected, words, keep):
    """By the determinants themselves: the next patch is the one with which that of the chosen ones is largest."""
    relevance = [sum(row) / len(row) for row in cosines(projected, words)]
    low, high = min(relevance), max(relevance)
    r = [(value - low + 1e-6) / (high - low) for value in relevance]
    likeness = cosines(projected, projected)
    kernel = torch.tensor(
        [[r[i] * likeness[i][j] * r[j] for j in range(len(r))] for i in range(len(r))], dtype=torch.float64
    )
    kept = []
    while len(kept) < keep:
        volumes = {}
        for n in range(len(r)):
            if n not in kept:
                own = [*kept, n]
                volumes[n] = torch.linalg.slogdet(kernel[own][:, own]).logabsdet.item()
        kept.append(max(volumes, key=lambda n: (volumes[n], -n)))
    return sorted(kept), torch.stack([hidden[1 + n] for n in sorted(kept)])


def downsampled(image, height, width):
    """The image `[3, H, W]` resized by Pillow, which is antialiased."""
    channels = [Image.fromarray(channel.numpy(), "F").resize((width, height), Image.BICUBIC) for channel in image]
    return torch.stack([torch.from_numpy(numpy.array(channel)) for channel in channels])


def random_scores(pixel_values, tokens, seed):
    """Scores of one image, its pixels `[3, H, W]`: splitmix64 on whole numbers."""
    bits = pixel_values.float().flatten().view(torch.int32).tolist()
    state = sum(bit * (2 * i + 1) for i, bit in enumerate(bits)) + 1_000_003 * seed
    scores = []
    for n in range(tokens):
        x = (state + n) * 0x9E3779B97F4A7C15 % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        x ^= x >> 31
        scores.append((x >> 40) / 2**24)
    return scores
