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


def cls_attention(attention):
    """The [CLS] row over the patches, the mean over the heads."""
    return [sum(head[0, n].item() for head in attention) / len(attention) for n in range(1, len(attention[0]))]


def received(attention, cls=True):
    """Per patch, the mean over the heads and over all queries, [CLS] among them. `attention` [H, 1 + N, 1 + N].

    Without `cls` it is [H, N, N].
    """
    heads = [head.tolist() for head in attention]
    queries = len(heads[0])
    return [sum(row[n] for head in heads for row in head) / len(heads) / queries for n in range(int(cls), queries)]


def ranked(hidden, scores, keep):
    kept = sorted(by_score(scores, keep))
    return kept, hidden[1:][kept]


def cosines(rows):
    """[N, N]; a row of zeros has cosine 0 to every other."""
    lengths = [math.sqrt(sum(v * v for v in row.tolist())) for row in rows]
    unit = torch.stack([row / length if length else row for row, length in zip(rows, lengths, strict=True)])
    return (unit @ unit.T).tolist()


def greedy_cover(cover, weights, keep):
    """The columns that cover most, in the order in which they are chosen. `cover` [R, N] as lists."""
    columns = [torch.tensor([row[n] for row in cover], dtype=torch.float64) for n in range(len(cover[0]))]
    covered = torch.zeros(len(cover), dtype=torch.float64)
    chosen = []
    for _ in range(keep):
        best, most = None, -1.0
        for n, column in enumerate(columns):
            if n not in chosen:
                gain = weights[n] * torch.clamp(column - covered, min=0).sum().item()
                if gain > most:
                    best, most = n, gain
        chosen.append(best)
        covered = torch.maximum(covered, columns[best])
    return chosen


def scope(hidden, saliency, keep):
    """`saliency` [N], of [CLS] or received."""
    kept = sorted(greedy_cover(cosines(hidden[1:]), saliency, keep))
    return kept, hidden[1:][kept]


def coverage(hidden, keep, temperature=0.2):
    cover = []
    for row in cosines(hidden[1:]):
        weights = [math.exp(cosine / temperature) for cosine in row]
        total = sum(weights)
        cover.append([weight / total for weight in weights])
    kept = sorted(greedy_cover(cover, [1.0] * len(cover), keep))
    return kept, hidden[1:][kept]


def farthest(rows, keep):
    """DivPrune's tokens in the order in which they are chosen, by the distance 1 - cosine."""
    distance = [[1 - cosine for cosine in row] for row in cosines(rows)]
    tokens = range(len(rows))
    isolated = [sorted(distance[m][n] for m in tokens if m != n)[0] if len(rows) > 1 else 0.0 for n in tokens]
    chosen = [by_score(isolated, 1)[0]]
    while len(chosen) < keep:
        left = [n for n in tokens if n not in chosen]
        nearest = [min(distance[s][n] for s in chosen) for n in left]
        chosen.append(left[by_score(nearest, 1)[0]])
    return chosen


def divprune(hidden, projected, keep):
    """`projected` [N, E] are the patches after the projector."""
    kept = sorted(farthest(projected, keep))
    return kept, hidden[1:][kept]


def hiprune(hidden, middle, deep, columns, keep, alpha=0.1):
    """`middle` and `deep` are what patches receive in the object layer and in the feature layer."""
    kept = by_score(middle, round(keep * alpha / 5))
    for anchor in list(kept):
        for near in (anchor - 1, anchor + 1, anchor - columns, anchor + columns):
            near = min(max(near, 0), len(deep) - 1)
            if near not in kept:
                kept.append(near)
    others = [n for n in range(len(deep)) if n not in kept]
    kept += [others[place] for place in by_score([deep[n] for n in others], keep - len(kept))]
    return sorted(kept), hidden[1:][sorted(kept)]


def vispruner(hidden, scores, keep, share=0.5, cosine=None):
    """`scores` are the attention of [CLS].

    `cosine` [N, N] is given where its rounding matters: of hundreds of patches two are equally near to another.
    """
    cosine = cosines(hidden[1:]) if cosine is None else cosine
    order = by_score(scores, len(scores))
    important = order[: int(keep * share)]
    rest = order[int(keep * share) :]
    diverse = keep - len(important)
    while diverse and len(rest) > diverse:
        even, odd = rest[0::2], rest[1::2]
        drop = min(8, len(rest) - diverse)
        closest = [max(cosine[a][b] for b in odd) for a in even]
        even = [even[place] for place in by_score(closest, len(even))]
        rest = even[drop:] + odd
    kept = sorted(important + (rest if diverse else []))
    return kept, hidden[1:][kept]


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


def fastv(attention, is_image, keep):
    """`attention` [H, L, L] of language-model layer k - 1 without padding: the positions that stay before layer k."""
    length = len(is_image)
    images = [n for n in range(length) if is_image[n]]
    scores = [sum(head[length - 1, n].item() for head in attention) / len(attention) for n in images]
    best = [images[place] for place in by_score(scores, keep)]
    return [n for n in range(length) if not is_image[n] or n in best]


def dart(keys, hidden, is_image, keep, image_pivots=4, text_pivots=4):
    """The positions that stay before layer k, of a prompt without padding.

    `keys` [H, L, D] of language-model layer k - 1, and the normed hidden states [L, C] before layer k.
    """
    norm = [sum(abs(number) for head in keys for number in head[n].tolist()) for n in range(len(is_image))]
    rows = hidden.tolist()
    images = [n for n, image in enumerate(is_image) if image]
    texts = [n for n, image in enumerate(is_image) if n > max(images, default=-1)]
    chosen = sorted(images, key=lambda n: (-norm[n], n))[: min(image_pivots, keep)]
    pivots = chosen + sorted(texts, key=lambda n: (-norm[n], n))[:text_pivots]

    def cosine(a, b):
        length = sum(x * x for x in rows[a]) ** 0.5 * sum(x * x for x in rows[b]) ** 0.5
        return sum(x * y for x, y in zip(rows[a], rows[b], strict=True)) / length

    each = -(-(keep - len(chosen)) // len(pivots)) if pivots else 0
    for pivot in pivots:
        rest = sorted((n for n in images if n not in chosen), key=lambda n: (cosine(n, pivot), n))
        chosen = chosen + rest[: min(each, keep - len(chosen))]
    return [n for n in range(len(is_image)) if not is_image[n] or n in chosen]


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


def cosines_to(xs, ys):
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
    image = [softmax([s / temperature for s in row]) for row in cosines_to(patches, patches)]
    text = [softmax([s / text_temperature for s in row]) for row in cosines_to(words, projected)]
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
    relevance = [sum(row) / len(row) for row in cosines_to(projected, words)]
    low, high = min(relevance), max(relevance)
    r = [(value - low + 1e-6) / (high - low) for value in relevance]
    likeness = cosines_to(projected, projected)
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
