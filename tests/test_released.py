"""A repository as CogVideoX-2b is released, with small random weights: pulled, sampled, encoded, trained, pushed."""

import hashlib
import json
import sys
from pathlib import Path

import loopback
import pytest
import sentencepiece
import tiny
from safetensors.torch import load_file
from shell import run, vgen
from test_bundle import NO_NETWORK
from transformers import T5EncoderModel

REPO = "zai-org/CogVideoX-2b"
FILES = [
    ".gitattributes",
    "LICENSE",
    "README.md",
    "README_zh.md",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model-00001-of-00002.safetensors",
    "text_encoder/model-00002-of-00002.safetensors",
    "text_encoder/model.safetensors.index.json",
    "tokenizer/added_tokens.json",
    "tokenizer/special_tokens_map.json",
    "tokenizer/spiece.model",
    "tokenizer/tokenizer_config.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
]
INDEX = {
    "_class_name": "CogVideoXPipeline",
    "_diffusers_version": "0.30.0.dev0",
    "scheduler": ["diffusers", "CogVideoXDDIMScheduler"],
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "T5Tokenizer"],
    "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLCogVideoX"],
}
VERBS = f"""
{NO_NETWORK.replace("main()", "words = sys.argv[1:]")}
for line in words:
    sys.argv[1:] = line.split("|")
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise
"""
OPEN = """
import json, sys, torch
from diffusers import CogVideoXPipeline
pipe = CogVideoXPipeline.from_pretrained(sys.argv[1], revision=sys.argv[2], use_safetensors=True)
weights = {name: float(p.detach().double().sum()) for name, p in pipe.transformer.named_parameters()}
small = {"num_frames": 9, "height": 32, "width": 32, "max_sequence_length": 8, "num_inference_steps": 2}
frames = pipe("a red ball", output_type="np", **small).frames
print(json.dumps([type(pipe.tokenizer).__name__, weights, list(frames.shape)]))
"""


def words(folder: Path) -> None:
    """A T5 tokenizer of some dozen pieces, made here, under the names that the release has."""
    folder.mkdir()
    lines = [f"a {c} {o} {m}" for c in ("red", "blue") for o in ("ball", "bear") for m in ("rising", "falling")]
    (folder / "corpus.txt").write_text("\n".join(lines * 20))
    pieces = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "vocab_size": 40, "hard_vocab_limit": False}
    told = {"input": str(folder / "corpus.txt"), "model_prefix": str(folder / "spiece"), "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(**told, **pieces)
    (folder / "corpus.txt").unlink()
    (folder / "spiece.vocab").unlink()
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    config = {**special, "extra_ids": 0, "model_max_length": 226, "tokenizer_class": "T5Tokenizer", "legacy": True}
    for name, held in (("tokenizer_config", config), ("special_tokens_map", special), ("added_tokens", {})):
        (folder / f"{name}.json").write_text(json.dumps(held))


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> dict[str, bytes]:
    """The files of the repository."""
    folder = tiny.checkpoint(tmp_path_factory.mktemp("released") / "2b", "2b")
    for path in (folder / "tokenizer").iterdir():
        path.unlink()
    (folder / "tokenizer").rmdir()
    words(folder / "tokenizer")
    encoder = T5EncoderModel.from_pretrained(folder / "text_encoder")
    whole = folder / "text_encoder" / "model.safetensors"
    size = whole.stat().st_size
    whole.unlink()
    encoder.save_pretrained(folder / "text_encoder", max_shard_size=size * 6 // 10)
    (folder / "model_index.json").write_text(json.dumps(INDEX))
    for name in (".gitattributes", "LICENSE", "README_zh.md"):
        (folder / name).write_text(name)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\npipeline_tag: text-to-video\n---\n# CogVideoX-2b\n")
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_layout_is_that_of_the_release(released):
    assert sorted(released) == sorted(FILES)


def test_pulled_sampled_encoded_trained_pushed_and_opened_by_diffusers(released, tmp_path):
    with loopback.hub({REPO: released}) as server:
        commit = server.repos[REPO].names["main"]
        here = server.environment(tmp_path / "here", "hf_ann")
        got = vgen("checkpoints", "pull", "cogvideox.2b", "--json", **here)
        assert got.code == 0, got.err
        assert got.json()["revision"] == commit
        train = "cogvideox|--checkpoint|cogvideox.2b|--data|latents|--max-train-steps|1|--seed|3"
        small = "--checkpoint|cogvideox.2b|--num-frames|9|--height|32|--width|32|--seed|3"
        lines = [
            f"sample|cogvideox|a red ball rising|{small}|--num-inference-steps|2|-o|ball.mp4",
            f"encode|cogvideox|world:2|{small}|-o|latents",
            f"finetune|{train}|-o|tuned",
            f"train-lora|{train}|--rank|2|--learning-rate|1e-2|-o|look",
            f"sample|cogvideox|a red ball rising|{small}|--num-inference-steps|2|--lora|look:30|-o|look.mp4",
        ]
        done = run([sys.executable, "-c", VERBS, *lines], cwd=tmp_path, **here)  # no HF_HUB_OFFLINE, and no socket
        assert done.code == 0, done.err
        assert json.loads((tmp_path / "look" / "vgen.json").read_text())["base"]["reference"] == f"{REPO}@{commit}"
        assert (tmp_path / "ball.mp4").read_bytes() != (tmp_path / "look.mp4").read_bytes()
        assert f"{REPO}@{commit}" in (tmp_path / "ball.mp4.toml").read_text()
        told = json.loads((tmp_path / "tuned" / "vgen.json").read_text())
        assert told["base"]["reference"] == f"{REPO}@{commit}"
        assert (told["base"]["revision"], told["data"][0]["clips"], told["run"]["verb"]) == (commit, 2, "finetune")
        name = "transformer/diffusion_pytorch_model.safetensors"
        assert told["base"]["files"][name] == "sha256:" + hashlib.sha256(released[name]).hexdigest()
        pushed = vgen("checkpoints", "push", tmp_path / "tuned", "ann/tuned", "--tag", "v1", "--json", **here)
        assert pushed.code == 0, pushed.err
        card = server.repos["ann/tuned"].card()
        assert card["license"] == "apache-2.0"  # that of the base, as vgen's card of the family tells it
        assert (card["base_model"], card["base_model_relation"]) == (REPO, "finetune")
        assert (card["pipeline_tag"], card["library_name"]) == ("text-to-video", "diffusers")
        opened = run([sys.executable, "-c", OPEN, "ann/tuned", "v1"], **server.environment(tmp_path / "elsewhere"))
        assert opened.code == 0, opened.err
    tokenizer, weights, shape = json.loads(opened.out.splitlines()[-1])
    tuned = load_file(tmp_path / "tuned" / name)
    assert tokenizer.startswith("T5Tokenizer")
    assert weights == {key: float(tensor.double().sum()) for key, tensor in tuned.items() if key in weights}
    assert shape == [1, 9, 32, 32, 3]
    shown = vgen("checkpoints", "show", tmp_path / "ball.mp4", **here)
    assert shown.out.startswith("sample "), shown.err
    assert f"checkpoint {REPO}@{commit}" in shown.out
    lineage = vgen("checkpoints", "show", tmp_path / "tuned", "--json").json()["lineage"]
    assert [line.partition(" ")[0] for line in lineage] == ["checkpoint", "run", "data", "base"]
