# All that a fresh Debian 12 or 13 needs beyond git, make, python3 and root; each target can be run again at no cost.
#
#   make demo    two guests and a container share localhost, shown and proven
#   make test    the whole test suite (PYTEST_ARGS="-k localhost" for a part of it)
#   make bench   what the router costs, against its alternatives (BENCH_ARGS="--quick compare" for a part of it)
#   make deb     build/uklaunch_VERSION_all.deb, for Debian 12 and 13
#   make deb-check   installs, upgrades and purges it in fresh trees of both, under running guests
#   make lint    ruff and mypy

SHELL := /bin/bash
.DELETE_ON_ERROR:
.PHONY: setup setup-test demo test bench lint clean

VENV := .venv
PYTHON := $(VENV)/bin/python
IMAGE := /var/lib/uklaunch/default

# python3-bpfcc is bcc, which PyPI does not have: hence Debian's python3 and its system packages in the venv.
PACKAGES := python3-venv python3-bpfcc python3-nftables python3-systemd linux-libc-dev iproute2 util-linux mount qemu-system-x86 qemu-utils runc busybox-static kmod
TEST_PACKAGES := passt containernetworking-plugins dnsmasq-base bind9-dnsutils iperf3 socat nftables curl cpio procps e2fsprogs wireshark-common tshark python3-scapy systemd $(DEB_PACKAGES) lintian debootstrap python3-greenlet python3-idna python3-outcome python3-sortedcontainers
DEB_PACKAGES := debhelper dpkg-dev

# $(call install,PACKAGES): only what is missing, so that a machine which has all needs no network.
install = @missing=$$(dpkg-query -W -f='$${Package} $${Status}\n' $(1) 2>/dev/null | awk '/ok installed$$/ {print $$1}' \
	| sort | comm -13 - <(printf '%s\n' $(1) | sort)); \
	if [ -n "$$missing" ]; then \
		[ $$(id -u) = 0 ] || { echo "make: run this as root: it installs" $$missing >&2; exit 1; }; \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
			apt-get install -y -qq --no-install-recommends $$missing </dev/null >/dev/null; \
	fi

setup: $(VENV)/.installed
	@mountpoint -q /sys/fs/bpf || mount -t bpf bpf /sys/fs/bpf

.PHONY: packages packages-test
packages:
	$(call install,$(PACKAGES))

packages-test:
	$(call install,$(TEST_PACKAGES))

$(VENV)/.installed: pyproject.toml | packages
	test -x $(PYTHON) || /usr/bin/python3 -m venv --system-site-packages $(VENV)
	$(PYTHON) -m pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PYTHON) -m pip install --quiet --editable '.[dev]'
	@touch $@

$(VENV)/.installed-deb: $(VENV)/.installed
	$(PYTHON) -m pip install --quiet --editable '.[deb]'
	@touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	$(PYTHON) -m pip install --quiet --editable '.[bench]'
	@touch $@

# Compiled once, here: whoever runs with PYTHONDONTWRITEBYTECODE would compile them at every start.
.PHONY: bytecode
bytecode: $(VENV)/.installed
	@$(PYTHON) -m compileall -q launcher router

demo: packages setup bytecode
	$(VENV)/bin/uklaunch build-default $(IMAGE)
	$(VENV)/bin/uklaunch demo

setup-test: packages packages-test setup $(VENV)/.installed-dev $(VENV)/.installed-deb bytecode
	$(VENV)/bin/uklaunch build-default $(IMAGE)
	$(PYTHON) -m tests.debian

# The host that the suite plays on: a network namespace with nothing but `lo`, so that no packet leaves the machine.
APART := unshare --net sh -c 'ip link set lo up && exec "$$@"' apart

test: setup-test
	$(APART) $(PYTHON) -m pytest $(PYTEST_ARGS)

bench: setup-test $(VENV)/.installed-bench
	$(APART) $(PYTHON) -m tests.bench $(BENCH_ARGS)

# Built in a copy, which is what the package has: the checkout stays as it is.
.PHONY: packages-deb deb deb-check
packages-deb:
	$(call install,$(DEB_PACKAGES))

DEB := build/deb/uklaunch

deb: packages-deb $(VENV)/.installed-deb
	@rm -rf build/deb && mkdir -p $(DEB)
	@cp -r launcher router guest-config bpf debian pyproject.toml README.md $(DEB)
	@find $(DEB) -name __pycache__ -prune -exec rm -rf {} +
	cd $(DEB) && PYTHON=$(abspath $(PYTHON)) dpkg-buildpackage --build=binary --no-sign >../log 2>&1 || { cat ../log >&2; exit 1; }
	@rm -f build/uklaunch_*.deb && mv build/deb/uklaunch_*.deb build/ && ls build/uklaunch_*.deb

deb-check: deb setup-test
	tests/package/fresh bookworm
	tests/package/fresh trixie

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) build *.egg-info
