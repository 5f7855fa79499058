"""Random sequences of everything that has a state: settings, blocks, contexts, caches, copies of the model.

A plain model of VTC says which settings hold for a call and what a cache holds. Every answer is compared with the
golden path with exactly those settings, or it must be a ValueError: `Machine.refusal` lists when.

The same examples run each time. `VTC_STATEFUL_MINUTES=10` runs new ones for that long; `VTC_STATEFUL_SEED` begins with
those of a seed that a failure names. `VTC_STATEFUL_REPORT=1` prints how many answers were compared and refused.
`VTC_STATEFUL_NO_SHRINK=1` shows the first example that fails as it is.
"""

import contextvars
import copy
import dataclasses
import functools
import os
import queue
import random
import tempfile
import threading
import time
from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support import models
from support.golden import llava as golden
from support.golden import methods as golden_methods
from support.golden import prune as golden_prune
from support.models import GRID, IMAGE, PAD, TOKENS, ids
from test_methods_model import Seen
from transformers import DynamicCache, LlavaForConditionalGeneration

import vtc
from vtc.hf.settings import OPEN

MINUTES = float(os.environ.get("VTC_STATEFUL_MINUTES", 0))
SCORED = (2, 3, 4)
PROMPTS = ([3, "image", 4], ["image", 2, "image", 3], [5], [9], [2, "image"], [1, "image", "image", 6])
IMAGES = 3
PIXELS = models.images(IMAGES)
COUNTS: Counter[str] = Counter()  # answers compared and refused, and rules run


class Setting(NamedTuple):
    method: str
    keep: int
    layer: int = 0
    kv: str = "compact"
    positions: str = "packed"

    @property
    def options(self):
        rest = {"prune_layer": self.layer, "kv": self.kv, "positions": self.positions}
        return {"method": self.method, "keep": self.keep, **rest}

    @property
    def kind(self):
        """What a cache of a prompt with images holds: all its tokens, a shortened prompt, or one pruned inside."""
        if self.method == "none" or (self.layer and self.keep == TOKENS):
            return "plain"
        return "pruned" if self.layer else "short"


STOCK = Setting("none", TOKENS)
DEFAULT = Setting("vtc-cls", TOKENS // 4)
SETTINGS = [
    *(Setting("vtc-cls", keep) for keep in (1, 4, 9, TOKENS)),
    *(Setting("random", keep) for keep in (1, 9)),
    *(Setting("visionzip", keep) for keep in (4, 9, TOKENS)),
    *(Setting("pool", keep) for keep in (1, 4)),
    *(Setting(method, keep, positions="original") for method, keep in (("vtc-cls", 4), ("visionzip", 9), ("pool", 4))),
    *(Setting("fastv", keep, layer, kv) for keep in (1, 9) for layer, kv in ((1, "full"), (2, "full"), (1, "compact"))),
    Setting("fastv", TOKENS, 2),
    *(Setting("vtc-cls", 9, layer, kv) for layer, kv in ((1, "full"), (2, "compact"))),
    STOCK,
]


# The golden path.


@functools.cache
def built():
    model = models.build(text_layers=3)
    with torch.no_grad():
        model.lm_head.weight[IMAGE] = 0  # it never generates a placeholder
    return model, golden.eager(model)


@functools.cache
def seen(image):
    return Seen(built()[1], PIXELS[image])


@functools.cache
def visual(setting, image):
    """Of one image, the numbers of the placeholders that stay, and the projected features that fill them."""
    outputs, keep = seen(image), setting.keep
    kept: Any = range(keep)
    if setting.positions == "original":  # tokens that are no patches are spread
        kept = [(2 * number + 1) * TOKENS // (2 * keep) for number in range(keep)]
    if setting.kind != "short":
        kept, features = range(TOKENS), outputs.hidden[1:]
    elif setting.method == "vtc-cls":
        kept, features = golden_methods.vtc_cls(outputs.hidden, [outputs.attentions[each] for each in SCORED], keep)
    elif setting.method == "random":
        kept = golden.top(golden_methods.random_scores(outputs.image, TOKENS, 0), keep)
        features = outputs.hidden[1:][kept]
    elif setting.method == "visionzip":
        merged = 10 * keep // 64
        parts = (outputs.hidden, outputs.attentions[SCORED[-1]], outputs.keys[SCORED[-1]])
        _, features = golden_methods.visionzip(*parts, 4, keep - merged, merged)
    else:
        features = golden_methods.pool(outputs.hidden, (GRID, GRID), keep)
    assert len(kept) == len(features)
    with torch.no_grad():
        return set(kept), built()[1].model.multi_modal_projector(features.float())


@torch.no_grad()
def embeddings(setting, row, images):
    return golden.splice_features(built()[1], row, [(TOKENS, visual(setting, image)[1]) for image in images])


@functools.cache
@torch.no_grad()
def kept_inside(setting, row, images):
    """The tokens of a prompt that stay when it is pruned inside the language model."""
    if setting.method != "fastv":
        left, kept, at = list(images), [], 0
        while at < len(row):
            is_image = row[at] == IMAGE
            own = visual(setting._replace(layer=0), left.pop(0))[0] if is_image else [0]
            kept += [at + number for number in sorted(own)]
            at += TOKENS if is_image else 1
        return kept
    is_image, embeds = [token == IMAGE for token in row], embeddings(STOCK, row, images)
    path = golden_prune.Pruned(built()[1], embeds, is_image, setting.layer, True, keep=setting.keep * len(images))
    path.logits(embeds)
    return path.kept


@torch.no_grad()
def expected(setting, row, images, kept=None, prompt=0):
    """Golden logits `[len(row), V]` of the tokens of an unpadded row: those of the last token <= j that stays.

    `kept`: the tokens of its first `prompt` that stay in the language model, if it was pruned there.
    """
    eager, row, images = built()[1], tuple(row), tuple(images)
    if kept is None:
        stays, left, at = [], list(images), 0
        while at < len(row):
            is_image = row[at] == IMAGE
            own = visual(setting, left.pop(0))[0] if is_image else {0}
            stays += [number in own for number in range(TOKENS if is_image else 1)]
            at += TOKENS if is_image else 1
        columns = [column for column, own in enumerate(stays) if own] if setting.positions == "original" else None
        logits = golden.logits(eager, embeddings(setting, row, images), columns)
    else:
        kept = [each for each in kept if each < prompt]
        embeds = embeddings(STOCK, row[:prompt], images)
        path = golden_prune.Pruned(eager, embeds, None, setting.layer, setting.kv == "compact", kept=kept)
        logits = path.logits(path.after(list(row[prompt:])))
        stays = [column in set(kept) or column >= prompt for column in range(len(row))]
    return logits[torch.tensor(stays).cumsum(0) - 1]


# What has a state.


class Worker:
    """A thread that runs what it gets, one thing at a time, in a context of its own."""

    def __init__(self):
        self.tasks: Any = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def _work(self):
        while (task := self.tasks.get()) is not None:
            action, answer = task
            try:
                answer.put((action(), None))
            except BaseException as error:
                answer.put((None, error))

    def __call__(self, action):
        answer: Any = queue.SimpleQueue()
        self.tasks.put((action, answer))
        result, error = answer.get()
        if error is not None:
            raise error
        return result

    def stop(self):
        self.tasks.put(None)
        self.thread.join()


@dataclasses.dataclass
class Context:
    """Where calls run, and the blocks that it has: (number of the block, number of the model, settings)."""

    run: Any
    blocks: list[tuple[int, int, Setting]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Conversation:
    """A cache that a call returned, and what it must hold.

    `ids` and `mask` `[B, M]` are the caller's, of which the cache holds `held` columns. `prompt`: the columns of the
    latest prompt. `kept`: of each row, the tokens that stay after pruning inside the language model.
    """

    cache: Any
    kind: str
    setting: Setting
    ids: torch.Tensor
    mask: torch.Tensor
    images: list[list[int]]
    held: int
    prompt: int
    kept: list[list[int]] | None = None

    def real(self, row, end=None):
        return self.ids[row, :end][self.mask[row, :end].bool()].tolist()

    def expected(self, row):
        """The golden logits of all tokens of a row."""
        prompt = len(self.real(row, self.prompt))
        return expected(self.setting, self.real(row), self.images[row], self.kept and self.kept[row], prompt)

    def of_rows(self, rows):
        self.ids, self.mask = self.ids[rows], self.mask[rows]
        self.images = [self.images[row] for row in rows]
        self.kept = self.kept and [self.kept[row] for row in rows]

    @property
    def is_padded(self):
        return not self.mask.all()

    @property
    def has_images(self):
        return any(self.images)

    @property
    def is_cropped(self):
        return self.held < self.prompt


def padded(rows, side):
    length = max(map(len, rows))
    ids_, mask = torch.full((len(rows), length), PAD), torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        start = length - len(row) if side == "left" else 0
        ids_[i, start : start + len(row)] = torch.tensor(row)
        mask[i, start : start + len(row)] = 1
    return ids_, mask


def pixels_of(images):
    numbers = [image for own in images for image in own]
    return {"pixel_values": PIXELS[numbers]} if numbers else {}


INDEX = st.integers(0, 7)
ROWS = st.lists(st.tuples(st.sampled_from(range(len(PROMPTS))), st.integers(0, IMAGES - 1)), min_size=1, max_size=3)
QUESTIONS = st.lists(st.tuples(st.integers(1, 3), st.integers(0, 3)), min_size=6, max_size=6)
OPTIONS = st.one_of(
    st.sampled_from([each for each in SETTINGS if not each.layer]),
    st.sampled_from([each for each in SETTINGS if each.layer]),
    st.sampled_from([1, 4, 9, TOKENS]),
)


class Machine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        COUNTS["examples"] += 1
        self.workers = [Worker(), Worker()]
        self.contexts = [Context(lambda action: action()), *map(Context, self.workers)]
        self.open: dict[int, Any] = {}  # number of a block -> its context manager
        self.number = self.blocks_made = 0
        self.model = copy.deepcopy(built()[0])
        self.attention, self.before, self.stored = "sdpa", None, None
        self.conversations: list[Conversation] = []
        self.empty: list[Any] = []  # caches that were reset

    def teardown(self):
        for block in self.open.values():
            block.__exit__(None, None, None)
        for worker in self.workers:
            worker.stop()
        assert not OPEN

    # What must be true.

    def innermost(self, context):
        """The place of the innermost block of this model among those of a context, or None."""
        own = [i for i, (block, model, _) in enumerate(context.blocks) if block in self.open and model == self.number]
        return own[-1] if own else None

    def is_on(self, context):
        return self.innermost(context) is not None or self.attention == "vtc"

    def stored_or_block(self, context):
        place = self.innermost(context)
        return (self.stored or DEFAULT) if place is None else context.blocks[place][2]

    def setting(self, context):
        """The settings of a call in a context."""
        return self.stored_or_block(context) if self.is_on(context) else STOCK

    def refusal(self, context, images, conversation, by_hand):
        """Why a call on a cache must raise a ValueError, or None. `images`: whether it brings a new one."""
        now, kind = self.setting(context), conversation.kind
        if by_hand:
            if images and (kind != "plain" or now.method != "none"):
                return "images on a cache, by forward()"
            if kind == "short" and conversation.is_cropped:
                return "by forward() on a cache cropped into its prompt"
        elif kind == "pruned":
            if images:
                return "a new image on a cache pruned inside"
            if conversation.setting.kv == "compact":
                return 'a further turn on a cache pruned inside with kv="compact"'
        elif kind == "plain" and images and now.method != "none":
            if now.layer:
                return "a new image to be pruned inside, on a cache"
            if conversation.has_images:
                return "a new image to be compressed, on a cache of images that are not"
        return None

    @staticmethod
    def updated(setting, options):
        """Settings after `options`: all, or a number to keep. None: they are refused."""
        if isinstance(options, Setting):
            return options
        changed = setting._replace(keep=options)
        return None if (changed.method, changed.keep) == ("visionzip", 1) else changed

    @staticmethod
    def arguments(options):
        return options.options if isinstance(options, Setting) else {"keep": options}

    def context(self, index):
        return self.contexts[index % len(self.contexts)]

    def change(self, before, options, action):
        """Run `action` with options, and return the settings after it; None if it was refused, as it must be."""
        after = self.updated(before, options)
        if after is None:
            with pytest.raises(ValueError, match="visionzip"):
                action(**self.arguments(options))
            COUNTS["refused: settings"] += 1
        else:
            action(**self.arguments(options))
        return after

    # Settings.

    @initialize(
        index=INDEX, how=st.sampled_from(["enable", "open", "no"]), options=OPTIONS, rows=ROWS, forward=st.booleans()
    )
    def begin(self, index, how, options, rows, forward):
        """Most of what follows needs a cache."""
        if how == "enable":
            self.enable(index, options)
        elif how == "open":
            self.open_block(index, options)
        if forward:
            self.forward(index, rows, "left", False, 0, "none")
        else:
            self.generate(index, rows, 2, "none")

    @rule(
        how=st.sampled_from(
            [*["enable", "disable", "configure", "set_attention"] * 3, "copy", "reload", "reload as vtc"]
        ),
        index=INDEX,
        options=OPTIONS,
        name=st.sampled_from(["sdpa", "eager", "vtc"]),
    )
    def switch(self, how, index, options, name):
        if how == "set_attention":  # by a third party
            self.set_attention(name)
        elif how == "disable":
            self.disable(index)
        elif how in ("copy", "reload", "reload as vtc"):
            self.copy_model(how)
        else:
            getattr(self, how)(index, options)

    def enable(self, index, options):
        COUNTS["rule: enable"] += 1
        run = self.context(index).run

        def action(**arguments):
            run(lambda: vtc.enable(self.model, **arguments))

        after = self.change(self.stored or DEFAULT, options, action)
        if after is not None:
            self.stored = after
            if self.attention != "vtc":
                self.attention, self.before = "vtc", self.attention
            self.before = self.before or "sdpa"

    def disable(self, index):
        COUNTS["rule: disable"] += 1
        self.context(index).run(lambda: vtc.disable(self.model))
        if self.attention == "vtc":
            self.attention = self.before or "sdpa"
        self.before = self.stored = None

    def configure(self, index, options):
        COUNTS["rule: configure"] += 1
        context = self.context(index)

        def action(**arguments):
            context.run(lambda: vtc.configure(self.model, **arguments))

        after, place = self.change(self.stored_or_block(context), options, action), self.innermost(context)
        if after is None:
            return
        if place is None:
            self.stored = after
        else:
            context.blocks[place] = (*context.blocks[place][:2], after)

    def set_attention(self, name):
        COUNTS["rule: set_attention"] += 1
        self.model.model.vision_tower.set_attn_implementation(name)
        self.attention = name

    # Blocks and contexts.

    @rule(how=st.sampled_from(["open", "open", "close", "copy"]), index=INDEX, options=OPTIONS, which=INDEX)
    def block(self, how, index, options, which):
        if how == "open":
            self.open_block(index, options)
        elif how == "close" and self.open:
            self.close_block(index, which)
        elif how == "copy" and len(self.contexts) < 5:
            self.copy_context(index, which % 3)

    def open_block(self, index, options):
        COUNTS["rule: open_block"] += 1
        context, opened = self.context(index), []

        def action(**arguments):
            block = vtc.compress(self.model, **arguments)
            context.run(block.__enter__)
            opened.append(block)

        after = self.change(self.stored_or_block(context), options, action)
        if after is not None:
            self.blocks_made += 1
            self.open[self.blocks_made] = opened[0]
            context.blocks.append((self.blocks_made, self.number, after))

    def close_block(self, index, block):
        """In any order, in any context."""
        COUNTS["rule: close_block"] += 1
        number = sorted(self.open)[block % len(self.open)]
        manager = self.open.pop(number)
        self.context(index).run(lambda: manager.__exit__(None, None, None))

    def copy_context(self, index, thread):
        COUNTS["rule: copy_context"] += 1
        source, run = self.context(index), self.contexts[thread].run
        copied = source.run(contextvars.copy_context)
        self.contexts.append(Context(lambda action: run(lambda: copied.run(action)), list(source.blocks)))

    # Copies of the model.

    def copy_model(self, how):
        """Blocks stay those of the model before."""
        COUNTS[f"rule: {how} the model"] += 1
        self.number += 1
        if how == "copy":
            self.model = copy.deepcopy(self.model)
            return
        self.attention, self.before = "vtc" if how == "reload as vtc" else "sdpa", None
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            attention = {"attn_implementation": "vtc"} if self.attention == "vtc" else {}
            self.model = LlavaForConditionalGeneration.from_pretrained(folder, **attention).eval()
        self.model.generation_config.eos_token_id = None

    # New prompts.

    def prompt(self, index, rows, side):
        """The settings of a call with these rows, the arguments, and the conversation that it begins."""
        images = [[(first + i) % IMAGES for i in range(PROMPTS[number].count("image"))] for number, first in rows]
        setting = self.setting(self.context(index)) if any(images) else STOCK
        kind = setting.kind
        if kind == "plain":
            setting = STOCK
        rows = [ids(*PROMPTS[number], seed=number) for number, _ in rows]
        ids_, mask = padded(rows, side)
        kept = None
        if kind == "pruned":
            kept = [kept_inside(setting, tuple(row), tuple(own)) for row, own in zip(rows, images, strict=True)]
        length = ids_.shape[1]
        conversation = Conversation(None, kind, setting, ids_, mask, images, length, length, kept)
        return {"input_ids": ids_, "attention_mask": mask} | pixels_of(images), conversation

    def cache(self, which):
        if which == "reset" and self.empty:
            COUNTS["rule: a cache that was reset"] += 1
            return {"past_key_values": self.empty.pop()}
        return {} if which == "none" else {"past_key_values": DynamicCache(config=self.model.config)}

    def remember(self, conversation, cache):
        conversation.cache = cache
        self.conversations = [*self.conversations, conversation][-4:]

    @rule(
        index=INDEX,
        rows=ROWS,
        side=st.sampled_from(["left", "right"]),
        positions=st.booleans(),
        last=st.sampled_from([0, 0, 1, 5, 40]),
        cache=st.sampled_from(["none", "none", "new", "reset", "without"]),
    )
    def forward(self, index, rows, side, positions, last, cache):
        COUNTS["rule: forward"] += 1
        call, conversation = self.prompt(index, rows, side)
        mask = call["attention_mask"]
        if positions or conversation.is_padded:
            call["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        call |= {"use_cache": False} if cache == "without" else self.cache(cache)
        out = self.run(index, lambda: self.model(**call, logits_to_keep=last))
        self.compare(conversation, out.logits, "forward")
        if cache != "without":
            self.remember(conversation, out.past_key_values)

    @rule(index=INDEX, rows=ROWS, count=st.integers(1, 4), cache=st.sampled_from(["none", "none", "new", "reset"]))
    def generate(self, index, rows, count, cache):
        COUNTS["rule: generate"] += 1
        call, conversation = self.prompt(index, rows, "left")
        out = self.run(index, lambda: self.generated(call | self.cache(cache), count))
        self.compare_generated(conversation, out, "generate")
        self.remember(conversation, out.past_key_values)

    def run(self, index, action):
        return self.context(index).run(lambda: torch.no_grad()(action)())

    def generated(self, call, count):
        options = dict(do_sample=False, return_dict_in_generate=True, output_logits=True)
        return self.model.generate(**call, max_new_tokens=count, **options)

    def compare(self, conversation, logits, what):
        """The logits `[B, n, V]` are those of the last n columns of the conversation."""
        COUNTS[f"compared: {what}, {conversation.kind}"] += 1
        first = conversation.mask.shape[1] - logits.shape[1]
        assert first >= 0
        for row, mask in enumerate(conversation.mask):
            columns = mask.nonzero()[:, 0]
            asked = columns >= first
            if asked.any():
                golden.close(logits[row, columns[asked] - first], conversation.expected(row)[asked])

    def compare_generated(self, conversation, out, what):
        """`generate()` returned the prompt and greedy tokens. The conversation goes on with them."""
        length, sequences = conversation.ids.shape[1], out.sequences
        assert torch.equal(sequences[:, :length], conversation.ids)
        new = sequences[:, length:]
        logits = torch.stack(out.logits, 1)
        assert logits.shape[:2] == new.shape
        greedy = logits.gather(2, new[..., None])[..., 0]
        assert torch.equal(greedy, logits.amax(2))
        conversation.ids = sequences[:, :-1]
        conversation.mask = torch.cat([conversation.mask, torch.ones_like(new[:, 1:])], 1)
        self.compare(conversation, logits, what)
        conversation.held = conversation.ids.shape[1]
        conversation.ids = sequences
        conversation.mask = torch.cat([conversation.mask, torch.ones_like(new[:, :1])], 1)

    # Caches.

    def conversation(self, which):
        return self.conversations[which % len(self.conversations)]

    def question(self, conversation, questions, images):
        """New columns, left-padded: ids, mask, and the new images of each row."""
        rows, own = [], []
        for row in range(len(conversation.ids)):
            count, number = questions[row % len(questions)]
            has_image = images and number < IMAGES
            rows.append(ids(count, *(["image", 1] if has_image else []), seed=20 + number)[1:])
            own.append([number] if has_image else [])
        return *padded(rows, "left"), own

    def asked(self, index, conversation, images, by_hand, action):
        """The answer, or None if it was refused as it must be."""
        reason = self.refusal(self.context(index), images, conversation, by_hand)
        if reason is None:
            return self.run(index, action)
        with pytest.raises(ValueError, match=r"cache"):
            self.run(index, action)
        COUNTS[f"refused: {reason}"] += 1
        return None

    @precondition(lambda self: self.conversations)
    @rule(index=INDEX, which=INDEX, questions=QUESTIONS, images=st.booleans(), count=st.integers(1, 3))
    def turn(self, index, which, questions, images, count):
        """The whole conversation and a question."""
        COUNTS["rule: turn"] += 1
        conversation = self.conversation(which)
        new, mask, own = self.question(conversation, questions, images)
        images = any(own)
        ids_ = torch.cat([conversation.ids, new], 1)
        mask = torch.cat([conversation.mask, mask], 1)
        call = {"input_ids": ids_, "attention_mask": mask, "past_key_values": conversation.cache} | pixels_of(own)
        if images and conversation.kind == "short":
            forgotten = {name: value for name, value in call.items() if name != "pixel_values"}
            with pytest.raises(ValueError, match="pixel_values"):
                self.run(index, lambda: self.generated(forgotten, count))
            COUNTS["refused: a new image without its pixels"] += 1
        out = self.asked(index, conversation, images, False, lambda: self.generated(call, count))
        if out is None:
            return
        if conversation.kind == "plain" and images:
            setting = self.setting(self.context(index))
            if setting.kind == "short":
                conversation.kind, conversation.setting = "short", setting
        conversation.ids, conversation.mask = ids_, mask
        conversation.images = [old + new for old, new in zip(conversation.images, own, strict=True)]
        if conversation.kind != "pruned":
            conversation.prompt = ids_.shape[1]
        self.compare_generated(conversation, out, "turn with an image" if images else "turn")

    @precondition(lambda self: self.conversations)
    @rule(
        index=INDEX,
        which=INDEX,
        questions=QUESTIONS,
        images=st.sampled_from([False, False, True]),
        positions=st.booleans(),
        has_mask=st.booleans(),
    )
    def by_hand(self, index, which, questions, images, positions, has_mask):
        """`forward()` with the tokens that the cache lacks, and the mask of the whole conversation."""
        COUNTS["rule: by_hand"] += 1
        conversation = self.conversation(which)
        new, mask, own = self.question(conversation, questions, images)
        images = any(own)
        ids_ = torch.cat([conversation.ids, new], 1)
        mask = torch.cat([conversation.mask, mask], 1)
        call = {"input_ids": ids_[:, conversation.held :], "past_key_values": conversation.cache} | pixels_of(own)
        if has_mask or not mask.all():
            call["attention_mask"] = mask
        if positions or not mask.all():
            call["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, conversation.held :]
        out = self.asked(index, conversation, images, True, lambda: self.model(**call))
        if out is None:
            return
        conversation.ids, conversation.mask, conversation.held = ids_, mask, ids_.shape[1]
        conversation.images = [old + new for old, new in zip(conversation.images, own, strict=True)]
        self.compare(conversation, out.logits, "by hand")

    @precondition(lambda self: self.conversations)
    @rule(
        how=st.sampled_from(["select", "reverse", "repeat"]),
        which=INDEX,
        rows=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    )
    def change_rows(self, how, which, rows):
        """A permutation, a part, or copies."""
        conversation = self.conversation(which)
        count = len(conversation.ids)
        if how == "repeat" and count > 2:
            return
        COUNTS[f"rule: rows, {how}"] += 1
        if how == "repeat":
            conversation.cache.batch_repeat_interleave(2)
            rows = [row for row in range(count) for _ in range(2)]
        else:
            rows = [row % count for row in rows] if how == "select" else list(range(count))[::-1]
            conversation.cache.batch_select_indices(torch.tensor(rows))
        conversation.of_rows(rows)

    @precondition(lambda self: self.conversations)
    @rule(how=st.sampled_from(["crop", "crop", "crop", "reset", "copy"]), which=INDEX, count=st.integers(1, 8))
    def change_cache(self, how, which, count):
        conversation = self.conversation(which)
        if how == "crop":
            self.crop(conversation, count)
            return
        COUNTS[f"rule: {how} a cache"] += 1
        if how == "copy":
            self.remember(dataclasses.replace(conversation), copy.deepcopy(conversation.cache))
        else:
            self.conversations = [each for each in self.conversations if each is not conversation]
            conversation.cache.reset()
            self.empty.append(conversation.cache)

    def crop(self, conversation, count):
        """Remove generated tokens, or a part of the prompt."""
        held = conversation.held - count
        removed = slice(held, conversation.held)
        is_image = (conversation.ids[:, removed] == IMAGE).any()
        if (
            conversation.cache.get_seq_length() <= count
            or not conversation.mask[:, removed].all()
            or (is_image and conversation.kind == "plain")
        ):
            return
        of_pruned = held < conversation.prompt and conversation.kind == "pruned"
        if is_image or of_pruned:
            conversation = dataclasses.replace(conversation, cache=copy.deepcopy(conversation.cache))
        conversation.cache.crop(-count)
        conversation.held = held
        conversation.ids, conversation.mask = conversation.ids[:, :held], conversation.mask[:, :held]
        if is_image or of_pruned:
            COUNTS["rule: crop a cache too far"] += 1
            call = self.asking(conversation)
            with pytest.raises(ValueError, match="cache"):
                self.generated(call, 1)
            call["input_ids"] = call["input_ids"][:, held:]
            with pytest.raises(ValueError, match="cache"):
                self.model(**call)
            COUNTS[f"refused: a cache cropped {'into an image' if is_image else 'into a prompt pruned inside'}"] += 2
            return
        COUNTS["rule: crop a cache"] += 1
        if conversation.kind == "plain":
            conversation.prompt = min(conversation.prompt, held)

    @staticmethod
    def asking(conversation):
        """The arguments of a further turn without an image."""
        rows = len(conversation.ids)
        ids_ = torch.cat([conversation.ids, torch.tensor([[11, 12]] * rows)], 1)
        mask = torch.cat([conversation.mask, torch.ones(rows, 2, dtype=torch.long)], 1)
        return {"input_ids": ids_, "attention_mask": mask, "past_key_values": conversation.cache}

    @invariant()
    def every_context_knows_its_state(self):
        for context in self.contexts:
            assert context.run(lambda: vtc.is_enabled(self.model)) == self.is_on(context)
        assert self.model.model.vision_tower.config._attn_implementation == self.attention


KINDS = ("plain", "short", "pruned")
ANSWERS = {
    *(f"compared: {what}, {kind}" for what in ("forward", "generate", "turn", "by hand") for kind in KINDS),
    *(f"compared: turn with an image, {kind}" for kind in ("plain", "short")),
    "refused: settings",
    "refused: images on a cache, by forward()",
    "refused: by forward() on a cache cropped into its prompt",
    "refused: a new image on a cache pruned inside",
    'refused: a further turn on a cache pruned inside with kv="compact"',
    "refused: a new image to be pruned inside, on a cache",
    "refused: a new image to be compressed, on a cache of images that are not",
    "refused: a new image without its pixels",
    "refused: a cache cropped into an image",
    "refused: a cache cropped into a prompt pruned inside",
}
RULES = {
    *(f"rule: {name}" for name in ("enable", "disable", "configure", "set_attention", "open_block", "close_block")),
    *(f"rule: {name} the model" for name in ("copy", "reload", "reload as vtc")),
    *(f"rule: rows, {name}" for name in ("select", "reverse", "repeat")),
    *(f"rule: {name} a cache" for name in ("crop", "reset", "copy")),
    *("rule: copy_context", "rule: a cache that was reset", "rule: crop a cache too far"),
}


def run(number, examples, steps):
    """Run random examples, which depend on the number."""
    phases = [Phase.generate] if os.environ.get("VTC_STATEFUL_NO_SHRINK") else [Phase.generate, Phase.shrink]
    options = dict(deadline=None, suppress_health_check=list(HealthCheck), database=None, phases=phases)
    profile = settings(max_examples=examples, stateful_step_count=steps, **options)
    machine = seed(number)(type("Machine", (Machine,), {}))
    try:
        run_state_machine_as_test(machine, settings=profile)
    except BaseException:
        print(f"VTC_STATEFUL_SEED={number}")
        raise


def test_random_sequences_of_settings_blocks_and_caches():
    started, number = time.monotonic(), int(os.environ.get("VTC_STATEFUL_SEED", 0))
    COUNTS.clear()
    if MINUTES:
        number = number or random.randrange(1, 2**32)
        while time.monotonic() - started < 60 * MINUTES:
            run(number, 20, 25)
            number += 1
    else:
        for each in range(8):
            run(number + each, 9, 12)
    if MINUTES or os.environ.get("VTC_STATEFUL_REPORT"):
        report = "\n".join(f"{count:7} {name}" for name, count in sorted(COUNTS.items()))
        print(f"\n{report}\n{time.monotonic() - started:7.0f} seconds")
    needed = ANSWERS | RULES if MINUTES >= 3 else {each for each in ANSWERS if each.startswith("compared: forward")}
    missing = sorted(needed - COUNTS.keys())
    assert not missing, f"nothing tried {missing}"
