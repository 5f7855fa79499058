"""`vtc.graphs`: what is recorded, when it is replayed, when not, and that nothing but the time changes.

On a CPU the graphs are played by `bench.played`, which is as strict as a capture. The whole integration runs that way
with `pytest -p support.played tests/hf`.
"""

import contextlib
import copy
import functools
import gc
import io
import logging
import threading
import types
import weakref

import pytest
import torch
from support import models
from support.models import TOKENS
from support.prompts import detailed, inputs, prompts
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import vtc
from bench import played
from vtc.hf import names
from vtc.hf.graphs import language_calls, warm_up
from vtc.hf.graphs import model as graphs
from vtc.hf.graphs.capture import CudaRecorder
from vtc.hf.graphs.recorded import Refused
from vtc.hf.graphs.state import State
from vtc.hf.graphs.window import Window
from vtc.methods import METHODS, Needs
from vtc.methods.vtc_cls import VTCCLS

KEEP = 9


@pytest.fixture
def model():
    made = models.build()
    vtc.enable(made, keep=KEEP)
    return made


@pytest.fixture
def call():
    return inputs(prompts("left_padded"))


@pytest.fixture(autouse=True)
def fresh_log(caplog):
    caplog.set_level(logging.INFO, logger="vtc")


def close(one, other):
    assert len(one) == len(other)
    for mine, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-5)


def answer(model, call, **how):
    return model.generate(**call, **(detailed() | how))


def same(one, other):
    assert torch.equal(one.sequences, other.sequences)
    close(one.logits, other.logits)


# What is recorded


@pytest.mark.supported("Graphs", "`generate()`: greedy, sampling, beams, left-padded batches")
@pytest.mark.parametrize("how", [{}, {"do_sample": True}, {"num_beams": 3}], ids=["greedy", "sampling", "beams"])
def test_answers_are_those_without_graphs(model, call, how):
    torch.manual_seed(3)
    expected = answer(model, call, **how)
    found = played.switch_on(model)
    for times in (1, 2):
        torch.manual_seed(3)
        same(answer(model, call, **how), expected)
        assert found.replays == {"vision": times, "prompt": times, "step": 6 * times}
    assert len(found) == 3
    assert not found.refusals


@torch.no_grad()
@pytest.mark.parametrize("hides", ["nothing", "left", "right", "holes", "a row", "no mask", "float"])
@pytest.mark.parametrize("length", [2, 31, 32, 33])
def test_prompts_with_any_mask(model, length, hides):
    language, generator = model.model.language_model, torch.Generator().manual_seed(length)
    embeds = torch.randn(3, length, 64, generator=generator)
    mask = torch.ones(3, length, dtype=torch.long)
    for row, count in enumerate((0, 1, length // 2)):
        if hides == "left":
            mask[row, :count] = 0
        elif hides == "right":
            mask[row, length - count :] = 0
        elif hides == "holes":
            mask[row, 1 : 1 + 2 * (count // 2) : 2] = 0
    if hides == "a row":
        mask[1] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    call = {"inputs_embeds": embeds, "attention_mask": mask.float() if hides == "float" else mask}
    call |= {"position_ids": positions, "use_cache": True}
    if hides == "no mask":
        call = {"inputs_embeds": embeds, "use_cache": True}
    expected = language(**call)
    found = played.switch_on(model)
    for _ in range(2):
        out, real = language(**call), mask.bool()
        close([out.last_hidden_state[real]], [expected.last_hidden_state[real]])
        for mine, theirs in zip(cache_of(out).layers, cache_of(expected).layers, strict=True):
            for tensor, other in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
                assert tensor.shape == other.shape
                close([tensor.transpose(1, 2)[real]], [other.transpose(1, 2)[real]])
    assert found.replays == {"prompt": 2}


def test_positions_behind_a_prompt_are_small(model, monkeypatch):
    """Some rotary embeddings depend on the largest."""
    real, seen = played.PlayedRecorder.record, []

    def record(self, function, inputs, outputs):
        replay = real(self, function, inputs, outputs)
        return lambda: (seen.append([each.clone() for each in inputs]), replay())[1]

    monkeypatch.setattr(played.PlayedRecorder, "record", record)
    played.switch_on(model)
    for text in (14, 5):
        answer(model, inputs([models.ids(text, "image")]), max_new_tokens=1)
    positions = [given[2] for given in seen if len(given) == 3]
    assert [(each.max().item(), each[:, -1].item()) for each in positions] == [(KEEP + 14, 0), (KEEP + 5, 0)]


def test_prompts_of_a_bucket_share_a_graph(model):
    found = played.switch_on(model)
    for text in (5, 6, 12, 22):  # with KEEP visual tokens, and one at the beginning
        one = inputs([models.ids(text, "image")])
        answer(model, one)
    assert sorted(key[2] for key, _ in found._recorded._functions if key[0] == "prompt") == [32]
    answer(model, inputs([models.ids(23, "image")]))
    assert sorted(key[2] for key, _ in found._recorded._functions if key[0] == "prompt") == [32, 64]


def test_a_long_answer_records_nothing_on_its_way(model, monkeypatch):
    model.generation_config.eos_token_id = None
    one = inputs([models.ids(5, "image")])
    expected = answer(model, one, max_new_tokens=300)
    found = played.switch_on(model)
    lengths = []
    step = type(found._language)._step
    monkeypatch.setattr(
        type(found._language),
        "_step",
        lambda *args: [lengths.append(len(found)), step(*args), lengths.append(len(found))][1],
    )
    same(answer(model, one, max_new_tokens=300), expected)
    assert (lengths[0], set(lengths[1:])) == (2, {4})  # one for 256 columns, one for 512
    same(answer(model, one, max_new_tokens=300), expected)
    assert len(found) == 4


def test_what_was_not_used_for_the_longest_time_leaves(model):
    found = played.switch_on(model, limit=3)
    rows = [models.ids(5, "image"), models.ids(40, "image"), models.ids(80, "image")]
    expected = [models_answer.sequences for models_answer in (answer(model, inputs([row])) for row in rows)]
    assert len(found) == 3
    for row, before in zip(rows, expected, strict=True):
        assert torch.equal(answer(model, inputs([row])).sequences, before)
    assert len(found) == 3


def test_what_was_used_stays(model):
    recorded, made = played.switch_on(model, limit=2)._recorded, []
    for key in "abacab":
        assert recorded.get(key, lambda key=key: made.append(key) or key) == key
    assert made == ["a", "b", "c", "b"]


def test_only_some_batch_sizes_have_memory_for_steps(model):
    found = played.switch_on(model)
    for batch in (1, 2, 3, 4, 5, 1):
        expected = answer(model, inputs([models.ids(5, "image", seed=s) for s in range(batch)]))
        same(answer(model, inputs([models.ids(5, "image", seed=s) for s in range(batch)])), expected)
    assert list(found._language._windows) == [3, 4, 5, 1]
    assert {key[1] for key, _ in found._recorded._functions if key[0] == "step"} == {1, 3, 4, 5}


# Methods


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_is_replayed_or_runs_as_before(method, call):
    model = models.build(text_layers=4)
    vtc.enable(model, keep=KEEP, method=method)
    expected = answer(model, call)
    found = played.switch_on(model)
    for _ in range(2):
        same(answer(model, call), expected)
    assert found.replays["vision"] == 2, found
    assert found.replays["step"] == (0 if model.config.vtc.get("prune_layer") or method in ("fastv", "dart") else 12)


@pytest.mark.supported("Graphs", 'all tokens kept: `method="none"`')
def test_a_model_that_keeps_all(model, call):
    vtc.configure(model, method="none")
    expected = answer(model, call)
    found = played.switch_on(model)
    for _ in range(2):
        same(answer(model, call), expected)
    assert found.replays == {"vision": 2, "prompt": 2, "step": 12}


def test_a_question_is_read_at_every_call(model):
    vtc.configure(model, method="mmtok")
    pixels = models.images(1)
    calls = [{**models.batch([models.ids(3, "image", 9, seed=seed)]), "pixel_values": pixels} for seed in range(6)]
    expected = [(answer(model, each), vtc.select(model, each).indices) for each in calls]
    found = played.switch_on(model)
    for each, (before, indices) in zip(calls, expected, strict=True):
        same(answer(model, each), before)
        assert torch.equal(vtc.select(model, each).indices, indices)
    assert len({tuple(indices[0].tolist()) for _, indices in expected}) > 1
    assert not found.refusals  # no question was to be recorded


class Alternating(VTCCLS):
    """Every second call it ranks the other way round."""

    name = "alternating"
    calls = 0

    def ranking(self, outputs):
        ranking = super().ranking(outputs)
        type(self).calls += 1
        return ranking._replace(scores=-ranking.scores) if self.calls % 2 else ranking


def test_a_method_of_others_runs_at_every_call(model, call):
    vtc.configure(model, method=Alternating())
    found = played.switch_on(model)
    one, two, three = (vtc.select(model, call["pixel_values"]).indices for _ in range(3))
    assert not torch.equal(one, two)
    assert torch.equal(one, three)
    assert found.replays == {"vision": 3}


# Changes of the model


def test_settings_that_change(model, call):
    found = played.switch_on(model)
    for options in ({"keep": 4}, {"keep": 12}, {"start_layer": 1}, {"keep": 4, "positions": "original"}):
        with vtc.compress(model, **options):
            one = answer(model, call)
            with without(found, model):
                same(one, answer(model, call))
    assert found.replays["vision"] == 4


@contextlib.contextmanager
def without(found, model):
    """The model without its graphs, which stay as they are."""
    base = model.base_model
    kept = base.__dict__.pop("_vtc_graphs")
    forward = base.language_model.__dict__.pop("forward")
    try:
        yield
    finally:
        base.__dict__["_vtc_graphs"], base.language_model.__dict__["forward"] = kept, forward
    assert kept is found


def scale_in_place(model):
    model.lm_head.weight.data.mul_(1.5)
    model.model.language_model.layers[0].mlp.up_proj.weight.data.mul_(1.2)
    model.model.vision_tower.get_submodule("encoder.layers.0.mlp.fc1").weight.data.mul_(1.2)


def replace_data(model):
    for part in (model.model.language_model.layers[0].mlp.up_proj, model.model.multi_modal_projector.linear_1):
        part.weight.data = part.weight.data * 1.2


def replace_parameter(model):
    part = model.model.language_model.layers[1].self_attn.q_proj
    part.weight = torch.nn.Parameter(part.weight * 1.2)


def replace_module(model):
    layer = model.model.language_model.layers[1]
    layer.mlp = copy.deepcopy(layer.mlp)
    layer.mlp.down_proj.weight.data.mul_(1.2)


def replace_projector(model):
    model.model.multi_modal_projector = copy.deepcopy(model.model.multi_modal_projector)
    model.model.multi_modal_projector.linear_1.weight.data.mul_(1.2)


def replace_tower(model):
    model.model.vision_tower = copy.deepcopy(model.model.vision_tower)
    model.model.vision_tower.get_submodule("encoder.layers.0.mlp.fc1").weight.data.mul_(1.2)


def run_fewer_layers(model):
    model.model.language_model.config.num_hidden_layers = 1


def change_dtype(model):
    model.double()


REPLACED = [replace_data, replace_parameter, replace_module, replace_projector, replace_tower]
CHANGES = [scale_in_place, *REPLACED, run_fewer_layers, change_dtype]


@pytest.mark.supported("Graphs", "weights that move, change, or get another dtype")
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_model_that_changes(model, call, change):
    found = played.switch_on(model)
    before = answer(model, call)
    change(model)
    if change is change_dtype:
        call["pixel_values"] = call["pixel_values"].double()
    with without(found, model):
        expected = answer(model, call)
    assert not torch.equal(expected.logits[0], before.logits[0])
    same(answer(model, call), expected)
    assert found.replays == {"vision": 2, "prompt": 2, "step": 12}


def test_modules_that_are_compiled_are_a_change():
    module = torch.nn.Sequential(torch.nn.Linear(2, 2))
    before = State([module])
    assert not before.has_changed()
    module[0].compile(backend="eager")
    assert before.has_changed()


@pytest.mark.supported("Graphs", "LoRA from peft: switched, scaled, merged")
def test_lora(call):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(models.build(), config).eval()
    vtc.enable(model, keep=KEEP)
    inner = model.get_base_model()
    found = played.switch_on(inner)

    def check():
        with without(found, inner):
            expected = answer(model, call)
        same(answer(model, call), expected)
        return expected.logits[0]

    seen = [check()]
    with model.disable_adapter():
        seen.append(check())
    seen.append(check())
    model.merge_adapter()
    check()
    model.unmerge_adapter()
    for module in inner.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.scale_layer(3.0)
    seen.append(check())
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[3])
    close([seen[2]], [seen[0]])
    assert found.replays["prompt"] == 5
    assert not found.refusals


class Doubled(torch.Tensor):
    """A tensor that holds another, as quantized weights do. It has no memory of its own."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(func)


def test_tensors_inside_of_weights():
    module = torch.nn.Linear(2, 2)
    module.weight = torch.nn.Parameter(Doubled(torch.ones(2, 2)), requires_grad=False)
    before = State([module])
    assert not before.has_changed()
    module.weight.inner = module.weight.inner.clone()
    assert before.has_changed()


def test_weights_without_memory():
    module = torch.nn.Linear(2, 2)
    module.register_buffer("sparse", torch.eye(2).to_sparse())
    before = State([module])
    assert not before.has_changed()
    module.sparse = torch.eye(2).to_sparse()
    assert before.has_changed()


def test_the_configuration_that_the_stock_model_reads(model, call):
    vtc.configure(model, method="none")
    found = played.switch_on(model)
    features = []
    with torch.no_grad():
        for layer in (-2, -3, -2):
            model.config.vision_feature_layer = layer
            features.append(torch.cat(list(model.get_image_features(call["pixel_values"]).pooler_output)))
    assert not torch.allclose(features[0], features[1])
    close([features[2]], [features[0]])
    assert found.replays["vision"] == 3


def test_a_method_that_is_defined_again(model, call):
    """As in a notebook: the new class needs more of the tower."""
    found = played.switch_on(model)
    for needs in (Needs(cls_probs=True), Needs(cls_probs=True, keys="last")):
        has_keys = []

        class Mine(VTCCLS):
            name = "mine"

            def ranking(self, outputs, has_keys=has_keys):
                has_keys.append(outputs.keys is not None)
                return super().ranking(outputs)

        Mine.needs = needs
        with vtc.compress(model, method=Mine()):
            answer(model, call)
        assert set(has_keys) == {needs.keys is not None}
    assert found.replays["vision"] == 2


# Calls that are not replayed


def hooked(model):
    return model.model.language_model.layers[0].register_forward_hook(lambda module, args, output: output * 1.1).remove


def hooked_before(model):
    return model.model.language_model.layers[0].register_forward_pre_hook(lambda module, args: None).remove


def hooked_all(model):
    return torch.nn.modules.module.register_module_forward_hook(lambda module, args, output: None).remove


def training(model):
    model.train()
    return model.eval


def replaced_forward(model):
    layer = model.model.language_model.layers[0]
    layer.forward = layer.forward
    return lambda: layer.__dict__.pop("forward")


def replaced_projector(model):
    projector = model.model.multi_modal_projector
    stock = projector.forward
    projector.forward = lambda features: 1.1 * stock(features)
    return lambda: projector.__dict__.pop("forward")


HINDRANCES = {
    hooked: "language model: there are hooks on its modules",
    hooked_before: "language model: there are hooks on its modules",
    hooked_all: "language model: there are hooks on all modules",
    training: "language model: it is in training mode; use model.eval()",
    replaced_projector: "vision tower: the forward() of a module was replaced, as accelerate does to move weights",
    replaced_forward: "language model: the forward() of a module was replaced, as accelerate does to move weights",
}


@pytest.mark.supported("Graphs", "hooks, gradients, training, `output_attentions`: these calls run as without graphs")
@pytest.mark.parametrize("hinder", HINDRANCES, ids=lambda hinder: hinder.__name__)
def test_what_hinders_is_named_once(model, call, caplog, hinder):
    found = played.switch_on(model)
    answer(model, call)
    undo = hinder(model)
    try:
        with without(found, model):
            expected = answer(model, call)
        one, _ = answer(model, call), answer(model, call)
        same(one, expected)
    finally:
        undo()
    reason = HINDRANCES[hinder]
    assert found.refusals[reason] == (2 if reason.startswith("vision") else 14)
    clause = reason.partition(": ")[2]
    assert sum(clause in text for text in caplog.messages) == 1
    count = found.refusals.copy()
    answer(model, call)
    assert found.refusals == count
    assert found.replays["prompt"] == (4 if reason.startswith("vision") else 2)


def test_what_runs_out_of_memory_is_tried_again(model, call, monkeypatch):
    real, failing = played.PlayedRecorder.record, [True]

    def record(*args):
        if failing:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args)

    monkeypatch.setattr(played.PlayedRecorder, "record", record)
    found = played.switch_on(model)
    expected = answer(model, call)
    assert not found.replays
    why = "there is too little memory to record it"
    assert found.refusals == {f"vision tower: {why}": 2, f"language model: {why}": 7}
    failing.clear()
    same(answer(model, call), expected)
    assert found.replays == {"vision": 1, "prompt": 1, "step": 6}


def test_the_newer_words_for_tf32(model, call, monkeypatch):
    """After them, PyTorch refuses to answer in the older ones."""
    found = played.switch_on(model)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        answer(model, call)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    count = len(found)
    answer(model, call)
    assert len(found) == 2 * count


def test_flags_of_pytorch_choose_other_graphs(model, call):
    found = played.switch_on(model)
    answer(model, call)
    count = len(found)
    torch.use_deterministic_algorithms(True)
    try:
        answer(model, call)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(found) == 2 * count
    answer(model, call)
    assert len(found) == 2 * count


def test_a_window_of_the_attention(model, call):
    """Llama's attention has none, but the graphs look at the config only."""
    model.model.language_model.config.sliding_window = 26  # after some steps
    found = played.switch_on(model)
    for text in (3, 8, 19):
        answer(model, inputs([models.ids(text, "image", 5)]), past_key_values=DynamicCache())
    assert found.replays == {"vision": 3, "prompt": 2, "step": 6 + 3}
    assert found.refusals == {"language model: more columns than the attention's window has": 3 + 7}


def test_what_cannot_be_recorded_is_tried_once(model, call, monkeypatch):
    tried = []

    def record(self, function, inputs, outputs):
        tried.append(function)
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(played.PlayedRecorder, "record", record)
    expected = answer(model, call)
    found = played.switch_on(model)
    for _ in range(2):
        one = answer(model, call)
        assert all(map(torch.equal, one.logits, expected.logits))
    assert len(tried) == 4  # the tower with the selection, the tower alone, the prompt, a step
    why = "it cannot be recorded: operation not permitted when stream is capturing"
    assert found.refusals == {f"vision tower: {why}": 4, f"language model: {why}": 14}


def test_another_attention(model, call):
    AttentionInterface.register("mine", sdpa_attention_forward)
    AttentionMaskInterface.register("mine", sdpa_mask)
    model.model.language_model.config._attn_implementation = "mine"
    expected = answer(model, call)
    found = played.switch_on(model)
    same(answer(model, call), expected)
    assert found.replays == {"vision": 1}
    model.model.language_model.config._attn_implementation = "sdpa"
    same(answer(model, call), expected)
    model.set_attn_implementation({"text_config": "eager", "vision_config": "vtc"})
    same(answer(model, call), expected)
    assert found.replays == {"vision": 3, "prompt": 2, "step": 12}
    with vtc.compress(model):
        model.set_attn_implementation({"vision_config": "sdpa"})
        same(answer(model, call), expected)
    assert sum(key[0] == "views" for key, _ in found._recorded._functions) == 2


def test_a_cache_that_is_offloaded():
    cache = types.SimpleNamespace(offloading=True)
    with pytest.raises(Refused, match="a cache that is offloaded"):
        language_calls._require_whole(types.SimpleNamespace(config=None), cache, 3)


def test_which_caches_fit_into_a_window():
    window = Window(torch.zeros(4, 2, 3, 256, 8))

    def cache(shapes, dtype=torch.float32):
        made = DynamicCache()
        for number, shape in enumerate(shapes):
            made.update(torch.ones(shape, dtype=dtype), torch.ones(shape, dtype=dtype), number)
        return made

    fits, shorter, other = (2, 3, 5, 8), (2, 3, 4, 8), (2, 1, 5, 8)
    assert window.fits(cache([fits, fits]), 5)
    assert not window.fits(cache([fits, fits]), 6)
    assert not window.fits(cache([fits, shorter]), 5)
    assert not window.fits(cache([other, other]), 5)
    assert not window.fits(cache([fits]), 5)
    assert not window.fits(cache([fits, fits], torch.float64), 5)


@torch.no_grad()
def test_a_cache_whose_layers_differ(model):
    language, embeds = model.model.language_model, model.get_input_embeddings()(torch.tensor([[7]]))

    def step():
        cache, generator = DynamicCache(), torch.Generator().manual_seed(0)
        for number, columns in enumerate((5, 4)):
            cache.update(*torch.randn(2, 1, 2, columns, 16, generator=generator), number)
        return language(inputs_embeds=embeds, use_cache=True, **{names.CACHE: cache}).last_hidden_state

    expected = step()
    found = played.switch_on(model)
    with found._language.generating(5, own_masks=True):
        assert torch.equal(step(), expected)
    assert found.refusals == {"language model: a cache whose layers differ, or are not those of this model": 1}


@torch.no_grad()
def test_tensors_among_the_towers_arguments():
    model = models.build(tower="dinov2")
    vtc.enable(model, keep=KEEP)
    pixels = models.images(1)
    masks = [torch.arange(TOKENS)[None] < count for count in (9, 20)]
    encode = model.model.get_image_features
    expected = [encode(pixels, bool_masked_pos=mask).last_hidden_state for mask in masks]
    assert not torch.equal(*expected)
    found = played.switch_on(model)
    for _ in range(2):
        close([encode(pixels, bool_masked_pos=mask).last_hidden_state for mask in masks], expected)
    assert not found.replays
    assert not found.refusals


@pytest.mark.parametrize("option", ["output_attentions", "output_hidden_states"])
def test_outputs_that_graphs_do_not_have(model, call, option):
    model.set_attn_implementation({"text_config": "eager"})
    expected = answer(model, call, **{option: True})
    found = played.switch_on(model)
    one = answer(model, call, **{option: True})
    name = option.removeprefix("output_")
    for mine, theirs in zip(one[name], expected[name], strict=True):
        close(mine, theirs)
    assert not found.replays["prompt"]
    assert found.refusals[f"language model: the argument {option} of its forward()"] == 7


def test_gradients(model, call):
    found = played.switch_on(model)
    loss = model(**call, labels=call["input_ids"].masked_fill(call["attention_mask"] == 0, -100).clamp(max=2)).loss
    loss.backward()
    assert model.model.language_model.layers[0].mlp.up_proj.weight.grad.abs().max() > 0
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().max() > 0
    assert not found.replays
    assert set(found.refusals) == {
        f"{part}: gradients are computed; use torch.no_grad()" for part in ("vision tower", "language model")
    }


def test_autocast(model, call):
    found = played.switch_on(model)
    with torch.autocast("cpu", torch.bfloat16):
        answer(model, call)
    assert not found.replays
    assert found.refusals["language model: autocast is on"] == 7


def test_a_static_cache_is_filled_in_place(model, call):
    expected = answer(model, call, cache_implementation="static")
    found = played.switch_on(model)
    same(answer(model, call, cache_implementation="static"), expected)
    assert found.replays == {"vision": 1, "prompt": 1}
    assert found.refusals == {
        "language model: a step with a StaticCache, or with layers of it that are no DynamicLayer": 6
    }


@torch.no_grad()
def test_a_mask_of_four_dimensions_from_a_caller(model):
    embeds = model.get_input_embeddings()(torch.tensor([[5, 6, 7]]))
    language, mask = model.model.language_model, torch.ones(1, 1, 3, 3, dtype=torch.bool)  # each token sees all
    expected = language(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
    found = played.switch_on(model)
    assert torch.equal(language(inputs_embeds=embeds, attention_mask=mask).last_hidden_state, expected)
    assert found.refusals == {"language model: a mask of other rows and columns than the prompt's": 1}


@torch.no_grad()
def test_samples_packed_in_a_row(model):
    embeds = model.get_input_embeddings()(torch.tensor([[5, 6, 7, 8, 9, 10]]))
    language, positions = model.model.language_model, torch.tensor([[0, 1, 2, 0, 1, 2]])
    call = {"inputs_embeds": embeds, "position_ids": positions, "use_cache": False}
    expected = language(**call).last_hidden_state
    found = played.switch_on(model)
    assert torch.equal(language(**call).last_hidden_state, expected)
    assert not found.replays


@torch.no_grad()
def test_forward_by_hand(model, call):
    found = played.switch_on(model)

    def two_tokens():
        out = model(**call)
        token = out.logits[:, -1:].argmax(-1)
        mask = torch.cat([call["attention_mask"], torch.ones_like(token)], 1)
        cache = {key: value for key, value in out.items() if key in ("cache", "past_key_values")}
        return out.logits, model(input_ids=token, attention_mask=mask, **cache).logits

    replayed = two_tokens()
    with without(found, model):
        close(replayed, two_tokens())
    assert found.replays == {"vision": 1, "prompt": 1}
    assert found.refusals == {"language model: one token outside of generate()": 1}


# Caches


def cache_of(out):
    return out.get("cache", out.get("past_key_values"))


def test_caches_keep_their_values(model, call):
    found = played.switch_on(model)
    first = answer(model, call)
    kept = [(layer.keys.clone(), layer.values.clone()) for layer in cache_of(first).layers]
    tensors = [(layer.keys, layer.values) for layer in cache_of(first).layers]
    answer(model, inputs(prompts("unequal_images")))
    cache = weakref.ref(cache_of(first))
    del first  # and with it the cache; its tensors stay
    gc.collect()
    assert cache() is None
    answer(model, inputs(prompts("unequal_images")))
    for now, before in zip(tensors, kept, strict=True):
        assert all(map(torch.equal, now, before))
    assert found.replays["prompt"] == 3


@torch.no_grad()
def test_outputs_keep_their_values(model):
    found = played.switch_on(model)
    calls = [inputs([models.ids(text, "image", seed=text)]) for text in (5, 6)]
    embeds = model.get_input_embeddings()(torch.tensor([[5, 6, 7]]))
    first = model.model(**calls[0])
    tensors = [layer.keys for layer in cache_of(first).layers]
    tensors.append(model.model.language_model(inputs_embeds=embeds).last_hidden_state)
    tensors.append(model.get_image_features(calls[0]["pixel_values"]).last_hidden_state)
    kept = [each.clone() for each in tensors]
    model.model(**calls[1])
    model.get_image_features(models.images(1, seed=3))
    assert all(map(torch.equal, tensors, kept))
    assert found.replays == {"vision": 4, "prompt": 3}


def test_reasons_do_not_grow_with_the_shapes(model, call):
    """A server's log would fill."""
    found = played.switch_on(model)
    for text in (3, 9, 20):
        cache = DynamicCache()
        first = answer(model, inputs([models.ids(text, "image", 5)]), past_key_values=cache).sequences
        longer = torch.cat([first, torch.full((1, text), 7)], 1)
        answer(model, {"input_ids": longer, "attention_mask": torch.ones_like(longer)}, past_key_values=cache)
    assert set(found.refusals) == {"language model: several tokens on top of a cache"}


@pytest.mark.supported("Graphs", "further turns on a returned cache, and on one that was cropped, reordered or copied")
@pytest.mark.parametrize("change", ["none", "crop", "reorder", "deepcopy", "select"])
def test_further_turns(model, call, change):
    def turns():
        first = answer(model, call)
        cache, sequences = cache_of(first), first.sequences
        if change == "crop":
            cache.crop(-2)
        elif change == "reorder":
            cache.reorder_cache(torch.tensor([0, 1, 2]))
        elif change == "deepcopy":
            cache = copy.deepcopy(cache)
        elif change == "select":
            cache.batch_select_indices(torch.tensor([2, 0]))
            sequences = sequences[[2, 0]]
        longer = torch.cat([sequences, torch.full((len(sequences), 4), 7)], 1)
        pad = torch.zeros(len(sequences), longer.shape[1] - call["input_ids"].shape[1]).long() + 1
        mask = torch.cat([call["attention_mask"] if change != "select" else call["attention_mask"][[2, 0]], pad], 1)
        return first, answer(model, {"input_ids": longer, "attention_mask": mask}, past_key_values=cache)

    expected = turns()
    found = played.switch_on(model)
    for mine, theirs in zip(turns(), expected, strict=True):
        same(mine, theirs)
    assert found.replays["step"] >= 11


def test_columns_are_copied_once(model, call, monkeypatch):
    found, copies, copy_all = played.switch_on(model), [], torch._foreach_copy_
    answer(model, call)
    monkeypatch.setattr(torch, "_foreach_copy_", lambda *args: copies.append(args) or copy_all(*args))
    answer(model, call)
    assert found.replays["step"] == 12
    assert len(copies) == 1


def test_two_caches_in_turn(model, call):
    """Each step of a generation takes the memory from the other."""
    found = played.switch_on(model)
    other = inputs(prompts("left_padded")[::-1])
    expected = [answer(model, each).sequences for each in (call, other)]
    results = {}

    def run(name, each):
        results[name] = [answer(model, each).sequences for _ in range(3)]

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate((call, other))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, sequences in enumerate(expected):
        assert all(torch.equal(each, sequences) for each in results[number])
    assert found.replays["step"] == 8 * 6


def test_threads_while_graphs_are_recorded(model, call):
    """A thread that records is alone: calls of others are no parts of what it records."""
    model.generation_config.eos_token_id = None
    found, seen = played.switch_on(model), []
    expected = answer(model, call).sequences
    stop = threading.Event()

    def other():
        while not stop.is_set():
            found._recorded.forget(lambda key: key[0] == "prompt")
            answer(model, inputs([models.ids(5, "image")]), max_new_tokens=3)

    thread = threading.Thread(target=other)
    thread.start()
    try:
        seen += [answer(model, call).sequences for _ in range(8)]
    finally:
        stop.set()
        thread.join()
    assert all(torch.equal(each, expected) for each in seen)
    assert not found.refusals


def test_only_the_thread_that_records_is_recording(model):
    recorded, seen = played.switch_on(model)._recorded, []

    def look():
        thread = threading.Thread(target=lambda: seen.append(recorded.is_recording))
        thread.start()
        thread.join()
        seen.append(recorded.is_recording)

    recorded.place(torch.device("cpu")) if not torch.is_grad_enabled() else None
    recorded.get("key", look)
    look()
    assert seen == [False, True, False, False]


def test_graphs_that_are_dropped_by_another_thread(model, call):
    expected = answer(model, call)
    found, stop = played.switch_on(model), threading.Event()

    def drop():
        while not stop.wait(0.01):
            found.drop()

    thread = threading.Thread(target=drop)
    thread.start()
    try:
        for _ in range(10):
            same(answer(model, call), expected)
    finally:
        stop.set()
        thread.join()


def test_dropping_waits_for_the_call_of_another_thread(model, call):
    found = played.switch_on(model)
    answer(model, call)
    thread = threading.Thread(target=found.drop)
    with found._recorded.lock:
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        assert found._language._windows
        assert len(found) == 3
    thread.join()
    assert not found._language._windows
    assert len(found) == 0


def test_an_answer_that_is_interrupted(model, call):
    """Its cache has memory of its own, whatever becomes of it."""

    class Interrupted(Exception):
        pass

    def stop(ids, scores):
        if ids.shape[1] > call["input_ids"].shape[1] + 2:
            raise Interrupted
        return torch.zeros(len(ids), dtype=torch.bool)

    expected = answer(model, call)
    found, cache = played.switch_on(model), DynamicCache()
    with pytest.raises(Interrupted):
        answer(model, call, past_key_values=cache, stopping_criteria=[stop])
    assert found._language._windows[3]._cache() is None
    kept = [layer.keys.clone() for layer in cache.layers]
    same(answer(model, call), expected)
    assert all(map(torch.equal, kept, [layer.keys for layer in cache.layers]))


def test_columns_that_move_within_the_memory_are_copied_first(monkeypatch):
    """A GPU copies all elements at once, in no order."""
    window, cache, sources = Window(torch.zeros(2, 1, 1, 256, 4)), DynamicCache(), []
    values = torch.arange(24.0).reshape(1, 1, 6, 4)
    cache.update(values, values + 1, 0)
    window.take(cache)
    window.give(cache, 6)
    cache.layers[0].keys, cache.layers[0].values = (x[:, :, 2:] for x in (cache.layers[0].keys, cache.layers[0].values))
    copy_all = torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda to, given: sources.extend(given) or copy_all(to, given))
    window.take(cache)
    assert torch.equal(window.kv[:, 0, 0, :4], torch.cat([values, values + 1])[:, 0, 2:])
    assert window.kv.untyped_storage().data_ptr() not in {each.untyped_storage().data_ptr() for each in sources}


@pytest.mark.parametrize("change", [lambda cache: cache.reset(), lambda cache: cache.layers.clear()])
def test_a_cache_that_is_emptied_while_its_columns_are_here(change):
    window, cache = Window(torch.ones(2, 1, 1, 256, 4)), DynamicCache()
    cache.update(torch.ones(1, 1, 3, 4), torch.ones(1, 1, 3, 4), 0)
    window.take(cache)
    window.give(cache, 3)
    change(cache)
    window.release()
    assert not cache.layers or cache.get_seq_length() == 0 or not cache.layers[0].keys.any()


def test_assisted_decoding(model, call):
    assistant, one = models.build(seed=1), inputs(prompts("one"))
    vtc.enable(assistant, keep=KEEP)
    expected = model.generate(**one, max_new_tokens=12, do_sample=False, assistant_model=assistant)
    played.switch_on(assistant)
    found = played.switch_on(model)
    assert torch.equal(model.generate(**one, max_new_tokens=12, do_sample=False, assistant_model=assistant), expected)
    assert found.replays["vision"] == 1


def test_inference_mode_and_then_none(model, call):
    expected = answer(model, call)
    found = played.switch_on(model)
    with torch.inference_mode():
        same(answer(model, call), expected)
    same(answer(model, call), expected)
    with torch.inference_mode():
        same(answer(model, call), expected)
    assert found.replays == {"vision": 3, "prompt": 3, "step": 18}


def test_a_cache_of_the_caller(model):
    call = inputs(prompts("one"))
    expected = answer(model, call)
    found, cache = played.switch_on(model), DynamicCache()
    same(answer(model, call, past_key_values=cache), expected)
    assert cache.get_seq_length() == cache_of(expected).get_seq_length()
    close([layer.keys for layer in cache.layers], [layer.keys for layer in cache_of(expected).layers])
    assert found.replays["step"] == 6


def test_a_recording_in_the_middle_of_an_answer(model):
    """It runs a step, which must not write into the cache of this answer, or of another that goes on."""
    model.generation_config.eos_token_id = None
    one = inputs(prompts("one"))
    expected = answer(model, one, max_new_tokens=300)
    found = played.switch_on(model, limit=1)  # the steps for 512 columns are recorded anew after those for 256
    same(answer(model, one, max_new_tokens=300), expected)
    assert found.replays["step"] == 299

    found = played.switch_on(model)
    answer(model, one, max_new_tokens=300)
    (window,) = found._language._windows.values()
    cache = DynamicCache()
    for number in range(2):
        cache.update(torch.ones(1, 2, 5, 16), torch.ones(1, 2, 5, 16), number)
    window.take(cache)  # as in another thread, whose answer goes on
    window.give(cache, 5)
    found._recorded.forget(lambda key: key[0] == "step")
    answer(model, one)
    assert all((layer.keys == 1).all() for layer in cache.layers)


def test_a_broken_image_breaks_no_other_answer(model):
    call = inputs(prompts("one"))
    expected = answer(model, call)
    found = played.switch_on(model)
    broken = answer(
        model, call | {"pixel_values": torch.full_like(call["pixel_values"], float("nan"))}, max_new_tokens=40
    )
    assert broken.logits[-1].isnan().all()
    same(answer(model, call), expected)
    assert found.replays["prompt"] == 2


# Copies, memory


def test_a_copy_has_no_graphs(model, call):
    expected = answer(model, call)
    found = played.switch_on(model)
    answer(model, call)
    twin = copy.deepcopy(model)
    twin.model.language_model.layers[0].mlp.up_proj.weight.data.mul_(1.2)
    seen = found.replays.copy()
    assert not torch.equal(answer(twin, call).logits[0], expected.logits[0])
    assert found.replays == seen
    same(answer(model, call), expected)
    assert played.switch_on(twin) is not found  # a copy may have its own
    twin.model.language_model.layers[0].mlp.up_proj.weight.data.copy_(
        model.model.language_model.layers[0].mlp.up_proj.weight
    )
    same(answer(twin, call), expected)


def test_pickling(model, call):
    expected = answer(model, call)
    fresh = models.build()  # transformers' hooks of a model that has run cannot be pickled
    vtc.enable(fresh, keep=KEEP)
    played.switch_on(fresh)
    file = io.BytesIO()
    torch.save(fresh, file)
    file.seek(0)
    same(answer(torch.load(file, weights_only=False), call), expected)


def test_a_model_is_freed_at_once():
    model = models.build()
    vtc.enable(model, keep=KEEP)
    found = played.switch_on(model)
    answer(model, inputs(prompts("one")))
    seen = [weakref.ref(each) for each in (model.model, model.model.language_model, found)]
    gc.collect()
    gc.disable()
    try:
        del model, found
        assert [ref() for ref in seen] == [None] * 3
    finally:
        gc.enable()


@pytest.mark.parametrize("close_it", [lambda model, found: found.close(), lambda model, found: vtc.disable(model)])
def test_closing(model, call, close_it):
    found = played.switch_on(model)
    answer(model, call)
    close_it(model, found)
    assert len(found) == 0
    assert graphs.of(model.model) is None
    assert "forward" not in vars(model.model.language_model)
    vtc.enable(model, keep=KEEP)
    seen = found.replays.copy()
    answer(model, call)
    assert found.replays == seen
    found.close()  # twice is once


def test_new_graphs_take_the_place_of_the_old(model, call):
    first = played.switch_on(model)
    answer(model, call)
    second = played.switch_on(model)
    answer(model, call)
    assert len(first) == 0
    assert second.replays["prompt"] == 1
    first.close()  # which no longer are the model's
    answer(model, call)
    assert second.replays["prompt"] == 2


# What is said


def test_what_a_block_reports(model, call):
    played.switch_on(model)
    with vtc.compress(model) as run:
        answer(model, call)
        undo = hooked(model)
        answer(model, call)
        undo()
    assert run.replays == {"vision": 2, "prompt": 1, "step": 6}
    assert run.refusals == {"language model: there are hooks on its modules": 7}
    lines = run.report().splitlines()
    assert lines[-2:] == [
        "replayed from graphs: vision 2, prompt 1, step 6",
        "not replayed: language model: there are hooks on its modules (7)",
    ]
    with vtc.compress(model) as run:
        pass
    assert run.replays == {}


def test_status(model, call):
    assert vtc.status(model).graphs is None
    found = played.switch_on(model)
    answer(model, call)
    text = "graphs: 3 recorded\nreplayed: vision 1, prompt 1, step 6"
    assert vtc.status(model).graphs == str(found) == text
    assert str(vtc.status(model)).endswith(text)


def test_on_a_cpu_there_is_nothing_to_gain(model, call, caplog):
    expected = answer(model, call)
    made = vtc.graphs(model)
    why = "the model is on a CPU, where graphs gain nothing: computing takes longer than launching"
    assert caplog.messages[-1] == f"graphs are switched on, but nothing is replayed: {why}"
    said = len(caplog.messages)
    one = answer(model, call)
    assert all(map(torch.equal, one.logits, expected.logits))
    assert not made.replays
    assert made.refusals == {f"vision tower: {why}": 1, f"language model: {why}": 7}
    assert not [text for text in caplog.messages[said:] if "graph" in text]


def test_a_model_that_does_not_compress_is_named(caplog):
    vtc.graphs(models.build())
    assert "graphs act on models that compress, and this one does not; vtc.enable(model) switches it on" in (
        caplog.messages
    )


# Ahead


def on_a_cpu(model, monkeypatch):
    """Let `vtc.graphs` take the stand-in."""
    monkeypatch.setattr(graphs, "recorder_of", played.recorder(model.model))
    monkeypatch.setattr(graphs, "why_not", lambda device: None)


def test_nothing_is_warmed_up_where_nothing_is_replayed(model, monkeypatch):
    monkeypatch.setattr(model, "generate", None)
    assert len(vtc.graphs(model, warm_up=[(1, TOKENS + 6)])) == 0


def test_a_model_that_does_not_compress_is_not_warmed_up():
    model = models.build()
    with pytest.raises(ValueError, match=r"warm_up needs a model that compresses.*vtc.enable\(model\) first"):
        vtc.graphs(model, warm_up=[(1, TOKENS + 6)])
    assert graphs.of(model.model) is None


def test_warm_up_of_a_model_with_several_ends(model, monkeypatch):
    model.config.text_config.eos_token_id = [1, 2]
    on_a_cpu(model, monkeypatch)
    assert vtc.graphs(model, warm_up=[(1, TOKENS + 6)]).replays["step"] == 1


def test_warm_up(model, monkeypatch):
    on_a_cpu(model, monkeypatch)
    made = vtc.graphs(model, warm_up=[(1, TOKENS + 6), (2, TOKENS + 60, 400)])
    assert sorted(key[:3] for key, _ in made._recorded._functions if key[0] != "views") == [
        ("prompt", 1, 32), ("prompt", 2, 96), ("step", 1, 256), ("step", 1, 512), ("step", 2, 256), ("step", 2, 512),
    ]  # fmt: skip
    count = len(made)
    assert count == 8
    answer(model, inputs([models.ids(5, "image")]))
    answer(model, inputs([models.ids(58, "image", seed=s) for s in range(2)]), max_new_tokens=300)
    assert len(made) == count
    assert not made.refusals


def test_the_largest_prompts_are_warmed_up_first(model):
    """So that smaller ones share their memory."""
    made = warm_up.calls(model.model, TOKENS, [(1, 50), (2, 60, 9), (1, 70)])
    assert [(*call["input_ids"].shape, new) for call, new in made] == [(2, 60, 9), (1, 70, 256), (1, 50, 256)]


def test_warm_up_of_a_model_that_has_nothing_to_say(model, monkeypatch):
    """The first token of the answer may end it."""
    model.generation_config.eos_token_id = list(range(1, models.VOCAB))
    on_a_cpu(model, monkeypatch)
    made = vtc.graphs(model, warm_up=[(1, TOKENS + 6)])
    assert made.replays == {"vision": 1, "prompt": 1, "step": 1}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([(1,)], r"warm_up must be pairs \(batch, length\), or \(batch, length, new tokens\), got \(1,\)"),
        ([(0, 50)], "warm_up must be pairs"),
        ([(1, 50.0)], "warm_up must be pairs"),
        ([7], "warm_up must be pairs"),
        ([(1, TOKENS)], f"a prompt of {TOKENS} tokens, but an image alone has {TOKENS}"),
    ],
)
def test_sizes_that_are_not_accepted(model, sizes, message):
    with pytest.raises(ValueError, match=message):
        vtc.graphs(model, warm_up=sizes)
    assert graphs.of(model.model) is None


def test_tiles_cannot_be_warmed_up():
    model = models.build(family="llava_next")
    vtc.enable(model, keep=KEEP)
    with pytest.raises(ValueError, match=r"LLaVA-NeXT \(1.6\) cuts it into tiles; leave it out"):
        vtc.graphs(model, warm_up=[(1, 100)])


def test_arguments_that_are_not_accepted(model):
    with pytest.raises(ValueError, match="limit must be a number of graphs of at least 1, got 0"):
        vtc.graphs(model, limit=0)
    with pytest.raises(ValueError, match="warm_up needs a model that generates, got a LlavaModel"):
        vtc.graphs(model.model, warm_up=[(1, 100)])
    with pytest.raises(ValueError, match="Linear holds no LLaVA model"):
        vtc.graphs(torch.nn.Linear(2, 2))


@pytest.mark.refused("`vtc.graphs` on a model whose weights accelerate moves", "load it on one device")
def test_a_forward_that_others_replaced(model):
    language = model.model.language_model
    own = language.forward
    language.forward = lambda *args, **kwargs: own(*args, **kwargs)
    with pytest.raises(ValueError, match=r"forward\(\) of the LlamaModel was replaced, as accelerate does"):
        vtc.graphs(model)
    assert graphs.of(model.model) is None


def test_a_language_model_that_was_replaced(model, call):
    found = played.switch_on(model)
    model.model.language_model = copy.deepcopy(model.model.language_model)
    model.model.language_model.layers[0].mlp.up_proj.weight.data.mul_(1.2)
    answer(model, call)
    assert found.replays == {"vision": 1}
    assert found.refusals == {"language model: it or its forward() was replaced; use vtc.graphs(model) again": 1}
    again = played.switch_on(model)
    with without(again, model):
        expected = answer(model, call)
    same(answer(model, call), expected)
    assert again.replays == {"vision": 1, "prompt": 1, "step": 6}


def test_a_forward_that_others_wrap(model, call):
    """As accelerate does when it offloads a model that has graphs."""
    expected = answer(model, call)
    found = played.switch_on(model)
    language = model.model.language_model
    own = language.forward
    language.forward = lambda *args, **kwargs: own(*args, **kwargs)
    one = answer(model, call)
    assert all(map(torch.equal, one.logits, expected.logits))
    assert found.replays == {"vision": 1}
    assert found.refusals == {"language model: it or its forward() was replaced; use vtc.graphs(model) again": 1 + 7}


# Compiled


def test_code_is_compiled_for_more_shapes_than_torch_compile_takes(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    run = graphs._compiled(lambda x: x + 1)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for length in range(1, 20):
            assert torch.equal(run(torch.zeros(length)), torch.ones(length))
    torch._dynamo.reset()


@pytest.mark.supported("Graphs", "of compiled code: `compile=True`")
def test_compiled_code(model, call):
    torch._dynamo.reset()
    expected = answer(model, call)
    found = played.switch_on(model, compile=True)
    for _ in range(2):
        same(answer(model, call), expected)
    assert not found.refusals
    assert found.replays == {"vision": 2, "prompt": 2, "step": 12}
    torch._dynamo.reset()


# On a GPU


@pytest.fixture
def on_gpu(model, call):
    if not torch.cuda.is_available():
        pytest.skip("a graph needs a GPU")
    model.to("cuda")
    call.update({name: each.cuda() for name, each in call.items()})
    return model


@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=["greedy", "beams", "static"]
)
def test_gpu_answers(on_gpu, call, how):
    expected = answer(on_gpu, call, **how)
    found = vtc.graphs(on_gpu)
    for _ in range(3):
        same(answer(on_gpu, call, **how), expected)
    assert (found.replays["vision"], found.replays["prompt"]) == (3, 3)
    assert how or not found.refusals


def test_gpu_half_precision_and_compiled_code(on_gpu, call):
    on_gpu.bfloat16()
    call["pixel_values"] = call["pixel_values"].bfloat16()
    expected = answer(on_gpu, call, max_new_tokens=1)
    found = vtc.graphs(on_gpu, compile=True)
    for _ in range(2):
        torch.testing.assert_close(answer(on_gpu, call, max_new_tokens=1).logits, expected.logits, rtol=0.1, atol=0.1)
    assert found.replays == {"vision": 2, "prompt": 2}, found


def test_gpu_graphs_come_and_go(on_gpu):
    """The memory of libraries and of graphs that left must not be what others read."""
    calls = [
        inputs([models.ids(text, "image", seed=s) for s in range(batch)]) for text, batch in ((5, 1), (40, 2), (80, 3))
    ]
    calls = [{name: each.cuda() for name, each in one.items()} for one in calls]
    expected = [answer(on_gpu, one) for one in calls]
    found = vtc.graphs(on_gpu, limit=2)
    for _ in range(4):
        for one, before in zip(calls, expected, strict=True):
            same(answer(on_gpu, one), before)
            torch.cuda.empty_cache()
    assert found.replays["step"] == 4 * 3 * 6


def test_gpu_a_capture_that_fails_breaks_no_other(on_gpu, call):
    recorder, x = CudaRecorder(torch.device("cuda", torch.cuda.current_device())), torch.zeros(4, device="cuda")
    stream = torch.cuda.current_stream()
    for _ in range(2):
        with pytest.raises(RuntimeError):
            recorder.record(torch.cuda.synchronize, [], [])
        assert torch.cuda.current_stream() == stream
        replay = recorder.record(lambda: x.add_(1), [x], [x])
        x.zero_()
        replay()
        replay()
        assert x.tolist() == [2.0] * 4
    expected = answer(on_gpu, call)
    vtc.graphs(on_gpu)
    same(answer(on_gpu, call), expected)


def test_gpu_streams(on_gpu, call):
    expected = answer(on_gpu, call)
    found, results = vtc.graphs(on_gpu, warm_up=[(3, TOKENS + 12)]), []

    def run():
        with torch.cuda.stream(torch.cuda.Stream()):
            results.extend(answer(on_gpu, call) for _ in range(3))
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 6
    for one in results:
        same(one, expected)
    assert found.replays["prompt"] == 7


def test_gpu_weights_that_change(on_gpu, call):
    found = vtc.graphs(on_gpu)
    answer(on_gpu, call)
    for change in (scale_in_place, replace_data):
        change(on_gpu)
        with without(found, on_gpu):
            expected = answer(on_gpu, call)
        same(answer(on_gpu, call), expected)
    assert found.replays["prompt"] == 3
