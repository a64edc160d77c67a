"""Training the small models: packing equals asking one by one, runs resume exactly, scenes grow with accuracy."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from visor.embedded import stages
from visor.embedded.architecture import TinyArchitecture
from visor.embedded.base_model import pack, run_base_stage
from visor.embedded.curriculum import MEMORY, Curriculum, CurriculumOptions
from visor.embedded.model import TinyModel
from visor.embedded.packed_text import TextEncoder
from visor.embedded.recipes import BASE_STAGES, recipe_of, stages_before
from visor.embedded.vocabulary import build_processor, build_tokenizer
from visor.worlds.worlds import scene

SMALL = TinyArchitecture(
    tower_layers=2, tower_width=32, tower_heads=2, decoder_layers=2, decoder_width=32, decoder_heads=2,
    decoder_kv_heads=1, decoder_intermediate=48,
)  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("text", ["what is the value of TAX?", "47", "red", "is no red shape present?", "Foo: 3.5%"])
def test_tokenizer_gives_back_what_it_got(text):
    tokenizer = build_tokenizer()
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.unk_token_id not in tokenizer(text).input_ids


def test_packed_questions_equal_questions_asked_alone():
    model = TinyModel(SMALL).eval()
    model.llava.set_attn_implementation("sdpa")
    processor = build_processor(SMALL.patch_size)
    scenes = [scene("forms", "train", 3, 0.5), scene("scenes", "train", 4)]
    text = model.text.pack(scenes)
    patches = torch.arange(144).expand(2, -1)
    with torch.no_grad():
        visual = model.llava.model.multi_modal_projector(model.tower(scenes))
        packed = model.decode(visual, patches, torch.ones_like(patches, dtype=torch.bool), text)
    singles = []
    for one in scenes:
        for question in one.questions:
            prompt = [{"type": "image", "image": one.image}, {"type": "text", "text": question.text}]
            answer = [{"type": "text", "text": question.answer}]
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            inputs = processor.apply_chat_template(turns, tokenize=True, return_dict=True, return_tensors="pt")
            num_answer = len(model.text.ids(question.answer)) + 1
            with torch.no_grad():
                singles.append(model.llava(**inputs).logits[0, -num_answer - 1 : -1])
    hints = text.hint_BT[text.labels_BT >= 0]
    torch.testing.assert_close(packed[~hints], torch.cat(singles), atol=2e-5, rtol=1e-4)


def test_whole_answers_are_marked():
    text = TextEncoder(build_tokenizer()).pack([scene("scenes", "train", 1)])
    logits = torch.nn.functional.one_hot(text.labels_BT[text.labels_BT >= 0], 250).float()
    assert stages.answer_losses(logits, text)[2] == [[True] * len(text.kinds[0])]
    hints = text.hint_BT[text.labels_BT >= 0]
    first_answer, first_hint = int((~hints).nonzero()[0]), int(hints.nonzero()[0])
    logits[first_hint] = -logits[first_hint]
    assert stages.answer_losses(logits, text)[2] == [[True] * len(text.kinds[0])], "a hint is no answer"
    logits[first_answer] = -logits[first_answer]
    assert stages.answer_losses(logits, text)[2] == [[False] + [True] * (len(text.kinds[0]) - 1)]


def quick(stage, **changes):
    """The recipe of a stage with few steps."""
    options = {"steps": 4, "batch_size": 3, "micro_batch": 2, "warmup": 2, "log_every": 1, **changes}
    return recipe_of(stage, [f"optimisation.{name}={value}" for name, value in options.items()])


def weights(folder):
    return torch.load(folder / "state.pt", weights_only=True)["parameters"]


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", BASE_STAGES)
def test_an_interrupted_run_ends_with_the_same_weights(name, tmp_path):
    for earlier in stages_before(name, has_base=False):
        run_base_stage(quick(earlier, steps=1), tmp_path / "whole", SMALL)
    if (tmp_path / "whole").exists():
        shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    run_base_stage(quick(name), tmp_path / "whole", SMALL)
    stopped = run_base_stage(quick(name), tmp_path / "broken", SMALL, stop_after=2)
    assert stopped["stopped"] == 2 and not (tmp_path / "broken" / name / "done.json").exists()
    run_base_stage(quick(name), tmp_path / "broken", SMALL)
    whole, resumed = weights(tmp_path / "whole" / name), weights(tmp_path / "broken" / name)
    assert whole and all(torch.equal(whole[key], resumed[key]) for key in whole)
    rows = log(tmp_path / "whole" / name)
    assert rows[-1]["step"] == 4 and rows[-1]["loss"] > 0


def test_a_packed_checkpoint_goes_on(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    run_base_stage(quick("tower"), here, SMALL, stop_after=2)
    assert pack(here, there) == ["tower"]
    sizes = [(folder / "tower" / "state.pt").stat().st_size for folder in (here, there)]
    assert sizes[1] < 0.25 * sizes[0]
    document = run_base_stage(quick("tower"), there, SMALL)
    assert document["steps"] == 4 and log(there / "tower")[-1]["step"] == 4


def test_training_lowers_the_loss(tmp_path):
    run_base_stage(quick("decoder", steps=60, batch_size=8, micro_batch=8, warmup=5, peak_rate=3e-3), tmp_path, SMALL)
    losses = [row["loss"] for row in log(tmp_path / "decoder")]
    assert len(losses) == 60 and sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_curriculum_grows_and_unlocks_with_accuracy():
    curriculum = Curriculum(CurriculumOptions(("forms", "glyphs")))
    curriculum.note("forms", [True] * (MEMORY // 2))
    assert curriculum.worlds["forms"].size == pytest.approx(curriculum.options.step) and curriculum.unlocked == 1
    for _ in range(5):
        curriculum.note("forms", [True] * MEMORY)
    assert curriculum.unlocked == 2
    again = Curriculum(CurriculumOptions(("forms", "glyphs")))
    again.load(json.loads(json.dumps(curriculum.state())))
    assert again.state() == curriculum.state()


def test_a_missing_stage_is_an_error_that_says_what_to_run(tmp_path):
    command = [sys.executable, "-m", "visor.embedded.train", "--stage", "dense", "--only", "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "run the stage that writes it first" in done.stderr
