# Everything on a Debian machine, from bookworm on:
#   make test         all tests                       (PYTEST_ARGS="-k scaling")
#   make demo         simulated images to maps        (OUT=folder)
#   make demo DATA=folder    maps of the SNase stills in a folder of test data
#   make benchmark    times of the pixel loop
#   make lint         style of Python and C++, as far as ruff and clang-format are there
#   make sdist        source archive in dist/
#   make clean        removes everything that was built
# The first use installs Debian's DIALS by apt where it is missing, makes a virtual
# environment in build/venv and installs this checkout there as an editable package.
# The system's own Python packages are not touched.

# Debian's DIALS belongs to this interpreter; another python3 may come first on PATH.
PYTHON = /usr/bin/python3
BUILD = build
VENV = $(BUILD)/venv
OUT = $(BUILD)/demo
DIALS_DIFFUSE_DATA ?= ../shared/data
DATA = $(DIALS_DIFFUSE_DATA)
PYTEST_ARGS =

# Another installation of DIALS, or packages in the user's home, are not what is tested.
unexport PYTHONPATH
unexport PYTHONHOME
unexport CONDA_PREFIX
unexport LIBTBX_BUILD
export PYTHONNOUSERSITE = 1

RUN = DIALS_DIFFUSE_DATA="$(DATA)" PATH="$(CURDIR)/$(VENV)/bin:$$PATH"

BUILD_INPUTS = setup.py pyproject.toml project_metadata.py standalone_env.py \
	SConstruct SConscript dials_diffuse/__init__.py \
	$(shell find libscitbx_ext -name '*.h' -o -name '*.cc')

all: install

test: install
	$(RUN) $(VENV)/bin/python -m pytest --import-mode=importlib -ra tests $(PYTEST_ARGS)

demo: install
ifeq ($(origin DATA),command line)
	$(RUN) sh demo/snase_stills.sh "$(DATA)" "$(OUT)"
else
	$(RUN) sh demo/simulated.sh "$(OUT)"
endif

benchmark: install
	$(RUN) $(VENV)/bin/python benchmarks/extract.py

sdist: install
	$(VENV)/bin/python setup.py --quiet sdist

install: $(VENV)/installed

packages:
	@.ci/debian-packages

$(VENV)/made: | packages
	rm -rf $(VENV)
	.ci/make-venv $(PYTHON) $(VENV)
	touch $@

# A new or removed command changes the scripts to install.
$(BUILD)/commands: FORCE
	@mkdir -p $(BUILD)
	@ls command_line/diffuse_*.py >$@.new 2>/dev/null || true
	@cmp -s $@.new $@ && rm $@.new || mv $@.new $@

$(VENV)/installed: $(VENV)/made $(BUILD)/commands $(BUILD_INPUTS) | packages
	$(VENV)/bin/python -m pip install -qq --no-index --no-cache-dir \
		--disable-pip-version-check --no-build-isolation --no-deps --editable .
	touch $@

lint:
	@if command -v ruff >/dev/null; then ruff check . && ruff format --check .; \
	else echo "ruff is not installed: Python files not checked"; fi
	@if command -v clang-format >/dev/null; then \
		find libscitbx_ext -name '*.h' -o -name '*.cc' | \
		xargs clang-format --style=file --dry-run --Werror; \
	else echo "clang-format is not installed: C++ files not checked"; fi

clean:
	rm -rf $(BUILD) dist *.egg-info dials_diffuse_ext.*.so .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

FORCE:

.PHONY: all test demo benchmark sdist install packages lint clean FORCE
