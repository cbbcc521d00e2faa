"""Inputs: what a command line names, captions, and the geometry of what a model gets."""

import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from barcode import make, numbers, picture
from PIL import Image

from vgen import world
from vgen.clips import bucket, discover, load, load_file
from vgen.errors import UsageError, VgenError
from vgen.probe import BadClip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """b.mp4, a/c.webm, a/d.png, and things that are no inputs."""
    make(tmp_path / "b.mp4", 6)
    (tmp_path / "a" / ".hidden").mkdir(parents=True)
    make(tmp_path / "a" / "c.webm", 6, codec="libvpx-vp9", options={"deadline": "realtime"})
    Image.fromarray(picture(5)).save(tmp_path / "a" / "d.png")
    for name in ("notes.md", ".vgen-1.mp4", "a/.hidden/e.mp4", "b.txt"):
        (tmp_path / name).write_text("a red ball\n\n a ball that is red \n")
    return tmp_path


def names(found: list, folder: Path) -> list[str]:
    return [item.path.relative_to(folder).as_posix() for item in found]


def test_folders_files_and_globs_name_each_clip_once(folder: Path) -> None:
    assert names(discover([str(folder)]), folder) == ["a/c.webm", "a/d.png", "b.mp4"]
    assert [item.kind for item in discover([str(folder)])] == ["video", "image", "video"]
    assert names(discover([f"{folder}/b.mp4", str(folder)]), folder) == ["b.mp4", "a/c.webm", "a/d.png"]
    assert names(discover([f"{folder}/**/*.webm"]), folder) == ["a/c.webm"]
    assert names(discover([f"{folder}/*"]), folder) == ["a/c.webm", "a/d.png", "b.mp4"]


def test_names_that_nothing_answers_to_are_refused(folder: Path) -> None:
    (folder / "empty").mkdir()
    for wrong in ("no.mp4", "*.avi", "empty"):
        with pytest.raises(UsageError, match=wrong.replace("*", r"\*")):
            discover([f"{folder}/{wrong}"])
    for wrong in ("world", "world:many", "world-big:3", "world:3:"):
        with pytest.raises(UsageError, match="world:COUNT"):
            discover([wrong])
    for nothing in ([], ["world:0"]):
        with pytest.raises(UsageError, match="No clips"):
            discover(nothing)


def test_captions_beside_a_clip(folder: Path) -> None:
    found = {item.path.name: item.captions for item in discover([str(folder)])}
    assert found == {"b.mp4": ("a red ball", "a ball that is red"), "c.webm": (), "d.png": ()}
    (folder / "b.txt").write_bytes(b"caf\xe9")
    with pytest.raises(VgenError, match="UTF-8"):
        discover([str(folder)])


def test_captions_in_one_file(folder: Path) -> None:
    table = folder / "captions.csv"
    table.write_text('\ufefffile,caption,score\nb.mp4,"one, two",1\na/c.webm,three,2\nb.mp4,four,3\n')
    found = {item.path.name: item.captions for item in discover([str(folder)], table)}
    assert found == {"b.mp4": ("one, two", "four"), "c.webm": ("three",), "d.png": ()}
    lines = folder / "captions.jsonl"
    lines.write_text(json.dumps({"file": str(folder / "a" / "d.png"), "caption": "ein Bär"}) + "\n\n")
    only = discover([], lines)
    assert [(item.path.name, item.kind, item.captions) for item in only] == [("d.png", "image", ("ein Bär",))]


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("c.csv", "file,caption\nb.mp4,x\nlost.mp4,y\n", "line 3: there is no file 'lost.mp4'"),
        ("c.csv", "path,caption\nb.mp4,x\n", "'file' and 'caption'"),
        ("c.csv", "file,caption\nb.mp4\n", "line 2"),
        ("c.jsonl", '{"file": "b.mp4", "caption": 3}\n', "line 1"),
        ("c.jsonl", '\n{"file": \n', "line 2: this is not JSON"),
        ("c.jsonl", '["b.mp4"]\n', "line 1"),
        ("c.xml", "<a/>", "csv and .jsonl"),
    ],
)
def test_wrong_caption_files_are_refused(folder: Path, name: str, text: str, told: str) -> None:
    (folder / name).write_text(text)
    with pytest.raises(UsageError, match=told):
        discover([str(folder)], folder / name)


def test_clips_of_the_world() -> None:
    found = discover(["world:3", "world-full:2:7", "world:2"])
    assert [str(item.path) for item in found] == [
        "world:0/0",
        "world:0/1",
        "world:0/2",
        "world-full:7/0",
        "world-full:7/1",
    ]
    pixels, cover, caption, _ = world.clip(7, 1, 5, 32, 48, variety="full")
    loaded = load(found[4], 5, 32, 48)
    assert torch.equal(loaded.pixels, pixels)
    assert torch.equal(loaded.extra["mask"], cover)
    assert found[4].captions == (caption,)
    assert len({item.sha256() for item in found}) == 5
    assert bucket(found[0], [(1, 64, 64), (9, 32, 48)]) == (9, 32, 48)
    assert load(found[0], 3, 32, 32, fps=4).record["pts"] == ["0", "1/4", "1/2"]


def test_a_clip_covers_the_frame_and_is_cut_at_the_centre(tmp_path: Path) -> None:
    path = make(tmp_path / "a.mp4", 8, size=(48, 128))
    pixels, record = load_file(path, 5, 24, 24)
    assert pixels.shape == (3, 5, 24, 24)
    assert pixels.min() >= -1
    assert pixels.max() <= 1
    assert record["orig_hw"] == [48, 128]
    assert record["resize_hw"] == [24, 64]
    assert record["crop_xyxy"] == [20, 0, 44, 24]
    assert record["pts"] == ["0", "1/10", "1/5", "3/10", "2/5"]
    assert record["fps"] == "10"
    assert record["source"]["uri"] == str(path)
    assert record["decoder"]["name"] == "decord"
    full, _ = load_file(path, 5, 48, 128)
    centre = torch.nn.functional.interpolate(full.transpose(0, 1), (24, 64), mode="area").transpose(0, 1)[..., 20:44]
    assert (pixels - centre).abs().mean() < 0.05
    json.dumps(record)


def test_a_clip_of_the_size_asked_for_is_not_touched(tmp_path: Path) -> None:
    Image.fromarray(picture(9)).save(tmp_path / "a.png")
    pixels, record = load_file(tmp_path / "a.png", 1, 48, 128)
    back = ((pixels + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0)
    assert torch.equal(back[0], torch.from_numpy(picture(9)))
    assert record["resize_hw"] == record["orig_hw"] == [48, 128]


def test_frames_are_taken_at_the_rate_asked_for(tmp_path: Path) -> None:
    path = make(tmp_path / "a.mp4", 30)
    pixels, record = load_file(path, 5, 48, 128, fps=5)
    shown = ((pixels + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0)
    assert numbers(shown) == [0, 2, 4, 6, 8]
    assert Fraction(record["fps"]) == 5
    with pytest.raises(BadClip, match="it has 15 frames at 5 fps, 16 are needed"):
        load_file(path, 16, 48, 128, fps=5)


def test_pixels_that_are_not_square_and_images_that_lie_on_their_side(tmp_path: Path) -> None:
    path = make(tmp_path / "a.mp4", 3, size=(48, 64), options={"x264-params": "sar=2/1"})
    _, record = load_file(path, 1, 24, 64)
    assert record["resize_hw"] == [24, 64]
    picture_file = tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    upright = torch.from_numpy(picture(5, 96, 64))
    Image.fromarray(torch.rot90(upright, 1).contiguous().numpy()).save(picture_file, exif=exif, quality=95)
    pixels, _ = load_file(picture_file, 1, 96, 64)
    assert numbers(((pixels + 1) * 127.5).to(torch.uint8).permute(1, 2, 3, 0)) == [5]
    (item,) = discover([str(picture_file)])
    assert bucket(item, [(1, 64, 96), (1, 96, 64)]) == (1, 96, 64)


def test_the_bucket_nearest_in_shape_that_the_clip_fills(tmp_path: Path) -> None:
    (wide,) = discover([str(make(tmp_path / "a.mp4", 20, size=(48, 128)))])
    sizes = [(17, 64, 64), (17, 32, 64), (25, 24, 64), (9, 32, 64), (17, 64, 32)]
    assert bucket(wide, sizes) == (17, 32, 64)
    assert bucket(wide, sizes, fps=5) == (9, 32, 64)
    (tall,) = discover([str(make(tmp_path / "b.mp4", 20, size=(48, 128), rotation=90))])
    assert bucket(tall, sizes) == (17, 64, 32)
    with pytest.raises(BadClip, match="it has 20 frames, 25 are needed"):
        bucket(wide, [(25, 24, 64), (33, 24, 64)])


def test_bad_inputs_say_why(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(BadClip, match="not a readable image"):
        load_file(tmp_path / "a.png", 1, 8, 8)
    Image.fromarray(picture(1)).save(tmp_path / "b.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:120])
    with pytest.raises(BadClip, match="damaged"):
        load_file(tmp_path / "b.png", 1, 8, 8)
    Image.fromarray(picture(1)).save(tmp_path / "c.png")
    with pytest.raises(BadClip, match="it has 1 frame, 9 are needed"):
        load_file(tmp_path / "c.png", 9, 8, 8)
    short = make(tmp_path / "d.mp4", 4)
    with pytest.raises(BadClip, match="it has 4 frames, 9 are needed"):
        load_file(short, 9, 8, 8)
