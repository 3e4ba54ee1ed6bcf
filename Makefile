# One-line wrappers; the work is in xtask/.
.PHONY: demo test build setup lab install uninstall
PREFIX ?= /usr/local
demo: ; cargo xtask demo
test: ; cargo xtask test
build: ; cargo xtask build
setup: ; cargo xtask setup
lab: ; cargo xtask lab -- $(CMD)
# Without cargo, so that root can do it: make build && sudo make install
install: target/debug/xtask ; target/debug/xtask install --prefix $(PREFIX)
uninstall: target/debug/xtask ; target/debug/xtask uninstall --prefix $(PREFIX)
target/debug/xtask: ; cargo build --quiet --package xtask
