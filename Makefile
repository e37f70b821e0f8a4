# SPDX-License-Identifier: GPL-3.0-or-later

PREFIX = /usr/local
DESTDIR =
BINDIR = $(PREFIX)/bin
MANDIR = $(PREFIX)/share/man
DOCDIR = $(PREFIX)/share/doc/backy
UNITDIR = $(PREFIX)/lib/systemd/system
NAGIOSDIR = $(PREFIX)/lib/nagios/plugins
SYSCONFDIR = /etc

PYTHON = python3
VENV = .venv
# Everything that develops runs by the interpreter of the virtual environment.
RUN = $(VENV)/bin/python -m
# For single runs: make test PYTEST_ARGS="--cov -k restore"
PYTEST_ARGS =

VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"$$/\1/p' backy.py)
SOURCE_DATE_EPOCH ?= 315532800

all: dist/backy  ## build dist/backy, the one file that is installed (the default)

help:  ## list what make can do
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-16s %s\n", $$1, $$2 }' Makefile

dist/backy: backy.py pyproject.toml tools/build.py
	$(PYTHON) tools/build.py $@

# ---- Tests

venv:
	@tools/setup-tests.sh venv "$(PYTHON)" $(VENV)

quick: venv  ## the fast tests, under a minute
	$(RUN) pytest -q -n auto -m "not slow" $(PYTEST_ARGS)

test: venv  ## all tests
	@tools/setup-tests.sh packages
	$(RUN) pytest $(PYTEST_ARGS)

test-all:  ## all tests under every Python from 3.8 to 3.13 found here
	@tools/setup-tests.sh packages
	@failed=; \
	for python in $$(tools/setup-tests.sh pythons); do \
	    dir=$(VENV)-$${python##*/python}; \
	    echo "==== $$python"; \
	    { tools/setup-tests.sh venv "$$python" "$$dir" && \
	        "$$dir/bin/python" -m pytest $(PYTEST_ARGS); } || failed="$$failed $${python##*/}"; \
	done; \
	[ -z "$$failed" ] || { echo "test-all: failed under$$failed" >&2; exit 1; }

lint: venv  ## check style and formatting
	$(RUN) ruff check .
	$(RUN) ruff format --check .

map:  ## list the chapters of backy.py
	@$(PYTHON) tools/map.py backy.py

bench: dist/backy  ## measure
	@if [ -e tools/bench.py ]; then $(PYTHON) tools/bench.py; \
	else echo "make bench: there is no tools/bench.py"; fi

# ---- Other forms

shiv: venv  ## build dist/backy-shiv.pyz, for sites that standardise on shiv
	$(PYTHON) tools/build.py --stage build/stage
	mkdir -p dist
	$(VENV)/bin/shiv --site-packages build/stage --reproducible \
	    -e backy:main -o dist/backy-shiv.pyz

dist:  ## build dist/backy-VERSION.tar.gz from the files that git knows
	mkdir -p dist
	git ls-files -z > dist/files
	tar --create --file=dist/backy-$(VERSION).tar --null --files-from=dist/files \
	    --sort=name --format=ustar --mtime=@$(SOURCE_DATE_EPOCH) \
	    --owner=0 --group=0 --numeric-owner --mode=u=rwX,go=rX \
	    --transform='s,^,backy-$(VERSION)/,S'
	gzip -n -9 -f dist/backy-$(VERSION).tar
	rm dist/files

# ---- Installation: files only; nothing is started, no configuration replaced

install: install-bin install-man install-conf install-systemd install-nagios  ## install all parts (PREFIX, DESTDIR)

install-bin: dist/backy  ## the program
	install -d "$(DESTDIR)$(BINDIR)"
	install -m 755 dist/backy "$(DESTDIR)$(BINDIR)/backy"

install-man:  ## the manual pages
	@$(call install_files,$(wildcard man/*.1),644,$(MANDIR)/man1)
	@$(call install_files,$(wildcard man/*.5),644,$(MANDIR)/man5)

install-conf:  ## the example, also as SYSCONFDIR/backy.conf if there is none
	@$(call install_files,$(wildcard backy.conf.example),644,$(DOCDIR))
	@conf="$(DESTDIR)$(SYSCONFDIR)/backy.conf"; \
	if [ -e "$$conf" ] || [ -L "$$conf" ]; then echo "$$conf is there and stays as it is"; \
	elif [ -e backy.conf.example ]; then \
	    echo "install $$conf"; \
	    install -d "$(DESTDIR)$(SYSCONFDIR)" && install -m 640 backy.conf.example "$$conf"; fi

install-systemd:  ## the units
	@$(call install_files,$(wildcard contrib/systemd/*.service contrib/systemd/*.timer),644,$(UNITDIR))

install-nagios:  ## the plugin
	@$(call install_files,$(wildcard contrib/nagios/check_*),755,$(NAGIOSDIR))

# $(call install_files,FILES,MODE,DIRECTORY)
define install_files
if [ -z "$(strip $(1))" ]; then echo "nothing to install in $(3)"; \
else echo "install $(1) in $(DESTDIR)$(3)"; \
    install -d "$(DESTDIR)$(3)" && install -m $(2) $(1) "$(DESTDIR)$(3)"; fi
endef

clean:  ## remove what was built, but not the virtual environments
	rm -rf build dist backy.egg-info .pytest_cache .ruff_cache .coverage
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

.PHONY: all help venv quick test test-all lint map bench shiv dist clean \
    install install-bin install-man install-conf install-systemd install-nagios
