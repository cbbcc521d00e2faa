"""Scorers: plug-ins and how they are chosen; stand-ins on closed forms; learned ones with tiny random weights."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForObjectDetection,
    BertTokenizerFast,
    BlipConfig,
    BlipForConditionalGeneration,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    GitConfig,
    GitForCausalLM,
    PPOCRV5MobileDetConfig,
)

from vgen import scorers, standins, world
from vgen.errors import UsageError, VgenError
from vgen.published import boxes
from vgen.scorers import STANDIN, Card, Chosen, View, choose, load, score
from vgen.standins import Box, fuse, glyphs, union_area


def view(frames: np.ndarray, fps: float = 8.0, **captions: str) -> View:
    return View(frames, fps, [frames[0], frames[len(frames) // 2], frames[-1]], captions)


def drawn(index: int, side: int = 64) -> tuple[View, world.Scene]:
    pixels, _, _, scene = world.clip(0, index, 17, side, side)
    return view(pixels.add(1).mul(127.5).round().byte().permute(1, 2, 3, 0).numpy()), scene


def ask(name: str, seen: View, reference: str = "") -> dict[str, object]:
    one = Chosen(name, scorers.card(name), reference)
    return score(one, load(one), seen)


# Plug-ins


def test_every_installed_scorer_has_a_card_and_only_the_learned_take_references():
    cards = {name: scorers.card(name) for name in scorers.installed()}
    assert {name for name, card in cards.items() if card.reference} == {
        "clip-aesthetic",
        "clip-similarity",
        "blip",
        "git-video",
        "pp-ocr",
    }
    assert not any(card.standin for card in cards.values() if card.reference)


def test_defaults_are_those_without_a_reference_captions_first():
    chosen, broken = choose([])
    fields = [field for one in chosen for field in one.card.fields]
    assert not broken
    assert len(set(fields)) == len(fields)
    assert fields[:3] == ["captions.image", "captions.video", "captions.fused"]
    assert fields[-1] != "captions.fused"
    assert {one.told for one in chosen if one.card.fields == ("aesthetic",)} == {STANDIN}


def test_a_named_scorer_takes_the_place_of_its_stand_in():
    chosen, _ = choose(["clip-aesthetic=some/folder"], ["camera"])
    told = {one.card.fields[0]: one.told for one in chosen}
    assert told["aesthetic"] == "clip-aesthetic=some/folder"
    assert "camera" not in told


@pytest.mark.parametrize(
    "named", [["no-such"], ["blip"], ["farneback=x"], ["clip-aesthetic=a", "colour-sharpness"], ["blip=a", "blip=b"]]
)
def test_scorers_that_cannot_be_are_refused(named):
    with pytest.raises(UsageError):
        choose(named)


class Nothing:
    def __call__(self, seen: View, /) -> dict[str, object]:
        return {"mood": 1 / len(seen.captions)}


mood = Card(("mood",), "one over the captions", lambda reference, device: Nothing())
liar = Card(("mood",), "writes something else", lambda reference, device: lambda seen, /: {"other": 1})
no_card = "mood"


@pytest.fixture
def strangers(monkeypatch: pytest.MonkeyPatch):
    def declare(text: str) -> None:
        monkeypatch.setenv("VGEN_SCORERS", text)
        scorers._entries.cache_clear()

    yield declare
    monkeypatch.undo()
    scorers._entries.cache_clear()


def test_strangers_run_by_being_installed_and_those_that_do_not_import_are_named(strangers):
    strangers("mood=test_scorers:mood,gone=no_such_module:card,none=test_scorers:no_card")
    chosen, broken = choose([])
    assert "mood" in [one.name for one in chosen]
    assert len(chosen) > 5
    assert [text.partition("'")[2].partition("'")[0] for text in map(str, broken)] == ["gone", "none"]
    with pytest.raises(VgenError, match="'gone' could not be imported"):
        choose(["gone"])


def test_what_fails_in_a_scorer_is_an_error_that_names_it(strangers):
    strangers("mood=test_scorers:mood,liar=test_scorers:liar")
    seen = drawn(0)[0]
    assert ask("mood", view(seen.frames, a="b", c="d")) == {"mood": 0.5}
    with pytest.raises(VgenError, match="'mood' failed: ZeroDivisionError"):
        ask("mood", seen)
    with pytest.raises(VgenError, match="'liar' writes"):
        ask("liar", seen)


def test_two_strangers_for_one_field_need_a_choice(strangers):
    strangers("mood=test_scorers:mood,liar=test_scorers:liar")
    with pytest.raises(UsageError, match="--without mood"):
        choose([])
    assert "mood" in [one.name for one in choose([], ["liar"])[0]]


# Stand-ins


def test_area_of_a_union_counts_what_overlaps_once():
    """Two boxes of 10 x 10 that share 5 x 10, in 100 x 100: 1.5 %."""
    assert union_area([Box(0, 0, 10, 10), Box(5, 0, 15, 10)], 100, 100) == pytest.approx(0.015)
    assert union_area([Box(-5, -5, 5, 5), Box(90, 90, 120, 120)], 100, 100) == pytest.approx(0.0125)
    assert union_area([], 100, 100) == 0


def lettered(share: float) -> np.ndarray:
    """A picture (H, W, 3) of which lines of text take about `share`."""
    image = np.full((360, 640, 3), (40, 60, 90), np.uint8)
    cv2.circle(image, (420, 260), 60, (180, 120, 40), -1)
    height, lines = 30, round(share * 360 * 640 / (30 * 560))
    for line in range(lines):
        spot = (30, 40 + line * 45)
        cv2.putText(image, "WORDS THAT COVER A PICTURE", spot, cv2.FONT_HERSHEY_DUPLEX, 1.1, (250, 250, 250), 2)
    assert lines * height * 560 > 0
    return image


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 0, 0.001), (0.07, 0.03, 0.1), (0.3, 0.15, 0.35)])
def test_lines_of_text_are_measured(share, low, high):
    image = lettered(share) if share else lettered(0.07) * 0 + np.uint8(90)
    assert low <= union_area(glyphs(image), *image.shape[:2]) <= high


def test_text_on_one_still_counts_and_dark_letters_as_light_ones():
    plain, text = np.full((360, 640, 3), 90, np.uint8), lettered(0.3)
    area = ask("glyphs", View(np.stack([plain, plain]), 2.0, [plain, text, plain]))["text_area"]
    assert area == ask("glyphs", View(np.stack([plain, plain]), 2.0, [text] * 3))["text_area"] > 0.15
    dark = ask("glyphs", View(np.stack([plain, plain]), 2.0, [255 - text] * 3))["text_area"]
    assert dark == pytest.approx(area, rel=0.2)


def test_sharp_and_colourful_clips_score_higher():
    clip, _ = drawn(1)
    soft = view(np.stack([cv2.GaussianBlur(frame, (0, 0), 3) for frame in clip.frames]))
    grey = view(np.repeat(clip.frames.mean(-1, keepdims=True), 3, -1).astype(np.uint8))
    assert ask("sharpness", soft)["sharpness"] < ask("sharpness", clip)["sharpness"]
    for worse in (soft, grey):
        assert 0 <= ask("colour-sharpness", worse)["aesthetic"] < ask("colour-sharpness", clip)["aesthetic"] <= 10


def test_captions_of_the_world_are_true():
    right = 0
    for index in range(8):
        seen, scene = drawn(index)
        told = ask("world-video-caption", seen)["captions.video"]
        thing = scene.object if scene.object == "teddy bear" else f"{scene.colour} {scene.object}"
        right += told == f"a {thing} {scene.motion}"
    assert right >= 7
    noise = np.random.default_rng(0).integers(0, 255, (9, 64, 64, 3), np.uint8)
    assert ask("world-video-caption", view(noise))["captions.video"] is None
    assert ask("shared-words", view(noise, image="a red ball"))["clip_sim"] is None


def test_captions_are_fused_and_agreement_is_a_cosine():
    assert fuse("a red ball on a table.", "a ball is rising slowly") == "a red ball on a table rising slowly"
    assert fuse("a red ball", "it goes up") == "a red ball, it goes up"
    assert fuse("a king", "a king sits") == "a king, a king sits"
    seen, scene = drawn(next(i for i in range(30) if world.scene(0, i).object == "ball"))
    true = f"a {scene.colour} ball {scene.motion}"
    assert ask("shared-words", view(seen.frames, image=true))["clip_sim"] == 1
    assert ask("shared-words", view(seen.frames, image="some words of another scene"))["clip_sim"] == 0
    assert ask("fused-caption", seen)["captions.fused"] is None


def test_motion_and_camera_are_measured():
    ground = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 255, (96, 400, 3), np.uint8), (0, 0), 2)
    clip = view(np.stack([ground[:, k : k + 160] for k in range(17)]))
    assert ask("farneback", clip)["motion_score"] == pytest.approx(4 * 256 / 96, rel=0.1)
    assert ask("camera", clip)["camera"]["word"] == "pan-right"


# Learned ones


def words(folder: Path) -> None:
    """A tokenizer of few words."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "ball", "blue", "box", "rising", "falling"]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)


TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SIGHT = {**TOWER, "image_size": 32, "patch_size": 16}


def clip_folder(folder: Path) -> Path:
    torch.manual_seed(0)
    told = {"vocab_size": 12, "max_position_embeddings": 16, "eos_token_id": 3, "pad_token_id": 0, "bos_token_id": 2}
    config = CLIPConfig(text_config={**TOWER, **told}, vision_config=SIGHT, projection_dim=8)
    CLIPModel(config).eval().save_pretrained(folder)
    words(folder)
    return folder


def test_clip_similarity_is_the_mean_cosine(tmp_path):
    folder, (seen, _) = clip_folder(tmp_path / "clip"), drawn(0)
    told = view(seen.frames, image="a red ball", video="a blue box falling")
    both = ask("clip-similarity", told, str(folder))["clip_sim"]
    each = [ask("clip-similarity", view(seen.frames, one=t), str(folder))["clip_sim"] for t in told.captions.values()]
    assert both == pytest.approx(np.mean(each), abs=2e-5)
    assert each[0] != each[1]
    assert -1 <= both <= 1
    assert ask("clip-similarity", seen, str(folder)) == {"clip_sim": None}


@pytest.mark.parametrize("form", ["predictor", "layers"])
def test_the_aesthetic_head_stands_on_the_normalised_embedding(tmp_path, form):
    torch.manual_seed(0)
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**SIGHT, projection_dim=8)).eval()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    sizes = [(1, 8)] if form == "predictor" else [(4, 8), (1, 4)]
    names = ["predictor"] if form == "predictor" else ["layers.0", "layers.10"]
    for name, size in zip(names, sizes, strict=True):
        weights |= {f"{name}.weight": torch.ones(size), f"{name}.bias": torch.full(size[:1], 2.0)}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    seen, _ = drawn(0)
    found = ask("clip-aesthetic", seen, str(tmp_path))["aesthetic"]
    again = ask("clip-aesthetic", seen, str(tmp_path))["aesthetic"]
    span = 8**0.5 * (1 if form == "predictor" else 4)  # of a sum over a vector of length 1
    middle = 2 if form == "predictor" else 2 + 4 * 2
    assert found == again
    assert abs(found - middle) <= span + 1e-3
    assert found != middle


def test_a_folder_without_a_head_or_without_weights_is_refused(tmp_path):
    folder = clip_folder(tmp_path / "clip")
    with pytest.raises(VgenError, match="no aesthetic head"):
        load(Chosen("clip-aesthetic", scorers.card("clip-aesthetic"), str(folder)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(VgenError, match="'blip' could not be loaded"):
        load(Chosen("blip", scorers.card("blip"), str(tmp_path / "empty")))
    weights = load_file(folder / "model.safetensors")
    save_file(dict(list(weights.items())[1:]), folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(VgenError, match="lacks 1 weights"):
        load(Chosen("clip-similarity", scorers.card("clip-similarity"), str(folder)))
    with pytest.raises(VgenError, match="There is no folder"):
        load(Chosen("blip", scorers.card("blip"), str(tmp_path / "gone")))


def test_blip_and_git_write_captions_and_the_same_ones_again(tmp_path):
    torch.manual_seed(0)
    ends = {"bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    text = {**TOWER, "vocab_size": 12, "max_position_embeddings": 64, "encoder_hidden_size": 16, **ends}
    blip = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=SIGHT, projection_dim=8)).eval()
    blip.save_pretrained(tmp_path / "blip")
    words(tmp_path / "blip")
    plain = {**TOWER, "vocab_size": 12, "max_position_embeddings": 64, "bos_token_id": 2, "eos_token_id": 3}
    git = GitForCausalLM(GitConfig(**plain, pad_token_id=0, vision_config=SIGHT, num_image_with_embedding=6)).eval()
    git.save_pretrained(tmp_path / "git")
    words(tmp_path / "git")
    seen, _ = drawn(0)
    for name, folder, field in (("blip", "blip", "captions.image"), ("git-video", "git", "captions.video")):
        told = ask(name, seen, str(tmp_path / folder))[field]
        assert told is None or isinstance(told, str)
        assert ask(name, seen, str(tmp_path / folder))[field] == told


def test_text_boxes_are_grown_and_a_detector_runs(tmp_path):
    likely = np.zeros((64, 96), np.float32)
    likely[20:30, 10:50] = 0.9
    likely[50:60, 10:20] = 0.4  # unlikely as a box
    grow = round(1.5 * 40 * 10 / (2 * 50))
    assert boxes(likely) == [Box(10 - grow, 20 - grow, 50 + grow, 30 + grow)]
    torch.manual_seed(0)
    AutoModelForObjectDetection.from_config(PPOCRV5MobileDetConfig()).eval().save_pretrained(tmp_path)
    assert 0 <= ask("pp-ocr", drawn(0)[0], str(tmp_path))["text_area"] <= 1
    assert standins.union_area(boxes(np.zeros((32, 32), np.float32)), 32, 32) == 0
