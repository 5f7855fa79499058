"""Train the bundled model from nothing: `python -m vtc.tiny.train --out DIR`.

The recipe is LLaVA's. What LLaVA takes ready-made is trained first:

1. `vision`: a CLIP vision tower with a [CLS] token, by image-caption contrast. A caption is a set of phrases; every
   phrase of the vocabulary is scored against every image with the sigmoid loss (SigLIP, arXiv 2303.15343). Since the
   scene is known, the true phrases are known: there are no false negatives.
2. `text`: only the language model, on captions as text followed by questions and answers.
3. `projector`: LLaVA's first stage. Only the projector learns; vision tower and language model are frozen.
4. `language`: LLaVA's second stage. Projector and language model learn, the vision tower stays frozen.

In stage 4 the words of the questions and of a caption are targets too, at a tenth of an answer's weight: after "is the
red" comes the shape of the red object, so the model learns where to look before it learns the answers. The caption
follows the image directly and the questions have LLaVA's conversation format, so the model cannot confuse the two.

All visual tokens are always present. Images grow from phase to phase (70 to 336 pixels), because small ones show more
objects per token. A small image is a window on the canvas and uses that window's position embeddings. The last phases
mix sizes, then shapes and close-ups. The model must read place and number from the features; the number of visual
tokens, the length of their lines and the share of background must not give them away. In the last phases several images
share a prompt, and the question is how many objects they show together. In albums, images differ in shape and some are
blank. Every batch is drawn from its own seed, so a run can be interrupted and resumed, and two runs on one machine
agree.

Weight matrices between layers learn with Muon (arXiv 2502.16982), which takes far fewer steps here; everything else
with AdamW.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import CLIPVisionModel, LlavaForConditionalGeneration

from vtc.files import replacing, require_writable
from vtc.tiny.data import Batch, Scenes, attention_of
from vtc.tiny.model import PhraseContrast, build_model, build_processor, encode
from vtc.tiny.recipe import QUICK, RECIPE, Phase


def vision_loss(contrast: PhraseContrast, batch: Batch) -> tuple[Tensor, float]:
    """Sigmoid loss summed over phrases, and the share of true phrases with a positive logit."""
    logits = contrast(batch.pixels[0], batch.origins[0]).float()
    loss = F.binary_cross_entropy_with_logits(logits, batch.phrases, reduction="sum") / len(logits)
    hit = ((logits > 0) & (batch.phrases > 0)).sum() / batch.phrases.sum()
    return loss, hit.item()


@torch.no_grad()
def features(tower: CLIPVisionModel, batch: Batch) -> Tensor:
    """The tower's features of every visual token, `[V, C]`, in the order of the prompts of the batch."""
    views: list[Tensor] = []  # one per image, [n, C]
    for pixels, origins in zip(batch.pixels, batch.origins, strict=True):
        views += encode(tower, pixels, origins)[-2][:, 1:]
    return torch.cat([views[i] for i in batch.order])


def language_loss(model: LlavaForConditionalGeneration, batch: Batch) -> tuple[Tensor, float]:
    """Weighted cross-entropy, and the share of right tokens among those of the answers."""
    embeds = model.get_input_embeddings()(batch.tokens)
    if batch.pixels:
        visual = model.model.multi_modal_projector(features(model.model.vision_tower, batch))
        where = (batch.tokens == model.config.image_token_id)[..., None].expand_as(embeds)
        embeds = embeds.masked_scatter(where, visual.to(embeds.dtype))
    allowed, positions = attention_of(batch.segments)
    hidden = model.model.language_model(
        inputs_embeds=embeds, attention_mask=allowed, position_ids=positions, use_cache=False
    ).last_hidden_state
    learnt = batch.weights > 0
    targets, weights = batch.targets[learnt], batch.weights[learnt]
    logits = model.lm_head(hidden[learnt]).float()
    loss = (weights * F.cross_entropy(logits, targets, reduction="none")).sum() / weights.sum()
    right = (logits.argmax(-1) == targets)[weights >= 1].float().mean().item()
    return loss, right


def trainable(stage: str, contrast: PhraseContrast, model: LlavaForConditionalGeneration) -> dict[str, nn.Parameter]:
    """Freeze everything but what this stage learns; return the latter's parameters by name."""
    learns: dict[str, list[nn.Module]] = {
        "vision": [contrast],
        "text": [model.model.language_model, model.lm_head],
        "projector": [model.model.multi_modal_projector],
        "language": [model.model.multi_modal_projector, model.model.language_model, model.lm_head],
    }
    everything = nn.ModuleDict({"contrast": contrast, "model": model})
    everything.requires_grad_(False)
    for module in learns[stage]:
        module.requires_grad_(True)
    return {name: p for name, p in everything.named_parameters() if p.requires_grad}


def optimizers_of(parameters: dict[str, nn.Parameter], lr: float) -> dict[torch.optim.Optimizer, float]:
    """Muon for the matrices between layers and AdamW for the rest, each with its peak learning rate."""
    hidden = [p for name, p in parameters.items() if p.ndim == 2 and (".layers." in name or "projector" in name)]
    rest = [p for p in parameters.values() if all(p is not matrix for matrix in hidden)]
    return {
        torch.optim.Muon(hidden, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"): lr,
        torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.02): lr / 2,
    }


def train(
    out: Path,
    recipe: tuple[Phase, ...] = RECIPE,
    seed: int = 0,
    minutes: float | None = None,
    start: Path | None = None,
) -> bool:
    """Run the recipe; False if time ran out before the end.

    Resumes from `out/state.pt` where that exists; or else begins with the checkpoint in `start`, if given, and skips
    the phases that made it, which must be the first ones of the recipe.

    Raises
    ------
    ValueError
        If `out` cannot be written to, or `start` does not fit the recipe, or is where the new checkpoint goes.
    """
    if start is not None and start.resolve() == (out / "checkpoint").resolve():
        raise ValueError(
            f"{start} is the checkpoint to go on from, and would be replaced; give another folder to --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    require_writable(out / "state.pt")
    torch.manual_seed(seed)
    model = build_model()
    contrast = PhraseContrast(model.model.vision_tower)
    state_file, begun = out / "state.pt", time.time()
    at_phase, at_step, spent = 0, 0, 0.0
    optimizer_states: list[dict[str, Any]] = []
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        contrast.load_state_dict(state["contrast"])
        at_phase, at_step, optimizer_states = state["phase"], state["step"], state["optimizers"]
        spent = state["seconds"]
    elif start:
        at_phase, spent = _load_checkpoint(model, start, recipe)
    for number in range(at_phase, len(recipe)):
        phase = recipe[number]
        parameters = trainable(phase.stage, contrast, model)
        optimizers = optimizers_of(parameters, phase.lr)
        for optimizer, state in zip(optimizers, optimizer_states, strict=False):
            optimizer.load_state_dict(state)
        optimizer_states = []

        def save(phase_number: int, step: int, states: list[dict[str, Any]]) -> None:
            snapshot: dict[str, Any] = dict(model=model.state_dict(), contrast=contrast.state_dict(), optimizers=states)
            snapshot |= dict(phase=phase_number, step=step, seconds=spent + time.time() - begun)
            with replacing(state_file) as made:
                torch.save(snapshot, made)

        figures = np.zeros(3)
        for step, batch in _batches(recipe, number, at_step):
            for optimizer, peak in optimizers.items():
                for group in optimizer.param_groups:
                    group["lr"] = peak * _cycle(step / (phase.cycle or phase.steps))
                optimizer.zero_grad()
            # Faster where the processor has bf16 instructions, far slower where it has not.
            with torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu.get_capabilities().get("avx512_bf16", False)):
                loss, right = vision_loss(contrast, batch) if phase.stage == "vision" else language_loss(model, batch)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            figures += (loss.item(), right, 1)
            if (step + 1) % 25 == 0 or step + 1 == phase.steps:
                mean, rate = figures[:2] / figures[2], spent + time.time() - begun
                print(
                    f"{phase.stage:>9} {phase.size} step {step + 1:>5}/{phase.steps} "
                    f"loss {mean[0]:.3f} right {mean[1]:.3f} {rate / 60:6.1f} min",
                    flush=True,
                )
                figures[:] = 0
            out_of_time = minutes is not None and time.time() - begun > 60 * minutes
            if (step + 1) % 100 == 0 or out_of_time:
                save(number, step + 1, [optimizer.state_dict() for optimizer in optimizers])
            if out_of_time:
                return False
        at_step = 0
        save(number + 1, 0, [])
    _export(model, out, recipe, seed, spent + time.time() - begun)
    return True


def _load_checkpoint(model: LlavaForConditionalGeneration, start: Path, recipe: tuple[Phase, ...]) -> tuple[int, float]:
    """Load the weights of `start`; return the number of recipe phases that made it, and the seconds they took."""
    made = json.loads((start / "training.json").read_text())
    count = len(made["recipe"])
    if made["recipe"] != [asdict(phase) for phase in recipe[:count]]:
        raise ValueError(
            f"{start} was not made by the first {count} phases of this recipe; append new phases to its own"
        )
    if any(phase.stage == "vision" for phase in recipe[count:]):
        raise ValueError("a checkpoint has no phrases to contrast images with: the vision stage cannot go on from one")
    model.load_state_dict(LlavaForConditionalGeneration.from_pretrained(start, dtype=torch.float32).state_dict())
    return count, 60 * made["minutes"]


def _cycle(progress: float) -> float:
    """Linear warm-up over the first 5 %, then half a cosine down to 2 %."""
    if progress < 0.05:
        return progress / 0.05 + 1e-3
    return 0.02 + 0.98 * (0.5 + 0.5 * float(np.cos(np.pi * (progress - 0.05) / 0.95)))


def _batches(recipe: tuple[Phase, ...], number: int, start: int) -> Iterator[tuple[int, Batch]]:
    """The phase's batches from `start` on, made in a worker process."""
    phase = recipe[number]
    first = sum(p.steps * p.batch for p in recipe[:number])
    scenes = Scenes(phase, first)
    todo = range(start, phase.steps)
    loader = DataLoader(scenes, batch_size=None, sampler=todo, num_workers=1, prefetch_factor=4)
    return zip(todo, loader, strict=True)


def _export(
    model: LlavaForConditionalGeneration, out: Path, recipe: tuple[Phase, ...], seed: int, spent: float
) -> None:
    """Write `out/checkpoint` as stock transformers reads it, fp16, with the recipe that made it.

    Each file takes the place of an earlier one whole.
    """
    target = out / "checkpoint"
    target.mkdir(exist_ok=True)
    made = {"seed": seed, "minutes": round(spent / 60, 1), "torch": torch.__version__}
    made |= {"recipe": [asdict(phase) for phase in recipe]}
    with tempfile.TemporaryDirectory(prefix=".vtc-", dir=out) as name:
        folder = Path(name)
        model.half().save_pretrained(folder)
        build_processor().save_pretrained(folder)
        (folder / "training.json").write_text(json.dumps(made, indent=1) + "\n")
        for file in sorted(folder.iterdir()):
            file.replace(target / file.name)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train the bundled model from nothing; resumes where it left off.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the state, and the checkpoint at the end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="stop after so long; the next run resumes")
    parser.add_argument("--quick", action="store_true", help="two steps a phase, to check that it runs")
    parser.add_argument("--start", type=Path, help="checkpoint to go on from, made by the recipe's first phases")
    chosen = parser.parse_args()
    finished = train(chosen.out, QUICK if chosen.quick else RECIPE, chosen.seed, chosen.minutes, chosen.start)
    print(f"checkpoint in {chosen.out / 'checkpoint'}" if finished else "stopped; run again to resume")


if __name__ == "__main__":
    main()
