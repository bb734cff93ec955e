"""One model of one library, and the files that a user would have of it."""
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field

from safetensors.torch import save_file


@dataclass
class Case:
    """`write(folder, options)` makes the files and returns a [`Made`]."""
    name: str
    family: str
    write: Callable


@dataclass
class Options:
    """Blocks of a model (and at most of a stage); all of them for a model of less than 100 M parameters if `full`."""
    depth: int = 2
    full: bool = False


@dataclass
class Made:
    """The sources by variant, relative to the folder; the outputs in x.safetensors that are right, the first of them
    what the library calls the features; and what the library computes with."""
    sources: dict
    right: list
    facts: dict = field(default_factory=dict)

    def save(self, folder, case):
        manifest = {"case": case.name, "family": case.family, "x": "x.safetensors", **vars(self)}
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def write_x(folder, x, outputs):
    """`outputs` by name; those that the library does not have are None."""
    tensors = {name: y.float().contiguous().clone() for name, y in outputs.items() if y is not None}
    save_file({"x": x, **tensors}, folder / "x.safetensors")


def write_weights(file, tensors):
    """A safetensors file of what a library would save; shared tensors are written twice."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous().clone() if not tensor.is_contiguous() else tensor
               for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


def link(source, target):
    """The same file under another name."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def full_or_cut(build, options):
    """`build(depth)`, where a depth of None is the true one."""
    if options.full:
        model = build(None)
        if sum(parameter.numel() for parameter in model.parameters()) < 100e6:
            return model
    return build(options.depth)
