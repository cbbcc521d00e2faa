"""Written clips: exact frames, rates, sizes, colours and records; nothing half-written is ever left."""

import errno
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from barcode import number, numbers, picture
from PIL import Image
from torch import Tensor

from vgen.errors import UsageError, VgenError
from vgen.outputs import check_output, sheet_of, spread, whole
from vgen.probe import probe
from vgen.video import frames, read
from vgen.video_write import contact_sheet, read_metadata, write

RECORD = {"prompt": 'a "red" bear — ü\n', "seed": 7, "big": "x" * 3000}


def barcodes(count: int, height: int = 48, width: int = 128) -> list[Tensor]:
    return [torch.from_numpy(picture(k, height, width)) for k in range(count)]


@pytest.mark.parametrize("kind", ["mp4", "webm", "gif"])
@pytest.mark.parametrize("size", [(48, 128), (65, 33)])
def test_what_goes_in_comes_out(tmp_path: Path, kind: str, size: tuple[int, int]) -> None:
    path = write(tmp_path / f"a.{kind}", iter(barcodes(9, *size)), Fraction(8), metadata=RECORD)
    clip = read(path)
    assert clip.frames.shape == (9, *size, 3)
    assert numbers(clip.frames) == list(range(9))
    assert read_metadata(path) == RECORD
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("fps", [Fraction(30000, 1001), Fraction(24000, 1001), Fraction(7), Fraction(59, 7)])
def test_mp4_keeps_the_exact_rate_and_stamps(tmp_path: Path, fps: Fraction) -> None:
    seen = probe(write(tmp_path / "a.mp4", barcodes(20), fps))
    assert seen.fps == fps
    assert seen.pts == tuple(k / fps for k in range(20))
    assert seen.duration == 20 / fps


def test_webm_keeps_the_rate_and_gif_stays_within_half_a_hundredth(tmp_path: Path) -> None:
    fps = Fraction(30000, 1001)
    assert probe(write(tmp_path / "a.webm", barcodes(10), fps)).fps == fps
    stamps = probe(write(tmp_path / "a.gif", barcodes(10), Fraction(12))).pts
    assert all(abs(stamp - Fraction(k, 12)) <= Fraction(1, 200) for k, stamp in enumerate(stamps))


def test_equal_frames_of_a_gif_are_all_kept(tmp_path: Path) -> None:
    still = barcodes(1) * 5
    assert numbers(read(write(tmp_path / "a.gif", still, Fraction(10))).frames) == [0] * 5


@pytest.mark.parametrize("kind", ["mp4", "webm"])
def test_colours_survive_and_are_tagged(tmp_path: Path, kind: str) -> None:
    colours = torch.tensor(
        [[200, 30, 40], [20, 180, 60], [30, 60, 220], [250, 250, 250], [5, 5, 5], [128, 128, 128], [240, 200, 20]]
    ).to(torch.uint8)
    patch = colours.repeat_interleave(16, 0).expand(64, -1, -1)
    path = write(tmp_path / f"a.{kind}", [patch] * 4, Fraction(8))
    clip = read(path)
    middle = clip.frames[:, 32, 8::16].int()
    assert (middle - colours.int()).abs().max() <= 3
    assert (torch.stack(list(frames(path)))[:, 32, 8::16].int() - colours.int()).abs().max() <= 3
    seen = probe(path)
    assert (seen.color_primaries, seen.color_trc, seen.color_space, seen.color_range) == (1, 1, 1, 1)


def test_mp4_starts_with_its_index_and_plays_in_common_players(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", barcodes(5), Fraction(8))
    data = path.read_bytes()
    assert 0 < data.find(b"moov") < data.find(b"mdat")
    assert probe(path).pix_fmt == "yuv420p"
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.name == "h264"


def test_pngs_are_exact_and_replace_only_frames(tmp_path: Path) -> None:
    made = barcodes(3)
    folder = write(tmp_path / "out", made, Fraction(8), metadata=RECORD)
    assert sorted(p.name for p in folder.iterdir()) == [f"frame_0000{k}.png" for k in range(3)]
    for k in range(3):
        with Image.open(folder / f"frame_0000{k}.png") as image:
            assert torch.equal(torch.from_numpy(np.array(image)), made[k])
    assert read_metadata(folder) == RECORD
    write(folder, made[:2], Fraction(8))
    assert len(list(folder.iterdir())) == 2
    assert read_metadata(folder) == {}
    (folder / "diary.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds other files"):
        write(folder, made, Fraction(8))
    assert (folder / "diary.txt").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.gif", "a"])
def test_a_failure_half_way_leaves_the_old_file_and_nothing_else(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, barcodes(4), Fraction(8), metadata={"old": True})

    def failing():
        yield from barcodes(3)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        write(path, failing(), Fraction(8))
    with pytest.raises(VgenError, match="Frame 1 is"):
        write(path, [barcodes(1)[0], barcodes(1, 64, 64)[0]], Fraction(8))
    assert read_metadata(path) == {"old": True}
    assert [p.name for p in tmp_path.iterdir()] == [name]


FULL = """
import resource, signal, sys
from fractions import Fraction
import torch
from vgen.errors import VgenError
from vgen.video_write import write
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
noise = torch.randint(0, 255, (8, 96, 96, 3), dtype=torch.uint8)
for name in ("a.mp4", "a.webm", "a.gif", "a"):
    try:
        write(f"{sys.argv[1]}/{name}", noise, Fraction(8))
    except VgenError as error:
        print(error)
"""


def test_a_disk_that_refuses_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=True)
    assert run.stdout.count("File too large") == 4
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    def half_way() -> None:
        with whole(tmp_path / "a.bin") as temporary:
            temporary.write_bytes(b"something")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(VgenError, match="Free some space"):
        half_way()
    assert list(tmp_path.iterdir()) == []


def test_frames_of_another_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(VgenError, match="no frames"):
        write(tmp_path / "a.mp4", [], Fraction(8))
    with pytest.raises(VgenError, match="uint8"):
        write(tmp_path / "a.mp4", [torch.rand(8, 8, 3)], Fraction(8))
    with pytest.raises(UsageError, match="latent"):
        write(tmp_path / "a.safetensors", barcodes(1), Fraction(8))
    with pytest.raises(UsageError, match="up to 50"):
        write(tmp_path / "a.gif", barcodes(1), Fraction(60))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["mp4", "webm", "gif"])
@pytest.mark.parametrize("side", [1, 2, 5, 16])
def test_tiny_frames_are_written_as_they_are(tmp_path: Path, kind: str, side: int) -> None:
    grey = torch.full((3, side, side, 3), 128, dtype=torch.uint8)
    clip = read(write(tmp_path / f"a.{kind}", grey, Fraction(8)))
    assert clip.frames.shape == grey.shape
    assert (clip.frames.int() - 128).abs().max() <= 3


def test_one_frame_is_a_picture(tmp_path: Path) -> None:
    (frame,) = barcodes(1)
    path = write(tmp_path / "a.PNG", [frame], Fraction(1), metadata={"seed": 7})
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert torch.equal(torch.from_numpy(np.array(image)), frame)
    assert read_metadata(path) == {"seed": 7}
    with pytest.raises(UsageError, match="is one picture"):
        write(path, barcodes(2), Fraction(8))
    assert read_metadata(path) == {"seed": 7}


def test_contact_sheet_shows_every_frame_enlarged(tmp_path: Path) -> None:
    sheet = contact_sheet(barcodes(5, 24, 64), tmp_path / "s.png", columns=3)
    with Image.open(sheet) as image:
        pixels = torch.from_numpy(np.array(image))
    assert pixels.shape == (2 * 48 + 2, 3 * 128 + 4, 3)
    shown = [pixels[r * 50 : r * 50 + 48, c * 130 : c * 130 + 128] for r in range(2) for c in range(3)]
    assert [number(tile) for tile in shown[:5]] == list(range(5))
    assert shown[5].min() == 255


def test_outputs_are_checked_before_work(tmp_path: Path) -> None:
    for name, kind in [
        ("a.mp4", ".mp4"),
        ("b.WEBM", ".webm"),
        ("c.gif", ".gif"),
        ("p.png", ".png"),
        ("d", ""),
        ("e.v1/", ""),
    ]:
        assert check_output(f"{tmp_path}/{name}") == kind
    assert check_output(tmp_path / "deep" / "er" / "l.safetensors") == ".safetensors"
    with pytest.raises(UsageError, match=r"Did you mean '\.mp4'"):
        check_output(tmp_path / "a.mp44")
    (tmp_path / "a.mp4").write_bytes(b"old")
    with pytest.raises(UsageError, match="--overwrite"):
        check_output(tmp_path / "a.mp4")
    assert check_output(tmp_path / "a.mp4", overwrite=True) == ".mp4"
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match="is a file"):
        check_output(tmp_path / "file", overwrite=True)
    with pytest.raises(VgenError, match="is not a folder"):
        check_output(tmp_path / "file" / "a.mp4")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mp4", "file"]


def test_names_of_several_outputs_and_of_a_sheet() -> None:
    assert spread(Path("o/a.mp4"), 1) == [Path("o/a.mp4")]
    assert spread(Path("o/a.mp4"), 11)[:2] == [Path("o/a-00.mp4"), Path("o/a-01.mp4")]
    assert spread(Path("o/a"), 2) == [Path("o/a-0"), Path("o/a-1")]
    assert sheet_of(Path("o/a.mp4")) == Path("o/a.sheet.png")


def test_outputs_need_no_heavy_import() -> None:
    code = "import sys, vgen.outputs; sys.exit(any(m in sys.modules for m in ('torch', 'av', 'numpy', 'PIL')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
