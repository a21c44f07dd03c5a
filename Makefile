# The front door: what a person or CI does with Bulkhead, one word each.
# Everything slow is cached outside the checkout, in $BULKHEAD_CACHE (~/.cache/bulkhead).

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

CACHE := $(or $(BULKHEAD_CACHE),$(HOME)/.cache/bulkhead)
TESTHOST := tests/host/testhost
AGENT := target/x86_64-unknown-linux-gnu/release/bulkhead-agent
CARGO_DENY_VERSION := 0.20.2
CARGO_DEB_VERSION := 3.8.0
CARGO_DEB := $(CACHE)/tools/cargo-deb-$(CARGO_DEB_VERSION)/bin/cargo-deb
SCRIPTS := guest-kernel/build rootfs/build .ci/run tests/conformance/build-suite tests/conformance/run tests/workloads/image tests/workloads/run packaging/install packaging/make-deb $(addprefix tests/host/,mkimage init enter demo demo-container deps test-all test-install test-installed check-files)

.PHONY: help all deps build kernel rootfs pages install uninstall deb test-install host demo test test-all check bench workloads conformance host-shell host-run clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

all: build kernel rootfs pages ## everything that is installed

deps: ## install the Debian packages that are missing
	@tests/host/deps

build: deps ## the programs for the host, and the guest's agent
	cargo build --release --locked --bins

kernel: deps ## the guest's kernel (about 8 minutes, then cached)
	@guest-kernel/build > /dev/null

rootfs: build ## the guest's root images
	@rootfs/build $(AGENT)

pages: deps ## man pages and completions
	cargo run --quiet --locked --package bulkhead-packaging -- target/pages

# By whoever may write there; builds nothing. PROFILE=fast takes what cargo has built by that profile.
install: ## install what `make all` has built: PREFIX=/usr/local, DESTDIR=, DEBUG_IMAGE=1
	@packaging/install install

uninstall: ## remove it again
	@packaging/install uninstall

deb: all $(CARGO_DEB) ## the Debian package, target/deb/bulkhead_*.deb
	@packaging/make-deb $(CARGO_DEB)

test-install: deb host ## install the package in the test host and use it there
	@tests/host/test-install target/deb/bulkhead_*.deb

host: deps ## the test host: a VM with a working /dev/kvm (about 3 minutes, then cached)
	@$(TESTHOST) build

export PREFIX DESTDIR SYSCONFDIR PROFILE DEBUG_IMAGE

demo: build kernel rootfs ## run a container in its own microVM and show what it sees
	@tests/host/demo

test: build kernel rootfs host ## every test; FILTER=name picks some of the integration tests
	@tests/host/test-all $(FILTER)

test-all: build kernel rootfs host ## the same with every case of Podman and Docker, and of their own runtimes (hours more)
	@tests/host/test-all --all $(FILTER)

check: deps $(CACHE)/tools/cargo-deny-$(CARGO_DENY_VERSION)/bin/cargo-deny ## formatting, lints, documentation, licences, scripts
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	RUSTDOCFLAGS='-D warnings' cargo doc --workspace --no-deps --locked
	$(lastword $^) --workspace --locked --log-level error check bans licenses sources
	@tests/host/check-files $(SCRIPTS)

bench: build kernel rootfs ## measure in virtual time; results in target/bench/results.json
	@$(TESTHOST) run --icount --timeout 3600 --fetch /tmp/results.json:target/bench/results.json -- \
		bulkhead-bench --json /tmp/results.json

workloads: build kernel rootfs host ## a store, servers, a compiler in containers, each with a check of its data; FILTER=name
	@tests/workloads/run $(FILTER)

conformance: build kernel rootfs ## the OCI validation suite, beside crun and runc; CGROUP=v1|v2, FILTER=name
	@CGROUP=$(CGROUP) tests/conformance/run $(FILTER)

host-shell: build kernel rootfs ## a shell in the test host, binaries on PATH
	@$(TESTHOST) shell

host-run: build kernel rootfs ## a command in the test host: make host-run CMD='bulkhead check'
	@$(TESTHOST) run $(if $(CMD),'$(subst ','\'',$(CMD))',$(error say what to run: make host-run CMD='…'))

clean: ## forget what was built here (the cache stays: $BULKHEAD_CACHE)
	rm -rf target

$(CACHE)/tools/cargo-deny-$(CARGO_DENY_VERSION)/bin/cargo-deny:
	@echo "building cargo-deny $(CARGO_DENY_VERSION) (a few minutes, then cached)" >&2
	@mkdir -p $(CACHE)/tools
	cargo install --quiet --locked --version $(CARGO_DENY_VERSION) --root $(CACHE)/tools/cargo-deny-$(CARGO_DENY_VERSION) cargo-deny

$(CARGO_DEB):
	@echo "building cargo-deb $(CARGO_DEB_VERSION) (a few minutes, then cached)" >&2
	@mkdir -p $(CACHE)/tools
	cargo install --quiet --locked --version $(CARGO_DEB_VERSION) --root $(CACHE)/tools/cargo-deb-$(CARGO_DEB_VERSION) cargo-deb
