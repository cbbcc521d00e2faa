"""The model card of a published checkpoint or adapter: README.md with the header that the Hub reads."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vgen import __version__
from vgen.cache import ADAPTER
from vgen.lineage import tables

PIPELINES = {"text": "text-to-video", "image": "image-to-video", "video": "video-to-video"}
LIBRARIES = ("diffusers", "transformers")
SAMPLE = re.compile(r"validation/(\d+)-(\d+)\.(mp4|png)")  # step and number of the prompt
SETTINGS = ("part", "max_train_steps", "train_batch_size", "gradient_accumulation_steps", "learning_rate", "rank")


def tags(manifest: Mapping[str, Any], kind: str) -> list[str]:
    """The tags that `vgen checkpoints search` looks for."""
    found = ["vgen", f"vgen-family:{manifest['family']}", f"vgen-kind:{kind}"]
    if kind == "adapter":
        found.append("lora")
    return found + ([f"vgen-part:{manifest['part']}"] if manifest.get("part") else [])


def pipeline(modes: Sequence[str], frames: object) -> str:
    """The Hub's name of the task, by what a checkpoint starts from and how many frames it makes."""
    return "text-to-image" if frames == 1 else PIPELINES.get(modes[0] if modes else "", "text-to-video")


def card(
    repo: str,
    tag: str,
    manifest: Mapping[str, Any],
    kind: str,
    task: str,
    index: Mapping[str, Any],
    names: Iterable[str] = (),
) -> str:
    """README.md of a repository: header, a sample command, how the weights were trained, where they come from.

    The last samples of its training are shown, where they are among the `names` of its files.
    """
    base, shown = _base(manifest), samples(names, manifest)
    reference = f"{repo}@{tag}" if tag else repo
    title = repo.partition("/")[2]
    whole = "A checkpoint in diffusers' layout"
    what = f"A LoRA adapter for {base or manifest['family']}" if kind == "adapter" else whole
    return "\n".join(
        [
            "---",
            *_header(manifest, kind, task, base, index),
            *_widget(shown),
            "---",
            "",
            f"# {title}",
            "",
            f"{manifest.get('summary') or what}. Made with vgen {__version__}, family `{manifest['family']}`.",
            "",
            "## Use",
            "",
            "```sh",
            *_commands(reference, manifest, kind, base, task),
            "```",
            "",
            *(_loading(repo, manifest, base) if kind == "adapter" else []),
            *_gallery(shown),
            *_camera(manifest),
            *_training(manifest),
            *_lineage(manifest, base),
        ]
    )


def _header(manifest: Mapping[str, Any], kind: str, task: str, base: str, index: Mapping[str, Any]) -> list[str]:
    """The YAML lines, their values in JSON, which YAML reads."""
    libraries = [one[0] for one in index.values() if isinstance(one, list) and one and one[0]]
    opens = kind == "adapter" or all(one in LIBRARIES for one in libraries)
    told: dict[str, Any] = {"library_name": "diffusers" if opens else "vgen", "pipeline_tag": task}
    if base:
        told |= {"base_model": base, "base_model_relation": "adapter" if kind == "adapter" else "finetune"}
    told |= license_fields(str(manifest["license"]), base)
    return [f"{key}: {json.dumps(value)}" for key, value in {**told, "tags": tags(manifest, kind)}.items()]


def samples(names: Iterable[str], manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Of a folder's files, by name, what a run sampled last while it trained; each with its prompt."""
    found = [match for name in names if (match := SAMPLE.fullmatch(name))]
    last = max((int(match[1]) for match in found), default=0)
    run = manifest.get("run")
    prompts = run.get("settings", {}).get("validation_prompt") or [] if isinstance(run, Mapping) else []
    numbers = sorted((int(match[2]), match[0]) for match in found if int(match[1]) == last)
    return [(name, str(prompts[i]) if i < len(prompts) else "") for i, name in numbers]


def _widget(shown: Sequence[tuple[str, str]]) -> list[str]:
    """What the Hub shows in place of <Gallery />."""
    told = [{"text": prompt or "-", "output": {"url": name}} for name, prompt in shown]
    return [f"widget: {json.dumps(told)}"] if told else []


def _gallery(shown: Sequence[tuple[str, str]]) -> list[str]:
    lines = [f"- [{prompt or name}]({name})" for name, prompt in shown]
    return ["## Samples", "", "<Gallery />", "", *lines, ""] if lines else []


def license_fields(license: str, base: str = "") -> dict[str, str]:
    """The header's words for a licence such as "apache-2.0" or "other (CogVideoX license: research free)"."""
    name, _, rest = license.partition(" ")
    if name != "other":
        return {"license": name}
    words = re.sub(r"[^a-z0-9]+", "-", rest.strip("() ").partition(":")[0].lower()).strip("-")
    link = f"https://huggingface.co/{base}/blob/main/LICENSE" if base else "LICENSE"
    return {"license": "other", "license_name": words or "see-license", "license_link": link}


def _base(manifest: Mapping[str, Any]) -> str:
    """The repository of the base, where it is one of the Hub."""
    told = manifest.get("base")
    reference = str(told.get("reference", "")) if isinstance(told, Mapping) else ""
    match = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)@[0-9a-f]{40}(:.*)?", reference)
    return match[1] if match else ""


def _commands(reference: str, manifest: Mapping[str, Any], kind: str, base: str, task: str) -> list[str]:
    start = manifest.get("base")
    demo = isinstance(start, Mapping) and start.get("reference") == "demo"
    on = f"--checkpoint {base or 'demo'} " if base or demo else ""
    start_of = "picture.png" if task == PIPELINES["image"] else '"a red ball rising"'
    flag = f"{on}--lora" if kind == "adapter" else "--checkpoint"
    return [
        f"vgen checkpoints pull {reference}",
        f"vgen sample {manifest['family']} {start_of} {flag} {reference}",
    ]


def _loading(repo: str, manifest: Mapping[str, Any], base: str) -> list[str]:
    """How an adapter loads without vgen on any network of diffusers: not all bring a reader of adapters."""
    network, part = manifest.get("network"), manifest.get("part")
    if not network or not part:
        return []
    of = json.dumps(base or "FOLDER OF THE BASE")
    return [
        "In diffusers with peft, also for pipelines that have no `load_lora_weights`:",
        "",
        "```python",
        f"from diffusers import DiffusionPipeline, {network}",
        "from diffusers.loaders import PeftAdapterMixin",
        "",
        f"class Network({network}, PeftAdapterMixin):",
        "    pass",
        "",
        f'network = Network.from_pretrained({of}, subfolder="{part}")',
        f'network.load_lora_adapter("{repo}", prefix="{part}", weight_name="{ADAPTER}")',
        f"pipe = DiffusionPipeline.from_pretrained({of}, {part}=network)",
        "```",
        "",
    ]


def _camera(manifest: Mapping[str, Any]) -> list[str]:
    """What an adapter for a camera does, as it was measured."""
    told = manifest.get("camera")
    if not isinstance(told, Mapping):
        return []
    lines = ["## The camera", "", f"It is for the motion `{told['word']}`."]
    rows = [(name, told[name]) for name in ("with", "without") if isinstance(told.get(name), Mapping)]
    if rows:
        lines += ["", "| samples | show it | mean shift that way |", "| --- | --- | --- |"]
        lines += [
            f"| {n} the adapter | {f['show']} of {f['of']} | {100 * f['shift']:.1f} % of the frame |" for n, f in rows
        ]
    return [*lines, ""]


def _training(manifest: Mapping[str, Any]) -> list[str]:
    run = manifest.get("run")
    if not isinstance(run, Mapping):
        return []
    settings = run.get("settings", {})
    rows = [f"| {name.replace('_', ' ')} | {settings[name]} |" for name in SETTINGS if settings.get(name) is not None]
    head = [
        "## How it was trained",
        "",
        f"By `vgen {run.get('verb', '')}`.",
        "",
        "| setting | value |",
        "| --- | --- |",
    ]
    return [*head, *rows, ""]


def _lineage(manifest: Mapping[str, Any], base: str) -> list[str]:
    told = manifest.get("base")
    lines = []
    if isinstance(told, Mapping):
        lines.append(f"- base: {told.get('reference') if base else 'a checkpoint that is not on the Hub'}")
    lines += [f"- data: {one.get('clips', 0)} clips, {one.get('hash', '')}" for one in tables(manifest, "data")]
    if isinstance(manifest.get("run"), Mapping):
        lines.append(f"- run: {manifest['run'].get('id', '')}")
    return ["## Lineage", "", *lines, "", "`vgen checkpoints show` prints it with all hashes.", ""] if lines else []
