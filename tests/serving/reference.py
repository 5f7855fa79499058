"""What transformers answers: run by a Python that has VTC and a transformers for models, see `engines.references`.

    python reference.py CASES ANSWERS

CASES is a JSON list of cases: the folder of a model, settings of VTC or null, and prompts with paths of images, which
may have settings of their own. ANSWERS gets the new tokens of each prompt, and the log-probabilities of the first.
"""

import json
import sys

import torch
import transformers
from PIL import Image

import vtc


def answers(case):
    processor = transformers.AutoProcessor.from_pretrained(case["model"])
    config = transformers.AutoConfig.from_pretrained(case["model"])
    model_class = getattr(transformers, config.architectures[0])
    model = model_class.from_pretrained(case["model"], dtype=getattr(torch, case["dtype"])).eval()
    for prompt in case["prompts"]:
        settings = prompt.get("settings") or case["settings"]
        if settings:
            vtc.enable(model, **settings)
        images = [Image.open(path).convert("RGB") for path in prompt["images"]] or None
        inputs = processor(images=images, text=prompt["text"], return_tensors="pt")
        inputs = inputs.to(dtype=model.dtype)
        how = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        with torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=case["max_tokens"], **how)
        new = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        yield {"ids": new, "first": out.logits[0][0].float().log_softmax(-1).tolist()}
        if settings:
            vtc.disable(model)


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        cases = json.load(file)
    found = [list(answers(case)) for case in cases]
    with open(sys.argv[2], "w") as file:
        json.dump(found, file)
