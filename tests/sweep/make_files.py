"""Writes checkpoints with random weights as a user would have them, each with an input and its features.

    python make_files.py --out FOLDER [--only PATTERN] [--depth N] [--full] [--list]

A case is a folder: the weights in one or several variants (with and without the configuration beside them),
x.safetensors with the image `x` and the features as the library that wrote the weights computes them, and
manifest.json, which says which of the features are right. The cases are named `timm/..`, `hf/..`, `open_clip/..`,
`torchvision/..`; PATTERN is a regular expression that is searched in the name.
"""
import argparse
import re
import warnings
from pathlib import Path

from case import Options

warnings.filterwarnings("ignore")


def cases(only=""):
    import hf_models
    import open_clip_models
    import timm_models
    import torchvision_models

    libraries = (timm_models, hf_models, open_clip_models, torchvision_models)
    every = [case for library in libraries for case in library.cases()]
    return [case for case in every if re.search(only, case.name)]


def make(case, folder, options):
    """Writes one case into `folder`; returns its [`Made`]."""
    folder.mkdir(parents=True, exist_ok=True)
    made = case.write(folder, options)
    made.save(folder, case)
    return made


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a folder for each case is made in it")
    parser.add_argument("--only", default="", help="a regular expression")
    parser.add_argument("--depth", type=int, default=2, help="blocks, or at most so many a stage")
    parser.add_argument("--full", action="store_true", help="true depth below 100 M parameters")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    args = parser.parse_args()
    if not args.list and args.out is None:
        parser.error("--out or --list")
    for case in cases(args.only):
        if not args.list:
            make(case, args.out / case.name.replace("/", "-"), Options(args.depth, args.full))
        print(case.name, flush=True)


if __name__ == "__main__":
    main()
