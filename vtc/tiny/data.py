"""The batches of training: images with true phrases, or packed questions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from vtc.tiny.model import SPECIAL, build_tokenizer
from vtc.tiny.recipe import Phase
from vtc.tiny.scenes import CANVAS, COUNTING, PATCH, PHRASES, Scene

PHRASE_NUMBER = {phrase: number for number, phrase in enumerate(PHRASES)}
MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
STD = (0.26862954, 0.26130258, 0.27577711)
WORD_WEIGHT = 0.1  # of a word in a question or a caption, against 1 for an answer


@dataclass
class Batch:
    """Images with true phrases (vision stage) or packed questions (other stages); unused fields are empty."""

    pixels: list[Tensor]  # of each group, [S, 3, height, width] fp32
    origins: list[Tensor]  # of each group, [S, 2] int64, in patches
    order: list[int]  # of the images of all groups in the prompts
    phrases: Tensor  # [S, P] fp32, 1 where the phrase is true
    tokens: Tensor  # [B, T] int64, `<image>` where a visual token goes
    segments: Tensor  # [B, T]: 0 for the part every question sees, 1.. for each question, -1 for padding
    targets: Tensor  # [B, T] int64, the next token
    weights: Tensor  # [B, T] fp32, how much the target counts; 0 where there is none


class Scenes(Dataset):
    """Item i is batch i of the phase: no scene is seen twice."""

    def __init__(self, phase: Phase, first: int) -> None:
        self.phase, self.first = phase, first
        self.tokenizer = build_tokenizer()

    def __len__(self) -> int:
        return self.phase.steps

    def __getitem__(self, step: int) -> Batch:
        start = self.first + step * self.phase.batch
        scenes: list[Scene] = []
        pixels, origins = [], []
        for number, size, zoom, blank in self.phase.groups(step):
            group = [Scene("train", start + len(scenes) + i, size, zoom, blank) for i in range(number)]
            if self.phase.stage != "text":
                stacked = np.stack([np.asarray(scene.image, np.float32) for scene in group])
                stacked = ((stacked / 255 - MEAN) / STD).astype(np.float32)
                pixels.append(torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous())
                origins.append(torch.tensor([scene.origin for scene in group]) // PATCH)
            scenes += group
        order = list(range(len(scenes)))
        if len(pixels) > 1:
            order = np.random.default_rng(step).permutation(order).tolist()
        truth = torch.zeros(0)
        rows: list[tuple[Tensor, ...]] = [(torch.zeros(0),) * 4]
        if self.phase.stage == "vision":
            truth = torch.zeros(len(scenes), len(PHRASES))
            for row, scene in zip(truth, scenes, strict=True):
                row[[PHRASE_NUMBER[phrase] for phrase in scene.phrases]] = 1
        else:
            rows = [self._pack(group) for group in self._grouped([scenes[i] for i in order], step)]
        packed = (
            nn.utils.rnn.pad_sequence([row[i] for row in rows], batch_first=True, padding_value=value)
            for i, value in enumerate((0, -1, 0, 0))
        )
        return Batch(pixels, origins, order, truth, *packed)

    def _grouped(self, scenes: list[Scene], step: int) -> list[list[Scene]]:
        """The scenes of each prompt: as many as the batch allows, fewer where objects or tokens would be too many."""
        most = self.phase.images_per_prompt(step)
        groups: list[list[Scene]] = []
        for scene in scenes:
            more = [*groups[-1], scene] if groups else []
            objects, area = sum(len(s.objects) for s in more), sum(s.width * s.height for s in more)
            if 0 < len(more) <= most and objects <= self.phase.objects and area <= 3 * CANVAS**2:
                groups[-1].append(scene)
            else:
                groups.append([scene])
        return groups

    def _pack(self, scenes: list[Scene]) -> tuple[Tensor, ...]:
        """Many questions about the same images in one row. Each attends to the images and itself only."""
        scene = scenes[0]

        def ids(text: str) -> list[int]:
            return self.tokenizer(text, add_special_tokens=False).input_ids

        if self.phase.stage == "text":
            shown = ids(scene.caption)
        else:
            shown = [SPECIAL.index("<image>")] * sum(s.width * s.height // PATCH**2 for s in scenes)
        tokens = [SPECIAL.index("<s>"), *ids("USER:"), *shown]
        segments, targets, weights = [0] * len(tokens), [0] * len(tokens), [0.0] * len(tokens)
        questions = [question for draw in range(self.phase.draws) for question in scene.ask(draw)]
        weight = {"counting": self.phase.counting}
        turns = [(f"{q.text} ASSISTANT:", q.answer, weight.get(q.family, 1.0)) for q in dict.fromkeys(questions)]
        if len(scenes) > 1:
            turns = [(f"{COUNTING} ASSISTANT:", str(sum(len(s.objects) for s in scenes)), self.phase.counting)]
        if self.phase.stage == "projector":
            turns = []
        if self.phase.stage != "text" and len(scenes) == 1 and scene.caption:
            turns.append((scene.caption, "", 1.0))
        for number, (before, answer, importance) in enumerate(turns, start=1):
            asking, reply = ids(before), [*ids(answer), SPECIAL.index("</s>")]
            tokens += asking + reply
            segments += [number] * (len(asking) + len(reply))
            # A position's target is the token after it.
            targets += [*asking[1:], *reply, 0]
            weights += [WORD_WEIGHT] * (len(asking) - 1) + [importance] * len(reply) + [0.0]
        return torch.tensor(tokens), torch.tensor(segments), torch.tensor(targets), torch.tensor(weights)


def attention_of(segments: Tensor) -> tuple[Tensor, Tensor]:
    """The attention mask `[B, 1, T, T]` bool and the positions `[B, T]`, from `segments` `[B, T]`."""
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    shown = segments[:, None, :] == 0
    same = segments[:, None, :] == segments[:, :, None]
    allowed = causal & (shown | same)
    # A token's position in its own conversation is the number of tokens it sees, less one.
    return allowed[:, None], allowed.sum(-1) - 1
