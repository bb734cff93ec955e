# Two commands from a bare machine: `make demo` and `make test`. Both fetch libtorch first, and only once.

PYTHON ?= python3
TORCH := 2.13.0
# libtorch_cpu of the wheel is linked with two CUDA libraries that it needs even where there is no GPU.
NVIDIA := $(if $(filter Linux,$(shell uname -s)),nvidia-cuda-runtime==13.0.96 nvidia-cuda-cupti==13.0.85)
CPU_SET := --no-deps torch==$(TORCH) $(NVIDIA)
FULL_SET := torch==$(TORCH)
SET := $(if $(CUDA),$(FULL_SET),$(CPU_SET))

# Everything runs in release, so that demo, tests, benches and lints share one build of libtorch's bindings.
PROFILE := --release
FEATURES := $(if $(CUDA),--features cuda)

.PHONY: demo test libtorch lint doc bench bench-peer gpu-kit gpu-check peer sweep fuzz soak clean

demo: libtorch
	cargo run $(PROFILE) $(FEATURES) --example vtab_finetune

test: libtorch
	cargo test $(PROFILE) --workspace $(FEATURES)

lint: libtorch
	cargo fmt --check
	cargo clippy $(PROFILE) --workspace $(FEATURES) --all-targets -- -D warnings

doc: libtorch
	RUSTDOCFLAGS="-D warnings" cargo doc $(PROFILE) --workspace $(FEATURES) --no-deps

bench: libtorch
	cargo bench $(FEATURES)

# This crate and PyTorch in turn; the figures go to benches/peer/RESULTS.md. ROUNDS=5 and CASES=train-8,eval-8 choose;
# CUDA=1 runs the cases for a GPU instead (the peer's PyTorch is one with CUDA as it comes).
# PEER_PYTHON is a Python that has benches/peer/requirements.txt, where one is there already.
ROUNDS ?= 3
CASES ?=
BIN = $(or $(CARGO_TARGET_DIR),target)/release/examples
LIBTORCH_DIR = $(or $(LIBTORCH),.libtorch/torch)
LIBTORCH_VERSION = $(shell $(if $(LIBTORCH_USE_PYTORCH),python3 -c 'import torch; print(torch.__version__)',\
    cat $(LIBTORCH_DIR)/build-version 2>/dev/null || sed -n "s/^__version__ = '\(.*\)'/\1/p" $(LIBTORCH_DIR)/version.py))

bench-peer: libtorch peer
	cargo build $(PROFILE) $(FEATURES) --example throughput --example parts
	$(PYTHON) benches/peer/run.py --peer $(PEER_PYTHON) --bin $(BIN) --inputs .peer/inputs \
	    --libtorch "$(LIBTORCH_VERSION)" --rounds $(ROUNDS) --cases "$(CASES)" $(if $(CUDA),--cuda)

# A folder of at most 60 MB that measures on a machine with a GPU and a Python with torch (docs/performance.md), and the
# same run here. GPU_CHECK takes options of gpu_check.py, PYTHON is the Python with torch.
KIT ?= target/gpu-kit
GPU_CHECK ?=
KIT_BUILD = cargo build $(PROFILE) -p convpass --features cuda --message-format json

gpu-kit: libtorch
	mkdir -p target
	$(KIT_BUILD) --test integration --example throughput --example parts > target/gpu-kit.json
	benches/gpu/kit.sh $(KIT) "$(LIBTORCH_VERSION)" target/gpu-kit.json

gpu-check:
	@[ -d $(KIT) ] || { echo "gpu-check: no kit in $(KIT): run make gpu-kit" >&2; exit 1; }
	$(PYTHON) $(KIT)/gpu_check.py --out target/gpu-check $(GPU_CHECK)

# Files of random weights of all libraries, opened and compared; the table goes to SWEEP (see tests/sweep/README.md).
# ONLY is a regular expression over the names of the cases.
SWEEP ?= target/sweep.md
ONLY ?=
JOBS ?= 1

sweep: libtorch peer
	cargo build $(PROFILE) --example open_features
	$(PEER_PYTHON) -m pip install --quiet --disable-pip-version-check --requirement tests/sweep/requirements.txt
	HF_HUB_OFFLINE=1 $(PEER_PYTHON) tests/sweep/run.py --opener $(BIN)/open_features --report $(SWEEP) --only "$(ONLY)" \
	    --jobs $(JOBS)

# One fuzz target for so many seconds, from fuzz/corpus (see CONTRIBUTING.md). Needs a nightly toolchain and cargo-fuzz.
# The address sanitizer is off: libtorch is not built with it. What the fuzzer finds is in fuzz/artifacts.
TARGET ?= npz
SECONDS ?= 600

fuzz: libtorch
	[ -f fuzz/Cargo.lock ] || cp Cargo.lock fuzz/Cargo.lock
	mkdir -p fuzz/found/$(TARGET)
	cargo +nightly fuzz run --sanitizer none $(TARGET) fuzz/found/$(TARGET) fuzz/corpus/$(TARGET) -- \
	    -max_total_time=$(SECONDS) -timeout=20 -rss_limit_mb=4096 -max_len=16384 -print_final_stats=1

# Trains, evaluates, saves, loads and swaps in one process, and fails if memory, open files or threads grow.
MINUTES ?= 60

soak: libtorch
	cargo run $(PROFILE) --example soak -- --minutes $(MINUTES)

ifneq ($(PEER_PYTHON),)
peer:
	@echo "peer: yours ($(PEER_PYTHON))"
else
PEER_PYTHON = .peer/bin/python
peer: .peer/have
endif

.peer/have: benches/peer/requirements.txt
	@echo "peer: installing PyTorch, torchvision and timm into .peer (3 GB on Linux; once)"
	$(PYTHON) -m venv .peer
	.peer/bin/python -m pip install --disable-pip-version-check --requirement benches/peer/requirements.txt
	touch $@

# Leaves .libtorch and .peer, which take a download to get back.
clean:
	cargo clean
	rm -rf .libtorch.new

ifneq ($(LIBTORCH)$(LIBTORCH_USE_PYTORCH),)
libtorch:
	@echo "libtorch: yours ($(if $(LIBTORCH_USE_PYTORCH),LIBTORCH_USE_PYTORCH is set,LIBTORCH=$(LIBTORCH)))"
else
libtorch: .libtorch/have
endif

# What is there counts where it is of the right version and, with CUDA=1, holds cuDNN: the CPU set does not.
.PHONY: .libtorch/have
.libtorch/have:
	@if grep -qs "^__version__ = '$(TORCH)" .libtorch/torch/version.py \
	    && { [ -z "$(CUDA)" ] || [ -d .libtorch/nvidia/cudnn ]; }; then exit 0; fi; \
	set -e; trap 'rm -rf .libtorch.new' EXIT; rm -rf .libtorch.new; \
	$(PYTHON) -m pip --version >/dev/null 2>&1 || { echo "libtorch: $(PYTHON) has no pip: install it (Debian: python3-pip), or set LIBTORCH" >&2; exit 1; }; \
	echo "libtorch: fetching PyTorch $(TORCH) into .libtorch ($(if $(CUDA),2.7 GB,540 MB); once)"; \
	PIP_ROOT_USER_ACTION=ignore $(PYTHON) -m pip install --target .libtorch.new --only-binary=:all: \
	    --no-compile --disable-pip-version-check $(SET); \
	rm -rf .libtorch; mv .libtorch.new .libtorch
