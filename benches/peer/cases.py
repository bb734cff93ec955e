"""The cases that run.py runs: for each the command of the crate's side and that of the peer's."""
from dataclasses import dataclass

# The peer's programs that have `--compile`.
COMPILES = ("step.py", "bypass.py")


@dataclass
class Case:
    """Two commands that each print a line of JSON, and the ratio of one of its numbers that is aimed at."""
    name: str
    what: str
    ours: list
    peer: list
    # What the ratio to the better of the peers may be.
    target: float = None
    # Processes of either side a round, where one process times one call.
    repeats: int = 1
    key: str = "median_s"

    def sides(self):
        """The commands by side. `peer` is the eager one; `compiled` is absent where the peer has no model to compile."""
        sides = {"ours": self.ours, "peer": self.peer}
        return {**sides, "compiled": [*self.peer, "--compile"]} if self.peer[0] in COMPILES else sides


def step(name, what, batch, rounds, target=None, mode="train", peer_mode=None, extra=()):
    options = ["--batch", str(batch), "--rounds", str(rounds), *extra]
    return Case(name, what, ["throughput", "--mode", mode, *options],
                ["step.py", "--mode", peer_mode or mode, *options], target)


def recomputed(name, batch, rounds):
    options = ["--mode", "train", "--batch", str(batch), "--rounds", str(rounds)]
    return Case(name, f"training step, blocks computed again in backward, batch {batch}",
                ["throughput", *options, "--recompute"], ["step.py", *options])


def held(name, what, target, *options):
    return Case(name, what, ["parts", "activations", *options], ["activations.py"], target, key="saved_mb_per_image")


def both(suffix, what, batch, *extra):
    """A training step and an evaluation of another model or of other images."""
    return [step(f"train-{batch}-{suffix}", f"training step, {what}, batch {batch}", batch, 5, extra=extra),
            step(f"eval-{batch}-{suffix}", f"evaluation, {what}, batch {batch}", batch, 5, mode="eval", extra=extra)]


FLAT = ["--drop-path", "0"]
PHOTOS, BACKBONE = "{inputs}/photos", "{inputs}/vit_base_patch16_224.safetensors"
CASES = [
    step("train-8", "training step, batch 8", 8, 5, 0.85),
    step("train-32", "training step, batch 32", 32, 2, 0.85),
    step("train-8-flat", "the same without drop path, batch 8", 8, 5, extra=FLAT),
    step("train-32-flat", "the same without drop path, batch 32", 32, 2, extra=FLAT),
    recomputed("train-8-recompute", 8, 5),
    recomputed("train-32-recompute", 32, 2),
    held("activations", "held between forward and backward, an image", 0.75),
    held("activations-recompute", "the same with blocks computed again", 0.25, "--recompute"),
    step("eval-1", "evaluation against the adapted peer, batch 1", 1, 20, mode="eval"),
    step("eval-8", "evaluation against the adapted peer, batch 8", 8, 5, 0.92, "eval"),
    step("eval-32", "evaluation against the adapted peer, batch 32", 32, 3, 0.92, "eval"),
    step("eval-1-plain", "adapted, against the unadapted timm ViT, batch 1", 1, 20, None, "eval", "plain-eval"),
    step("eval-8-plain", "adapted, against the unadapted timm ViT, batch 8", 8, 5, 0.95, "eval", "plain-eval"),
    step("eval-32-plain", "adapted, against the unadapted timm ViT, batch 32", 32, 3, 0.95, "eval", "plain-eval"),
    *both("classes-1000", "a head of 1,000 classes", 8, "--classes", "1000"),
    *both("384px", "images of 384x384", 2, "--image-size", "384"),
    *both("512px", "images of 512x512", 2, "--image-size", "512"),
    *both("dinov3", "ViT-B/16 of DINOv3, 256x256", 8, "--backbone-preset", "vit_base_patch16_dinov3"),
    *both("siglip", "ViT-B/16 of SigLIP", 8, "--backbone-preset", "vit_base_patch16_siglip_224"),
    Case("bypass", "one bypass added in, forward and backward, [16, 197, 768]", ["parts", "bypass"], ["bypass.py"], 0.35),
    Case("load", "opening a ViT-B/16 of 346 MB", ["parts", "load", BACKBONE], ["load.py", BACKBONE], 0.5, repeats=3),
    Case("data", "JPEG files to batches of 224x224", ["parts", "data", PHOTOS], ["data.py", PHOTOS], 0.5),
]


GPU = ["--device", "cuda", "--precision", "autocast-bf16"]
# Instead of the above with --cuda.
CUDA_CASES = [
    step("cuda-train-32", "training step on a GPU, autocast to bf16, batch 32", 32, 20, extra=GPU),
    step("cuda-train-64", "training step on a GPU, autocast to bf16, batch 64", 64, 20, extra=GPU),
    step("cuda-eval-64", "evaluation on a GPU, autocast to bf16, batch 64", 64, 20, mode="eval", extra=GPU),
    step("cuda-eval-64-plain", "adapted, against the unadapted timm ViT on a GPU, batch 64", 64, 20, mode="eval",
         peer_mode="plain-eval", extra=GPU),
]

# The batches of the table of serving, each with the case of the adapted peer and that of timm's unadapted ViT.
SERVED = [(batch, f"eval-{batch}", f"eval-{batch}-plain") for batch in (1, 8, 32)]
