"""`forward()` answers for the caller's columns: column j is that of the last kept column <= j of its row.

Oracle: the golden path of each row alone and unpadded, and where each column of the caller stands in that short prompt.
"""

import copy
import tempfile

import pytest
import torch
from support import models
from support.golden import llava as golden
from support.golden import prune as golden_prune
from support.models import IMAGE, PAD, TOKENS, ids
from support.prompts import LAYERS, PROMPTS, count_images, inputs, prompts, spliced
from test_families import Prompts, built  # noqa: F401
from test_families import prompts as family_prompts
from test_methods_model import CASES as METHODS
from test_methods_model import Seen
from test_methods_model import options as method_options
from transformers import Trainer, TrainingArguments

import vtc

KEEP = 9
SIDES = ("left", "right", "both")


def padded(rows, side, margin=0):
    """`input_ids` and `attention_mask` `[B, L]`: padding on the left, on the right, or a part of it on each side."""
    length = max(map(len, rows)) + margin
    ids, mask = torch.full((len(rows), length), PAD), torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        free = length - len(row)
        start = {"left": free, "right": 0, "both": (free + 1) // 2}[side]
        ids[i, start : start + len(row)] = torch.tensor(row)
        mask[i, start : start + len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def places(row, kept, markers=(IMAGE,)):
    """Of each column of an unpadded row (list of ids), the index of the last kept column up to it, in the short prompt.

    `kept`: of each image, the number of its placeholders, and the numbers of those that are kept. -1 before the first.
    """
    kept, result, last, at = list(kept), [], -1, 0
    while at < len(row):
        tokens, stays = kept.pop(0) if row[at] in markers else (1, {0})
        for number in range(tokens):
            last += number in stays
            result.append(last)
        at += tokens
    assert not kept
    return result


def kept_patches(eager, images, keep=KEEP):
    with torch.no_grad():
        return [(TOKENS, set(golden.top(golden.scores(eager, image, LAYERS), keep))) for image in images]


def row_images(rows, pixels):
    pixels = list(pixels)
    for row in rows:
        own, pixels = pixels[: count_images(row)], pixels[count_images(row) :]
        yield own


def row_places(eager, rows, pixels, keep=KEEP):
    """`places` of each row, and its golden embeddings."""
    for row, own, (embeds, _) in zip(rows, row_images(rows, pixels), spliced(eager, rows, pixels, keep), strict=True):
        yield places(row, kept_patches(eager, own, keep)), embeds


def check_columns(found, mask, expected, where):
    """`found` [L, C] of one row is `expected` [L', C] at the places `where` of its tokens; padding is finite.

    After the last token it is the last token's.
    """
    assert len(found) == len(mask)
    assert found.isfinite().all()
    columns = mask.nonzero()[:, 0]
    known = [i for i, place in enumerate(where) if place >= 0]
    golden.close(found[columns[known]], expected[[where[i] for i in known]])
    after = found[int(columns[-1]) + 1 :]
    golden.close(after, expected[-1:].expand_as(after))


def states(eager, embeds):
    """Golden hidden states of embeddings `[1, L', D]`: a tuple of `[L', D]`; the last is normalised."""
    positions = torch.arange(embeds.shape[1])[None]
    text = eager.model.language_model
    with torch.no_grad():
        out = text(inputs_embeds=embeds, position_ids=positions, use_cache=False, output_hidden_states=True)
    return [state[0] for state in out.hidden_states]


@pytest.mark.supported("forward()", "logits and hidden states for every column of the caller's prompt")
@pytest.mark.supported("Prompts", "padding on the left, on the right or on both sides")
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", PROMPTS)
@torch.no_grad()
def test_logits_and_hidden_states_have_the_callers_columns(model, eager, name, side):
    vtc.configure(model, keep=KEEP)
    rows = prompts(name)
    call = padded(rows, side, margin=2) | {"pixel_values": inputs(rows)["pixel_values"]}
    out = model(**call, output_hidden_states=True)
    inner = model.model(**call)
    as_tuple = model(**call, return_dict=False)
    assert out.logits.shape[:2] == call["input_ids"].shape
    assert torch.equal(as_tuple[0], out.logits)
    golden_states = None
    for i, (where, embeds) in enumerate(row_places(eager, rows, call["pixel_values"])):
        mask, golden_states = call["attention_mask"][i], states(eager, embeds)
        check_columns(out.logits[i], mask, golden.logits(eager, embeds), where)
        check_columns(inner.last_hidden_state[i], mask, golden_states[-1], where)
        for found, expected in zip(out.hidden_states, golden_states, strict=True):
            check_columns(found[i], mask, expected, where)


@pytest.mark.supported("forward()", "`logits_to_keep` as a number and as a tensor of positions")
@pytest.mark.parametrize("side", SIDES)
@torch.no_grad()
def test_logits_to_keep_counts_the_callers_columns(model, eager, side):
    vtc.configure(model, keep=KEEP)
    rows = prompts("unequal_images")
    call = padded(rows, side) | {"pixel_values": inputs(rows)["pixel_values"]}
    length = call["input_ids"].shape[1]
    for keep in (1, 3, TOKENS, length):
        assert model(**call, logits_to_keep=keep).logits.shape[1] == keep
    positions = torch.tensor([length - 1, 5, 2 + TOKENS // 2, 40])
    last, chosen = (model(**call, logits_to_keep=keep).logits for keep in (30, positions))
    for i, (where, embeds) in enumerate(row_places(eager, rows, call["pixel_values"])):
        mask, expected = call["attention_mask"][i], golden.logits(eager, embeds)
        index = torch.full((length,), -1)
        index[mask.bool()] = torch.tensor(where)
        for found, columns in ((last[i], torch.arange(length)[-30:]), (chosen[i], positions)):
            real = mask[columns].bool()
            golden.close(found[real], expected[index[columns[real]]])


def golden_sum(model, embeds, row_labels, where):
    """Sum of -log p over the labels of an unpadded row, each predicted from the column before it; and their number."""
    log_p = golden.logits(model, embeds).log_softmax(-1)
    terms = [-log_p[where[j - 1], label] for j, label in enumerate(row_labels) if j and label != -100]
    return torch.stack(terms).sum(), len(terms)


@pytest.mark.supported("Training", "labels at any column, also at placeholders; `num_items_in_batch`")
@pytest.mark.parametrize("labelled", ["all", "text"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", ["one", "unequal_images", "unequal_same_length", "text_only_row"])
def test_the_loss_is_that_of_the_callers_labels(model, eager, name, side, labelled):
    """Labels at dropped placeholders count, as stock counts them."""
    vtc.configure(model, keep=KEEP)
    rows = prompts(name)
    call = padded(rows, side) | {"pixel_values": inputs(rows)["pixel_values"]}
    labels = call["input_ids"].masked_fill(call["attention_mask"] == 0, -100)
    if labelled == "text":
        labels = labels.masked_fill(labels == IMAGE, -100)
    total, count = 0, 0
    for i, (where, embeds) in enumerate(row_places(eager, rows, call["pixel_values"])):
        with torch.no_grad():
            part, number = golden_sum(eager, embeds, labels[i, call["attention_mask"][i].bool()].tolist(), where)
        total, count = total + part, count + number
    with torch.no_grad():
        golden.close(model(**call, labels=labels).loss, total / count)
        for items in (7, torch.tensor(labels.numel())):
            golden.close(model(**call, labels=labels, num_items_in_batch=items).loss, total / items)
        loss, logits = model(**call, labels=labels, return_dict=False)[:2]
        golden.close(loss, total / count)
        assert logits.shape[:2] == labels.shape


def test_labels_of_stock_are_counted_the_same_way(stock):
    """Guards the oracle: with all patches kept it is what the stock model computes."""
    row, pixels = prompts("one")[0], models.images(1)
    with torch.no_grad():
        embeds, _ = golden.splice(golden.eager(stock), row, pixels, TOKENS, LAYERS, TOKENS)
        total, count = golden_sum(stock, embeds, row, places(row, [(TOKENS, set(range(TOKENS)))]))
        call = padded([row], "left") | {"pixel_values": pixels}
        golden.close(stock(**call, labels=call["input_ids"]).loss, total / count)
        scaled = stock(**call, labels=call["input_ids"], num_items_in_batch=torch.tensor(5)).loss
        golden.close(scaled, total / 5)


@pytest.mark.supported("Training", "gradients of the loss, and of any function of the logits")
@pytest.mark.parametrize("function", ["loss", "logits"])
def test_gradients_flow_through_the_callers_columns(model, stock, function):
    """A kept column's gradient is the sum over the columns that show it."""
    vtc.configure(model, keep=KEEP)
    rows = prompts("unequal_images")
    call = padded(rows, "both") | {"pixel_values": inputs(rows)["pixel_values"]}
    labels = call["input_ids"].masked_fill(call["attention_mask"] == 0, -100)
    weights = torch.randn(*labels.shape, models.VOCAB, generator=torch.Generator().manual_seed(3))
    weights[call["attention_mask"] == 0] = 0
    model.requires_grad_(True)
    out = model(**call, labels=labels)
    (out.loss if function == "loss" else (out.logits * weights).sum()).backward()
    eager, total, count = golden.eager(stock).requires_grad_(True), 0, 0
    for i, own in enumerate(row_images(rows, call["pixel_values"])):
        real = call["attention_mask"][i].bool()
        where = places(rows[i], kept_patches(eager, own))
        embeds, _ = golden.splice(eager, rows[i], own, KEEP, LAYERS, TOKENS)
        if function == "logits":
            total, count = total + (golden.logits(eager, embeds)[where] * weights[i, real]).sum(), 1
        else:
            part, number = golden_sum(eager, embeds, labels[i, real].tolist(), where)
            total, count = total + part, count + number
    (total / count).backward()
    compared = set()
    for (key, ours), (_, theirs) in zip(model.named_parameters(), eager.named_parameters(), strict=True):
        if theirs.grad is not None and theirs.grad.abs().max() > 0 and not key.endswith("k_proj.bias"):
            scale = theirs.grad.abs().max()
            golden.close(ours.grad / scale, theirs.grad / scale)
            compared.add(key.split(".")[1])
    assert compared >= {"vision_tower", "multi_modal_projector", "language_model"}


@pytest.mark.supported("Caches", "`forward()` goes on by hand from the cache it returned, with the caller's mask")
@pytest.mark.parametrize("positions", ["given", "absent"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", ["one", "left_padded", "unequal_images", "text_only_row"])
@torch.no_grad()
def test_the_returned_cache_is_continued_by_hand(model, eager, name, side, positions):
    """One token, then two at once: the mask has the caller's columns, and so have the positions, if there are any."""
    vtc.configure(model, keep=KEEP)
    rows = prompts(name)
    call = padded(rows, side) | {"pixel_values": inputs(rows)["pixel_values"]}
    mask = call["attention_mask"]
    given = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if positions == "given" else {}
    cache = model(**call, **given, use_cache=True).past_key_values
    embeds = [each for each, _ in spliced(eager, rows, call["pixel_values"], KEEP)]
    tokens = torch.randint(4, models.VOCAB, (len(rows), 3), generator=torch.Generator().manual_seed(1))
    for new in (tokens[:, :1], tokens[:, 1:]):
        mask = torch.cat([mask, torch.ones_like(new)], 1)
        if given:
            given = {"position_ids": (mask.cumsum(1) - 1)[:, -new.shape[1] :]}
        logits = model(input_ids=new, attention_mask=mask, past_key_values=cache, **given).logits
        for i, own in enumerate(new):
            embeds[i] = torch.cat([embeds[i], eager.get_input_embeddings()(own)[None]], 1)
            golden.close(logits[i], golden.logits(eager, embeds[i])[-len(own) :])


# Other places to prune, other models, other methods.

PRUNED = [(method, layer, kv) for method in ("vtc-cls", "fastv") for layer, kv in ((1, "full"), (2, "compact"))]


@pytest.fixture(scope="module")
def deep():
    return models.build(text_layers=4)


def pruned_row(eager, row, images, method, layer, kv):
    """Golden logits `[S, V]` of a row, and the place of each of its columns among them."""
    path = golden_prune.prompt(eager, row, images, KEEP, LAYERS, TOKENS, method, layer, kv == "compact")
    with torch.no_grad():
        path.logits(path.embeds)  # FastV selects here
        logits = path.logits(path.embeds)
    kept, places = set(path.kept), []
    for column in range(len(row)):
        places.append((places[-1] if places else -1) + (column in kept))
    return logits, places


@pytest.mark.supported("forward()", "the caller's columns with `prune_layer` > 0, too")
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("method", "layer", "kv"), PRUNED)
@torch.no_grad()
def test_pruning_inside_the_language_model_has_the_callers_columns(deep, method, layer, kv, side):
    model = copy.deepcopy(deep)
    vtc.enable(model, keep=KEEP, method=method, prune_layer=layer, kv=kv)
    eager, rows = golden.eager(deep), prompts("unequal_images")
    call = padded(rows, side, margin=1) | {"pixel_values": inputs(rows)["pixel_values"]}
    length = call["input_ids"].shape[1]
    out = model(**call, output_hidden_states=True)
    assert {state.shape[1] for state in out.hidden_states} == {length}
    golden.close(model.lm_head(out.hidden_states[-1]), out.logits)
    last = model(**call, logits_to_keep=3).logits
    chosen = model(**call, logits_to_keep=torch.tensor([length - 1, 20])).logits
    golden.close(last, out.logits[:, -3:])
    golden.close(chosen, out.logits[:, [length - 1, 20]])
    golden.close(model.lm_head(model.model(**call).last_hidden_state), out.logits)
    for i, own in enumerate(row_images(rows, call["pixel_values"])):
        logits, where = pruned_row(eager, rows[i], own, method, layer, kv)
        check_columns(out.logits[i], call["attention_mask"][i], logits, where)


@pytest.mark.supported("Training", "labels and gradients with `prune_layer` > 0")
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("method", "layer", "kv"), PRUNED)
def test_the_loss_of_a_prompt_pruned_inside_the_language_model(deep, method, layer, kv, side):
    model = copy.deepcopy(deep)
    vtc.enable(model, keep=KEEP, method=method, prune_layer=layer, kv=kv)
    eager, rows = golden.eager(deep), prompts("left_padded")
    call = padded(rows, side) | {"pixel_values": inputs(rows)["pixel_values"]}
    labels = call["input_ids"].masked_fill(call["attention_mask"] == 0, -100)
    out = model(**call, labels=labels, use_cache=False)
    out.loss.backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0
    total, count = 0, 0
    for i, own in enumerate(row_images(rows, call["pixel_values"])):
        logits, where = pruned_row(eager, rows[i], own, method, layer, kv)
        log_p, real = logits.log_softmax(-1), labels[i, call["attention_mask"][i].bool()].tolist()
        total -= sum(log_p[where[j - 1], label] for j, label in enumerate(real) if j)
        count += len(real) - 1
    golden.close(out.loss.detach(), total / count)


@pytest.mark.supported("forward()", "the caller's columns for VipLLaVA, LLaVA-NeXT tiles and videos, too")
@pytest.mark.parametrize("family", ["vipllava", "llava_next", "llava_next_video"])
@torch.no_grad()
def test_tiles_frames_and_vipllava_have_the_callers_columns(built, family):  # noqa: F811
    model, eager = built(family)
    batch: Prompts = family_prompts(family)
    rows, call = batch.ids, batch.call
    labels = call["input_ids"].masked_fill(call["attention_mask"] == 0, -100)
    for side in ("left", "right"):
        call |= padded(rows, side)
        labels = call["input_ids"].masked_fill(call["attention_mask"] == 0, -100)
        with vtc.compress(model, keep=7):
            out = model(**call, labels=labels)
            steps = model(**call, logits_to_keep=torch.tensor([4, 30])).logits
        golden.close(steps, out.logits[:, [4, 30]])
        total, count = 0, 0
        for i, (row, own, embeds) in enumerate(zip(rows, batch.visuals, batch.spliced(eager, 7), strict=True)):
            kept = [(batch.tokens(visual), set(batch.kept(eager, visual, 7))) for visual in own]
            where = places(row, kept, (IMAGE, models.VIDEO))
            check_columns(out.logits[i], call["attention_mask"][i], golden.logits(eager, embeds), where)
            part, number = golden_sum(eager, embeds, row, where)
            total, count = total + part, count + number
        golden.close(out.loss, total / count)


@pytest.mark.supported("forward()", "the caller's columns with every method; of merged tokens the first K placeholders")
@pytest.mark.parametrize("case", METHODS)
@torch.no_grad()
def test_every_method_has_the_callers_columns(built, case):  # noqa: F811
    """A method that merges tokens fills an image's first placeholders."""
    model, eager = built("llava")
    rows = prompts("unequal_images")
    call = padded(rows, "both") | {"pixel_values": inputs(rows)["pixel_values"]}
    with vtc.compress(model, **method_options(case)):
        logits = model(**call).logits
    merged = case.split()[0] in ("pool", "downsample", "visionzip", "prumerge", "prumerge+")
    for i, own in enumerate(row_images(rows, call["pixel_values"])):
        reduced = [METHODS[case][1](Seen(eager, image, row=rows[i])) for image in own]
        features = [eager.model.multi_modal_projector(each.float()) for _, each in reduced]
        kept = [set(range(len(each))) if merged else set(patches) for patches, each in reduced]
        embeds = golden.splice_features(eager, rows[i], [(TOKENS, each) for each in features])
        where = places(rows[i], [(TOKENS, each) for each in kept])
        check_columns(logits[i], call["attention_mask"][i], golden.logits(eager, embeds), where)


# What trainers and benchmarks do with logits.


@pytest.mark.supported("forward()", "log-probabilities of answers, padded on the right of left-padded prompts (GRPO)")
@torch.no_grad()
def test_log_probabilities_of_answers_are_those_of_each_row_alone(model, eager):
    vtc.configure(model, keep=KEEP)
    questions = [ids(3, "image", 4), ids(5, "image", 6, seed=1), ids(2, "image", 1, "image", 2, seed=2)]
    answers = [ids(5, seed=7)[1:], ids(2, seed=8)[1:], ids(3, seed=9)[1:]]
    count, pixels = max(map(len, answers)), models.images(4)
    left, right = padded(questions, "left"), padded(answers, "right")
    call = {name: torch.cat([left[name], right[name]], 1) for name in left} | {"pixel_values": pixels}
    logits = model(**call, logits_to_keep=count + 1).logits[:, :-1]
    found = logits.log_softmax(-1).gather(2, right["input_ids"][..., None])[..., 0]
    rows = [question + answer for question, answer in zip(questions, answers, strict=True)]
    for i, (embeds, _) in enumerate(spliced(eager, rows, pixels, KEEP)):
        log_p = golden.logits(eager, embeds)[-len(answers[i]) - 1 : -1].log_softmax(-1)
        golden.close(found[i, : len(answers[i])], log_p.gather(1, torch.tensor(answers[i])[:, None])[:, 0])


@pytest.mark.supported("forward()", "the log-likelihood of an answer, sliced at its columns (lmms-eval)")
@torch.no_grad()
def test_an_answer_is_sliced_at_its_own_columns(model, eager):
    vtc.configure(model, keep=KEEP)
    context, answer, pixels = ids(3, "image", 4), [11, 12, 13], models.images(1)
    call = padded([context + answer], "left") | {"pixel_values": pixels}
    logits = model(**call, labels=call["input_ids"]).logits
    embeds, _ = spliced(eager, [context + answer], pixels, KEEP)[0]
    expected = golden.logits(eager, embeds)
    assert torch.equal(logits[0, len(context) :].argmax(-1), expected[-3:].argmax(-1))
    golden.close(logits[0, len(context) - 1 : -1], expected[-4:-1])


class Samples(torch.utils.data.Dataset):
    """Prompts with one image each, for a collator that gets their numbers."""

    rows = (ids(3, "image", 5), ids(2, "image", 11, seed=1), ids(9, "image", 2, seed=2))
    pixels = models.images(3)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return {"i": i}

    def collate(self, items):
        chosen = [item["i"] for item in items]
        batch = padded([self.rows[i] for i in chosen], "right")
        labels = batch["input_ids"].masked_fill((batch["attention_mask"] == 0) | (batch["input_ids"] == IMAGE), -100)
        labels[:, 0] = -100  # nothing predicts it
        return batch | {"pixel_values": self.pixels[chosen], "labels": labels}


def trainer(model, folder, **options):
    pytest.importorskip("accelerate")
    data = Samples()
    common = dict(output_dir=folder, report_to=[], remove_unused_columns=False, use_cpu=True, disable_tqdm=True)
    arguments = TrainingArguments(**common, save_strategy="no", **options)
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data, data_collator=data.collate)


@pytest.mark.supported("Training", "`Trainer.evaluate` with `compute_metrics`")
@pytest.mark.parametrize("size", [1, 3])
def test_a_trainers_predictions_stand_beside_its_labels(model, eager, size):
    """A Trainer cannot gather a stock LLaVA's cache and encoded images, either, so it is told to leave them."""
    vtc.configure(model, keep=KEEP)
    seen = {}
    with tempfile.TemporaryDirectory() as folder:
        run = trainer(model, folder, per_device_eval_batch_size=size)
        run.compute_metrics = lambda result: seen.update(logits=result.predictions, labels=result.label_ids) or {}
        loss = run.evaluate(ignore_keys=["cache", "past_key_values", "image_outputs", "image_hidden_states"])
    assert seen["logits"].shape[:2] == seen["labels"].shape
    losses, data = [], Samples()
    for i, (where, embeds) in enumerate(row_places(eager, data.rows, data.pixels)):
        expected, row = golden.logits(eager, embeds).detach(), torch.tensor(data.rows[i])
        text = (row != IMAGE).nonzero()[:, 0]
        golden.close(torch.tensor(seen["logits"])[i, text], expected[[where[j] for j in text]])
        with torch.no_grad():
            losses.append(golden_sum(eager, embeds, row.masked_fill(row == IMAGE, -100).tolist(), where))
    if size == 3:
        golden.close(torch.tensor(loss["eval_loss"]), sum(t for t, _ in losses) / sum(n for _, n in losses))
    else:
        golden.close(torch.tensor(loss["eval_loss"]), sum(t / n for t, n in losses) / 3)


@pytest.mark.supported("Training", "`Trainer` with label smoothing")
def test_label_smoothing_of_a_trainer(model, eager):
    """A Trainer does not shift the labels of a LLaVA, which its list of causal language models lacks: nor here."""
    vtc.configure(model, keep=KEEP)
    data, total, count = Samples(), 0, 0
    for i, (where, embeds) in enumerate(row_places(eager, data.rows, data.pixels)):
        log_p = golden.logits(eager, embeds).log_softmax(-1).detach()
        for j, label in enumerate(data.rows[i]):
            if j and label != IMAGE:
                total -= 0.9 * log_p[where[j], label] + 0.1 * log_p[where[j]].mean()
                count += 1
    with tempfile.TemporaryDirectory() as folder:
        options = dict(per_device_train_batch_size=3, max_steps=1, label_smoothing_factor=0.1)
        loss = trainer(model, folder, **options).train().training_loss
    golden.close(torch.tensor(loss), total / count)
