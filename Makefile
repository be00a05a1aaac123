# make quickstart   install, then train a small model on this machine and sample from it
# make test         install the development tools, then run the tests but the long proofs
# make test-slow    install a CUDA toolchain too, then run those: kernels and steps
#                   compiled for H200s, SLURM, killed runs, more meshes and processes
# make test-whole   run what those have a share of: all families of models, on meshes too
# make test-oldest  install the oldest jax that is supported, run the kernels' tests
# make check        lint, format and types
# make format       rewrite files as `make check` wants them

PYTHON ?= $(shell command -v python3.12 || command -v python3)
OLDEST = 0.11.2
KERNEL_TESTS = tests/kernels tests/plan/test_kernels.py tests/step/test_step_kernels.py \
  tests/step/test_step_offline.py tests/models/test_mlp.py tests/cluster/test_environment.py
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check
PYTEST = .venv/bin/python -m pytest -q -n 2 --dist worksteal --durations=10

.PHONY: quickstart test test-slow test-whole test-oldest check format notebook

quickstart:
	@PYTHON="$(PYTHON)" scripts/quickstart.sh

test: .venv/dev
	$(PYTEST) -m "not slow and not whole"

# With all of XLA's optimizations, as in a user's run; `make test` leaves most of them out.
test-slow: .venv/dev .venv/cuda
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(PYTEST) -m slow

test-whole: .venv/dev
	$(PYTEST) -m whole

# XLA, Mosaic and ptxas come with jax: what one version compiles well another may not.
test-oldest: .venv/oldest/done
	PALLAS_KERNELS_CUDA=$(CURDIR)/.venv/oldest/cuda \
	  .venv/oldest/bin/python -m pytest -q -n 2 $(KERNEL_TESTS)

check: .venv/dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright
	.venv/bin/python scripts/settings_table.py --check
	.venv/bin/python scripts/longest.py

format: .venv/dev
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

notebook: .venv/dev
	.venv/bin/jupytext --set-kernel python3 --to ipynb notebooks/quickstart.py

.venv/dev: pyproject.toml constraints.txt
	@scripts/make_venv.sh "$(PYTHON)" '.[dev]'
	@touch $@

# Not part of the environment itself, where jax would load the plugin at every start.
.venv/cuda: scripts/cuda_toolchain.txt .venv/dev
	@rm -rf $@
	$(PIP) --no-deps --target $@ -r scripts/cuda_toolchain.txt
	@touch $@

.venv/oldest/done: pyproject.toml constraints.txt scripts/cuda_toolchain.txt \
    scripts/make_oldest.sh
	@scripts/make_oldest.sh "$(PYTHON)" $(OLDEST)
	@touch $@
