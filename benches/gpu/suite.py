"""The integration tests on the device, as rows: one for all that pass, and one for each that does not."""
import re
import subprocess

# Tests that cannot run from a kit, with the reason.
LEFT_OUT = {
    "accelerator::": "the pretend device is for machines without a GPU",
    "layering::": "it reads the sources of the library",
    "vtab_finetune::": "it builds an example with cargo",
}
QUICK = ["bypass::", "convpass_models::", "features::", "told::"]


def rows(kit):
    device, quick = kit.args.device, kit.args.quick
    command = [str(kit.folder / "bin" / "integration"), *(QUICK if quick else [])]
    for name in LEFT_OUT:
        command += ["--skip", name]
    environment = kit.environment({
        "CONVPASS_TEST_DEVICE": device, "CONVPASS_TEST_ROOT": str(kit.folder / "root"), "NVIDIA_TF32_OVERRIDE": "0",
        # cuBLAS repeats its bits with a workspace of fixed size alone.
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8"})
    limit = 600 if quick else 3600
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                              env=environment, timeout=limit)
        text, ended = done.stdout, f"exit status {done.returncode}"
    except subprocess.TimeoutExpired as expired:
        text, ended = (expired.stdout or b"").decode(errors="replace"), f"not done after {limit} s"
    (kit.args.out / "suite.log").write_text(text)
    results = dict(re.findall(r"^test (\S+) \.\.\. (ok|FAILED|ignored)", text, re.M))
    passed = sum(result == "ok" for result in results.values())
    total = re.search(r"^running (\d+) tests?$", text, re.M)
    whole = total is not None and len(results) == int(total.group(1)) and ended.startswith("exit")
    note = f"{passed} of {total.group(1) if total else 'unknown'} tests pass; the output is in suite.log"
    note += "" if whole else f"; cut off: {ended}"
    all_pass = whole and passed == len(results)
    yield {"case": f"tests on {device}, TF32 off", "status": "ok" if all_pass else "failed", "note": note}
    for name, result in results.items():
        if result != "ok":
            yield {"case": name, "status": "failed" if result == "FAILED" else "left out", "note": reason(text, name)}
    for name, why in LEFT_OUT.items():
        yield {"case": name, "status": "left out", "note": why}


def reason(text, name):
    """The first lines of what a test that failed printed."""
    block = re.search(rf"^---- {re.escape(name)} stdout ----\n(.*?)(?=^---- |^failures:|\Z)", text, re.M | re.S)
    lines = [line for line in (block.group(1) if block else "").splitlines() if line and "panicked at" not in line]
    return " ".join(lines[:2])[:300] or "see suite.log"
