"""What every verb does before and after its work: options, checkpoint, paths, plan, errors, exit code."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from vgen import __version__, family, lean, lineage, lora_source, outputs, record, registry, settings, tensorfile
from vgen.commands.errors import explain
from vgen.commands.output import Out, complain, mode
from vgen.commands.quiet import hush
from vgen.commands.surface import HOUSE
from vgen.errors import UsageError, VgenError
from vgen.family import Checkpoint, Family
from vgen.options import RunOptions, flag

if TYPE_CHECKING:
    from vgen.machine import Machine

# What runs each verb: a function of a Job that returns the exit code. It imports torch, so it is imported late.
ACTS = {
    "sample": "vgen.commands.sample:run",
    "encode": "vgen.commands.encode:run",
    "decode": "vgen.commands.decode:run",
    "finetune": "vgen.commands.finetune:run",
    "train-lora": "vgen.commands.train_lora:run",
    "interpolate": "vgen.commands.interpolate:run",
}
SOURCES = ("input", "inputs", "data")  # options that name existing files or folders, or 'world:COUNT'
SETS = ("inputs", "data")  # those of them that may be thousands of files; the stores hash each by itself
LEAN = ("sample", "encode", "decode", "finetune", "train-lora")  # verbs that know what they import ...
MORE = {"compile": False, "quantize": None, "optimizer": "adamw", "report_to": "none"}  # ... where these are as here
ADAPTS = ("peft", "transformers")  # what adapters take: peft imports the other
CLIPS = ("sample", "decode", "interpolate", "upscale")  # their output must not exist yet; the others go on in a folder


@dataclass
class Job:
    """One run of a verb, ready to start. `origins` says where each option's value came from."""

    verb: str
    card: Family
    found: registry.Found
    options: Any
    origins: dict[str, str]
    out: Out
    run: record.Run

    def folder(self) -> Path:
        """Where the weights lie; known once `_fetch` has run."""
        assert self.found.folder is not None
        return self.found.folder

    def machine(self) -> Machine:
        """The machine that the options ask for. Imports torch."""
        from vgen.machine import machine

        offload = getattr(self.options, "cpu_offload", False)
        return machine(self.options.device, self.options.dtype, threads=self.options.threads, offload=offload)

    def checkpoint(self) -> dict[str, Any]:
        """The checkpoint that runs, for records and plans."""
        one = self.found
        told = {"reference": one.reference, "tag": one.checkpoint.tag, "license": one.checkpoint.license}
        return {**told, "repo": one.repo, "revision": one.revision, "folder": str(one.folder or ""), "demo": one.demo}


def perform(verb: str, card: Family, given: dict[str, Any]) -> None:
    """Run a verb of a family with the flags that were given. Ends the process with its exit code."""
    house = {name: given.pop(name, None) for name in HOUSE}
    out = Out(mode(bool(house["json"]), bool(house["quiet"])), silent=bool(house["quiet"]))
    options = None
    try:
        job = prepare(verb, card, given, house["config"], out, dry=bool(house["dry_run"]))
        options = job.options
        if house["cost"] and not house["dry_run"]:
            raise UsageError("--cost is told by --dry-run.", "Give both, or neither.")
        code = show(job, cost=bool(house["cost"])) if house["dry_run"] else act(job)
    except KeyboardInterrupt:
        complain("Interrupted.")
        raise typer.Exit(130) from None
    except (MemoryError, OSError, RuntimeError) as error:  # what `explain` can tell more of
        raise explain(error, options) from error
    raise typer.Exit(code)


def prepare(verb: str, card: Family, given: dict[str, Any], config: Path | None, out: Out, *, dry: bool) -> Job:
    """Options from all sources, the checkpoint, and every check that needs no weights. Raises VgenError."""
    values, origins = settings.gather(card.options(verb), given, os.environ, config)
    options = card.options(verb)(**values)
    for name, near in settings.strays(os.environ, card.verbs.values()).items():
        out.warning(f"{name} sets nothing. Did you mean {near}?")
    found = registry.resolve(card, options.checkpoint, accelerator=_accelerated(options.device))
    if found.note:
        out.say(found.note)
    check_inputs(options)
    options = _filled(card, options, found, origins)
    if options.seed is None and not getattr(options, "resume", False):
        options.seed, origins["seed"] = secrets.randbelow(2**31), "drawn"
    if options.output is None:
        options.output, origins["output"] = default_output(verb, card, options, found.checkpoint), "named after the run"
    if options.seed is None:
        options.seed, origins["seed"] = _resumed_seed(options.output)
    check_output(verb, options)
    job = Job(verb, card, found, options, origins, out, record.Run(verb, card.name, {}, {}))
    if not dry:
        _fetch(job)
    job.options.checkpoint = job.found.reference or None
    job.run.options = record.plain(job.options)
    return job


def _resumed_seed(output: Path) -> tuple[int, str]:
    """The seed of the training in `output`, or of one adapter there of several, which decides the order of its data.

    A draw where there is none yet.
    """
    name = Path("training", "state.safetensors")
    states = (path for path in (output / name, *sorted(output.glob(f"*/{name}"))) if path.exists())
    seed = next((tensorfile.header(path).record.get("seed") for path in states), None)
    return (seed, "the run that is resumed") if isinstance(seed, int) else (secrets.randbelow(2**31), "drawn")


def _accelerated(device: str) -> bool:
    return registry.accelerator() if device == "auto" else device.partition(":")[0] != "cpu"


def _filled(card: Family, options: Any, found: registry.Found, origins: dict[str, str]) -> Any:
    """Options with the checkpoint's defaults, checked against its rules."""
    full: Any = family.resolve(card, options, found.checkpoint)
    for field in fields(full):
        if getattr(full, field.name) != getattr(options, field.name):
            origins[field.name] = found.reference
    return full


def _fetch(job: Job) -> None:
    """Have the weights on the disk; a repository that no card names is known, and checked, only then."""
    if job.card.weightless:
        return
    if job.found.folder is None:
        hush(bars=sys.stderr.isatty() and not job.out.silent)
        job.out.say(f"Downloading {job.found.reference} ({job.found.repo}) ...")
        job.found = registry.download(job.card, job.found)
        job.options = _filled(job.card, job.options, job.found, job.origins)
    elif registry.unchecked(job.found):
        job.out.say(f"Comparing {job.found.reference} with its hashes, once ...")
        registry.download(job.card, job.found)


def check_inputs(options: RunOptions) -> None:
    """Every file that an option names must exist. Raises UsageError."""
    for name, path in _inputs(options):
        if not path.exists():
            raise UsageError(f"{flag(name)} {path}: there is no such file or folder.", "Check the path.")
    for spec in [*getattr(options, "lora", []), getattr(options, "init_lora", None)]:
        if spec:
            lora_source.check(spec)


def _inputs(options: RunOptions) -> Iterator[tuple[str, Path]]:
    for field in fields(options):
        value = getattr(options, field.name)
        if isinstance(value, Path) and field.name != "output":
            yield field.name, value
        if field.name in SOURCES:
            given = value if isinstance(value, list) else [value] if value else []
            yield from ((field.name, Path(one)) for one in given if not one.startswith(("world:", "world-")))


def default_output(verb: str, card: Family, options: Any, checkpoint: Checkpoint) -> Path:
    """Where the result goes when -o is absent, in the current folder; a clip of one frame is a picture."""
    frames = _frames(options) or checkpoint.defaults.get("num_frames")
    clip = ".png" if frames == 1 else ".mp4"
    if verb == "sample":
        return Path(f"{card.name}-{options.seed}{clip}")
    if verb == "encode":
        return Path(f"{card.name}-latents")
    part = getattr(options, "part", "")
    return Path("-".join(filter(None, (card.name, part, verb))) + (clip if verb in CLIPS else ""))


def _frames(options: Any) -> int | None:
    """How many frames the output of these options has; None where they do not say."""
    return 1 if getattr(options, "still", False) else getattr(options, "num_frames", None)


def check_output(verb: str, options: RunOptions) -> None:
    """The output can be written, and does not overwrite a clip unasked. Raises UsageError or VgenError."""
    path = options.output
    assert path is not None
    if verb in CLIPS:
        outputs.check_output(path, options.overwrite)
        outputs.check_frames(path, _frames(options) or 1)
        return
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file; '{verb}' writes a folder.", "Choose another name with -o.")
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if path != there and not there.is_dir():
        raise UsageError(f"{path} cannot be written: {there} is a file.", "Choose another name with -o.")
    if not os.access(there, os.W_OK):
        raise VgenError(f"{path} cannot be written: no right to write to {there}.", "Choose another place with -o.")


def show(job: Job, *, cost: bool = False) -> int:
    """Print the plan of --dry-run: every option, and where its value came from; what a clip takes if asked."""
    values = record.plain(job.options)
    plan: dict[str, Any] = {"verb": job.verb, "family": job.card.name, "checkpoint": job.checkpoint()}
    plan["options"] = values
    lines = [f"{job.verb} {job.card.name}" + _where(job.found)]
    wide, long = max(map(len, values), default=0), max((len(str(v)) for v in values.values()), default=0)
    lines += [f"  {n.ljust(wide)}  {str(v).ljust(min(long, 40))}  {job.origins[n]}" for n, v in values.items()]
    if cost:
        from vgen.commands.cost import bill
        from vgen.cost import lines as lines_of

        hush()
        told = bill(job)
        plan, lines = {**plan, "cost": told}, [*lines, *lines_of(told)]
    job.out.object({**plan, "from": job.origins}, "\n".join(lines))
    return 0


def _where(found: registry.Found) -> str:
    if not found.reference:
        return ", without weights"
    where = f" in {found.folder}" if found.folder else f", to be downloaded from {found.repo}"
    return f", checkpoint {found.reference}{where}"


def device(asked: str) -> str:
    """The device that runs, with 'auto' made definite. Imports torch."""
    from vgen.machine import accelerator

    return str(accelerator()) if asked == "auto" else asked


def act(job: Job) -> int:
    """Start the work: the first line at once, other libraries' noise away, then the imports that take time."""
    if job.verb not in ACTS:
        raise VgenError(f"vgen {__version__} cannot run '{job.verb}' yet.", "A newer vgen may: pip install -U vgen")
    which = "" if job.card.weightless else f" ({job.found.reference}), seed {job.options.seed}"
    job.out.say(f"Loading {job.card.name}{which} ...")
    hush()
    if job.verb in LEAN and all(getattr(job.options, name, value) == value for name, value in MORE.items()):
        lean.leave_out(*(ADAPTS if job.verb == "train-lora" or getattr(job.options, "lora", None) else ()))
    job.run.checkpoint = {**job.checkpoint(), "files": {} if job.card.weightless else lineage.weights(job.folder())}
    inputs = [path for name, path in _inputs(job.options) if name not in SETS and path.is_file()]
    job.run.facts = {"device": device(job.options.device), "inputs": record.hash_files(inputs)}
    run: Callable[[Job], int] = family.fetch(ACTS[job.verb])
    return run(job)
