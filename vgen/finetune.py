"""Fine-tuning: brings the data, a part and the checkpoint of any family to the training loop."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from vgen import clips, curriculum, train
from vgen.curriculum import Curriculum, Stage
from vgen.dataset import Arrange, Batch, Clip, Order, by_shape, latent_batches, pixel_batches
from vgen.errors import UsageError
from vgen.export import export
from vgen.family import Family
from vgen.machine import DTYPES, Machine
from vgen.model import Model, OnStep, Part
from vgen.packing import Packs
from vgen.store import Store

Export = Callable[[Mapping[str, nn.Module]], None]  # writes what has been trained, by the names of Part.modules
Ready = Callable[[Family, Model, Path, Any], tuple[Part, Export]]


def whole(card: Family, model: Model, base: Path, options: Any) -> tuple[Part, Export]:
    """The part `options.part`, ready to train as a whole, and what exports it as a checkpoint."""
    part, output = model.part(options.part, options), Path(options.output)

    def save(networks: Mapping[str, nn.Module]) -> None:
        settle = getattr(part, "settle", None)
        if settle is not None:
            settle()
        manifest = {"format": "vgen-checkpoint/1", "family": card.name, "tag": output.name, "part": options.part}
        export(base, networks, output, manifest, DTYPES[options.save_dtype])

    return part, save


def finetune(
    card: Family,
    model: Model,
    base: Path,
    options: Any,
    machine: Machine,
    on_step: OnStep = lambda name, i, n: None,
    ready: Ready = whole,
) -> dict[str, Any]:
    """Train the part `options.part` and write the folder `options.output`; the state lies in output/training.

    `base` is the folder of the checkpoint that is trained further; `ready` says what of it trains, and how that is
    written. Returns the figures of the last step.
    Raises UsageError where the output is not empty and neither --resume nor --overwrite says what to do with it.
    """
    output = Path(options.output)
    fresh = not options.resume and output.resolve() != base.resolve()
    if fresh and not options.overwrite and output.is_dir() and any(output.iterdir()):
        raise UsageError(
            f"{output} is not empty.",
            "--resume goes on with the run in it, --overwrite starts anew; or choose another.",
        )
    batch = batches(card, model, options)
    part, save = ready(card, model, base, options)
    if fresh:
        _clear(output, base)
    return train.fit(part, batch, options, machine, output / "training", train.Between(save, on_step=on_step))


def _clear(output: Path, base: Path) -> None:
    """Make way for a run from the start: remove an earlier run's state and what it copied from its base."""
    for path in [output / "training", *(output / entry.name for entry in base.iterdir())]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def batches(card: Family, model: Model, options: Any) -> Callable[[int], Batch]:
    """The batches that a part trains on, as a function of the step. Raises UsageError where --data does not fit."""
    if not options.data:
        raise UsageError("--data is missing.", "Give a latent store (vgen encode makes one), or clips for pixels.")
    if card.part(options.part).trains_on == "pixels":
        items = clips.discover(list(options.data), None)
        size = (options.num_frames, options.height, options.width)
        return pixel_batches(items, size, options.train_batch_size, options.seed)
    mend = f"vgen encode {card.name} CLIPS --checkpoint {options.checkpoint or 'demo'} -o {options.data[0]}"
    texts = model.text_space is not None and not getattr(options, "train_text_encoder", False)
    wanted = model.text_space if texts else None
    stages = curriculum.read(options.curriculum) if options.curriculum else None
    folders = dict.fromkeys(Path(one) for one in [*options.data, *(stages.data if stages else [])])
    stores = [Store.open(folder, space=model.space, text_space=wanted, mend=mend) for folder in folders]
    arrange = partial(_order, model, options, 0, None) if stages is None else _staged(model, options, stages)
    make = latent_batches(stores, model.space, arrange, options.seed, dropout=options.caption_dropout, texts=texts)
    return make if stages is None else _paced(make, options, stages)


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


def _paced(make: Callable[[int], Batch], options: Any, stages: Curriculum) -> Callable[[int], Batch]:
    """Batches that also say, as 'rate', what the run's learning rate is multiplied by in their stage."""

    def paced(step: int) -> Batch:
        stage = stages.stages[stages.at(step // options.gradient_accumulation_steps)[0]]
        return {**make(step), "rate": (stage.learning_rate or options.learning_rate) / options.learning_rate}

    return paced
