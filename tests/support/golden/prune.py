"""The slow golden path of pruning inside the language model: stock layers, one prompt, no cache. No code of `vtc`.

Every step runs the layers one after the other on the prompt and all tokens so far. An explicit mask says which tokens
are dropped after layer r, and in which layers the tokens after the prompt still see them.
"""

import torch

from support.golden import llava as golden
from support.golden import methods as golden_methods


def run_layer(text, layer, hidden, seen, positions):
    """Output `[1, S, D]` and attention `[H, S, S]` of one layer, whose tokens attend where `seen` `[S, S]` is True."""
    attentions = []
    hook = layer.self_attn.register_forward_hook(lambda _, args, out: attentions.append(out[1]))
    where = torch.tensor([positions])
    hidden = layer(
        hidden,
        attention_mask=torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None],
        position_ids=where,
        position_embeddings=text.rotary_emb(hidden, where),
        use_cache=False,
    )
    hook.remove()
    return hidden, attentions[0][0]


class Pruned:
    """One prompt's embeddings `[1, L, D]`, all of its patches among them, pruned after layer `layer`.

    `is_image`: list of L bools. `kept`: the columns that stay, or None: FastV's, with `keep` image tokens in all.
    `compact`: whether tokens after the prompt see the dropped tokens in no layer (True) or in those before `layer`.
    """

    def __init__(self, model, embeds, is_image, layer, compact, kept=None, keep=None):
        self.model, self.embeds, self.is_image, self.layer, self.compact = model, embeds, is_image, layer, compact
        self.length, self.kept, self.keep = embeds.shape[1], kept, keep

    def logits(self, embeds):
        """Logits `[S', V]` of the prompt and what came after it, dropped tokens left out."""
        text = self.model.model.language_model
        hidden, positions = embeds, list(range(embeds.shape[1]))
        for number, layer in enumerate(text.layers):
            if number == self.layer:
                positions = self.kept + positions[self.length :]
                hidden = hidden[:, positions]
            seen = torch.ones(len(positions), len(positions)).tril().bool()
            if self.compact:  # what follows the prompt does not see what was dropped
                new = torch.tensor(positions) >= self.length
                kept = self.kept_set()
                dropped = torch.tensor([at < self.length and at not in kept for at in positions])
                seen &= ~(new[:, None] & dropped)
            before = hidden
            hidden, attention = run_layer(text, layer, hidden, seen, positions)
            if number == self.layer - 1 and self.kept is None:
                self.scores = attention[:, -1].mean(0)
                self.kept = self.select(layer, before, attention, text.norm(hidden))
        return self.model.lm_head(text.norm(hidden))[0]

    def select(self, layer, before, attention, after):
        """The columns that FastV keeps, by the attention in the layer before the one that prunes."""
        return golden_methods.fastv(attention.double(), self.is_image, self.keep)

    def kept_set(self):
        return set(range(self.length) if self.kept is None else self.kept)

    def after(self, tokens):
        """The prompt's embeddings followed by those of a list of ids."""
        if not tokens:
            return self.embeds
        return torch.cat([self.embeds, self.model.get_input_embeddings()(torch.tensor([tokens]))], 1)

    @torch.no_grad()
    def decode(self, steps, before=()):
        """Greedy: `steps` new ids after `before`, and their logits `[steps, V]`."""
        self.logits(self.embeds)  # FastV selects here
        tokens, seen = list(before), []
        for _ in range(steps):
            seen.append(self.logits(self.after(tokens))[-1])
            tokens.append(int(seen[-1].argmax()))
        return tokens[len(before) :], torch.stack(seen)

    @torch.no_grad()
    def beams(self, steps, width):
        """The `width` most probable continuations that a beam of that width finds, best first."""
        self.logits(self.embeds)
        beams = [(0.0, [])]
        for _ in range(steps):
            grown = []
            for score, tokens in beams:
                log_p = self.logits(self.after(tokens))[-1].log_softmax(-1)
                grown += [(score + float(p), [*tokens, token]) for token, p in enumerate(log_p)]
            beams = sorted(grown, key=lambda beam: -beam[0])[:width]
        return [tokens for _, tokens in beams]


class Dart(Pruned):
    """As `Pruned`, with DART's columns."""

    def select(self, layer, before, attention, after):
        """The columns that DART keeps: `layer` gets `before` `[1, L, D]`; `after` is its output, normed."""
        own = layer.self_attn
        heads = own.k_proj(layer.input_layernorm(before))[0].unflatten(-1, (-1, own.head_dim)).transpose(0, 1)
        cos, sin = self.model.model.language_model.rotary_emb(before, torch.arange(self.length)[None])
        first, second = heads.chunk(2, -1)
        keys = heads * cos[0] + torch.cat([-second, first], -1) * sin[0]
        return golden_methods.dart(keys.double(), after[0].double(), self.is_image, self.keep)


class Scheduled(Pruned):
    """One prompt's embeddings `[1, L, D]`, pruned in stages: pairs (layer, the columns of L that stay from it on)."""

    def __init__(self, model, embeds, stages, compact):
        super().__init__(model, embeds, None, None, compact, kept=stages[-1][1])
        self.stages = dict(stages)

    def logits(self, embeds):
        """Logits `[S', V]` of the prompt and what came after it, dropped tokens left out."""
        text, length = self.model.model.language_model, embeds.shape[1]
        hidden, positions = embeds, list(range(length))
        for number, layer in enumerate(text.layers):
            if number in self.stages:
                stay = [at for at in positions if at >= self.length or at in self.stages[number]]
                hidden, positions = hidden[:, [positions.index(at) for at in stay]], stay
            seen = torch.ones(len(positions), len(positions)).tril().bool()
            if self.compact:  # what follows the prompt does not see what is dropped at last
                for query, at in enumerate(positions):
                    for key, of in enumerate(positions):
                        seen[query, key] &= at < self.length or of >= self.length or of in self.kept
            hidden, _ = run_layer(text, layer, hidden, seen, positions)
        return self.model.lm_head(text.norm(hidden))[0]


class Reselected(Pruned):
    """FastV that selects again at every step: the last of all tokens so far selects, and the others are dropped."""

    def logits(self, embeds):
        """Logits `[S', V]` of all tokens so far without those that the last one drops."""
        text, length = self.model.model.language_model, embeds.shape[1]
        is_image = self.is_image + [False] * (length - self.length)
        hidden, positions, attention = embeds, list(range(length)), None
        for number, layer in enumerate(text.layers):
            if number == self.layer:
                positions = golden_methods.fastv(attention.double(), is_image, self.keep)
                hidden = hidden[:, positions]
            seen = torch.ones(len(positions), len(positions)).tril().bool()
            hidden, attention = run_layer(text, layer, hidden, seen, positions)
        return self.model.lm_head(text.norm(hidden))[0]


class Masked(Pruned):
    """FastV by a token mask: nothing is dropped, and every token hides image tokens from itself in the later layers.

    `ends`: where the first calls of the language model end, the prompt's by default. The last token of a call selects
    for all of the call. Each later token is a call of its own.
    """

    ends = ()

    def logits(self, embeds):
        """Logits `[S, V]` of all tokens so far."""
        text, length = self.model.model.language_model, embeds.shape[1]
        is_image = self.is_image + [False] * (length - self.length)
        ends = [*self.ends] or [self.length]
        ends = [end for end in ends if end < length] + list(range(max(ends) + 1, length)) + [length]
        hidden, positions, attention = embeds, list(range(length)), None
        seen = torch.ones(length, length).tril().bool()
        for number, layer in enumerate(text.layers):
            if number == self.layer:
                for start, end in zip([0, *ends], ends, strict=False):
                    kept = golden_methods.fastv(attention[:, :end, :end].double(), is_image[:end], self.keep)
                    seen[start:end] &= torch.tensor([at in kept for at in positions])
            hidden, attention = run_layer(text, layer, hidden, seen, positions)
        return self.model.lm_head(text.norm(hidden))[0]


class MaskedAtOnce(Masked):
    """Without a cache: every step is one call of all tokens so far."""

    ends = (2**31,)


def patches(model, image, keep, layers, method):
    """The patches of one image `[3, H, W]` that stay, ascending."""
    if method == "vtc-cls":
        return golden.top(golden.scores(model, image, layers), keep)
    seen = model.model.vision_tower(image[None], output_hidden_states=True)
    hidden = seen.hidden_states[model.config.vision_feature_layer][0].double()
    if method == "coverage":
        return golden_methods.coverage(hidden, keep)[0]
    return golden_methods.scope(hidden, golden.scores(model, image, layers[-1:]), keep)[0]


def prompt(model, row, images, keep, layers, tokens, method, layer, compact, fastv=Pruned):
    """A `Pruned` for one unpadded prompt (list of ids) with `images` of `tokens` patches each; for FastV a `fastv`."""
    with torch.no_grad():
        embeds, _ = golden.splice(model, row, images, tokens, layers, tokens)
        is_image = [token == model.config.image_token_id for token in row]
        if method in ("fastv", "dart"):
            fastv = Dart if method == "dart" else fastv
            return fastv(model, embeds, is_image, layer, compact, keep=keep * len(images))
        kept, images, at = [], list(images), 0
        while at < len(row):
            if is_image[at]:
                kept += [at + patch for patch in patches(model, images.pop(0), keep, layers, method)]
                at += tokens
            else:
                kept.append(at)
                at += 1
        return Pruned(model, embeds, is_image, layer, compact, kept=kept)


def scheduled(model, row, images, layers, tokens, schedule, compact, original=False):
    """A `Scheduled` for one unpadded prompt (list of ids) with `images` of `tokens` patches each.

    `original`: a stage before the language model leaves the others where they stood in the full prompt.
    """
    with torch.no_grad():
        before = tokens if original else dict(schedule).get(0, tokens)
        embeds, short = golden.splice(model, row, images, before, layers, tokens)
        ranks = []  # of each image's tokens that enter the language model, its rank among all patches
        for image in images:
            values = golden.scores(model, image, layers)
            order = sorted(range(tokens), key=lambda patch: (-values[patch], patch))
            ranks += [order.index(patch) for patch in sorted(order[:before])]
    stages = []
    for layer, keep in schedule:
        if layer or original:
            left = list(ranks)
            is_image = [token == model.config.image_token_id for token in short]
            stages.append((layer, [at for at, image in enumerate(is_image) if not image or left.pop(0) < keep]))
    return Scheduled(model, embeds, stages, compact)
