# The front door: what a person or CI does with Bulkhead, one word each.
# Everything slow is cached outside the checkout, in $BULKHEAD_CACHE (~/.cache/bulkhead).

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

CACHE := $(or $(BULKHEAD_CACHE),$(HOME)/.cache/bulkhead)
TESTHOST := tests/host/testhost
AGENT := target/x86_64-unknown-linux-gnu/release/bulkhead-agent
CARGO_DENY_VERSION := 0.20.2
SCRIPTS := guest-kernel/build rootfs/build .ci/run tests/conformance/build-suite tests/conformance/run $(addprefix tests/host/,mkimage init enter demo demo-container deps test-all check-files)

.PHONY: help deps build kernel rootfs host demo test check bench conformance host-shell host-run clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

deps: ## install the Debian packages that are missing
	@tests/host/deps

build: deps ## the programs for the host, and the guest's agent
	cargo build --release --locked --bins

kernel: deps ## the guest's kernel (about 8 minutes, then cached)
	@guest-kernel/build > /dev/null

rootfs: build ## the guest's root images
	@rootfs/build $(AGENT)

host: deps ## the test host: a VM with a working /dev/kvm (about 3 minutes, then cached)
	@$(TESTHOST) build

demo: build kernel rootfs ## run a container in its own microVM and show what it sees
	@tests/host/demo

test: build kernel rootfs host ## every test; FILTER=name picks some of the integration tests
	@tests/host/test-all $(FILTER)

check: deps $(CACHE)/tools/cargo-deny-$(CARGO_DENY_VERSION)/bin/cargo-deny ## formatting, lints, documentation, licences, scripts
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	RUSTDOCFLAGS='-D warnings' cargo doc --workspace --no-deps --locked
	$(lastword $^) --workspace --locked --log-level error check bans licenses sources
	@tests/host/check-files $(SCRIPTS)

bench: build kernel rootfs ## measure in virtual time; results in target/bench/results.json
	@$(TESTHOST) run --icount --timeout 3600 --fetch /tmp/results.json:target/bench/results.json -- \
		bulkhead-bench --json /tmp/results.json

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
