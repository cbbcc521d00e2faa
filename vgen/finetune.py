"""Fine-tuning: brings the data, a part and the checkpoint of any family to the training loop."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from vgen import clips, curriculum, fingerprint, lineage, logs, optimizers, record, train, validation
from vgen.cache import read_json
from vgen.curriculum import Curriculum, Stage
from vgen.dataset import Arrange, Batch, Clip, Data, Order, by_shape, latent_batches, pixel_batches
from vgen.errors import UsageError, did_you_mean
from vgen.export import MANIFEST
from vgen.export import export as write_checkpoint
from vgen.family import Family
from vgen.files import replacing
from vgen.lock import HOLDER, LOCK, claimed
from vgen.machine import DTYPES, Machine
from vgen.model import Model, OnStep, Part
from vgen.packing import Packs
from vgen.store import Store

VALIDATION, DATA = "validation", "data"
Export = Callable[[Mapping[str, nn.Module]], None]  # writes what has been trained, by the names of Part.modules
Ready = Callable[[Family, Model, Path, Any], tuple[Part, Export]]


def whole(card: Family, model: Model, base: Path, options: Any) -> tuple[Part, Export]:
    """The part `options.part`, or what is `trainable` of it, and what exports it as a checkpoint."""
    part, output = model.part(options.part, options), Path(options.output)
    narrow(part.modules, options.trainable)

    def save(networks: Mapping[str, nn.Module]) -> None:
        settle = getattr(part, "settle", None)
        if settle is not None:
            settle()
        manifest = {"format": "vgen-checkpoint/1", "family": card.name, "tag": output.name, "part": options.part}
        write_checkpoint(base, networks, output, manifest, DTYPES[options.save_dtype])

    return part, save


def narrow(networks: Mapping[str, nn.Module], patterns: Sequence[str]) -> None:
    """Leave gradients only to weights with a pattern in their names: words between dots, *, ?, [...]; none means all.

    Raises UsageError for a pattern that no weight has.
    """
    weights = [(f".{name}.", p) for network in networks.values() for name, p in network.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, f"*.{pattern}.*") for name, _ in weights):
            words = {word for name, _ in weights for word in name.strip(".").split(".") if not word.isdecimal()}
            raise UsageError(f"--trainable {pattern}: no weight has that in its name.", did_you_mean(pattern, words))
    for name, p in weights if patterns else ():
        p.requires_grad_(any(fnmatchcase(name, f"*.{pattern}.*") for pattern in patterns))


def finetune(
    card: Family,
    model: Model,
    base: Path,
    options: Any,
    machine: Machine,
    on_step: OnStep = lambda name, i, n: None,
    ready: Ready = whole,
    *,
    on_start: Callable[[], None] = lambda: None,
    on_note: Callable[[str], None] = lambda text: None,
    hashes: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Train the part `options.part` and write the folder `options.output`; the state lies in output/training.

    `base` is the folder of the checkpoint that is trained further, `hashes` those of its weights where they are known;
    `ready` says what of it trains, and how that is written. `on_start` is called when all is loaded, `on_note` with
    what a user should hear. Returns the figures of the last step.
    Raises UsageError where the output is not empty and neither --resume nor --overwrite says what to do with it, where
    another run writes to it, and where a resumed run would go on with something else.
    """
    optimizers.require(options.optimizer, machine.device)
    logs.require(options.report_to)
    asked = validation.wanted(card, base, options)
    output = Path(options.output)
    state = output / "training"
    in_place = output.resolve() == base.resolve()
    with claimed(state):
        fresh = not options.resume and not in_place
        if fresh:
            require_room(output, options)
        data = batches(card, model, options)
        found = {} if in_place else hashes or lineage.weights(base)  # in place they change while it trains
        identity = fingerprint.identity(options, data.identity, found)
        if options.resume:
            fingerprint.require(state / train.STATE, identity)
        validation.prepare(model, asked)
        part, save = ready(card, model, base, options)
        if fresh:
            _clear(output, base)
        for text in data.notes:
            on_note(text)
        load = partial(card.loader(), base, getattr(model, "checkpoint", None), machine)
        show = validation.shown(load, model, asked, output / VALIDATION) if asked else None
        on_start()
        origin = _origin(card, base, options, data, found)

        def export(networks: Mapping[str, nn.Module]) -> None:
            save(networks)
            sign(output / MANIFEST, origin)

        between = train.Between(export, data.held, show, on_step)
        return train.fit(part, data, options, machine, state, between, identity)


def _origin(card: Family, base: Path, options: Any, data: Data, files: Mapping[str, str]) -> dict[str, Any]:
    """What vgen.json says of where the weights come from; of the base, where its weights (`files`) stay."""
    settings = record.plain(options)
    verb = "train-lora" if hasattr(options, "rank") else "finetune"
    told = {"data": lineage.data(data.sources), "run": lineage.run(verb, card.name, settings, data=dict(data.identity))}
    return {**told, "base": lineage.base(base, str(options.checkpoint or base), files)} if files else told


def sign(manifest: Path, origin: Mapping[str, Any]) -> None:
    """Add to a manifest what is known of the weights beside it: where they come from, say."""
    told = read_json(manifest)
    for key, value in origin.items():
        both = isinstance(value, dict) and isinstance(told.get(key), dict)
        told[key] = {**told[key], **value} if both else value
    with replacing(manifest) as file:
        file.write((json.dumps(told, indent=2, default=str) + "\n").encode())


def require_room(output: Path, options: Any) -> None:
    """Raises UsageError where something is there that would be lost, and `options` do not say what to do with it.

    What a run has prepared for itself in output/data is not lost: it is used again.
    """
    there = [*output.iterdir(), *output.glob("training/*")] if output.is_dir() else []
    if options.resume or options.overwrite or all(path.name in (LOCK, HOLDER, "training", DATA) for path in there):
        return
    raise UsageError(
        f"{output} is not empty.", "--resume goes on with the run in it, --overwrite starts anew; or choose another."
    )


def _clear(output: Path, base: Path) -> None:
    """Make way for a run from the start: remove an earlier run's state and what it copied from its base."""
    ours = [path for path in (output / "training").iterdir() if path.name not in (LOCK, HOLDER)]
    for path in [*ours, output / VALIDATION, *(output / entry.name for entry in base.iterdir())]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def batches(card: Family, model: Model, options: Any) -> Data:
    """The batches that a part trains on. Raises UsageError where --data does not fit."""
    if not options.data:
        raise UsageError("--data is missing.", "Give a latent store (vgen encode makes one), or clips for pixels.")
    if card.part(options.part).trains_on == "pixels":
        items = clips.discover(list(options.data), None)
        size = (options.num_frames, options.height, options.width)
        return pixel_batches(items, size, options.train_batch_size, options.seed, held=options.eval_share)
    mend = f"vgen encode {card.name} CLIPS --checkpoint {options.checkpoint or 'demo'} -o {options.data[0]}"
    texts = model.text_space is not None and not getattr(options, "train_text_encoder", False)
    wanted = model.text_space if texts else None
    stages = curriculum.read(options.curriculum) if options.curriculum else None
    folders = dict.fromkeys(Path(one) for one in [*options.data, *(stages.data if stages else [])])
    stores = [Store.open(folder, space=model.space, text_space=wanted, mend=mend) for folder in folders]
    arrange = partial(_order, model, options, 0, None) if stages is None else _staged(model, options, stages)
    data = latent_batches(
        stores,
        model.space,
        arrange,
        options.seed,
        dropout=options.caption_dropout,
        texts=texts,
        captioned=model.text_space is not None and card.part(options.part).captions,
        held=options.eval_share,
        held_size=options.train_batch_size,
    )
    return data if stages is None else _paced(data, options, stages)


def _order(model: Model, options: Any, i: int, stage: Stage | None, found: Sequence[Clip]) -> Order:
    """Which clips go together, in a run or in its stage number i: packs up to a budget of tokens, or one shape each."""
    own = stage or Stage(steps=options.max_train_steps)
    seed, pack = options.seed + i, own.pack or int(getattr(options, "pack", 0))
    if not pack:
        return by_shape(found, own.train_batch_size or options.train_batch_size, seed)
    tokens = getattr(model, "tokens", None)
    if tokens is None:
        raise UsageError("This family does not train on packs of clips.", "Leave 'pack' out of the curriculum.")
    return Packs(found, lambda clip: int(tokens(clip.shape)), pack, seed)


def _staged(model: Model, options: Any, stages: Curriculum) -> Arrange:
    """Which clips go together under a curriculum. Raises UsageError where it does not fit the run."""
    stages.require(options.max_train_steps)
    order = partial(_order, model, options)
    return curriculum.staged(stages, options.data, model.space.strides, options.gradient_accumulation_steps, order)


def _paced(data: Data, options: Any, stages: Curriculum) -> Data:
    """Batches that also say, as 'rate', what the run's learning rate is multiplied by in their stage."""

    def paced(number: int) -> Batch:
        stage = stages.stages[stages.at(number // options.gradient_accumulation_steps)[0]]
        return {**data(number), "rate": (stage.learning_rate or options.learning_rate) / options.learning_rate}

    identity = {**data.identity, "curriculum": str(stages.stages)}
    return replace(data, batch=paced, identity=identity)
