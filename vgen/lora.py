"""LoRA: trains an adapter on a frozen part of any family, saves it so that it loads elsewhere, and runs adapters."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vgen import adapter_file, adapters, lean, lineage, quant
from vgen.adapter_file import FOREIGN, WEIGHTS, Adapter, Pairs, Rename, kohya_name
from vgen.cache import commit
from vgen.errors import UsageError, VgenError
from vgen.export import export
from vgen.family import Family
from vgen.files import delete, explained, replacing, sync_folder
from vgen.finetune import Export, finetune
from vgen.latents import file_hash
from vgen.lora_source import Source, locate
from vgen.machine import DTYPES, Machine
from vgen.model import Model, OnStep, Part
from vgen.networks import Networks
from vgen.record import hash_file
from vgen.tensorfile import header

MANIFEST = "vgen.json"
RANK = 16


def train_lora(
    card: Family,
    model: Model,
    base: Path,
    options: Any,
    machine: Machine,
    on_step: OnStep = lambda name, i, n: None,
    **hooks: Any,
) -> dict[str, Any]:
    """Train an adapter on the part `options.part` and write it to the folder `options.output`, beside its state.

    `options` are LoraOptions, `hooks` as `finetune` has them. Returns the figures of the last step. Raises UsageError,
    VgenError.
    """
    return finetune(card, model, base, options, machine, on_step, adapted, **hooks)


def adapted(card: Family, model: Model, base: Path, options: Any) -> tuple[Part, Export]:
    """The part with its network frozen and a new adapter on it, which alone trains; and what saves the adapter."""
    part = model.part(options.part, options)
    ((name, network),) = part.modules.items()
    source = locate(options.init_lora) if options.init_lora else None
    start = _start(source, options, card, base, name, network) if source else None
    wanted = list(options.target_modules or card.lora_targets)
    layers = list(start.pairs) if start else adapters.targets(network, wanted)
    rank = options.rank or (max(start.ranks) if start else RANK)
    alpha = options.lora_alpha or float(rank)
    if options.quantize:
        quant.quantize(network, options.quantize, model.machine.device)
    network.to(model.machine.device)
    under = [locate(spec) for spec in options.lora]
    put_on(network, under, card, base, name)
    weights = adapters.add(network, layers, rank=rank, alpha=alpha, dropout=options.lora_dropout, seed=options.seed)
    if options.mixed_precision != "no":
        adapters.share_inputs(network)
    if start:
        adapters.put(weights, start.pairs, alpha / rank)
    part.modules = {name: weights}
    if options.overwrite and not options.resume:
        for old in (WEIGHTS, *FOREIGN.values(), MANIFEST):
            delete(Path(options.output) / old)
    told = {
        "format": "vgen-adapter/1",
        "family": card.name,
        "part": name,
        "network": type(network).__name__,
        "base": {
            "reference": options.checkpoint or str(base),
            "revision": commit(base),
            "hash": file_hash(base / name),
        },
        "rank": rank,
        "alpha": alpha,
        "targets": [] if start else wanted,
        "layers": len(layers),
        "start": _told([source] if source else []),
        "under": _told(under),
        "run": {k: getattr(options, k) for k in ("seed", "max_train_steps", "learning_rate")},
    }
    return part, partial(_save, card, options, network, told)


def _start(source: Source, options: Any, card: Family, base: Path, part: str, network: nn.Module) -> Adapter:
    """The adapter of --init-lora, of the rank that is asked for. Raises UsageError."""
    found = load(source, card, base, part, network)[0]
    if options.target_modules:
        raise UsageError("--target-modules does nothing with --init-lora, which has its layers.", "Leave one out.")
    if found.ranks != {options.rank or max(found.ranks)}:
        ranks = ", ".join(map(str, sorted(found.ranks)))
        raise UsageError(
            f"--init-lora {options.init_lora} has rank {ranks}, not {options.rank or 'one for all layers'}.",
            f"Set --rank {max(found.ranks)}, or start from another."
            if len(found.ranks) == 1
            else "Start from another.",
        )
    return found


def load(source: Source, card: Family, base: Path, part: str, network: nn.Module) -> tuple[Adapter, list[str]]:
    """The adapter of a source for a network of the checkpoint `base`, and what a user should hear of it.

    Raises UsageError for an adapter that was trained on another family, part or base.
    """
    of = fits(source, card, base, part)
    adapter = adapter_file.read(source.path, part, adapters.layers(network), _comfy(card))
    notes = [] if of else [f"{source.reference} does not tell which weights it was trained on; its layers fit."]
    if adapter.of_text:
        notes.append(f"{source.reference} also changes the text encoder ({len(adapter.of_text)} weights): not used.")
    return adapter, notes


def fits(source: Source, card: Family, base: Path, part: str) -> dict[str, Any]:
    """What an adapter tells of the weights that it was trained on; nothing where it tells none.

    Raises UsageError for one that was trained on another family, part or base.
    """
    told = adapter_file.about(source.path)
    ours = told.get("family") in (card.name, *card.starts_from)
    if told and not (ours and told.get("part") == part):
        raise UsageError(
            f"{source.reference} is an adapter of '{told.get('family')}' ({told.get('part')}), not of '{card.name}'.",
            f"Run it with: vgen sample {told.get('family')} ... --lora {source.reference}",
        )
    of: dict[str, Any] = told.get("base", {})
    if of and of.get("hash") != file_hash(base / part):
        raise UsageError(
            f"{source.reference} is an adapter of {of.get('reference')}, whose weights are not those of {base.name}.",
            f"Run it on its base: --checkpoint {of.get('reference')}",
        )
    return of


def use(card: Family, model: Model, base: Path, loras: Iterable[Source]) -> list[str]:
    """Put adapters on the denoisers that `sample` runs, and return what a user should hear.

    One of scale 0 is checked, and left out: the result then has the same bits as without it.
    """
    sources = list(loras)
    for source in sources:  # before a network loads
        fits(source, card, base, _of(source, model))
    heard: list[str] = []
    for name in model.base:
        some = [source for source in sources if _of(source, model) == name]
        heard += put_on(_networks(card, model).get(name), some, card, base, name) if some else []
    return heard


def _of(source: Source, model: Model) -> str:
    """The denoiser that an adapter is for: the one that it names, or the first."""
    told = str(adapter_file.about(source.path).get("part", ""))
    return told if told in model.base else model.base[0]


def put_on(network: nn.Module, sources: Sequence[Source], card: Family, base: Path, part: str) -> list[str]:
    """Put adapters on a network, frozen, and return what a user should hear of them."""
    heard: list[str] = []
    dtype = next(p.dtype for p in network.parameters() if p.is_floating_point())
    for i, source in enumerate(sources):
        adapter, notes = load(source, card, base, part, network)
        heard += notes
        if source.scale:
            adapters.attach(network, adapter, source.scale, f"lora_{i}", dtype)
    return heard


def merged(
    card: Family, model: Model, base: Path, reference: str, loras: Sequence[Source], output: Path, dtype: torch.dtype
) -> list[str]:
    """Write the checkpoint `base` with adapters added to its weights, and return what a user should hear.

    `reference` is what the user calls the base. The sum is made in the precision of the model's machine, and written
    in `dtype`. Raises UsageError where the output is not empty.
    """
    if output.is_dir() and any(output.iterdir()):
        raise UsageError(f"{output} is not empty.", "Choose another folder with -o.")
    heard = use(card, model, base, loras)
    changed = {name: _networks(card, model).get(name) for name in map(partial(_of, model=model), loras)}
    for network in changed.values():
        adapters.merge(network)
    name = next(iter(changed))
    of = {**lineage.base(base, reference), "hash": file_hash(base / name)}
    run = lineage.run("merge", card.name, {"lora": [one.spec for one in loras]}, adapters=_told(loras))
    manifest = {"format": "vgen-checkpoint/1", "family": card.name, "tag": output.name, "part": name}
    told = {**manifest, "base": of, "data": [], "run": run, "adapters": _told(loras)}
    export(base, changed, output, told, dtype)
    return heard


def _told(sources: Iterable[Source]) -> list[dict[str, Any]]:
    """What a manifest says of adapters."""
    return [{"reference": one.reference, "scale": one.scale, "hash": one.sha256()} for one in sources]


def stored(folder: Path) -> torch.dtype:
    """The precision of most of a network's stored weights, by the first of its files."""
    kinds = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}
    entries = header(min(folder.glob("*.safetensors"))).entries.values()
    found = Counter(kinds[entry.dtype] for entry in entries if entry.dtype in kinds)
    return DTYPES[found.most_common(1)[0][0]]


def _networks(card: Family, model: Model) -> Networks:
    """The networks of a model that takes adapters. Raises UsageError."""
    found = getattr(model, "networks", None)
    if not isinstance(found, Networks):
        raise UsageError(f"'{card.name}' does not take adapters.", "Leave out --lora.")
    return found


def _save(
    card: Family, options: Any, network: nn.Module, told: Mapping[str, Any], parts: Mapping[str, nn.Module]
) -> None:
    """Write the adapter and what was asked for beside it, read it back, and only then write what tells of it."""
    ((name, weights),) = parts.items()
    folder, dtype = Path(options.output), DTYPES[options.save_dtype]
    pairs = adapters.baked(weights, told["alpha"] / told["rank"])
    new = folder / "training" / WEIGHTS
    adapter_file.write(new, name, pairs, told, dtype)
    _check(new, name, pairs, network, dtype)
    with explained(f"write {folder / WEIGHTS}"):
        new.replace(folder / WEIGHTS)
        sync_folder(folder)
    files = [folder / WEIGHTS]
    for kind in dict.fromkeys(options.export):
        files.append(folder / FOREIGN[kind])
        adapter_file.write_foreign(files[-1], pairs, _comfy(card) if kind == "comfy" else kohya_name, dtype)
    hashes = {path.name: hash_file(path) for path in files}
    with replacing(folder / MANIFEST) as file:
        file.write((json.dumps({**told, "tag": folder.name, "files": hashes}, indent=2) + "\n").encode())


def _check(path: Path, part: str, pairs: Pairs, network: Any, dtype: torch.dtype) -> None:
    """Load a written file into a fresh network by diffusers' reader, and by ours, and compare. Raises VgenError."""
    fresh = _hollow(network)
    with lean.imports("peft", "transformers"):
        fresh.load_lora_adapter(path.parent, weight_name=path.name, prefix=part)
    _compare(path, pairs, adapters.effect(fresh), dtype)
    _compare(path, pairs, adapter_file.read(path, part, adapters.layers(fresh)).pairs, dtype)


def _compare(path: Path, pairs: Pairs, found: Pairs, dtype: torch.dtype) -> None:
    """Raises VgenError where what was read differs from what trained, in the precision `dtype` of the file."""

    def same(layer: str) -> bool:
        return all(torch.equal(a, b.to(dtype).float()) for a, b in zip(found[layer], pairs[layer], strict=True))

    right = sum(same(layer) for layer in pairs.keys() & found.keys())
    if not right == len(pairs) == len(found):
        raise VgenError(
            f"{path} does not load as it was trained: {right} of {len(pairs)} layers are the same.",
            "The state of the run is kept; please report this with the version of diffusers and peft.",
        )


def _hollow(network: Any) -> Any:
    """A network of the same configuration that reads adapters; its weights are all 0 and take no memory."""
    with torch.device("meta"):
        fresh: Any = _reader(type(network)).from_config(network.config)
    for module in fresh.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(torch.zeros(()).expand(p.shape), requires_grad=False)
    return fresh


def _reader(kind: type) -> Any:
    """A class of networks with diffusers' reader of adapters, which not every one brings."""
    from diffusers.loaders.peft import PeftAdapterMixin

    return kind if issubclass(kind, PeftAdapterMixin) else type(kind.__name__, (kind, PeftAdapterMixin), {})


def _comfy(card: Family) -> Rename:
    """The names that ComfyUI has for the layers of a family."""
    if card.comfy_names is None:
        return kohya_name  # it maps the names of diffusers by itself, under this prefix
    pairs = card.comfy_names

    def rename(layer: str) -> str:
        for pattern, word in pairs:
            layer = re.sub(pattern, word, layer)
        return f"diffusion_model.{layer}"

    return rename
