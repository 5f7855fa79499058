"""The model `vtc_llava` in the real lmms-eval: its command line, and its classes as lmms-eval builds and calls them.

Oracle: the same prompts, asked one at a time without lmms-eval.
"""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from vtc import tiny
from vtc.eval.answerer import Answerer
from vtc.eval.model import ModelSpec
from vtc.eval.protocol import PROTOCOLS, Prompt
from vtc.eval.setting import Setting
from vtc.images import ImageError
from vtc.tiny.scenes import balanced_questions

pytest.importorskip("lmms_eval")

import datasets
from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.models import get_model, registry_v2

from vtc.eval import lmms, lmms_manifest

KEEP, PATCHES = 64, 576
SCENES = balanced_questions("test", 25)
TALK = "vtc_talk"  # messages of several turns
FOLDER = {
    "utils.py": """
def visuals(doc):
    return doc["images"]

def text(doc):
    return doc["text"]

def messages(doc):
    return [
        {"role": "system", "content": [{"type": "text", "text": "is there a red circle ?"}]},
        {"role": "user", "content": [{"type": "image", "url": doc["images"][0]}, {"type": "text", "text": "2"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
        {"role": "user", "content": [{"type": "text", "text": doc["text"]}]},
    ]

def results(doc, results):
    return {"right": float(results[0] == doc["answer"])}
""",
    "_base": """
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {data}/{name}.parquet}}}}
task: {name}
test_split: test
doc_to_visual: !function utils.visuals
doc_to_text: !function utils.text
metadata: {{version: 0.0}}
""",
    "generate": """
output_type: generate_until
doc_to_target: answer
generation_kwargs: {max_new_tokens: 3, temperature: 0, do_sample: false, until: ["\\n"]}
process_results: !function utils.results
metric_list: [{metric: right, aggregation: mean, higher_is_better: true}]
""",
    "choose": """
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: gold
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
}


def mixed():
    """Documents with one image, none and two, in turn."""
    images = [scene.image for scene, _ in SCENES]
    rows = []
    for i in range(9):
        rows.append(
            {"text": SCENES[i][1].text, "answer": "", "images": [images[:0], images[i : i + 1], images[:2]][i % 3]}
        )
    return rows


def choices():
    """The right answer and a wrong one that is as long; the right one's place changes."""
    others = {question.answer for _, question in SCENES[:15]}
    rows = []
    for i, (scene, question) in enumerate(SCENES[:15]):
        wrong = sorted(others - {question.answer})[i % (len(others) - 1)]
        pair = [question.answer, wrong] if i % 3 else [wrong, question.answer]
        rows.append({"text": question.text, "images": [scene.image], "choices": pair, "gold": int(not i % 3)})
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tasks of lmms-eval in YAML, and their documents in parquet."""
    path = tmp_path_factory.mktemp("lmms")
    (path / "utils.py").write_text(FOLDER["utils.py"])
    scenes = [{"text": q.text, "answer": q.answer, "images": [scene.image]} for scene, q in SCENES]
    tasks = {
        "vtc_scenes": (scenes, "generate"),
        "vtc_mixed": (mixed(), "generate"),
        "vtc_choice": (choices(), "choose"),
        TALK: (scenes[:5], "generate"),
    }
    for name, (rows, kind) in tasks.items():
        table = datasets.Dataset.from_list(rows)
        table.cast_column("images", datasets.List(datasets.Image())).to_parquet(path / f"{name}.parquet")
        more = "doc_to_messages: !function utils.messages\n" if name == TALK else ""
        (path / f"{name}.yaml").write_text(FOLDER["_base"].format(data=path, name=name) + FOLDER[kind] + more)
    return path


@pytest.fixture(scope="module")
def answerer():
    spec = ModelSpec()
    return Answerer(spec.load(), spec.processor())


def protocol(name, answerer):
    return PROTOCOLS[name](answerer.processor, answerer.model.config)


def alone(answerer, name, prompts, max_new_tokens=3, **options):
    """Answers to prompts that are asked one by one."""
    setting = Setting(options.pop("method", "vtc-cls"), options)
    inputs = [protocol(name, answerer).prepare([prompt]) for prompt in prompts]
    return [answerer.generate(each, setting, max_new_tokens=max_new_tokens)[0][0] for each in inputs]


def run_lmms_eval(folder, out, tasks, *arguments, launcher=()):
    """lmms-eval's command line; returns the results and, for each task, the answers in the order of the documents."""
    command = [sys.executable, "-m", *launcher, "lmms_eval", "--model", "vtc_llava"]
    command += ["--model_args", f"pretrained={tiny.CHECKPOINT},protocol=hf,keep={KEEP}", "--tasks", ",".join(tasks)]
    command += ["--include_path", str(folder), "--output_path", str(out), "--log_samples", "--device", "cpu"]
    environment = os.environ | {"HF_HOME": str(folder / "home"), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, cwd=folder)
    print(done.stdout[-4000:], done.stderr[-4000:])
    assert done.returncode == 0
    found = sorted(out.rglob("*_results.json"))
    assert found  # lmms-eval prints an exception, and exits with 0
    samples = {}
    for task in tasks:
        (file,) = out.rglob(f"*_samples_{task}.jsonl")
        rows = sorted(map(json.loads, file.read_text().splitlines()), key=lambda row: row["doc_id"])
        assert [row["doc_id"] for row in rows] == list(range(len(rows)))
        samples[task] = [row["filtered_resps"] for row in rows]
    return json.loads(found[-1].read_text())["results"], samples


def prompts_of(rows):
    return [Prompt(row["text"], row["images"]) for row in rows]


def scene_prompts():
    return [Prompt(question.text, [scene.image]) for scene, question in SCENES]


def test_command_line_answers_as_the_answerer_does(folder, tmp_path, answerer):
    """Messages, in batches of four."""
    results, samples = run_lmms_eval(folder, tmp_path, ["vtc_scenes", "vtc_mixed", TALK], "--batch_size", "4")
    expected = alone(answerer, "hf", scene_prompts(), keep=KEEP)
    assert samples["vtc_scenes"] == expected
    right = sum(text == question.answer for text, (_, question) in zip(expected, SCENES, strict=True))
    assert results["vtc_scenes"]["right,none"] == right / len(SCENES) > 0.9
    assert samples["vtc_mixed"] == alone(answerer, "hf", prompts_of(mixed()), keep=KEEP)
    texts = [
        f"SYSTEM: is there a red circle ? USER: <image>\n2 ASSISTANT: yes USER: {question.text} ASSISTANT:"
        for _, question in SCENES[:5]
    ]
    setting = Setting("vtc-cls", {"keep": KEEP})
    expected = []
    for text, (scene, _) in zip(texts, SCENES, strict=False):
        inputs = answerer.processor(text=text, images=scene.image, return_tensors="pt")
        expected += answerer.generate(dict(inputs), setting, max_new_tokens=3)[0]
    assert samples[TALK] == expected


def test_two_processes_answer_each_document_once(folder, tmp_path, answerer):
    """Requests of the "simple" kind, among them choices, whose score shows whether likelihoods have the right sign."""
    results, samples = run_lmms_eval(
        folder,
        tmp_path,
        ["vtc_scenes", "vtc_choice"],
        *("--batch_size", "1", "--force_simple"),
        launcher=("torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"),
    )
    assert samples["vtc_scenes"] == alone(answerer, "hf", scene_prompts(), keep=KEEP)
    assert len(samples["vtc_choice"]) == len(choices())
    assert results["vtc_choice"]["acc,none"] > 0.9


def build(kind="simple", arguments="", **config):
    """A model as lmms-eval makes it."""
    text = f"pretrained={tiny.CHECKPOINT}{',' if arguments else ''}{arguments}"
    made = get_model("vtc_llava", kind == "simple").create_from_arg_string(text, {"device": "cpu", **config})
    assert made.is_simple == (kind == "simple")
    return made


def requests(model, rows, kind="simple", target=None, **arguments):
    """Requests of a task whose documents are `rows`, with `text` and `images`; `target` for likelihoods."""
    model.task_dict = {"made": {"test": rows}}
    arguments = {"max_new_tokens": 3, **arguments}
    made = []
    for i, row in enumerate(rows):
        if target is not None:
            parts = (row["text"], target, lambda doc: doc["images"])
        elif kind == "simple":
            parts = (row["text"], arguments, lambda doc: doc["images"])
        else:
            parts = (row["text"], lambda doc: doc["messages"], arguments)
        metadata = {"task": "made", "doc_id": i, "repeats": 1}
        made.append(Instance("generate_until", (*parts, i, "made", "test"), 0, metadata))
    return made


@pytest.fixture(scope="module")
def simple():
    return build("simple", f"keep={KEEP},protocol=hf", batch_size=4)


@pytest.fixture(scope="module")
def chat():
    return build("chat", f"keep={KEEP},protocol=llava", batch_size=4)


def texts(results):
    return [each.text for each in results]


def test_the_manifest_is_made_without_the_models_and_registered():
    code = "import sys; from vtc.eval import lmms_manifest; print('torch' in sys.modules, 'lmms_eval' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
    registry = registry_v2.ModelRegistryV2()
    registry.load_entrypoint_manifests()
    assert registry.get_manifest("vtc_llava") == lmms_manifest.manifest()


def test_answers_come_in_the_order_of_the_requests(simple, answerer, monkeypatch):
    """A batch holds prompts with equally many images, which none of them changes."""
    batches, own = [], simple.answerer.generate

    def generate(inputs, setting, **arguments):
        batches.append((len(inputs["input_ids"]), len(inputs.get("pixel_values", ()))))
        return own(inputs, setting, **arguments)

    monkeypatch.setattr(simple.answerer, "generate", generate)
    rows = mixed()
    found = simple.generate_until(requests(simple, rows))
    assert sorted(batches) == [(3, 0), (3, 3), (3, 6)]
    assert texts(found) == alone(answerer, "hf", prompts_of(rows), keep=KEEP)
    counts = [each.token_counts for each in found]
    assert counts[1].input_tokens > PATCHES > counts[0].input_tokens
    assert {count.output_tokens for count in counts} <= {1, 2, 3}


def test_images_stand_where_a_text_has_them(simple, answerer):
    row = {"text": "is <image> left of <image> ?", "images": [scene.image for scene, _ in SCENES[:2]]}
    inputs = simple.protocol.prepare([Prompt(row["text"], row["images"], placed=True)])
    expected = answerer.generate(inputs, Setting("vtc-cls", {"keep": KEEP}), max_new_tokens=3)[0]
    assert texts(simple.generate_until(requests(simple, [row]))) == expected
    with pytest.raises(ValueError, match="holds <image> 2 times, and there are 1 images"):
        simple.generate_until(requests(simple, [{**row, "images": row["images"][:1]}]))


def message(*content, role="user"):
    kinds = [{"type": "text", "text": c} if isinstance(c, str) else {"type": "image", "url": c} for c in content]
    return {"role": role, "content": kinds}


def test_chat_in_llavas_protocol_is_one_message_with_its_images_first(chat, answerer):
    rows = [{"text": q.text, "messages": [message(scene.image, q.text)]} for scene, q in SCENES[:6]]
    found = texts(chat.generate_until(requests(chat, rows, "chat")))
    assert found == alone(answerer, "llava", scene_prompts()[:6], keep=KEEP)
    image = SCENES[0][0].image
    for messages in (
        [message("be brief", role="system"), message(image, "what ?")],
        [message("what ?", image)],
        [message("what ?", role="assistant")],
        [message(image)],
    ):
        with pytest.raises(ValueError, match="use protocol=hf, or --force_simple"):
            chat.generate_until(requests(chat, [{"text": "", "messages": messages}], "chat"))


def test_an_exception_ends_the_run(answerer):
    """More tokens are to be kept than an image has: no answer, not even to the text before it."""
    model = build("simple", f"keep={PATCHES + 1},protocol=hf")
    with pytest.raises(ValueError, match="keep=577, but an image of this model has only 576 visual tokens"):
        model.generate_until(requests(model, mixed()[:2]))


def test_videos_and_sounds_are_refused(simple, chat):
    for visual in ("film.mp4", {"array": [0.0]}):
        with pytest.raises(ValueError, match="neither videos nor sounds"):
            simple.generate_until(requests(simple, [{"text": "what ?", "images": [visual]}]))
    for kind in ("video", "audio"):
        messages = [
            {"role": "user", "content": [{"type": kind, "url": "film.mp4"}, {"type": "text", "text": "what ?"}]}
        ]
        with pytest.raises(ValueError, match=f"has {kind}; vtc_llava takes text and images"):
            chat.generate_until(requests(chat, [{"text": "", "messages": messages}], "chat"))


def test_images_may_be_files(simple, tmp_path, answerer):
    scene, question = SCENES[0]
    scene.image.save(tmp_path / "scene.png")
    row = {"text": question.text, "images": [str(tmp_path / "scene.png")]}
    assert texts(simple.generate_until(requests(simple, [row]))) == alone(
        answerer, "hf", scene_prompts()[:1], keep=KEEP
    )
    with pytest.raises(ImageError, match="does not exist"):
        simple.generate_until(requests(simple, [{**row, "images": ["missing.png"]}]))


@pytest.mark.parametrize("method", ["none", "floor"])
def test_baselines_answer_without_compression(method, answerer):
    model = build("simple", f"method={method},protocol=hf", batch_size=3)
    rows = [{"text": q.text, "images": [scene.image]} for scene, q in SCENES[:6]]
    found = texts(model.generate_until(requests(model, rows)))
    if method == "none":
        assert found == alone(answerer, "hf", scene_prompts()[:6], method="none")
    else:
        blind = PROTOCOLS["hf"](answerer.processor, answerer.model.config, floor=True)
        inputs = blind.prepare(scene_prompts()[:6])
        assert found == answerer.generate(inputs, Setting(), max_new_tokens=3)[0]
        assert found != alone(answerer, "hf", scene_prompts()[:6], method="none")


def test_arguments_of_the_generation():
    """As a task gives them, and as transformers takes them."""
    for given, expected, stops in (
        ({}, {"max_new_tokens": 1024, "do_sample": False}, []),
        ({"until": "\n", "max_new_tokens": 5}, {"max_new_tokens": 5, "do_sample": False}, ["\n"]),
        (
            {"temperature": 0, "do_sample": True, "top_p": 0.9, "num_beams": 2, "until": ["a", "b"]},
            {"max_new_tokens": 1024, "do_sample": False, "num_beams": 2},
            ["a", "b"],
        ),
        (
            {"temperature": 0.7, "top_p": None, "image_aspect_ratio": "pad"},
            {"max_new_tokens": 1024, "do_sample": True, "temperature": 0.7},
            [],
        ),
        ({"temperature": 0.7, "do_sample": False}, {"max_new_tokens": 1024, "do_sample": False}, []),
        (
            {"do_sample": True, "top_p": 0.5},
            {"max_new_tokens": 1024, "do_sample": True, "top_p": 0.5},
            [],
        ),
    ):
        before = dict(given)
        assert lmms.generation(given) == (expected, stops)
        assert given == before
    assert lmms.cut("red blue red", ["blue", "", "red "]) == ""
    assert lmms.cut("red blue red", [" blue", "\n"]) == "red"
    assert lmms.cut("red", []) == "red"


def test_arguments_of_the_generation_reach_the_model(simple):
    """Requests with other arguments are other batches."""
    rows = [{"text": q.text, "images": [scene.image]} for scene, q in SCENES[:4]]
    short = requests(simple, rows, max_new_tokens=1)
    long = requests(simple, rows, max_new_tokens=5, min_new_tokens=5)
    mixed = [each for pair in zip(short, long, strict=True) for each in pair]
    assert [each.token_counts.output_tokens for each in simple.generate_until(mixed)] == [1, 5] * 4
    answers = texts(simple.generate_until(requests(simple, rows)))
    cut = texts(simple.generate_until(requests(simple, rows, until=[answers[0][1:]])))
    assert cut[0] == answers[0][:1]
    with pytest.raises(ValueError, match="num_samples"):
        simple.generate_until(requests(simple, rows, num_samples=2))


def test_likelihoods_are_signed_as_lmms_eval_takes_them(simple, answerer):
    """Choices, which come as texts, are negated: lmms-eval takes the smallest value."""
    rows = [
        {"text": q.text, "images": [scene.image] * (i % 2), "target": f" {q.answer}"}
        for i, (scene, q) in enumerate(SCENES[:4])
    ]
    found = simple.loglikelihood(requests(simple, rows, target=lambda doc: doc["target"]))
    setting = Setting("vtc-cls", {"keep": KEEP})
    for prompt, row, (value, greedy) in zip(prompts_of(rows), rows, found, strict=True):
        made = protocol("hf", answerer)
        ids = [made.continuation(prompt, row["target"])]
        ((expected, expected_greedy),) = answerer.log_likelihoods(made.prepare([prompt]), setting, ids)
        assert value == pytest.approx(expected, rel=1e-4, abs=1e-4)
        assert greedy == expected_greedy
        assert value < 0
    negated = simple.loglikelihood(requests(simple, rows, target=" yes"))
    again = simple.loglikelihood(requests(simple, rows, target=lambda doc: " yes"))
    assert [value for value, _ in negated] == pytest.approx([-value for value, _ in again])
    assert [each.text for each in again] == [tuple(each) for each in again]
    with pytest.raises(ValueError, match="give a text"):
        simple.loglikelihood(requests(simple, rows, target=lambda doc: 3))
    unconditional = SimpleNamespace(args=("", " yes"), task_name="made")
    with pytest.raises(ValueError, match="acc_mutual_info"):
        simple.loglikelihood([unconditional])


def test_out_of_memory_halves_the_batch_and_says_so(answerer, caplog, monkeypatch):
    model = build("simple", f"keep={KEEP},protocol=hf", batch_size="auto", max_batch_size=8)
    sizes, own = [], model.answerer.generate

    def generate(inputs, setting, **arguments):
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("too many")
        return own(inputs, setting, **arguments)

    monkeypatch.setattr(model.answerer, "generate", generate)
    rows = [{"text": q.text, "images": [scene.image]} for scene, q in SCENES[:10]]
    found = texts(model.generate_until(requests(model, rows)))
    assert found == alone(answerer, "hf", scene_prompts()[:10], keep=KEEP)
    assert sizes == [8, 4, 2, 2, 2, 2, 2]
    assert [record.getMessage() for record in caplog.records] == [
        "out of memory with 8 requests at once; going on with 4",
        "out of memory with 4 requests at once; going on with 2",
    ]

    def never(*_, **__):
        raise torch.OutOfMemoryError("too many")

    monkeypatch.setattr(model.answerer, "generate", never)
    with pytest.raises(torch.OutOfMemoryError):
        model.generate_until(requests(model, rows))


def test_arguments_of_the_model():
    model = build(
        "simple",
        "ratio=0.25,method=fastv,prune_layer=1,kv=full,dtype=bfloat16,attn_implementation=eager",
        batch_size="3",
    )
    assert model.setting == Setting("fastv", {"ratio": 0.25, "prune_layer": 1, "kv": "full"})
    assert model.answerer.model.dtype == torch.bfloat16
    assert model.answerer.model.config.text_config._attn_implementation == "eager"
    assert (model.batch_size, model.rank, model.world_size, model.device.type) == (3, 0, 1, "cpu")
    assert isinstance(model.accelerator, Accelerator)
    model.clean()
    assert not hasattr(model, "answerer")
    for arguments, config, error in (
        ("protocol=other", {}, "protocol is 'other'"),
        ("kepe=64", {}, "unknown option.*kepe"),
        ("method=none,keep=64", {}, "baseline without options, got keep"),
        ("attn_implementation=vtc", {}, "compresses whatever the method"),
        ("revision=12", {}, "read the revision as the number 12"),
        ("dtype=int8", {}, "dtype is 'int8'"),
        ("", {"batch_size": "auto"}, "needs max_batch_size"),
        ("", {"batch_size": "0"}, "batch_size is '0'"),
        ("", {"batch_size": "auto:2"}, "batch_size is 'auto:2'"),
    ):
        with pytest.raises(ValueError, match=error):
            build("simple", arguments, **config)
    with pytest.raises(ValueError, match="is no directory"):
        get_model("vtc_llava").create_from_arg_string("pretrained=/nowhere", {})


def test_several_rounds_are_not_implemented(simple):
    with pytest.raises(NotImplementedError, match="generate_until_multi_round"):
        simple.generate_until_multi_round([])
