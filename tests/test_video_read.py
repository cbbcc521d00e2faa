"""Reading: exactly the frames that a player would show, from files of every measured fault, or a reason why not."""

import json
import random
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from barcode import make, number, numbers, picture, remux

from vgen import video
from vgen.errors import UsageError
from vgen.probe import probe
from vgen.video import BadClip, available, frames, read

X264 = "bframes=3:b-adapt=0:scenecut=0"
X265 = "log-level=none:bframes=3:b-adapt=0"
OPEN = {"x264-params": f"{X264}:open-gop=1"}
CLOSED = {"x264-params": X264}


def check(path: Path, first: int, count: int, decoder: str, why: str = "") -> dict[str, Any]:
    """Every way of reading gives the frames `first` and on, by `decoder`."""
    seen = probe(path)
    assert seen.decoder == decoder
    assert why in seen.why
    clip = read(path)
    assert numbers(clip.frames) == list(range(first, first + count))
    assert clip.pts == seen.pts
    assert numbers(frames(path)) == list(range(first, first + count))
    assert numbers(read(path, num_frames=3, every=2, start=float(5 / seen.fps)).frames) == [
        first + k for k in (5, 7, 9)
    ]
    assert clip.source["decoder"] == decoder
    json.dumps(clip.source)
    return clip.source


@pytest.mark.parametrize("fps", [Fraction(10), Fraction(30000, 1001), Fraction(24), Fraction(60)])
@pytest.mark.parametrize("kind", ["mp4", "mov", "mkv"])
def test_constant_rate(tmp_path: Path, kind: str, fps: Fraction) -> None:
    path = make(tmp_path / f"a.{kind}", 30, fps, options=CLOSED)
    source = check(path, 0, 30, "decord")
    seen = probe(path)
    assert (seen.fps, seen.vfr, seen.width, seen.height, seen.codec) == (fps, False, 128, 48, "h264")
    assert all(abs(stamp - k / fps) <= seen.time_base for k, stamp in enumerate(seen.pts))
    assert abs(seen.duration - 30 / fps) <= seen.time_base
    assert source["bytes"] == path.stat().st_size
    assert source["sha256"] == video.file_sha256(path)


def test_hevc_and_vp9_and_vp8(tmp_path: Path) -> None:
    closed = {"x265-params": f"{X265}:open-gop=0"}
    assert check(make(tmp_path / "a.mp4", codec="libx265", options=closed), 0, 30, "decord")["codec"] == "hevc"
    fast = {"deadline": "realtime"}
    assert check(make(tmp_path / "a.webm", codec="libvpx-vp9", options=fast), 0, 30, "decord")["codec"] == "vp9"
    hidden = {"auto-alt-ref": "1", "lag-in-frames": "16"}
    assert check(make(tmp_path / "b.webm", codec="libvpx", options=hidden), 0, 30, "decord")["codec"] == "vp8"


@pytest.mark.parametrize(
    ("name", "settings", "why"),
    [
        ("a.avi", {"options": CLOSED}, "AVI"),
        ("a.avi", {"codec": "mpeg4", "bframes": 2}, "AVI"),
        ("a.avi", {"codec": "mpeg4", "bframes": 0}, "AVI"),
        ("a.avi", {"codec": "mjpeg", "pix_fmt": "yuvj420p"}, "AVI"),
        ("a.ts", {"options": CLOSED}, "MPEG-TS"),
        ("a.mp4", {"options": OPEN}, "open groups"),
        ("a.mp4", {"options": {"x264-params": "intra-refresh=1"}}, "open groups"),
        ("a.mp4", {"codec": "libx265", "options": {"x265-params": f"{X265}:open-gop=1"}}, "open groups"),
        ("a.mp4", {"codec": "libsvtav1", "size": (64, 128)}, "AV1"),
        ("a.mp4", {"codec": "mpeg4", "bframes": 2}, "not trusted with mpeg4"),
        ("a.mpg", {"codec": "mpeg2video", "fps": Fraction(25), "bframes": 2}, "not trusted with mpeg2video"),
        ("a.flv", {}, "not trusted with h264 in flv"),
        ("a.gif", {"codec": "gif", "pix_fmt": "rgb8"}, "not trusted with gif"),
        ("a.mov", {"codec": "prores_ks", "pix_fmt": "yuv422p10le"}, "not trusted with prores"),
    ],
)
def test_files_that_decord_gets_wrong_are_read_by_pyav(
    tmp_path: Path, name: str, settings: dict[str, Any], why: str
) -> None:
    source = check(make(tmp_path / name, 30, **settings), 0, 30, "pyav", why)
    assert why in source["why"]


def test_variable_rate_is_read_by_the_stamps(tmp_path: Path) -> None:
    stamps = [0, 1, 2, 5, 6, 9, 10, 11, 15, 16, 17, 20]
    path = make(tmp_path / "a.mp4", len(stamps), pts=stamps)
    seen = probe(path)
    assert seen.vfr
    assert "varies" in seen.why
    assert seen.pts == tuple(Fraction(s, 10) for s in stamps)
    assert numbers(frames(path)) == list(range(12))
    shown = [max(k for k, s in enumerate(stamps) if s <= t) for t in range(21)]
    assert numbers(read(path, fps=10).frames)[:21] == shown
    assert numbers(read(path, fps=5, start=0.5, num_frames=4).frames) == [shown[t] for t in (5, 7, 9, 11)]
    assert read(path, fps=10).pts[4] == Fraction(2, 10)


def test_a_cut_shows_what_its_edit_list_shows(tmp_path: Path) -> None:
    whole = make(tmp_path / "whole.mp4", 60, options=CLOSED)
    check(remux(whole, tmp_path / "cut.mp4", start=1.7), 17, 43, "pyav", "edit list")
    check(remux(whole, tmp_path / "cut.mkv", start=1.2), 12, 48, "decord")
    late = remux(whole, tmp_path / "late.mp4", offset=2.0)
    check(late, 0, 60, "pyav", "start at 0")
    assert probe(late).pts[0] == 2


@pytest.mark.parametrize(("options", "part"), [(CLOSED, 0.2), (CLOSED, 0.3), (CLOSED, 0.45), (OPEN, 0.2), (OPEN, 0.3)])
def test_a_stream_tuned_in_to_begins_at_its_first_whole_frame(
    tmp_path: Path, options: dict[str, str], part: float
) -> None:
    whole = make(tmp_path / "whole.ts", 60, options=options)
    good, data = read(whole).frames, whole.read_bytes()
    cut = tmp_path / "cut.ts"
    cut.write_bytes(data[int(len(data) * part) // 188 * 188 :])
    clip = read(cut)
    got = numbers(clip.frames)
    assert got == list(range(got[0], 60))
    assert 0 < got[0] < 40
    assert clip.pts[0] == probe(whole).pts[got[0]]
    assert (clip.frames.int() - good[got].int()).abs().max() < 40


def test_a_stream_tuned_in_to_where_no_start_is_clean_is_refused(tmp_path: Path) -> None:
    whole = make(tmp_path / "whole.ts", 60, options=OPEN)
    data = whole.read_bytes()
    whole.write_bytes(data[int(len(data) * 0.45) // 188 * 188 :])
    with pytest.raises(BadClip, match="first frame does not decode"):
        read(whole)


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotated_clips_come_upright(tmp_path: Path, rotation: int) -> None:
    path = make(tmp_path / "a.mp4", 12, rotation=rotation)
    seen = probe(path)
    assert seen.rotation == rotation
    assert not seen.mirrored
    assert (seen.width, seen.height) == ((48, 128) if rotation % 180 else (128, 48))
    check(path, 0, 12, "pyav", "rotation")


def test_mirrored_clips_come_upright(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 128, "yuv420p"
        stream.set_display_rotation(0, hflip=True)
        mirrored = np.ascontiguousarray(picture(37)[:, ::-1])
        container.mux(stream.encode(av.VideoFrame.from_ndarray(mirrored, format="rgb24")))
        container.mux(stream.encode())
    assert probe(path).mirrored
    assert numbers(read(path).frames) == [37]


def test_ten_bits_become_eight_and_say_so(tmp_path: Path) -> None:
    options = {"x265-params": f"{X265}:open-gop=0"}
    path = make(tmp_path / "a.mp4", codec="libx265", pix_fmt="yuv420p10le", options=options)
    assert "10 to 8 bits" in check(path, 0, 30, "pyav", "10 bits")["converted"]


@pytest.mark.parametrize("space", [(1, 1), (6, 5), (9, 9)])
@pytest.mark.parametrize("limits", [1, 2])
@pytest.mark.parametrize("turn", [0, 180])
def test_colours_follow_the_tags(tmp_path: Path, space: tuple[int, int], limits: int, turn: int) -> None:
    tag, matrix = space
    colours = np.array([[200, 30, 40], [20, 180, 60], [30, 60, 220], [250, 250, 250], [5, 5, 5]], np.uint8)
    patch = np.ascontiguousarray(np.broadcast_to(colours.repeat(16, 0), (48, 80, 3)))
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=10, options={"crf": "8"})
        stream.height, stream.width, stream.pix_fmt = 48, 80, "yuv420p" if limits == 1 else "yuvj420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = tag, limits
        if turn:
            stream.set_display_rotation(turn)
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(patch, format="rgb24")
            frame = frame.reformat(format=stream.pix_fmt, dst_colorspace=matrix, dst_color_range=limits)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    clip = read(path)
    assert clip.source["decoder"] == ("pyav" if turn else "decord")
    got = clip.frames[:, 24, 8::16].int()
    assert (got - torch.from_numpy(colours[::-1].copy() if turn else colours).int()).abs().max() <= 3


def test_frames_are_chosen_by_time(tmp_path: Path) -> None:
    path = make(tmp_path / "a.mp4", 30, options=CLOSED)
    assert numbers(read(path, fps=20, num_frames=6).frames) == [0, 0, 1, 1, 2, 2]
    assert numbers(read(path, fps=4).frames) == [0, 2, 5, 7, 10, 12, 15, 17, 20, 22, 25, 27]
    assert numbers(read(path, fps=Fraction(10), start=2.95, num_frames=1).frames) == [29]
    assert numbers(read(path, every=7).frames) == [0, 7, 14, 21, 28]
    assert read(path, every=7).fps == Fraction(10, 7)
    assert read(path, fps=4, every=2).fps == 2
    assert read(path, fps=23.976, num_frames=2).fps == Fraction(2997, 125)
    assert (available(probe(path)), available(probe(path), 4), available(probe(path), 10, start=1)) == (30, 12, 20)
    ntsc = make(tmp_path / "b.mkv", 90, Fraction(30000, 1001))
    assert numbers(read(ntsc, fps=30, num_frames=45).frames) == list(range(45))
    assert numbers(read(ntsc, fps=Fraction(30000, 1001)).frames) == list(range(90))


def test_too_few_frames_are_counted_in_the_reason(tmp_path: Path) -> None:
    path = make(tmp_path / "a.mp4", 12)
    with pytest.raises(BadClip, match="it has 12 frames, 13 are needed"):
        read(path, num_frames=13)
    with pytest.raises(BadClip, match=r"it has 0 frames after 1\.2 s, 1 are needed"):
        read(path, start=1.2)
    with pytest.raises(UsageError):
        read(path, every=0)


def test_a_long_film_is_not_decoded_to_its_end(tmp_path: Path) -> None:
    """Damage behind the last frame needed is never met, before it always."""
    for name, options in (("a.mp4", CLOSED), ("b.mp4", OPEN)):
        path = make(tmp_path / name, 100, options=options)
        _zero(path, 70)
        assert numbers(read(path, num_frames=17).frames) == list(range(17))
        with pytest.raises(BadClip, match="damaged"):
            read(path)
        with pytest.raises(BadClip, match="damaged"):
            read(path, num_frames=17, whole=True)
        with pytest.raises(BadClip, match="damaged"):
            list(frames(path))


def test_a_late_start_seeks_past_what_is_damaged_before(tmp_path: Path) -> None:
    path = make(tmp_path / "a.mp4", 100, options=CLOSED, rotation=180)
    _zero(path, 20)
    assert numbers(read(path, start=5.0, num_frames=3).frames) == [50, 51, 52]


@pytest.mark.parametrize(("kind", "options"), [("mp4", CLOSED), ("mkv", CLOSED), ("mp4", OPEN)])
def test_every_frame_can_be_the_first(tmp_path: Path, kind: str, options: dict[str, str]) -> None:
    path = make(tmp_path / f"a.{kind}", 60, options=options, rotation=180 if kind == "mp4" else 0)
    seen = probe(path)
    got = [numbers(read(path, start=k / 10, num_frames=2, seen=seen).frames) for k in range(59)]
    assert got == [[k, k + 1] for k in range(59)]


def _zero(path: Path, index: int) -> None:
    """Overwrite the packet of one frame with zeros."""
    with av.open(str(path)) as container:
        packets = [p for p in container.demux(video=0) if p.size]
        place = sorted(packets, key=lambda p: p.pts or 0)[index]
        at, size = place.pos or 0, place.size
    data = bytearray(path.read_bytes())
    data[at : at + size] = bytes(size)
    path.write_bytes(data)


@pytest.mark.parametrize("seed", range(12))
def test_one_flipped_bit_gives_no_damaged_frame(tmp_path: Path, seed: int) -> None:
    path = make(tmp_path / "a.mp4", 60, options=CLOSED)
    good = read(path).frames
    data, draw = bytearray(path.read_bytes()), random.Random(seed)
    begin = data.find(b"mdat") + 1000  # behind the encoder's text
    data[draw.randrange(begin, data.rfind(b"moov") - 4)] ^= 1 << draw.randrange(8)
    path.write_bytes(data)
    try:
        got = read(path).frames
    except BadClip:
        return
    assert (got.int() - good.int()).abs().max() < 40


def test_cut_files_are_told_by_their_own_length(tmp_path: Path) -> None:
    made = {
        "a.mp4": make(tmp_path / "a.mp4", 30),
        "b.mkv": make(tmp_path / "b.mkv", 30),
        "c.avi": make(tmp_path / "c.avi", 30, codec="mpeg4", options={"b": "2000000"}),
    }
    with (
        av.open(str(made["a.mp4"])) as old,
        av.open(str(tmp_path / "d.mp4"), "w", options={"movflags": "faststart"}) as new,
    ):
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)
    made["d.mp4"] = tmp_path / "d.mp4"
    for name, file in made.items():
        data = file.read_bytes()
        cut = tmp_path / f"cut-{name}"
        cut.write_bytes(data[: len(data) * 9 // 10])
        with pytest.raises(BadClip, match="cut short" if name != "a.mp4" else "cut short|not a readable"):
            probe(cut)


@pytest.mark.parametrize("part", [0.4, 0.5, 0.6, 0.7, 0.8])
def test_a_cut_transport_stream_gives_each_frame_at_its_time_or_nothing(tmp_path: Path, part: float) -> None:
    whole = make(tmp_path / "a.ts", 60, options=CLOSED)
    good, data = read(whole).frames, whole.read_bytes()
    cut = tmp_path / "cut.ts"
    cut.write_bytes(data[: int(len(data) * part)])
    clip = read(cut)
    begin = probe(whole).pts[0]
    got = numbers(clip.frames)
    assert got == [(stamp - begin) * 10 for stamp in clip.pts]
    assert len(got) == len(set(got)) > 60 * part - 8
    assert (clip.frames.int() - good[got].int()).abs().max() < 40


def test_what_is_no_video_says_so(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("I am no video.\n" * 50)
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n")
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream: Any = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    plain = make(tmp_path / "plain.mp4", 3).read_bytes()
    (tmp_path / "codec.mp4").write_bytes(plain.replace(b"avc1", b"zzzz").replace(b"avcC", b"zzzC"))
    reasons = {
        "codec.mp4": "no decoder for its video stream",
        "empty.mp4": "it is empty",
        "text.mp4": "not a readable video",
        "list.mp4": "not a readable video",
        "sound.mp4": "no video stream",
        "missing.mp4": "there is no such file",
        ".": "it is a folder",
    }
    for name, reason in reasons.items():
        with pytest.raises(BadClip, match=reason) as told:
            probe(tmp_path / name)
        assert told.value.path == tmp_path / name


def test_nothing_is_printed_about_damage(tmp_path: Path) -> None:
    path = make(tmp_path / "a.mp4", 30, options=CLOSED)
    _zero(path, 20)
    code = "import sys\nfrom vgen.video import BadClip, read\ntry: read(sys.argv[1])\nexcept BadClip: sys.exit(7)"
    run = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (7, "", "")


def test_without_decord_everything_is_read_by_pyav(tmp_path: Path) -> None:
    path = make(tmp_path / "a.mp4", 5)
    code = (
        "import sys; sys.modules['decord'] = None\n"  # as Python says that a module cannot be imported
        "from vgen.video import read\n"
        "clip = read(sys.argv[1])\n"
        "print(clip.source['decoder'], len(clip.frames), clip.source['why'])\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "pyav 5 decord is not installed"


def test_sound_and_odd_names_do_no_harm(tmp_path: Path) -> None:
    plain = make(tmp_path / "a.mp4", 20)
    path = tmp_path / "with sound: ü%03d.mp4"
    with av.open(str(plain)) as old, av.open(f"file:{path}", "w", format="mp4") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        sound: Any = new.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 32000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        new.mux(sound.encode(frame))
        new.mux(sound.encode())
        for packet in old.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)
    assert probe(path).has_audio
    assert not probe(plain).has_audio
    check(path, 0, 20, "decord")
    assert number(next(iter(frames(path)))) == 0
