"""TRL's trainers on the bundled model: one step each, and every log-probability as if its row came alone.

Oracle: the golden path of each row alone and unpadded. The stock model, with all patches, shows that it is right.
"""

import functools
import tempfile

import pytest
import torch
from support.golden import llava as golden

import vtc

pytest.importorskip("trl")
pytest.importorskip("datasets")

from datasets import Dataset
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

KEEP, PATCHES = 64, 576
QUESTIONS = ("how many objects are there ?", "is there a blue cross ?", "what digit is on the yellow object ?")
ANSWERS = ("4", "there are five", "no", "the digit is 9 .")
INPUTS = ("input_ids", "attention_mask", "pixel_values", "labels")
ONE_STEP = dict(max_steps=1, report_to=[], use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True)

modes = pytest.mark.parametrize("keep", [PATCHES, KEEP], ids=["stock", "vtc"])


def load(keep):
    model, processor = vtc.tiny.load()
    if keep < PATCHES:
        vtc.enable(model, keep=keep)
    return model, processor


def data(*columns):
    """Four prompts of three lengths, with an image each; each of the `columns` holds an answer of another prompt."""
    rows = []
    for i in range(4):
        answers = {name: [{"role": "assistant", "content": ANSWERS[i - n]}] for n, name in enumerate(columns)}
        prompt = [{"role": "user", "content": QUESTIONS[i % 3]}]
        rows.append({"images": [vtc.tiny.scenes.Scene("test", i).image], "prompt": prompt, **answers})
    return Dataset.from_list(rows)


def record(trainer):
    """The training passes from now on: arguments, and the log-probabilities `[B, L - 1]`, which TRL's forward makes."""
    passes, own = [], trainer.model.forward

    @functools.wraps(own)  # generate() reads the signature
    def forward(*args, **kwargs):
        output = own(*args, **kwargs)
        if kwargs.get("labels") is not None:
            log_probs = output.log_probs.detach().clone()
            passes.append(({name: kwargs[name].clone() for name in INPUTS}, log_probs))
        return output

    trainer.model.forward = forward
    return passes


@torch.no_grad()
def check(passes, keep, temperature=1.0):
    """Every log-probability is that of the golden path; returns those of the labels of each row of the first pass."""
    model, _ = vtc.tiny.load()
    eager, depth = golden.eager(model), model.config.vision_config.num_hidden_layers
    feature = depth + 1 + model.config.vision_feature_layer  # the number of layers that run
    assert passes
    result = []
    for inputs, found in passes:
        assert found.shape == inputs["labels"][:, 1:].shape
        assert len({int(row.sum()) for row in inputs["attention_mask"]}) > 1, "nothing is padded"
        for i, pixels in enumerate(inputs["pixel_values"]):
            real = inputs["attention_mask"][i].bool()
            row, labels = inputs["input_ids"][i, real].tolist(), inputs["labels"][i, real].tolist()
            count = sum(label != -100 for label in labels)
            assert labels[-count:] == row[-count:]
            embeds, _ = golden.splice(eager, row, [pixels], keep, range(feature - 3, feature), PATCHES)
            log_p = (golden.logits(eager, embeds)[-count - 1 : -1] / temperature).log_softmax(-1)
            expected = log_p.gather(1, torch.tensor(row[-count:])[:, None])[:, 0]
            golden.close(found[i][inputs["labels"][i, 1:] != -100], expected)
            result.append(expected)
    return result[: len(passes[0][1])]


@pytest.mark.supported("Training", "TRL's `SFTTrainer`")
@modes
def test_sft(keep):
    model, processor = load(keep)
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(folder, per_device_train_batch_size=4, max_length=None, **ONE_STEP)
        trainer = SFTTrainer(model, args=config, train_dataset=data("completion"), processing_class=processor)
        passes = record(trainer)
        loss = trainer.train().training_loss
    expected = torch.cat(check(passes, keep))
    golden.close(torch.tensor(loss), -expected.mean())


@pytest.mark.supported("Training", "TRL's `DPOTrainer`, with a `ref_model` that compresses, too")
@modes
def test_dpo(keep):
    """Both models are the same, so the loss is log 2. TRL would load a reference without VTC's settings by itself."""
    (model, processor), (reference, _) = load(keep), load(keep)
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(folder, per_device_train_batch_size=4, max_length=None, **ONE_STEP)
        trainer = DPOTrainer(
            model, reference, args=config, train_dataset=data("chosen", "rejected"), processing_class=processor
        )
        passes = record(trainer)
        loss = trainer.train().training_loss
    assert len(check(passes, keep)) == 8
    golden.close(torch.tensor(loss), torch.tensor(2.0).log())


@pytest.mark.supported("Training", "TRL's `GRPOTrainer`")
@modes
def test_grpo(keep):
    """Prompts padded on the left, completions on the right."""
    torch.manual_seed(0)
    model, processor = load(keep)
    options = dict(num_generations=2, max_completion_length=6, beta=0.0, temperature=3.0)

    def reward(completions, **_):
        return [float(len(str(completion)) % 3) for completion in completions]

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(folder, per_device_train_batch_size=4, **options, **ONE_STEP)
        trainer = GRPOTrainer(model, reward_funcs=reward, args=config, train_dataset=data(), processing_class=processor)
        passes = record(trainer)
        trainer.train()
    assert len({len(row) for row in check(passes, keep, temperature=3.0)}) > 1, "completions have one length"
