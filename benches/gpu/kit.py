"""The kit's folder, the Python beside it, and how a program of either side is run."""
import datetime
import json
import os
import platform
import subprocess
import threading

# Run by the peer's Python.
ABOUT_TORCH = """
import glob, importlib.util, json, os, torch
lib = os.path.join(os.path.dirname(torch.__file__), "lib")
nvidia = glob.glob(os.path.join(os.path.dirname(torch.__file__), "..", "nvidia", "*", "lib"))
cuda = torch.cuda.is_available()
print(json.dumps({"version": torch.__version__, "libs": [lib, *sorted(map(os.path.abspath, nvidia))],
                  "gpu": torch.cuda.get_device_name(0) if cuda else None,
                  "timm": importlib.util.find_spec("timm") is not None}))
"""
# The environment of each precision, for both sides alike: libtorch itself reads the second variable. cuDNN uses TF32
# unless it is forbidden.
PRECISIONS = {
    "f32": ("f32", {"NVIDIA_TF32_OVERRIDE": "0"}),
    "tf32": ("f32", {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}),
    "bf16": ("autocast-bf16", {"NVIDIA_TF32_OVERRIDE": "0"}),
}
OWN = ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")


class Refused(Exception):
    """Why nothing can be run."""


def minor(version):
    return ".".join(version.split(".")[:2])


def last_line(text):
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"


class Kit:
    def __init__(self, folder, args):
        self.folder, self.args = folder, args
        self.libtorch = (folder / "libtorch-version").read_text().strip()
        self.commit = (folder / "commit").read_text().strip()
        done = subprocess.run([args.python, "-c", ABOUT_TORCH], capture_output=True, text=True)
        if done.returncode != 0:
            raise Refused(f"{args.python} has no torch that can be imported: {last_line(done.stderr)}")
        self.torch = json.loads(done.stdout.splitlines()[-1])
        if minor(self.torch["version"]) != minor(self.libtorch):
            raise Refused(f"{args.python} has torch {self.torch['version']}, but the kit is built against libtorch "
                          f"{self.libtorch}: torch {minor(self.libtorch)}.x is needed, as its C++ interface changes "
                          "with each minor version")
        if args.device == "cuda" and self.torch["gpu"] is None:
            raise Refused("torch finds no CUDA device; --device cpu --quick checks the kit without one")
        self.machine = {
            "date": datetime.date.today().isoformat(), "device": self.torch["gpu"] or platform.machine(),
            "cores": os.cpu_count(), "torch": self.torch["version"], "libtorch": self.libtorch, "commit": self.commit,
            "peer": "timm" if self.torch["timm"] else "a plain ViT, as timm is absent", "quick": args.quick}

    def environment(self, extra):
        """The environment of a program: libtorch is that of the Python, TF32 as `extra` says."""
        kept = {name: value for name, value in os.environ.items() if name not in OWN}
        libs = [*self.torch["libs"], *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
        environment = {**kept, "LD_LIBRARY_PATH": os.pathsep.join(libs), **extra}
        if not self.torch["timm"]:
            environment["PYTHONPATH"] = str(self.folder / "stand_in")
        return environment

    def command(self, side, program, options):
        start = [self.folder / "bin" / program] if side == "ours" else [self.args.python, self.folder / "peer" / program]
        return [*map(str, start), *options]

    def line(self, command, extra=None, timeout=900):
        """The last line that a program prints, as JSON, with the memory it used; or `{"reason": ..}`."""
        with DeviceMemory(self.args.device) as memory:
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=timeout,
                                      env=self.environment(extra or {}))
            except subprocess.TimeoutExpired:
                return {"reason": f"not done after {timeout} s"}
            except OSError as error:
                return {"reason": str(error)}
        if done.returncode != 0:
            return {"reason": f"exit status {done.returncode}: {last_line(done.stderr)}"}
        try:
            line = json.loads(done.stdout.splitlines()[-1])
        except (ValueError, IndexError):
            return {"reason": f"printed no JSON: {last_line(done.stdout)}"}
        if "not_compiled" in line:
            return {"reason": line["not_compiled"]}
        # A CPU's memory is what the program itself prints.
        return {**line, "memory_mb": memory.peak if self.args.device == "cuda" else line.get("peak_rss_mb")}


class DeviceMemory:
    """The greatest growth of the memory in use on the GPU, as nvidia-smi samples it ten times a second; `peak` is None
    where there is no nvidia-smi."""
    QUERY = ["nvidia-smi", "--id=0", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-lms", "100"]

    def __init__(self, device):
        self.device, self.peak, self.process = device, None, None

    def __enter__(self):
        if self.device == "cuda":
            try:
                self.process = subprocess.Popen(self.QUERY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
                self.before = float(self.process.stdout.readline())
                threading.Thread(target=self.read, daemon=True).start()
            except (OSError, ValueError):
                pass
        return self

    def read(self):
        for line in self.process.stdout:
            try:
                # MiB.
                self.peak = max(self.peak or 0.0, (float(line) - self.before) * 1.048576)
            except ValueError:
                return

    def __exit__(self, *_):
        if self.process is not None:
            self.process.kill()
            self.process.wait()
