"""Run records and the TOML they are written in, against the standard library's reader."""

import math
import os
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

from vgen import record, settings
from vgen.errors import UsageError
from vgen.options import SampleOptions, opt

NASTY = [
    "",
    "plain",
    'a "quote"',
    "back\\slash",
    "new\nline",
    "tab\t",
    "\x00\x1f\x7f",
    "ü 猫 🎬",
    "'''",
    '"""',
    "# no",
    "a=b",
]


def test_values_come_back():
    table = {
        "text": NASTY,
        "whole": [0, -5, 2**62],
        "real": [0.1, -1e-9, 1e300, 3.0, float("inf")],
        "flag": True,
        "off": False,
        "path": Path("a/b c.mp4"),
        "empty": [],
        "nested": [[1, 2], ["x"]],
        "inline": [{"a": 1, "b.c": "d"}],
        "table": {"key with space": 1, "deep": {"ü": "v", "none": None}, "blank": {}},
    }
    back = tomllib.loads(record.dumps(table))
    assert back == {**table, "path": "a/b c.mp4", "table": {"key with space": 1, "deep": {"ü": "v"}, "blank": {}}}
    assert [type(v) for v in back["real"]] == [float] * 5


@pytest.mark.parametrize("text", NASTY)
def test_any_text_is_a_key(text):
    assert tomllib.loads(record.dumps({text: {text: 1}})) == {text: {text: 1}}


def test_not_a_number_and_none():
    back = tomllib.loads(record.dumps({"nan": math.nan, "none": None}))
    assert list(back) == ["nan"]
    assert math.isnan(back["nan"])


def test_a_strange_value_is_refused():
    with pytest.raises(TypeError):
        record.dumps({"x": object()})


def test_lone_surrogates_do_not_break_the_file(tmp_path):
    path = tmp_path / "r.toml"
    path.write_bytes(record.dumps({"name": os.fsdecode(b"caf\xe9")}).encode())
    assert tomllib.loads(path.read_text())["name"].startswith("caf")


def told(**more):
    options = SampleOptions(prompt="a bear", seed=3, num_frames=9, output=Path("x.mp4"), **more)
    return record.Run("sample", "toy", record.plain(options), {"reference": "demo", "demo": True})


def test_the_record_lies_beside_a_file_and_inside_a_folder(tmp_path):
    assert told().write(tmp_path / "x.mp4") == tmp_path / "x.mp4.toml"
    (tmp_path / "out").mkdir()
    assert told().write(tmp_path / "out") == tmp_path / "out" / "run.toml"


def test_the_record_tells_and_repeats(tmp_path):
    clip = tmp_path / "x.mp4"
    clip.write_bytes(b"abc")
    path = told().write(clip, device="cpu", inputs=record.hash_files([clip]))
    whole = tomllib.loads(path.read_text())
    assert whole["prompt"] == "a bear"
    assert whole["record"]["checkpoint"]["demo"] is True
    assert whole["record"]["versions"]["torch"]
    assert whole["record"]["peak_memory_mib"]["host"] > 1
    sha = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert whole["record"]["inputs"] == {str(clip): sha}
    values, origins = settings.gather(SampleOptions, {}, {}, path)
    assert SampleOptions(**values) == SampleOptions(prompt="a bear", seed=3, num_frames=9, output=Path("x.mp4"))
    assert origins["prompt"] == str(path)


def test_the_record_obeys_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        path = told().write(tmp_path / "x.mp4")
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o640


@dataclass(kw_only=True)
class Typed(SampleOptions):
    sharp: bool = opt(False, help="Sharp.")
    lora: list[str] = opt([], help="Any number.")


def gather(tmp_path, text="", flags=None, environ=None):
    path = tmp_path / "s.toml"
    path.write_text(text)
    return settings.gather(Typed, flags or {}, environ or {}, path)


def test_flag_then_environment_then_file_then_default(tmp_path):
    text = 'fps = 1\nnum_frames = 1\nseed = 1\nlora = ["a"]\n[record]\nfps = "nonsense"\n'
    environ = {"VGEN_FPS": "2", "VGEN_NUM_FRAMES": "2", "VGEN_SHARP": "yes", "VGEN_PROMPT": "never"}
    values, origins = gather(tmp_path, text, {"fps": "3"}, environ)
    got = {name: (values[name], origins[name]) for name in ("fps", "num_frames", "seed", "height", "sharp", "prompt")}
    assert got == {
        "fps": (3.0, "flag"),
        "num_frames": (2, "VGEN_NUM_FRAMES"),
        "seed": (1, str(tmp_path / "s.toml")),
        "height": (None, "default"),
        "sharp": (True, "VGEN_SHARP"),
        "prompt": ("", "default"),
    }
    assert values["lora"] == ["a"]
    assert isinstance(values["fps"], float)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("num_frame = 9", "Did you mean 'num_frames'"),
        ('num_frames = "9x"', "not a whole number"),
        ("num_frames = 9.5", "not a whole number"),
        ("num_frames = true", "not a whole number"),
        ("num_frames = 0", "at least 1"),
        ("seed = -1", "at least 0"),
        ("fps = nan", "out of range"),
        ("prompt = 3", "not text"),
        ('sharp = "perhaps"', "true or false"),
        ("sharp = 1", "true or false"),
        ('dtype = "fp23"', "Did you mean 'fp32'"),
        ("lora = 3", "not a list"),
        ("lora = [3]", "not text"),
        ('output = ""', "not a path"),
        ("num_frames = = 9", "not TOML"),
    ],
)
def test_bad_settings_are_refused_by_name(tmp_path, text, says):
    with pytest.raises(UsageError) as error:
        gather(tmp_path, text)
    assert says in str(error.value)


def test_misspelt_variables_are_seen():
    found = settings.strays({"VGEN_DEVISE": "cpu", "VGEN_HOME": "/x", "VGEN_SEED": "1", "VGEN_OTHER": "1"}, [Typed])
    assert found == {"VGEN_DEVISE": "VGEN_DEVICE"}
