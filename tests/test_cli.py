"""The command line as shells use it: streams, exit codes, answers, settings, near words, completion."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from shell import BROKEN, complete, environment, run, vgen

from vgen.commands.errors import explain
from vgen.commands.output import Lines
from vgen.errors import VgenError
from vgen.options import EncodeOptions, SampleOptions, TrainOptions


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("smaple toy x", "Did you mean 'sample'"),
        ("checkpoints lst", "Did you mean 'list'"),
        ("sample toyy x", "Did you mean 'toy'"),
        ("upscale toy x", "It has: sample, finetune. With 'upscale': none of the installed families."),
        ("finetune nobody", "With 'finetune': "),
        ("sample toy x --num-frame 9", "Did you mean --num-frames?"),
        ("sample toy x --checkpoint toy.bigg", "Did you mean 'big'"),
        ("sample toy x --num-frames 10", "Nearest: 9 or 17."),
        ("sample toy x --num-frames 99", "Nearest: 49."),
        ("sample toy x --num-frames nine", "--num-frames: 'nine' is not a whole number"),
        ("sample toy x --height 40", "Nearest: 32 or 48."),
        ("sample toy x --sharpness 2", "0 to 1"),
        ("sample toy x --sampler fst", "Did you mean 'fast'"),
        ("sample toy x --image none.png", "--image none.png: there is no such file"),
        ("sample toy x --seed -1", "at least 0"),
        ("sample toy x -o clip.avi", ".avi"),
        ("sample toy x --config none.toml", "none.toml cannot be read"),
        ("sample toy x extra words", "extra"),
        ("finetune toy --data nowhere/", "--data nowhere: there is no such file"),
    ],
)
def test_wrong_usage_is_2_and_says_what_is_right(tmp_path, line, says):
    done = vgen(*line.split(), cwd=tmp_path)
    assert (done.code, done.out) == (2, "")
    assert says in done.err
    assert "Traceback" not in done.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (("",), "The prompt is empty"),
        (("x", "--num-frames", "50"), "Nearest: 49 or 57."),
        (("x", "--height", "481"), "Nearest: 480 or 496."),
        (("x", "--image", "none.png"), "none.png: there is no such file"),
        (("x", "--checkpoint", "cogvideox.5b-i2v"), "not from text alone"),
        (("x", "--strength", "1.5"), "0 to 1"),
        (("x", "--checkpoint", "cogvideox.3b"), "Known: 1.5-5b"),
    ],
)
def test_what_cogvideox_cannot_do_is_refused_at_once(tmp_path, line, says):
    done = vgen("sample", "cogvideox", "--checkpoint", "2b", *line, cwd=tmp_path)
    assert (done.code, done.out) == (2, "")
    assert says in done.err


def test_an_existing_output_needs_overwrite(tmp_path):
    clip = tmp_path / "x.mp4"
    clip.write_bytes(b"old")
    refused = vgen("sample", "toy", "x", "-o", clip, "--dry-run")
    assert (refused.code, "--overwrite" in refused.err) == (2, True)
    assert vgen("sample", "toy", "x", "-o", clip, "--dry-run", "--overwrite").code == 0


def test_an_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    done = vgen("sample", "toy", "x", "-o", tmp_path / "file" / "x.mp4", "--dry-run")
    assert done.code in (1, 2)
    assert "file" in done.err
    assert vgen("finetune", "toy", "-o", tmp_path / "file", "--dry-run").code == 2


def test_the_plan_says_where_each_value_came_from(tmp_path):
    config = tmp_path / "c.toml"
    config.write_text('fps = 5\nnum_frames = 25\nsharpness = 0.25\n[record]\nanything = "goes"\n')
    line = ("sample", "toy", "a bear", "--config", config, "--dry-run", "--fps", "7", "--no-smooth")
    done = vgen(*line, "--json", VGEN_NUM_FRAMES="17", VGEN_DEVICE="cpu")
    plan = done.json()
    assert plan["family"] == "toy"
    assert plan["checkpoint"]["demo"] is True
    got = {name: (plan["options"][name], plan["from"][name]) for name in plan["options"]}
    assert got["fps"] == (7.0, "flag")
    assert got["num_frames"] == (17, "VGEN_NUM_FRAMES")
    assert got["device"] == ("cpu", "VGEN_DEVICE")
    assert got["sharpness"] == (0.25, str(config))
    assert got["height"] == (32, "demo")
    assert got["smooth"] == (False, "flag")
    assert got["prompt"] == ("a bear", "flag")
    assert got["seed"][1] == "drawn"
    people = vgen(*line)
    assert people.code == 0
    assert [row.split()[1:] for row in people.out.splitlines() if row.startswith("  fps ")] == [["7.0", "flag"]]


def test_a_key_that_does_not_exist(tmp_path):
    config = tmp_path / "c.toml"
    config.write_text("num_frame = 9\n")
    done = vgen("sample", "toy", "x", "--config", config)
    assert (done.code, done.out) == (2, "")
    assert "no option 'num_frame'" in done.err
    assert "Did you mean 'num_frames'" in done.err


def test_the_demo_is_announced_on_stderr_and_quiet_silences_it():
    loud, quiet = (vgen("sample", "toy", "x", "--dry-run", *more) for more in ((), ("-q",)))
    assert "demo checkpoint of toy; --checkpoint toy.big runs the full model" in loud.err
    assert quiet.err == ""
    assert loud.out.splitlines()[0] == quiet.out.splitlines()[0]


def test_a_misspelt_variable_is_told():
    done = vgen("sample", "toy", "x", "--dry-run", VGEN_DEVISE="cpu")
    assert "VGEN_DEVISE sets nothing. Did you mean VGEN_DEVICE?" in done.err


def test_a_plugin_that_does_not_import():
    listed = vgen("families", VGEN_FAMILIES=BROKEN)
    assert listed.code == 0
    assert "toy" in listed.out
    assert "Warning: The plugin 'broken' could not be imported" in listed.err
    used = vgen("sample", "broken", "x", VGEN_FAMILIES=BROKEN)
    assert (used.code, used.out) == (1, "")
    assert "no module named 'not_there'" in used.err
    assert vgen("sample", "toy", "x", "--dry-run", VGEN_FAMILIES=BROKEN).code == 0


@pytest.mark.parametrize(
    ("fails", "code", "says"),
    [
        ("memory", 1, "Cheapest first, try: --vae-tiling, --cpu-offload, fewer --num-frames."),
        ("", 1, "unexpected ZeroDivisionError: toys cannot divide"),
    ],
)
def test_failures_while_running(tmp_path, fails, code, says):
    done = vgen("sample", "toy", "x", "--json", cwd=tmp_path, TOY_FAILS=fails)
    assert (done.code, done.out) == (code, ""), done.err
    assert says in done.err
    assert "Loading toy (demo), seed " in done.err.splitlines()[1]
    assert "Traceback" not in done.err
    assert not list(tmp_path.iterdir())


def test_debug_shows_the_traceback(tmp_path):
    done = vgen("sample", "toy", "x", cwd=tmp_path, VGEN_DEBUG="1")
    assert done.code == 1
    assert "Traceback" in done.err
    assert "ZeroDivisionError" in done.err


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        (SampleOptions(), "--vae-tiling, --cpu-offload, fewer --num-frames"),
        (EncodeOptions(), "--batch-size 1, fewer --num-frames, a smaller --height"),
        (TrainOptions(), "--gradient-checkpointing, --train-batch-size 1, --mixed-precision bf16"),
    ],
)
def test_out_of_memory_names_three_flags_that_exist(options, flags):
    cpu = RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory")
    for error in (cpu, MemoryError()):
        assert flags in str(explain(error, options))


def test_a_full_disk_is_a_sentence():
    with pytest.raises(OSError, match="28") as full:
        Path("/dev/full").write_text("x")
    told = explain(full.value)
    assert isinstance(told, VgenError)
    assert "No space is left" in str(told)


def test_a_reader_that_leaves_early(tmp_path):
    line = f"{sys.executable} -m vgen.cli checkpoints list | true"
    done = subprocess.run(["bash", "-c", line], env=environment(), capture_output=True, text=True, timeout=60)
    assert done.stderr == ""


def test_an_answer_that_cannot_be_written():
    with Path("/dev/full").open("w") as full:
        words = [sys.executable, "-m", "vgen.cli", "families"]
        done = subprocess.run(words, env=environment(), stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 1
    assert "No space is left" in done.stderr
    assert "Traceback" not in done.stderr


def test_answers_are_json_lines():
    rows = [json.loads(line) for line in vgen("families", "--json").out.splitlines()]
    assert {"family", "verbs", "checkpoints", "summary", "paper", "parts"} <= set(rows[0])
    assert [row["parts"] for row in rows if row["family"] == "toy"] == [["body", "wheels"]]
    assert "toy" in vgen("families", "--quiet").out.splitlines()


def test_version():
    done = vgen("--version")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("vgen ")


def test_doctor():
    done = vgen("doctor", "--json", VGEN_FAMILIES=BROKEN)
    assert done.code == 0, done.err
    told = done.json()
    assert {"python", "platform", "torch", "av", "codec vp9", "codec av1", "HF_HOME", "free disk"} <= set(told)
    assert told["codec h264"] == "read and write"
    assert "not_there" in told["family broken"]


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("vgen sam", {"sample"}),
        ("vgen ", {"sample", "encode", "finetune", "train-lora", "interpolate", "upscale", "families", "doctor"}),
        ("vgen sample to", {"toy"}),
        ("vgen sample toy --num-f", {"--num-frames"}),
        ("vgen sample toy --dr", {"--dry-run"}),
        ("vgen sample toy --checkpoint ", {"toy.big", "toy.1.5-xl", "demo"}),
        ("vgen sample toy --checkpoint toy.b", {"toy.big"}),
        ("vgen sample toy --dtype f", {"fp32", "fp16"}),
        ("vgen finetune toy --part ", {"body", "wheels"}),
        ("vgen checkpoints show toy.", {"toy.big", "toy.1.5-xl", "toy.demo"}),
        ("vgen checkpoints list t", {"toy"}),
        ("vgen upscale t", set()),
    ],
)
def test_completion(line, offered):
    got = set(complete(line))
    assert offered <= got if line == "vgen " else got == offered


def test_completion_survives_a_broken_plugin():
    assert complete("vgen sample to", VGEN_FAMILIES=BROKEN) == ["toy"]


PROGRESS = """
import time
from vgen.commands.output import Out
with Out().progress() as on_step:
    for i in range(41):
        on_step("denoise", i, 40)
        time.sleep(0.03)
"""


def test_progress_in_a_log_is_a_few_lines():
    done = run([sys.executable, "-c", PROGRESS])
    lines = done.err.splitlines()
    assert done.out == ""
    assert lines[0] == "denoise 0/40"
    assert lines[-1] == "denoise 40/40"
    assert 2 <= len(lines) <= 5


@pytest.mark.parametrize(("term", "bars"), [("xterm", True), ("dumb", False)])
def test_progress_on_a_terminal_is_a_bar(term, bars):
    ours, theirs = pty.openpty()
    variables = environment(TERM=term, NO_COLOR="1", COLUMNS="100")
    with subprocess.Popen([sys.executable, "-c", PROGRESS], env=variables, stderr=theirs) as process:
        os.close(theirs)
        text = b""
        while block := _read(ours):
            text += block
        assert process.wait(60) == 0
    assert (b"\r" in text.replace(b"\r\n", b"\n")) is bars
    assert b"40/40" in text
    assert b"\x1b[3" not in text


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # Linux ends a closed terminal with EIO
        return b""


def test_lines_tell_the_time_left():
    now, said = [0.0], []
    on_step = Lines(said.append, clock=lambda: now[0])
    for i in range(101):
        on_step("train", i, 100)
        now[0] += 1.2
    assert said[0] == "train 0/100"
    assert said[1] == "train 5/100, 1:54 left"
    assert said[-1] == "train 100/100"
    assert len(said) == 21
    on_step("decode", 0, 0)
    assert said[-1] == "decode 0/?"


def test_nothing_but_our_own_words_reaches_the_terminal():
    script = (
        "from vgen.commands.quiet import hush; hush()\n"
        "import warnings, bitsandbytes\n"
        "from diffusers import AutoencoderKLCogVideoX\n"
        "warnings.warn('old', FutureWarning)"
    )
    done = run([sys.executable, "-c", script])
    assert (done.code, done.out, done.err) == (0, "", "")


def test_ctrl_c_before_the_work(tmp_path):
    """A real signal to a real process that has said its first line."""
    words = [sys.executable, "-m", "vgen.cli", "sample", "toy", "x"]
    begun = time.monotonic()
    with subprocess.Popen(
        words, env=environment(), cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        while "Loading" not in (line := process.stderr.readline()):
            assert line
        assert time.monotonic() - begun < 20
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert "Interrupted." in process.stderr.read()


def test_a_record_is_a_settings_file(tmp_path):
    plan = vgen("sample", "toy", "a bear", "--seed", "5", "--dry-run", "--json", cwd=tmp_path).json()
    config = tmp_path / "run.toml"
    text = "\n".join(f"{name} = {json.dumps(value)}" for name, value in plan["options"].items())
    config.write_text(f'{text}\n[record]\nfamily = "toy"\n')
    assert tomllib.loads(config.read_text())["seed"] == 5
    again = vgen("sample", "toy", "--config", config, "--dry-run", "--json", cwd=tmp_path).json()
    assert again["options"] == plan["options"]
