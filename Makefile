# make reproduce: the experiments and their report.  make test: everything that tests.  make help lists the rest.
SHELL   := /bin/bash
SCALE   ?= quick
ONLY    ?=
IMAGE   ?=
SEEDS   ?=
WORKERS ?=
ARGS    ?=
# Three test processes for two cores: the third fills the time in which another waits for processes of its own.
PYTEST  ?= -n 3 --dist worksteal
.DEFAULT_GOAL := help
.PHONY: help env reproduce test lint docs readme clean

# A name given on the command line that nothing reads is a slip of the pen; running on without it would hide it.
KNOWN := SCALE ONLY IMAGE SEEDS WORKERS ARGS PYTEST PYTHON TORCH SHELL
STRANGE := $(strip $(foreach v,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $v))),$(filter-out $(KNOWN) -*-%,$v))))
$(if $(STRANGE),$(error unknown name on the command line: $(STRANGE); known are $(filter-out SHELL,$(KNOWN)), and options of a notebook go through ARGS="-p name=value"))

override VENV := .venv
PY    := $(VENV)/bin/python
# The environment is ready when this file exists; its name follows what was installed, so that a changed pin installs again.
READY := $(VENV)/ready-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
TORCH := torch==2.13.0

help: ## this list
	@echo 'make TARGET [NAME=value ...]'
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/\1 \2/p' $(MAKEFILE_LIST) | while read -r name text; do printf '  %-10s %s\n' "$$name" "$$text"; done
	@echo 'For reproduce: SCALE=smoke|quick|laptop|full  ONLY="fig05*"  IMAGE=astronaut  SEEDS=2  WORKERS=2  ARGS="-p name=value --force"'
	@echo 'For the environment: PYTHON=python3.12 (3.11 to 3.13).  The data folder is INR_PRECOND_DATA.'

env: $(READY) ## the virtual environment .venv with the pinned versions

reproduce: $(READY) ## run the experiment notebooks and write results/SCALE/report.html
	@exec env JUPYTER_PREFER_ENV_PATH=1 $(PY) -m inr_precond.reproduce --exit-with-parent --scale '$(SCALE)' $(foreach p,$(ONLY),--only '$(p)') \
	  $(if $(IMAGE),--image '$(IMAGE)') $(if $(SEEDS),--seeds '$(SEEDS)') $(if $(WORKERS),--workers '$(WORKERS)') $(ARGS)

test: $(READY) ## chapters, tests, the batch at smoke scale, notebooks in sync, lint
	@OMP_NUM_THREADS=1 JUPYTER_PREFER_ENV_PATH=1 MPLBACKEND=agg $(PY) -m pytest $(PYTEST)

lint: $(READY) ## ruff alone
	@$(PY) -m ruff check inr_precond tests data_scripts nbs

docs: $(READY) ## the chapters and experiments as HTML pages in _docs
	@rm -rf _docs
	@$(PY) -m nbconvert --log-level WARN --to html --output-dir _docs --RegexRemovePreprocessor.patterns='#\|\s*(hide|default_exp)' nbs/*.ipynb nbs/experiments/*.ipynb
	@sed -i.bak 's|href="\(experiments/\)\{0,1\}\([A-Za-z0-9_]*\)\.ipynb"|href="\2.html"|g' _docs/*.html && rm -f _docs/*.bak
	@echo 'Open _docs/index.html'

define README
import nbformat, pathlib, re
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import CoalesceStreamsPreprocessor
nb = nbformat.read("nbs/index.ipynb", 4)
nb.metadata["language_info"] = {"name": "python"}
nb.cells = [c for c in nb.cells if c.cell_type == "markdown" or not c.source.startswith(("#| hide", "#|hide", "#| default_exp"))]
for c in nb.cells:  # a cell that begins with "#| echo: false" shows its output alone
    if c.source.startswith("#| echo: false"): c.metadata["tags"] = ["output-alone"]
nb, _ = CoalesceStreamsPreprocessor(enabled=True).preprocess(nb, {})
exporter = MarkdownExporter(config={"ExtractOutputPreprocessor": {"output_filename_template": "README_files/{cell_index}_{index}{extension}"}, "TagRemovePreprocessor": {"enabled": True, "remove_input_tags": ["output-alone"]}})
text, resources = exporter.from_notebook_node(nb)
for name, data in resources.get("outputs", {}).items():
    path = pathlib.Path(name); path.parent.mkdir(exist_ok=True); path.write_bytes(data)
text = text.replace("](../", "](").replace("```python\n\n", "```python\n")
text = re.sub(r"\]\((?!https?:|#|README_files)([\w/.-]+\.ipynb)", r"](nbs/\1", text)
pathlib.Path("README.md").write_text(re.sub(r"\n{3,}", "\n\n", text).strip() + "\n")
endef
export README
readme: $(READY) ## README.md from nbs/index.ipynb
	@rm -rf README_files
	@$(PY) -c "$$README"

clean: ## remove the environment, caches and built pages; results stay
	rm -rf .venv _proc _docs .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment that an interrupted installation left behind has no ready file and is made anew;
# a complete one of this folder and this Python is brought up to the changed pins.
$(READY):
	@set -eu; shopt -s nullglob; py=; \
	for p in $(or $(PYTHON),python3.11 python3.12 python3.13 python3 python); do \
	  if "$$p" -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then py=$$p; break; fi; done; \
	if [ -z "$$py" ]; then echo 'No Python 3.11, 3.12 or 3.13 with venv found$(if $(PYTHON), as $(PYTHON)); name one with PYTHON=/path/to/python3.11.' >&2; exit 2; fi; \
	old=($(VENV)/ready-*); id="$(CURDIR) $$("$$py" -c 'import sys; print(*sys.version_info[:2], sep=".")')"; \
	if [ "$${#old[@]}" -eq 0 ] || [ "$$(cat "$${old[0]}")" != "$$id" ]; then \
	  echo "Making $(VENV) with $$("$$py" --version): one to five minutes, 1.5 GB."; rm -rf $(VENV); "$$py" -m venv $(VENV); \
	else echo 'Bringing $(VENV) up to the changed pins.'; rm -f "$${old[@]}"; fi; \
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt '$(TORCH)' -e '.[dev]'; \
	echo "$$id" > $@
